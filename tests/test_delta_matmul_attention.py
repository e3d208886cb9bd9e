"""Attention by what changed, on every backend: against dense attention and the published update, over frames, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from delta_matmul_oracle import DTYPES, assert_gradients, lists, normal
from oracle import assert_close
from torch import Tensor
from torch.library import opcheck

import tokenops
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaAttentionProblem, DeltaState

ops = torch.ops.tokenops


class Frame(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    rel: tuple[Tensor, Tensor] | None
    index: Tensor | None


def frames_of(
    count: int,
    batch: int = 2,
    heads: int = 3,
    grid: tuple[int, int] = (4, 6),
    width: int = 8,
    value_width: int = 16,
    *,
    slots: int = 7,
    rel: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Frame]:
    """Buffers of which the listed rows change, in each sample others and another number of them."""
    tokens = grid[0] * grid[1]
    widths = (width, width, value_width, *(rel or ()))
    buffers = [normal(batch, heads, tokens, w, dtype=dtype, device=device, seed=at) for at, w in enumerate(widths)]
    frames = []
    for frame in range(count):
        index = lists(batch, tokens, slots, seed=frame, device=device) if frame else None
        if index is not None:
            changed = torch.zeros(batch, tokens + 1, dtype=torch.bool, device=device)
            changed = changed.scatter(1, index.long().masked_fill(index < 0, tokens), True)[:, None, :tokens, None]
            fresh = [normal(*b.shape, dtype=dtype, device=device, seed=100 * frame + at) for at, b in enumerate(buffers)]
            buffers = [torch.where(changed, new, old) for new, old in zip(fresh, buffers, strict=True)]
        frames.append(Frame(*buffers[:3], (buffers[3], buffers[4]) if rel else None, index))
    return frames


def pooled_loop(x: Tensor, grid: tuple[int, int], pool: tuple[int, int]) -> Tensor:
    """Cell after cell."""
    rows = []
    for y in range(0, grid[0], pool[0]):
        for at in range(0, grid[1], pool[1]):
            members = [x[:, :, (y + i) * grid[1] + at + j] for i in range(pool[0]) for j in range(pool[1])]
            rows.append(sum(members) / len(members))
    return torch.stack(rows, 2)


def matrix(frame: Frame, key: Tensor) -> Tensor:
    """The attention matrix in float64."""
    logits = frame.query.double() @ key.double().mT * frame.query.shape[-1] ** -0.5
    if frame.rel is not None:
        columns = frame.rel[1].shape[-1]
        bias = [frame.rel[0][..., m // columns].double() + frame.rel[1][..., m % columns].double() for m in range(key.shape[2])]
        logits = logits + torch.stack(bias, -1)
    return logits.softmax(-1)


def dense_loop(frame: Frame, grid: tuple[int, int] = (4, 6), pool: tuple[int, int] | None = None) -> Tensor:
    key, value = frame.key.double(), frame.value.double()
    if pool is not None:
        key, value = pooled_loop(key, grid, pool), pooled_loop(value, grid, pool)
    return matrix(frame, key) @ value


def run(frames: list[Frame], backend: str | None, **options: Any) -> list[tuple[Tensor, DeltaState]]:
    state, results = None, []
    for frame in frames:
        out, state = tokenops.delta_attention(
            frame.query, frame.key, frame.value, frame.index, state, rel_pos=frame.rel, **options, backend=backend
        )
        results.append((out, state))
    return results


def only(frame: Frame, sample: int) -> Frame:
    """One sample of a batch."""
    query, key, value, rel, index = frame
    at = slice(sample, sample + 1)
    return Frame(query[at], key[at], value[at], None if rel is None else (rel[0][at], rel[1][at]), None if index is None else index[at])


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rel_pos": {"rel": (4, 6)},
    "pool": {"pool": (2, 3)},
    "pool and rel_pos": {"pool": (2, 2), "rel": (2, 3)},
}


def case(name: str, count: int = 5, **more: Any) -> tuple[list[Frame], dict[str, Any]]:
    options = dict(CASES[name])
    frames = frames_of(count, rel=options.pop("rel", None), **more)
    return frames, {**options, "grid": (4, 6)} if "pool" in options else options


# exact


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_is_dense_attention_on_the_buffers(dtype: torch.dtype, name: str, backend: str, device: str) -> None:
    frames, options = case(name, dtype=dtype, device=device)
    # crossover: no sample is computed afresh as a whole, so that the sums do the work
    for frame, (out, _) in zip(frames, run(frames, backend, refresh=0, crossover=1.0, **options), strict=True):
        assert out.dtype == dtype
        assert_close("out", out, dense_loop(frame, pool=options.get("pool")), dtype)


def test_exact_computes_most_rows_from_their_sums(backend: str, device: str) -> None:
    """A row that nobody has to compute afresh keeps what is wrong with it; so this sees which rows are."""
    [first, second] = frames_of(2, 1, 1, device=device, slots=4)
    assert second.index is not None
    [(_, state)] = run([first], backend)
    marked = state._replace(output=state.output + 100.0)

    def fresh(**options: Any) -> list[int]:
        out, new = tokenops.delta_attention(second.query, second.key, second.value, second.index, marked, **options, backend=backend)
        right = (out - dense_loop(second)).abs().amax(-1) < 1e-3
        assert new.turn is not None
        return right[0, 0].nonzero().flatten().tolist()

    changed = sorted(at for at in second.index[0].tolist() if at >= 0)
    assert fresh(guard=0.0, refresh=0) == changed
    # the first slice of two rows has its turn
    assert fresh(guard=0.0, refresh=12) == sorted({0, 1, *changed})
    assert fresh(guard=0.0, refresh=0, crossover=0.0) == list(range(24))


def test_every_row_has_its_turn(backend: str, device: str) -> None:
    [first] = frames_of(1, 1, 2, device=device)
    [(_, state)] = run([first], backend)
    state = state._replace(output=state.output + 100.0)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    for refresh, frames in ((5, 5), (24, 24), (99, 24), (1, 1)):
        turned = state
        for _ in range(frames):
            out, turned = tokenops.delta_attention(first.query, first.key, first.value, nothing, turned, refresh=refresh, backend=backend)
        assert_close("out", out, dense_loop(first), torch.float32)


def test_the_guard_sees_cancellation(backend: str, device: str) -> None:
    """A key that owned nearly all of every row goes away: what the others add to the sum was rounded off."""
    [frame] = frames_of(1, 1, 2, device=device)
    query = frame.query.clone()
    query[..., 0] = 3.0
    key = frame.key.clone()
    key[:, :, 7, 0] = 30.0
    _, state = tokenops.delta_attention(query, key, frame.value, backend=backend)
    index = torch.tensor([7], device=device)
    after = Frame(query, frame.key, frame.value, None, index)
    options: dict[str, Any] = {"refresh": 0, "backend": backend}
    out, new = tokenops.delta_attention(*after[:3], index, state, **options)
    assert_close("out", out, dense_loop(after), torch.float32)
    unguarded, _ = tokenops.delta_attention(*after[:3], index, state, guard=0.0, **options)
    others = [at for at in range(24) if at != 7]
    assert (unguarded - dense_loop(after))[:, :, others].abs().max() > 1e-3
    # and the next frame starts from sound sums
    assert new.total is not None
    assert (new.total[:, :, others] >= 1.0 - 1e-5).all()


def test_a_larger_maximum_rescales(backend: str, device: str) -> None:
    """Logits that overflow without a maximum, and sums at different maxima."""
    frames = frames_of(3, 1, 2, device=device)
    frames = [frame._replace(key=frame.key * (1.0 + 40.0 * at)) for at, frame in enumerate(frames)]
    every = torch.arange(24, device=device)
    for frame, (out, _) in zip(
        frames, run([frame._replace(index=every if at else None) for at, frame in enumerate(frames)], backend, crossover=2.0), strict=True
    ):
        assert_close("out", out, dense_loop(frame), torch.float32)
    one = frames[0].key.clone()
    one[:, :, 5] *= 60.0
    [(_, state)] = run(frames[:1], backend)
    after = Frame(frames[0].query, one, frames[0].value, None, torch.tensor([5], device=device))
    out, _ = tokenops.delta_attention(*after[:3], after.index, state, guard=0.0, refresh=0, backend=backend)
    assert_close("out", out, dense_loop(after), torch.float32)


def test_infinity_passes_by(backend: str, device: str) -> None:
    """A frame with a value that is not finite does not spoil those after it."""
    [first] = frames_of(1, 1, 1, device=device)
    broken = first.value.clone()
    broken[:, :, 4] = torch.inf
    at = torch.tensor([4], device=device)
    _, state = tokenops.delta_attention(first.query, first.key, broken, backend=backend)
    out, _ = tokenops.delta_attention(first.query, first.key, first.value, at, state, backend=backend)
    assert_close("out", out, dense_loop(first), torch.float32)


def test_the_error_does_not_grow(backend: str, device: str) -> None:
    """2e-5 after 300 frames, with the default guard and slices; the emulator is given 100."""
    ends = (100,) if backend == "cuda" and device == "cpu" else (100, 200, 300)
    frames = frames_of(ends[-1] + 1, 1, 2, (4, 8), slots=6, device=device)
    results = run(frames, backend)
    for at in ends:
        want = dense_loop(frames[at])
        assert float((results[at][0].double() - want).norm() / want.norm()) <= 2e-5


# paper


@pytest.mark.parametrize("name", CASES)
def test_paper_is_the_published_update(name: str, backend: str, device: str) -> None:
    frames, options = case(name, device=device)
    grid, pool = options.get("grid"), options.get("pool")
    kept = None
    for frame, (out, state) in zip(frames, run(frames, backend, mode="paper", **options), strict=True):
        key, value = frame.key.double(), frame.value.double()
        if pool is not None:
            assert grid is not None
            key, value = pooled_loop(key, grid, pool), pooled_loop(value, grid, pool)
        attention = matrix(frame, key)
        if kept is None or frame.index is None:
            kept = attention
        else:
            kept = kept.clone()
            for sample, ids in enumerate(frame.index.tolist()):
                for at in ids:
                    if at >= 0:
                        cell = (
                            at
                            if pool is None or grid is None
                            else at // grid[1] // pool[0] * (grid[1] // pool[1]) + at % grid[1] // pool[1]
                        )
                        kept[sample, :, :, cell] = attention[sample, :, :, cell]
        assert_close("out", out, kept @ value, torch.float32)
        assert state.probability is not None
        assert_close("probability", state.probability.mT, kept, torch.float32)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_paper_stores_what_cast_says(cast: torch.dtype, backend: str, device: str) -> None:
    frames = frames_of(6, device=device)
    [*_, (out, state)] = run(frames, backend, mode="paper", cast=cast)
    [*_, (want, _)] = run(frames, backend, mode="paper")
    assert state.probability is not None
    assert state.probability.dtype == state.value.dtype == cast
    assert state.output.dtype == out.dtype == torch.float32
    assert_close("out", out, want, cast)
    # the sum of changes is what it stands for: nothing is lost from frame to frame
    assert_close("out", out, state.probability.mT.double() @ state.value.double(), torch.float32)


# both


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_without_an_index_everything_starts_afresh(mode: str, backend: str, device: str) -> None:
    frames = frames_of(3, device=device)
    [*_, (_, state)] = run(frames, backend, mode=mode)
    cut = frames_of(1, 3, 2, (5, 5), device=device)[0]
    want, fresh = tokenops.delta_attention(cut.query, cut.key, cut.value, mode=mode, backend=backend)
    got, flushed = tokenops.delta_attention(cut.query, cut.key, cut.value, None, state, mode=mode, backend=backend)
    assert torch.equal(got, want)
    for name, a, b in zip(DeltaState._fields, flushed, fresh, strict=True):
        assert (a is None and b is None) or torch.equal(a, b), name
    assert_close("out", got, dense_loop(cut), torch.float32)


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_a_state_is_not_written_to(mode: str, backend: str, device: str) -> None:
    frames = frames_of(2, device=device)
    [(_, state)] = run(frames[:1], backend, mode=mode)
    before = [None if part is None else part.clone() for part in state]
    second = frames[1]
    tokenops.delta_attention(second.query, second.key, second.value, second.index, state, mode=mode, backend=backend)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_samples_do_not_know_of_each_other(mode: str, name: str, backend: str, device: str) -> None:
    frames, options = case(name, 4, device=device)
    together = run(frames, backend, mode=mode, **options)
    for sample in range(2):
        alone = [only(frame, sample) for frame in frames]
        for (out, _), (one, _) in zip(together, run(alone, backend, mode=mode, **options), strict=True):
            assert_close("out", out[sample : sample + 1], one.double(), torch.float32)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_in_place_is_the_same(mode: str, name: str, backend: str, device: str) -> None:
    frames, options = case(name, 5, device=device)
    [(_, state), *later] = run(frames, backend, mode=mode, **options)
    for frame, (want, new) in zip(frames[1:], later, strict=True):
        assert frame.index is not None
        out = tokenops.delta_attention_(
            frame.query, frame.key, frame.value, frame.index, state, rel_pos=frame.rel, **options, backend=backend
        )
        assert torch.equal(out, want)
        for part, a, b in zip(DeltaState._fields, state, new, strict=True):
            assert a is b is None or torch.equal(a, b), part


def test_in_place_keeps_the_cast(backend: str, device: str) -> None:
    frames = frames_of(2, device=device)
    [(_, state), (want, _)] = run(frames, backend, mode="paper", cast=torch.float16)
    second = frames[1]
    assert second.index is not None
    assert torch.equal(tokenops.delta_attention_(second.query, second.key, second.value, second.index, state, backend=backend), want)


def test_in_place_says_what_it_cannot_do() -> None:
    _, state = tokenops.delta_attention(X, X, X)
    with pytest.raises(RuntimeError, match=r"state.output is written in place and has no gradient: .* use delta_attention"):
        tokenops.delta_attention_(X.clone().requires_grad_(), X, X, AT, state)
    with pytest.raises(TypeError, match=r"index must list the tokens that changed, got None"):
        tokenops.delta_attention_(X, X, X, None, state)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"state must be a DeltaState, got NoneType"):
        tokenops.delta_attention_(X, X, X, AT, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"state.value must not share memory with query"):
        tokenops.delta_attention_(X, X, X, AT, state._replace(value=X))
    turned = torch.ones(2, 3, 4, 6).mT
    with pytest.raises(ValueError, match=r"state.output must be contiguous to be written over"):
        tokenops.delta_attention_(X, X, X, AT, state._replace(output=turned))


def test_the_state_is_small(backend: str, device: str) -> None:
    """At most 6 N C numbers in mode "exact"."""
    [frame] = frames_of(1, 1, 12, (4, 4), 64, 64, device=device)
    [(_, state)] = run([frame], backend)
    assert sum(part.numel() for part in state if part is not None) <= 6 * 16 * 12 * 64


# gradients


@pytest.mark.parametrize("mode", ["exact", "paper"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_that_of_dense_attention(dtype: torch.dtype, name: str, mode: str, backend: str, device: str) -> None:
    frames, options = case(name, 3, dtype=dtype, device=device)
    [*_, (_, state)] = run(frames[:2], backend, mode=mode, **options)
    last = frames[2]
    call: dict[str, Any] = {"query": last.query, "key": last.key, "value": last.value}
    if last.rel is not None:
        call |= {"rel_h": last.rel[0], "rel_w": last.rel[1]}
    index = last.index
    if mode == "paper":
        # there, what comes out is dense only after a flush; the gradient is so in every frame
        index, state = None, None

    def got(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor | None = None, rel_w: Tensor | None = None) -> Tensor:
        rel = None if rel_h is None or rel_w is None else (rel_h, rel_w)
        return tokenops.delta_attention(query, key, value, index, state, mode=mode, rel_pos=rel, **options, backend=backend)[0]

    def want(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor | None = None, rel_w: Tensor | None = None) -> Tensor:
        rel = None if rel_h is None or rel_w is None else (rel_h, rel_w)
        return dense_loop(Frame(query, key, value, rel, None), pool=options.get("pool"))

    assert_gradients(got, want, call, list(call))


def test_the_published_update_has_the_same_gradient(backend: str, device: str) -> None:
    frames = frames_of(3, device=device)
    [*_, (_, state)] = run(frames[:2], backend, mode="paper")
    last, grads = frames[2], []
    for index, old in ((last.index, state), (None, None)):
        leaves = [x.detach().requires_grad_() for x in last[:3]]
        out, new = tokenops.delta_attention(*leaves, index, old, mode="paper", backend=backend)
        assert not any(part.requires_grad for part in new if part is not None)
        grads.append(torch.autograd.grad(out.sum(), leaves))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_the_definition_passes_gradcheck() -> None:
    query, key, value = (normal(1, 2, 8, w, dtype=torch.float64, seed=w).requires_grad_() for w in (3, 3, 2))
    rel = [normal(1, 2, 8, w, dtype=torch.float64, seed=w).requires_grad_() for w in (1, 2)]

    def run(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        key, value = (reference.pooled(x, (2, 4), (2, 2)) for x in (key, value))
        return reference.dense(DeltaAttentionProblem(query, key, value, None, None, rel_h, rel_w, 0.7, 0.0, 0, 1.0))

    assert torch.autograd.gradcheck(run, (query, key, value, *rel))


def test_gradients_flow_from_frame_to_frame_through_the_buffers(backend: str, device: str) -> None:
    """A token that did not change reaches the second frame's loss through the buffer it still stands in."""
    grid = normal(1, 1, 6, 8, device=device).requires_grad_()
    rows = normal(1, 1, 8, device=device, seed=1).requires_grad_()
    index = torch.tensor([2], device=device)
    first, state = tokenops.delta_attention(grid, grid, grid, backend=backend)
    buffer = tokenops.update_tokens(grid.squeeze(1), rows, index=index, backend=backend).unsqueeze(1)
    second, _ = tokenops.delta_attention(buffer, buffer, buffer, index, state, backend=backend)
    got = torch.autograd.grad(first.square().sum() + second.square().sum(), (grid, rows))
    exact = [x.detach().double().requires_grad_() for x in (grid, rows)]
    late = torch.cat([exact[0][:, :, :2], exact[1].unsqueeze(1), exact[0][:, :, 3:]], 2)
    total = sum(F.scaled_dot_product_attention(x, x, x).square().sum() for x in (exact[0], late))
    for a, b in zip(got, torch.autograd.grad(total, exact), strict=True):
        assert_close("gradient", a, b, torch.float32)


