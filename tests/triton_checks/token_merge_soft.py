"""Soft merging in the interpreter: the definition's numbers, borders, promises."""

from __future__ import annotations

import functools
from typing import Any

import torch
from oracle import assert_close
from torch import Tensor

from tokenops.reference import token_merge as reference
from tokenops.triton.token_merge import soft as launchers
from tokenops.types import SoftMergeGradients, SoftMergeProblem
from triton_checks import Checks

CHECKS = Checks()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def masses(batch: int, tokens: int) -> Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(3)).sub(0.2).clamp(min=0.0)


def _problem(
    tokens: int = 70, metas: int = 20, channels: int = 40, width: int = 24, dtype: torch.dtype = torch.float32, **more: Any
) -> SoftMergeProblem:
    rows = ((tokens, channels), (tokens, width), (metas, width))
    grids = [tensor(2, *shape, seed=seed, dtype=dtype) for seed, shape in enumerate(rows)]
    return SoftMergeProblem(*grids, **{"temperature": 0.3, "mass": None, "normalize": True, **more})


def _run(problem: SoftMergeProblem, grad_out: Tensor, grad_mass: Tensor, wanted: tuple[bool, ...] = (True,) * 5) -> list[Tensor | None]:
    """out, mass_out, lse, and the gradients."""
    batch, tokens = problem.x.shape[:2]
    results = torch.full(grad_out.shape, 7.0), torch.full(grad_mass.shape, 7.0), torch.full((batch, tokens), 7.0)
    launchers.soft_merge(*problem, *results)
    grads = [torch.full(grid.shape, 7, dtype=grid.dtype) for grid in problem[:3]]
    grads += [torch.full((batch,), 7.0), torch.full((batch, tokens), 7.0)]
    chosen = SoftMergeGradients(*(grad if want else None for grad, want in zip(grads, wanted, strict=True)))
    launchers.soft_merge_backward(grad_out, grad_mass, *problem, *results, chosen)
    return [*results, *chosen]


def _gradients_of_results(problem: SoftMergeProblem) -> tuple[Tensor, Tensor]:
    batch, metas = problem.meta.shape[:2]
    # as the door hands them down: rounded to the type of the tokens, and wide again
    return tensor(batch, metas, problem.x.shape[2], seed=4, dtype=problem.x.dtype).float(), tensor(batch, metas, seed=5)


def _is_the_definition(problem: SoftMergeProblem, but: str | None = None) -> None:
    given = _gradients_of_results(problem)
    got = _run(problem, *given)
    wide = problem._replace(
        **{name: t.double() for name, t in zip(problem._fields, problem, strict=True) if isinstance(t, Tensor)},
    )
    want = [*reference.assigned(wide), *reference.soft_gradients(wide, *(grad.double() for grad in given))]
    for name, have, expect in zip(("out", "mass", "lse", *SoftMergeGradients._fields), got, want, strict=True):
        assert have is not None
        if name != but:
            assert_close(name, have, expect, problem.x.dtype)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dot product": {"normalize": False, "temperature": 3.0},
    "mass": {"mass": masses(2, 70)},
    "shared mass, strided": {"mass": masses(70, 2).T[:1]},
    "sharp": {"temperature": 0.01},
    "flat": {"temperature": 50.0},
    "temperature on the device": {"temperature": torch.tensor(0.3)},
}
for _case_, _more_ in CASES.items():
    for _name_, _dtype_ in DTYPES.items():
        CHECKS[f"soft merging, {_case_}, {_name_}"] = lambda more=_more_, dtype=_dtype_: _is_the_definition(_problem(dtype=dtype, **more))

# one block of everything, several of everything, single rows
for _sizes_ in ((1, 1, 8, 8), (40, 40, 8, 8), (130, 40, 136, 72), (33, 17, 7, 200)):
    for _name_, _dtype_ in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        CHECKS[f"soft merging of {_sizes_}, {_name_}"] = functools.partial(
            lambda sizes, dtype: _is_the_definition(_problem(*sizes, dtype=dtype)), _sizes_, _dtype_
        )


# means differ little for their size, and gradients are what is left of them; float32 is too coarse for what is left of rows this far away
for _name_, _dtype_ in DTYPES.items():
    CHECKS[f"soft merging of a lone token, {_name_}"] = lambda dtype=_dtype_: _is_the_definition(_problem(tokens=1, metas=24, dtype=dtype))
    if _dtype_ != torch.float32:
        CHECKS[f"soft merging far from zero, {_name_}"] = lambda dtype=_dtype_: _is_the_definition(_far(_problem(dtype=dtype)))


def _far(problem: SoftMergeProblem) -> SoftMergeProblem:
    return problem._replace(x=problem.x + 1000.0)


