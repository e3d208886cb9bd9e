"""Whether the instructions of a matrix product lay their operands where our kernels think: cp.async, ldmatrix and mma on one tile.

On a GPU this is the first test to run: it says whether the emulator, which all other numbers of the CUDA kernels come from, has it right.
"""

from __future__ import annotations

import pytest
import torch

from tokenops import native

pytestmark = pytest.mark.skipif(native.CUDA_ABSENT is not None, reason=str(native.CUDA_ABSENT))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tile_product(dtype: torch.dtype, seed: int, device: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, 16, generator=generator).to(device, dtype) for rows in (16, 8))
    product = torch.empty(16, 8, device=device)
    torch.ops.tokenops.cuda_tile_product.default(product, a, b)
    torch.testing.assert_close(product, a.float() @ b.float().T)
