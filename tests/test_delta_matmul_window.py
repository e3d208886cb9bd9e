"""Attention in windows, on every backend: against a loop over windows in float64, frame after frame, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from delta_matmul_oracle import DTYPES, assert_gradients, lists, normal
from oracle import assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import tokenops
from tokenops.types import TokenIndex, WindowState

ops = torch.ops.tokenops
GRID, WINDOW = (6, 8), (3, 4)
TOKENS = 48

Call = dict[str, Any]


def buffers(
    batch: int = 2, heads: int = 3, grid: tuple[int, int] = GRID, window: tuple[int, int] | None = WINDOW, width: int = 16, **more: Any
) -> Call:
    """query, key, value, and with a window rel_h and rel_w."""
    tokens, widths = grid[0] * grid[1], {"query": width, "key": width, "value": 24}
    if window is not None:
        widths |= {"rel_h": window[0], "rel_w": window[1]}
    seed = more.pop("seed", 0)
    return {name: normal(batch, heads, tokens, w, seed=seed + at, **more) for at, (name, w) in enumerate(widths.items())}


def run(
    call: Call,
    index: Any = None,
    state: WindowState | None = None,
    grid: tuple[int, int] = GRID,
    window: tuple[int, int] = WINDOW,
    **options: Any,
) -> tuple[Tensor, WindowState]:
    rel = (call["rel_h"], call["rel_w"]) if "rel_h" in call else None
    query, key, value = call["query"], call["key"], call["value"]
    return tokenops.delta_window_attention(query, key, value, index, state, grid=grid, window=window, rel_pos=rel, **options)


def window_loop(call: Call, grid: tuple[int, int] = GRID, window: tuple[int, int] = WINDOW, scale: float | None = None) -> Tensor:
    """Window after window, in the dtype of the buffers."""
    query, key, value = call["query"], call["key"], call["value"]
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
    for top in range(0, grid[0], window[0]):
        for left in range(0, grid[1], window[1]):
            rows = [(top + y) * grid[1] + left + x for y in range(window[0]) for x in range(window[1])]
            logits = query[:, :, rows] @ key[:, :, rows].mT * (query.shape[3] ** -0.5 if scale is None else scale)
            if "rel_h" in call:
                columns = [call["rel_h"][:, :, rows, y] + call["rel_w"][:, :, rows, x] for y in range(window[0]) for x in range(window[1])]
                logits = logits + torch.stack(columns, -1)
            out = out.index_copy(2, torch.tensor(rows, device=out.device), logits.softmax(-1) @ value[:, :, rows])
    return out


def in_float64(call: Call) -> Call:
    return {name: x.detach().double() for name, x in call.items()}


def listed_tokens(index: Tensor, tokens: int = TOKENS) -> Tensor:
    """[B, N] bool."""
    return tokenops.mask_from_index(index, tokens)


def changed(call: Call, index: Tensor, seed: int) -> Call:
    """The listed rows of every buffer made new."""
    tokens = call["query"].shape[2]
    where = listed_tokens(index, tokens)[:, None, :, None]
    fresh = {name: normal(*x.shape, dtype=x.dtype, device=x.device, seed=seed + at) for at, (name, x) in enumerate(call.items())}
    return {name: torch.where(where, fresh[name], x) for name, x in call.items()}


def in_changed_windows(index: Tensor, grid: tuple[int, int] = GRID, window: tuple[int, int] = WINDOW) -> Tensor:
    """[B, N] bool: whether a token's window holds a listed one."""
    listed = listed_tokens(index, grid[0] * grid[1]).unflatten(1, grid)
    found = torch.zeros_like(listed)
    for top in range(0, grid[0], window[0]):
        for left in range(0, grid[1], window[1]):
            part = (slice(None), slice(top, top + window[0]), slice(left, left + window[1]))
            found[part] = listed[part].flatten(1).any(1)[:, None, None]
    return found.flatten(1)


# numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("grid", "window"), [((6, 8), (3, 4)), ((4, 4), (4, 4)), ((5, 3), (1, 3)), ((28, 14), (14, 14)), ((8, 2), (2, 1))], ids=str
)
def test_a_first_frame_is_attention_in_every_window(
    grid: tuple[int, int], window: tuple[int, int], dtype: torch.dtype, backend: str, device: str
) -> None:
    for rel in (None, window):
        call = buffers(grid=grid, window=rel, dtype=dtype, device=device)
        out, state = run(call, grid=grid, window=window, backend=backend)
        assert_close("out", out, window_loop(in_float64(call), grid, window), dtype)
        assert torch.equal(state.output, out)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_frame_after_frame(batch: int, backend: str, device: str) -> None:
    """Each frame is right, windows without a listed token keep their bits, the others get those of a first frame."""
    call = buffers(batch, device=device)
    out, state = run(call, backend=backend)
    for frame in range(1, 5):
        index = lists(batch, TOKENS, 3 * frame, seed=frame, device=device)
        call, before = changed(call, index, 100 * frame), out
        out, state = run(call, index, state, backend=backend)
        assert_close("out", out, window_loop(in_float64(call)), torch.float32)
        kept = ~in_changed_windows(index)
        assert torch.equal(out.transpose(1, 2)[kept], before.transpose(1, 2)[kept])
        whole = run(call, backend=backend)[0]
        assert_close("out", out, whole, torch.float32)
        if backend != "reference":
            # torch's products, which the reference is made of, may depend on how many windows there are
            assert torch.equal(out, whole)


def test_windows_without_a_listed_token_are_not_read(backend: str, device: str) -> None:
    call = buffers(device=device)
    before, state = run(call, backend=backend)
    index = torch.tensor([[0, -1], [-1, 47]], device=device)
    kept = ~in_changed_windows(index)
    poisoned = {name: x.masked_fill(kept[:, None, :, None], torch.nan) for name, x in call.items()}
    out, _ = run(poisoned, index, state, backend=backend)
    assert torch.equal(out.transpose(1, 2)[kept], before.transpose(1, 2)[kept])
    assert out.isfinite().all()


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "64 bits": lambda index: index.long(),
    "TokenIndex": lambda index: TokenIndex(index, (index >= 0).sum(-1)),
    "more slots": lambda index: F.pad(index, (50, 3), value=-1),
    "columns": lambda index: index.T.contiguous().T,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_list(form: str, backend: str, device: str) -> None:
    call = buffers(device=device)
    _, state = run(call, backend=backend)
    index = lists(2, TOKENS, 5, seed=3, device=device)
    call = changed(call, index, 7)
    want, _ = run(call, index, state, backend=backend)
    assert torch.equal(run(call, FORMS[form](index), state, backend=backend)[0], want)


def test_one_list_for_all_samples_an_empty_one_and_a_full_one(backend: str, device: str) -> None:
    call = buffers(device=device)
    before, state = run(call, backend=backend)
    new = changed(call, torch.tensor([[5, 30]] * 2, device=device), 7)
    want, _ = run(new, torch.tensor([[5, 30]] * 2, device=device), state, backend=backend)
    assert torch.equal(run(new, torch.tensor([30, -1, 5], device=device), state, backend=backend)[0], want)
    for nothing in (torch.zeros(0, dtype=torch.int32, device=device), torch.full((2, 3), -1, device=device)):
        assert torch.equal(run(call, nothing, state, backend=backend)[0], before)
    everything = torch.arange(TOKENS, device=device)
    new = buffers(seed=50, device=device)
    assert_close("out", run(new, everything, state, backend=backend)[0], run(new, backend=backend)[0], torch.float32)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": lambda x: x.contiguous(),
    "a linear layer's": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slices of one buffer": lambda x: torch.stack([x.transpose(1, 2)] * 3, 2).transpose(1, 3).unbind(2)[1],
    "one sample for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_buffers(layout: str, backend: str, device: str) -> None:
    call = {name: LAYOUTS[layout](x) for name, x in buffers(device=device).items()}
    out, state = run(call, backend=backend)
    assert_close("out", out, window_loop(in_float64(call)), torch.float32)
    index = torch.tensor([[3, -1], [20, 47]], device=device)
    call = {name: LAYOUTS[layout](x) for name, x in changed(call, index[1:].expand(2, -1), 9).items()}
    stored = WindowState(LAYOUTS[layout](state.output).clone())
    out, _ = run(call, index[1], stored, backend=backend)
    if layout != "one sample for all":
        assert_close("out", out, window_loop(in_float64(call)), torch.float32)


def test_scale(backend: str, device: str) -> None:
    call = buffers(device=device)
    assert_close("out", run(call, scale=0.7, backend=backend)[0], window_loop(in_float64(call), scale=0.7), torch.float32)


# in place


def test_in_place_is_the_same(backend: str, device: str) -> None:
    call = buffers(device=device)
    _, state = run(call, backend=backend)
    index = lists(2, TOKENS, 4, seed=1, device=device)
    call = changed(call, index, 5)
    old = state.output.clone()
    want, _ = run(call, index, state, backend=backend)
    # the functional form left the old state alone
    assert torch.equal(state.output, old)
    rel = (call["rel_h"], call["rel_w"])
    got = tokenops.delta_window_attention_(
        call["query"], call["key"], call["value"], index, state, grid=GRID, window=WINDOW, rel_pos=rel, backend=backend
    )
    assert got is state.output
    assert torch.equal(got, want)


