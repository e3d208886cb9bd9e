"""Token selection, halting and packing in the interpreter: the definition's numbers, borders, promises."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import torch
from oracle import assert_close
from torch import Tensor

import tokenops
from tokenops.ops.token_select import BACKENDS
from tokenops.reference import token_select as reference
from tokenops.triton import token_select as launchers
from tokenops.types import HaltBackwardProblem, HaltProblem, HaltState
from triton_checks import Checks

CHECKS = Checks()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# choosing: ids are compared bit for bit


def _select(score: Tensor, k: int, threshold: float | None = None, protect: int = 0) -> None:
    index, count = torch.empty(score.shape[0], k, dtype=torch.int32), torch.empty(score.shape[0], dtype=torch.int32)
    launchers.select(score, threshold, protect, index, count)
    want = reference.selection(score, k, threshold, protect)
    assert torch.equal(index, want.index), (index, want.index)
    assert torch.equal(count, want.count), (count, want.count)


def _selects(dtype: torch.dtype) -> None:
    # one block, two of the largest, and lists that end inside a block
    for tokens in (1, 7, 256, 300, 9000):
        score = tensor(1 if tokens > 300 else 2, tokens, seed=tokens, dtype=dtype)
        for k in {1, tokens // 3, tokens - 1, tokens, tokens + 5} - {0}:
            _select(score, k)
        _select(score, tokens, threshold=0.5)
        _select(score, max(1, tokens // 4), threshold=0.5, protect=min(2, tokens // 4))
        _select(score, max(1, tokens // 2), protect=tokens // 4)


for _name_, _dtype_ in DTYPES.items():
    CHECKS[f"selection, {_name_}"] = functools.partial(_selects, _dtype_)


@CHECKS.add
def ties_go_to_the_lowest_id() -> None:
    score = torch.randint(-2, 3, (3, 700), generator=torch.Generator().manual_seed(1))
    for dtype in DTYPES.values():
        for k in (1, 50, 350, 699):
            _select(score.to(dtype), k)
            _select(score.to(dtype), k, protect=1, threshold=-1.0)
    # more of the worst key than fit into the last block, and all scores equal
    _select(torch.zeros(1, 9000), 8500)
    _select(torch.where(torch.arange(9000) % 2 == 0, 0.0, -0.0).unsqueeze(0), 4000)


@CHECKS.add
def special_scores_have_their_place() -> None:
    special = [math.nan, -math.inf, math.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, -math.nan, 65504.0, 1.0, -1.0, 1.0]
    for dtype in DTYPES.values():
        score = torch.tensor([special, special[::-1]]).to(dtype)
        for k in (1, 2, 5, 9, 11, 12, 13, 14):
            _select(score, k, None, protect=k % 2)
        # between two halves, at the ends, at both zeros
        for threshold in (-math.inf, math.inf, 0.0, -0.0, 1.0, 1.0000001, 0.9999999, 1e-45, -1e-45, 70000.0, -3e38, 3.4e38):
            _select(score, len(special), threshold)
        for threshold in (-math.inf, 0.0, 0.9999999):
            _select(score, 3, threshold, protect=1)


@CHECKS.add
def scores_are_read_in_place() -> None:
    score = tensor(300, 4)
    _select(score.T, 60)
    _select(tensor(1, 300).expand(3, -1), 60)
    _select(tensor(2, 600)[:, 100:400], 60)


@CHECKS.add
def empty_selections() -> None:
    for lists, tokens, k in ((0, 5, 2), (2, 0, 3), (2, 5, 0)):
        _select(tensor(lists, tokens), k)


# halting


def _state(x: Tensor, cu_seqlens: Tensor | None, class_only: bool) -> HaltState:
    """As in the middle of a network: some rows have halted, one of them with a sum below the limit."""
    batch, tokens, channels = x.shape
    samples = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    cum = tensor(batch, tokens, seed=1).sigmoid()
    active = tensor(batch, tokens, seed=2) < 1.0
    out = tensor(*((samples, channels) if class_only else x.shape), seed=3)
    return HaltState(cum, 1.0 - cum, active, tensor(batch, tokens, seed=4), tensor(batch, tokens, seed=5), out)


def _same(name: str, got: Tensor, want: Tensor) -> None:
    if got.dtype == torch.bool:
        assert torch.equal(got, want), name
    else:
        assert_close(name, got, want, torch.float32)


FORMS: dict[str, dict[str, Any]] = {
    "all": {},
    "class": {"class_only": True},
    "packed": {"bounds": [0, 5, 5, 19, 37]},
    "packed class": {"bounds": [0, 5, 5, 19, 37], "class_only": True},
    "many short": {"bounds": [0, 0, 1, 2, 2, 3, 7, 8, 9, 11, 11, 12, 40, 40], "class_only": True},
}


def _problem(form: dict[str, Any], dtype: torch.dtype, channels: int = 48, first: bool = False, last: bool = False) -> HaltProblem:
    bounds, class_only = form.get("bounds"), form.get("class_only", False)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    x = tensor(2 if bounds is None else 1, 40, channels, dtype=dtype)
    state = None if first else _state(x, cu_seqlens, class_only)
    return HaltProblem(x, state, cu_seqlens, 3.0, 1.0, 0.99, last, class_only)


def _new(problem: HaltProblem) -> HaltState:
    return HaltState(*(torch.full_like(t, 7) for t in problem.state or reference.first_state(problem)))


def _halts(form: dict[str, Any], dtype: torch.dtype) -> None:
    for channels, first, last in ((48, False, False), (1, False, False), (300, False, True), (20, True, False)):
        problem = _problem(form, dtype, channels, first, last)
        want = reference.halting(problem)
        new = _new(problem)
        launchers.halt(problem, new)
        for name, got, right in zip(HaltState._fields, new, want, strict=True):
            _same(name, got, right)
        if problem.state is not None:
            before = problem.state.out.clone()
            launchers.halt(problem, problem.state)
            for name, got, right in zip(HaltState._fields, problem.state, new, strict=True):
                assert torch.equal(got, right), name
            assert not torch.equal(problem.state.out, before)


def _halts_backward(form: dict[str, Any], dtype: torch.dtype) -> None:
    """Against autograd through the definition, in float64."""
    for channels, first, last in ((48, False, False), (300, False, True), (20, True, False)):
        problem = _problem(form, dtype, channels, first, last)
        x, state = problem.x.double().requires_grad_(), None
        leaves = [x]
        if problem.state is not None:
            state = HaltState(*(t if t.dtype == torch.bool else t.double().requires_grad_() for t in problem.state))
            leaves.append(state.remain)
        wide = reference.halting(problem._replace(x=x, state=state))
        new = _new(problem)
        launchers.halt(problem, new)
        assert torch.equal(new.active, wide.active)
        results = (wide.cum, wide.remain, wide.rho, wide.out)
        grads = [tensor(*t.shape, seed=seed) for seed, t in enumerate(results)]
        for given in ((True, True, True, True), (False, False, False, True), (True, False, True, False)):
            chosen = [(t, g) for t, g, is_given in zip(results, grads, given, strict=True) if is_given and t.requires_grad]
            outputs, grad_outputs = zip(*((t, g.double()) for t, g in chosen), strict=True)
            want = torch.autograd.grad(outputs, leaves, grad_outputs, retain_graph=True, allow_unused=True, materialize_grads=True)
            got = (torch.full_like(problem.x, 7), torch.full_like(new.cum, 7))
            backward = HaltBackwardProblem(
                problem.x,
                *(g if is_given else None for g, is_given in zip(grads, given, strict=True)),
                problem.state and problem.state.remain,
                problem.state and problem.state.active,
                new.cum,
                *problem[2:],
            )
            launchers.halt_backward(backward, *got)
            assert_close("gradient of x", got[0], want[0], dtype)
            if problem.state is not None:
                assert_close("gradient of remain", got[1], want[1], dtype)
            alone = torch.full_like(got[1], 7)
            launchers.halt_backward(backward, None, alone)
            assert torch.equal(alone, got[1])


for _form_, _more_ in FORMS.items():
    for _name_ in ("fp32", "bf16"):
        CHECKS[f"halting, {_form_}, {_name_}"] = functools.partial(_halts, _more_, DTYPES[_name_])
        CHECKS[f"halting backward, {_form_}, {_name_}"] = functools.partial(_halts_backward, _more_, DTYPES[_name_])


@CHECKS.add
def rows_that_take_no_part_are_not_read() -> None:
    """Halted rows may hold anything but for their score; in place, their output is not written either."""
    problem = _problem({}, torch.float32)
    assert problem.state is not None
    clean = _new(problem)
    launchers.halt(problem, clean)
    halted = ~problem.state.active
    assert halted.any()
    problem.x[halted] = math.nan
    problem.x[..., 0].masked_fill_(halted, 0.25)
    problem.state.out[halted] = math.nan
    got = _new(problem)
    launchers.halt(problem, got)
    assert torch.equal(got.out[~halted], clean.out[~halted])
    assert got.out[halted].isnan().all()
    problem.x[halted] = math.inf
    problem.state.out[halted] = 5.0
    launchers.halt(problem, problem.state)
    assert torch.equal(problem.state.out[~halted], clean.out[~halted])
    assert (problem.state.out[halted] == 5.0).all()


@CHECKS.add
def halting_through_the_door() -> None:
    x, grad = tensor(2, 9, 16).requires_grad_(), tensor(2, 9, 16, seed=1)
    outs = {}
    for backend in ("triton", "reference"):
        state = None
        for layer in range(4):
            state = tokenops.halt_tokens(x * (layer + 1), state, scale=2.0, center=1.0, last=layer == 3, backend=backend)
        assert state is not None
        outs[backend] = (state.out, torch.autograd.grad((state.out * grad).sum() + state.rho.sum(), x)[0])
    for got, want in zip(*outs.values(), strict=True):
        assert_close("out and gradient", got, want, torch.float32)


@CHECKS.add
def strided_tokens_are_read_in_place() -> None:
    problem = _problem({}, torch.float32)
    want = _new(problem)
    launchers.halt(problem, want)
    strided = problem._replace(x=problem.x.transpose(0, 1).contiguous().transpose(0, 1))
    assert not strided.x.is_contiguous()
    got = _new(problem)
    launchers.halt(strided, got)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@CHECKS.add
def bad_sequence_bounds_stay_inside() -> None:
    """On a GPU only the kernels read cu_seqlens: whatever it holds, they stay in the buffers (outside of them the interpreter dies)."""
    low, high = -(2**31), 2**31 - 1
    for bad in ([0, 400, 40, 9, 12], [0, 16, high, 3, high], [low, 5, 40, 40, 41], [40, 20, 0, 0, 7], [high] * 5, [low] * 5):
        for class_only in (False, True):
            problem = _problem({**FORMS["packed"], "class_only": class_only}, torch.float32)
            assert problem.state is not None
            problem = problem._replace(cu_seqlens=torch.tensor(bad, dtype=torch.int32))
            new = _new(problem)
            launchers.halt(problem, new)
            backward = HaltBackwardProblem(
                problem.x, new.cum, new.cum, new.cum, new.out, problem.state.remain, problem.state.active, new.cum, *problem[2:]
            )
            launchers.halt_backward(backward, torch.empty_like(problem.x), torch.empty_like(new.cum))
        bounds = torch.tensor(bad, dtype=torch.int32)
        index = torch.arange(9).repeat(4, 1).int()
        for lists in (None, index, index[:1]):
            launchers.unpack(tensor(20, 6), bounds, lists, torch.empty(4, 9, 6))
        launchers.unpack(tensor(20, 6), bounds, index, torch.empty(1, 9, 6))
        launchers.pack(tensor(4, 9, 6), None, bounds[:4], torch.empty(20, 6), torch.empty(5, dtype=torch.int32))


# packing: rows are compared bit for bit


def _lists(lists: int, slots: int, rows: int, seed: int = 0) -> Tensor:
    """Ids in any order, with empty slots and ids that name no row anywhere."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(lists, rows, generator=generator).argsort(-1)[:, :slots].int()
    index[torch.rand(index.shape, generator=generator) < 0.3] = -1
    index[torch.rand(index.shape, generator=generator) < 0.1] = rows + 3
    return index


