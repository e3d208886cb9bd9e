"""The CUDA kernels that match and merge tokens, on the emulator: random calls under several orders of threads."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from emulator_checks import RandomCalls
from hypothesis import strategies as st
from oracle import assert_close
from test_token_merge import DTYPES, MODES, normal, uniform
from token_merge_oracle import random_plan, soft_merged
from torch import Tensor

import tokenops
from tokenops import Window
from tokenops.ops.token_merge.cuda import search
from tokenops.reference import token_merge as reference
from tokenops.types import MergePlan, PairProblem

SEEDS = st.integers(0, 99)
# chunks of a row are 64 numbers of a half type and 32 of float32; of the first grid three are kept
WIDTHS = st.sampled_from((8, 24, 64, 72, 200, 264))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers where no 16 bytes can be read at once, or with a gap between the rows."""
    pad = {"dense": 0, "odd": 1, "gap": 8}[layout]
    buffer = x.new_full((x.shape[0], x.shape[1], x.shape[2] + pad), torch.nan)
    buffer[..., pad:] = x
    return buffer[..., pad:]


LAYOUTS = st.sampled_from(("dense", "odd", "gap"))
# every so many rows have numbers that square to nothing or to infinity
EXPONENTS = st.sampled_from((0, 0, 90, -90))


def unusual(x: Tensor, exponent: int) -> Tensor:
    if x.dtype == torch.float16:
        # of longer rows it cannot hold the gradients
        exponent = max(-12, min(exponent, 3))
    rows = torch.where(torch.arange(x.shape[1]) % 7 == 3, 2.0**exponent, 1.0)
    return x * rows[:, None].to(x.dtype)


@st.composite
def pair_calls(draw: st.DrawFn) -> PairProblem:
    batch, seed, dtype, layout = draw(st.integers(1, 2)), draw(SEEDS), draw(st.sampled_from(DTYPES)), draw(LAYOUTS)
    width = draw(WIDTHS)
    normalize = draw(st.booleans())
    grids, masks, scales, places = [], [], [], []
    for at, most in enumerate((150, 300)):
        rows = draw(st.integers(1, most))
        x = normal(batch, rows, width, dtype=dtype, seed=seed + at)
        grids.append(laid_out(unusual(x, draw(EXPONENTS) if normalize else 0), layout))
        generator = torch.Generator().manual_seed(seed + at)
        masks.append(torch.rand(1 if at else batch, rows, generator=generator) < 0.7 if draw(st.booleans()) else None)
        scales.append(torch.randn(batch if at else 1, rows, generator=generator) if draw(st.booleans()) else None)
        frame = torch.arange(rows) // 40
        places.append(torch.stack([frame, torch.arange(rows) % 5, frame % 2], -1)[None].int().expand(1 if at else batch, -1, -1))
    window = draw(st.sampled_from((None, Window(-1, 1, 1, 9), Window(0, 0, 9, 0), Window(2, 3, 3, 3))))
    return PairProblem(*grids, *masks, *scales, *(places if window else (None, None)), window, normalize)


def check_pairs(call: PairProblem) -> tuple[Tensor, Tensor]:
    """The winner's score is the best, and its own; where two are closer than rounding either may win."""
    best, index = torch.full(call.a.shape[:2], torch.nan), torch.full(call.a.shape[:2], 7, dtype=torch.int32)
    search(call, best, index)
    wide = call._replace(a=call.a.double(), b=call.b.double())
    want = reference.pairs(wide)
    assert torch.equal(index < 0, want.index < 0)
    won = index >= 0
    assert (best[~won] == -torch.inf).all()
    assert_close("best", best[won], want.best[won], torch.float32)
    # what the chosen rows score, each alone with its candidate
    rows = index.clamp(min=0).long()
    chosen = wide.b.gather(1, rows[..., None].expand(-1, -1, wide.b.shape[2]))
    a, b = (torch.nn.functional.normalize(x, dim=-1, eps=0.0) if call.normalize else x for x in (wide.a, chosen))
    score = (a * b).sum(-1)
    for scale in (None if call.b_scale is None else call.b_scale.expand(rows.shape[0], -1).gather(1, rows), call.a_scale):
        score = score if scale is None else score * scale
    assert_close("score of the winner", score[won], want.best[won], torch.float32)
    if call.b_mask is not None:
        assert call.b_mask.expand(rows.shape[0], -1).gather(1, rows)[won].all()
    return best, index


class Match(NamedTuple):
    metric: Tensor
    options: dict[str, Any]