def test_in_place_refuses_a_gradient_and_shared_memory(device: str) -> None:
    x = normal(1, 2, TOKENS, 16, device=device)
    index, options = torch.tensor([3], device=device), {"grid": GRID, "window": WINDOW}
    _, state = tokenops.delta_window_attention(x, x, x, **options)
    with pytest.raises(RuntimeError, match=r"state.output is written in place and has no gradient.*use delta_window_attention"):
        tokenops.delta_window_attention_(x.clone().requires_grad_(), x, x, index, state, **options)
    with pytest.raises(ValueError, match="must not share memory with query"):
        tokenops.delta_window_attention_(x, x, x, index, WindowState(x), **options)
    with pytest.raises(ValueError, match=r"state.output must have a dense last dimension"):
        tokenops.delta_window_attention_(x, x, x, index, WindowState(x.mT.contiguous().mT), **options)
    with pytest.raises(TypeError, match="index must list the tokens that changed, got None"):
        tokenops.delta_window_attention_(x, x, x, None, state, **options)


# gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["heads first", "a linear layer's"])
def test_gradient_is_that_of_all_windows(layout: str, dtype: torch.dtype, backend: str, device: str) -> None:
    call = {name: LAYOUTS[layout](x) for name, x in buffers(dtype=dtype, device=device).items()}
    with torch.no_grad():
        out, state = run(call, backend=backend)
    index = torch.tensor([[3], [47]], device=device)
    for more in ((), (index, state)):
        assert_gradients(lambda **call: run(call, *more, backend=backend)[0], lambda **call: window_loop(call), call, list(call))  # noqa: B023
    # and what it is the gradient of has the numbers of the frame before
    leaves = {name: x.detach().requires_grad_() for name, x in call.items()}
    again, new = run(leaves, index, state, backend=backend)
    assert again.requires_grad
    assert not new.output.requires_grad
    assert_close("out", again, out, dtype)


def test_gradients_flow_through_the_buffers(backend: str, device: str) -> None:
    grid = normal(1, TOKENS, 32, device=device).requires_grad_()
    rows = normal(1, 2, 32, device=device, seed=1).requires_grad_()
    index = torch.tensor([2, 40], device=device)

    def loss(attend: Callable[..., Tensor], grid: Tensor, buffer: Tensor) -> Tensor:
        return attend(grid, None) + attend(buffer, index)

    state = None

    def ours(x: Tensor, at: Tensor | None) -> Tensor:
        nonlocal state
        x = x.unflatten(2, (2, 16)).transpose(1, 2)
        out, state = tokenops.delta_window_attention(x, x, x, at, state, grid=GRID, window=WINDOW, backend=backend)
        return out.square().sum()

    def theirs(x: Tensor, at: Tensor | None) -> Tensor:
        x = x.unflatten(2, (2, 16)).transpose(1, 2)
        return window_loop({"query": x, "key": x, "value": x}).square().sum()

    got = torch.autograd.grad(loss(ours, grid, tokenops.update_tokens(grid, rows, index=index, backend=backend)), (grid, rows))
    exact = [x.detach().double().requires_grad_() for x in (grid, rows)]
    want = torch.autograd.grad(loss(theirs, exact[0], exact[0].index_copy(1, index, exact[1])), exact)
    for a, b in zip(got, want, strict=True):
        assert_close("gradient", a, b, torch.float32)


def test_double_backward_and_forward_mode_are_refused(device: str) -> None:
    x = normal(1, 1, TOKENS, 8, device=device).requires_grad_()
    function = lambda x: tokenops.delta_window_attention(x, x, x, grid=GRID, window=WINDOW)[0]  # noqa: E731
    [grad] = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (x.detach(),), (x.detach(),))


# the recipe for grids that windows do not divide


def padded(x: Tensor, grid: tuple[int, int], whole: tuple[int, int], fill: Tensor) -> Tensor:
    """[B, N, C] -> [B, padded N, C], rows of ``fill`` to the right and below."""
    batch, _, channels = x.shape
    out = fill.expand(batch, *whole, channels).clone()
    out[:, : grid[0], : grid[1]] = x.unflatten(1, grid)
    return out.flatten(1, 2)


