"""Layers on listed rows and buffers, on every backend: against loops over rows, forward and backward."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from delta_matmul_oracle import DTYPES, assert_gradients, lists, normal
from oracle import assert_close
from torch import Tensor
from torch.library import opcheck

import tokenops
from tokenops.reference import delta_matmul as reference
from tokenops.types import LinearProblem, TokenIndex

ops = torch.ops.tokenops
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")


def call_of(
    batch: int, rows: int, slots: int, width: int, out: int, hidden: int | None = None, *, dtype: torch.dtype = torch.float32, device: str
) -> dict[str, Any]:
    """x, index, norm and one layer or two, as a flat dictionary."""
    call: dict[str, Any] = {
        "x": normal(batch, rows, width, dtype=dtype, device=device),
        "index": lists(batch, rows, slots, device=device),
        "norm_weight": 1.0 + 0.3 * normal(width, device=device, seed=1),
        "norm_bias": 0.3 * normal(width, device=device, seed=2),
    }
    widths = [width, *([] if hidden is None else [hidden]), out]
    for at, (inner, outer) in enumerate(pairwise(widths)):
        call[f"weight_{at + 1}"] = normal(outer, inner, dtype=dtype, device=device, seed=3 + at) / inner**0.5
        call[f"bias_{at + 1}"] = normal(outer, dtype=dtype, device=device, seed=5 + at)
    return call


def as_called(activation: str | None, norm: bool, backend: str | None) -> Any:
    def run(x: Tensor, index: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight_1: Tensor, bias_1: Tensor, **second: Tensor) -> Tensor:
        options = {
            "index": index,
            "activation": activation,
            "norm": (norm_weight, norm_bias) if norm else None,
            "norm_eps": 1e-5,
            "backend": backend,
        }
        if second:
            return tokenops.gathered_mlp(x, weight_1, bias_1, second["weight_2"], second["bias_2"], **options)
        return tokenops.gathered_linear(x, weight_1, bias_1, **options)

    return run


def as_loop(activation: str | None, norm: bool) -> Any:
    """Row after row."""
    act = {
        None: lambda h: h,
        "gelu": F.gelu,
        "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
    }[activation]

    def run(x: Tensor, index: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight_1: Tensor, bias_1: Tensor, **second: Tensor) -> Tensor:
        samples = []
        for sample, ids in zip(x, index.tolist(), strict=True):
            rows = []
            for at in ids:
                row = sample[max(at, 0)]
                if norm:
                    row = F.layer_norm(row, row.shape, norm_weight, norm_bias, 1e-5)
                y = act(weight_1 @ row + bias_1)
                if second:
                    y = second["weight_2"] @ y + second["bias_2"]
                rows.append(torch.zeros_like(y) if at < 0 else y)
            samples.append(torch.stack(rows))
        return torch.stack(samples)

    return run


@pytest.mark.parametrize("hidden", [None, 9], ids=["linear", "mlp"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_loop(dtype: torch.dtype, activation: str | None, norm: bool, hidden: int | None, backend: str, device: str) -> None:
    call = call_of(2, 11, 6, 8, 5, hidden, dtype=dtype, device=device)
    wanted = [name for name in call if name != "index"]
    assert_gradients(as_called(activation, norm, backend), as_loop(activation, norm), call, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_definition_passes_gradcheck(activation: str | None) -> None:
    call = call_of(2, 5, 3, 4, 3, 4, device="cpu")
    # away from the corner of relu, where there is no derivative to check
    names = ("x", "weight_1", "bias_1", "norm_weight", "norm_bias", "weight_2", "bias_2")
    leaves = [call[name].double().requires_grad_() for name in names]

    def run(x: Tensor, w1: Tensor, b1: Tensor, nw: Tensor, nb: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return reference.projected(LinearProblem(x, call["index"], w1, b1, nw, nb, 1e-5, activation or "none", w2, b2))

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("shape", [(0, 4, 2), (2, 0, 3), (2, 4, 0), (1, 1, 1)], ids=str)
def test_sizes_of_nothing(shape: tuple[int, int, int], backend: str, device: str) -> None:
    batch, rows, slots = shape
    x = torch.ones(batch, rows, 3, device=device, requires_grad=True)
    weight = torch.ones(2, 3, device=device, requires_grad=True)
    index = torch.full((batch, slots), -1, dtype=torch.int32, device=device)
    y = tokenops.gathered_linear(x, weight, index=index, backend=backend)
    assert y.shape == (batch, slots, 2)
    assert (y == 0).all()
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad == 0).all()
    assert (weight.grad == 0).all()


def test_an_empty_slot_takes_no_part(backend: str, device: str) -> None:
    """Not even where the bias alone would give something, and whatever gradient arrives there."""
    call = call_of(1, 5, 3, 4, 2, device=device)
    x, bias = call["x"], call["bias_1"].requires_grad_()
    y = tokenops.gathered_linear(x, call["weight_1"], bias, index=torch.tensor([[4, -1, 0]], device=device), backend=backend)
    assert (y[0, 1] == 0).all()
    y.backward(torch.full_like(y, 1.0).index_fill(1, torch.tensor([1], device=device), torch.nan))
    assert bias.grad is not None
    assert (bias.grad == 2).all()


def test_every_kind_of_list(backend: str, device: str) -> None:
    x, weight = normal(2, 6, 4, device=device), normal(3, 4, device=device, seed=1)
    index = torch.tensor([5, 2, -1], dtype=torch.int32, device=device)
    want = tokenops.gathered_linear(x, weight, index=index.expand(2, -1), backend=backend)
    for form in (index, index.long(), TokenIndex(index, torch.tensor(2)), index.unsqueeze(0)):
        assert torch.equal(tokenops.gathered_linear(x, weight, index=form, backend=backend), want)


def test_any_layout(backend: str, device: str) -> None:
    weight = normal(3, 8, device=device, seed=1)
    index = lists(2, 6, 4, device=device)
    grid = normal(6, 2, 16, device=device)
    for x in (grid.transpose(0, 1)[..., :8], grid.transpose(0, 1)[..., ::2], grid[:, :1, :8].transpose(0, 1).expand(2, -1, -1)):
        for w in (weight, weight.T.contiguous().T):
            want = tokenops.gathered_linear(x.contiguous(), weight, index=index, backend=backend)
            assert torch.equal(tokenops.gathered_linear(x, w, index=index, backend=backend), want)


@pytest.mark.parametrize("hidden", [None, 9], ids=["linear", "mlp"])
def test_out_receives_the_listed_rows_only(hidden: int | None, backend: str, device: str) -> None:
    call = call_of(2, 11, 6, 8, 5, hidden, device=device)
    run = as_called("gelu", True, backend)
    compact, index = run(**call), call["index"].long()
    before = normal(2, 11, 5, device=device, seed=9)
    layers = [call[name] for name in ("weight_1", "bias_1", "weight_2", "bias_2") if name in call]
    function = tokenops.gathered_linear if hidden is None else tokenops.gathered_mlp
    norm = (call["norm_weight"], call["norm_bias"])
    with torch.no_grad():
        out = before.clone()
        given = function(call["x"], *layers, index=index, out=out, activation="gelu", norm=norm, norm_eps=1e-5, backend=backend)
    assert given is out
    for sample in range(2):
        for slot, at in enumerate(index[sample].tolist()):
            if at >= 0:
                assert_close("row", out[sample, at], compact[sample, slot], torch.float32)
        others = [at for at in range(11) if at not in index[sample].tolist()]
        assert torch.equal(out[sample, others], before[sample, others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_go_at_once(dtype: torch.dtype, backend: str, device: str) -> None:
    """Of two samples with lists of their own, through both layers; widths that no vector divides."""
    call = call_of(2, 500, 450, 19, 21, 33, dtype=dtype, device=device)
    leaves = {name: call[name] for name in call}
    want = as_loop("gelu", True)(**{name: x.double().cpu() if x.is_floating_point() else x.cpu() for name, x in leaves.items()})
    assert_close("y", as_called("gelu", True, backend)(**call), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(40, 1301, 30), (100, 16, 600), (3, 770, 517)], ids=str)
def test_long_rows_and_many_outputs(sizes: tuple[int, int, int], dtype: torch.dtype, backend: str, device: str) -> None:
    slots, width, outputs = sizes
    call = call_of(1, 120, slots, width, outputs, dtype=dtype, device=device)
    want = as_loop("silu", False)(**{name: x.double().cpu() if x.is_floating_point() else x.cpu() for name, x in call.items()})
    assert_close("y", as_called("silu", False, backend)(**call), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_fewer_large_tiles_than_processors(dtype: torch.dtype, backend: str, device: str) -> None:
    """Then GPU kernels take large ones: a GPU has some 150 processors, the emulated one has four."""
    size = 136 if device == "cpu" else 1704
    call = call_of(1, size, size, size, size, dtype=dtype, device=device)

    def by_torch(x: Tensor, index: Tensor, weight_1: Tensor, bias_1: Tensor, **_: Tensor) -> Tensor:
        rows = F.linear(x[0, index[0].clamp(min=0).long()], weight_1, bias_1)
        return rows.masked_fill(index[0, :, None] < 0, 0.0)[None]

    assert_gradients(as_called(None, False, backend), by_torch, call, ["x", "weight_1", "bias_1"])


@pytest.mark.parametrize("hidden", [None, 70], ids=["linear", "mlp"])
def test_the_same_bits_for_any_number_of_threads(hidden: int | None, backend: str, device: str) -> None:
    """Forward. The backward pass leaves its products to torch, whose bits may depend on threads, and the definition all of them."""
    if backend == "reference":
        pytest.skip("leaves its products to torch")
    call = call_of(2, 150, 130, 40, 100, hidden, device=device)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(as_called("gelu", True, backend)(**call))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_weights_of_any_layout(backend: str, device: str) -> None:
    """Also such whose pairs of half numbers do not lie on their own boundaries, or rows in one place."""
    for dtype in DTYPES:
        x, index = normal(1, 9, 12, dtype=dtype, device=device), lists(1, 9, 6, device=device)
        flat = normal(400, dtype=dtype, device=device, seed=1)
        for weight in (flat[1:241].view(20, 12), flat[:260].view(20, 13)[:, :12], flat[3:16][:12].expand(20, 12)):
            want = tokenops.gathered_linear(x, weight.contiguous(), index=index, backend=backend)
            assert_close("y", tokenops.gathered_linear(x, weight, index=index, backend=backend), want.double(), dtype)


def test_out_of_any_layout(backend: str, device: str) -> None:
    x, weight, index = normal(2, 6, 4, device=device), normal(5, 4, device=device, seed=1), lists(2, 6, 4, device=device)
    want = tokenops.gathered_linear(x, weight, index=index, out=torch.ones(2, 6, 5, device=device), backend=backend)
    grid = torch.ones(6, 2, 9, device=device)
    tokenops.gathered_linear(x, weight, index=index, out=grid.transpose(0, 1)[..., 2:7], backend=backend)
    assert torch.equal(grid.transpose(0, 1)[..., 2:7], want)
    assert (grid[..., :2] == 1).all()
    assert (grid[..., 7:] == 1).all()
    columns = torch.ones(2, 5, 6, device=device).transpose(1, 2)
    if backend == "reference":
        tokenops.gathered_linear(x, weight, index=index, out=columns, backend=backend)
        assert torch.equal(columns, want)
    else:
        with pytest.raises(NotImplementedError, match="out must have a dense last dimension"):
            tokenops.gathered_linear(x, weight, index=index, out=columns, backend=backend)


CONTENTS = {
    "an id of another grid": ([[0, 6], [0, 1]], r"ids in \[0, 6\)"),
    "a negative id": ([[0, -2], [0, 1]], r"ids in \[0, 6\)"),
    "an id twice": ([[0, -1, 1], [3, -1, 3]], "index must not repeat an id"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_bad_lists_are_found_before_anything_is_written(name: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU if asked to look."""
    monkeypatch.setenv("TOKENOPS_CHECK", "1")
    ids, message = CONTENTS[name]
    index = torch.tensor(ids, device=device)
    x, weight, out = normal(2, 6, 4, device=device), normal(4, 4, device=device, seed=1), torch.ones(2, 6, 4, device=device)
    rows = normal(2, index.shape[1], 4, device=device, seed=2)
    for call in (
        lambda: tokenops.gathered_linear(x, weight, index=index, out=out, backend=backend),
        lambda: tokenops.gathered_mlp(x, weight, None, weight, index=index, out=out, backend=backend),
        lambda: tokenops.update_tokens_(out, rows, index=index, backend=backend),
        lambda: tokenops.update_tokens(out, rows, index=index, backend=backend),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert (out == 1).all()


def test_out_has_no_gradient(device: str) -> None:
    x, weight, out = torch.ones(1, 4, 3), torch.ones(2, 3, requires_grad=True), torch.zeros(1, 4, 2)
    with pytest.raises(RuntimeError, match=r"out is written in place and has no gradient: .*use tokenops.update_tokens"):
        tokenops.gathered_linear(x, weight, index=torch.tensor([0]), out=out)
    with torch.no_grad(), pytest.raises(ValueError, match="out must not share memory with x"):
        tokenops.gathered_linear(x, torch.ones(3, 3), index=torch.tensor([0]), out=x)


def test_autocast_casts_the_product(backend: str, device: str) -> None:
    call = call_of(2, 6, 3, 8, 5, device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        y = as_called("gelu", True, backend)(**call)
    assert y.dtype == torch.bfloat16
    assert_close("y", y, as_loop("gelu", True)(**call), torch.bfloat16)


# buffers


def updated_loop(buffer: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    samples = []
    for sample, new, ids in zip(buffer, rows, index.tolist(), strict=True):
        parts = list(sample)
        for slot, at in enumerate(ids):
            if at >= 0:
                parts[at] = new[slot]
        samples.append(torch.stack(parts))
    return torch.stack(samples)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_buffer_is_updated(dtype: torch.dtype, backend: str, device: str) -> None:
    index = lists(3, 9, 5, device=device)
    call = {"buffer": normal(3, 9, 4, dtype=dtype, device=device), "rows": normal(3, 5, 4, dtype=dtype, device=device, seed=1)}
    # what stands in an empty slot is not read
    call["rows"] = call["rows"].masked_fill((index < 0).unsqueeze(-1), torch.nan)
    run = lambda **given: tokenops.update_tokens(**given, index=index, backend=backend)  # noqa: E731
    assert_gradients(run, lambda **given: updated_loop(**given, index=index), call, ["buffer", "rows"])
    want, buffer = run(**call), call["buffer"].clone()
    assert tokenops.update_tokens_(buffer, call["rows"], index=index, backend=backend) is buffer
    assert torch.equal(buffer, want)


def test_buffers_of_any_layout(backend: str, device: str) -> None:
    index, rows = lists(2, 9, 5, device=device), normal(5, 2, 8, device=device, seed=1).transpose(0, 1)[..., ::2]
    grid = normal(9, 2, 7, device=device)
    buffer = grid.transpose(0, 1)[..., 1:5]
    want = updated_loop(buffer.clone(), rows, index)
    assert torch.equal(tokenops.update_tokens(buffer, rows, index=index, backend=backend), want)
    before = grid.clone()
    tokenops.update_tokens_(buffer, rows, index=index, backend=backend)
    assert torch.equal(buffer, want)
    assert torch.equal(grid[..., 5:], before[..., 5:])
    # any element type: rows are moved, not computed
    assert torch.equal(
        tokenops.update_tokens(want.double(), rows.double(), index=index[0]), updated_loop(want, rows, index[:1].expand(2, -1))
    )


def test_a_buffer_beyond_the_caches(backend: str, device: str) -> None:
    buffer, rows = normal(1, 1100, 1001, device=device), normal(1, 40, 1001, device=device, seed=1)
    index = lists(1, 1100, 40, device=device)
    assert torch.equal(tokenops.update_tokens(buffer, rows, index=index, backend=backend), updated_loop(buffer, rows, index))


def test_frames_in_a_row_carry_gradients(backend: str, device: str) -> None:
    """Only what is still there at the end has one."""
    first, second = torch.ones(1, 2, 3, device=device, requires_grad=True), torch.ones(1, 1, 3, device=device, requires_grad=True)
    buffer = tokenops.update_tokens(torch.zeros(1, 4, 3, device=device), first, index=torch.tensor([0, 1], device=device), backend=backend)
    buffer = tokenops.update_tokens(buffer, second, index=torch.tensor([1], device=device), backend=backend)
    buffer.sum().backward()
    assert first.grad is not None
    assert first.grad[0, :, 0].tolist() == [1.0, 0.0]
    assert (second.grad == 1).all()


# the operators


def operator_arguments(device: str, hidden: int | None) -> tuple[Any, ...]:
    c = call_of(2, 7, 4, 8, 5, hidden, device=device)
    leaves = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in c.items()}
    return (
        *(leaves[name] for name in ("x", "index", "weight_1", "bias_1", "norm_weight", "norm_bias")),
        1e-6,
        "gelu",
        leaves.get("weight_2"),
        leaves.get("bias_2"),
    )


@pytest.mark.parametrize("hidden", [None, 6], ids=["linear", "mlp"])
def test_linear_passes_opcheck(hidden: int | None, backend: str, device: str) -> None:
    arguments = operator_arguments(device, hidden)
    opcheck(ops.gathered_linear.default, (*arguments, backend))
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    opcheck(ops.gathered_linear_.default, (normal(2, 7, 5, device=device), *plain, backend))
    wanted = [True, False, True, True, False, hidden is not None, False]
    opcheck(ops.gathered_linear_backward.default, (normal(2, 4, 5, device=device), *plain, wanted, backend))


def test_update_passes_opcheck(backend: str, device: str) -> None:
    buffer, rows, index = normal(2, 7, 3, device=device), normal(2, 4, 3, device=device), lists(2, 7, 4, device=device)
    opcheck(ops.update_tokens.default, (buffer.clone().requires_grad_(), rows.clone().requires_grad_(), index, backend))
    opcheck(ops.update_tokens_.default, (buffer, rows, index, backend))
    opcheck(ops.update_tokens_backward.default, (buffer, index, [True, False], backend))


@pytest.mark.parametrize("name", ["gathered_linear", "update_tokens"])
def test_double_backward_and_forward_mode_are_refused(name: str, device: str) -> None:
    index = torch.tensor([0, 2], device=device)
    function = {
        "gathered_linear": lambda x: tokenops.gathered_linear(x, torch.ones(4, 4, device=device), index=index, activation="gelu"),
        "update_tokens": lambda x: tokenops.update_tokens(x, x[:, :2], index=index),
    }[name]
    x = normal(1, 3, 4, device=device).requires_grad_()
    [grad] = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} cannot be differentiated twice"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (x.detach(),), (x.detach(),))


X, W = torch.ones(2, 4, 3), torch.ones(5, 3)
ERRORS = {
    "x rank": (lambda: tokenops.gathered_linear(X[0], W, index=torch.tensor([0])), ValueError, r"x must be \[B, N, C\], got \[4, 3\]"),
    "weight width": (lambda: tokenops.gathered_linear(X, W.T, index=torch.tensor([0])), ValueError, r"weight must be \[O, C\] = \[3, 3\]"),
    "weight dtype": (lambda: tokenops.gathered_linear(X, W.half(), index=torch.tensor([0])), TypeError, "weight must have x's dtype"),
    "bias": (lambda: tokenops.gathered_linear(X, W, W[:, 0][:3], index=torch.tensor([0])), ValueError, r"bias must be \[O\] = \[5\]"),
    "activation": (
        lambda: tokenops.gathered_linear(X, W, index=torch.tensor([0]), activation="tanh"),
        ValueError,
        "activation must be None or one of 'gelu', 'gelu_tanh', 'relu', 'silu', got 'tanh'",
    ),
    "norm": (lambda: tokenops.gathered_linear(X, W, index=torch.tensor([0]), norm=W), TypeError, r"norm must be \(weight, bias\)"),
    "norm width": (
        lambda: tokenops.gathered_linear(X, W, index=torch.tensor([0]), norm=(W[0], torch.ones(4))),
        ValueError,
        r"norm's bias must be \[C\] = \[3\], got \[4\]",
    ),
    "out": (
        lambda: tokenops.gathered_linear(X, W, index=torch.tensor([0]), out=torch.zeros(2, 1, 5)),
        ValueError,
        r"out must be \[B, N, O\] = \[2, 4, 5\], got \[2, 1, 5\]",
    ),
    "an id of another grid": (lambda: tokenops.gathered_linear(X, W, index=torch.tensor([4])), ValueError, r"ids in \[0, 4\)"),
    "an id twice": (lambda: tokenops.gathered_linear(X, W, index=torch.tensor([1, 1])), ValueError, "index must not repeat an id"),
    "a mask": (lambda: tokenops.gathered_linear(X, W, index=torch.ones(4).bool()), TypeError, "got a bool mask"),
    "second layer": (
        lambda: tokenops.gathered_mlp(X, W, None, W, index=torch.tensor([0])),
        ValueError,
        r"weight_2 must be \[O, F\] = \[5, 5\], got \[5, 3\]",
    ),
    "rows": (lambda: tokenops.update_tokens(X, X, index=torch.tensor([0])), ValueError, r"rows must be \[B, K, C\] = \[2, 1, 3\]"),
    "rows dtype": (
        lambda: tokenops.update_tokens(X, X[:, :1].half(), index=torch.tensor([0])),
        TypeError,
        "rows must have buffer's dtype torch.float32, got torch.float16",
    ),
    "rows in the buffer": (
        lambda: tokenops.update_tokens_(X, X[:, :1], index=torch.tensor([0])),
        ValueError,
        "buffer must not share memory with rows",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name: str) -> None:
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()
