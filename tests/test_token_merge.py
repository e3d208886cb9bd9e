"""Numbers: every backend against the definition, forward and every gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from token_merge_oracle import (
    assert_plan,
    best_partner,
    clusters,
    clusters_of,
    merged,
    objections,
    on,
    parents,
    random_plan,
    similarity,
    soft_merged,
    unmerged,
)
from torch import Tensor

import tokenops
from tokenops import Window
from tokenops.reference import token_merge as reference
from tokenops.types import MatchProblem, MergePlan, PairProblem, SoftMergeProblem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("mean", "sum", "amax", "replace", "drop")


def serves(backend: str, device: str, *grids: Tensor, names: str) -> str:
    """The backend, or the test is skipped with its reasons."""
    reasons = objections(backend, *(grid.to(device) for grid in grids), names=names)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    return backend


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(*shape: int, low: float = 0.5, high: float = 2.0, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def mask(*shape: int, seed: int = 2) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


# pairwise_argmax


PAIRS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dot product": {"normalize": False},
    "masks": {"a_mask": mask(2, 13), "b_mask": mask(2, 41, seed=3)},
    "shared masks": {"a_mask": mask(13), "b_mask": mask(1, 41, seed=3)},
    "nobody": {"b_mask": torch.zeros(41, dtype=torch.bool)},
    "scales": {"a_scale": uniform(2, 13), "b_scale": uniform(41, seed=4)},
    "negative scales": {"a_scale": -uniform(2, 13), "b_scale": uniform(2, 41, low=-1.0, seed=4)},
}


def assert_pairs(a: Tensor, b: Tensor, options: dict[str, Any], allowed: Any, best: Tensor, index: Tensor, dtype: torch.dtype) -> None:
    """By one row after the other. Where two candidates are closer than rounding, either may win."""
    batch, rows, columns = a.shape[0], a.shape[1], b.shape[1]

    def of(name: str, sample: int, length: int) -> Tensor:
        x = options.get(name)
        x = torch.ones(1, length) if x is None else x if x.dim() == 2 else x[None]
        return x[sample % x.shape[0]]

    for s in range(batch):
        b_mask, b_scale = of("b_mask", s, columns), of("b_scale", s, columns)
        for i in range(rows):
            candidates = [j for j in range(columns) if b_mask[j] and allowed(s, i, j)] if of("a_mask", s, rows)[i] else []
            want, winner = best_partner(a[s, i], b[s], candidates, b_scale, options.get("normalize", True))
            if winner < 0:
                assert (best[s, i], index[s, i]) == (-math.inf, -1)
                continue
            assert int(index[s, i]) in candidates
            taken = similarity(a[s, i], b[s, index[s, i]], options.get("normalize", True)) * float(b_scale[index[s, i]])
            rounding = 1e-5 * (1.0 + abs(want))
            assert taken >= want - rounding
            assert abs(float(best[s, i]) - want * float(of("a_scale", s, rows)[i])) <= 2 * rounding
    assert best.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert index.dtype == torch.int32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_every_row_finds_its_best(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    a, b = normal(2, 13, 24, dtype=dtype), normal(2, 41, 24, dtype=dtype, seed=5)
    options = PAIRS[name]
    there = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()}
    best, index = tokenops.pairwise_argmax(a.to(device), b.to(device), **there, backend=serves(backend, device, a, b, names="a b"))
    assert_pairs(a, b, options, lambda s, i, j: True, best.cpu(), index.cpu(), dtype)


@pytest.mark.parametrize(
    ("window", "allowed"),
    [
        ("frame", lambda d: d[0] == 0),
        ("location", lambda d: d[1] == d[2] == 0),
        ((1, 2), lambda d: abs(d[1]) <= 1 and abs(d[2]) <= 2),
        ((0, 1, 1), lambda d: d[0] == 0 and abs(d[1]) <= 1 and abs(d[2]) <= 1),
        (Window(-2, -1, 1, 0), lambda d: -2 <= d[0] <= -1 and abs(d[1]) <= 1 and d[2] == 0),
    ],
    ids=["frame", "location", "spatial", "frame and spatial", "before"],
)
@pytest.mark.parametrize("shared", [True, False], ids=["one place for all", "places per sample"])
def test_a_window_limits_the_choice(window: Any, allowed: Any, shared: bool, backend: str, device: str) -> None:
    a, b = normal(2, 37, 16), normal(2, 130, 16, seed=5)
    generator = torch.Generator().manual_seed(6)
    size = 1 if shared else 2
    of_a, of_b = (torch.randint(4, (size, n, 3), generator=generator) for n in (37, 130))
    best, index = tokenops.pairwise_argmax(
        a.to(device),
        b.to(device),
        a_place=(of_a[0] if shared else of_a).to(device),
        b_place=of_b.to(device, torch.int32),
        window=window,
        backend=backend,
    )
    away = of_b[:, None] - of_a[:, :, None]
    assert_pairs(a, b, {}, lambda s, i, j: allowed(away[s % size, i, j].tolist()), best.cpu(), index.cpu(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_row(dtype: torch.dtype, backend: str, device: str) -> None:
    # small integers: every product and sum is exact in every type
    generator = torch.Generator().manual_seed(7)
    a = torch.randint(-2, 3, (2, 70, 8), generator=generator).to(device, dtype)
    b = torch.randint(-2, 3, (2, 300, 8), generator=generator).to(device, dtype)
    best, index = tokenops.pairwise_argmax(a, b, normalize=False, backend=backend)
    want = (a.double() @ b.double().mT).cpu().max(-1)
    assert torch.equal(best.double().cpu(), want.values)
    assert torch.equal(index.long().cpu(), want.indices)
    # one row many times
    same = a[:, :1].expand(-1, 90, -1)
    _, index = tokenops.pairwise_argmax(a, same, backend=backend)
    assert index.count_nonzero() == 0


def test_zero_rows_are_like_nothing(backend: str, device: str) -> None:
    a, b = normal(1, 5, 8).to(device), normal(1, 7, 8, seed=1).to(device)
    a[0, 2], b[0, 3] = 0.0, 0.0
    best, index = tokenops.pairwise_argmax(a, b, backend=backend)
    assert (float(best[0, 2]), int(index[0, 2])) == (0.0, 0)
    assert best.isfinite().all()
    best, index = tokenops.pairwise_argmax(a, b[:, 3:4], backend=backend)
    assert torch.equal(best, torch.zeros_like(best))
    assert torch.equal(index, torch.zeros_like(index))


def test_an_infinite_scale_is_none_of_a_zero_row(backend: str, device: str) -> None:
    a, zeros, infinite = normal(1, 5, 8).to(device), torch.zeros(1, 7, 8, device=device), torch.full((1, 7), torch.inf, device=device)
    best, index = tokenops.pairwise_argmax(a, zeros, b_scale=infinite, backend=backend)
    assert (best == -torch.inf).all()
    assert (index == -1).all()
    best, index = tokenops.pairwise_argmax(zeros, a, a_scale=infinite, backend=backend)
    assert best.isnan().all()
    assert index.count_nonzero() == 0


@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1e18, 1e37])
def test_lengths_neither_overflow_nor_vanish(factor: float, backend: str, device: str) -> None:
    a, b = normal(1, 9, 16).to(device), normal(1, 20, 16, seed=1).to(device)
    want = tokenops.pairwise_argmax(a, b, backend="reference")
    for left, right in ((a * factor, b), (a, b * factor), (a * factor, b * factor)):
        best, index = tokenops.pairwise_argmax(left, right, backend=backend)
        assert torch.equal(index, want[1])
        torch.testing.assert_close(best, want[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(1, 1, 8), (1, 200, 8), (200, 1, 8), (33, 65, 40), (129, 257, 64), (17, 31, 200)], ids=str
)
def test_shapes_of_all_kinds(rows: int, columns: int, width: int, backend: str, device: str) -> None:
    a, b = normal(1, rows, width).to(device), normal(1, columns, width, seed=1).to(device)
    best, index = tokenops.pairwise_argmax(a, b, backend=backend)
    a, b = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (a, b))
    want = (a @ b.mT).max(-1)
    assert_close("best", best, want.values, torch.float32)
    assert torch.equal(index.long(), want.indices)


def test_rows_may_lie_anywhere(backend: str, device: str) -> None:
    """Every second row, gaps between rows, one sample for all by stride 0."""
    buffer = normal(3, 80, 40).to(device)
    a, b = buffer[:, ::2, 8:32], buffer[:1, 1::2, 8:32].expand(3, -1, -1)
    got = tokenops.pairwise_argmax(a, b, backend=backend)
    want = tokenops.pairwise_argmax(a.contiguous(), b.contiguous(), backend=backend)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_nothing_to_choose_from(backend: str, device: str) -> None:
    a = normal(2, 5, 8).to(device)
    best, index = tokenops.pairwise_argmax(a, a[:, :0], backend=backend)
    assert (best == -torch.inf).all()
    assert (index == -1).all()
    for batch, rows in ((0, 5), (2, 0)):
        best, index = tokenops.pairwise_argmax(a[:batch, :rows], a[:batch], backend=backend)
        assert best.shape == index.shape == (batch, rows)


def test_the_reference_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(2, 50, 16), normal(2, 60, 16, seed=1)
    want = tokenops.pairwise_argmax(a, b, backend="reference")
    monkeypatch.setattr("tokenops.reference.token_merge.matching._BLOCK", 7 * 2 * 60)
    got = tokenops.pairwise_argmax(a, b, backend="reference")
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0])


# plans


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 201])
def test_parents_make_the_plan_they_say(tokens: int, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # any forest: parents of lower rank in a random order, some roots, some dropped
    rank = torch.rand(3, tokens, generator=generator).argsort(-1)
    parent = torch.empty(3, tokens, dtype=torch.int64)
    for s in range(3):
        for at in range(tokens):
            kind = float(torch.rand((), generator=generator))
            higher = int(rank[s, int(torch.randint(at, (), generator=generator))]) if at > 0 else -1
            i = int(rank[s, at])
            parent[s, i] = -1 if kind < 0.1 else i if kind < 0.3 or at == 0 else higher
    plan = tokenops.plan_from_parents(parent.to(device), backend=backend)
    assert plan.n_out == tokens
    assert_plan(plan, [clusters(row) for row in parent.tolist()])
    tight = max(len(clusters(row)) for row in parent.tolist())
    assert_plan(tokenops.plan_from_parents(parent.to(device), tight, backend=backend), [clusters(row) for row in parent.tolist()])


@pytest.mark.parametrize("forwards", [True, False])
def test_long_chains_end_at_their_root(forwards: bool, backend: str, device: str) -> None:
    tokens = 300
    parent = torch.arange(tokens) + (1 if forwards else -1)
    parent = parent.clamp(0, tokens - 1)[None].to(device)
    plan = tokenops.plan_from_parents(parent, 1, backend=backend)
    assert plan.slot.count_nonzero() == 0
    assert int(plan.order[0, 0]) == (tokens - 1 if forwards else 0)
    others = plan.order[0, 1:].tolist()
    assert others == sorted(others)


def test_slots_make_the_plan_they_say(backend: str, device: str) -> None:
    slot = torch.tensor([[4, 0, 4, -1, 2, 0], [1, 1, 1, 1, 1, 1], [-1, -1, -1, -1, -1, -1]], device=device)
    plan = tokenops.plan_from_slots(slot, 6, backend=backend)
    assert torch.equal(plan.slot, slot.int())
    assert plan.count.tolist() == [3, 1, 0]
    assert clusters_of(plan, 0) == [[1, 5], [], [4], [], [0, 2], []]
    assert clusters_of(plan, 1) == [[], [0, 1, 2, 3, 4, 5], [], [], [], []]
    assert clusters_of(plan, 2) == [[]] * 6
    reference.check_merge(plan)


def test_empty_plans(backend: str, device: str) -> None:
    plan = tokenops.plan_from_parents(torch.zeros(2, 0, dtype=torch.int32, device=device), backend=backend)
    assert plan.offsets.tolist() == [[0], [0]]
    plan = tokenops.plan_from_slots(torch.full((2, 3), -1, dtype=torch.int32, device=device), 0, backend=backend)
    assert tokenops.merge_tokens(torch.ones(2, 3, 4, device=device), plan, backend=backend).shape == (2, 0, 4)
    assert tokenops.unmerge_tokens(torch.ones(2, 0, 4, device=device), plan, backend=backend).tolist() == torch.zeros(2, 3, 4).tolist()
    nobody = tokenops.plan_from_slots(torch.zeros(0, 3, dtype=torch.int32, device=device), 2, backend=backend)
    assert tokenops.merge_tokens(torch.ones(0, 3, 4, device=device), nobody, backend=backend).shape == (0, 2, 4)


# merging and unmerging


def sizes_of(plan: MergePlan, seed: int = 3) -> Tensor:
    return torch.randint(1, 6, (plan.slot.shape[0], plan.slot.shape[1]), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 8, 72, 129])
@pytest.mark.parametrize("mode", [*MODES, "weighted"])
def test_merging_is_its_definition(mode: str, width: int, dtype: torch.dtype, backend: str, device: str) -> None:
    plan = random_plan(2, 40, 23)
    x = normal(2, 40, width, dtype=dtype)
    size = sizes_of(plan) if mode == "weighted" else None
    name = "mean" if mode == "weighted" else mode
    x_leaf, *size_leaf = leaves(*(t.to(device) for t in (x, size) if t is not None))
    got = tokenops.merge_tokens(x_leaf, on(plan, device), size=size_leaf[0] if size_leaf else None, mode=name, backend=backend)
    assert got.dtype == dtype
    x_double, *size_double = leaves(*(t.double() for t in (x, size) if t is not None))
    want = merged(x_double, plan, size_double[0] if size_double else None, name)
    assert_close("out", got, want, dtype)
    grad_out = normal(*want.shape, dtype=dtype, seed=9)
    grads = torch.autograd.grad(got, [x_leaf, *size_leaf], grad_out.to(device))
    expected = torch.autograd.grad(want, [x_double, *size_double], grad_out.double())
    for label, have, expect in zip(("x", "size"), grads, expected, strict=False):
        assert_close(f"gradient of {label}", have, expect, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 8, 72, 129])
@pytest.mark.parametrize("mode", ["copy", "drop"])
def test_unmerging_is_its_definition(mode: str, width: int, dtype: torch.dtype, backend: str, device: str) -> None:
    plan = random_plan(2, 40, 23)
    y = normal(2, 23, width, dtype=dtype)
    [leaf], [double] = leaves(y.to(device)), leaves(y.double())
    got, want = tokenops.unmerge_tokens(leaf, on(plan, device), mode=mode, backend=backend), unmerged(double, plan, mode)
    assert torch.equal(got.double().cpu(), want)
    grad_out = normal(*want.shape, dtype=dtype, seed=9)
    (have,) = torch.autograd.grad(got, leaf, grad_out.to(device))
    (expect,) = torch.autograd.grad(want, double, grad_out.double())
    assert_close("gradient", have, expect, dtype)


def test_tied_maxima_share_the_gradient(backend: str, device: str) -> None:
    plan = tokenops.plan_from_slots(torch.tensor([[0, 0, 0, 1]], device=device), 3, backend=backend)
    x = torch.tensor([[[1.0, 5.0], [1.0, 2.0], [0.0, 5.0], [-7.0, 3.0]]], device=device, requires_grad=True)
    out = tokenops.merge_tokens(x, plan, mode="amax", backend=backend)
    assert out.tolist() == [[[1.0, 5.0], [-7.0, 3.0], [0.0, 0.0]]]
    out.backward(torch.full_like(out, 6.0))
    assert x.grad.tolist() == [[[3.0, 3.0], [3.0, 0.0], [0.0, 3.0], [6.0, 6.0]]]


def test_nan_is_the_maximum(backend: str, device: str) -> None:
    plan = tokenops.plan_from_slots(torch.tensor([[0, 0, 0]], device=device), 1, backend=backend)
    for at in range(3):
        x = torch.tensor([[1.0, 2.0, 3.0]], device=device)
        x[0, at] = torch.nan
        assert tokenops.merge_tokens(x, plan, mode="amax", backend=backend).isnan().all()


def test_tokens_without_size_weigh_nothing(backend: str, device: str) -> None:
    plan = tokenops.plan_from_slots(torch.tensor([[0, 0, 1, 1]], device=device), 3, backend=backend)
    x = torch.tensor([[4.0, 8.0, 5.0, 7.0]], device=device, requires_grad=True)
    size = torch.tensor([[0.0, 2.0, 0.0, 0.0]], device=device)
    out = tokenops.merge_tokens(x, plan, size=size, backend=backend)
    assert out.tolist() == [[8.0, 0.0, 0.0]]
    out.sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_sizes_may_be_denormal(backend: str, device: str) -> None:
    plan = tokenops.plan_from_slots(torch.tensor([[0, 0, 0, 1]], device=device), 2, backend=backend)
    x = normal(1, 4, 24).to(device).requires_grad_()
    size = torch.tensor([[1.0, 2.0, 3.0, 1.0]], device=device)
    out = tokenops.merge_tokens(x, plan, size=size * 2.0**-145, backend=backend)
    expected = tokenops.merge_tokens(x, plan, size=size, backend=backend)
    # products with such sizes keep few bits
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)
    grad = normal(1, 2, 24, seed=1).to(device)
    got, want = (torch.autograd.grad(merged, x, grad)[0] for merged in (out, expected))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", ["B1", "N", "1N", "BN1"])
def test_sizes_have_many_forms(form: str, backend: str, device: str) -> None:
    plan = random_plan(1 if form == "B1" else 2, 20, 11, device)
    x = normal(2, 20, 8).to(device)
    size = uniform(2, 20).to(device)
    if form in ("N", "1N"):
        size = size[:1].expand(2, -1)
    given = {"B1": size, "N": size[0], "1N": size[:1], "BN1": size[..., None]}[form].clone().requires_grad_()
    out, out_size = tokenops.merge_tokens(x, plan, size=given, return_size=True, backend=backend)
    double = given.detach().double().requires_grad_()
    flat = (double.squeeze(-1) if form == "BN1" else double).expand(2, -1)
    want = merged(x.cpu(), on(plan, "cpu"), flat.cpu(), "mean")
    want_size = merged(flat[..., None].cpu(), on(plan, "cpu"), None, "sum")
    want_size = want_size if form == "BN1" else want_size.squeeze(-1)
    assert_close("out", out, want, torch.float32)
    assert_close("sizes", out_size, want_size, torch.float32)
    grads = normal(*want.shape), normal(*want_size.shape, seed=1)
    assert_close(
        "gradient of size",
        torch.autograd.grad((out, out_size), given, [grad.to(device) for grad in grads])[0],
        torch.autograd.grad((want, want_size), double, [grad.double() for grad in grads])[0],
        torch.float32,
    )


@pytest.mark.parametrize("mode", ["mean", "amax", "drop"])
def test_sizes_begin_with_ones(mode: str, backend: str, device: str) -> None:
    plan = random_plan(2, 20, 11, device)
    out, size = tokenops.merge_tokens(normal(2, 20, 8).to(device), plan, mode=mode, return_size=True, backend=backend)
    assert out.shape == (2, 11, 8)
    assert torch.equal(size, tokenops.merge_tokens(torch.ones(2, 20, device=device), plan, mode="sum", backend=backend))


@pytest.mark.parametrize("shape", [(2, 20), (2, 20, 3, 5), (2, 20, 0)], ids=str)
def test_rows_may_have_any_shape(shape: tuple[int, ...], backend: str, device: str) -> None:
    plan = random_plan(2, 20, 11, device)
    x = normal(*shape).to(device)
    got = tokenops.merge_tokens(x, plan, backend=backend)
    assert got.shape == (2, 11, *shape[2:])
    flat = tokenops.merge_tokens(x.reshape(2, 20, -1) if x.numel() else x, plan, backend=backend)
    assert torch.equal(got.flatten(), flat.flatten())
    back = tokenops.unmerge_tokens(got, plan, backend=backend)
    assert back.shape == shape


def test_rows_are_read_and_differentiated_where_they_lie(backend: str, device: str) -> None:
    plan = random_plan(3, 40, 21, device)
    buffer = normal(40, 3, 48).to(device).requires_grad_()
    x = buffer.transpose(0, 1)[..., 8:40]
    got = tokenops.merge_tokens(x, plan, backend=backend)
    assert torch.equal(got, tokenops.merge_tokens(x.contiguous(), plan, backend=backend))
    # sum() hands down one element expanded over the whole grid
    (grad,) = torch.autograd.grad(got.sum(), buffer)
    (want,) = torch.autograd.grad(tokenops.merge_tokens(x.contiguous(), plan, backend="reference").sum(), buffer)
    assert_close("gradient", grad, want, torch.float32)
    back = tokenops.unmerge_tokens(got[..., ::2], plan, backend=None)
    assert torch.equal(back, tokenops.unmerge_tokens(got[..., ::2].contiguous(), plan))


def test_only_wanted_gradients_are_kept_ready(backend: str, device: str) -> None:
    """The tokens themselves are kept for the backward pass only where a gradient depends on them."""
    plan = random_plan(2, 20, 11, device)
    size = uniform(2, 20).to(device)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    learned = size.clone().requires_grad_()
    for mode, weights, keeps in (("mean", None, False), ("mean", size, False), ("mean", learned, True), ("amax", None, True)):
        saved.clear()
        x = normal(2, 20, 8).to(device).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = tokenops.merge_tokens(x, plan, size=weights, mode=mode, backend=backend)
        assert any(t.shape == x.shape for t in saved) == keeps
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.shape == x.shape
        if weights is learned:
            # the size's gradient alone
            out = tokenops.merge_tokens(x.detach(), plan, size=weights, backend=backend)
            (alone,) = torch.autograd.grad(out.sum(), weights)
            assert alone.shape == weights.shape


# soft merging


SOFT: dict[str, dict[str, Any]] = {
    "plain": {},
    "dot product": {"normalize": False, "temperature": 3.0},
    "mass": {"mass": uniform(2, 37)},
    "shared mass": {"mass": uniform(37)},
    "some weigh nothing": {"mass": uniform(2, 37, low=-1.0).clamp(min=0.0)},
    "sharp": {"temperature": 0.01},
    "flat": {"temperature": 50.0},
}


def soft_call(name: str, dtype: torch.dtype, tokens: int = 37, metas: int = 5, channels: int = 24, width: int = 16) -> dict[str, Any]:
    grids = {"x": normal(2, tokens, channels, dtype=dtype), "metric": normal(2, tokens, width, dtype=dtype, seed=1)}
    return {**grids, "meta": normal(2, metas, width, dtype=dtype, seed=2), "temperature": 0.3, **SOFT[name]}


def assert_soft(call: dict[str, Any], backend: str, device: str) -> None:
    """Results and all gradients are those of the formula."""
    dtype = call["x"].dtype
    call = {**call, "temperature": torch.tensor(call["temperature"])}
    names = [name for name, x in call.items() if isinstance(x, Tensor)]
    have = {name: call[name].to(device).requires_grad_() for name in names}
    merged, mass = tokenops.soft_merge(**{**call, **have}, backend=backend)
    want = {name: call[name].double().requires_grad_() for name in names}
    expect_merged, expect_mass = soft_merged({**call, **want})
    assert (merged.dtype, mass.dtype) == (dtype, torch.float32)
    assert_close("merged", merged, expect_merged, dtype)
    assert_close("mass", mass, expect_mass, dtype)
    grad_out, grad_mass = normal(*merged.shape, dtype=dtype, seed=4), normal(*mass.shape, seed=5)
    got = torch.autograd.grad((merged, mass), list(have.values()), (grad_out.to(device), grad_mass.to(device)))
    expected = torch.autograd.grad((expect_merged, expect_mass), list(want.values()), (grad_out.double(), grad_mass.double()))
    for name, one, other in zip(names, got, expected, strict=True):
        assert one.dtype == call[name].dtype
        assert_close(f"gradient of {name}", one, other, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SOFT)
def test_soft_merging_is_its_definition(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    call = soft_call(name, dtype)
    grids = [call[key] for key in ("x", "metric", "meta")]
    assert_soft(call, serves(backend, device, *grids, names="x metric meta"), device)


@pytest.mark.parametrize(
    ("tokens", "metas", "channels", "width"), [(1, 1, 8, 8), (40, 40, 8, 8), (300, 3, 40, 8), (130, 70, 72, 40), (65, 17, 200, 64)], ids=str
)
def test_soft_merging_of_all_shapes(tokens: int, metas: int, channels: int, width: int, backend: str, device: str) -> None:
    call = soft_call("plain", torch.float32, tokens, metas, channels, width)
    assert_soft(call, serves(backend, device, *(call[key] for key in ("x", "metric", "meta")), names="x metric meta"), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "far"), [(1, 0.0), (37, 1000.0)])
def test_soft_merging_to_means_that_differ_little(tokens: int, far: float, dtype: torch.dtype, backend: str, device: str) -> None:
    """Gradients are what is left of their differences, and a mean's error is not."""
    call = soft_call("plain", dtype, tokens, metas=24)
    call["x"] = call["x"] + far
    assert_soft(call, serves(backend, device, *(call[key] for key in ("x", "metric", "meta")), names="x metric meta"), device)


