"""Layers on listed rows in the interpreter: the definition's numbers, borders, promises."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
from oracle import assert_close
from torch import Tensor

from tokenops.reference import delta_matmul as reference
from tokenops.triton import delta_matmul as launchers
from tokenops.types import LinearGradients, LinearProblem
from triton_checks import Checks

CHECKS = Checks()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lists(count: int, slots: int, rows: int, seed: int = 0) -> Tensor:
    """Ids in any order, with empty slots and ids that name no row anywhere."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(count, rows, generator=generator).argsort(-1)[:, :slots].int()
    index[torch.rand(index.shape, generator=generator) < 0.3] = -1
    index[torch.rand(index.shape, generator=generator) < 0.1] = rows + 3
    return index


def _problem(
    widths: tuple[int, ...] = (24, 40),
    slots: int = 41,
    rows: int = 50,
    dtype: torch.dtype = torch.float32,
    activation: str = "none",
    norm: bool = False,
    shared: bool = False,
) -> LinearProblem:
    layers: list[Tensor | None] = []
    for at, (inner, outer) in enumerate(pairwise(widths)):
        layers += [(tensor(outer, inner, seed=at) / inner**0.5).to(dtype), tensor(outer, seed=at + 5, dtype=dtype)]
    layers += [None] * (4 - len(layers))
    normalization = (1.0 + 0.3 * tensor(widths[0], seed=8), 0.3 * tensor(widths[0], seed=9)) if norm else (None, None)
    # rows far from zero, whose variance must not be a difference of squares
    x = (tensor(2, rows, widths[0], seed=7) + 3.0).to(dtype)
    return LinearProblem(x, lists(1 if shared else 2, slots, rows), *layers[:2], *normalization, 1e-5, activation, *layers[2:])


def _outputs(problem: LinearProblem) -> int:
    return (problem.weight if problem.weight_2 is None else problem.weight_2).shape[0]


def _run(problem: LinearProblem, grad_out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The compact result, the scattered one in a grid of sevens, and the gradients."""
    p, dtype = problem, problem.x.dtype
    out, grid = torch.full(grad_out.shape, 7, dtype=dtype), torch.full((*p.x.shape[:2], _outputs(p)), 7, dtype=dtype)
    launchers.linear(p, out)
    launchers.linear_into(p, grid)
    named = {name: t for name, t in p._asdict().items() if name in LinearGradients._fields and t is not None}
    grads = {name: torch.full(t.shape, 7, dtype=t.dtype) for name, t in named.items()}
    launchers.linear_backward(p, grad_out, LinearGradients(*map(grads.get, LinearGradients._fields)))
    return out, grid, grads


def _is_the_definition(problem: LinearProblem) -> None:
    p, dtype = problem, problem.x.dtype
    grad_out = tensor(2, p.index.shape[1], _outputs(p), seed=4, dtype=dtype)
    out, grid, grads = _run(p, grad_out)
    wide = LinearProblem(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in p))
    want = reference.projected(wide)
    assert_close("out", out, want, dtype)
    into = torch.full(grid.shape, 7.0, dtype=torch.float64)
    reference.linear_into(wide, into)
    assert_close("rows of out", grid, into, dtype)
    for name, expect in zip(LinearGradients._fields, reference.projected_gradients(wide, grad_out.double()), strict=True):
        if name in grads:
            assert_close(f"gradient of {name}", grads[name], expect, dtype)


for _activation_ in ("gelu", "gelu_tanh", "relu", "silu"):
    for _widths_ in ((24, 40), (24, 40, 16)):
        CHECKS[f"{_activation_} in {_widths_}"] = functools.partial(
            lambda activation, widths: _is_the_definition(_problem(widths, activation=activation, norm=True)), _activation_, _widths_
        )
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer norm": {"norm": True},
    "two layers": {"widths": (24, 40, 16), "activation": "gelu", "norm": True},
    # several blocks of everything; single numbers; widths that no wide load fits
    "blocks": {"widths": (72, 72), "slots": 70, "rows": 90, "norm": True, "shared": True},
    "ones": {"widths": (1, 1), "slots": 1, "rows": 1},
    "odd": {"widths": (33, 7, 19), "activation": "silu", "norm": True},
}
for _form_, _options_ in FORMS.items():
    for _name_, _dtype_ in DTYPES.items():
        CHECKS[f"{_form_}, {_name_}"] = functools.partial(
            lambda dtype, more: _is_the_definition(_problem(dtype=dtype, **more)), _dtype_, _options_
        )


@CHECKS.add
def rows_are_read_and_written_in_place() -> None:
    plain = _problem((24, 40, 16), activation="gelu", norm=True)
    grad_out = tensor(2, 41, 16, seed=4)
    want = _run(plain, grad_out)

    def apart(t: Tensor) -> Tensor:
        return torch.cat([t, t], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., : t.shape[-1]]

    strided = plain._replace(x=apart(plain.x), index=plain.index.repeat(1, 2)[:, :41], weight=apart(plain.weight.unsqueeze(1)).squeeze(1))
    assert not any(t.is_contiguous() for t in strided[:3])
    got = _run(strided, apart(grad_out))
    for have, expect in zip((*got[:2], *got[2].values()), (*want[:2], *want[2].values()), strict=True):
        assert torch.equal(have, expect)
    every_second = torch.full((2, 50, 32), 7.0)
    launchers.linear_into(plain, every_second[..., ::2])
    assert torch.equal(every_second[..., ::2], want[1])
    assert (every_second[..., 1::2] == 7.0).all()
    _is_the_definition(plain._replace(x=plain.x[:1].expand(2, -1, -1), weight=plain.weight.T.contiguous().T))


@CHECKS.add
def empty_slots_take_no_part() -> None:
    """Whatever gradient arrives there; and of lists that are all empty nothing is left but zeros."""
    problem = _problem((24, 40, 16), activation="gelu", norm=True)
    grad_out = tensor(2, 41, 16, seed=4)
    empty = (problem.index < 0) | (problem.index >= 50)
    want, got = _run(problem, grad_out), _run(problem, grad_out.masked_fill(empty.unsqueeze(-1), torch.nan))
    for have, expect in zip(got[2].values(), want[2].values(), strict=True):
        assert torch.equal(have, expect)
    out, grid, grads = _run(problem._replace(index=torch.full_like(problem.index, -1)), grad_out)
    assert (grid == 7.0).all()
    for zero in (out, *grads.values()):
        assert zero.count_nonzero() == 0


@CHECKS.add
def each_gradient_of_layers_alone() -> None:
    problem = _problem((24, 40, 16), activation="gelu", norm=True)
    grad_out = tensor(2, 41, 16, seed=4)
    whole = _run(problem, grad_out)[2]
    for name, expect in whole.items():
        alone = torch.full_like(expect, 7.0)
        launchers.linear_backward(
            problem, grad_out, LinearGradients(*(alone if field == name else None for field in LinearGradients._fields))
        )
        assert torch.equal(alone, expect), name


@CHECKS.add
def layers_of_nothing() -> None:
    for rows, slots, widths in ((5, 0, (8, 8)), (0, 3, (8, 8)), (5, 3, (8, 0)), (5, 3, (0, 8)), (5, 3, (8, 0, 8))):
        problem = _problem(widths, slots=slots, rows=max(rows, 1))._replace(index=torch.full((2, slots), -1, dtype=torch.int32))
        problem = problem._replace(x=problem.x[:, :rows])
        out, grid, grads = _run(problem, tensor(2, slots, _outputs(problem)))
        assert (grid == 7.0).all()
        for zero in (out, *grads.values()):
            assert zero.count_nonzero() == 0