@CHECKS.add
def soft_merging_reads_rows_in_place() -> None:
    plain = _problem(mass=masses(2, 70))
    given = _gradients_of_results(plain)
    want = _run(plain, *given)

    def apart(t: Tensor) -> Tensor:
        return torch.cat([t, t], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., : t.shape[-1]]

    strided = plain._replace(**{name: apart(getattr(plain, name)) for name in ("x", "metric", "meta")}, mass=apart(plain.mass))
    assert not strided.x.is_contiguous()
    for have, expect in zip(_run(strided, *map(apart, given)), want, strict=True):
        assert torch.equal(have, expect)
    shared = plain._replace(x=plain.x[:1].expand(2, -1, -1), meta=plain.meta[:1].expand(2, -1, -1))
    _is_the_definition(shared)


@CHECKS.add
def each_gradient_of_soft_merging_alone() -> None:
    problem = _problem(mass=masses(2, 70))
    given = _gradients_of_results(problem)
    whole = _run(problem, *given)[3:]
    for at in range(5):
        alone = _run(problem, *given, wanted=tuple(i == at for i in range(5)))[3:]
        assert torch.equal(alone[at], whole[at])


@CHECKS.add
def lengths_neither_overflow_nor_vanish() -> None:
    for dtype, factors in (
        (torch.float32, (1e-38, 1e-25, 1e18, 1e37)),
        (torch.bfloat16, (2.0**-120, 2.0**120)),
        (torch.float16, (2.0**13,)),
    ):
        plain = _problem(dtype=dtype)
        given = _gradients_of_results(plain)
        want = _run(plain, *given)
        for factor in factors:
            got = _run(plain._replace(metric=plain.metric * factor, meta=plain.meta * factor), *given)
            for have, expect in zip(got[:4], want[:4], strict=True):
                assert_close("result", have, expect.double(), dtype)


@CHECKS.add
def zero_rows_and_no_mass() -> None:
    problem = _problem()
    problem.metric[0, 3], problem.meta[1, 2] = 0.0, 0.0
    _is_the_definition(problem)
    given = _gradients_of_results(problem)
    out, mass, _, of_x, of_metric, of_meta, of_temperature, of_mass = _run(problem._replace(mass=torch.zeros(2, 70)), *given)
    for zero in (out, mass, of_x, of_metric, of_meta, of_temperature):
        assert zero.count_nonzero() == 0
    assert of_mass.count_nonzero() > 0


def _beside_the_tokens(temperature: float, dtype: torch.dtype = torch.float32) -> SoftMergeProblem:
    """The last meta token resembles no token."""
    metric, meta = torch.zeros(1, 100, 8), torch.zeros(1, 3, 8)
    metric[..., 0], metric[..., 1] = 1.0, torch.arange(100) * 0.004
    meta[0, 0, 0], meta[0, 1, 0], meta[0, 2, 7] = 1.0, 0.8, 1.0
    return SoftMergeProblem(tensor(1, 100, 24, dtype=dtype), metric.to(dtype), meta.to(dtype), torch.tensor(temperature), None, True)


@CHECKS.add
def next_to_nothing_is_averaged_too() -> None:
    """Weights that half types do not hold."""
    for dtype in DTYPES.values():
        # most of the temperature's gradient cancels: at one so low the definition itself misses the rule in float32
        _is_the_definition(_beside_the_tokens(0.04, dtype), but="temperature")


@CHECKS.add
def a_denormal_mass() -> None:
    """One over it is no number, but its mean and the gradients are."""
    problem = _beside_the_tokens(0.1)._replace(mass=torch.full((1, 100), 5e-37))
    given = tensor(1, 3, 24, seed=3), torch.zeros(1, 3)
    out, mass, _, *grads = _run(problem, *given)
    assert mass is not None
    assert 0.0 < mass[0, 2].item() < 2.0**-128
    wide = problem._replace(**{name: t.double() for name, t in problem._asdict().items() if isinstance(t, Tensor)})
    want = reference.soft_gradients(wide, *(grad.double() for grad in given))
    # but for the gradient of the masses, which is as large as they are small
    for have, expect in zip((out, *grads[:4]), (reference.assigned(wide)[0], *want[:4]), strict=True):
        assert have is not None
        # what cancels is as large as the largest of them
        torch.testing.assert_close(have.double(), expect, rtol=1e-3, atol=1e-3 * float(expect.abs().max()))


@CHECKS.add
def tokens_give_away_what_they_have_at_any_temperature() -> None:
    """Weights come from scores that were multiplied a second time; cold ones differ by a percent if they are rounded differently."""
    problem = _problem(tokens=200, metas=80, width=100, mass=masses(2, 200), temperature=1e-5)
    _, given, _ = _run(problem, *_gradients_of_results(problem))[:3]
    assert given is not None
    assert problem.mass is not None
    torch.testing.assert_close(given.sum(1), problem.mass.sum(1), rtol=1e-6, atol=0.0)


@CHECKS.add
def one_meta_token_gets_the_mean() -> None:
    problem = _problem(metas=1)
    _is_the_definition(problem)