def test_one_meta_token_gets_the_mean(backend: str, device: str) -> None:
    x, metric, meta = (normal(2, 300, 8, seed=seed).to(device).requires_grad_() for seed in range(3))
    merged, mass = tokenops.soft_merge(x, metric, meta[:, :1], temperature=0.3, backend=backend)
    assert_close("merged", merged, x.double().mean(1, keepdim=True), torch.float32)
    assert_close("mass", mass, torch.full((2, 1), 300.0), torch.float32)
    grads = torch.autograd.grad((merged, mass), (x, metric, meta), (normal(2, 1, 8).to(device), normal(2, 1).to(device)))
    assert_close("gradient of x", grads[0], normal(2, 1, 8).double().expand(2, 300, 8) / 300.0, torch.float32)
    for name, grad in zip(("metric", "meta"), grads[1:], strict=True):
        assert_close(f"gradient of {name}", grad, torch.zeros(2, 300, 8), torch.float32)


def test_soft_merging_of_zero_rows(backend: str, device: str) -> None:
    call = soft_call("plain", torch.float32)
    call["metric"][0, 3], call["meta"][1, 2] = 0.0, 0.0
    have = {name: call[name].to(device).requires_grad_() for name in ("x", "metric", "meta")}
    merged, mass = tokenops.soft_merge(**have, temperature=0.3, backend=backend)
    grads = torch.autograd.grad((merged, mass), list(have.values()), (torch.ones_like(merged), mass.detach()))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1][0, 3].count_nonzero() == 0
    assert grads[2][1, 2].count_nonzero() == 0
    # a token like nothing gives every meta token the same
    alone, share = tokenops.soft_merge(have["x"][:1, 3:4], have["metric"][:1, 3:4], have["meta"][:1], temperature=0.3, backend=backend)
    torch.testing.assert_close(share, torch.full_like(share, 0.2))
    torch.testing.assert_close(alone, have["x"][:1, 3:4].expand_as(alone))


