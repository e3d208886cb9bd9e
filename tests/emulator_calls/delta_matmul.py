"""The CUDA kernels of work on changed tokens, on the emulator: random calls under several orders of threads."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import test_delta_matmul_attention as attending
import test_delta_matmul_gate as gating
import test_delta_matmul_linear as layers
import torch
from delta_matmul_oracle import DTYPES, assert_gradients, lists, normal, widened
from emulator_checks import RandomCalls
from hypothesis import strategies as st
from oracle import assert_close
from torch import Tensor

import tokenops

# channels: rows that begin at multiples of 16 bytes and others, rows of several passes over a warp, rows that no register holds
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from((64, 128, 264, 600, 1040, 1301)))


class Gate(NamedTuple):
    values: dict[str, Any]
    options: dict[str, Any]
    forms: tuple[str, ...]
    want: list[list[int]]
    in_place: bool


@st.composite
def gates(draw: st.DrawFn) -> Gate:
    tokens, dtype = draw(st.integers(1, 40)), draw(st.sampled_from(DTYPES))
    values = gating.call_of(draw(st.integers(1, 3)), tokens, draw(WIDTHS), dtype=dtype)
    forms = gating.FORMS[draw(st.sampled_from(list(gating.FORMS)))]
    if "first" in forms:
        return Gate(values, {}, forms, gating.choose_loop(values, forms, k=tokens), False)
    # a choice that rounding could turn is no test of anything
    if dtype == torch.float32 and draw(st.booleans()):
        k, order = draw(st.integers(1, tokens)), draw(st.sampled_from((0.5, 1.0, 2.0, 3.0, torch.inf)))
        options, want = {"k": k, "order": order}, gating.choose_loop(values, forms, order=order, k=k)
    else:
        index = lists(values["x"].shape[0], tokens, draw(st.integers(1, tokens)), seed=draw(st.integers(0, 99)))
        options, want = {"index": index}, index.tolist()
    return Gate(values, options, forms, want, draw(st.booleans()))


def check_gate(call: Gate) -> tuple[Tensor, ...]:
    """Forward and backward; over the old reference too."""
    results = gating.assert_right(call.values, call.options, call.forms, call.want, "cuda")
    if call.in_place:
        x, reference, skip, weight, bias = call.values.values()
        old = reference.clone()
        gate = tokenops.delta_gate_(
            x,
            old,
            **call.options,
            skip=skip if "skip" in call.forms else None,
            norm=(weight, bias) if "norm" in call.forms else None,
            norm_eps=1e-5,
            whole="whole" in call.forms,
            backend="cuda",
        )
        for got, want in zip((gate.index, gate.count, *gating.continuous(gate)), results, strict=False):
            assert torch.equal(got, want)
    return results


class Layers(NamedTuple):
    values: dict[str, Any]
    activation: str | None
    norm: bool
    wanted: list[str]  # what has a gradient


@st.composite
def layer_calls(draw: st.DrawFn, most: int) -> Layers:
    """Up to `most` slots, channels and outputs."""
    dtype, norm = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    # gradients are rounded on their way through the layers; what they add up to cancels by chance in one number, but not in several
    size = st.integers(1 if dtype == torch.float32 else 4, most)
    # rows of a grid begin at multiples of 16 bytes, or not
    width = draw(st.one_of(size, size.map(lambda n: -(-n // 8) * 8)))
    hidden = draw(st.one_of(st.none(), size))
    rows = draw(st.integers(1, most))
    # next to the corner of relu the rounding of normalised rows decides on the slope
    activations = [name for name in layers.ACTIVATIONS if name != "relu" or dtype == torch.float32 or not norm]
    values = layers.call_of(
        draw(st.integers(1, 2)),
        rows,
        draw(st.integers(1, rows)),
        width,
        draw(size),
        hidden,
        dtype=dtype,
        device="cpu",
    )
    names = [name for name in values if name != "index" and (norm or "norm" not in name)]
    some = st.lists(st.sampled_from(names), min_size=1, unique=True)
    return Layers(values, draw(st.sampled_from(activations)), norm, draw(st.one_of(st.just(names), some)))


def check_layers(call: Layers) -> tuple[Tensor, ...]:
    """Forward and backward; into the rows of a grid too."""
    run, x, index = layers.as_called(call.activation, call.norm, "cuda"), call.values["x"], call.values["index"]
    results = assert_gradients(run, layers.as_loop(call.activation, call.norm), call.values, call.wanted)
    out = normal(*x.shape[:2], results[0].shape[2], dtype=x.dtype)
    want = tokenops.update_tokens(out, results[0], index=index, backend="cuda")
    norm = (call.values["norm_weight"], call.values["norm_bias"]) if call.norm else None
    options: dict[str, Any] = {"index": index, "out": out, "activation": call.activation, "norm": norm, "norm_eps": 1e-5, "backend": "cuda"}
    parts = [call.values[name] for name in ("weight_1", "bias_1", "weight_2", "bias_2") if name in call.values]
    (tokenops.gathered_linear if len(parts) == 2 else tokenops.gathered_mlp)(x, *parts, **options)
    assert torch.equal(out, want)
    return results


def check_update(call: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    buffer, rows, index = call

    def as_loop(buffer: Tensor, rows: Tensor) -> Tensor:
        samples = []
        for b, ids in enumerate(index.tolist()):
            samples.append(torch.stack([rows[b, ids.index(n)] if n in ids else buffer[b, n] for n in range(buffer.shape[1])]))
        return torch.stack(samples)

    run = functools.partial(tokenops.update_tokens, index=index, backend="cuda")
    return assert_gradients(run, as_loop, {"buffer": buffer, "rows": rows}, ["buffer", "rows"])


@st.composite
def updates(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 30)), draw(WIDTHS)
    slots, dtype = draw(st.integers(1, rows)), draw(st.sampled_from((*DTYPES, torch.float64)))
    index = lists(batch, rows, slots, seed=draw(st.integers(0, 99)))
    return normal(batch, rows, width, dtype=dtype), normal(batch, slots, width, dtype=dtype, seed=1), index


class Orders(NamedTuple):
    rows: Tensor
    cells: Tensor
    tokens: int
    keys: int
    turn: int
    slice_rows: int
    most: int


@st.composite
def orders(draw: st.DrawFn) -> Orders:
    batch, tokens = draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 100), st.integers(1, 2000)))
    keys = draw(st.sampled_from((tokens, -(-tokens // 4))))
    rows, cells = (lists(batch, each, draw(st.integers(0, each)), seed=draw(st.integers(0, 99))) for each in (tokens, keys))
    slices = draw(st.integers(0, tokens))
    return Orders(rows, cells, tokens, keys, draw(st.integers(0, 9)), slices, draw(st.integers(0, keys)))


def check_order(call: Orders) -> tuple[Tensor, ...]:
    """Which rows of delta_attention are computed afresh."""
    rows, cells, tokens, keys, turn, slice_rows, most = call
    batch = rows.shape[0]
    order, fresh, marks = torch.empty(batch, tokens).int(), torch.empty(batch).int(), torch.empty(batch, tokens).to(torch.uint8)
    run = torch.ops.tokenops.delta_matmul_cuda_order.default
    run(order, fresh, marks, rows, cells, torch.tensor(turn, dtype=torch.int32), keys, slice_rows, most)
    for b in range(batch):
        afresh = set(range(tokens)) if int((cells[b] >= 0).sum()) > most else set(rows[b].tolist()) - {-1}
        afresh |= set(range(tokens)[turn * slice_rows : (turn + 1) * slice_rows])
        assert order[b].tolist() == sorted(afresh) + sorted(set(range(tokens)) - afresh)
        assert fresh[b] == len(afresh)
    return order, fresh


class Frames(NamedTuple):
    frames: list[attending.Frame]
    options: dict[str, Any]


@st.composite
def frames(draw: st.DrawFn, mode: str) -> Frames:
    grid = draw(st.sampled_from(((2, 3), (4, 6), (6, 14), (12, 12), (10, 20))))
    tokens, pool = grid[0] * grid[1], draw(st.sampled_from((None, None, (2, 1), (1, grid[1]))))
    rel = None
    if draw(st.booleans()):
        rel = grid if pool is None else (grid[0] // pool[0], grid[1] // pool[1])
    width = st.integers(1, 16).map(lambda n: 8 * n)
    dtype = draw(st.sampled_from(DTYPES))
    options: dict[str, Any] = {"mode": mode, **({} if pool is None else {"pool": pool, "grid": grid})}
    if mode == "exact":
        options |= {"refresh": draw(st.sampled_from((0, 5, 128))), "crossover": draw(st.sampled_from((0.5, 2.0)))}
    else:
        options |= {"cast": draw(st.sampled_from((None, None, *DTYPES)))}
    made = attending.frames_of(
        draw(st.integers(2, 4)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        grid,
        draw(width),
        draw(width),
        slots=draw(st.integers(0, tokens)),
        rel=rel,
        dtype=dtype,
    )
    return Frames(made, options)


def check_frames(call: Frames) -> tuple[Tensor, ...]:
    """Frame after frame, as the definition does it in float64; the state is carried over in place too."""
    frames, options = call
    wide = [attending.Frame(*widened(frame._asdict() | {"rel": None}).values()) for frame in frames]
    wide = [
        frame._replace(rel=None if narrow.rel is None else tuple(part.double() for part in narrow.rel))
        for frame, narrow in zip(wide, frames, strict=True)
    ]
    cast = options.get("cast")
    stated = {name: option for name, option in options.items() if name != "cast"}
    want = attending.run(wide, "reference", **stated)
    got = attending.run(frames, "cuda", **options)
    dtype = frames[0].query.dtype if cast is None or cast.itemsize > frames[0].query.dtype.itemsize else cast
    # what two half types have rounded is as exact as bfloat16
    dtype = torch.bfloat16 if torch.bfloat16 in (cast, frames[0].query.dtype) else dtype
    for (out, _), (exact, _) in zip(got, want, strict=True):
        assert_close("out", out, exact, dtype)
    state = attending.run(frames[:1], "cuda", **options)[0][1]
    in_place = {name: option for name, option in options.items() if name not in ("mode", "cast")}
    for frame, (out, new) in zip(frames[1:], got[1:], strict=True):
        assert frame.index is not None
        again = tokenops.delta_attention_(*frame[:3], frame.index, state, rel_pos=frame.rel, **in_place, backend="cuda")
        assert torch.equal(again, out)
        for a, b in zip(state, new, strict=True):
            assert a is b is None or torch.equal(a, b)
    return (*(out for out, _ in got), *(part for part in state if part is not None))


RANDOM_CALLS = {
    "delta_gate": RandomCalls(gates(), check_gate),
    "update_tokens": RandomCalls(updates(), check_update),
    "small layers": RandomCalls(layer_calls(40), check_layers),
    "layers of several blocks": RandomCalls(layer_calls(300), check_layers),
    "rows to compute afresh": RandomCalls(orders(), check_order),
    "delta_attention, exact": RandomCalls(frames("exact"), check_frames),
    "delta_attention, paper": RandomCalls(frames("paper"), check_frames),
}
