"""What this machine can do at best, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from tokenops import native

from .harness import DTYPES, Clock, Cost

GEMM = {"cpu": 2048, "cuda": 8192}  # rows, columns and depth
COPY = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes read, and as many written: far beyond any cache
STEPS = 2_000_000  # of multiply-adds on every thread: longer than the turn of another process on the core

_library = torch.library.Library("tokenops", "FRAGMENT")
# every thread does ``steps`` of independent multiply-adds in registers; returns the operations of all threads
_library.define("cpu_multiply_add(int steps, bool bf16, str isa) -> int")


class Roof(NamedTuple):
    """Best of the tries: a roof is what is possible, not what is typical."""

    copy: float  # bytes/s, read and written, by torch's copy
    gemm: dict[str, float]  # dtype -> FLOP/s of torch's matrix product, which does not reach the peak everywhere
    peak: dict[str, float]  # dtype -> FLOP/s of multiply-adds that touch no memory, in the instructions our kernels use; empty if unknown

    def percent(self, cost: Cost, dtype: str, seconds: float) -> dict[str, float]:
        """How much of each roof a call of this cost and time uses."""
        used = {"copy": cost.bytes / self.copy, "gemm": cost.flops / self.gemm[dtype]}
        if dtype in self.peak:
            used["peak"] = cost.flops / self.peak[dtype]
        return {name: 100 * best / seconds for name, best in used.items()}

    def best(self, other: Roof) -> Roof:
        """The higher of each: what was lower had been disturbed."""

        def higher(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
            return {name: max(a.get(name, 0.0), b.get(name, 0.0)) for name in {**a, **b}}

        return Roof(max(self.copy, other.copy), higher(self.gemm, other.gemm), higher(self.peak, other.peak))


def measure_roof(device: str, dtypes: set[str], clock: Clock, seconds: float) -> Roof:
    """``seconds`` for each of the measurements, at least one try."""
    gemm, peak = {}, {}
    kind = torch.device(device).type
    rows, size = GEMM[kind], COPY[kind]
    for dtype in sorted(dtypes):
        # random: a GPU at its power limit multiplies ones faster than numbers
        a, b, c = (torch.randn(rows, rows, device=device).to(DTYPES[dtype]) for _ in range(3))
        gemm[dtype] = 2 * rows**3 / _best(partial(torch.mm, a, b, out=c), clock, seconds)
        if kind == "cpu" and not native.CPU_ABSENT:
            peak[dtype] = _multiply_add_peak(dtype, clock, seconds)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Roof(2 * size / _best(partial(target.copy_, source), clock, seconds), gemm, peak)


def _multiply_add_peak(dtype: str, clock: Clock, seconds: float) -> float:
    flops = 0

    def call() -> None:
        nonlocal flops
        flops = torch.ops.tokenops.cpu_multiply_add(STEPS, dtype == "bf16", native.default_cpu_isa())

    best = _best(call, clock, seconds)
    return flops / best


def _best(call: Callable[[], object], clock: Clock, seconds: float) -> float:
    stop = time.monotonic() + seconds
    best = clock.time(call)
    while time.monotonic() < stop:
        best = min(best, clock.time(call))
    return best