def _packs(x: Tensor, index: Tensor | None, count: Tensor | None, total: int, lists: int) -> None:
    tokens, cu_seqlens = torch.full((total, x.shape[2]), 7, dtype=x.dtype), torch.full((lists + 1,), 7, dtype=torch.int32)
    launchers.pack(x, index, count, tokens, cu_seqlens)
    want = reference.packing(x, index, count, total)
    assert torch.equal(cu_seqlens, want.cu_seqlens), (cu_seqlens, want.cu_seqlens)
    assert torch.equal(tokens, want.tokens)
    grid = torch.full_like(x, 7, memory_format=torch.contiguous_format)
    launchers.unpack(tokens, cu_seqlens, index, grid)
    assert torch.equal(grid, reference.unpacking(tokens, cu_seqlens, index, x.shape[1], shared=x.shape[0] == 1))


def _rows(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 100 - 50).to(dtype)


def _packs_width(width: int) -> None:
    # of every size, at widths that larger integers fit and do not
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.float64):
        x = _rows(3, 50, width, dtype=dtype)
        index = _lists(3, 41, 50)
        _packs(x, index, None, 123, 3)
        _packs(x, index[:1], None, 90, 3)
        _packs(x, None, torch.tensor([50, 0, 23], dtype=torch.int32), 150, 3)


