"""Merging along a plan for gpu_check.py. Nothing here multiplies tiles, and no shared memory is promised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from gpu_cases import Promise, dtype_name, meta
from tokenops.triton.token_merge import segments as launchers
from tokenops.types import MergePlan

KERNELS = "tokenops.triton.token_merge.segment_kernels"


class Merge(NamedTuple):
    """A merge, its backward pass, and the way back."""

    mode: str = "mean"
    width: int = 768
    dtype: torch.dtype = torch.float32
    weighted: bool = False

    def __str__(self) -> str:
        return " ".join([dtype_name(self.dtype), f"W{self.width}", self.mode] + ["weighted"] * self.weighted)

    def launch(self) -> None:
        x, y = (meta(8, rows, self.width, dtype=self.dtype) for rows in (197, 181))
        size = meta(8, 197) if self.weighted else None
        slot, count, order, offsets = (meta(8, *shape, dtype=torch.int32) for shape in ((197,), (), (197,), (182,)))
        plan = MergePlan(slot, count, 181, order, offsets)
        launchers.merge(x, plan, size, self.mode, y)
        launchers.merge_backward(y, x, y, plan, size, self.mode, torch.empty_like(x), None if size is None else torch.empty_like(size))
        launchers.unmerge(y, plan, "copy", x)

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        return Promise()


CASES = [
    *(
        Merge(mode, width, dtype)
        for mode in ("mean", "amax", "drop")
        for dtype in (torch.float32, torch.bfloat16)
        for width in (1, 99, 768)
    ),
    *(Merge("mean", width, dtype, True) for dtype in (torch.float32, torch.float16) for width in (8, 768)),
    Merge("sum"),
    Merge("sum", dtype=torch.float16),
]
QUICK = [Merge(weighted=True, dtype=torch.bfloat16), Merge("amax")]
