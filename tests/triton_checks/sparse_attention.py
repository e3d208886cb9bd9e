"""Gathered-token attention in the interpreter: numbers, borders, promises."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import test_sparse_attention_varlen as varlen
import torch
from cases import CASES, Call, Case, both, build, with_bias, with_mask, with_scattered_lists
from oracle import assert_close, assert_right, computed, expected, objections, problem_of
from torch import Tensor

import tokenops
from tokenops.triton import sparse_attention as triton_attention
from tokenops.triton.sparse_attention.tiles import Tiles
from tokenops.types import AttentionGradients, AttentionProblem
from triton_checks import Checks, NotServedError

CHECKS = Checks()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Blocks of 16 x 16: a few rows then have every border that long lists have, and cost a few turns of a loop."""
    chosen = triton_attention.choose_tiles
    triton_attention.choose_tiles = lambda *_, **__: Tiles(block_q=16, block_k=16, num_warps=1, num_stages=1)
    try:
        yield
    finally:
        triton_attention.choose_tiles = chosen


def is_small(call: Call) -> bool:
    batch, heads, rows, _ = call["query"].shape
    return batch * heads <= 8 and max(rows, call["key"].shape[2]) <= 64


# the cases that all backends share: with the tiles of the table, and in float32 cut small


def _case(case: Case, dtype: torch.dtype) -> None:
    call = build(case, dtype)
    if refusal := objections("triton", call):
        raise NotServedError("; ".join(refusal))
    assert_right(call, "triton")
    if dtype == torch.float32 and is_small(call):
        with small_tiles():
            assert_right(call, "triton")


for _number_, _case_ in enumerate(CASES):
    # float16 differs from bfloat16 by its rounding only, so every third case will do
    for _name_ in ("fp32", "bf16", "fp16") if _number_ % 3 == 0 else ("fp32", "bf16"):
        CHECKS[f"{_case_.name}, {_name_}"] = functools.partial(_case, _case_, DTYPES[_name_])


# packed sequences


def packed(
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...],
    *,
    heads: int = 2,
    kv_heads: int = 2,
    padding: int = 0,
    grid: int | None = None,
    dtype: torch.dtype = torch.float32,
    **more: object,
) -> Call:
    """Sequences of some lengths; with ``grid``, lists (with empty slots) into grids of that many rows."""

    def bounds(lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)

    total_q, total_k = sum(lengths_q) + padding, sum(lengths_k) + padding
    rows_q, rows_k = (total_q, total_k) if grid is None else (grid, grid)
    call: Call = {
        "query": tensor(rows_q, heads, 16, seed=1).to(dtype),
        "key": tensor(rows_k, kv_heads, 16, seed=2).to(dtype),
        "value": tensor(rows_k, kv_heads, 24, seed=3).to(dtype),
        "cu_seqlens_q": bounds(lengths_q),
        "cu_seqlens_k": bounds(lengths_k),
        "kv_bias": tensor(kv_heads, rows_k, seed=4),
        **more,
    }
    if grid is not None:
        for name, count, some_heads in (("q_index", total_q, heads), ("kv_index", total_k, kv_heads)):
            index = torch.rand(some_heads, grid, generator=torch.Generator().manual_seed(5)).argsort(-1)[:, :count].int()
            index[:, ::5] = -1
            call[name] = index
    return call


PACKED: dict[str, Callable[..., Call]] = {
    "packed": functools.partial(packed, (5, 40, 17), (9, 21, 33)),
    "packed, causal": functools.partial(packed, (20, 33), (20, 33), is_causal=True),
    "packed, padding, empty sequences": functools.partial(packed, (0, 18, 0, 3), (7, 0, 5, 20), padding=19),
    "packed, many short": functools.partial(packed, (3, 1, 4, 1, 5, 9, 2, 6), (2, 7, 1, 8, 2, 8, 1, 8)),
    "packed, grouped heads, lists": functools.partial(packed, (19, 3, 16), (4, 16, 20), heads=4, grid=64, padding=5),
    "packed, rel_pos, padding, empty sequences": functools.partial(
        packed, (0, 18, 0, 3), (7, 0, 5, 20), padding=19, rel_pos=(tensor(40, 2, 7), tensor(40, 2, 3))
    ),
    "packed, rel_pos, causal, long rows": functools.partial(
        packed, (20, 33), (20, 33), is_causal=True, rel_pos=(tensor(53, 2, 2), tensor(53, 2, 20))
    ),
    "packed, rel_pos, grouped heads, lists": functools.partial(
        packed, (19, 3, 16), (4, 16, 20), heads=4, grid=64, padding=5, rel_pos=(tensor(64, 4, 4), tensor(64, 4, 5))
    ),
    "packed, causal lists": functools.partial(packed, (18, 20), (20, 18), grid=50, is_causal=True),
}


