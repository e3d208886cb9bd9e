"""Cases and peers of the room ``delta_matmul``: one frame after the other, each with tokens that changed since the one before.

A contender with a state is called on consecutive frames, so its first frames are compared with the right ones, not one call. Where a peer
computes something else (the published update keeps stale columns, a dense block knows no gates), its difference from its own definition in
float64 is what must vanish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tokenops
from tokenops.dispatch import Backend, choose, ranked
from tokenops.ops import sparse_attention
from tokenops.ops.delta_matmul import BACKENDS
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaAttentionProblem, DeltaState, GateProblem, LinearProblem, WindowState

from . import delta_matmul_block as block
from . import video
from .frames import CHECKED, Frames, Stream, from_film, judged, outputs, rotating, stateless
from .harness import DTYPES, Contender, Cost, Dense, Request, Results, Trial, bind, contenders_of_ours, seeded, variants

FILM_TOKENS = (video.SIDE // 4) ** 2  # of 4 x 4 pixels
FILM_FRAMES = 5  # there and back again: 8 frames without end
WINDOW = 7  # tokens on each side, as in Swin
NOTICED = 0.05  # of a pixel range of 2, in the mean square: a token that changed more is sent again

PUBLISHED = "buffered logits, softmax of all rows, changed columns in place; without the full-size subtraction that the published code does"
STRONGEST = "ours, on all tokens"
EAGER = "norm, difference, vector norm, topk, gather, scatter"


class Case(NamedTuple):
    name: str
    operation: str  # "attention" | "flush" | "windows" | "block" | "gate" | "linear" | "mlp"
    k: int = 768  # tokens that change in each frame
    tokens: int = 4096  # N
    channels: int = 768  # C
    heads: int = 12  # H
    outputs: int = 2304  # O, of a linear layer; the hidden channels of an mlp
    mode: str = "exact"
    in_place: bool = True
    film: bool = False  # consecutive frames of a video
    published: bool = False  # also against the published update, whose three matrices [H, N, N] take seconds
    dtype: str = "fp32"
    direction: str = "fwd"
    quick: bool = False


def _cases() -> Iterator[Case]:
    both = ["fp32 fwd"], ["bf16 fwd"]
    yield from variants(Case("video-attention", "attention", tokens=FILM_TOKENS, film=True), *both)
    yield from variants(Case("video-block", "block", tokens=FILM_TOKENS, film=True), [], ["fp32 fwd"])
    for k in (768, 256):
        attention = Case(f"attention-N4096-K{k}", "attention", k)
        yield from variants(attention._replace(published=True), *((["fp32 fwd"], []) if k == 768 else ([], ["fp32 fwd"])))
        yield from variants(attention, [], ["bf16 fwd"])
        yield from variants(attention._replace(name=f"attention-functional-N4096-K{k}", in_place=False), [], ["fp32 fwd"])
        paper = attention._replace(name=f"attention-paper-N4096-K{k}", mode="paper", published=True)
        yield from variants(paper, [], ["fp32 fwd", "bf16 fwd"])
    yield from variants(Case("attention-first-frame-N4096", "flush", 4096), [], ["fp32 fwd", "bf16 fwd"])
    yield from variants(Case("attention-scene-cut-N4096", "attention", 4096), [], ["fp32 fwd", "bf16 fwd"])
    yield from variants(Case("video-windows", "windows", tokens=FILM_TOKENS, film=True), [], ["fp32 fwd", "bf16 fwd"])
    yield from variants(Case("block-N4096-K768", "block"), *both)
    yield from variants(Case("block-N4096-K256", "block", 256), [], ["fp32 fwd", "bf16 fwd"])
    yield from variants(Case("gate-N4096-K768", "gate"), *both)
    yield from variants(Case("gate-N4096-K256", "gate", 256), [], ["fp32 fwd"])
    yield from variants(Case("gate-functional-N4096-K768", "gate", in_place=False), [], ["fp32 fwd"])
    for k in (64, 256, 1536, 2304, 3072, 4096):
        yield from variants(Case(f"linear-N4096-K{k}", "linear", k), [], ["fp32 fwd"])
    yield from variants(Case("linear-N4096-K768", "linear"), *both)
    for k in (256, 768, 2304):
        yield from variants(Case(f"mlp-N4096-K{k}", "mlp", k, outputs=3072), [], ["fp32 fwd"])
    yield from variants(Case("linear-compact-N4096-K768", "linear", in_place=False), ["fp32 fwd+bwd"], ["fp32 fwd"])


CASES: tuple[Case, ...] = tuple(_cases())


def prepare(case: Case, request: Request) -> Trial:
    trials = {"attention": _attention, "flush": _attention, "windows": _windows, "block": _block, "gate": _gate}
    trial = trials.get(case.operation, _linear if case.in_place else _compact)
    return trial(case, request)


def _frame_names() -> list[str]:
    return [f"frame {at + 1}" for at in range(CHECKED)]


def _film(case: Case, request: Request) -> Tensor:  # [FILM_FRAMES, N, pixel values]
    """Patches of consecutive frames, from the middle of the video."""
    pictures = request.frames()
    first = (len(pictures) - FILM_FRAMES) // 2
    return video.patchify(pictures[None, first : first + FILM_FRAMES], video.SIDE // math.isqrt(case.tokens))[0]


def _sent(film: Tensor) -> Tensor:
    """The same with every token as it was last sent, which it is when it changed enough since then."""
    sent: list[Tensor] = []
    threshold = NOTICED * film.shape[2] ** 0.5
    for frame in film:
        sent.append(tokenops.delta_gate(frame[None], sent[-1] if sent else None, threshold=threshold, backend="reference").reference)
    return torch.cat(sent)


def _projected(film: Tensor, width: int) -> list[Tensor]:  # of each frame [1, N, width]
    """What a linear layer with random weights makes of the tokens."""
    [rows] = video.project(film.flatten(0, 1)[None], [width], torch.Generator().manual_seed(0))
    # without the class token
    return list(rows[0, 1:].unflatten(0, (len(film), 1, -1)).unbind(0))


def _serve(operation: str, problem: Any) -> Callable[[str | None], Backend]:
    return lambda backend: choose(operation, BACKENDS, backend, problem)


def _objections(*problems: Any) -> dict[str, list[str]]:
    """Of all of them, each once. Backends in the order of the first one's preference."""
    backends = ranked(BACKENDS, problems[0])
    return {backend.name: list(dict.fromkeys(reason for p in problems for reason in backend.objections(p))) for backend in backends}


