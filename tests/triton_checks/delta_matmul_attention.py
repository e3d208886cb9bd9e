"""Attention on buffers of which a few rows changed, in the interpreter: the room's own tests, on blocks so small that there are several,
and what only the kernels can get wrong."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator

import test_delta_matmul_attention as room
import torch
from delta_matmul_oracle import lists, normal
from oracle import assert_close
from torch import Tensor

from tokenops.triton.sparse_attention.tiles import Tiles
from tokenops.types import DeltaAttentionProblem, DeltaState
from triton_checks import Checks

CHECKS = Checks()
# the package re-exports the function of its name
launchers = importlib.import_module("tokenops.triton.delta_matmul.attention")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Blocks of 16 x 16: rows that are carried over, rows that are computed afresh, and both, in blocks of their own."""
    chosen = launchers.choose_tiles
    launchers.choose_tiles = lambda *_, **__: Tiles(block_q=16, block_k=16, num_warps=1, num_stages=1)
    try:
        yield
    finally:
        launchers.choose_tiles = chosen


def _in_small_tiles(test: Callable[..., None], *arguments: object) -> None:
    with small_tiles():
        test(*arguments, "triton", "cpu")


def _add(name: str, test: Callable[..., None], *arguments: object) -> None:
    CHECKS[name] = functools.partial(_in_small_tiles, test, *arguments)


for _dtype_, _case_ in ((FP32, "pool and rel_pos"), (BF16, "rel_pos"), (FP16, "plain")):
    _add(f"exact is dense attention, {_case_}, {_dtype_}", room.test_exact_is_dense_attention_on_the_buffers, _dtype_, _case_)
_add("paper is the published update", room.test_paper_is_the_published_update, "pool and rel_pos")
_add("paper stores bfloat16", room.test_paper_stores_what_cast_says, BF16)
for _mode_ in ("exact", "paper"):
    _add(f"{_mode_} without an index starts afresh", room.test_without_an_index_everything_starts_afresh, _mode_)
_add("samples do not know of each other", room.test_samples_do_not_know_of_each_other, "exact", "rel_pos")
_add("exact in place is the same", room.test_in_place_is_the_same, "exact", "plain")
_add("exact computes most rows from their sums", room.test_exact_computes_most_rows_from_their_sums)
_add("the guard sees cancellation", room.test_the_guard_sees_cancellation)
_add("a larger maximum rescales", room.test_a_larger_maximum_rescales)
_add("infinity passes by", room.test_infinity_passes_by)


def _state(problem: DeltaAttentionProblem, stored: torch.dtype | None) -> DeltaState:
    """Memory for a first frame."""
    (batch, heads, tokens, _), (cells, width) = problem.query.shape, problem.value.shape[2:]
    output, sums = torch.empty(batch, heads, tokens, width), [torch.empty(batch, heads, tokens) for _ in range(3)]
    if stored is None:
        return DeltaState(
            output, torch.empty_like(problem.value), torch.empty_like(problem.key), *sums, torch.empty((), dtype=torch.int32), None
        )
    value = torch.empty_like(problem.value, dtype=stored)
    return DeltaState(output, value, None, None, None, None, None, torch.empty(batch, heads, cells, tokens, dtype=stored))


def _problem(tokens: int = 40, cells: int = 40, width: int = 16, dtype: torch.dtype = FP32) -> DeltaAttentionProblem:
    query, key, value = (normal(2, 2, rows, width, dtype=dtype, seed=seed) for seed, rows in enumerate((tokens, cells, cells)))
    return DeltaAttentionProblem(query, key, value, None, None, None, None, 0.25, 0.0, 0, 1.0)


def _run(problem: DeltaAttentionProblem, state: DeltaState) -> Tensor:
    out = torch.empty(*problem.query.shape[:3], problem.value.shape[3], dtype=problem.query.dtype)
    launchers.attention(problem, state, out)
    return out


