"""Merging along a plan and its way back, in the interpreter: the definition's numbers, borders, promises."""

from __future__ import annotations

import functools
import math

import torch
from oracle import assert_close
from token_merge_oracle import random_plan
from torch import Tensor

from tokenops.reference import token_merge as reference
from tokenops.triton.token_merge import segments as launchers
from tokenops.types import MergePlan
from triton_checks import Checks

CHECKS = Checks()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("mean", "sum", "amax", "replace", "drop")


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sizes(batch: int, tokens: int) -> Tensor:
    """Small integers, some of them 0."""
    return torch.randint(0, 5, (batch, tokens), generator=torch.Generator().manual_seed(3)).float()


def _merges(x: Tensor, plan: MergePlan, size: Tensor | None, mode: str) -> None:
    """Forward and both gradients."""
    of_size = size is not None
    out = x.new_full((x.shape[0], plan.n_out, x.shape[2]), 7)
    launchers.merge(x, plan, size, mode, out)
    assert_close("out", out, reference.merged(x.double(), plan, size, mode), x.dtype)
    grad_out = tensor(*out.shape, seed=1, dtype=x.dtype)
    want = reference.gradients(grad_out.double(), x.double(), out.double(), plan, size, mode, of_size)
    grad_x, grad_size = torch.full_like(x, 7, memory_format=torch.contiguous_format), torch.full(x.shape[:2], 7.0) if of_size else None
    keeps = of_size or mode == "amax"
    launchers.merge_backward(grad_out, x if keeps else None, out if keeps else None, plan, size, mode, grad_x, grad_size)
    assert_close("gradient of x", grad_x, want[0], x.dtype)
    if grad_size is not None:
        assert_close("gradient of size", grad_size, want[1], x.dtype)
        alone = torch.full_like(grad_size, 7)
        launchers.merge_backward(grad_out, x, out, plan, size, mode, None, alone)
        assert torch.equal(alone, grad_size)


def _unmerges(y: Tensor, plan: MergePlan, mode: str) -> None:
    out = y.new_full((y.shape[0], plan.slot.shape[1], y.shape[2]), 7)
    launchers.unmerge(y, plan, mode, out)
    assert torch.equal(out.double(), reference.unmerged(y.double(), plan, mode))


def _is_the_definition(mode: str, dtype: torch.dtype) -> None:
    plan = random_plan(2, 40, 23)
    for width in (1, 72, 300):
        _merges(tensor(2, 40, width, dtype=dtype), plan, None, mode)
        if mode == "mean":
            _merges(tensor(2, 40, width, dtype=dtype), plan, sizes(2, 40), mode)


for _mode_ in MODES:
    for _name_, _dtype_ in DTYPES.items():
        CHECKS[f"{_mode_}, {_name_}"] = functools.partial(_is_the_definition, _mode_, _dtype_)


@CHECKS.add
def unmerging() -> None:
    plan = random_plan(2, 40, 23)
    for dtype in DTYPES.values():
        for width in (1, 72, 300):
            for mode in ("copy", "drop"):
                _unmerges(tensor(2, 23, width, dtype=dtype), plan, mode)


@CHECKS.add
def long_segments() -> None:
    """More members than are loaded ahead, beside output rows with few and with none."""
    slot = torch.arange(150)[None].clamp(max=9).where(torch.arange(150) != 5, 12)
    plan = reference.plan_of(slot, True, 14)
    for mode in MODES:
        _merges(tensor(1, 150, 20), plan, None, mode)
    _merges(tensor(1, 150, 20), plan, sizes(1, 150), "mean")


@CHECKS.add
def one_plan_or_one_list_of_sizes_for_all_samples() -> None:
    one = random_plan(1, 40, 23)
    for plan in (one, random_plan(3, 40, 23)):
        for size in (None, sizes(1, 40), sizes(3, 40), sizes(3, 40).T.contiguous().T, sizes(40, 2).T[:1]):
            _merges(tensor(3, 40, 20), plan, size, "mean")
        for mode in MODES[1:]:
            _merges(tensor(3, 40, 20), plan, None, mode)
        _unmerges(tensor(3, 23, 20), plan, "drop")


