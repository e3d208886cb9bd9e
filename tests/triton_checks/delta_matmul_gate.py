"""The gate and its buffers in the interpreter: the definition's numbers, borders, promises."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from oracle import assert_close
from torch import Tensor

from tokenops.reference import delta_matmul as reference
from tokenops.triton import delta_matmul as launchers
from tokenops.triton.delta_matmul import rows as row_launchers
from tokenops.types import DeltaGate, GateBackwardProblem, GateGradients, GateProblem
from triton_checks import Checks
from triton_checks.delta_matmul_linear import lists, tensor

CHECKS = Checks()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _problem(
    rows: int = 50,
    width: int = 40,
    dtype: torch.dtype = torch.float32,
    skip: bool = False,
    norm: bool = False,
    first: bool = False,
    **more: Any,
) -> GateProblem:
    # changes of very different size: rounding turns no choice
    size = torch.arange(1, rows + 1).flip(0).roll(rows // 3).view(1, -1, 1)
    x = ((tensor(2, rows, width) + 0.1) * size).to(dtype)
    grids = x, tensor(2, rows, width, seed=1, dtype=dtype) if skip else None, None if first else tensor(2, rows, width, seed=2, dtype=dtype)
    parameters = (1.0 + 0.3 * tensor(width, seed=4), 0.3 * tensor(width, seed=5)) if norm else (None, None)
    options = {"norm_eps": 1e-5, "index": None, "threshold": None, "order": 2.0, "whole": False, **more}
    return GateProblem(*grids, *parameters, **options)


def _results(problem: GateProblem, slots: int) -> DeltaGate:
    x = problem.x
    chosen = torch.full((2, slots), 7, dtype=torch.int32), torch.full((2,), 7, dtype=torch.int32)
    sent = [torch.full((2, slots, x.shape[2]), 7, dtype=x.dtype) for _ in range(2)]
    return DeltaGate(*chosen, *sent, torch.full(x.shape, 7, dtype=x.dtype), torch.full(x.shape, 7, dtype=x.dtype))


def _wide(problem: Any) -> Any:
    return problem._replace(
        **{name: t.double() for name, t in problem._asdict().items() if isinstance(t, Tensor) and t.is_floating_point()},
    )


def _is_the_definition(problem: GateProblem, slots: int) -> None:
    """Forward, in place, and backward."""
    p, dtype = problem, problem.x.dtype
    new = _results(p, slots)
    launchers.gate(p, new)
    want = reference.gated(p, slots)
    assert torch.equal(new.index, want.index), (new.index, want.index)
    assert torch.equal(new.count, want.count)
    for name in ("values", "delta", "reference", *(["total"] if p.skip is not None else [])):
        assert_close(name, getattr(new, name), getattr(want, name), dtype)
    if p.reference is not None:
        old = p.reference.clone()
        again = _results(p, slots)._replace(reference=old)
        launchers.gate(p._replace(reference=old), again)
        for name, have, expect in zip(DeltaGate._fields, again, new, strict=True):
            assert torch.equal(have, expect), name
    _gradients_are_the_definition(p, new)


def _gradients_are_the_definition(p: GateProblem, new: DeltaGate, missing: int | None = None) -> None:
    x, first = p.x if p.skip is None else new.total, p.reference is None
    shapes = (new.values.shape, new.delta.shape, x.shape, x.shape)
    given = [None if at == missing else tensor(*shape, seed=6 + at, dtype=x.dtype) for at, shape in enumerate(shapes)]
    backward = GateBackwardProblem(x, p.norm_weight, p.norm_bias, p.norm_eps, new.index, p.whole, first, *given)
    grads = [torch.full(x.shape, 7, dtype=x.dtype), None if first else torch.full(x.shape, 7, dtype=x.dtype)]
    grads += [None, None] if p.norm_weight is None else [torch.full(p.norm_weight.shape, 7.0) for _ in range(2)]
    launchers.gate_backward(backward, GateGradients(*grads))
    for name, have, expect in zip(GateGradients._fields, grads, reference.gate_gradients(_wide(backward)), strict=True):
        if have is not None:
            assert_close(f"gradient of {name}", have, expect, x.dtype)


FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "greatest": ({}, 17),
    "skip": ({"skip": True}, 17),
    "above a threshold": ({"threshold": 40.0, "skip": True}, 50),
    "a forced list": ({"index": lists(2, 20, 50), "norm": True}, 20),
    "a forced list for all": ({"index": lists(1, 20, 50), "norm": True, "skip": True}, 20),
    "whole frame": ({"whole": True, "skip": True}, 17),
    "whole frame, forced list": ({"whole": True, "norm": True, "index": lists(2, 20, 50)}, 20),
    "first": ({"first": True, "norm": True, "skip": True}, 50),
}
for _form_, (_options_, _slots_) in FORMS.items():
    for _name_, _dtype_ in DTYPES.items():
        CHECKS[f"{_form_}, {_name_}"] = functools.partial(
            lambda more, slots, dtype: _is_the_definition(_problem(dtype=dtype, **more), slots), _options_, _slots_, _dtype_
        )


@CHECKS.add
def normalised_changes_choose() -> None:
    """In float32: half types may choose others among changes of one size."""
    _is_the_definition(_problem(norm=True, skip=True), 17)


@CHECKS.add
def a_gradient_that_is_not_there_is_zero() -> None:
    for more in ({}, {"norm": True}, {"whole": True}):
        problem = _problem(rows=9, width=12, **more)
        new = _results(problem, 4)
        launchers.gate(problem, new)
        for missing in range(4):
            _gradients_are_the_definition(problem, new, missing)


@CHECKS.add
def every_order_chooses() -> None:
    for order in (0.0, 0.5, 1.0, 3.0, math.inf):
        _is_the_definition(_problem(rows=20, width=12, order=order), 6)


@CHECKS.add
def rows_longer_than_registers() -> None:
    """Rows that take several blocks are compared, normalised and differentiated in several passes; single numbers too."""
    longest = row_launchers.LONGEST
    row_launchers.LONGEST = 16
    try:
        _is_the_definition(_problem(rows=9, width=50, norm=True, skip=True), 4)
        _is_the_definition(_problem(rows=9, width=50, order=math.inf), 4)
    finally:
        row_launchers.LONGEST = longest
    _is_the_definition(_problem(rows=1, width=1), 1)


@CHECKS.add
def grids_are_used_in_place() -> None:
    plain = _problem(skip=True, norm=True)
    want = _results(plain, 17)
    launchers.gate(plain, want)

    def apart(t: Tensor) -> Tensor:
        return torch.cat([t, t], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., : t.shape[-1]]

    old = torch.stack([plain.reference, plain.reference], -1)[..., 0]
    strided = plain._replace(x=apart(plain.x), skip=apart(plain.skip), reference=old)
    got = _results(plain, 17)._replace(reference=old)
    launchers.gate(strided, got)
    for name, have, expect in zip(DeltaGate._fields, got, want, strict=True):
        assert torch.equal(have, expect), name


@CHECKS.add
def a_token_without_a_number_is_not_chosen() -> None:
    """Checked mode refuses it; otherwise NaN is no greatest change, whatever the order."""
    for order in (1.0, 2.0, 3.0, math.inf):
        problem = _problem(order=order)
        problem.x[:, 20, 3] = math.nan
        new = _results(problem, 17)
        launchers.gate(problem, new)
        assert not (new.index == 20).any()
        assert new.values.isfinite().all()


@CHECKS.add
def gates_of_nothing() -> None:
    for rows, width, slots in ((0, 4, 0), (5, 0, 3), (5, 4, 0)):
        for whole in (False, True):
            _is_the_definition(_problem(rows=rows, width=width, whole=whole), slots)
        _is_the_definition(_problem(rows=rows, width=width, first=True), rows)


@CHECKS.add
def whatever_ids_name_no_row_makes_an_empty_slot() -> None:
    """Outside of the grids the interpreter dies."""
    index = torch.tensor([[3, -1, 50, 2**31 - 1, -(2**31), 49]], dtype=torch.int32)
    _is_the_definition(_problem(index=index, norm=True), 6)


@CHECKS.add
def objections_say_why() -> None:
    x = tensor(1, 3, 4)
    problem = _problem(rows=3, width=4)
    for call in (x, problem, GateBackwardProblem(x, None, None, 0.0, torch.zeros(1, 2).int(), False, False, x, x, x, None)):
        assert launchers.objections(call) == []
    for call, reason in (
        (problem._replace(x=problem.x.double()), "computes with float32, bfloat16 and float16, got torch.float64"),
        (problem._replace(x=problem.x.to("meta")), "x is on meta"),
        (x.to("meta"), "the tensor is on meta"),
    ):
        assert any(reason in found for found in launchers.objections(call)), launchers.objections(call)


# buffers: rows are compared bit for bit


def _updates(dtype: torch.dtype, width: int) -> None:
    for index in (lists(2, 41, 50), lists(1, 41, 50)):
        buffer, rows = tensor(2, 50, width, dtype=dtype), tensor(2, 41, width, seed=1, dtype=dtype)
        ids = reference.row_ids(index, 2, 50)
        # what stands in an empty slot is not read
        rows = rows.masked_fill((ids < 0).unsqueeze(-1), math.nan)
        want = reference.replaced(buffer, rows, ids)
        out = torch.full_like(buffer, 7)
        launchers.update(buffer, rows, index, out)
        assert torch.equal(out, want)
        launchers.update(buffer, rows, index, buffer)
        assert torch.equal(buffer, want)
        grads = torch.full_like(buffer, 7), torch.full_like(rows, 7)
        expected = torch.empty_like(buffer), torch.empty_like(rows)
        launchers.update_backward(out, index, *grads)
        reference.update_backward(out, index, *expected)
        for have, expect in zip(grads, expected, strict=True):
            assert torch.equal(have, expect)


for _width_ in (1, 7, 150):
    for _name_, _dtype_ in DTYPES.items():
        CHECKS[f"buffers of rows of {_width_}, {_name_}"] = functools.partial(_updates, _dtype_, _width_)