# the operators


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_passes_opcheck(mode: str, name: str, backend: str, device: str) -> None:
    frames, options = case(name, 2, device=device)
    [(_, state)] = run(frames[:1], backend, mode=mode, **options)
    last, pool = frames[1], options.get("pool")
    key, value, cells = last.key, last.value, last.index
    if pool:
        assert last.index is not None
        key, value = (reference.pooled(x, options["grid"], pool) for x in (key, value))
        cells = reference.pooled_index(last.index, options["grid"], pool)
    numbers = (0.3, 1e-2, 8, 0.5)
    leaves = [x.clone().requires_grad_() for x in (last.query, key, value)]
    rel = [x.clone().requires_grad_() for x in last.rel] if last.rel else [None, None]
    how = (mode == "paper", None)
    opcheck(ops.delta_attention.default, (*leaves, last.index, cells, *rel, *numbers, *how, *state, backend))
    opcheck(ops.delta_attention.default, (*leaves, None, None, *rel, *numbers, *how, *[None] * len(state), backend))
    opcheck(
        ops.delta_attention_.default,
        (last.query, key, value, last.index, cells, *(last.rel or (None, None)), *numbers, *state, backend),
    )


def test_autocast_casts_the_products(device: str) -> None:
    frames = frames_of(2, device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        [_, (out, state)] = run(frames, None)
    assert out.dtype == torch.bfloat16
    assert state.output.dtype == torch.float32
    assert_close("out", out, dense_loop(frames[1]), torch.bfloat16)


def test_double_backward_and_forward_mode_are_refused(device: str) -> None:
    x = normal(1, 1, 3, 4, device=device).requires_grad_()
    function = lambda x: tokenops.delta_attention(x, x, x)[0]  # noqa: E731
    [grad] = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (x.detach(),), (x.detach(),))


