"""The search for the most similar rows for gpu_check.py. No shared memory is promised; half types have to use the tensor cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from gpu_cases import Promise, dtype_name, meta
from tokenops.triton import token_merge as launchers
from tokenops.types import PairProblem, Window

KERNELS = "tokenops.triton.token_merge.pair_kernels"


def promise(kernel: str, dtype: torch.dtype, tf32: bool = False) -> Promise:
    return Promise(tensor_core=kernel == "search" and (dtype != torch.float32 or tf32))


class Pairs(NamedTuple):
    """One call of pairwise_argmax."""

    width: int = 64
    dtype: torch.dtype = torch.bfloat16
    rows: int = 1000
    columns: int = 1000
    batch: int = 32
    window: bool = False
    normalize: bool = True
    weighted: bool = False  # masks and scales
    tf32: bool = False

    def __str__(self) -> str:
        words = ["tf32" if self.tf32 else dtype_name(self.dtype), f"C{self.width}", f"{self.batch}x{self.rows}x{self.columns}"]
        return " ".join(words + [name for name in ("window", "weighted") if getattr(self, name)] + ["dot"] * (not self.normalize))

    def launch(self) -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self.tf32 else "ieee"
        try:
            self._launch()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def _launch(self) -> None:
        sides = (self.rows, self.columns)
        a, b = (meta(self.batch, size, self.width, dtype=self.dtype) for size in sides)
        masks = [meta(self.batch, size, dtype=torch.bool) if self.weighted else None for size in sides]
        scales = [meta(1, size) if self.weighted else None for size in sides]
        places = [meta(1, size, 3, dtype=torch.int32) if self.window else None for size in sides]
        window = Window(-1, 1, 2, 2) if self.window else None
        best, index = meta(self.batch, self.rows), meta(self.batch, self.rows, dtype=torch.int32)
        launchers.argmax(PairProblem(a, b, *masks, *scales, *places, window, self.normalize), best, index)

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        return promise(kernel, self.dtype, self.tf32)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    *(Pairs(width, dtype, window=window) for dtype in DTYPES for width in (64, 128, 768) for window in (False, True)),
    *(Pairs(width, dtype) for dtype in DTYPES for width in (8, 24, 40, 200)),
    *(Pairs(64, dtype, size, size) for dtype in DTYPES for size in (1, 16, 20, 50, 98)),
    *(Pairs(64, dtype, 2048, 2048, batch=1, window=window) for dtype in DTYPES for window in (False, True)),
    *(Pairs(64, dtype, normalize=False, weighted=True) for dtype in DTYPES),
    *(Pairs(width, torch.float32, window=window, tf32=True) for width in (64, 768) for window in (False, True)),
    *(Pairs(64, dtype, 50, 16, window=True, weighted=True) for dtype in DTYPES),
    Pairs(weighted=True, window=True),
]
QUICK = [Pairs(), Pairs(64, torch.float32, 2048, 2048, batch=1, window=True)]
