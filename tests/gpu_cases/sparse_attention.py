"""Gathered-token attention for gpu_check.py: problems on meta tensors, and what the compiled kernels have to keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from gpu_cases import Promise, dtype_name, meta
from tokenops.triton import sparse_attention as launchers
from tokenops.triton.sparse_attention.tiles import Tiles, shared_bytes
from tokenops.types import AttentionGradients, AttentionProblem

KERNELS = "tokenops.triton.sparse_attention.kernels"
# those that multiply tiles
ATTENTION = ("forward", "backward_query", "backward_rel_pos", "backward_key_value")


class Attention(NamedTuple):
    """One call; every kernel is compiled for it."""

    dtype: torch.dtype = torch.bfloat16
    width: int = 64
    value_width: int | None = None  # width if None
    rows: int = 1569
    kept: int | None = 784  # None: no lists
    group: int = 1  # query heads a key head
    bias: bool = False
    causal: bool = False
    mask: torch.dtype | None = None
    rel: tuple[int, int] | None = None  # rel_pos on a grid of so many cells
    rel_dtype: torch.dtype = torch.float32
    packed: bool = False
    by_row: bool = False
    row_sq: bool = True
    tf32: bool = False

    def __str__(self) -> str:
        words = ["tf32" if self.tf32 else dtype_name(self.dtype), f"D{self.width}" + (f",{self.value_width}" if self.value_width else "")]
        words += [f"{self.rows}->{self.kept}" if self.kept else f"{self.rows}"]
        words += [word for word in ("bias", "causal", "packed", "by_row") if getattr(self, word)]
        words += [f"group{self.group}"] * (self.group > 1) + ["no row_sq"] * (not self.row_sq)
        words += [] if self.rel is None else [f"{dtype_name(self.rel_dtype)} rel_pos {self.rel[0]}x{self.rel[1]}"]
        words += [] if self.mask is None else ["bool mask" if self.mask == torch.bool else f"{str(self.mask).removeprefix('torch.')} mask"]
        return " ".join(words)

    def problem(self) -> AttentionProblem:
        batch, heads = (1 if self.packed else 2), 4 * self.group
        value_width = self.value_width or self.width
        index = None if self.kept is None else meta(batch, 1, self.kept, dtype=torch.int32)
        bounds = meta(9, dtype=torch.int32) if self.packed else None
        return AttentionProblem(
            query=meta(batch, heads, self.rows, self.width, dtype=self.dtype),
            key=meta(batch, 4, self.rows, self.width, dtype=self.dtype),
            value=meta(batch, 4, self.rows, value_width, dtype=self.dtype),
            q_index=index,
            kv_index=index,
            kv_bias=meta(batch, 4, self.rows) if self.bias else None,
            attn_mask=None if self.mask is None else meta(1, 1, self.rows, self.rows, dtype=self.mask),
            rel_h=None if self.rel is None else meta(batch, heads, self.rows, self.rel[0], dtype=self.rel_dtype),
            rel_w=None if self.rel is None else meta(batch, heads, self.rows, self.rel[1], dtype=self.rel_dtype),
            is_causal=self.causal,
            scale=0.125,
            dropout_p=0.0,
            dropout_seed=None,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=None,
            max_seqlen_k=None,
        )

    def launch(self) -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self.tf32 else "ieee"
        try:
            self._launch(self.problem())
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def _launch(self, problem: AttentionProblem) -> None:
        batch, heads, rows, _ = problem.query.shape
        slots = rows if self.kept is None else self.kept
        out = meta(batch, heads, rows if self.by_row else slots, problem.value.shape[-1], dtype=self.dtype)
        lse = meta(batch, heads, slots)
        launchers.forward(problem, out, lse, torch.empty_like(lse) if self.row_sq else None, self.by_row)
        if not self.by_row:
            bias = meta(*problem.key.shape[:3]) if self.bias else None
            grids = (torch.empty_like(x) for x in (problem.query, problem.key, problem.value))
            rel = (None if x is None else torch.empty_like(x) for x in (problem.rel_h, problem.rel_w))
            grads = AttentionGradients(*grids, bias, None, *rel)
            launchers.backward(problem, out, out, lse, grads)

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        if kernel not in ATTENTION:
            return Promise()
        tiles = Tiles(options["BLOCK_Q"], options["BLOCK_K"], options["num_warps"], options["num_stages"])
        gathered = (0 if self.mask is None else self.mask.itemsize) + (0 if self.rel is None else 2 * self.rel_dtype.itemsize)
        # backward_rel_pos has the tiles of backward_query
        of = "backward_query" if kernel == "backward_rel_pos" else kernel
        shared = shared_bytes(of, tiles, self.width, self.value_width or self.width, self.dtype.itemsize, gathered)
        return Promise(shared, tensor_core=self.dtype != torch.float32 or self.tf32)


def _grid() -> list[Attention]:
    """Every row of the tile table with the features that need the most registers."""
    kinds = ({"dtype": torch.bfloat16}, {"dtype": torch.float32}, {"dtype": torch.float32, "tf32": True})
    extras = (
        {"packed": True},
        {"bias": True, "causal": True, "group": 2},
        {"bias": True, "causal": True, "mask": torch.float32},
    )
    return [Attention(width=width, **kind, **extra) for kind in kinds for width in (32, 64, 128, 256) for extra in extras]


CASES = [
    *_grid(),
    # the plain ones, which should be fastest
    *(Attention(dtype=dtype, width=width) for dtype in (torch.bfloat16, torch.float16) for width in (64, 128)),
    Attention(kept=None),
    Attention(kept=None, packed=True),
    Attention(kept=None, causal=True),
    Attention(bias=True),
    Attention(group=4),
    Attention(group=3, bias=True),
    Attention(by_row=True, row_sq=False),
    Attention(mask=torch.bool),
    Attention(mask=torch.bfloat16, kept=None),
    Attention(width=72),
    Attention(width=96),
    Attention(width=40, value_width=24),
    Attention(width=8, value_width=256),
    # rel_pos: a whole frame of ViTDet, its windows, the widths of other models; lists
    *(Attention(rows=4096, kept=None, rel=(64, 64), rel_dtype=dtype, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)),
    *(Attention(rows=196, kept=None, rel=(14, 14), dtype=dtype) for dtype in (torch.bfloat16, torch.float32)),
    *(Attention(rows=1764, kept=None, rel=(42, 42), width=width) for width in (32, 80, 128, 256)),
    *(Attention(rows=1764, kept=None, rel=(42, 42), width=width, dtype=torch.float32) for width in (32, 128, 256)),
    Attention(rows=1764, kept=None, rel=(42, 42), dtype=torch.float32, tf32=True),
    Attention(rows=4096, kept=768, rel=(64, 64), bias=True, causal=True, group=2),
    Attention(rows=4096, kept=None, rel=(14, 14), packed=True),
    Attention(rows=4096, kept=None, rel=(64, 64), mask=torch.bool),
    # short sequences
    *(Attention(rows=rows, kept=None, width=width) for rows in (8, 32, 64) for width in (64, 128)),
    *(Attention(rows=16, kept=None, width=width, bias=True, causal=True) for width in (32, 64, 256)),
    *(Attention(rows=rows, kept=None, dtype=torch.float32) for rows in (8, 32)),
]
QUICK = [
    Attention(),
    Attention(bias=True, causal=True, group=2),
    Attention(mask=torch.bool, width=128),
    Attention(dtype=torch.float32),
    Attention(rows=16, kept=None),
    Attention(rows=1564, rel=(34, 46)),
]