X = torch.ones(2, 3, 6, 4)
AT = torch.tensor([0])
STATE = tokenops.delta_attention(X, X, X)[1]
PAPER = tokenops.delta_attention(X, X, X, mode="paper")[1]
ERRORS: dict[str, tuple[Any, ...]] = {
    "first frame with an index": ((X, X, X, AT), {}, ValueError, "index must not be given without a state"),
    "index of another N": ((X, X, X, torch.tensor([6]), STATE), {}, ValueError, r"index must hold ids in \[0, 6\)"),
    "an id twice": ((X, X, X, torch.tensor([1, 1]), STATE), {}, ValueError, "index must not repeat an id"),
    "state of another mode": ((X, X, X, AT, PAPER), {}, ValueError, "state must be of mode 'exact', got one without key"),
    "and the other way": (
        (X, X, X, AT, STATE),
        {"mode": "paper"},
        ValueError,
        "state must be of mode 'paper', got one without probability",
    ),
    "another batch": ((X[:1], X[:1], X[:1], AT, STATE), {}, ValueError, r"state.output must be \[1, 3, 6, 4\] .*, got \[2, 3, 6, 4\]"),
    "another N": ((X[:, :, :5],) * 3 + (AT, STATE), {}, ValueError, r"state.output must be \[2, 3, 5, 4\]"),
    "another model": ((X[:, :2],) * 3 + (AT, STATE), {}, ValueError, r"state.output must be \[2, 2, 6, 4\]"),
    "another dtype": ((X.bfloat16(),) * 3 + (AT, STATE), {}, TypeError, "state.value must be torch.bfloat16 .*, got torch.float32"),
    "half-precision sums": (
        (X, X, X, AT, STATE._replace(output=STATE.output.half())),
        {},
        TypeError,
        "state.output must be torch.float32 with torch.float32 query, got torch.float16",
    ),
    "another cast": (
        (X, X, X, AT, PAPER),
        {"mode": "paper", "cast": torch.float16},
        TypeError,
        "state.value must be torch.float16 .*, got torch.float32",
    ),
    "no state": ((X, X, X, AT, (X,)), {}, TypeError, "state must be a DeltaState, got tuple"),
    "mode": ((X, X, X), {"mode": "fast"}, ValueError, "mode must be 'exact' or 'paper', got 'fast'"),
    "cast in exact": ((X, X, X), {"cast": torch.float16}, ValueError, "cast goes with mode 'paper'"),
    "guard": ((X, X, X), {"guard": 1.0}, ValueError, r"guard must be in \[0, 1\), got 1.0"),
    "refresh": ((X, X, X), {"refresh": -1}, ValueError, "refresh must not be negative, got -1"),
    "crossover": ((X, X, X), {"crossover": torch.nan}, ValueError, "crossover must not be negative, got nan"),
    "key": ((X, X[:, :, :5], X), {}, ValueError, r"key must be \[B, H, N, D\] = \[2, 3, 6, 4\], got \[2, 3, 5, 4\]"),
    "value": ((X, X, X[:1]), {}, ValueError, r"value must be \[B, H, N, Dv\] = \[2, 3, 6, 4\], got \[1, 3, 6, 4\]"),
    "pool alone": ((X, X, X), {"pool": (1, 2)}, ValueError, "pool and grid go together"),
    "grid": ((X, X, X), {"pool": (1, 2), "grid": (2, 2)}, ValueError, r"grid must hold query's N = 6 tokens, got \(2, 2\)"),
    "pool": ((X, X, X), {"pool": (2, 2), "grid": (2, 3)}, ValueError, r"pool must divide grid \(2, 3\), got \(2, 2\)"),
    "rel_pos": ((X, X, X), {"rel_pos": (X[..., :2], X)}, ValueError, "rel_pos must be for a gh x gw grid of 6 key cells, got 2 x 4"),
    "rel_h": ((X, X, X), {"rel_pos": (X[:, :2], X)}, ValueError, r"rel_pos: rel_h must be \[2, 3, 6, gh\]"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name: str) -> None:
    arguments, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        tokenops.delta_attention(*arguments, **options)
