"""Token merging written a second time, one token after the other in float64: what results are compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tokenops
from tokenops.ops.token_merge import BACKENDS
from tokenops.types import MergePlan, Role

Allowed = Callable[[int, int], bool]  # may token i merge into token j?


def objections(backend: str, *grids: Tensor, names: str) -> list[str]:
    """Why a backend would refuse an operation on these."""
    [chosen] = [candidate for candidate in BACKENDS if candidate.name == backend]
    return chosen.objections(*grids, names=names)


def similarity(a: Tensor, b: Tensor, normalize: bool = True) -> float:
    """Of two rows; 0 for a row of zeros."""
    a, b = a.double(), b.double()
    product = float((a * b).sum())
    if not normalize:
        return product
    lengths = float(a.norm() * b.norm())
    return product / lengths if lengths > 0.0 else 0.0


def best_partner(
    row: Tensor, rows: Tensor, candidates: list[int], scale: Tensor | None = None, normalize: bool = True
) -> tuple[float, int]:
    """(score, id) of the most similar of some rows, the lowest id of several; (-inf, -1) without any."""
    best, index = -math.inf, -1
    for j in candidates:
        score = similarity(row, rows[j], normalize) * (1.0 if scale is None else float(scale[j]))
        if score > best:
            best, index = score, j
    return best, index


def parents(
    metric: Tensor,  # [N, C]
    role: list[int],
    *,
    r: int | None = None,
    threshold: float = -math.inf,
    allowed: Allowed = lambda i, j: True,
    source_scale: Tensor | None = None,
    destination_scale: Tensor | None = None,
    normalize: bool = True,
) -> list[int]:
    """Whom each token merges into: itself if it stays, -1 if it is dropped."""
    tokens = len(role)
    found = {}
    for i in range(tokens):
        if role[i] in (Role.SOURCE, Role.BOTH):
            candidates = [j for j in range(tokens) if role[j] in (Role.DESTINATION, Role.BOTH) and allowed(i, j)]
            score, j = best_partner(metric[i], metric, candidates, destination_scale, normalize)
            score *= 1.0 if source_scale is None or j < 0 else float(source_scale[i])
            if j >= 0 and score > threshold:
                found[i] = (score, j)
    chosen = sorted(found, key=lambda i: (-found[i][0], i))[:r]
    result = [-1 if role[i] == Role.DROPPED else i for i in range(tokens)]
    for i in chosen:
        result[i] = found[i][1]
    return result


def clusters(parent: list[int]) -> list[list[int]]:
    """The members of each output row, the destination first and then ascending."""
    members: dict[int, list[int]] = {}
    for i in range(len(parent)):
        root = i
        while root >= 0 and parent[root] != root:
            root = parent[root]
        if root >= 0:
            members.setdefault(root, []).append(i)
    return [[root, *(i for i in members[root] if i != root)] for root in sorted(members)]


def clusters_of(plan: MergePlan, sample: int) -> list[list[int]]:
    """What a plan says, by its order and offsets."""
    order, offsets = plan.order[sample].tolist(), plan.offsets[sample].tolist()
    return [order[start:end] for start, end in itertools.pairwise(offsets)]


def assert_plan(plan: MergePlan, want: list[list[list[int]]]) -> None:
    """The plan has these clusters in this order for each sample, empty rows behind them, and all of its tensors agree."""
    assert plan.slot.dtype == plan.count.dtype == plan.order.dtype == plan.offsets.dtype == torch.int32
    assert plan.offsets.shape == (len(want), plan.n_out + 1)
    assert plan.slot.shape == plan.order.shape
    for sample, rows in enumerate(want):
        empty: list[list[int]] = [[]] * (plan.n_out - len(rows))
        assert clusters_of(plan, sample) == rows + empty
        assert plan.count[sample] == len(rows)
        slot = [-1] * plan.slot.shape[1]
        for at, members in enumerate(rows):
            for i in members:
                slot[i] = at
        assert plan.slot[sample].tolist() == slot
        kept = sum(map(len, rows))
        assert plan.order[sample, kept:].tolist() == [-1] * (len(slot) - kept)


def merged(x: Tensor, plan: MergePlan, size: Tensor | None, mode: str) -> Tensor:
    """[B, n_out, W] float64, differentiable, from x [B, N, W] and size [B, N]."""
    samples = []
    for sample in range(x.shape[0]):
        rows = []
        for members in clusters_of(plan, sample if plan.slot.shape[0] > 1 else 0):
            taken = x[sample, members].double()
            weight = torch.ones(len(members), dtype=torch.float64) if size is None else size[sample, members].double()
            if not members or (mode == "mean" and weight.sum() == 0.0):
                rows.append(torch.zeros(x.shape[2], dtype=torch.float64))
            elif mode == "amax":
                rows.append(taken.amax(0))
            elif mode in ("replace", "drop"):
                rows.append(taken[0])
            else:
                total = (taken * weight[:, None]).sum(0)
                rows.append(total / weight.sum() if mode == "mean" else total)
        samples.append(torch.stack(rows) if rows else x.new_zeros(0, x.shape[2]).double())
    return torch.stack(samples)


def unmerged(y: Tensor, plan: MergePlan, mode: str) -> Tensor:
    """[B, N, W] float64, differentiable."""
    samples = []
    for sample in range(y.shape[0]):
        rows = [torch.zeros(y.shape[2], dtype=torch.float64) for _ in range(plan.slot.shape[1])]
        for at, members in enumerate(clusters_of(plan, sample if plan.slot.shape[0] > 1 else 0)):
            for i in members if mode == "copy" else members[:1]:
                rows[i] = y[sample, at].double()
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def soft_merged(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """By the formula, in float64, differentiable."""
    x, metric, meta = (call[name].double() for name in ("x", "metric", "meta"))
    if call.get("normalize", True):
        metric, meta = (
            torch.where(rows.norm(dim=-1, keepdim=True) > 0, torch.nn.functional.normalize(rows, dim=-1, eps=0.0), 0.0 * rows)
            for rows in (metric, meta)
        )
    p = torch.einsum("bnf,bmf->bnm", metric, meta).div(call["temperature"]).softmax(-1)
    if call.get("mass") is not None:
        p = p * call["mass"].double()[..., None]
    mass = p.sum(1)
    return torch.einsum("bnm,bnc->bmc", p, x) / mass[..., None], mass


def on(plan: MergePlan, device: str) -> MergePlan:
    """The plan there."""
    return MergePlan(*(part.to(device) if isinstance(part, Tensor) else part for part in plan))


def random_plan(batch: int, tokens: int, n_out: int, device: str = "cpu", *, seed: int = 0, drop: float = 0.1) -> MergePlan:
    """Any tokens in any row, some in none."""
    generator = torch.Generator().manual_seed(seed)
    slot = torch.randint(n_out, (batch, tokens), generator=generator)
    slot = slot.masked_fill(torch.rand(batch, tokens, generator=generator) < drop, -1)
    return on(tokenops.plan_from_slots(slot, n_out, backend="reference"), device)