def example_objections(device: str) -> dict[str, list[str]]:
    """Why each backend would refuse gates, layers and attention on float32 tokens on ``device``; an empty list: it would serve."""
    example = reference.example_inputs(device=device)
    x, index = example["x"], example["index"]
    attention = _attention_problem([x[:, None]] * 3)
    return _objections(_gate_problem(x, example["reference"]), _linear_problem(x, index, example["weight"]), attention)


def _gate_problem(x: Tensor, old: Tensor, skip: Tensor | None = None) -> GateProblem:
    return GateProblem(x, skip, old, None, None, 1e-6, None, None, 2.0, False)


def _linear_problem(x: Tensor, index: Tensor, weight: Tensor, second: Tensor | None = None) -> LinearProblem:
    return LinearProblem(x, index, weight, None, None, None, 1e-6, "none" if second is None else "gelu", second, None)


def _attention_problem(grids: Sequence[Tensor], index: Tensor | None = None) -> DeltaAttentionProblem:
    return DeltaAttentionProblem(*grids, index, index, None, None, grids[0].shape[-1] ** -0.5, 0.1, 128, 0.5)


# attention


def _attention_frames(case: Case, request: Request) -> Frames:
    width = case.channels // case.heads
    if case.film:
        films = from_film([(row,) for row in _projected(_sent(_film(case, request)), 3 * case.channels)])
        split = (row.unflatten(2, (3, case.heads, width)).permute(2, 0, 3, 1, 4).contiguous() for [row] in films.grids)
        films = films._replace(grids=[grids.unbind(0) for grids in split])
    else:
        films = rotating([(1, case.heads, case.tokens, width)] * 3, case.k)
    return films.to(request.device, DTYPES[case.dtype])


