"""One step of adaptive computation time, on every backend: against the step as it is printed, and the published code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_close
from token_select_oracle import (
    GRADIENTS,
    Halting,
    assert_state_close,
    halt_as_printed,
    halting_call,
    halting_gradients,
    packed_halting,
    same_bits,
)
from torch import Tensor

import tokenops
from tokenops.reference import token_select as reference
from tokenops.types import HaltProblem, HaltState

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((2, 19, 24), (1, 1, 1), (3, 7, 5), (1, 130, 384), (5, 3, 16), (2, 40, 1001))


def wide(call: Halting) -> Halting:
    state = HaltState._make(t.double() if t.is_floating_point() else t for t in call.state)
    return Halting(call.x.double(), state, call.options)


def first_state(x: Tensor, output: str = "all") -> HaltState:
    zero = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
    out = torch.zeros(x.shape if output == "all" else (x.shape[0], x.shape[2]), dtype=torch.float64, device=x.device)
    return HaltState(zero, zero + 1.0, zero == 0.0, zero, zero + 1.0, out)


def assert_right(call: Halting, backend: str | None) -> HaltState:
    """The new state and every gradient."""
    x, state, options = wide(call)
    got = tokenops.halt_tokens(call.x, call.state, **call.options, backend=backend)
    assert_state_close(got, halt_as_printed(x, state, **options), call.x.dtype)
    assert got.out.is_contiguous()
    want_grads = halting_gradients(wide(call), halt_as_printed)
    got_grads = halting_gradients(call, lambda *given, **more: tokenops.halt_tokens(*given, **more, backend=backend))
    for name in GRADIENTS:
        dtype = call.x.dtype if name == "x" else call.state.cum.dtype
        assert got_grads[name].dtype == dtype
        assert_close(f"gradient of {name}", got_grads[name], want_grads[name], dtype)
    return got


@pytest.mark.parametrize("last", [False, True], ids=["", "last"])
@pytest.mark.parametrize("output", ["all", "class"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_the_printed_one(shape: tuple[int, ...], dtype: torch.dtype, output: str, last: bool, backend: str, device: str) -> None:
    new = assert_right(halting_call(*shape, dtype=dtype, output=output, last=last, device=device), backend)
    if last:
        assert not new.active.any()


def test_other_constants(backend: str, device: str) -> None:
    for options in ({"scale": 3.0, "center": -0.5}, {"scale": -2.0, "center": 1.0}, {"eps": 0.2}, {"scale": 80.0, "center": 40.0}):
        assert_right(halting_call(device=device, **options), backend)


@pytest.mark.parametrize("output", ["all", "class"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_step_needs_no_state(dtype: torch.dtype, output: str, backend: str, device: str) -> None:
    call = halting_call(3, 20, 24, dtype=dtype, device=device, scale=10.0, center=2.0)
    for last in (False, True):
        options = {**call.options, "last": last}
        got = tokenops.halt_tokens(call.x, **options, output=output, backend=backend)
        state = first_state(call.x, output)
        assert_state_close(got, halt_as_printed(call.x.double(), state, **options), dtype)
        x, wide_x = (t.detach().requires_grad_() for t in (call.x, call.x.double()))
        new = tokenops.halt_tokens(x, **options, output=output, backend=backend)
        want = halt_as_printed(wide_x, state, **options)
        loss, want_loss = (s.out.square().sum() + 3.0 * s.cum.sum() - s.remain.square().sum() for s in (new, want))
        assert_close("gradient of x", torch.autograd.grad(loss, x)[0], torch.autograd.grad(want_loss, wide_x)[0], dtype)


@pytest.mark.parametrize("output", ["all", "class"])
def test_over_the_layers_the_weights_of_a_token_sum_to_one(output: str, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    state, layers = None, 6
    for layer in range(layers):
        x = torch.rand(3, 50, 8, generator=generator).to(device)
        x[..., 1] = 1.0
        state = tokenops.halt_tokens(x, state, scale=4.0, center=3.0, last=layer == layers - 1, output=output, backend=backend)
    assert state is not None
    ones = state.out[..., 1]
    torch.testing.assert_close(ones, torch.ones_like(ones))
    # layers taken part in plus the remainder
    torch.testing.assert_close(state.rho, state.counter + state.remain)


@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in place"])
def test_the_published_layers(in_place: bool, backend: str, device: str) -> None:
    golden = torch.load(Path(__file__).parent / "data" / "halting.pt", weights_only=True)
    state = None
    for layer, x in enumerate(golden["block_out"]):
        options = {"scale": golden["scale"], "center": golden["center"], "eps": golden["eps"], "last": layer == 1, "backend": backend}
        before = torch.ones(2, 33, dtype=torch.bool) if state is None else state.active.cpu()
        assert torch.equal(before, golden["active_before"][layer])
        if state is None or not in_place:
            state = tokenops.halt_tokens(x.to(device), state, **options)
        else:
            state = tokenops.halt_tokens_(x.to(device), state, **options)
        assert_close("cum", state.cum, golden["cum"][layer], torch.float32)
        assert torch.equal(state.active.cpu(), golden["active_after"][layer])
    assert state is not None
    assert_close("rho", state.rho, golden["rho"], torch.float32)
    assert torch.equal(state.counter.cpu(), golden["counter"])
    weight, bias = golden["norm_weight"], golden["norm_bias"]
    assert_close("output", torch.nn.functional.layer_norm(state.out.cpu(), (96,), weight, bias, eps=1e-6), golden["output"], torch.float32)


# packed


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("last", [False, True], ids=["", "last"])
@pytest.mark.parametrize("output", ["all", "class"])
@pytest.mark.parametrize("lengths", [[5, 0, 19, 1], [0, 0], [3], [19, 19, 19, 18], [0, 2, 0]], ids=str)
def test_a_packed_step_is_that_of_its_samples(lengths: list[int], output: str, last: bool, padding: int, backend: str, device: str) -> None:
    call = halting_call(len(lengths), 19, 24, output=output, last=last, device=device)
    packed = packed_halting(call, lengths, padding)
    rows = sum(lengths)
    leaves = [t.detach().requires_grad_() for t in (packed.x, packed.state.remain, packed.state.cum)]
    new = tokenops.halt_tokens(
        leaves[0], packed.state._replace(remain=leaves[1], cum=leaves[2]), **packed.options, output=output, backend=backend
    )
    # each sample alone
    want_x = call.x.detach().requires_grad_()
    want_remain, want_cum = (t.detach().requires_grad_() for t in (call.state.remain, call.state.cum))
    padded = halt_as_printed(want_x, call.state._replace(remain=want_remain, cum=want_cum), **call.options)
    inside = torch.arange(19, device=device) < torch.tensor(lengths, device=device)[:, None]
    for name in ("cum", "remain", "rho", "counter"):
        assert_close(name, getattr(new, name)[:rows], getattr(padded, name)[inside], torch.float32)
        assert torch.equal(getattr(new, name)[rows:], getattr(packed.state, name)[rows:])
    assert torch.equal(new.active[:rows], padded.active[inside])
    assert not new.active[rows:].any()
    if output == "all":
        want_out = torch.cat([padded.out[inside], packed.state.out[rows:]])
    else:
        some = torch.tensor(lengths, device=device)[:, None] > 0
        want_out = torch.where(some, padded.out, call.state.out)
    assert_close("out", new.out, want_out, torch.float32)
    loss = new.out.square().sum() + (new.rho[:rows].square() - new.remain[:rows] + new.cum[:rows] * 2.0).sum()
    want_loss = want_out.square().sum() + (padded.rho[inside].square() - padded.remain[inside] + padded.cum[inside] * 2.0).sum()
    grads = torch.autograd.grad(loss, leaves)
    wants = torch.autograd.grad(want_loss, (want_x, want_remain, want_cum), materialize_grads=True, allow_unused=True)
    for name, got, want in zip(("x", "remain", "cum"), grads, wants, strict=True):
        assert_close(f"gradient of {name}", got[:rows], want[inside], torch.float32)
        assert (got[rows:] == 0.0).all()


@pytest.mark.parametrize("output", ["all", "class"])
def test_a_packed_start(output: str, backend: str, device: str) -> None:
    x = torch.rand(12, 8, device=device)
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int64, device=device)
    new = tokenops.halt_tokens(x, scale=10.0, center=5.0, cu_seqlens=bounds, output=output, backend=backend)
    h = torch.sigmoid(10.0 * x[:, 0] - 5.0)
    assert_close("cum", new.cum, torch.cat([h[:9], torch.zeros(3, device=device)]), torch.float32)
    assert new.active.tolist() == [bool(c < 0.99) for c in new.cum[:9]] + [False] * 3
    assert new.remain[9:].tolist() == [1.0] * 3
    weight = torch.where(new.active, h, torch.where(torch.arange(12, device=device) < 9, 1.0, 0.0))
    if output == "all":
        assert_close("out", new.out, x * weight[:, None], torch.float32)
    else:
        want = torch.stack([x[0] * weight[0], torch.zeros(8, device=device), x[4] * weight[4]])
        assert_close("out", new.out, want, torch.float32)


def test_with_as_many_rows_as_samples_output_says_what_out_holds(backend: str, device: str) -> None:
    x = torch.rand(2, 8, device=device)
    bounds = torch.tensor([0, 0, 2], dtype=torch.int32, device=device)
    options: dict[str, Any] = {"scale": 1.0, "center": 0.0, "cu_seqlens": bounds, "backend": backend}
    every, first = (tokenops.halt_tokens(x, output=output, **options) for output in ("all", "class"))
    assert every.out.shape == first.out.shape == (2, 8)
    every, first = tokenops.halt_tokens(x, every, output="all", **options), tokenops.halt_tokens_(x, first, output="class", **options)
    assert (every.out != 0.0).all()
    assert (first.out[0] == 0.0).all()
    assert torch.equal(first.out[1], every.out[0])


# in place, layouts, edges


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("output", ["all", "class"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_the_same_step(dtype: torch.dtype, output: str, packed: bool, backend: str, device: str) -> None:
    call = halting_call(3, 19, 40, dtype=dtype, output=output, device=device)
    if packed:
        call = packed_halting(call, [4, 0, 11], 3)
    want = tokenops.halt_tokens(call.x, call.state, **call.options, backend=backend)
    state = HaltState._make(t.clone() for t in call.state)
    got = tokenops.halt_tokens_(call.x, state, **call.options, backend=backend)
    assert got is state
    for have, expect in zip(state, want, strict=True):
        assert torch.equal(have, expect)


def test_what_stands_in_halted_rows_reaches_nothing(backend: str, device: str) -> None:
    call = halting_call(2, 30, 24, device=device)
    halted = ~call.state.active
    assert halted.any()
    x = call.x.clone()
    x[halted] = torch.nan
    x[halted, 0] = 0.5
    clean = torch.where(halted[..., None], 0.5, x)
    got, want = (tokenops.halt_tokens(t, call.state, **call.options, backend=backend) for t in (x, clean))
    for have, expect in zip(got, want, strict=True):
        assert torch.equal(have, expect)
    state = HaltState._make(t.clone() for t in call.state)
    tokenops.halt_tokens_(x, state, **call.options, backend=backend)
    assert torch.equal(state.out, want.out)
    leaf = x.clone().requires_grad_()
    tokenops.halt_tokens(leaf, call.state, **call.options, backend=backend).out.square().sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad[halted] == 0.0).all()
    assert leaf.grad.isfinite().all()


def test_a_nan_score_halts_its_token_without_output(backend: str, device: str) -> None:
    call = halting_call(1, 9, 8, device=device)
    call.x[0, 4, 0] = torch.nan
    new = tokenops.halt_tokens(call.x, call.state, **call.options, backend=backend)
    assert not new.active[0, 4]
    assert torch.equal(new.out[0, 4], call.state.out[0, 4])
    assert new.out.isfinite().all()


def test_a_score_at_the_bound_is_neither_reached_nor_going(backend: str, device: str) -> None:
    # 1 - eps as float32 holds it
    x = torch.full((1, 2, 4), -1e4, device=device)
    state = HaltState._make(t.float() if t.is_floating_point() else t for t in first_state(x))
    bound = torch.tensor(1.0 - 0.01, dtype=torch.float32).item()
    state.cum[0] = torch.tensor([bound, torch.nextafter(torch.tensor(bound), torch.tensor(0.0)).item()])
    new = tokenops.halt_tokens(x, state, scale=1.0, center=0.0, backend=backend)
    assert new.cum.tolist() == state.cum.tolist()
    assert new.active.tolist() == [[False, True]]
    assert new.counter.tolist() == [[1.0, 2.0]]
    assert new.rho.tolist() == [[1.0, 1.0]]
    assert (new.out[0, 0] == 0.0).all()
    assert new.out.abs().max() < 1e-30


def test_any_layout(backend: str, device: str) -> None:
    call = halting_call(2, 19, 24, device=device)
    want = tokenops.halt_tokens(*call[:2], **call.options, backend=backend)
    forms = {
        "tokens first": call.x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": torch.nn.functional.pad(call.x, (3, 5))[..., 3:27],
        "every other row": call.x.repeat_interleave(2, dim=1)[:, ::2],
    }
    for x in forms.values():
        for have, expect in zip(tokenops.halt_tokens(x, call.state, **call.options, backend=backend), want, strict=True):
            assert torch.equal(have, expect)
        leaf = x.detach().requires_grad_()
        tokenops.halt_tokens(leaf, call.state, **call.options, backend=backend).out.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.stride() == torch.empty_like(x).stride()
    strided = call.state._replace(
        cum=torch.stack([call.state.cum] * 2, dim=-1)[..., 0],
        active=call.state.active.T.contiguous().T,
        out=torch.nn.functional.pad(call.state.out, (0, 8))[..., :24],
    )
    for have, expect in zip(tokenops.halt_tokens(call.x, strided, **call.options, backend=backend), want, strict=True):
        assert torch.equal(have, expect)
    tokenops.halt_tokens_(call.x, strided, **call.options, backend=backend)
    for have, expect in zip(strided, want, strict=True):
        assert torch.equal(have, expect)


def test_columns_are_served(device: str) -> None:
    call = halting_call(2, 9, 8, device=device)
    want = halt_as_printed(*call[:2], **call.options)
    assert_state_close(tokenops.halt_tokens(call.x.mT.contiguous().mT, call.state, **call.options), want, torch.float32)
    columns = call.state._replace(out=call.state.out.mT.contiguous().mT)
    assert_state_close(tokenops.halt_tokens(call.x, columns, **call.options), want, torch.float32)
    assert_state_close(tokenops.halt_tokens_(call.x, columns, **call.options), want, torch.float32)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 0, 8)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str, device: str) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    new = tokenops.halt_tokens(x, scale=1.0, center=0.0, backend=backend)
    new = tokenops.halt_tokens(x, new, scale=1.0, center=0.0, backend=backend)
    assert new.out.shape == shape
    new.out.sum().backward()


@pytest.mark.parametrize("rows", [0, 5])
def test_samples_without_rows(rows: int, backend: str, device: str) -> None:
    x = torch.ones(rows, 8, device=device)
    options: dict[str, Any] = {
        "scale": 1.0,
        "center": 0.0,
        "cu_seqlens": torch.zeros(4, dtype=torch.int32, device=device),
        "backend": backend,
    }
    new = tokenops.halt_tokens(x, output="class", **options)
    assert torch.equal(new.out, torch.zeros(3, 8, device=device))
    new = tokenops.halt_tokens(x, new._replace(out=new.out + 7.0), output="class", **options)
    assert torch.equal(new.out, torch.full((3, 8), 7.0, device=device))
    assert not new.active.any()


@pytest.mark.parametrize("output", ["all", "class"])
def test_bits_depend_neither_on_the_run_nor_on_threads(output: str, backend: str, device: str) -> None:
    call = halting_call(3, 700, 96, output=output, device=device)

    def run() -> tuple[Tensor, ...]:
        new = tokenops.halt_tokens(*call[:2], **call.options, backend=backend)
        grads = halting_gradients(call, lambda *given, **more: tokenops.halt_tokens(*given, **more, backend=backend))
        return (*new, *grads.values())

    same_bits(run, (1, 1, 2, 4, 3))


def test_large_states_are_streamed_to_the_same_values(backend: str, device: str) -> None:
    # an output beyond the caches
    call = halting_call(1, 1500, 1000, device=device)
    want = halt_as_printed(*call[:2], **call.options)
    assert_state_close(tokenops.halt_tokens(*call[:2], **call.options, backend=backend), want, torch.float32)


def test_a_gradient_does_not_depend_on_which_others_are_wanted(backend: str, device: str) -> None:
    call = halting_call(device=device)

    def step(*given: Any, **options: Any) -> HaltState:
        return tokenops.halt_tokens(*given, **options, backend=backend)

    every = halting_gradients(call, step)
    for name in GRADIENTS:
        assert torch.equal(halting_gradients(call, step, (name,))[name], every[name])


# the reference itself


@pytest.mark.parametrize("last", [False, True], ids=["", "last"])
@pytest.mark.parametrize("output", ["all", "class"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradcheck_of_the_definition(packed: bool, output: str, last: bool) -> None:
    call = halting_call(2, 6, 3, output=output, dtype=torch.float64, last=last)
    if packed:
        call = packed_halting(call, [4, 2], 1)
    bounds = call.options.get("cu_seqlens")

    def step(x: Tensor, cum: Tensor, remain: Tensor, rho: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        state = HaltState(cum, remain, call.state.active, rho, call.state.counter, out)
        grid = x
        if bounds is not None:
            grid = x.unsqueeze(0)
            state = HaltState._make((*(t.unsqueeze(0) for t in state[:5]), out if output == "class" else out.unsqueeze(0)))
        new = reference.halting(HaltProblem(grid, state, bounds, 10.0, 5.0, 0.99, last, output == "class"))
        return tuple(getattr(new, name) for name in GRADIENTS[1:])

    leaves = [t.detach().requires_grad_() for t in (call.x, *(getattr(call.state, name) for name in GRADIENTS[1:]))]
    assert torch.autograd.gradcheck(step, leaves)

    def served(*given: Tensor) -> tuple[Tensor, ...]:
        x, cum, remain, rho, out = given
        new = tokenops.halt_tokens(
            x, HaltState(cum, remain, call.state.active, rho, call.state.counter, out), **call.options, output=output
        )
        return tuple(getattr(new, name) for name in GRADIENTS[1:])

    assert torch.autograd.gradcheck(served, leaves)


# errors


def state_of(**changes: Any) -> HaltState:
    return halting_call(2, 3, 4).state._replace(**changes)


X = torch.zeros(2, 3, 4)
BOUNDS = torch.tensor([0, 2, 3], dtype=torch.int32)
ERRORS = {
    "no tensor": ([1.0], {}, TypeError, "x must be a Tensor, got list"),
    "integers": (X.int(), {}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
    "rank": (X[0], {}, ValueError, r"x must be \[B, N, C\], got \[3, 4\]"),
    "rank of packed rows": (X, {"cu_seqlens": BOUNDS}, ValueError, r"x must be \[T, C\] with cu_seqlens, got \[2, 3, 4\]"),
    "no channel": (X[..., :0], {}, ValueError, "x must have at least one channel, the halting score"),
    "no class token": (X[:, :0], {"output": "class"}, ValueError, "x must have a first token, the class token"),
    "learned scale": (X, {"scale": torch.tensor(1.0)}, TypeError, "scale must be a number, for which there is no gradient, got a Tensor"),
    "plain tuple": (X, {"state": tuple(state_of())}, TypeError, "state must be a HaltState, got tuple"),
    "eps": (X, {"eps": 1.0}, ValueError, r"eps must be in \[0, 1\), got 1.0"),
    "output": (X, {"output": "first"}, ValueError, "output must be 'all' or 'class', got 'first'"),
    "float bounds": (X[0], {"cu_seqlens": BOUNDS.float()}, TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    "bounds elsewhere": (X[0], {"cu_seqlens": BOUNDS.to("meta")}, ValueError, "cu_seqlens must be on x's device cpu, got meta"),
    "state of another length": (
        X,
        {"state": state_of(rho=torch.zeros(2, 4))},
        ValueError,
        r"state.rho must be \[2, 3\] as x, got \[2, 4\]",
    ),
    "state of another dtype": (
        X,
        {"state": state_of(cum=torch.zeros(2, 3).half())},
        TypeError,
        "state.cum must be torch.float32 .*got torch.float16",
    ),
    "float mask": (X, {"state": state_of(active=torch.ones(2, 3))}, TypeError, "state.active must be torch.bool .*, got torch.float32"),
    "narrow state": (
        X.double(),
        {"state": state_of()},
        TypeError,
        "state.cum must be torch.float64 with torch.float64 x, got torch.float32",
    ),
    "output of another shape": (
        X,
        {"state": state_of(out=torch.zeros(2, 5))},
        ValueError,
        r"state.out must be \[2, 3, 4\] \(all tokens\) or \[2, 4\] \(class tokens\), got \[2, 5\]",
    ),
    "state elsewhere": (
        X,
        {"state": state_of(out=torch.zeros(2, 4, device="meta"))},
        ValueError,
        "state.out must be on x's device cpu, got meta",
    ),
    "unknown backend": (X, {"backend": "act"}, ValueError, "backend must be one of .*, got 'act'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name: str) -> None:
    x, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        tokenops.halt_tokens(x, **{"scale": 1.0, "center": 0.0, **options})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 2], "cu_seqlens must start at 0, got 1"),
        ([0, 3, 2], "cu_seqlens must not decrease, got 2 after 3 at position 2"),
        ([0, 5], "cu_seqlens must end at or before the 4 rows it delimits, got 5"),
    ],
)
def test_bad_bounds(bounds: list[int], message: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENOPS_CHECK", "1")
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    for output in ("all", "class"):
        with pytest.raises(ValueError, match=message):
            tokenops.halt_tokens(
                torch.zeros(4, 8, device=device), scale=1.0, center=0.0, cu_seqlens=cu_seqlens, output=output, backend=backend
            )


IN_PLACE = {
    "no state": (lambda x, state: None, TypeError, r"state must be a HaltState: halt_tokens\(x\) starts one"),
    "gradient": (
        lambda x, state: state._replace(out=state.out.requires_grad_()),
        RuntimeError,
        "state.out is written in place .*use halt_tokens",
    ),
    "expanded": (lambda x, state: state._replace(cum=state.cum[:1].expand(2, -1)), ValueError, "state.cum must not be expanded"),
    "over x": (lambda x, state: state._replace(out=x), ValueError, "state.out must not share memory with x"),
    "over itself": (lambda x, state: state._replace(rho=state.cum), ValueError, "state.rho must not share memory with state.cum"),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_errors(name: str) -> None:
    change, error, message = IN_PLACE[name]
    x, state, options = halting_call(2, 3, 4)
    with pytest.raises(error, match=message):
        tokenops.halt_tokens_(x, change(x, state), **options)