def _packed(make: Callable[..., Call], dtype: torch.dtype) -> None:
    call = make(dtype=dtype)
    assert_right(call, "triton")
    if dtype == torch.float32:
        with small_tiles():
            assert_right(call, "triton")


for _name_, _make_ in PACKED.items():
    for _dtype_ in ("fp32", "bf16"):
        CHECKS[f"{_name_}, {_dtype_}"] = functools.partial(_packed, _make_, DTYPES[_dtype_])


@CHECKS.add
def padding_is_not_written_into_a_grid() -> None:
    for call in (packed((5, 18), (9, 21), padding=7), packed((19, 3, 16), (4, 16, 20), heads=4, grid=64, padding=5)):
        rows, heads, _ = call["query"].shape
        compact = tokenops.sparse_attention_varlen(**call, backend="triton")
        grid = torch.full((rows, heads, 24), 7.0)
        tokenops.sparse_attention_varlen(**call, out=grid, backend="triton")
        want = torch.full_like(grid, 7.0)
        for h, index in enumerate(call.get("q_index", torch.arange(rows)).expand(heads, -1)):
            used = index[: call["cu_seqlens_q"][-1]]
            want[used[used >= 0], h] = compact[: len(used)][used >= 0, h]
        assert torch.equal(grid, want)


# rel_pos, where a row of cells needs more than one block, or next to nothing of one

_ON_A_GRID_ = {"batch": 1, "heads": 4, "kv_heads": 2, "query_rows": 40, "key_rows": 40, "width": 16}
for _case_ in (
    Case("positions in one column", {**_ON_A_GRID_, "query_rows": 9, "key_rows": 20, "rel_grid": (20, 1)}),
    Case(
        "positions in long rows",
        {**_ON_A_GRID_, "rel_grid": (2, 20), "kept": 11, "kv_kept": 27, "lists": "head", "empty": 0.2, "bias": True},
        both(with_scattered_lists, with_mask("infinite", "BhNM", is_causal=True)),
    ),
):
    CHECKS[f"{_case_.name}, fp32"] = functools.partial(_case, _case_, torch.float32)


@CHECKS.add
def a_key_behind_its_grid_has_no_bias() -> None:
    """On a GPU nobody counts the keys of packed sequences: those that the grid has no cell for must not read one."""
    rel_h, rel_w = tensor(40, 2, 2), torch.zeros(40, 2, 4)
    call = packed((16, 24), (20, 18))
    # the same on a grid that is large enough
    short, long = (problem_of({**call, "rel_pos": (part, rel_w)}) for part in (rel_h, torch.nn.functional.pad(rel_h, (0, 3))))
    for tiles in (contextlib.nullcontext(), small_tiles()):
        with tiles:
            out, lse, _ = _forward(short)
            for got, want in zip((out, lse), _forward(long), strict=False):
                assert torch.equal(got, want)
            for got, want in zip(_backward(short, out, lse)[:4], _backward(long, out, lse)[:4], strict=True):
                assert torch.equal(got, want)


# borders and promises


LISTS = {
    "batch": 2,
    "heads": 4,
    "kv_heads": 2,
    "query_rows": 40,
    "key_rows": 37,
    "width": 16,
    "kept": 23,
    "kv_kept": 21,
    "lists": "head",
    "empty": 0.2,
}


def _listed(**more: object) -> Call:
    return build(Case("", {**LISTS, **more}, with_bias("BHM")), torch.float32)


