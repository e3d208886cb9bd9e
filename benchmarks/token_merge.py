"""Cases and peers of the room ``token_merge``.

The peers of matching and merging are what torch users write from the papers: normalise, the whole similarity matrix, its row maximum, sort,
gather, scatter. Two plans can be equally good, because tokens of a film repeat and bfloat16 rounds. So nobody's plan is compared with
ours: in float64, its merged pairs must be as similar as the reference's, and its rows must be the means that its own plan asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenops
from tokenops.dispatch import Backend, choose, ranked
from tokenops.ops.token_merge.backends import BACKENDS
from tokenops.reference import token_merge as reference
from tokenops.types import MatchProblem, MergePlan

from . import video
from .harness import DTYPES, Contender, Cost, Request, Results, Trial, bind, compiled_peer, contenders_of_ours, seeded, variants

SIMILAR = 0.9  # cosine above which tokens are called near-duplicates
TEMPERATURE = 0.1  # of the soft assignment

USUAL = "the usual formulation: whole score matrix, sort, gather, scatter_reduce; above a threshold it leaves gaps in the grid"
BY_ROWS = "index_select and index_add_ on whole rows, no arithmetic on tokens that stay"


class Case(NamedTuple):
    name: str
    operation: str  # "match + merge" | "merge" | "unmerge" | "soft merge"
    tokens: int  # N
    r: int | None = None  # tokens that leave every sample
    threshold: float | None = None  # instead of r
    meta: int = 0  # M, of a soft merge
    batch: int = 4
    channels: int = 768  # C
    width: int = 64  # of the metric
    class_token: bool = True
    film: bool = False  # tokens of a video instead of random ones
    memory: bool = False  # report what a call adds to the memory
    dtype: str = "fp32"
    direction: str = "fwd"
    quick: bool = False


def _cases() -> Iterator[Case]:
    both = "match + merge"
    # four clips of 8 frames, cut into 16 x 16 patches, and a class token
    for r, quick, full in ((65, [], ["fp32 fwd"]), (392, ["fp32 fwd"], ["bf16 fwd"])):
        yield from variants(Case(f"video-match-merge-N1569-r{r}", both, video.TOKENS, r, film=True), quick, full)
    yield from variants(Case("video-match-merge-N1569-over0.9", both, video.TOKENS, threshold=SIMILAR, film=True), ["fp32 fwd"])
    yield from variants(Case("match-merge-N197-r16", both, 197, 16), ["fp32 fwd"], ["bf16 fwd"])
    yield from variants(Case("match-merge-N1569-r65", both, 1569, 65), ["fp32 fwd"], ["bf16 fwd"])
    yield from variants(Case("match-merge-N1569-r392", both, 1569, 392), ["fp32 fwd", "bf16 fwd"])
    yield from variants(Case("match-merge-N6272-r1568", both, 6272, 1568, class_token=False, memory=True), ["fp32 fwd"], ["bf16 fwd"])
    yield from variants(Case("merge-N1569-r392", "merge", 1569, 392), ["fp32 fwd+bwd"], ["fp32 fwd", "bf16 fwd", "bf16 fwd+bwd"])
    yield from variants(Case("unmerge-N1569-r392", "unmerge", 1569, 392), ["fp32 fwd"], ["bf16 fwd", "fp32 fwd+bwd"])
    soft = Case("soft-merge-N1568-M98", "soft merge", 1568, meta=98, width=192)
    yield from variants(soft, ["fp32 fwd", "fp32 fwd+bwd"], ["bf16 fwd", "bf16 fwd+bwd"])


CASES: tuple[Case, ...] = tuple(_cases())


class Inputs(NamedTuple):
    tokens: Tensor  # [B, N, C]
    metric: Tensor  # [B, N, width], what is compared
    size: Tensor  # [B, N, 1] float32: how many tokens each one stands for already


def make_inputs(case: Case, request: Request) -> Inputs:
    """The same numbers for every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    widths = (case.channels, case.width)
    if case.film:
        tokens, metric = video.project(request.clips(case.batch).patches, widths, generator)
    else:
        tokens, metric = (torch.randn(case.batch, case.tokens, width, generator=generator) for width in widths)
    size = torch.randint(1, 5, (case.batch, case.tokens, 1), generator=generator).float()
    device, dtype = request.device, DTYPES[case.dtype]
    return Inputs(tokens.to(device, dtype), metric.to(device, dtype), size.to(device))