def test_padding_recipe(backend: str, device: str) -> None:
    """As published: zeros pad the grid of tokens in front of the qkv layer, so that its bias stands there and takes part as keys."""
    grid, whole, window = (5, 6), (6, 8), (3, 4)
    batch, heads, channels = 2, 2, 16
    weight, bias = normal(3 * channels, channels, device=device, seed=1), normal(3 * channels, device=device, seed=2)

    def published(tokens: Tensor) -> Tensor:
        x = padded(tokens, grid, whole, torch.zeros(channels, device=device, dtype=tokens.dtype))
        q, k, v = F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        out = window_loop({"query": q, "key": k, "value": v}, whole, window)
        return out.unflatten(2, whole)[:, :, : grid[0], : grid[1]].flatten(2, 3)

    def attend(buffer: Tensor, index: Tensor | None, state: WindowState | None) -> tuple[Tensor, WindowState]:
        q, k, v = buffer.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        out, state = tokenops.delta_window_attention(q, k, v, index, state, grid=whole, window=window, backend=backend)
        return out.unflatten(2, whole)[:, :, : grid[0], : grid[1]].flatten(2, 3), state

    tokens = normal(batch, 30, channels, device=device)
    buffer = padded(F.linear(tokens, weight, bias), grid, whole, bias)
    out, state = attend(buffer, None, None)
    assert_close("first frame", out, published(tokens.double()), torch.float32)
    index = torch.tensor([[29, 4, -1], [0, -1, 13]], device=device)
    tokens = torch.where(listed_tokens(index, 30)[..., None], normal(batch, 30, channels, device=device, seed=3), tokens)
    places = torch.where(index < 0, -1, index // grid[1] * whole[1] + index % grid[1])
    rows = F.linear(tokens.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, channels)), weight, bias)
    buffer = tokenops.update_tokens(buffer, rows, index=places, backend=backend)
    out, _ = attend(buffer, places, state)
    assert_close("second frame", out, published(tokens.double()), torch.float32)


# what torch asks


@pytest.mark.parametrize("batch", [1, 2])
def test_list_operator_passes_opcheck(batch: int, device: str) -> None:
    opcheck(ops.changed_windows.default, (lists(1, TOKENS, 5, device=device), batch, GRID, WINDOW))


def test_lists_of_changed_windows(device: str) -> None:
    rows, bounds = ops.changed_windows(torch.tensor([[-1, 5], [6, 47]], dtype=torch.int32, device=device), 2, GRID, WINDOW)
    # windows 1 of the first sample, 1 and 3 of the second; then the others, without a row
    assert bounds.tolist() == [0, 12, 24, *[36] * 6]
    assert rows.sort().values.tolist() == list(range(2 * TOKENS))
    windows = rows.view(8, 12)
    assert windows[0].tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]
    assert (windows[1] - TOKENS).tolist() == windows[0].tolist()
    assert windows[2, -1] == 2 * TOKENS - 1


@pytest.fixture
def compiling() -> Any:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiling")
def test_compiles_without_a_graph_break(device: str) -> None:
    call = buffers(device=device)
    index = lists(2, TOKENS, 4, seed=1, device=device)
    with torch.no_grad():
        _, state = run(call)
    new = changed(call, index, 5)

    def frame(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        out, state = run({**new, "query": query, "key": key, "value": value}, index, WindowState(output))
        return out * 2.0, state.output

    inputs = (new["query"], new["key"], new["value"], state.output)
    compiled = torch.compile(frame, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), frame(*inputs), strict=True):
        assert torch.equal(got, want)
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    results = [function(*leaves, state.output)[0] for function in (compiled, frame)]
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in results]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)

    def in_place(query: Tensor, output: Tensor) -> Tensor:
        options = {"grid": GRID, "window": WINDOW, "rel_pos": (new["rel_h"], new["rel_w"])}
        return tokenops.delta_window_attention_(query, new["key"], new["value"], index, WindowState(output), **options) + 1.0

    outputs = [state.output.clone() for _ in range(2)]
    results = [
        function(new["query"], output)
        for function, output in zip((torch.compile(in_place, fullgraph=True, backend="aot_eager"), in_place), outputs, strict=True)
    ]
    assert torch.equal(*results)
    assert torch.equal(*outputs)


def test_fake_tensors_need_no_gpu() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, TOKENS, 3, 16, device="cuda").transpose(1, 2) for _ in range(3))
        out, state = tokenops.delta_window_attention(q, k, v, grid=GRID, window=WINDOW)
        index = torch.empty(2, 4, device="cuda", dtype=torch.int32)
        out, state = tokenops.delta_window_attention(q, k, v, index, state, grid=GRID, window=WINDOW)
        assert (out.shape, out.stride(), out.device.type) == (q.shape, q.stride(), "cuda")
        assert state.output.shape == q.shape


