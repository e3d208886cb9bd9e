"""The search for the most similar rows, in the interpreter: the definition's numbers, borders, promises."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import torch
from oracle import assert_close
from torch import Tensor

import tokenops
from tokenops.ops.token_merge import BACKENDS
from tokenops.reference import token_merge as reference
from tokenops.triton.token_merge.pairs import Side, argmax, launch_search
from tokenops.types import PairProblem, Window
from triton_checks import Checks

CHECKS = Checks()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: every product and sum is exact in every type, and many are equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem_of(a: Tensor, b: Tensor, *, window: Window | None = None, normalize: bool = True, weighted: bool = False) -> PairProblem:
    """With masks and scales if weighted: some per sample, some for all; scales of both signs."""
    sides = (a.shape[1], b.shape[1])
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(1 + at, size, generator=generator) < 0.7 if weighted else None for at, size in enumerate(sides)]
    scales = [tensor(2 - at, size, seed=at) if weighted else None for at, size in enumerate(sides)]
    places = [torch.randint(5, (1 + at, size, 3), generator=generator).int() if window else None for at, size in enumerate(sides)]
    return PairProblem(a, b, *masks, *scales, *places, window, normalize)


def found(problem: PairProblem, splits: int | None = None) -> tuple[Tensor, Tensor]:
    best, index = (torch.full(problem.a.shape[:2], 7, dtype=dtype) for dtype in (torch.float32, torch.int32))
    if splits is None:
        argmax(problem, best, index)
    else:
        a = Side(problem.a, problem.a_mask, problem.a_scale, problem.a_place)
        b = Side(problem.b, problem.b_mask, problem.b_scale, problem.b_place)
        launch_search(a, b, problem.window, problem.normalize, best, index, splits=splits)
    return best, index


def _is_the_definition(problem: PairProblem, splits: int | None = None) -> None:
    best, index = found(problem, splits)
    # the very numbers of the half types, compared in float64
    want = reference.pairs(problem._replace(a=problem.a.double(), b=problem.b.double()))
    assert torch.equal(index.long(), want.index), (index, want.index)
    none = index < 0
    assert torch.equal(best[none], want.best[none].float())
    assert_close("best", best[~none], want.best[~none], torch.float32)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dot": {"normalize": False},
    "weighted": {"weighted": True},
    "window": {"window": Window(-1, 2, 1, 3)},
    "weighted window": {"window": Window(0, 0, 9, 1), "weighted": True, "normalize": False},
}


def _searches(dtype: torch.dtype, options: dict[str, Any]) -> None:
    # one block of either side; several of both, shared out too; rows wider than a program holds
    for rows, columns, width, splits in ((13, 20, 24, None), (70, 70, 40, 2), (5, 40, 136, None)):
        a, b = tensor(2, rows, width, dtype=dtype), tensor(2, columns, width, seed=1, dtype=dtype)
        _is_the_definition(problem_of(a, b, **options), splits)


for _form_, _options_ in OPTIONS.items():
    CHECKS[f"search, {_form_}, fp32"] = functools.partial(_searches, torch.float32, _options_)
for _name_ in ("bf16", "fp16"):
    for _form_ in ("plain", "weighted window"):
        CHECKS[f"search, {_form_}, {_name_}"] = functools.partial(_searches, DTYPES[_name_], OPTIONS[_form_])


@CHECKS.add
def ties_go_to_the_lowest_row() -> None:
    for dtype in DTYPES.values():
        a, b = whole(1, 20, 8, dtype=dtype), whole(1, 200, 8, seed=1, dtype=dtype)
        for splits in (1, 3, 9):
            best, index = found(problem_of(a, b, normalize=False), splits)
            want = (a.double() @ b.double().mT).max(-1)
            assert torch.equal(best.double(), want.values)
            assert torch.equal(index.long(), want.indices)


@CHECKS.add
def lengths_neither_overflow_nor_vanish() -> None:
    """Not where one row among usual ones is out of bounds, either."""
    for dtype in (torch.float32, torch.bfloat16):
        a, b = tensor(1, 20, 16, dtype=dtype), tensor(1, 70, 16, seed=1, dtype=dtype)
        want = reference.pairs(PairProblem(a.double(), b.double(), *(None,) * 7, True))
        # powers of two change no direction
        for exponents in ((-120, 120), (120, 120), (-120, -120)):
            factors = [
                torch.where(torch.arange(x.shape[1]) % 7 == 3, 2.0**e, 1.0)[:, None].to(dtype)
                for x, e in zip((a, b), exponents, strict=True)
            ]
            best, index = found(problem_of(a * factors[0], b * factors[1]))
            assert torch.equal(index.long(), want.index)
            assert_close("best", best, want.best, torch.float32)


@CHECKS.add
def rows_that_are_no_numbers_never_win() -> None:
    for normalize in (True, False):
        a, b = tensor(1, 6, 8), tensor(1, 40, 8, seed=1)
        a[0, 2, 3], b[0, 5, 1], b[0, 9], b[0, 11] = math.nan, math.nan, 0.0, math.nan
        best, index = found(problem_of(a, b, normalize=normalize))
        want = reference.pairs(problem_of(a, b, normalize=normalize))
        assert torch.equal(index.long(), want.index)
        assert_close("best", best[want.index >= 0], want.best[want.index >= 0], torch.float32)
        assert int(index[0, 2]) == -1
        assert float(best[0, 2]) == -math.inf


@CHECKS.add
def an_infinite_scale_of_a_zero_row() -> None:
    """Such a row is nobody's best, and its own best is the first one, at no score. Whether or not the columns are shared out."""
    a, zeros, scale = tensor(1, 5, 8), torch.zeros(1, 200, 8), torch.full((1, 200), math.inf)
    best, index = found(problem_of(a, zeros)._replace(b_scale=scale))
    assert (best == -math.inf).all()
    assert (index == -1).all()
    for splits in (None, 2):
        best, index = found(problem_of(zeros, a.repeat(1, 40, 1))._replace(a_scale=scale), splits)
        assert best.isnan().all()
        assert index.count_nonzero() == 0