def prepare(case: Case, request: Request) -> Trial:
    trial = {"match + merge": _match_merge, "merge": _merge, "unmerge": _unmerge, "soft merge": _soft_merge}[case.operation]
    return trial(case, make_inputs(case, request), request)


def _serve(operation: str, grids: Mapping[str, Tensor]) -> Callable[[str | None], Backend]:
    """Who serves an operation that reads these tensors row by row, as a function of the backend asked for."""
    return lambda backend: choose(operation, BACKENDS, backend, *grids.values(), names=" ".join(grids))


def _objections(grids: Mapping[str, Tensor]) -> dict[str, list[str]]:
    return {backend.name: backend.objections(*grids.values(), names=" ".join(grids)) for backend in ranked(BACKENDS, *grids.values())}


def example_objections(device: str) -> dict[str, list[str]]:
    """Why each backend would refuse to match, merge and differentiate float32 tokens on ``device``; an empty list: it would serve."""
    example = reference.example_inputs(device=device)
    return _objections({"x": example["x"], "metric": example["metric"], "grad_out": example["x"]})


# matching and merging together


class Split(NamedTuple):
    """A bipartite plan as the peers hold it: even tokens are sources, odd ones destinations, both numbered from 0."""

    stay: Tensor  # [B, sources - r] int64, sources that keep their row
    leave: Tensor  # [B, r] int64, sources that merge
    target: Tensor  # [B, r] int64, the destination each of them merges into


def _match_merge(case: Case, inputs: Inputs, request: Request) -> Trial:
    limits = {"r": case.r, "threshold": case.threshold, "class_token": case.class_token}

    def run(backend: str | None) -> Callable[[], Results]:
        def match_merge(tokens: Tensor, metric: Tensor, size: Tensor) -> Results:
            plan = tokenops.match_tokens(metric, **limits, backend=backend)
            rows, new_size = tokenops.merge_tokens(tokens, plan, size=size, return_size=True, backend=backend)
            return rows, new_size, plan.slot

        return bind(match_merge, inputs, (), differentiate=False)

    exact = Inputs(*(x.double() for x in inputs))
    plan = tokenops.match_tokens(exact.metric, **limits, backend="reference")
    judged = partial(_judged, exact, right=plan)
    problem = MatchProblem(inputs.metric, None, case.class_token, False, None, None, None, None, case.r, case.threshold, True)
    return Trial(
        contenders=[
            *(
                contender._replace(canonical=judged)
                for contender in contenders_of_ours(request, run, _serve("match_tokens", {"metric": inputs.metric}))
            ),
            *_match_merge_peers(case, inputs, request, judged),
        ],
        expected=lambda: _as_judged(exact, plan.slot, *means(exact, plan.slot, plan.n_out)),
        names=("similarities of merged pairs", "rows left", "rows", "sizes"),
        cost=Cost(reference.match_flops(problem), inputs.metric.nbytes + reference.merge_bytes(inputs.tokens, plan, inputs.size)),
        backends=_objections({"metric": inputs.metric}),
        remark=_near_duplicates(case, exact.metric) if case.film else "",
        memory=case.memory,
    )


def _as_judged(exact: Inputs, slot: Tensor, rows: Tensor, sizes: Tensor) -> Results:
    left = torch.zeros_like(slot).scatter_(1, slot.long(), 1).sum(1)
    return _pair_similarities(exact.metric, slot), left, rows, sizes


def _judged(exact: Inputs, results: Results, right: MergePlan) -> Results:
    """Results that equal those of the plan ``right`` if the contender's own plan is as good, and its rows are the means of that plan."""
    rows, sizes, slot = results
    own_rows, own_sizes = means(exact, slot, rows.shape[1])
    right_rows, right_sizes = means(exact, right.slot, right.n_out)
    return _as_judged(exact, slot, right_rows + (rows - own_rows), right_sizes + (sizes - own_sizes))