def test_autocast_casts_the_products(device: str) -> None:
    call = buffers(device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        out, state = run(call)
        out, _ = run(call, torch.tensor([3], device=device), state)
    assert out.dtype == torch.bfloat16
    assert_close("out", out, window_loop(in_float64(call)), torch.bfloat16)


# errors

X = torch.ones(2, 3, 12, 8)
AT = torch.tensor([0])
HOW: Call = {"grid": (3, 4), "window": (3, 2)}
STATE = tokenops.delta_window_attention(X, X, X, **HOW)[1]
ERRORS: dict[str, tuple[tuple[Any, ...], Call, type[Exception], str]] = {
    "first frame with an index": ((X, X, X, AT), {}, ValueError, "index must not be given without a state"),
    "an id of another grid": ((X, X, X, torch.tensor([12]), STATE), {}, ValueError, r"index must hold ids in \[0, 12\)"),
    "an id below -1": ((X, X, X, torch.tensor([-2]), STATE), {}, ValueError, r"index must hold ids in \[0, 12\)"),
    "an id twice": ((X, X, X, torch.tensor([1, 1]), STATE), {}, ValueError, "index must not repeat an id"),
    "a mask": ((X, X, X, torch.ones(12, dtype=torch.bool), STATE), {}, TypeError, "index must hold row ids .*, got a bool mask"),
    "lists of another batch": ((X, X, X, AT.expand(3, 1), STATE), {}, ValueError, r"index must be \[K\] \| \[2, K\], got \[3, 1\]"),
    "state of another kind": ((X, X, X, AT, (X,)), {}, TypeError, "state must be a WindowState, got tuple"),
    "state of another batch": ((X[:1],) * 3 + (AT, STATE), {}, ValueError, r"state.output must be \[1, 3, 12, 8\] .*, got \[2, 3, 12, 8\]"),
    "state of another model": ((X, X, X[..., :4], AT, STATE), {}, ValueError, r"state.output must be \[2, 3, 12, 4\]"),
    "state of another dtype": ((X.half(),) * 3 + (AT, STATE), {}, TypeError, "state.output must be torch.float16 .*, got torch.float32"),
    "state elsewhere": ((X, X, X, AT, WindowState(X.to("meta"))), {}, ValueError, "state.output must be on query's device"),
    "packed rows": ((X[0], X[0], X[0]), {}, ValueError, r"query must be \[B, H, N, D\], got \[3, 12, 8\]"),
    "key of another N": ((X, X[:, :, 1:], X), {}, ValueError, r"key must be \[B, H, N, D\] = \[2, 3, 12, 8\], got \[2, 3, 11, 8\]"),
    "value of another dtype": ((X, X, X.half()), {}, TypeError, "value must have query's dtype"),
    "no width": ((X[..., :0], X[..., :0], X), {}, ValueError, "query must have a width of at least 1"),
    "grid of another N": ((X, X, X), {"grid": (4, 4)}, ValueError, r"grid must hold query's N = 12 tokens, got \(4, 4\)"),
    "grid of nothing": ((X, X, X), {"grid": (0, 4)}, ValueError, r"grid must be two positive numbers, got \(0, 4\)"),
    "grid of three": ((X, X, X), {"grid": (3, 2, 2)}, ValueError, "grid must be two positive numbers"),
    "window that does not divide": ((X, X, X), {"window": (2, 2)}, ValueError, r"window must divide grid \(3, 4\) .*, got \(2, 2\)"),
    "rel_pos of the whole grid": (
        (X, X, X),
        {"rel_pos": (X[..., :3], X[..., :4])},
        ValueError,
        "rel_pos must be for a gh x gw grid of 6 key cells, got 3 x 4",
    ),
    "rel_pos of a window on its side": (
        (X, X, X),
        {"rel_pos": (X[..., :2], X[..., :3])},
        ValueError,
        "rel_pos must be for windows of 3 x 2, got 2 rows",
    ),
    "rel_pos of one tensor": ((X, X, X), {"rel_pos": X}, TypeError, r"rel_pos must be two tensors \(rel_h, rel_w\), got Tensor"),
    "unknown backend": ((X, X, X), {"backend": "cudnn"}, ValueError, "backend must be one of .*, got 'cudnn'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_arguments_are_explained(name: str) -> None:
    arguments, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        tokenops.delta_window_attention(*arguments, **{**HOW, **options})


@pytest.mark.parametrize("ids", [[12], [-2], [1, 1]], ids=str)
def test_a_bad_list_is_refused_where_all_windows_are_computed_too(ids: list[int]) -> None:
    leaf = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="index must"):
        tokenops.delta_window_attention(leaf, X, X, torch.tensor(ids), STATE, **HOW)