def test_a_meta_token_without_mass_is_zero(backend: str, device: str) -> None:
    call = soft_call("plain", torch.float32)
    have = {name: call[name].to(device).requires_grad_() for name in ("x", "metric", "meta")}
    mass = torch.zeros(2, 37, device=device, requires_grad=True)
    merged, got = tokenops.soft_merge(**have, temperature=0.3, mass=mass, backend=backend)
    assert merged.count_nonzero() == got.count_nonzero() == 0
    grads = torch.autograd.grad((merged, got), [*have.values(), mass], (torch.ones_like(merged), torch.ones_like(got)))
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(grads[-1], torch.ones_like(mass))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_next_to_nothing_is_averaged_too(dtype: torch.dtype, backend: str, device: str) -> None:
    """The last meta token resembles no token, the later ones a little: float16 does not hold its weights."""
    metric, meta = torch.zeros(1, 300, 8), torch.zeros(1, 3, 8)
    metric[..., 0], metric[..., 1] = 1.0, torch.arange(300) * 0.002
    metric[..., 7] = torch.arange(300) * 0.0005
    meta[0, 0, 0], meta[0, 1, 0], meta[0, 2, 7] = 1.0, 0.8, 1.0
    grids = normal(1, 300, 24, dtype=dtype).to(device), metric.to(device, dtype), meta.to(device, dtype)
    merged, mass = tokenops.soft_merge(*grids, temperature=0.04, backend=serves(backend, device, *grids, names="x metric meta"))
    expect_merged, expect_mass = tokenops.soft_merge(*(x.double() for x in grids), temperature=0.04, backend="reference")
    assert 0.0 < mass[0, 2].item() < 2.0**-20
    for row in range(3):
        assert_close(f"row {row}", merged[:, row], expect_merged[:, row], dtype)
        assert_close(f"mass {row}", mass[:, row], expect_mass[:, row], dtype)