def _forward(problem: AttentionProblem, row_sq: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, heads, rows, _ = problem.query.shape
    slots = rows if problem.q_index is None else problem.q_index.shape[-1]
    out = torch.empty(batch, heads, slots, problem.value.shape[-1], dtype=problem.query.dtype)
    lse, squares = torch.empty(2, batch, heads, slots)
    triton_attention.forward(problem, out, lse, squares if row_sq else None, by_row=False)
    return out, lse, squares if row_sq else None


@CHECKS.add
def rows_are_written_into_a_grid() -> None:
    call = _listed()
    want = expected(call, None)
    for tiles in (contextlib.nullcontext(), small_tiles()):
        with tiles, torch.no_grad():
            grid = torch.full((2, 40, 4, 16), 7.0).transpose(1, 2)
            tokenops.sparse_attention(**call, out=grid, backend="triton")
        written = torch.full((2, 4, 40, 16), 7.0, dtype=torch.float64)
        for b, h, slot in itertools.product(range(2), range(4), range(call["q_index"].shape[-1])):
            row = call["q_index"][b, h, slot]
            if row >= 0:
                written[b, h, row] = want.out[b, h, slot]
        assert_close("grid", grid, written, torch.float32)


@CHECKS.add
def ids_outside_the_grid_are_empty_slots() -> None:
    """The door refuses such ids in checked mode only, so the kernels must not read what they name."""
    problem = problem_of(_listed())
    wild_q, wild_k = problem.q_index.clone(), problem.kv_index.clone()
    for wild, rows in ((wild_q, 40), (wild_k, 37)):
        empty = wild < 0
        assert empty.sum() > 8
        wild[empty] = torch.tensor([rows, 2**31 - 1, -(2**31), -2]).int().repeat(empty.sum())[: empty.sum()]
    wild = problem._replace(q_index=wild_q, kv_index=wild_k)
    for tiles in (contextlib.nullcontext(), small_tiles()):
        with tiles:
            for got, want in zip(_forward(wild), _forward(problem), strict=True):
                assert torch.equal(got, want)
            out, lse, _ = _forward(problem)
            for got, want in zip(_backward(wild, out, lse), _backward(problem, out, lse), strict=True):
                assert got.isfinite().all()
                assert torch.equal(got, want)


def _backward(problem: AttentionProblem, out: Tensor, lse: Tensor, grad_out: Tensor | None = None) -> list[Tensor]:
    grads = AttentionGradients(
        torch.empty_like(problem.query),
        torch.empty_like(problem.key),
        torch.empty_like(problem.value),
        None if problem.kv_bias is None else torch.empty(problem.key.shape[:3]),
        None,
        None if problem.rel_h is None else torch.empty_like(problem.rel_h),
        None if problem.rel_w is None else torch.empty_like(problem.rel_w),
    )
    triton_attention.backward(problem, torch.ones_like(out) if grad_out is None else grad_out, out, lse, grads)
    return [grad for grad in grads if grad is not None]


@CHECKS.add
def bad_sequence_bounds_stay_inside() -> None:
    """On a GPU only the kernels read cu_seqlens: whatever it holds, they stay in the buffers (outside of them the interpreter dies)."""
    call = packed((16, 24), (24, 16))
    problem = problem_of(call)
    for bad in ([0, 400, 40], [0, 16, 2**31 - 1], [-(2**31), 5, 40], [40, 20, 0], [9, 9, 9]):
        bounds = torch.tensor(bad, dtype=torch.int32)
        with small_tiles():
            out, lse, _ = _forward(problem._replace(cu_seqlens_q=bounds, cu_seqlens_k=bounds))
            _backward(problem._replace(cu_seqlens_q=bounds, cu_seqlens_k=bounds), out.nan_to_num(), lse.nan_to_num())


@CHECKS.add
def a_sequence_bound_below_zero_writes_nothing_before_the_list() -> None:
    problem = problem_of(packed((16, 24), (24, 16)))
    (heads, rows), width = problem.query.shape[1:3], problem.value.shape[3]
    for bad in ([0, -40, 40], [0, -(2**31), 40], [30, -17, 40]):
        bounds = torch.tensor(bad, dtype=torch.int32)
        # with room for two blocks before them
        outs, stats = torch.full((heads * rows + 32, width), 7.0), torch.full((heads * rows + 32,), 7.0)
        out, lse = outs[32:].view(1, heads, rows, width), stats[32:].view(1, heads, rows)
        with small_tiles():
            given = problem._replace(cu_seqlens_q=bounds, cu_seqlens_k=bounds)
            triton_attention.forward(given, out, lse, None, by_row=False)
        assert (outs[:32] == 7.0).all(), bad
        assert (stats[:32] == 7.0).all(), bad


@CHECKS.add
def one_sequence_does_not_see_anothers_nan() -> None:
    varlen.test_one_sequence_does_not_see_anothers_nan("triton", "cpu")
    with small_tiles():
        varlen.test_one_sequence_does_not_see_anothers_nan("triton", "cpu")


@CHECKS.add
def only_wanted_gradients_are_computed() -> None:
    problem = problem_of(_listed())
    out, lse, _ = _forward(problem)
    everything = dict(zip(("query", "key", "value", "kv_bias"), _backward(problem, out, lse), strict=True))
    for wanted in itertools.chain.from_iterable(itertools.combinations(everything, n) for n in (1, 2, 3)):
        grads = {name: torch.empty_like(grad) if name in wanted else None for name, grad in everything.items()}
        triton_attention.backward(
            problem, torch.ones_like(out), out, lse, AttentionGradients(**grads, attn_mask=None, rel_h=None, rel_w=None)
        )
        for name in wanted:
            assert torch.equal(grads[name], everything[name]), (wanted, name)


@CHECKS.add
def statistics_are_optional() -> None:
    problem = problem_of(_listed())
    for got, want in zip(_forward(problem, row_sq=False)[:2], _forward(problem)[:2], strict=True):
        assert torch.equal(got, want)


@CHECKS.add
def every_visible_key_lies_far_below_an_empty_slot() -> None:
    """An empty slot's product is 0. Where lse is -400, exp(0 - lse) overflows, and infinity times the empty slot's zeros would be NaN."""
    call = _listed()
    call["kv_bias"] = call["kv_bias"] - 400.0
    assert_right(call, "triton")
    with small_tiles():
        assert_right(call, "triton")


@CHECKS.add
def causal_lists_meet_at_the_edge_of_a_block() -> None:
    """The first query that sees a block of keys in the last slot of a block of queries, and the like for the last key."""
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "query_rows": 40, "key_rows": 40, "width": 16}
    for q_from, k_from in ((1, 0), (0, 1), (17, 2)):
        call = build(Case("", sizes), torch.float32)
        lists = {"q_index": torch.arange(q_from, 40), "kv_index": torch.arange(k_from, 40)}
        with small_tiles():
            assert_right({**call, **lists, "is_causal": True}, "triton")


