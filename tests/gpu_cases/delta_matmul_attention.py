"""Attention on buffers of which a few rows changed, for gpu_check.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from gpu_cases import Promise, dtype_name, meta
from tokenops.triton.delta_matmul import attention as launcher
from tokenops.triton.sparse_attention.tiles import Tiles, shared_bytes
from tokenops.types import DeltaAttentionProblem, DeltaState

KERNELS = "tokenops.triton.delta_matmul.attention_kernels"


class Frame(NamedTuple):
    """One frame; every kernel that it needs is compiled for it."""

    dtype: torch.dtype = torch.bfloat16
    width: int = 64
    value_width: int | None = None  # width if None
    tokens: int = 4096
    cells: int | None = None  # tokens if None: nothing is pooled
    changed: int | None = 768  # None: a first frame
    rel: tuple[int, int] | None = None  # rel_pos on a grid of so many cells
    stored: torch.dtype | None = None  # mode "paper", whose matrix this is; None: mode "exact"
    tf32: bool = False

    def __str__(self) -> str:
        words = ["exact" if self.stored is None else f"paper in {dtype_name(self.stored)}", "tf32" if self.tf32 else dtype_name(self.dtype)]
        words += [f"D{self.width}" + (f",{self.value_width}" if self.value_width else "")]
        words += [f"{self.tokens}x{self.cells}" if self.cells else f"{self.tokens}"]
        words += ["first"] if self.changed is None else [f"J{self.changed}"]
        words += [] if self.rel is None else [f"rel_pos {self.rel[0]}x{self.rel[1]}"]
        return " ".join(words)

    def launch(self) -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self.tf32 else "ieee"
        try:
            self._launch()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def _launch(self) -> None:
        cells, value_width = self.cells or self.tokens, self.value_width or self.width
        index = None if self.changed is None else meta(2, self.changed, dtype=torch.int32)
        rel = (None, None) if self.rel is None else [meta(2, 4, self.tokens, size) for size in self.rel]
        query, key = (meta(2, 4, rows, self.width, dtype=self.dtype) for rows in (self.tokens, cells))
        value = meta(2, 4, cells, value_width, dtype=self.dtype)
        sums = meta(2, 4, self.tokens)
        output = meta(2, 4, self.tokens, value_width)
        if self.stored is None:
            turn = meta(dtype=torch.int32)
            state = DeltaState(output, value, key, sums, sums, sums, turn, None)
        else:
            probability = meta(2, 4, cells, self.tokens, dtype=self.stored)
            state = DeltaState(output, value.to(self.stored), None, None, None, None, None, probability)
        problem = DeltaAttentionProblem(query, key, value, index, index, *rel, 0.125, 1e-2, 128, 0.5)
        launcher(problem, state, output.to(self.dtype))

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        if kernel not in ("exact", "paper"):
            return Promise()
        tiles = Tiles(options["BLOCK_Q"], options["BLOCK_K"], options["num_warps"], options["num_stages"])
        stored = 0 if self.stored is None else self.stored.itemsize
        gathered = stored + (0 if self.rel is None else 2 * 4)
        shared = shared_bytes("forward", tiles, self.width, self.value_width or self.width, max(self.dtype.itemsize, stored), gathered)
        return Promise(shared, tensor_core=self.dtype != torch.float32 or self.tf32)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    *(Frame(dtype, width, rel=rel) for dtype in (BF16, FP32) for width in (32, 64, 128, 256) for rel in (None, (64, 64))),
    *(Frame(FP32, width, rel=rel, tf32=True) for width in (64, 128, 256) for rel in (None, (64, 64))),
    *(Frame(dtype, rel=(64, 64), stored=stored) for dtype in (BF16, FP32) for stored in (BF16, FP16, FP32)),
    *(Frame(dtype, width, stored=dtype) for dtype in (BF16, FP32) for width in (32, 128, 256)),
    *(Frame(dtype, width, changed=None) for dtype in (BF16, FP32) for width in (32, 64, 128, 256)),
    *(Frame(dtype, changed=None, stored=dtype) for dtype in (BF16, FP32)),
    Frame(FP16),
    Frame(FP32, stored=FP32, tf32=True),
    Frame(cells=1024, changed=700, rel=(32, 32)),
    Frame(width=40, value_width=24),
    Frame(width=72, value_width=8, tokens=197, changed=40),
    Frame(tokens=16, changed=4),
    Frame(FP32, tokens=32, changed=4),
]
QUICK = [
    Frame(),
    Frame(FP32, rel=(64, 64)),
    Frame(changed=None),
    Frame(FP32, stored=BF16, rel=(64, 64)),
    Frame(stored=BF16, changed=None),
]
