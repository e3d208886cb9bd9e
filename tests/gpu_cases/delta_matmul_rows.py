"""Buffers, and the normalisation of listed rows, for gpu_check.py. Nothing here multiplies tiles, and no shared memory is promised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from gpu_cases import Promise, dtype_name, meta
from tokenops.triton import delta_matmul as launchers
from tokenops.triton.delta_matmul.rows import normalization, normalization_backward

KERNELS = "tokenops.triton.delta_matmul.row_kernels"


class Rows(NamedTuple):
    """Updating a buffer, normalising its listed rows, and both ways back."""

    width: int = 768
    dtype: torch.dtype = torch.bfloat16
    listed: bool = True  # else all rows are normalised

    def __str__(self) -> str:
        return " ".join([dtype_name(self.dtype), f"C{self.width}"] + ["listed"] * self.listed)

    def launch(self) -> None:
        batch, tokens, slots = 8, 4096, 768 if self.listed else 4096
        buffer, rows = (meta(batch, count, self.width, dtype=self.dtype) for count in (tokens, slots))
        index = meta(batch, slots, dtype=torch.int32)
        launchers.update(buffer, rows, index, torch.empty_like(buffer))
        launchers.update_backward(buffer, index, torch.empty_like(buffer), rows)
        weight, bias, names = meta(self.width), meta(self.width), index if self.listed else None
        norm = normalization(buffer, names, weight, bias, 1e-6)
        added = None if self.listed else buffer
        grad = meta(batch, slots, self.width)
        normalization_backward(grad, buffer, names, norm, added, torch.empty_like(buffer), weight, bias)

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        return Promise()


CASES = [
    Rows(width, dtype, listed)
    for dtype in (torch.float32, torch.bfloat16)
    for width in (8, 99, 768, 4096, 5000)
    for listed in (True, False)
]
CASES += [Rows(dtype=torch.float16)]
QUICK = [Rows()]