def _pair_similarities(metric: Tensor, slot: Tensor) -> Tensor:  # [B, sources], descending
    """Cosine of every source and the destination it merged into; 0 for those that stayed."""
    unit, target = F.normalize(metric, dim=-1), _targets(slot)
    partner = unit[:, 1::2].gather(1, _wide(target.clamp(min=0), unit))
    return (unit[:, ::2] * partner).sum(-1).masked_fill(target < 0, 0).sort(-1, descending=True).values


def _targets(slot: Tensor) -> Tensor:  # [B, sources] int64
    """The destination, numbered from 0, that each source merged into; -1 for those that stayed."""
    destination = torch.arange(slot.shape[1] // 2, device=slot.device).expand(len(slot), -1)
    owner = torch.full_like(slot, -1, dtype=torch.int64).scatter_(1, slot[:, 1::2].long(), destination)
    return owner.gather(1, slot[:, ::2].long())


def means(exact: Inputs, slot: Tensor, n_out: int) -> tuple[Tensor, Tensor]:
    """Rows [B, n_out, C] and sizes [B, n_out, 1] that a plan asks for; zero where a row has no member."""
    batch, _, channels = exact.tokens.shape
    row = (slot + n_out * torch.arange(batch, device=slot.device)[:, None]).flatten()
    sums = exact.tokens.new_zeros(batch * n_out, channels).index_add_(0, row, (exact.tokens * exact.size).flatten(0, 1))
    sizes = sums.new_zeros(batch * n_out, 1).index_add_(0, row, exact.size.flatten(0, 1))
    return (sums / sizes.clamp(min=1)).unflatten(0, (batch, n_out)), sizes.unflatten(0, (batch, n_out))


def _near_duplicates(case: Case, metric: Tensor) -> str:
    """How much there is to merge: real tokens repeat, random ones do not."""
    plan = tokenops.match_tokens(metric, threshold=SIMILAR, class_token=case.class_token, backend="reference")
    left = plan.count.tolist()
    merged, total = case.tokens * len(left) - sum(left), case.tokens * len(left)
    share = f"{merged} of {total} tokens ({100 * merged / total:.0f} %) are more similar than {SIMILAR} to one they may merge into"
    return f"{share}; merging those leaves {min(left)} to {max(left)} of {case.tokens} in a clip"


def _match_merge_peers(case: Case, inputs: Inputs, request: Request, judged: Callable[[Results], Results]) -> Iterator[Contender]:
    # as half-precision models have it
    inputs = inputs._replace(size=inputs.size.to(inputs.tokens.dtype))
    if case.threshold is not None:
        yield Contender(
            "torch",
            bind(partial(_torch_match_merge_similar, case), inputs, (), False),
            canonical=lambda results: judged((*results[:2], _slots_with_gaps(*results[2:], case.tokens))),
            note=USUAL,
        )
        return

    def canonical(results: Results) -> Results:
        return judged((*results[:2], slots(Split(*results[2:]), case.tokens)))

    assert case.r is not None
    usual = partial(torch_match_merge, r=case.r, class_token=case.class_token)
    yield Contender("torch", bind(usual, inputs, (), False), canonical=canonical, note=USUAL)
    yield Contender("torch, by rows", bind(partial(_torch_match_merge_rows, case), inputs, (), False), canonical=canonical, note=BY_ROWS)
    yield compiled_peer(request, usual, inputs, canonical)


def _wide(index: Tensor, grid: Tensor) -> Tensor:
    """[B, K] as the index of a gather of whole rows from [B, N, C]."""
    return index[..., None].expand(-1, -1, grid.shape[2])


def slots(split: Split, tokens: int) -> Tensor:  # [B, N]
    """The peers' rows: the sources that stay, then all destinations."""
    stays = split.stay.shape[1]
    slot = _slots_of_destinations(split.stay, tokens, stays)
    slot.scatter_(1, 2 * split.stay, torch.arange(stays, device=slot.device).expand_as(split.stay))
    return slot.scatter_(1, 2 * split.leave, stays + split.target)


def _slots_with_gaps(leaves: Tensor, partner: Tensor, tokens: int) -> Tensor:  # [B, N]
    """Rows where no source loses its place, all destinations behind them."""
    sources = leaves.shape[1]
    slot = _slots_of_destinations(partner, tokens, sources)
    slot[:, ::2] = torch.where(leaves, sources + partner, torch.arange(sources, device=slot.device))
    return slot


def _slots_of_destinations(like: Tensor, tokens: int, first: int) -> Tensor:
    slot = like.new_empty(len(like), tokens)
    slot[:, 1::2] = first + torch.arange(tokens // 2, device=slot.device)
    return slot


def _best_partners(metric: Tensor, class_token: bool) -> tuple[Tensor, Tensor]:
    unit = metric / metric.norm(dim=-1, keepdim=True)
    score = unit[:, ::2] @ unit[:, 1::2].mT
    if class_token:
        score[:, 0] = -torch.inf
    best, partner = score.max(-1)
    return best, partner


def torch_match_merge(tokens: Tensor, metric: Tensor, size: Tensor, *, r: int, class_token: bool) -> Results:
    """Rows, their sizes, and the ``Split``."""
    best, partner = _best_partners(metric, class_token)
    order = best.argsort(-1, descending=True)
    leave, stay = order[:, :r], order[:, r:]
    if class_token:
        # the class token comes first again
        stay = stay.sort(-1).values
    split = Split(stay, leave, partner.gather(1, leave))
    return *_torch_merge(tokens, size, split), *split


def _torch_merge(tokens: Tensor, size: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    def summed(x: Tensor) -> Tensor:
        sources, destinations = x[:, ::2], x[:, 1::2]
        leaving = sources.gather(1, _wide(split.leave, x))
        return torch.cat(
            [sources.gather(1, _wide(split.stay, x)), destinations.scatter_reduce(1, _wide(split.target, x), leaving, "sum")], 1
        )

    sizes = summed(size)
    return summed(tokens * size) / sizes, sizes


def _torch_match_merge_rows(case: Case, tokens: Tensor, metric: Tensor, size: Tensor) -> Results:
    assert case.r is not None
    best, partner = _best_partners(metric, case.class_token)
    leave = best.topk(case.r, sorted=False).indices
    stays = torch.ones_like(best, dtype=torch.bool).scatter_(1, leave, False)
    split = Split(stays.nonzero()[:, 1].view(len(best), -1), leave, partner.gather(1, leave))
    return *_torch_merge_rows(tokens, size, split), *split


def _torch_merge_rows(tokens: Tensor, size: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    batch, n, channels = tokens.shape
    first = torch.arange(batch, device=tokens.device)[:, None]
    rows, sizes = tokens.reshape(-1, channels), size.reshape(-1, 1)
    stay, leave = ((n * first + 2 * ids).flatten() for ids in (split.stay, split.leave))
    target = (n // 2 * first + split.target).flatten()
    moved = sizes.index_select(0, leave)
    into = size[:, 1::2].reshape(-1, 1)
    sums = (tokens[:, 1::2] * size[:, 1::2]).reshape(-1, channels).index_add(0, target, rows.index_select(0, leave) * moved)
    into = into.index_add(0, target, moved)
    return (
        torch.cat([rows.index_select(0, stay).view(batch, -1, channels), (sums / into).view(batch, -1, channels)], 1),
        torch.cat([sizes.index_select(0, stay).view(batch, -1, 1), into.view(batch, -1, 1)], 1),
    )


def _torch_match_merge_similar(case: Case, tokens: Tensor, metric: Tensor, size: Tensor) -> Results:
    """Samples lose different numbers of tokens and must stay one tensor: a row of size 0 is left where a token was."""
    best, partner = _best_partners(metric, case.class_token)
    leaves = best > case.threshold
    gaps = leaves[..., None]

    def summed(x: Tensor) -> Tensor:
        sources, destinations = x[:, ::2], x[:, 1::2]
        leaving = sources.masked_fill(~gaps, 0)
        return torch.cat([sources.masked_fill(gaps, 0), destinations.scatter_reduce(1, _wide(partner, x), leaving, "sum")], 1)

    sizes = summed(size)
    return summed(tokens * size) / sizes.clamp(min=1), sizes, leaves, partner


# merging and its way back, along a plan made beforehand


def _merge(case: Case, inputs: Inputs, request: Request) -> Trial:
    plan = _plan(case, inputs)
    grad_out = seeded(1, case.batch, plan.n_out, case.channels).to(inputs.tokens)
    differentiate = case.direction == "fwd+bwd"

    def call(backend: str | None, x: Tensor, size: Tensor, grad: Tensor) -> Callable[[], Results]:
        return bind(lambda x: tokenops.merge_tokens(x, plan, size=size, backend=backend), (x,), grad, differentiate)

    split, place = _split(plan.slot), _wide(_places(plan.slot), grad_out)
    size = inputs.size.to(inputs.tokens.dtype)

    def peer(name: str, merge: Callable[..., tuple[Tensor, Tensor]], note: str) -> Contender:
        run = bind(lambda x: merge(x, size, split)[0], (inputs.tokens,), grad_out.gather(1, place), differentiate)
        return Contender(name, run, canonical=lambda results: (_put(results[0], place), *results[1:]), note=note)

    grids = {"grad_out": grad_out} if differentiate else {"x": inputs.tokens}
    operation = "merge_tokens_backward" if differentiate else "merge_tokens"
    moved = reference.merge_bytes(inputs.tokens, plan, inputs.size)
    return Trial(
        contenders=[
            *contenders_of_ours(
                request,
                lambda backend: call(backend, inputs.tokens, inputs.size, grad_out),
                _serve(operation, grids),
            ),
            peer("torch", _torch_merge, USUAL),
            peer("torch, by rows", _torch_merge_rows, BY_ROWS),
        ],
        expected=call("reference", inputs.tokens.double(), inputs.size.double(), grad_out.double()),
        names=("rows", "gradient of tokens")[: 1 + differentiate],
        # a weight and a sum for each element; the gradient goes the same way back
        cost=Cost(2 * inputs.tokens.numel() * (1 + differentiate), moved * (1 + differentiate)),
        backends=_objections(grids),
    )


def _unmerge(case: Case, inputs: Inputs, request: Request) -> Trial:
    plan = _plan(case, inputs)
    rows = seeded(1, case.batch, plan.n_out, case.channels).to(inputs.tokens)
    differentiate = case.direction == "fwd+bwd"

    def call(backend: str | None, y: Tensor, grad: Tensor) -> Callable[[], Results]:
        return bind(lambda y: tokenops.unmerge_tokens(y, plan, backend=backend), (y,), grad, differentiate)

    split, place = _split(plan.slot), _wide(_places(plan.slot), rows)
    first = plan.n_out * torch.arange(case.batch, device=rows.device)[:, None]
    ids = (first + plan.slot).flatten()

    def by_rows(y: Tensor) -> Tensor:
        return y.reshape(-1, case.channels).index_select(0, ids).view_as(inputs.tokens)

    moved = reference.merge_bytes(inputs.tokens, plan, None)
    return Trial(
        contenders=[
            *contenders_of_ours(request, lambda backend: call(backend, rows, inputs.tokens), _serve("unmerge_tokens", {"y": rows})),
            Contender(
                "torch",
                bind(partial(_torch_unmerge, split, case.tokens), (rows.gather(1, place),), inputs.tokens, differentiate),
                canonical=lambda results: (results[0], *(_put(grad, place) for grad in results[1:])),
                note=USUAL,
            ),
            Contender("torch, by rows", bind(by_rows, (rows,), inputs.tokens, differentiate), note=BY_ROWS),
        ],
        expected=call("reference", rows.double(), inputs.tokens.double()),
        names=("tokens", "gradient of rows")[: 1 + differentiate],
        cost=Cost(inputs.tokens.numel() if differentiate else 0, moved * (1 + differentiate)),
        backends=_objections({"y": rows}),
    )


def _plan(case: Case, inputs: Inputs) -> MergePlan:
    return tokenops.match_tokens(inputs.metric, r=case.r, class_token=case.class_token, backend="reference")


def _split(slot: Tensor) -> Split:
    """Our plan as the peers hold it."""
    target = _targets(slot)
    stays = target < 0
    stay, leave = (chosen.nonzero()[:, 1].view(len(slot), -1) for chosen in (stays, ~stays))
    return Split(stay, leave, target.gather(1, leave))


def _places(slot: Tensor) -> Tensor:  # [B, n_out] int64
    """Our row of each row of the peers: the sources that stay, then all destinations."""
    return torch.cat([slot[:, ::2].gather(1, _split(slot).stay), slot[:, 1::2]], 1).long()


def _put(rows: Tensor, place: Tensor) -> Tensor:
    return torch.empty_like(rows).scatter_(1, place, rows)


def _torch_unmerge(split: Split, tokens: int, rows: Tensor) -> Tensor:
    stays = split.stay.shape[1]
    destinations = rows[:, stays:]
    out = rows.new_zeros(len(rows), tokens, rows.shape[2])
    out[:, 1::2] = destinations
    out.scatter_(1, _wide(2 * split.stay, rows), rows[:, :stays])
    return out.scatter_(1, _wide(2 * split.leave, rows), destinations.gather(1, _wide(split.target, rows)))


# merging into meta tokens


def _soft_merge(case: Case, inputs: Inputs, request: Request) -> Trial:
    meta = seeded(1, case.batch, case.meta, case.width).to(inputs.tokens)
    grad_out = seeded(2, case.batch, case.meta, case.channels).to(inputs.tokens)
    grad_mass = seeded(3, case.batch, case.meta).to(inputs.size)
    grids = (inputs.tokens, inputs.metric, meta)
    differentiate = case.direction == "fwd+bwd"

    def call(backend: str | None, grids: Sequence[Tensor], mass: Tensor, grads: Sequence[Tensor]) -> Callable[[], Results]:
        return bind(partial(tokenops.soft_merge, temperature=TEMPERATURE, mass=mass, backend=backend), grids, grads, differentiate)

    mass = inputs.size.to(inputs.tokens.dtype)
    peer = partial(_torch_soft_merge, mass)
    grads = grad_out, grad_mass.to(mass.dtype)
    named = dict(zip(("x", "metric", "meta"), grids, strict=True))
    operation = "soft_merge_backward" if differentiate else "soft_merge"
    pairs = case.batch * case.tokens * case.meta
    # forward: metric meta^T, p^T x; backward: metric meta^T again, x grad^T, p grad, and the gradients of metric and meta
    flops = 2 * pairs * (case.width + case.channels) + differentiate * 2 * pairs * (3 * case.width + 2 * case.channels)
    moved = sum(x.nbytes for x in (*grids, inputs.size, grad_out, grad_mass)) * (1 + differentiate)
    return Trial(
        contenders=[
            *contenders_of_ours(
                request,
                lambda backend: call(backend, grids, inputs.size, (grad_out, grad_mass)),
                _serve(operation, named),
            ),
            Contender("matmul + softmax", bind(peer, grids, grads, differentiate)),
            compiled_peer(request, peer, grids, grads=grads, differentiate=differentiate),
        ],
        expected=call("reference", [x.double() for x in grids], inputs.size.double(), (grad_out.double(), grad_mass.double())),
        names=("rows", "mass", "gradient of tokens", "gradient of metric", "gradient of meta")[: 5 if differentiate else 2],
        cost=Cost(flops, moved),
        backends=_objections(named),
    )


def _torch_soft_merge(mass: Tensor, tokens: Tensor, metric: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    similarity = F.normalize(metric, dim=-1) @ F.normalize(meta, dim=-1).mT
    weight = (similarity / TEMPERATURE).softmax(-1) * mass
    total = weight.sum(1)
    return weight.mT @ tokens / total[..., None], total
