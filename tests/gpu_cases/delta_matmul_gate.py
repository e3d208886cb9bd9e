"""The gate for gpu_check.py. Nothing here multiplies tiles, and no shared memory is promised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from gpu_cases import Promise, dtype_name, meta
from tokenops.triton import delta_matmul as launchers
from tokenops.types import DeltaGate, GateBackwardProblem, GateGradients, GateProblem

KERNELS = "tokenops.triton.delta_matmul.gate_kernels"


class Gate(NamedTuple):
    """A gate and its backward pass."""

    width: int = 768
    dtype: torch.dtype = torch.bfloat16
    order: float = 2.0
    skip: bool = True
    norm: bool = True
    first: bool = False
    forced: bool = False
    whole: bool = False
    in_place: bool = False

    def __str__(self) -> str:
        words = [dtype_name(self.dtype), f"C{self.width}", *([] if self.order == 2.0 else [f"order {self.order:g}"])]
        return " ".join(words + [name for name in ("skip", "norm", "first", "forced", "whole", "in_place") if getattr(self, name)])

    def launch(self) -> None:
        batch, tokens, slots = 8, 4096, 4096 if self.first else 768

        def grid(rows: int) -> torch.Tensor:
            return meta(batch, rows, self.width, dtype=self.dtype)

        index = meta(batch, slots, dtype=torch.int32)
        norm = (meta(self.width), meta(self.width)) if self.norm else (None, None)
        old = None if self.first else grid(tokens)
        new = DeltaGate(index, meta(batch, dtype=torch.int32), grid(slots), grid(slots), grid(tokens), grid(tokens))
        if self.in_place and old is not None:
            new = new._replace(reference=old)
        x, skip = grid(tokens), grid(tokens) if self.skip else None
        launchers.gate(GateProblem(x, skip, old, *norm, 1e-6, index if self.forced else None, None, self.order, self.whole), new)
        of_results = (new.values, new.delta, new.reference, new.total if self.skip else None)
        problem = GateBackwardProblem(x, *norm, 1e-6, index, self.whole, self.first, *of_results)
        launchers.gate_backward(problem, GateGradients(grid(tokens), None if self.first else grid(tokens), *norm))

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        return Promise()


_DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    # one row in registers, the longest of them, longer ones; rows that no wide load fits
    *(Gate(width, dtype) for dtype in _DTYPES for width in (8, 99, 768, 4096, 5000)),
    *(Gate(order=order, skip=False) for order in (0.0, 1.0, 3.0, math.inf)),
    *(Gate(dtype=dtype, first=True, skip=skip, norm=skip) for dtype in _DTYPES for skip in (False, True)),
    *(Gate(dtype=dtype, in_place=True, whole=whole) for dtype in _DTYPES for whole in (False, True)),
    *(Gate(forced=True, in_place=in_place, skip=False) for in_place in (False, True)),
    Gate(dtype=torch.float16, whole=True),
]
QUICK = [Gate(), Gate(dtype=torch.float32, in_place=True)]