def test_a_mass_may_be_denormal(backend: str, device: str) -> None:
    # a meta token that resembles no token gets next to nothing, and is still a mean of rows
    metric = torch.zeros(1, 40, 8)
    metric[..., 0] = 1.0
    metric[..., 1] = torch.arange(40) * 0.01
    meta = torch.zeros(1, 3, 8)
    meta[0, 0, 0], meta[0, 1, 0], meta[0, 2, 7] = 1.0, 0.8, 1.0
    call = {"x": normal(1, 40, 24), "metric": metric, "meta": meta, "temperature": torch.tensor(0.1)}
    have = {name: x.to(device).requires_grad_() for name, x in call.items()}
    want = {name: x.double().requires_grad_() for name, x in call.items()}
    weak = 1e-36
    merged, mass = tokenops.soft_merge(**have, mass=torch.full((1, 40), weak, device=device), backend=backend)
    assert 0.0 < mass[0, 2].item() < 2.0**-128
    expect_merged, _ = tokenops.soft_merge(**want, mass=torch.full((1, 40), weak).double(), backend="reference")
    torch.testing.assert_close(merged.cpu().double(), expect_merged, rtol=1e-3, atol=1e-3)
    grad = normal(1, 3, 24, seed=3)
    got = torch.autograd.grad(merged, list(have.values()), grad.to(device))
    expected = torch.autograd.grad(expect_merged, list(want.values()), grad.double())
    for one, other in zip(got, expected, strict=True):
        # what cancels is as large as the largest of them
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_nothing_to_merge_softly(backend: str, device: str) -> None:
    x = normal(2, 7, 8).to(device).requires_grad_()
    for tokens, metas in ((0, 3), (7, 0)):
        merged, mass = tokenops.soft_merge(x[:, :tokens], x[:, :tokens], x[:, :metas], temperature=1.0, backend=backend)
        assert merged.shape == (2, metas, 8)
        assert mass.count_nonzero() == 0
        merged.sum().backward()
    assert x.grad.count_nonzero() == 0


