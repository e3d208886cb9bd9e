"""What torch asks of the operators that choose, halt and pack: schema, fakes, gradients through the dispatcher, compile, autocast, vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from token_select_oracle import Halting, assert_state_close, halt_as_printed, halting_call, lists, packed_halting, scores
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import tokenops
from tokenops import native
from tokenops.types import HaltState

ops = torch.ops.tokenops


def differentiable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def halt_arguments(call: Halting, output: str = "all", start: bool = False) -> tuple[Any, ...]:
    """Of the operator, up to the backend."""
    x, state, options = call
    bounds = options.get("cu_seqlens")
    fields: tuple[Any, ...] = (None,) * 6 if start else tuple(state)
    if bounds is not None:
        x = x.unsqueeze(0)
        if not start:
            fields = (*(t.unsqueeze(0) for t in fields[:5]), fields[5] if output == "class" else fields[5].unsqueeze(0))
    return (x, *fields, bounds, options["scale"], options["center"], 0.01, False, output == "class")


HALTING = {
    "all": lambda device: halt_arguments(halting_call(device=device)),
    "class": lambda device: halt_arguments(halting_call(device=device, output="class"), "class"),
    "start": lambda device: halt_arguments(halting_call(device=device), start=True),
    "packed": lambda device: halt_arguments(packed_halting(halting_call(device=device), [7, 12], 2)),
    "packed, class": lambda device: halt_arguments(packed_halting(halting_call(device=device, output="class"), [7, 0], 2), "class"),
}


@pytest.fixture(params=HALTING)
def halting(request: pytest.FixtureRequest, device: str) -> tuple[Any, ...]:
    return HALTING[request.param](device)


def test_select_passes_opcheck(backend: str, device: str) -> None:
    score = scores(3, 40).to(device)
    opcheck(ops.select_tokens.default, (score, 7, None, 1, backend))
    opcheck(ops.select_tokens.default, (score.bfloat16(), 50, 0.5, 0, backend))


def test_halt_passes_opcheck(halting: tuple[Any, ...], backend: str) -> None:
    x, cum, remain, active, rho, counter, *rest = halting
    # counts carry no gradient, and to ask for one would be the test's mistake
    x, cum, remain, rho, *rest = differentiable((x, cum, remain, rho, *rest))
    opcheck(ops.halt_tokens.default, (x, cum, remain, active, rho, counter, *rest, backend))


@pytest.mark.parametrize("form", [form for form in HALTING if form != "start"])
def test_halt_in_place_passes_opcheck(form: str, backend: str, device: str) -> None:
    opcheck(ops.halt_tokens_.default, (*HALTING[form](device), backend))


@pytest.mark.parametrize("wanted", [[True, True], [False, True]], ids=["all gradients", "one gradient"])
def test_halt_backward_passes_opcheck(halting: tuple[Any, ...], wanted: list[bool], backend: str) -> None:
    new = HaltState._make(ops.halt_tokens.default(*halting, backend))
    grads = [torch.randn_like(t) for t in (new.cum, new.remain, new.rho, new.out)]
    given = (halting[0], *grads, halting[2], halting[3], new.cum, *halting[7:])
    opcheck(ops.halt_tokens_backward.default, (*given, wanted, backend))
    opcheck(ops.halt_tokens_backward.default, (halting[0], None, None, None, grads[3], *given[5:], wanted, backend))


def packing_arguments(form: str, device: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Of pack_tokens and of unpack_tokens."""
    index: Tensor | None = lists(3, 19, 11).to(device)
    if form == "packed":
        index = torch.where(index >= 0, index + 19 * torch.arange(3, device=device, dtype=torch.int32)[:, None], -1)
    x = torch.randn(1 if form == "packed" else 3, 57 if form == "packed" else 19, 8, device=device)
    count = None
    if form == "count":
        index, count = None, torch.tensor([3, 0, 19], dtype=torch.int32, device=device)
    bounds = ops.pack_tokens.default(x, index, count, 40, None)[1]
    return (x, index, count, 40), (torch.randn(40, 8, device=device), bounds, index, x.shape[1], form == "packed")


@pytest.mark.parametrize("form", ["index", "count", "packed"])
def test_packing_passes_opcheck(form: str, backend: str, device: str) -> None:
    pack, unpack = packing_arguments(form, device)
    opcheck(ops.pack_tokens.default, (*differentiable(pack), backend))
    opcheck(ops.unpack_tokens.default, (*differentiable(unpack), backend))