def _attention(case: Case, request: Request) -> Trial:
    frames = _attention_frames(case, request)
    stateful = case.operation == "attention"

    def run(backend: str | None) -> Stream:
        def start() -> DeltaState:
            return tokenops.delta_attention(*frames.last, mode=case.mode, backend=backend)[1]

        def in_place(state: DeltaState, at: int) -> tuple[Results, DeltaState]:
            return (tokenops.delta_attention_(*frames.grids[at], frames.index[at], state, backend=backend),), state

        def functional(state: DeltaState, at: int) -> tuple[Results, DeltaState]:
            out, state = tokenops.delta_attention(*frames.grids[at], frames.index[at], state, mode=case.mode, backend=backend)
            return (out,), state

        if not stateful:
            return stateless(frames, lambda *grids: tokenops.delta_attention(*grids, mode=case.mode, backend=backend)[:1])
        return Stream(len(frames.grids), start, in_place if case.in_place else functional)

    right = {
        "exact": cache(lambda: [block.exact_attention(*(x.double() for x in grids)) for grids in frames.grids[:CHECKED]]),
        "paper": cache(lambda: _exact_published(frames)),
    }

    def by_definition(own: str, results: list[Results]) -> Results:
        """As the case's mode would have them, if they are what their own mode says."""
        pairs = zip(outputs(results), right[own](), right[case.mode](), strict=True)
        return tuple(want + (out - mine) for out, mine, want in pairs)

    problem = _attention_problem(frames.grids[0], frames.index[0] if stateful else None)
    problems = [problem._replace(rows=index, cells=index) if stateful else problem for index in frames.index]
    state = _state_of(problem, case.mode)
    flops = [reference.attention_flops(each, case.mode == "paper") for each in problems]
    counts = ", ".join(map(str, frames.counts if case.film else frames.counts[:1]))
    exact = [
        Contender("SDPA", stateless(frames, lambda q, k, v: (F.scaled_dot_product_attention(q, k, v),))),
        Contender("tokenops, dense", stateless(frames, lambda q, k, v: (tokenops.sparse_attention(q, k, v),)), note=STRONGEST),
    ]
    contenders = [judged(ours, outputs) for ours in contenders_of_ours(request, run, _serve("delta_attention", problem))]
    contenders += [judged(peer, partial(by_definition, "exact")) for peer in exact]
    if case.published:
        published = Stream(len(frames.grids), partial(_published_start, frames), partial(_published_step, frames))
        slow = () if request.slow_peers else ["it takes seconds: use --preset full"]
        contenders.append(judged(Contender("published update", published, slow, note=PUBLISHED), partial(by_definition, "paper")))
    return Trial(
        contenders=contenders,
        expected=lambda: tuple(right[case.mode]()),
        names=_frame_names(),
        cost=Cost(sum(flops) // len(flops), sum(reference.attention_bytes(each, state) for each in problems) // len(problems)),
        backends=_objections(problem),
        remark=f"{counts} of {case.tokens} tokens change; the state holds {_in_grids(reference.state_bytes(state), frames.last[0])}",
        dense=Dense(("SDPA", "tokenops, dense"), reference.attention_flops(problem._replace(rows=None, cells=None), False)),
    )


def _in_grids(size: int, grid: Tensor) -> str:
    return f"{size * 1e-6:.1f} MB, {size / grid.nbytes:.1f} times a grid of N x C"


def _state_of(problem: DeltaAttentionProblem, mode: str) -> DeltaState:
    """Its shapes and dtypes, without contents."""
    with FakeTensorMode():
        grids = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in problem[:3]]
        return tokenops.delta_attention(*grids, mode=mode)[1]


def _exact_published(frames: Frames) -> list[Tensor]:
    """What the published update means, in float64: a product with columns of the attention matrix as old as their tokens."""
    heads = []
    for head in range(frames.last[0].shape[1]):

        def attention(grids: Sequence[Tensor], head: int = head) -> Tensor:
            query, key = (x[0, head].double() for x in grids[:2])
            return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1)

        kept, outs = attention(frames.last), []
        for grids, index in list(zip(frames.grids, frames.index, strict=True))[:CHECKED]:
            ids = index[0, index[0] >= 0].long()
            kept.index_copy_(1, ids, attention(grids)[:, ids])
            outs.append(kept @ grids[2][0, head].double())
        heads.append(torch.stack(outs))
    return list(torch.stack(heads, 1)[:, None].unbind(0))