@st.composite
def match_calls(draw: st.DrawFn) -> Match:
    """Small integers: scores are exact, and many are equal."""
    batch, tokens, seed = draw(st.integers(1, 3)), draw(st.one_of(st.integers(2, 90), st.sampled_from((300, 1100)))), draw(SEEDS)
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randint(-1, 2, (batch, tokens, 8), generator=generator).to(draw(st.sampled_from(DTYPES)))
    options: dict[str, Any] = {"normalize": False}
    if draw(st.booleans()):
        options |= {"class_token": draw(st.booleans()), "distill_token": draw(st.booleans())}
    else:
        # chains too, and tokens that are dropped
        options["scheme"] = torch.randint(5, (draw(st.sampled_from((1, batch))), tokens), generator=generator)
    if draw(st.booleans()):
        options["r"] = draw(st.integers(0, tokens))
    else:
        options["threshold"] = draw(st.sampled_from((-1.0, 2.0, 99.0)))
    return Match(metric, options)


def check_match(call: Match) -> tuple[Tensor, ...]:
    plan, want = (tokenops.match_tokens(call.metric, **call.options, backend=backend) for backend in ("cuda", "reference"))
    return assert_same_plan(plan, want)


def assert_same_plan(plan: MergePlan, want: MergePlan) -> tuple[Tensor, ...]:
    assert plan.n_out == want.n_out
    lists = tuple(part for part in plan if isinstance(part, Tensor))
    for part, expected in zip(lists, (part for part in want if isinstance(part, Tensor)), strict=True):
        assert torch.equal(part, expected)
    return lists


# several blocks of a block's threads
TOKENS = st.one_of(st.integers(1, 90), st.sampled_from((257, 1025, 2100)))


@st.composite
def targets(draw: st.DrawFn) -> tuple[Tensor, bool, int]:
    """(parents or output rows, which, how many rows there are)"""
    batch, tokens, seed, is_slot = draw(st.integers(1, 2)), draw(TOKENS), draw(SEEDS), draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    if is_slot:
        n_out = draw(st.sampled_from((1, 7, tokens, 2 * tokens + 300)))
        return torch.randint(-1, n_out, (batch, tokens), generator=generator), True, n_out
    kind = torch.rand(batch, tokens, generator=generator)
    ids = torch.arange(tokens)
    near = draw(st.sampled_from((2, tokens)))
    # to a higher token: chains, long ones where it is a near one
    parent = (ids + 1 + torch.randint(near, (batch, tokens), generator=generator)).clamp(max=tokens - 1)
    parent = torch.where(kind < draw(st.sampled_from((0.01, 0.3))), ids, parent).masked_fill(kind > 0.95, -1)
    parent[:, -1] = tokens - 1
    return parent.flip(-1).neg().add(tokens - 1).masked_fill(parent.flip(-1) < 0, -1) if draw(st.booleans()) else parent, False, tokens


def check_plan(call: tuple[Tensor, bool, int]) -> tuple[Tensor, ...]:
    target, is_slot, n_out = call
    make = tokenops.plan_from_slots if is_slot else tokenops.plan_from_parents
    return assert_same_plan(*(make(target, n_out, backend=backend) for backend in ("cuda", "reference")))


class Merge(NamedTuple):
    x: Tensor
    size: Tensor | None
    plan: MergePlan
    mode: str
    seed: int


@st.composite
def merge_calls(draw: st.DrawFn) -> Merge:
    batch, tokens, n_out, seed = draw(st.integers(1, 3)), draw(st.integers(1, 120)), draw(st.integers(1, 60)), draw(SEEDS)
    width = draw(st.one_of(st.integers(1, 20), st.sampled_from((64, 72, 300, 512))))
    plan = random_plan(draw(st.sampled_from((1, batch))), tokens, n_out, seed=seed)
    x = laid_out(normal(batch, tokens, width, dtype=draw(st.sampled_from(DTYPES)), seed=seed), draw(LAYOUTS))
    mode = draw(st.sampled_from((*MODES, "weighted")))
    return Merge(x, uniform(batch, tokens, seed=seed) if mode == "weighted" else None, plan, "mean" if mode == "weighted" else mode, seed)