def test_double_backward_of_halting_is_refused(device: str) -> None:
    call = halting_call(device=device)
    x = call.x.requires_grad_()
    [grad] = torch.autograd.grad(tokenops.halt_tokens(x, call.state, **call.options).out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="halt_tokens cannot be differentiated twice"):
        grad.sum().backward()


FORWARD_MODE: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "halt_tokens": (lambda x: tokenops.halt_tokens(x, scale=1.0, center=0.0).out, (2, 3, 4)),
    "pack_tokens": (lambda x: tokenops.pack_tokens(x, torch.tensor([0, 2])).tokens, (2, 3, 4)),
    "unpack_tokens": (lambda x: tokenops.unpack_tokens(x, torch.tensor([0, 2]), n=3), (2, 4)),
}


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused(name: str) -> None:
    function, shape = FORWARD_MODE[name]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (torch.ones(shape),), (torch.ones(shape),))


def test_selection_has_no_gradient(device: str) -> None:
    score = scores(2, 9).to(device).requires_grad_()
    index, count = tokenops.select_tokens(score, k=3)
    assert not index.requires_grad
    assert not count.requires_grad


# compiled


@pytest.fixture
def compiling() -> Iterator[None]:
    """Inductor has its own ideas of deterministic mode, and a cache that must not answer for an earlier test."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Two layers of a model that halts, keeps its best tokens and packs them."""
    x = x @ weight
    state = tokenops.halt_tokens(x, scale=10.0, center=5.0)
    index = tokenops.select_tokens(x.detach()[..., 1].masked_fill(~state.active, -torch.inf), fraction=0.5, protect=1)
    tokens, bounds = tokenops.pack_tokens(x, index)
    more = tokenops.unpack_tokens(torch.tanh(tokens @ weight), bounds, index, n=x.shape[1])
    alive = tokenops.index_from_mask(state.active, 6)
    state = tokenops.halt_tokens(x + more, state, scale=10.0, center=5.0, last=True)
    return state.out, state.rho, bounds, alive.index