# the definitions themselves


def double(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, dtype=torch.float64, seed=seed).requires_grad_()


@pytest.mark.parametrize("mode", [*MODES, "weighted"])
def test_merging_passes_gradcheck(mode: str) -> None:
    plan, x = random_plan(2, 7, 4), double(2, 7, 3)
    size = uniform(2, 7).double().requires_grad_()

    def run(x: Tensor, size: Tensor) -> Tensor:
        return reference.merged(x, plan, size if mode == "weighted" else None, "mean" if mode == "weighted" else mode)

    def operator(x: Tensor, size: Tensor) -> Tensor:
        return tokenops.merge_tokens(x, plan, size=size if mode == "weighted" else None, mode="mean" if mode == "weighted" else mode)

    for function in (run, operator):
        assert torch.autograd.gradcheck(function, (x, size))


@pytest.mark.parametrize("mode", ["copy", "drop"])
def test_unmerging_passes_gradcheck(mode: str) -> None:
    plan, y = random_plan(2, 7, 4), double(2, 4, 3)
    for function in (reference.unmerged, lambda y, plan, mode: tokenops.unmerge_tokens(y, plan, mode=mode)):
        assert torch.autograd.gradcheck(lambda y, function=function: function(y, plan, mode), (y,))
    # it is linear, and its gradient an operator with a gradient
    assert torch.autograd.gradgradcheck(lambda y: tokenops.unmerge_tokens(y, plan, mode=mode).square(), (y,))