@CHECKS.add
def rows_are_read_in_place() -> None:
    plan = random_plan(3, 40, 23)
    wide = tensor(40, 3, 48).transpose(0, 1)
    # lists too may lie anywhere
    apart = MergePlan(*(t.T.contiguous().T if isinstance(t, Tensor) and t.dim() == 2 else t for t in plan))
    for x in (wide, wide[..., 5:30], wide[:1].expand(3, -1, -1)):
        for mode in MODES:
            _merges(x, apart, None, mode)
        _merges(x, apart, sizes(3, 40), "mean")
        _unmerges(x[:, :23], apart, "copy")


@CHECKS.add
def the_only_member_is_copied() -> None:
    plan = reference.plan_of(torch.tensor([[2, 0, 1]]), True, 4)
    x = tensor(1, 3, 50)
    for mode, size in (("mean", torch.tensor([[3.0, 0.3, 7.0]])), ("mean", None), ("amax", None), ("sum", None)):
        out = x.new_full((1, 4, 50), 7)
        launchers.merge(x, plan, size, mode, out)
        assert torch.equal(out, torch.stack([x[0, 1], x[0, 2], x[0, 0], torch.zeros(50)])[None])


@CHECKS.add
def denormal_sizes() -> None:
    """One over a mass that small is no number, but a mean and its gradient are."""
    plan = reference.plan_of(torch.tensor([[0, 0, 0, 1]]), True, 2)
    x, size, grad_out = tensor(1, 4, 50), torch.tensor([[1.0, 2.0, 3.0, 1.0]]), tensor(1, 2, 50, seed=1)
    got, want = [], []
    for results, factor in ((want, 1.0), (got, 2.0**-145)):
        out, grad = x.new_full((1, 2, 50), 7), torch.full_like(x, 7)
        launchers.merge(x, plan, size * factor, "mean", out)
        launchers.merge_backward(grad_out, None, None, plan, size * factor, "mean", grad, None)
        results += [out, grad]
    # products with such sizes keep few bits
    torch.testing.assert_close(got[0], want[0], rtol=0.1, atol=0.1)
    assert torch.equal(got[1], want[1])


@CHECKS.add
def special_maxima() -> None:
    plan = reference.plan_of(torch.zeros(1, 3, dtype=torch.int32), True, 1)
    for at in range(3):
        x = torch.tensor([[[1.0], [2.0], [3.0]]])
        x[0, at] = math.nan
        out, grad = torch.full((1, 1, 1), 7.0), torch.full((1, 3, 1), 7.0)
        launchers.merge(x, plan, None, "amax", out)
        assert out.isnan().all()
        launchers.merge_backward(torch.ones(1, 1, 1), x, out, plan, None, "amax", grad, None)
        assert grad.count_nonzero() == 0
    x = torch.full((1, 3, 1), -math.inf)
    launchers.merge(x, plan, None, "amax", out)
    assert out == -math.inf


@CHECKS.add
def bad_plans_stay_inside() -> None:
    """On a GPU only the kernels read a plan: whatever it holds, they stay in the grids (outside of them the interpreter dies)."""
    low, high = -(2**31), 2**31 - 1
    good = random_plan(2, 40, 23)
    x, y, size = tensor(2, 40, 20), tensor(2, 23, 20), sizes(2, 40)
    for bad in (low, high, -2, 40, 5):
        for name in ("slot", "order", "offsets"):
            broken = getattr(good, name).clone()
            broken[:, ::3] = bad
            plan = good._replace(**{name: broken})
            out, grad = torch.empty_like(y), torch.empty_like(x)
            for mode in MODES:
                launchers.merge(x, plan, None, mode, out)
                launchers.merge_backward(y, x, out, plan, None, mode, grad, None)
            launchers.merge_backward(y, x, out, plan, size, "mean", grad, torch.empty_like(size))
            launchers.unmerge(y, plan, "drop", grad)