for _width_ in (1, 2, 7, 150):
    CHECKS[f"packing rows of {_width_}"] = functools.partial(_packs_width, _width_)


@CHECKS.add
def lists_longer_than_a_block() -> None:
    x = _rows(2, 3000, 2, dtype=torch.float32)
    _packs(x, _lists(2, 2500, 3000), None, 4000, 2)
    # more lists than one step adds up
    tokens, cu_seqlens = torch.empty(500, 2), torch.empty(261, dtype=torch.int32)
    many, counts = _rows(260, 3, 2, dtype=torch.float32), torch.arange(260, dtype=torch.int32) % 4
    launchers.pack(many, None, counts, tokens, cu_seqlens)
    want = reference.packing(many, None, counts, 500)
    assert torch.equal(tokens, want.tokens)
    assert torch.equal(cu_seqlens, want.cu_seqlens)


@CHECKS.add
def lists_that_share_a_grid() -> None:
    x = _rows(1, 60, 5, dtype=torch.float32)
    index = torch.randperm(60, generator=torch.Generator().manual_seed(4)).int().view(4, 15)
    index[:, ::4] = -1
    _packs(x, index, None, 60, 4)


@CHECKS.add
def rows_beyond_the_total_are_dropped() -> None:
    """Checked mode refuses such a total; otherwise what does not fit is left out."""
    x, index = _rows(3, 20, 4, dtype=torch.float32), torch.arange(20).repeat(3, 1).int()
    for total in (0, 1, 20, 33, 59):
        tokens, cu_seqlens = torch.empty(total, 4), torch.empty(4, dtype=torch.int32)
        launchers.pack(x, index, None, tokens, cu_seqlens)
        want = reference.packing(x, index, None, total)
        assert torch.equal(cu_seqlens, want.cu_seqlens)
        assert torch.equal(tokens, want.tokens)


