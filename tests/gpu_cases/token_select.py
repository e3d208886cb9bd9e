"""Token selection, halting and packing for gpu_check.py. Nothing here multiplies tiles, and no shared memory is promised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from gpu_cases import Promise, dtype_name, meta
from tokenops.triton import token_select as launchers
from tokenops.types import HaltBackwardProblem, HaltProblem, HaltState

KERNELS = "tokenops.triton.token_select.kernels"


class Select(NamedTuple):
    """One choice of tokens."""

    tokens: int = 4096
    slots: int = 1024
    dtype: torch.dtype = torch.float32
    threshold: float | None = None

    def __str__(self) -> str:
        words = [dtype_name(self.dtype), f"{self.tokens}->{self.slots}"]
        return " ".join(words + ["threshold"] * (self.threshold is not None))

    def launch(self) -> None:
        score, index = meta(8, self.tokens, dtype=self.dtype), meta(8, self.slots, dtype=torch.int32)
        launchers.select(score, self.threshold, 1, index, meta(8, dtype=torch.int32))

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        return Promise()


class Halt(NamedTuple):
    """One halting step and its backward pass."""

    width: int = 384
    dtype: torch.dtype = torch.float32
    class_only: bool = False
    packed: bool = False
    first: bool = False
    last: bool = False
    in_place: bool = False

    def __str__(self) -> str:
        words = [dtype_name(self.dtype), f"C{self.width}"]
        return " ".join(words + [name for name in ("class_only", "packed", "first", "last", "in_place") if getattr(self, name)])

    def launch(self) -> None:
        batch, tokens = (1, 8000) if self.packed else (8, 1105)
        x = meta(batch, tokens, self.width, dtype=self.dtype)
        bounds = meta(9, dtype=torch.int32) if self.packed else None
        options = (bounds, 10.0, 5.0, 0.99, self.last, self.class_only)

        def state() -> HaltState:
            rows = [meta(batch, tokens) for _ in range(4)]
            out = meta(8, self.width) if self.class_only else meta(*x.shape)
            return HaltState(rows[0], rows[1], meta(batch, tokens, dtype=torch.bool), rows[2], rows[3], out)

        old = None if self.first else state()
        launchers.halt(HaltProblem(x, old, *options), old if self.in_place else state())
        if not self.in_place:
            new = state()
            before = (None, None) if old is None else (old.remain, old.active)
            problem = HaltBackwardProblem(x, new.cum, new.remain, new.rho, new.out, *before, new.cum, *options)
            launchers.halt_backward(problem, torch.empty_like(x), meta(batch, tokens))

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        return Promise()


class Pack(NamedTuple):
    """Packing and unpacking the same rows."""

    width: int = 384
    dtype: torch.dtype = torch.float32
    listed: bool = True
    shared: bool = False  # all lists name rows of one grid

    def __str__(self) -> str:
        return " ".join([dtype_name(self.dtype), f"W{self.width}", "index" if self.listed else "count"] + ["shared"] * self.shared)

    def launch(self) -> None:
        x = meta(1 if self.shared else 8, 1105, self.width, dtype=self.dtype)
        index = meta(8, 500, dtype=torch.int32) if self.listed else None
        count = None if self.listed else meta(8, dtype=torch.int32)
        tokens, cu_seqlens = meta(4000, self.width, dtype=self.dtype), meta(9, dtype=torch.int32)
        launchers.pack(x, index, count, tokens, cu_seqlens)
        launchers.unpack(tokens, cu_seqlens, index, x)

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        return Promise()


CASES = [
    *(Select(tokens, tokens // 4, dtype) for dtype in (torch.float32, torch.bfloat16) for tokens in (197, 1000, 1569, 4096, 65536)),
    Select(dtype=torch.float16, threshold=0.5),
    Select(threshold=0.5),
    Select(slots=4096, threshold=0.5),
    # every token has a slot, so nothing is searched
    Select(tokens=1568, slots=1568, threshold=0.5),
    *(Halt(width, dtype) for dtype in (torch.float32, torch.bfloat16) for width in (8, 100, 384, 768)),
    *(Halt(class_only=class_only, packed=packed) for class_only in (False, True) for packed in (False, True)),
    *(Halt(in_place=True, class_only=class_only, packed=packed) for class_only in (False, True) for packed in (False, True)),
    *(Halt(first=True, class_only=class_only) for class_only in (False, True)),
    Halt(last=True),
    Halt(dtype=torch.float16, class_only=True, packed=True, last=True),
    *(Pack(width, dtype) for dtype in (torch.int8, torch.bfloat16, torch.float32, torch.float64) for width in (1, 99, 384)),
    Pack(listed=False),
    Pack(dtype=torch.bfloat16, listed=False, width=768),
    Pack(shared=True),
]
QUICK = [Select(), Select(dtype=torch.bfloat16, threshold=0.5), Halt(), Halt(dtype=torch.bfloat16, class_only=True, packed=True), Pack()]
