"""Token matching and merging: the executable specification, and a backend.

Each file holds one definition, differentiable and in float64 if asked, with its gradients and the check of its contents: ``matching``
(who merges into whom), ``plans`` (from that to a MergePlan), ``merging`` (rows along a plan and back), ``soft`` (into meta tokens). Here
they serve as a backend: results go where the caller says. Letters: B batch,
N tokens, M meta tokens, C channels, W channels of a flattened row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenops.reference.token_merge.matching import check_metric as check_metric
from tokenops.reference.token_merge.matching import check_pairs as check_pairs
from tokenops.reference.token_merge.matching import pairs as pairs
from tokenops.reference.token_merge.matching import parents as parents
from tokenops.reference.token_merge.matching import roles as roles
from tokenops.reference.token_merge.matching import turns as turns
from tokenops.reference.token_merge.merging import check_merge as check_merge
from tokenops.reference.token_merge.merging import gradients as gradients
from tokenops.reference.token_merge.merging import merged as merged
from tokenops.reference.token_merge.merging import unmerged as unmerged
from tokenops.reference.token_merge.plans import check_target as check_target
from tokenops.reference.token_merge.plans import circles as circles
from tokenops.reference.token_merge.plans import plan_of as plan_of
from tokenops.reference.token_merge.plans import rows_needed as rows_needed
from tokenops.reference.token_merge.soft import assigned as assigned
from tokenops.reference.token_merge.soft import check_soft as check_soft
from tokenops.reference.token_merge.soft import check_temperature as check_temperature
from tokenops.reference.token_merge.soft import soft_gradients as soft_gradients
from tokenops.types import MatchProblem, MergePlan, PairProblem, Role, SoftMergeGradients, SoftMergeProblem


def argmax(problem: PairProblem, best: Tensor, index: Tensor) -> None:
    result = pairs(problem)
    best.copy_(result.best)
    index.copy_(result.index)


def match(problem: MatchProblem, slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor) -> None:
    plan(parents(problem), False, slot, count, order, offsets)


def plan(target: Tensor, is_slot: bool, slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor) -> None:
    result = plan_of(target, is_slot, offsets.shape[1] - 1)
    for into, value in ((slot, result.slot), (count, result.count), (order, result.order), (offsets, result.offsets)):
        into.copy_(value)


def merge(x: Tensor, plan: MergePlan, size: Tensor | None, mode: str, out: Tensor) -> None:
    out.copy_(merged(x, plan, size, mode))


def merge_backward(
    grad_out: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    plan: MergePlan,
    size: Tensor | None,
    mode: str,
    grad_x: Tensor | None,
    grad_size: Tensor | None,
) -> None:
    of_x, of_size = gradients(grad_out, x, out, plan, size, mode, grad_size is not None)
    if grad_x is not None:
        grad_x.copy_(of_x)
    if grad_size is not None and of_size is not None:
        grad_size.copy_(of_size)


def unmerge(y: Tensor, plan: MergePlan, mode: str, out: Tensor) -> None:
    out.copy_(unmerged(y, plan, mode))


def soft_merge(
    x: Tensor,
    metric: Tensor,
    meta: Tensor,
    temperature: float | Tensor,
    mass: Tensor | None,
    normalize: bool,
    out: Tensor,
    mass_out: Tensor,
    lse: Tensor,
) -> None:
    result = assigned(SoftMergeProblem(x, metric, meta, temperature, mass, normalize))
    out.copy_(result.out)
    mass_out.copy_(result.mass)
    lse.copy_(result.lse)


def soft_merge_backward(
    grad_out: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    metric: Tensor,
    meta: Tensor,
    temperature: float | Tensor,
    mass: Tensor | None,
    normalize: bool,
    out: Tensor,
    mass_out: Tensor,
    lse: Tensor,
    grads: SoftMergeGradients,
) -> None:
    """Computes the probabilities anew, so out, mass_out and lse are not read."""
    problem = SoftMergeProblem(x, metric, meta, temperature, mass, normalize)
    for wanted, result in zip(grads, soft_gradients(problem, grad_out, grad_mass), strict=True):
        if wanted is not None and result is not None:
            wanted.copy_(result)


def check_match(problem: MatchProblem, n_out: int) -> None:
    """Refuse what makes a match meaningless.

    Raises:
        ValueError: NaN in the metric, a role that does not exist, tokens that merge in a circle, or fewer rows than tokens that are left.
    """
    check_metric(problem)
    parent = parents(problem)
    circle = circles(parent)
    if len(circle) > 0:
        raise ValueError(f"scheme must not let tokens merge in a circle, got one behind the token at position {circle[0].tolist()}")
    rows = rows_needed(parent)
    if rows > n_out:
        raise ValueError(f"n_out must be at least {rows}, the number of tokens that are left, got {n_out}")


def fits(problem: MatchProblem, slot: Tensor) -> bool:
    """Whether every token of a finished match [B, N] found a row, but for those that were to be dropped."""
    return not ((slot < 0) & (roles(problem) != Role.DROPPED)).any()


def example_inputs(
    batch: int = 2,
    tokens: int = 197,
    channels: int = 768,
    width: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Seeded tensors for a match and a merge: metric [B, N, width], x [B, N, channels], size [B, N] as after earlier merges."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    size = torch.randint(1, 5, (batch, tokens), generator=generator)
    size_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {"metric": normal(batch, tokens, width), "x": normal(batch, tokens, channels), "size": size.to(device, size_dtype)}


def match_flops(problem: MatchProblem) -> int:
    """Multiplications and additions of the similarities between sources and destinations."""
    batch, _, width = problem.metric.shape
    role = roles(problem).expand(batch, -1)
    leave, receive = ((role & bit > 0).sum(-1) for bit in (Role.SOURCE, Role.DESTINATION))
    return 2 * width * int((leave * receive).sum())


def merge_bytes(x: Tensor, plan: MergePlan, size: Tensor | None) -> int:
    """Least traffic with memory: every row of x that goes anywhere read once, every output row written once, the plan and sizes read."""
    kept = int((plan.slot >= 0).sum()) * (x.shape[0] // max(plan.slot.shape[0], 1))
    rows = kept + x.shape[0] * plan.n_out
    lists = [plan.order, plan.offsets, *([] if size is None else [size])]
    return rows * x[0, 0].numel() * x.element_size() + sum(part.numel() * part.element_size() for part in lists)