class Published(NamedTuple):
    logits: Tensor  # [1, H, N, N]
    attention: Tensor  # [1, H, N, N], of this frame; memory that is used again
    kept: Tensor  # [1, H, N, N], columns of when their token last changed
    value: Tensor  # [1, H, N, D]
    out: Tensor  # [1, H, N, D]


def _published_start(frames: Frames) -> Published:
    query, key, value = frames.last
    logits = (query * query.shape[-1] ** -0.5) @ key.mT
    attention = torch.softmax(logits, -1)
    return Published(logits, attention, attention.clone(), value.clone(), attention @ value)


def _published_step(frames: Frames, state: Published, at: int) -> tuple[Results, Published]:
    query, key, value = frames.grids[at]
    index = frames.index[at][0]
    ids = index[index >= 0].long()
    scaled = query * query.shape[-1] ** -0.5
    state.logits.index_copy_(2, ids, scaled.index_select(2, ids) @ key.mT)
    state.logits.index_copy_(3, ids, scaled @ key.index_select(2, ids).mT)
    torch.softmax(state.logits, -1, out=state.attention)
    new = state.attention.index_select(3, ids)
    change = new - state.kept.index_select(3, ids)
    state.kept.index_copy_(3, ids, new)
    new_value = value.index_select(2, ids)
    value_change = new_value - state.value.index_select(2, ids)
    state.value.index_copy_(2, ids, new_value)
    state.out.add_(new @ value_change).add_(change @ (new_value - value_change))
    return (state.out,), state


