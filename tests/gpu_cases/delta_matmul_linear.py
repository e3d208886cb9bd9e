"""Layers on listed rows for gpu_check.py: problems on meta tensors, and what the compiled kernels have to keep."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from gpu_cases import Promise, dtype_name, meta
from tokenops.triton import delta_matmul as launchers
from tokenops.types import LinearGradients, LinearProblem

KERNELS = "tokenops.triton.delta_matmul.linear_kernels"


class Linear(NamedTuple):
    """A layer or two, compact and scattered, and all gradients."""

    dtype: torch.dtype = torch.bfloat16
    slots: int = 768
    widths: tuple[int, ...] = (768, 3072, 768)
    activation: str = "gelu"
    norm: bool = True
    tf32: bool = False

    def __str__(self) -> str:
        words = ["tf32" if self.tf32 else dtype_name(self.dtype), f"K{self.slots} {'-'.join(map(str, self.widths))}", self.activation]
        return " ".join(words + ["norm"] * self.norm)

    def launch(self) -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self.tf32 else "ieee"
        try:
            self._launch()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def _launch(self) -> None:
        x = meta(8, 4096, self.widths[0], dtype=self.dtype)
        layers = [
            part for inner, outer in pairwise(self.widths) for part in (meta(outer, inner, dtype=self.dtype), meta(outer, dtype=self.dtype))
        ]
        second = layers[2:] or [None, None]
        norm = [meta(self.widths[0]), meta(self.widths[0])] if self.norm else [None, None]
        problem = LinearProblem(x, meta(8, self.slots, dtype=torch.int32), *layers[:2], *norm, 1e-6, self.activation, *second)
        compact = meta(8, self.slots, self.widths[-1], dtype=self.dtype)
        launchers.linear(problem, compact)
        launchers.linear_into(problem, meta(8, 4096, self.widths[-1], dtype=self.dtype))
        arguments = (x, *layers[:2], *norm, *second)
        launchers.linear_backward(problem, compact, LinearGradients(*(t if t is None else torch.empty_like(t) for t in arguments)))

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        return Promise(tensor_core=kernel in ("layer", "layer_parameters") and (self.tf32 or self.dtype != torch.float32))


_KINDS: tuple[dict[str, Any], ...] = ({}, {"dtype": torch.float32}, {"dtype": torch.float32, "tf32": True})
CASES = [
    # the large blocks and the small ones
    *(Linear(**kind) for kind in _KINDS),
    *(Linear(slots=8, **kind) for kind in _KINDS),
    # every activation, both ways of its gradient
    *(
        Linear(widths=widths, activation=name, norm=False)
        for widths in ((768, 768), (768, 768, 768))
        for name in ("gelu_tanh", "relu", "silu")
    ),
    # widths that fill no block, or that no wide load fits
    *(Linear(slots=100, widths=widths, activation="none", **kind) for kind in _KINDS for widths in ((96, 288), (20, 12), (99, 333))),
    *(Linear(widths=(768, 2304), activation="none", norm=False, **kind) for kind in _KINDS),
    Linear(dtype=torch.float16),
]
QUICK = [Linear(), Linear(dtype=torch.float32, slots=8)]