@CHECKS.add
def nan_reaches_exactly_what_it_must() -> None:
    call = _listed()
    clean = _forward(problem_of(call))[0]
    # a visible key of sample 0, key head 1 (query heads 2 and 3); and a row of keys that no list names
    listed = call["kv_index"][0, 1]
    call["key"][0, 1, listed[listed >= 0][0]] = math.nan
    named = {int(row) for row in call["kv_index"][1, 0]}
    unlisted = next(row for row in range(37) if row not in named)
    call["key"][1, 0, unlisted] = call["value"][1, 0, unlisted] = math.nan
    for tiles in (contextlib.nullcontext(), small_tiles()):
        with tiles:
            out, lse, _ = _forward(problem_of(call))
            _, grad_key, grad_value, _ = _backward(problem_of(call), out, lse)
        for grad in (grad_key, grad_value):
            assert grad[0, 1, listed[listed >= 0]].isnan().all()
            assert grad[0, 0].isfinite().all()
            assert grad[1].isfinite().all()
        hit = torch.zeros(2, 4, 23, dtype=torch.bool)
        hit[0, 2:] = call["q_index"][0, 2:] >= 0
        assert torch.equal(out.isnan().any(-1), hit)
        assert torch.equal(lse.isnan(), hit)
        assert_close("the rest", out.masked_fill(hit[..., None], 0.0), clean.masked_fill(hit[..., None], 0.0), torch.float32)