@pytest.mark.parametrize("normalize", [True, False])
def test_soft_merging_passes_gradcheck(normalize: bool) -> None:
    inputs = double(2, 6, 3), double(2, 6, 4, seed=1), double(2, 3, 4, seed=2), torch.tensor(0.7).double().requires_grad_()
    mass = uniform(2, 6).double().requires_grad_()

    def definition(*given: Tensor) -> tuple[Tensor, Tensor]:
        return reference.assigned(SoftMergeProblem(*given, normalize))[:2]

    def operator(x: Tensor, metric: Tensor, meta: Tensor, temperature: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        return tokenops.soft_merge(x, metric, meta, temperature=temperature, mass=mass, normalize=normalize)

    for function in (definition, operator):
        assert torch.autograd.gradcheck(function, (*inputs, mass))


def test_costs_count_what_takes_part() -> None:
    metric = normal(2, 9, 8)
    problem = MatchProblem(metric, None, True, False, None, None, None, None, 3, None, True)
    # sources 2, 4, 6, 8; destinations 1, 3, 5, 7
    assert reference.match_flops(problem) == 2 * 2 * 8 * 4 * 4
    plan = tokenops.plan_from_slots(torch.tensor([[0, 0, 1, -1]]), 3)
    x = normal(2, 4, 5)
    # three rows read and three written in each sample, order and offsets once
    assert reference.merge_bytes(x, plan, None) == (6 + 6) * 5 * 4 + (4 + 4) * 4
    assert reference.pairs(PairProblem(metric, metric, None, None, None, None, None, None, None, True)).index.shape == (2, 9)


# the same bits


def test_bits_depend_on_neither_run_nor_threads(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    metric, x = (torch.randn(3, 403, width, generator=generator).to(device) for width in (64, 136))
    size = uniform(3, 403).to(device).requires_grad_()
    x.requires_grad_()
    meta = metric[:, :24].clone().requires_grad_()

    def run() -> Sequence[Tensor]:
        plan = tokenops.match_tokens(metric, r=150, class_token=True, backend=backend)
        out = tokenops.merge_tokens(x, plan, size=size, backend=backend)
        top = tokenops.merge_tokens(x, plan, mode="amax", backend=backend)
        back = tokenops.unmerge_tokens(out, plan, backend=backend)
        soft, mass = tokenops.soft_merge(x, metric, meta, temperature=0.1, mass=size, backend=backend)
        results = (out, top, back, soft, mass)
        grads = torch.autograd.grad(results, (x, size, meta), [part.detach() for part in results])
        return (*plan[:2], *plan[3:], *(part.detach() for part in results), *grads)

    runs = []
    for threads in (1, 2, 4, 1):
        torch.set_num_threads(threads)
        runs.append(run())
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            assert torch.equal(first, second)


# what must hold for any call


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 60),
    share=st.floats(0.0, 1.0),
    protect=st.sampled_from([(False, False), (True, False), (True, True), (False, True)]),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_matching_is_its_definition(
    batch: int, tokens: int, share: float, protect: tuple[bool, bool], ties: bool, seed: int, backend: str, device: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        metric = torch.randint(-1, 2, (batch, tokens, 8), generator=generator).float()
    else:
        metric = torch.randn(batch, tokens, 8, generator=generator)
    r, (class_token, distill_token) = int(share * tokens), protect
    flags = {"class_token": class_token, "distill_token": distill_token, "normalize": not ties}
    plan = tokenops.match_tokens(metric.to(device), r=r, **flags, backend=backend)
    role = [1 if i % 2 == 0 else 2 for i in range(tokens)]
    for at, stays in enumerate(protect):
        if stays and at < tokens:
            role[at] = 0
    most = (tokens - sum(protect)) // 2 if 2 in role else 0
    r = min(r, max(most, 0))
    assert plan.n_out == tokens - r
    assert_plan(plan, [clusters(parents(sample, role, r=r, normalize=not ties)) for sample in metric])


@settings(max_examples=30)
@given(tokens=st.integers(2, 50), n_out=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 1000))
def test_mass_is_conserved(tokens: int, n_out: int, width: int, seed: int, backend: str, device: str) -> None:
    plan = random_plan(2, tokens, n_out, device, seed=seed, drop=0.0)
    # integers, so that sums are exact
    x = torch.randint(-9, 10, (2, tokens, width), generator=torch.Generator().manual_seed(seed)).float().to(device)
    assert torch.equal(tokenops.merge_tokens(x, plan, mode="sum", backend=backend).sum(1), x.sum(1))
    size = torch.randint(1, 5, (2, tokens), generator=torch.Generator().manual_seed(seed)).float().to(device)
    carried = tokenops.merge_tokens(size, plan, mode="sum", backend=backend)
    mean = tokenops.merge_tokens(x, plan, size=size, backend=backend)
    torch.testing.assert_close((mean * carried[..., None]).sum(1), (x * size[..., None]).sum(1), rtol=1e-5, atol=1e-3)


@settings(max_examples=30)
@given(tokens=st.integers(2, 50), n_out=st.integers(1, 20), seed=st.integers(0, 1000))
def test_unmerging_what_was_merged_is_constant_on_clusters(tokens: int, n_out: int, seed: int, backend: str, device: str) -> None:
    plan = random_plan(2, tokens, n_out, device, seed=seed)
    x = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(seed)).to(device)
    y = tokenops.merge_tokens(x, plan, backend=backend)
    back = tokenops.unmerge_tokens(y, plan, backend=backend)
    for s in range(2):
        for at, members in enumerate(clusters_of(plan, s)):
            assert torch.equal(back[s, members], y[s, at].expand(len(members), -1))
    assert back[plan.slot < 0].count_nonzero() == 0
    # merging it again changes nothing but the last bit of a mean
    torch.testing.assert_close(tokenops.merge_tokens(back, plan, backend=backend), y, rtol=1e-5, atol=1e-5)
    kept = tokenops.merge_tokens(x, plan, mode="drop", backend=backend)
    alone = tokenops.unmerge_tokens(kept, plan, mode="drop", backend=backend)
    assert torch.equal(tokenops.merge_tokens(alone, plan, mode="sum", backend=backend), kept)


