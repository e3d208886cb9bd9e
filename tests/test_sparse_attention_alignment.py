"""Grids that begin, or whose rows begin, at no multiple of 16 bytes: kernels that copy pieces of 16 bytes copy these number by number."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_same_numbers, computed
from test_sparse_attention import DTYPES
from torch import Tensor

import tokenops

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def shifted(x: Tensor, shift: int, width: int) -> Tensor:
    """The same numbers in rows of another width, NaN around them."""
    return x.new_full((*x.shape[:3], width), torch.nan)[..., shift : shift + 24].copy_(x)


@every_dtype
def test_output(dtype: torch.dtype, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    aligned = [torch.randn(2, 3, rows, 24, generator=generator).to(device, dtype) for rows in (40, 70, 70)]
    want = tokenops.sparse_attention(*aligned, backend=backend)
    for shift, width in ((1, 32), (0, 25)):
        grids = [shifted(x, shift, width) for x in aligned]
        out = torch.zeros(2, 3, 40, width, device=device, dtype=dtype)[..., shift : shift + 24]
        assert_same_numbers("out", tokenops.sparse_attention(*grids, backend=backend), want, backend)
        assert_same_numbers("out", tokenops.sparse_attention(*grids, out=out, backend=backend), want, backend)


@every_dtype
def test_gradients(dtype: torch.dtype, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    *aligned, grad_out = (torch.randn(2, 3, rows, 24, generator=generator).to(device, dtype) for rows in (40, 70, 70, 40))
    call = dict(zip(("query", "key", "value"), aligned, strict=True))
    want = computed(call, grad_out, backend).grads
    for shift, width in ((1, 32), (0, 25)):
        grids = {name: shifted(x, shift, width) for name, x in call.items()}
        grad = shifted(grad_out, shift, width)
        for name, got in computed(grids, grad, backend).grads.items():
            assert_same_numbers(name, got, want[name], backend)