@CHECKS.add
def nan_in_the_gradient_of_an_empty_slot_reaches_nothing() -> None:
    """A loss over padding is often 0 / 0 there."""
    call = _listed()
    problem = problem_of(call)
    out, lse, _ = _forward(problem)
    grad_out = tensor(*out.shape)
    empty = (call["q_index"] < 0)[..., None]
    assert empty.any()
    for got, want in zip(
        _backward(problem, out, lse, grad_out.masked_fill(empty, math.nan)),
        _backward(problem, out, lse, grad_out.masked_fill(empty, 0.0)),
        strict=True,
    ):
        assert torch.equal(got, want)


@CHECKS.add
def huge_logits_keep_the_gradients_finite() -> None:
    """A logit of 1e10 and its float32 lse are up to 1024 apart: what their difference is raised to must not exceed 0."""
    call = {"query": tensor(1, 2, 20, 16, seed=1) * 1e5, "key": tensor(1, 2, 20, 16, seed=2) * 1e5, "value": tensor(1, 2, 20, 16, seed=3)}
    grad_out = tensor(1, 2, 20, 16, seed=4)
    want = expected(call, grad_out)
    for tiles in (contextlib.nullcontext(), small_tiles()):
        with tiles:
            got = computed(call, grad_out, "triton")
        assert_close("out", got.out, want.out, torch.float32)
        for grad in got.grads.values():
            assert grad.isfinite().all()
        # no weight exceeds 1
        assert got.grads["value"].norm() < 1.5 * want.grads["value"].norm()


@CHECKS.add
def the_lowest_number_hides_nothing_by_itself() -> None:
    """Times log2(e) it would be -infinity, and a row of it an empty one: it is the mean of what is visible."""
    call = {name: tensor(1, 2, 20, 16, seed=seed) for seed, name in enumerate(("query", "key", "value"))}
    lowest = torch.finfo(torch.float32).min
    # keys 0 to 4 are hidden for good
    row = torch.full((20,), lowest).index_fill_(0, torch.arange(5), -math.inf)
    mask = torch.zeros(20, 20)
    mask[3], mask[7] = row, -math.inf
    mean = call["value"][:, :, 5:].mean(2)
    for added, uniform in (({"attn_mask": mask}, [3]), ({"kv_bias": row}, range(20))):
        for tiles in (contextlib.nullcontext(), small_tiles()):
            with tiles:
                got = computed({**call, **added}, tensor(1, 2, 20, 16, seed=4), "triton")
            for query in uniform:
                assert (got.lse[:, :, query] == lowest).all()
                assert_close("out", got.out[:, :, query], mean, torch.float32)
                assert_close("row_sq", got.row_sq[:, :, query], torch.full((1, 2), 1 / 15), torch.float32)
            if "attn_mask" in added:
                assert (got.lse[:, :, 7] == -math.inf).all()
                assert (got.out[:, :, 7] == 0).all()
            else:
                assert (got.grads["value"][:, :, :5] == 0).all()
            for grad in got.grads.values():
                assert grad.isfinite().all()


@CHECKS.add
def empty_problems() -> None:
    for sizes in ({"query_rows": 0}, {"key_rows": 0}, {"batch": 0}):
        shape = {"batch": 2, "query_rows": 5, "key_rows": 6, **sizes}
        batch, queries, keys = shape["batch"], shape["query_rows"], shape["key_rows"]
        call = {"query": tensor(batch, 2, queries, 16), "key": tensor(batch, 2, keys, 16), "value": tensor(batch, 2, keys, 8)}
        problem = problem_of(call)
        out, lse, row_sq = _forward(problem)
        assert (out == 0).all()
        assert (row_sq == 0).all()
        assert (lse == -math.inf).all()
        for grad in _backward(problem, out, lse):
            assert (grad == 0).all()
    problem = problem_of({"query": tensor(1, 2, 5, 16), "key": tensor(1, 2, 5, 16), "value": tensor(1, 2, 5, 16)})
    for name in ("q_index", "kv_index"):
        for slots in (0, 3):
            listed = problem._replace(**{name: torch.full((1, 1, slots), -1, dtype=torch.int32)})
            out, lse, _ = _forward(listed)
            assert (out == 0).all()
            for grad in _backward(listed, out, lse):
                assert (grad == 0).all()


@CHECKS.add
def half_precision_masks() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert_right(build(Case("", LISTS, with_mask("same", "BhNM")), dtype), "triton")
