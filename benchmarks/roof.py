"""What this machine can do at best, measured in the same run: a large matrix product and a large copy, both torch's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .harness import DTYPES, Clock, Cost, Results

GEMM = 2048  # rows, columns and depth
COPY = 256 << 20  # bytes read, and as many written: far beyond any cache


class Roof(NamedTuple):
    """Best of the tries: a roof is what is possible, not what is typical."""

    gemm: dict[str, float]  # dtype -> FLOP/s
    copy: float  # bytes/s, read and written

    def percent(self, cost: Cost, dtype: str, seconds: float) -> tuple[float, str]:
        """How much of the nearer roof is used, and which one that is."""
        return max((100 * cost.flops / seconds / self.gemm[dtype], "gemm"), (100 * cost.bytes / seconds / self.copy, "copy"))


def measure_roof(device: str, dtypes: set[str], clock: Clock, seconds: float = 0.6) -> Roof:
    """``seconds`` for each of the measurements."""
    gemm = {}
    for dtype in sorted(dtypes):
        a, b, c = (torch.ones(GEMM, GEMM, dtype=DTYPES[dtype], device=device) for _ in range(3))
        gemm[dtype] = 2 * GEMM**3 / _best(lambda a=a, b=b, c=c: (torch.mm(a, b, out=c),), clock, seconds)
    source = torch.ones(COPY, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Roof(gemm, 2 * COPY / _best(lambda: (target.copy_(source),), clock, seconds))


def _best(call: Callable[[], Results], clock: Clock, seconds: float) -> float:
    stop = time.monotonic() + seconds
    best = clock.time(call)
    while time.monotonic() < stop:
        best = min(best, clock.time(call))
    return best
