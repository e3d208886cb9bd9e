"""Cases and peers of the room ``token_select``: choosing tokens by score, one halting step, packing the chosen rows and putting them back.

Equal scores may be chosen differently, so lists are compared by the scores they hold. Peers with another layout (padded instead of packed)
are compared after the layout was changed, which is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenops
from tokenops.dispatch import Backend, choose, ranked
from tokenops.ops.token_select.backends import BACKENDS
from tokenops.types import HaltState

from . import video
from .harness import DTYPES, Contender, Cost, Request, Results, Trial, bind, contenders_of_ours, seeded, variants

# of the halting gate; with these about half of the tokens halt in the first LAYERS layers
GATE = {"scale": 10.0, "center": 10.0, "eps": 0.01}
LAYERS = 3

EAGER = "the definition in torch operations; without gradients it updates a state in place as ours does, each call from the same start"
GRADIENTS = ("cum", "remain", "rho", "out", *(f"gradient of {name}" for name in ("x", "cum", "remain", "rho", "out")))


class Case(NamedTuple):
    name: str
    operation: str  # "top-k" | "threshold" | "halt" | "pack" | "unpack"
    batch: int
    tokens: int  # N
    kept: int | None = None  # K, of a top-k
    channels: int = 0  # C
    output: str = "all"  # of a halting step: "all" tokens or the "class" token
    packed: bool = False  # a halting step on the tokens that are still active
    film: bool = False  # scores or kept tokens by the frame difference of a video
    dtype: str = "fp32"
    direction: str = "fwd"
    quick: bool = False


def _cases() -> Iterator[Case]:
    yield from variants(Case("video-top-k-B8-N1569-K392", "top-k", 8, video.TOKENS, 392, film=True), ["fp32 fwd"])
    for tokens in (4096, 16384, 65536):
        yield from variants(Case(f"top-k-B4-N{tokens}-K{tokens // 4}", "top-k", 4, tokens, tokens // 4), ["fp32 fwd"], ["bf16 fwd"])
    yield from variants(Case("threshold-B4-N16384", "threshold", 4, 16384), ["fp32 fwd"], ["bf16 fwd"])
    halt = Case("halt-all-B8-N1105-C384", "halt", 8, 1105, channels=384)
    yield from variants(halt, ["fp32 fwd", "fp32 fwd+bwd"], ["bf16 fwd", "bf16 fwd+bwd"])
    yield from variants(halt._replace(name="halt-class-B8-N1105-C384", output="class"), ["fp32 fwd"], ["fp32 fwd+bwd"])
    packed = halt._replace(name="halt-packed-B8-N1105-C384", packed=True)
    yield from variants(packed, [], ["fp32 fwd", "bf16 fwd"])
    yield from variants(packed._replace(name="halt-packed-class-B8-N1105-C384", output="class"), ["fp32 fwd"], ["bf16 fwd"])
    pack = Case("video-pack-B8-N1569-C384", "pack", 8, video.TOKENS, channels=384, film=True)
    yield from variants(pack, ["fp32 fwd"], ["bf16 fwd", "fp32 fwd+bwd"])
    unpack = pack._replace(name="video-unpack-B8-N1569-C384", operation="unpack")
    yield from variants(unpack, ["fp32 fwd"], ["bf16 fwd", "fp32 fwd+bwd"])


CASES: tuple[Case, ...] = tuple(_cases())


def prepare(case: Case, request: Request) -> Trial:
    if case.operation in ("top-k", "threshold"):
        return _select(case, request)
    if case.operation == "halt":
        return _halt(case, request)
    return _pack(case, request) if case.operation == "pack" else _unpack(case, request)


def _serve(operation: str, rows: Tensor) -> Callable[[str | None], Backend]:
    """Who serves an operation on these rows, as a function of the backend asked for."""
    return lambda backend: choose(operation, BACKENDS, backend, rows)


def _objections(rows: Tensor) -> dict[str, list[str]]:
    return {backend.name: backend.objections(rows) for backend in ranked(BACKENDS, rows)}


def example_objections(device: str) -> dict[str, list[str]]:
    """Why each backend would refuse plain float32 tokens on ``device``; an empty list: it would serve them."""
    return _objections(torch.zeros(2, 197, 384, device=device))


# choosing


def _select(case: Case, request: Request) -> Trial:
    score = request.clips(case.batch).change if case.film else seeded(0, case.batch, case.tokens)
    score = score.to(request.device, DTYPES[case.dtype])
    limit: dict[str, Any] = {"threshold": 0.5} if case.kept is None else {"k": case.kept}

    def run(backend: str | None) -> Callable[[], Results]:
        return lambda: tuple(tokenops.select_tokens(score, **limit, backend=backend))

    def compared(results: Results) -> Results:
        return _chosen(score, results[0])

    peers = _threshold_peers(score, **limit) if case.kept is None else _top_k_peers(score, **limit)
    slots = case.tokens if case.kept is None else case.kept
    return Trial(
        contenders=[
            contender._replace(canonical=compared)
            for contender in (*contenders_of_ours(request, run, _serve("select_tokens", score)), *peers)
        ],
        expected=lambda: _chosen(score, tokenops.select_tokens(score.double(), **limit, backend="reference").index),
        names=("chosen scores", "ascending", "count"),
        # a comparison for each score at least
        cost=Cost(score.numel(), score.nbytes + 4 * case.batch * (slots + 1)),
        backends=_objections(score),
    )


def _chosen(score: Tensor, index: Tensor) -> Results:
    """What makes a list right: the scores in it, descending; that its ids ascend with the empty slots at the end; how many it has."""
    filled = index >= 0
    scores = score.double().gather(1, index.long().clamp(min=0)).masked_fill(~filled, -torch.inf)
    ascending = (index[:, 1:] > index[:, :-1]) | ~filled[:, 1:]
    return scores.sort(-1, descending=True).values, ascending.all(-1), filled.sum(-1)


def _top_k_peers(score: Tensor, k: int) -> Iterator[Contender]:
    yield Contender("topk + sort", lambda: (score.topk(k, sorted=False).indices.sort().values,))
    yield Contender("sort + sort", lambda: (score.argsort(descending=True)[:, :k].sort().values,))


def _threshold_peers(score: Tensor, threshold: float) -> Iterator[Contender]:
    rows = score.shape[1]
    ids = torch.arange(rows, device=score.device)

    def by_sort() -> Results:
        index = torch.where(score > threshold, ids, rows).sort().values
        return (index.masked_fill_(index == rows, -1),)

    def by_nonzero() -> Results:
        passes = score > threshold
        sample, token = passes.nonzero(as_tuple=True)
        index = torch.full_like(score, -1, dtype=torch.int64)
        index[sample, passes.cumsum(1)[sample, token] - 1] = token
        return (index,)

    yield Contender("where + sort", by_sort)
    yield Contender("nonzero", by_nonzero)


# halting


class Step(NamedTuple):
    """Where a model is when a halting step begins."""

    x: Tensor  # [B, N, C], or [T, C] with cu_seqlens
    state: HaltState
    cu_seqlens: Tensor | None  # [B + 1] int32


def _halt(case: Case, request: Request) -> Trial:
    step = _halting_step(case, request)
    given = {**GATE, "cu_seqlens": step.cu_seqlens}
    differentiate = case.direction == "fwd+bwd"
    grads = [seeded(at, *part.shape).to(part) for at, part in enumerate(_differentiable(step.state))]

    def bound(call: Callable[[Tensor, HaltState], HaltState], step: Step, grads: Sequence[Tensor]) -> Callable[[], Results]:
        def from_parts(x: Tensor, *parts: Tensor) -> Results:
            cum, remain, rho, out = parts
            return _differentiable(call(x, step.state._replace(cum=cum, remain=remain, rho=rho, out=out)))

        if differentiate:
            return bind(from_parts, (step.x, *_differentiable(step.state)), grads, True)
        return lambda: tuple(call(step.x, step.state))

    def ours(backend: str | None) -> Callable[[], Results]:
        if differentiate:
            return bound(partial(tokenops.halt_tokens, **given, backend=backend), step, grads)
        return _in_place(partial(tokenops.halt_tokens_, **given, backend=backend), step)

    def peers() -> Iterator[Contender]:
        if differentiate:
            yield Contender("eager", bound(partial(_eager_step, step, _add), step, grads), note=EAGER)
            return
        yield Contender("eager", _in_place(partial(_eager_step, step, _add_), step), note=EAGER)
        yield Contender("eager, addcmul", _in_place(partial(_eager_step, step, _addcmul_), step), note="eager without a temporary grid")
        if not case.packed:
            whole = _with_whole_out(step)
            yield Contender(
                "released",
                lambda: _released_step(whole.x, whole.state),
                canonical=lambda results: (*results[:5], results[5] if case.output == "all" else results[5][:, 0]),
                note="as the released model does it: every sum over all tokens, a grid of each",
            )

    def exact(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    right = Step(step.x.double(), HaltState(*map(exact, step.state)), step.cu_seqlens)
    vectors = sum(part.nbytes for part in step.state[:5])
    rows = step.state.out.numel()
    # the weighted rows, one number of each other row, and the state there and back
    moved = 2 * (vectors + step.state.out.nbytes) + rows * step.x.element_size() + step.state.cum.numel() * step.x.element_size()
    return Trial(
        contenders=[*contenders_of_ours(request, ours, _serve("halt_tokens", step.x)), *peers()],
        expected=bound(partial(tokenops.halt_tokens, **given, backend="reference"), right, [grad.double() for grad in grads]),
        names=GRADIENTS if differentiate else HaltState._fields,
        cost=Cost(2 * rows * (1 + differentiate), moved * (1 + differentiate)),
        backends=_objections(step.x),
        remark=f"{int(step.state.active.sum())} of {step.state.active.numel()} tokens are active",
    )


def _differentiable(state: HaltState) -> Results:
    return state.cum, state.remain, state.rho, state.out


def _halting_step(case: Case, request: Request) -> Step:
    """The state after LAYERS layers of random tokens, and the tokens of the next layer; of a packed call, of the active ones only."""
    state = None
    for layer in range(LAYERS + 1):
        x = seeded(layer, case.batch, case.tokens, case.channels)
        # the gate reads channel 0; no class token halts before the step that is timed
        x[..., 0] = 0.9 + 0.15 * x[..., 0]
        if layer < LAYERS:
            x[:, 0, 0] = 0
            state = tokenops.halt_tokens(x, state, **GATE, output=case.output, backend="reference")
    assert state is not None
    x, device = x.to(DTYPES[case.dtype]), request.device
    if not case.packed:
        return Step(x.to(device), HaltState(*(part.to(device) for part in state)), None)
    active = state.active
    vectors = [part[active].to(device) for part in state[:5]]
    out = state.out[active] if case.output == "all" else state.out
    bounds = F.pad(active.sum(1).cumsum(0), (1, 0)).int()
    return Step(x[active].to(device), HaltState(*vectors, out.to(device)), bounds.to(device))


def _in_place(call: Callable[[Tensor, HaltState], HaltState], step: Step) -> Callable[[], Results]:
    """A call that updates a state of its own. It halts the same tokens each time, because it begins with the vectors as they were; out,
    which decides nothing, goes on growing.
    """
    state = HaltState(*(part.clone() for part in step.state))

    def run() -> Results:
        for vector, start in zip(state[:5], step.state[:5], strict=True):
            vector.copy_(start)
        return tuple(call(step.x, state))

    return run


def _add(out: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return out + rows * weight


def _add_(out: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    out += rows * weight
    return out


def _addcmul_(out: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return out.addcmul_(rows.to(out.dtype), weight)


def _eager_step(step: Step, accumulate: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, state: HaltState) -> HaltState:
    cum, remain, active, rho, counter, out = state
    limit = 1 - GATE["eps"]
    h = torch.sigmoid(GATE["scale"] * x[..., 0].float() - GATE["center"])
    cum = cum + h
    reached, going = (cum > limit) & active, cum < limit
    weight = active * torch.where(reached, remain, torch.where(going, h, 0))
    rows, weights = x, weight
    if out.dim() < x.dim():
        rows, weights = x[:, 0], weight[:, 0]
    elif step.cu_seqlens is not None and len(out) < len(x):
        rows, weights = x[step.cu_seqlens[:-1]], weight[step.cu_seqlens[:-1]]
    out = accumulate(out, rows, weights[..., None])
    return HaltState(cum, remain - h * going, going, rho + active + remain * reached, counter + going, out)


def _with_whole_out(step: Step) -> Step:
    """The released model sums up the output of every token, wanted or not."""
    state = step.state
    if state.out.dim() == 3:
        return step
    out = state.out.new_zeros(step.x.shape)
    out[:, 0] = state.out
    return step._replace(state=state._replace(out=out))


def _released_step(x: Tensor, state: HaltState) -> Results:
    cum, remain, active, rho, counter, out = state
    limit = 1 - GATE["eps"]
    mask = active.float()
    rows = x.clone() * mask[..., None]
    h = torch.sigmoid(GATE["scale"] * x[..., 0].float() - GATE["center"])
    cum, rho = cum + h, rho + mask
    reached = (cum > limit).float() * mask
    last = rows * remain[..., None] * reached[..., None]
    rho = rho + remain * reached
    going = (cum < limit).float()
    share = rows * h[..., None] * going[..., None]
    return cum, remain - going * h, cum < limit, rho, counter + going, out + last + share


# packing and its way back


class Lists(NamedTuple):
    """The tokens of a film that changed, in every form that somebody may want them in."""

    index: Tensor  # [B, K] int32, -1 at the end of short lists
    filled: Tensor  # [B, K] bool
    mask: Tensor  # [B, N] bool
    first: Tensor  # [B, 1] int64, row 0 of each sample among all rows
    cu_seqlens: Tensor  # [B + 1] int32

    @property
    def total(self) -> int:
        return int(self.cu_seqlens[-1])


def _lists(case: Case, request: Request) -> Lists:
    index = video.changed_more_than(request.clips(case.batch).change, video.CHANGE).to(request.device)
    first = case.tokens * torch.arange(case.batch, device=index.device)[:, None]
    return Lists(index, index >= 0, tokenops.mask_from_index(index, case.tokens), first, _bounds(index >= 0))


def _bounds(kept: Tensor) -> Tensor:
    return F.pad(kept.sum(1).cumsum(0), (1, 0)).int()


def _pack(case: Case, request: Request) -> Trial:
    lists = _lists(case, request)
    differentiate = case.direction == "fwd+bwd"
    grid = seeded(0, case.batch, case.tokens, case.channels).to(request.device, DTYPES[case.dtype])
    grad = seeded(1, lists.total, case.channels).to(grid)
    # rows behind the last sample are nobody's
    padded_grad = F.pad(grad, (0, 0, 0, lists.index.numel() - lists.total))

    def bound(pack: Callable[[Tensor], tuple[Tensor, Tensor]], grid: Tensor, grad: Tensor) -> Callable[[], Results]:
        return bind((lambda x: pack(x)[0]) if differentiate else pack, (grid,), grad, differentiate)

    def ours(backend: str | None) -> Callable[[], Results]:
        return bound(partial(tokenops.pack_tokens, index=lists.index, backend=backend), grid, padded_grad)

    def without_padding(results: Results) -> Results:
        return results[0][: lists.total], *results[1:]

    def by_mask(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[lists.mask], _bounds(lists.mask)

    def by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(0, 1).index_select(0, (lists.first + lists.index)[lists.filled]), _bounds(lists.filled)

    kept = [sample[sample >= 0] for sample in lists.index]

    def nested(x: Tensor) -> tuple[Tensor, Tensor]:
        samples = [sample.index_select(0, ids) for sample, ids in zip(x, kept, strict=True)]
        ragged = torch.nested.as_nested_tensor(samples, layout=torch.jagged)
        return ragged.values(), ragged.offsets()

    def padded(x: Tensor) -> tuple[Tensor, Tensor]:
        place = lists.index.clamp(min=0)[..., None].expand(-1, -1, x.shape[2])
        return x.gather(1, place.long()), _bounds(lists.filled)

    def from_padded(results: Results) -> Results:
        return results[0][lists.filled], *results[1:]

    exact = bound(partial(tokenops.pack_tokens, index=lists.index, backend="reference"), grid.double(), padded_grad.double())
    return Trial(
        contenders=[
            *(
                contender._replace(canonical=without_padding)
                for contender in contenders_of_ours(request, ours, _serve("pack_tokens", grid))
            ),
            Contender("boolean mask", bound(by_mask, grid, grad)),
            Contender("index_select", bound(by_rows, grid, grad)),
            Contender("nested tensor", bound(nested, grid, grad)),
            Contender(
                "padded gather",
                bound(
                    padded, grid, padded_grad.new_zeros(*lists.index.shape, case.channels).masked_scatter_(lists.filled[..., None], grad)
                ),
                canonical=from_padded,
                note="stays padded: whatever follows computes the padding too",
            ),
        ],
        expected=lambda: without_padding(exact()),
        names=("rows", "gradient of the grid") if differentiate else ("rows", "cu_seqlens"),
        cost=_traffic(case, lists, grid),
        backends=_objections(grid),
        remark=_share(case, lists),
    )


def _unpack(case: Case, request: Request) -> Trial:
    lists = _lists(case, request)
    differentiate = case.direction == "fwd+bwd"
    grad = seeded(0, case.batch, case.tokens, case.channels).to(request.device, DTYPES[case.dtype])
    rows = seeded(1, lists.total, case.channels).to(grad)

    def bound(backend: str | None, rows: Tensor, grad: Tensor) -> Callable[[], Results]:
        unpack = partial(tokenops.unpack_tokens, cu_seqlens=lists.cu_seqlens, index=lists.index, n=case.tokens, backend=backend)
        return bind(unpack, (rows,), grad, differentiate)

    def by_mask(rows: Tensor) -> Tensor:
        grid = rows.new_zeros(grad.shape)
        grid[lists.mask] = rows
        return grid

    def by_rows(rows: Tensor) -> Tensor:
        grid = rows.new_zeros(case.batch * case.tokens, case.channels)
        return grid.index_copy_(0, (lists.first + lists.index)[lists.filled], rows).view(grad.shape)

    return Trial(
        contenders=[
            *contenders_of_ours(request, lambda backend: bound(backend, rows, grad), _serve("unpack_tokens", rows)),
            Contender("boolean mask", bind(by_mask, (rows,), grad, differentiate)),
            Contender("index_copy", bind(by_rows, (rows,), grad, differentiate)),
        ],
        expected=bound("reference", rows.double(), grad.double()),
        names=("grid", "gradient of the rows")[: 1 + differentiate],
        cost=_traffic(case, lists, grad),
        backends=_objections(rows),
        remark=_share(case, lists),
    )


def _traffic(case: Case, lists: Lists, grid: Tensor) -> Cost:
    """The kept rows read and the result written: packed rows, or a whole grid. The gradient of one is the other."""
    kept = lists.total * case.channels * grid.element_size()
    written = {"pack": kept, "unpack": grid.nbytes}
    other = "unpack" if case.operation == "pack" else "pack"
    moved = kept + written[case.operation]
    if case.direction == "fwd+bwd":
        moved += kept + written[other]
    return Cost(0, moved + lists.index.nbytes)


def _share(case: Case, lists: Lists) -> str:
    counts = lists.cu_seqlens.diff()
    return f"{lists.total} of {case.batch * case.tokens} tokens are kept, {int(counts.min())} to {int(counts.max())} in a clip"
