"""What the Triton backend decides before anything is compiled: tiles, refusals, the precision of float32 products."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch
from cases import Case, build, with_mask
from oracle import problem_of

from tokenops.triton import sparse_attention as launchers
from tokenops.triton.launch import dot_precision, grid_strides
from tokenops.triton.sparse_attention.tiles import LARGEST, TABLE, choose_tiles, pad, row_tiles, shared_bytes

# the package re-exports the function of the module's name
TABLES = {"sparse_attention": TABLE, "delta_attention": importlib.import_module("tokenops.triton.delta_matmul.attention").EXACT}
WIDTHS = (8, 16, 40, 64, 72, 128, 136, 256)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("limit", [None, 232448, 166912, 101376, 65536], ids=str)
@pytest.mark.parametrize("mask", [0, 1, 4, 8], ids=["no mask", "bool mask", "float mask", "rel_pos"])
@pytest.mark.parametrize(
    ("table", "kernel", "itemsize"),
    [(name, *key) for name, table in TABLES.items() for key in table],
    ids=str,
)
def test_tiles_fit_the_device_and_the_problem(table: str, kernel: str, itemsize: int, mask: int, limit: int | None) -> None:
    options = {"gathered": mask, "limit": limit, "table": TABLES[table]}
    for head, value_head, slots, biased in itertools.product(WIDTHS, (8, 64, 256), (1, 8, 17, 32, 64, 5000), (False, True)):
        tiles = choose_tiles(kernel, head, value_head, itemsize, slots, slots, biased=biased, **options)
        for block in (tiles.block_q, tiles.block_k):
            # the kernels read lse and delta in whole blocks, whose padding is LARGEST slots
            assert 16 <= block <= min(LARGEST, pad(slots))
            assert block & (block - 1) == 0
        assert tiles.num_warps in (1, 2, 4, 8)
        assert tiles.num_stages >= 1
        # what the smallest blocks of wide float32 heads take of AMD's 64 KiB is promised too high; only compiling tells
        if limit is not None and (limit > 65536 or itemsize == 2):
            assert shared_bytes(kernel, tiles, head, value_head, itemsize, mask) <= limit


def test_short_sequences_get_short_blocks() -> None:
    options = {"biased": False, "gathered": 0, "limit": None}
    long = choose_tiles("forward", 64, 64, 2, 1000, 1000, **options)
    for frames, block in ((8, 16), (16, 16), (17, 32), (32, 32)):
        tiles = choose_tiles("forward", 64, 64, 2, frames, frames, **options)
        assert (tiles.block_q, tiles.block_k) == (block, block)
        # the same rows a warp
        assert tiles.block_q // tiles.num_warps == long.block_q // long.num_warps


def test_row_blocks_divide_the_padding() -> None:
    for width in range(8, 257, 8):
        assert all(LARGEST % row_tiles(width, itemsize).block_q == 0 for itemsize in (2, 4))


def test_a_row_stride_beyond_32_bits_goes_in_whole() -> None:
    """Kernels multiply it by the unit, in 32 bits if what they get fits there."""
    for stride, unit in ((2**31 - 8, 8), (2**31, 1), (2**35, 1)):
        grid = torch.empty_strided((1, 1, 2, 16), (0, 0, stride, 1), dtype=torch.bfloat16, device="meta")
        assert grid_strides(grid) == (unit, [(0, 0, stride // unit)])


def _call(**more: object) -> dict[str, object]:
    return build(Case("", {"batch": 1, "heads": 2, "query_rows": 9, "key_rows": 9, "width": 16, **more}), torch.float32)


@needs_triton
@pytest.mark.parametrize(
    ("interpret", "needs", "mask", "reason"),
    [
        ("0", (), None, r"runs on CUDA and ROCm GPUs .*, query is on cpu"),
        ("1", ("attn_mask",), None, "gradient of attn_mask is served by the reference only"),
        ("1", (), torch.float64, r"attn_mask must be bool, float32, bfloat16 or float16, got torch\.float64"),
    ],
    ids=["no GPU", "mask gradient", "float64 mask"],
)
def test_objects(monkeypatch: pytest.MonkeyPatch, interpret: str, needs: tuple[str, ...], mask: torch.dtype | None, reason: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    problem = problem_of(with_mask("float")(_call()))
    assert problem.attn_mask is not None
    problem = problem._replace(attn_mask=None if mask is None else problem.attn_mask.to(mask))
    [objection] = launchers.objections(problem, needs)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(objection)


def test_imports_and_objects_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from tokenops.triton import sparse_attention
from tokenops.types import AttentionProblem
grid = torch.zeros(1, 1, 2, 8)
problem = AttentionProblem(grid, grid, grid, *[None] * 6, False, 1.0, 0.0, *[None] * 5)
print(sparse_attention.objections(problem))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert "triton is not installed" in ran.stdout, ran.stderr


def test_float32_products_follow_torchs_switch() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, want in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert dot_precision(torch.float32) == want
            assert dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