@CHECKS.add
def places_may_be_any_integers() -> None:
    low, high = -(2**31), 2**31 - 1
    places = torch.tensor([low, low + 1, -1, 0, 1, high - 1, high], dtype=torch.int32)
    a, b = tensor(1, 7, 8), tensor(1, 7, 8, seed=1)
    for axis, reach in enumerate((0, high, 1)):
        place = torch.zeros(1, 7, 3, dtype=torch.int32)
        place[0, :, axis] = places
        for t_low, t_high in ((-1, 1), (low, high), (high, high), (low, low), (1, 0)):
            problem = PairProblem(a, b, None, None, None, None, place, place, Window(t_low, t_high, reach, reach), True)
            _, index = found(problem)
            assert torch.equal(index.long(), reference.pairs(problem).index), (problem.window, axis)


@CHECKS.add
def a_window_ends_inside_a_block() -> None:
    """A program visits the blocks from the first to the last that any of its rows may look at."""
    frames = torch.arange(9).repeat_interleave(20)
    place = torch.stack([frames, frames * 0, frames * 0], -1)[None].int()
    a, b = tensor(1, 180, 8), tensor(1, 180, 8, seed=1)
    problem = PairProblem(a, b, None, None, None, None, place, place, Window(-1, 1, 0, 0), True)
    _is_the_definition(problem)
    _is_the_definition(problem, splits=2)
    # nobody is near
    best, index = found(problem._replace(b_place=place + 100))
    assert (index == -1).all()
    assert (best == -math.inf).all()


@CHECKS.add
def strided_rows_are_read_in_place() -> None:
    buffer = tensor(3, 80, 40)
    a, b = buffer[:, ::2, 8:32], buffer[:1, 1::2, 3:27].expand(3, -1, -1)
    assert not a.is_contiguous()
    for one, other in ((a, b), (b, a)):
        got, want = found(problem_of(one, other)), found(problem_of(one.contiguous(), other.contiguous()))
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@CHECKS.add
def objections_say_why() -> None:
    [triton] = [backend for backend in BACKENDS if backend.name == "triton"]
    assert triton.objections(tensor(1, 3, 8), tensor(1, 3, 8), names="a b") == []
    for x, reason in (
        (torch.zeros(1, 3, 8, dtype=torch.float64), "float64 is served by the reference only"),
        (torch.zeros(1, 3, 8, device="meta"), "a is on meta"),
        (torch.zeros(1, 3, 7), "a must have a width that is a multiple of 8, got 7"),
    ):
        reasons = triton.objections(x, x, names="a b")
        assert any(re.search(re.escape(reason), found) for found in reasons), reasons


@CHECKS.add
def searching_through_the_door() -> None:
    a, b = tensor(2, 9, 16), tensor(2, 30, 16, seed=1)
    mask = torch.arange(30) % 3 > 0
    got, want = (tokenops.pairwise_argmax(a, b, b_mask=mask, backend=backend) for backend in ("triton", "reference"))
    assert_close("best", got[0], want[0], torch.float32)
    assert torch.equal(got[1], want[1])