@CHECKS.add
def what_is_subtracted_is_what_was_added() -> None:
    """Also in half types: a key that goes and comes back leaves the sums where they were, not a rounding of its weight away."""
    nothing = torch.full((1, 1), -1, dtype=torch.int32)
    for dtype in (BF16, FP16):
        problem = _problem(dtype=dtype)
        state = _state(problem, None)
        _run(problem, state)
        before = [part.clone() for part in (state.output, state.total)]
        index = lists(2, 40, 17)
        other = normal(*problem.key.shape, dtype=dtype, seed=9) * 1.5
        changed = torch.zeros(2, 41, dtype=torch.bool).scatter(1, index.long().masked_fill(index < 0, 40), True)[:, None, :40, None]
        frame = problem._replace(rows=nothing, cells=index)
        with small_tiles():
            for _ in range(2):
                for key in (torch.where(changed, other, problem.key), problem.key):
                    _run(frame._replace(key=key), state)
        # the maximum has grown with the larger keys in between, and stayed there
        assert state.maximum is not None
        assert torch.equal(state.maximum, state.maximum.round())
        fresh = _state(problem, None)
        _run(problem, fresh)
        shift = torch.exp2(fresh.maximum - state.maximum)
        assert (shift < 1.0).any()
        assert_close("total", state.total / shift, before[1], FP32)
        assert_close("output", state.output / shift[..., None], before[0], FP32)


@CHECKS.add
def ids_outside_of_the_grid_are_empty_slots() -> None:
    """The door refuses such ids in checked mode only, so the kernels must not read what they name."""
    wild = torch.tensor([[3, 40, 2**31 - 1, -(2**31), 7, -2, 39]], dtype=torch.int32)
    tame = torch.tensor([[3, -1, -1, -1, 7, -1, 39]], dtype=torch.int32)
    for stored in (None, FP32):
        problem = _problem()
        states = [_state(problem, stored) for _ in range(2)]
        second = problem._replace(key=normal(2, 2, 40, 16, seed=5), value=normal(2, 2, 40, 16, seed=6))
        results = []
        for index, state in zip((wild, tame), states, strict=True):
            _run(problem, state)
            with small_tiles():
                results.append(_run(second._replace(rows=index, cells=index), state))
        assert torch.equal(*results)
        for one, other in zip(*states, strict=True):
            assert one is other is None or torch.equal(one, other)


@CHECKS.add
def every_slice_has_its_turn() -> None:
    """The last slice is shorter, a frame without a changed token counts, and the first slice follows on the last one."""
    problem = _problem(tokens=37, cells=20)
    right = _state(problem, None)
    want = _run(problem, right)
    nothing = torch.empty(1, 0, dtype=torch.int32)
    state = right._replace(output=right.output + 100.0, turn=torch.zeros((), dtype=torch.int32))
    for frame in range(5):
        with small_tiles():
            out = _run(problem._replace(rows=nothing, cells=nothing, refresh=4), state)
        wrong = ((out - want).abs().amax(-1) > 1.0).flatten(0, 1)
        assert torch.equal(wrong, (torch.arange(37) >= 10 * (frame + 1)).expand_as(wrong)), frame
        assert int(state.turn) == (frame + 1) % 4


@CHECKS.add
def only_samples_that_changed_much_are_computed_afresh() -> None:
    problem = _problem()
    right = _state(problem, None)
    want = _run(problem, right)
    index = torch.arange(12, dtype=torch.int32).repeat(2, 1)
    index[1, 8:] = -1
    state = right._replace(output=right.output + 100.0)
    with small_tiles():
        # 12 of 40 are more than a quarter, 8 are not
        out = _run(problem._replace(rows=index, cells=index, crossover=0.25), state)
    wrong = (out - want).abs().amax(-1) > 1.0
    assert not wrong[0].any()
    assert torch.equal(wrong[1], (torch.arange(40) >= 8).expand(2, -1))