def check_merge(call: Merge) -> tuple[Tensor, ...]:
    """There and back, and every gradient of both."""
    dtype, given = call.x.dtype, [t for t in (call.x, call.size) if t is not None]
    results = []
    for backend, leaves in (("cuda", [t.detach() for t in given]), ("reference", [t.detach().double() for t in given])):
        x, *size = (leaf.requires_grad_() for leaf in leaves)
        out = tokenops.merge_tokens(x, call.plan, size=size[0] if size else None, mode=call.mode, backend=backend)
        grads = torch.autograd.grad(out, [x, *size], normal(*out.shape, dtype=dtype, seed=call.seed + 1).to(out.dtype))
        y = normal(*out.shape, dtype=dtype, seed=call.seed + 2).to(out.dtype).requires_grad_()
        back = tokenops.unmerge_tokens(y, call.plan, mode="drop" if call.mode == "drop" else "copy", backend=backend)
        (grad_y,) = torch.autograd.grad(back, y, normal(*back.shape, dtype=dtype, seed=call.seed + 3).to(back.dtype))
        results.append((out.detach(), back.detach(), grad_y, *grads))
    for name, got, want in zip(("out", "back", "grad_y", "grad_x", "grad_size"), *results, strict=False):
        assert_close(name, got, want, torch.float32 if name == "grad_size" and dtype == torch.float32 else dtype)
    return results[0]


@st.composite
def soft_calls(draw: st.DrawFn) -> dict[str, Any]:
    batch, seed, dtype, layout = draw(st.integers(1, 2)), draw(SEEDS), draw(st.sampled_from(DTYPES)), draw(LAYOUTS)
    tokens, metas = draw(st.one_of(st.integers(10, 60), st.sampled_from((150, 300, 520)))), draw(st.sampled_from((5, 17, 64, 70, 130)))
    # where tokens are few for the meta tokens, gradients are differences that cancel: float32's own definition is off by more than the rule
    metas = min(metas, 2 * tokens)
    channels, width = draw(st.sampled_from((3, 24, 64, 150))), draw(st.sampled_from((24, 40, 72, 136)))
    normalize = draw(st.booleans())
    grids = {"x": (tokens, channels, 0), "metric": (tokens, width, draw(EXPONENTS)), "meta": (metas, width, draw(EXPONENTS))}
    call: dict[str, Any] = {
        name: laid_out(unusual(normal(batch, rows, columns, dtype=dtype, seed=seed + at), exponent if normalize else 0), layout)
        for at, (name, (rows, columns, exponent)) in enumerate(grids.items())
    }
    # similarities of long rows are larger where they are products
    call |= {"temperature": torch.tensor(draw(st.sampled_from((0.2, 1.0))) * (1 if normalize else width**0.5)), "normalize": normalize}
    if draw(st.booleans()):
        call["mass"] = uniform(batch, tokens, seed=seed)
    return call


def check_soft(call: dict[str, Any]) -> tuple[Tensor, ...]:
    dtype = call["x"].dtype
    names = [name for name, x in call.items() if isinstance(x, Tensor)]
    results = []
    for run, number in ((functools.partial(_soft, backend="cuda"), None), (soft_merged, torch.float64)):
        leaves = {name: call[name].detach().to(number or call[name].dtype).requires_grad_() for name in names}
        out, mass = run({**call, **leaves})
        grads = torch.autograd.grad(
            (out, mass), list(leaves.values()), [normal(*part.shape, dtype=dtype, seed=5).to(part.dtype) for part in (out, mass)]
        )
        results.append((out.detach(), mass.detach(), *grads))
    for name, got, want in zip(("out", "mass_out", *names), *results, strict=True):
        if name == "temperature":
            # one number, in which what the tokens add cancels: its error is held against what they add
            terms = _of_each_token(call, dtype)
            assert_close(name, terms.index_add(0, torch.tensor([0]), (got - want)[None]), terms, dtype)
            continue
        # gradients of directions are as large as rows are short
        length = call[name].double().norm(dim=-1, keepdim=True) if name in ("metric", "meta") and call["normalize"] else 1.0
        assert_close(name, got.double() * length, want * length, dtype)
    return results[0]


def _of_each_token(call: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The gradient of the temperature as if each token had its own, [B N] float64."""
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}
    temperature = wide["temperature"].expand(*call["x"].shape[:2], 1).clone().requires_grad_()
    results = soft_merged({**wide, "temperature": temperature})
    (grad,) = torch.autograd.grad(results, temperature, [normal(*part.shape, dtype=dtype, seed=5).to(part.dtype) for part in results])
    return grad.flatten()


def _soft(call: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    return tokenops.soft_merge(**call, backend=backend)


RANDOM_CALLS = {
    "pairwise_argmax": RandomCalls(pair_calls(), check_pairs),
    "match_tokens": RandomCalls(match_calls(), check_match),
    "plans": RandomCalls(targets(), check_plan),
    "merge_tokens": RandomCalls(merge_calls(), check_merge),
    "soft_merge": RandomCalls(soft_calls(), check_soft),
}