@CHECKS.add
def strided_rows_are_read_in_place() -> None:
    wide = _rows(50, 3, 24, dtype=torch.bfloat16).transpose(0, 1)
    index = _lists(3, 41, 50)
    for x in (wide, wide[:, :, 3:20], wide[:1].expand(3, -1, -1)):
        _packs(x, index, None, 123, 3)


@CHECKS.add
def empty_packings() -> None:
    for lists, rows, slots, width, total in ((0, 5, 3, 4, 0), (0, 5, 3, 4, 6), (2, 0, 3, 4, 5), (2, 5, 0, 4, 5), (2, 5, 3, 0, 4)):
        _packs(_rows(lists, rows, width, dtype=torch.float32), torch.full((lists, slots), -1, dtype=torch.int32), None, total, lists)
    for lists, rows, width, total in ((0, 5, 4, 6), (2, 0, 4, 5), (2, 5, 0, 4)):
        _packs(_rows(lists, rows, width, dtype=torch.float32), None, torch.zeros(lists, dtype=torch.int32), total, lists)


@CHECKS.add
def packing_through_the_door() -> None:
    x = tensor(2, 9, 3, 2).requires_grad_()
    index = _lists(2, 7, 9)
    index[index == 12] = -1
    packed = tokenops.pack_tokens(x, index, total=20, backend="triton")
    want = tokenops.pack_tokens(x, index, total=20, backend="reference")
    assert torch.equal(packed.tokens, want.tokens)
    grad = tensor(20, 3, 2, seed=1)
    got, right = (torch.autograd.grad(p.tokens, x, grad)[0] for p in (packed, want))
    assert torch.equal(got, right)


@CHECKS.add
def objections_say_why() -> None:
    [triton] = [backend for backend in BACKENDS if backend.name == "triton"]
    assert triton.objections(tensor(2, 3)) == []
    for problem, options, reason in (
        (torch.zeros(2, 3, dtype=torch.float64), {}, "float64 is served by the reference only"),
        (torch.zeros(2, 3, dtype=torch.float8_e5m2), {}, "computes with float32, bfloat16 and float16, got torch.float8_e5m2"),
        (torch.zeros(2, 3, 4, dtype=torch.complex128), {"computes": False}, "moves elements of 1, 2, 4 or 8 bytes, got torch.complex128"),
        (torch.zeros(2, 3, device="meta"), {}, "the tensor is on meta"),
    ):
        reasons = triton.objections(problem, **options)
        assert any(re.search(re.escape(reason), found) for found in reasons), reasons
    assert triton.objections(torch.zeros(2, 3, 4, dtype=torch.float64), computes=False) == []