@settings(max_examples=30)
@given(tokens=st.integers(4, 50), r=st.integers(1, 25), seed=st.integers(0, 1000))
def test_permuted_tokens_have_a_permuted_plan(tokens: int, r: int, seed: int, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(1, tokens, 8, generator=generator).to(device)
    role = torch.randint(3, (tokens,), generator=generator).to(device)
    shuffle = torch.randperm(tokens, generator=generator).to(device)
    plan = tokenops.match_tokens(metric, scheme=role, r=r, backend=backend)
    permuted = tokenops.match_tokens(metric[:, shuffle], scheme=role[shuffle], r=r, backend=backend)
    as_sets = {frozenset(members) for members in clusters_of(plan, 0) if members}
    of_permuted = {frozenset(shuffle[members].tolist()) for members in clusters_of(permuted, 0) if members}
    assert as_sets == of_permuted


@settings(max_examples=30)
@given(tokens=st.integers(2, 40), middle=st.integers(1, 20), n_out=st.integers(1, 10), seed=st.integers(0, 1000), shared=st.booleans())
def test_a_composed_plan_is_both_in_turn(tokens: int, middle: int, n_out: int, seed: int, shared: bool, backend: str, device: str) -> None:
    first = random_plan(1 if shared else 2, tokens, middle, device, seed=seed)
    second = random_plan(2, middle, n_out, device, seed=seed + 1)
    both = tokenops.compose_plans(first, second)
    reference.check_merge(both)
    generator = torch.Generator().manual_seed(seed)
    # integers, so that sums are exact; positive, so that the 0 of a row that is empty in between is no maximum
    x = torch.randint(1, 20, (2, tokens, 4), generator=generator).float().to(device)
    for mode in ("sum", "amax"):
        once = tokenops.merge_tokens(x, first, mode=mode, backend=backend)
        in_turn = tokenops.merge_tokens(once, second, mode=mode, backend=backend)
        assert torch.equal(tokenops.merge_tokens(x, both, mode=mode, backend=backend), in_turn)
    y = torch.randn(2, n_out, 4, generator=generator).to(device)
    assert torch.equal(tokenops.unmerge_tokens(y, both, backend=backend), tokenops.unmerge_tokens(y, [first, second], backend=backend))


@settings(max_examples=20)
@given(tokens=st.integers(2, 60), layers=st.integers(1, 4), seed=st.integers(0, 1000))
def test_a_chain_of_layers_composes(tokens: int, layers: int, seed: int, backend: str, device: str) -> None:
    """Plans of matches, as a model makes them: here destinations too are those of the steps in turn."""
    generator = torch.Generator().manual_seed(seed)
    x = start = torch.randn(2, tokens, 8, generator=generator).to(device)
    size = torch.ones(2, tokens, device=device)
    plans, kept = [], start
    for _ in range(layers):
        plan = tokenops.match_tokens(x, ratio=0.3, backend=backend)
        x, size = tokenops.merge_tokens(x, plan, size=size, backend=backend), tokenops.merge_tokens(size, plan, mode="sum", backend=backend)
        kept = tokenops.merge_tokens(kept, plan, mode="replace", backend=backend)
        plans.append(plan)
    whole = plans[0]
    for plan in plans[1:]:
        whole = tokenops.compose_plans(whole, plan)
    assert torch.equal(size.sum(-1), torch.full((2,), float(tokens), device=device))
    torch.testing.assert_close(tokenops.merge_tokens(start, whole, backend=backend), x, rtol=1e-4, atol=1e-5)
    assert torch.equal(tokenops.merge_tokens(start, whole, mode="replace", backend=backend), kept)
    assert torch.equal(tokenops.unmerge_tokens(x, plans, backend=backend), tokenops.unmerge_tokens(x, whole, backend=backend))
