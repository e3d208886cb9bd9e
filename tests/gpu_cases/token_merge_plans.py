"""Matches and plans for gpu_check.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from gpu_cases import Promise, dtype_name, meta
from gpu_cases.token_merge_pairs import promise
from tokenops.triton import token_merge as launchers
from tokenops.types import MatchProblem, Window

KERNELS = "tokenops.triton.token_merge.plan_kernels"


def _lists(batch: int, tokens: int, n_out: int) -> list[torch.Tensor]:
    return [meta(*shape, dtype=torch.int32) for shape in ((batch, tokens), (batch,), (batch, tokens), (batch, n_out + 1))]


class Match(NamedTuple):
    """One call of match_tokens."""

    tokens: int = 197
    r: int | None = 16
    dtype: torch.dtype = torch.bfloat16
    listed: bool = False  # roles of one's own
    window: bool = False

    def __str__(self) -> str:
        words = [dtype_name(self.dtype), f"N{self.tokens}", f"r{self.r}"]
        return " ".join(words + [name for name in ("listed", "window") if getattr(self, name)])

    def launch(self) -> None:
        metric = meta(32, self.tokens, 64, dtype=self.dtype)
        role = meta(1, self.tokens, dtype=torch.int8) if self.listed else None
        place = meta(1, self.tokens, 3, dtype=torch.int32) if self.window else None
        window = Window(-1, -1, 2, 2) if self.window else None
        problem = MatchProblem(metric, role, True, False, place, window, None, None, self.r, None, True)
        launchers.match(problem, *_lists(32, self.tokens, self.tokens - (self.r or 0)))

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        return promise(kernel, self.dtype)


class Plan(NamedTuple):
    """A plan of parents or slots."""

    tokens: int = 1569
    is_slot: bool = False
    dtype: torch.dtype = torch.int32

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} N{self.tokens} {'slots' if self.is_slot else 'parents'}"

    def launch(self) -> None:
        target = meta(8, self.tokens, dtype=self.dtype)
        launchers.plan(target, self.is_slot, *_lists(8, self.tokens, self.tokens // 2))

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        return Promise()


CASES = [
    *(Match(listed=listed, window=window) for listed in (False, True) for window in (False, True)),
    *(Match(1568, r, torch.float32, listed=True, window=True) for r in (300, None)),
    Match(4096, 2000, torch.float16, listed=True),
    *(Plan(tokens, is_slot) for tokens in (10, 197, 1569, 20000) for is_slot in (False, True)),
    *(Plan(is_slot=is_slot, dtype=torch.int64) for is_slot in (False, True)),
]
QUICK = [Match(listed=True, window=True), Plan(is_slot=True)]