def run_layers(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out, rho, bounds, alive = function(*leaves)
    return out, rho, bounds, alive, *torch.autograd.grad(out.square().sum() + rho.sum(), leaves)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool, device: str) -> None:
    compiled = torch.compile(layers, fullgraph=True, dynamic=dynamic)
    for rows, stance in ((20, "default"), (27, "fail_on_recompile")) if dynamic else ((20, "default"),):
        generator = torch.Generator().manual_seed(rows)
        inputs = tuple(torch.randn(shape, generator=generator).to(device) / 4 for shape in ((2, rows, 16), (16, 16)))
        with torch.compiler.set_stance(stance):
            results = run_layers(compiled, inputs)
        for got, want in zip(results, run_layers(layers, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_in_place_step_compiles(packed: bool, device: str) -> None:
    call = halting_call(device=device)
    if packed:
        call = packed_halting(call, [7, 12], 2)

    def step(x: Tensor, *state: Tensor) -> Tensor:
        new = tokenops.halt_tokens_(x * 1.0, HaltState(*state), **call.options)
        return new.out + 1.0

    states = [[t.clone() for t in call.state] for _ in range(2)]
    with torch.no_grad():
        got, want = torch.compile(step, fullgraph=True, backend="aot_eager")(call.x, *states[0]), step(call.x, *states[1])
    assert torch.equal(got, want)
    for have, expect in zip(*states, strict=True):
        assert torch.equal(have, expect)


# autocast, fake tensors, transforms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, device: str) -> None:
    call = halting_call(device=device)
    want = tokenops.halt_tokens(*call[:2], **call.options)
    index = lists(2, 19, 7).to(device)
    with torch.autocast(device, dtype):
        got = tokenops.halt_tokens(*call[:2], **call.options)
        half = tokenops.halt_tokens(call.x.to(dtype), call.state, **call.options)
        tokens = tokenops.pack_tokens(call.x, index).tokens
        chosen = tokenops.select_tokens(call.state.cum, k=3).index
    for have, expect in zip(got, want, strict=True):
        assert torch.equal(have, expect)
    assert half.out.dtype == half.cum.dtype == torch.float32
    assert torch.equal(tokens, tokenops.pack_tokens(call.x, index).tokens)
    assert torch.equal(chosen, tokenops.select_tokens(call.state.cum, k=3).index)


def test_fake_tensors_need_no_gpu() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 19, 8, device="cuda", dtype=torch.bfloat16)
        state = tokenops.halt_tokens(x, scale=1.0, center=0.0, output="class")
        state = tokenops.halt_tokens(x, state, scale=1.0, center=0.0)
        assert (state.cum.shape, state.cum.dtype, state.active.dtype, state.out.shape) == ((2, 19), torch.float32, torch.bool, (2, 8))
        index, count = tokenops.select_tokens(torch.empty(2, 19, device="cuda"), fraction=0.5)
        assert (index.shape, index.dtype, count.shape, index.device.type) == ((2, 9), torch.int32, (2,), "cuda")
        tokens, bounds = tokenops.pack_tokens(x, index)
        assert (tokens.shape, tokens.dtype, bounds.shape, bounds.dtype) == ((18, 8), torch.bfloat16, (3,), torch.int32)
        assert tokenops.unpack_tokens(tokens, bounds, index, n=19).shape == (2, 19, 8)
        first = tokenops.halt_tokens(tokens, scale=1.0, center=0.0, cu_seqlens=bounds, output="class")
        assert (first.cum.shape, first.out.shape) == ((18,), (2, 8))


def test_meta_tensors_pass_through() -> None:
    call = halting_call(device="meta")
    x = call.x.requires_grad_()
    new = tokenops.halt_tokens(x, call.state, **call.options)
    assert torch.autograd.grad(new.out.sum(), x)[0].shape == x.shape
    assert tokenops.select_tokens(x[..., 0], k=3).index.shape == (2, 3)


def test_vmap_of_select_is_a_loop(device: str) -> None:
    score = scores(4, 3, 20).to(device)
    got = torch.vmap(lambda s: tokenops.select_tokens(s, k=5, protect=1), in_dims=1)(score)
    want = tokenops.select_tokens(score.transpose(0, 1), k=5, protect=1)
    assert torch.equal(got.index, want.index)
    assert torch.equal(got.count, want.count)


@pytest.mark.parametrize("output", ["all", "class"])
def test_vmap_of_halting_is_a_loop(output: str, device: str) -> None:
    calls = [halting_call(output=output, device=device, seed=seed) for seed in range(3)]
    xs = torch.stack([call.x for call in calls], dim=1).requires_grad_()
    states = HaltState._make(torch.stack(parts) for parts in zip(*(call.state for call in calls), strict=True))

    def step(x: Tensor, state: HaltState) -> HaltState:
        return tokenops.halt_tokens(x, state, **calls[0].options)

    got = torch.vmap(step, in_dims=(1, 0))(xs, states)
    for at, call in enumerate(calls):
        want = tokenops.halt_tokens(*call[:2], **call.options)
        assert_state_close(HaltState._make(t[at] for t in got), want, torch.float32)
    [grad] = torch.autograd.grad(got.out.square().sum(), xs)
    for at, call in enumerate(calls):
        x = call.x.requires_grad_()
        want = halt_as_printed(x, call.state, **call.options).out.square().sum()
        torch.testing.assert_close(grad[:, at], torch.autograd.grad(want, x)[0])
    # a state that all calls share
    shared = torch.vmap(lambda x: tokenops.halt_tokens(x, calls[0].state, **calls[0].options), in_dims=1)(xs)
    torch.testing.assert_close(shared.out[0], got.out[0])


def test_vmap_of_packed_halting_is_refused(device: str) -> None:
    call = packed_halting(halting_call(device=device), [4, 5])
    with pytest.raises(NotImplementedError, match="halt_tokens: no vmap over packed rows"):
        torch.vmap(lambda x: tokenops.halt_tokens(x, call.state, **call.options).out)(call.x[None])


def test_a_backend_that_objects_says_why() -> None:
    x = torch.zeros(1, 3, 4)
    with pytest.raises(NotImplementedError, match="cpu: float64 is served by the reference only"):
        tokenops.halt_tokens(x.double(), scale=1.0, center=0.0, backend="cpu")
    with pytest.raises(NotImplementedError, match="cpu: x must have a dense last dimension, got strides"):
        tokenops.halt_tokens(x.mT, scale=1.0, center=0.0, backend="cpu")
    with pytest.raises(NotImplementedError, match="triton: runs on a GPU, got CPU tensors"):
        tokenops.pack_tokens(x, torch.tensor([0]), backend="triton")


def test_the_cpu_kernel_refuses_a_threshold_that_is_no_number() -> None:
    if native.CPU_ABSENT:
        pytest.skip(native.CPU_ABSENT)
    index, count = torch.empty(1, 4, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="threshold must not be NaN"):
        torch.ops.tokenops.token_select_cpu_select(index, count, torch.zeros(1, 9), float("nan"), 0, "")