def _windows(case: Case, request: Request) -> Trial:
    """Attention within windows, of which those without a changed token are not computed."""
    frames = _attention_frames(case, request)
    side = math.isqrt(case.tokens)
    options: dict[str, Any] = {"grid": (side, side), "window": (WINDOW, WINDOW)}

    def run(backend: str | None) -> Stream:
        def step(state: WindowState, at: int) -> tuple[Results, WindowState]:
            return (tokenops.delta_window_attention_(*frames.grids[at], frames.index[at], state, **options, backend=backend),), state

        start = partial(tokenops.delta_window_attention, *frames.last, **options, backend=backend)
        return Stream(len(frames.grids), lambda: start()[1], step)

    def windowed(x: Tensor) -> Tensor:  # [1, H, N, D] -> [windows, H, WINDOW^2, D]
        cut = x[0].unflatten(1, (side // WINDOW, WINDOW, side // WINDOW, WINDOW))
        return cut.permute(1, 3, 0, 2, 4, 5).flatten(3, 4).flatten(0, 1)

    def sdpa(*grids: Tensor) -> Results:
        out = F.scaled_dot_product_attention(*(windowed(x) for x in grids))
        on_grid = out.unflatten(2, (WINDOW, WINDOW)).unflatten(0, (side // WINDOW, side // WINDOW))
        return (on_grid.permute(2, 0, 3, 1, 4, 5).flatten(1, 4)[None],)

    dirty = [len({(at // side // WINDOW, at % side // WINDOW) for at in index[0].tolist() if at >= 0}) for index in frames.index]
    count = (side // WINDOW) ** 2
    flops = 4 * frames.last[0].numel() * WINDOW**2
    rows = [x.transpose(1, 2).flatten(0, 1) for x in frames.last]
    bounds = torch.arange(count + 1, dtype=torch.int32, device=request.device) * WINDOW**2
    problem, *_ = sparse_attention.as_packed_problem(*rows, bounds, bounds)
    contenders = [
        *contenders_of_ours(request, run, lambda backend: choose("sparse_attention", sparse_attention.BACKENDS, backend, problem)),
        Contender("SDPA", stateless(frames, sdpa), note="on all windows, cut out and put back"),
        Contender(
            "tokenops, dense", stateless(frames, lambda *grids: tokenops.delta_window_attention(*grids, **options)[:1]), note=STRONGEST
        ),
    ]
    share = sum(dirty) / (count * len(dirty))
    return Trial(
        contenders=[judged(contender, outputs) for contender in contenders],
        expected=lambda: tuple(out for grids in frames.grids[:CHECKED] for out in sdpa(*(x.double() for x in grids))),
        names=_frame_names(),
        cost=Cost(round(share * flops), round(share * 4 * frames.last[0].nbytes)),
        backends={backend.name: backend.objections(problem) for backend in ranked(sparse_attention.BACKENDS, problem)},
        remark=f"{', '.join(map(str, dirty))} of {count} windows hold one of {', '.join(map(str, frames.counts))} changed tokens",
        dense=Dense(("SDPA", "tokenops, dense"), flops),
    )


# a whole block


def _block(case: Case, request: Request) -> Trial:
    k = case.k
    if case.film:
        # as many as really change; which ones, each gate decides by what it sees
        counts = _attention_frames(case, request).counts
        k = sum(counts) // len(counts)
        frames = from_film([(row,) for row in _projected(_film(case, request), case.channels)])
    else:
        frames = rotating([(1, case.tokens, case.channels)], k)
    frames = frames.to(request.device, DTYPES[case.dtype])
    before = frames.last[0]
    weights, errors = block.draw_weights(case.channels, before), []

    def run(backend: str | None) -> Stream:
        return Stream(
            len(frames.grids),
            lambda: block.start(weights, case.heads, before, backend),
            lambda state, at: block.step(weights, case.heads, k, frames.grids[at][0], state, backend),
        )

    right = cache(lambda: block.exact_dense(weights, case.heads, frames))
    all_right = torch.ones(CHECKED, 3, case.tokens, dtype=torch.float64)

    def by_definition(results: list[Results]) -> Results:
        """What the dense block gives, if this is what the block gives with these choices; and how right those are."""
        own = block.replay(weights, case.heads, k, frames, [lists for _, *lists in results])
        errors[:] = [((out - want).norm() / want.norm()).item() for (out, *_), want in zip(results, right(), strict=True)]
        outs = (want + (out - mine) for (out, *_), mine, want in zip(results, own.outs, right(), strict=True))
        return (*outs, own.choices)

    dense = stateless(frames, lambda x: (block.dense(weights, case.heads, x),))
    index = torch.arange(k, dtype=torch.int32, device=request.device)[None]
    problem = _attention_problem(before.unflatten(2, (case.heads, -1)).transpose(1, 2).expand(3, -1, -1, -1, -1).unbind(0), index)
    state = _state_of(problem, "exact")
    size = block.state_bytes(state, before)
    words = f"{k} of {case.tokens} tokens per gate and frame; the state holds {_in_grids(size, before)}"
    if case.film:
        words = f"{', '.join(map(str, counts))} tokens change; {words}"
    return Trial(
        contenders=[
            *(judged(ours, by_definition) for ours in contenders_of_ours(request, run, _serve("delta_attention", problem))),
            judged(Contender("dense block", dense, note="with SDPA"), lambda results: (*outputs(results), all_right)),
        ],
        expected=lambda: (*right(), all_right),
        names=(*_frame_names(), "choices"),
        cost=Cost(block.flops(problem, case.channels, k), block.bytes(problem, weights, state, before, k)),
        backends=_objections(problem, _gate_problem(before, before), _linear_problem(before, index, weights.qkv[0])),
        remark=lambda: f"{words}; relative difference from a dense block: {', '.join(f'{error:.2g}' for error in errors)}",
        dense=Dense(("dense block",), block.flops(problem._replace(rows=None, cells=None), case.channels, case.tokens)),
    )


# gates


class Gated(NamedTuple):
    index: Tensor  # [1, K]
    values: Tensor  # [1, K, C]
    change: Tensor  # [1, K, C]
    reference: Tensor  # [1, N, C]
    total: Tensor  # [1, N, C]


def _gate(case: Case, request: Request) -> Trial:
    shape = (1, case.tokens, case.channels)
    frames = rotating([shape, shape], case.k).to(request.device, DTYPES[case.dtype])
    norm = tuple(seeded(1 + at, case.channels).to(frames.last[0]) for at in range(2))
    before = F.layer_norm(sum(frames.last), shape[2:], *norm, block.EPS)
    function = tokenops.delta_gate_ if case.in_place else tokenops.delta_gate

    def run(backend: str | None) -> Stream:
        def step(old: Tensor, at: int) -> tuple[Results, Tensor]:
            x, skip = frames.grids[at]
            gate = function(x, old, k=case.k, skip=skip, norm=norm, norm_eps=block.EPS, backend=backend)
            return Gated(gate.index, gate.values, gate.delta, gate.reference, gate.total), gate.reference

        return Stream(len(frames.grids), before.clone, step)

    def eager(old: Tensor, at: int) -> tuple[Results, Tensor]:
        results = _torch_gate(*frames.grids[at], old, norm, case.k, case.in_place)
        return results, results.reference

    right = cache(lambda: _exact_gates(frames, before, norm, case.k))

    def by_definition(results: list[Results]) -> Results:
        """What the right choices give, if this is what these choices give; and how right they are."""
        got, flat = [Gated._make(frame) for frame in results], []
        own = _exact_gates(frames, before, norm, case.k, [gated.index for gated in got])
        for gated, mine, want in zip(got, own, right(), strict=True):
            order = gated.index.argsort(-1)[..., None].expand_as(gated.values)
            ours = gated.values.gather(1, order), gated.change.gather(1, order), gated.reference, gated.total
            flat += [mine.index, *(b + (x - a) for x, a, b in zip(ours, mine[1:], want[1:], strict=True))]
        return tuple(flat)

    problem = _gate_problem(frames.last[0], before, frames.last[1])
    peer = Contender("eager", Stream(len(frames.grids), before.clone, eager), note=EAGER)
    return Trial(
        contenders=[judged(c, by_definition) for c in (*contenders_of_ours(request, run, _serve("delta_gate", problem)), peer)],
        expected=lambda: tuple(part for gated in right() for part in gated),
        names=[f"{part} of {frame}" for frame in _frame_names() for part in ("choices", "values", "change", "reference", "total")],
        # a sum, a normalisation, a difference and a norm: some ten operations for each number
        cost=Cost(10 * before.numel(), reference.gate_bytes(problem, case.k)),
        backends=_objections(problem),
    )


def _torch_gate(x: Tensor, skip: Tensor, old: Tensor, norm: tuple[Tensor, ...], k: int, in_place: bool) -> Gated:
    total = x + skip
    current = F.layer_norm(total, total.shape[2:], *norm, block.EPS)
    change = current - old
    index = change.norm(dim=-1).topk(k, sorted=False).indices
    rows = index[..., None].expand(-1, -1, x.shape[2])
    values = current.gather(1, rows)
    new = old.scatter_(1, rows, values) if in_place else old.scatter(1, rows, values)
    return Gated(index, values, change.gather(1, rows), new, total)


def _exact_gates(frames: Frames, old: Tensor, norm: tuple[Tensor, ...], k: int, lists: Sequence[Tensor] | None = None) -> list[Gated]:
    """The first frames in float64, with the right choices or somebody's; in place of the ids how right they are, for each token."""
    old, results = old.double(), []
    for at in range(CHECKED if lists is None else len(lists)):
        x, skip = (grid.double() for grid in frames.grids[at])
        total = x + skip
        current = F.layer_norm(total, total.shape[2:], *(part.double() for part in norm), block.EPS)
        change = current - old
        ids = change.norm(dim=-1).topk(k).indices if lists is None else lists[at].long()
        index = ids.sort(-1).values[0]
        old = old.index_copy(1, index, current[:, index])
        results.append(Gated(block.rightness(change, ids, k), current[:, index], change[:, index], old, total))
    return results


# layers on listed rows


def _linear(case: Case, request: Request) -> Trial:
    """The layers' results for all tokens are kept; the rows of tokens that change are computed and written over."""
    frames = rotating([(1, case.tokens, case.channels)], case.k).to(request.device, DTYPES[case.dtype])
    before = frames.last[0]
    shapes = [(case.outputs, case.channels)] + ([(case.channels, case.outputs)] if case.operation == "mlp" else [])
    layers = [(seeded(at, *shape) * shape[1] ** -0.5, 0.05 * seeded(9 + at, shape[0])) for at, shape in enumerate(shapes)]
    layers = [(weight.to(before), bias.to(before)) for weight, bias in layers]
    function = tokenops.gathered_linear if len(layers) == 1 else tokenops.gathered_mlp
    problem = _linear_problem(before, frames.index[0], layers[0][0], layers[1][0] if len(layers) == 2 else None)
    given = [part for layer in layers for part in layer]

    def run(backend: str | None) -> Stream:
        def step(grid: Tensor, at: int) -> tuple[Results, Tensor]:
            return (function(frames.grids[at][0], *given, index=frames.index[at], out=grid, backend=backend),), grid

        return Stream(len(frames.grids), lambda: _through(before, layers), step)

    def gathered(grid: Tensor, at: int) -> tuple[Results, Tensor]:
        ids = frames.index[at][0]
        return (grid.index_copy_(1, ids.long(), _through(frames.grids[at][0].index_select(1, ids), layers)),), grid

    by_hand = Stream(len(frames.grids), lambda: _through(before, layers), gathered)
    contenders = [
        *contenders_of_ours(request, run, _serve("gathered_linear", problem)),
        Contender("gather, linear, copy", by_hand, note="index_select, F.linear, index_copy_"),
        Contender("dense", stateless(frames, lambda x: (_through(x, layers),)), note="F.linear on all tokens"),
    ]
    exact_layers = [(weight.double(), bias.double()) for weight, bias in layers]
    flops = reference.linear_flops(problem)
    return Trial(
        contenders=[judged(contender, outputs) for contender in contenders],
        expected=lambda: tuple(_through(x.double(), exact_layers) for [x] in frames.grids[:CHECKED]),
        names=_frame_names(),
        cost=Cost(flops, reference.linear_bytes(problem)),
        backends=_objections(problem),
        dense=Dense(("dense",), flops // case.k * case.tokens),
    )


def _through(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    x = F.linear(x, *layers[0])
    return F.linear(F.gelu(x), *layers[1]) if len(layers) == 2 else x


def _compact(case: Case, request: Request) -> Trial:
    """A layer on listed rows as a model trains it: its result has these rows only."""
    inputs = reference.example_inputs(1, case.tokens, case.channels, case.k)
    x, index = inputs["x"].to(request.device, DTYPES[case.dtype]), inputs["index"].to(request.device)
    weight = (seeded(1, case.outputs, case.channels) * case.channels**-0.5).to(x)
    bias, grad = 0.05 * seeded(2, case.outputs).to(x), seeded(3, 1, case.k, case.outputs).to(x)
    differentiate, ids = case.direction == "fwd+bwd", index[0]

    def call(backend: str | None, *given: Tensor, grad: Tensor = grad) -> Callable[[], Results]:
        return bind(partial(tokenops.gathered_linear, index=index, backend=backend), given, grad, differentiate)

    def gathered(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x.index_select(1, ids), weight, bias)

    given, problem = (x, weight, bias), _linear_problem(x, index, weight)
    exact = [part.double() for part in given]
    operation = "gathered_linear_backward" if differentiate else "gathered_linear"
    flops = reference.linear_flops(problem) + (reference.linear_flops(problem, backward=True) if differentiate else 0)
    return Trial(
        contenders=[
            *contenders_of_ours(request, lambda backend: call(backend, *given), _serve(operation, problem)),
            Contender("gather, linear", bind(gathered, given, grad, differentiate), note="index_select, F.linear"),
        ],
        expected=call("reference", *exact, grad=grad.double()),
        names=("rows", "gradient of tokens", "gradient of weight", "gradient of bias")[: 4 if differentiate else 1],
        cost=Cost(flops, reference.linear_bytes(problem) * (1 + differentiate)),
        backends=_objections(problem),
    )
