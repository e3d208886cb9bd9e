"""Which tokens of a frame changed, by how much, and what they are now."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenops.reference.delta_matmul.rows import listed, normalized, normalized_gradients, replaced, row_ids, taken, wide
from tokenops.reference.token_select import selection
from tokenops.types import DeltaGate, GateBackwardProblem, GateGradients, GateProblem


def gated(problem: GateProblem, slots: int) -> DeltaGate:
    """current = norm(x + skip); change = current - reference; chosen are the ``slots`` tokens of greatest ||change|| above the threshold.

    Their rows go out and into the new reference; the others keep the row with which they were last sent. Sums, normalised rows and changes
    are computed in float32 (float64 in float64) and rounded to the dtype of x; norms are not rounded. The choice is constant to autograd.
    """
    p = problem
    batch, tokens = p.x.shape[:2]
    total, current = _current(p)
    if p.reference is None:
        index = torch.arange(tokens, dtype=torch.int32, device=p.x.device).expand(batch, -1)
        return DeltaGate(index, _count(index), current, current, current, total)
    change = current.to(wide(p.x)) - p.reference.to(wide(p.x))
    if p.index is not None:
        index, count = p.index.expand(batch, -1), _count(p.index).expand(batch)
    else:
        index, count = selection(_norms(change, p.order), slots, p.threshold, 0)
    ids = row_ids(index, batch, tokens)
    values = taken(current, ids)
    reference = current if p.whole else replaced(p.reference, values, ids)
    return DeltaGate(index, count, values, taken(change, ids).to(p.x.dtype), reference, total)


def _current(p: GateProblem) -> tuple[Tensor, Tensor]:
    """(x + skip, what the gate compares), both in the dtype of x."""
    total = p.x if p.skip is None else (p.x.to(wide(p.x)) + p.skip.to(wide(p.x))).to(p.x.dtype)
    if p.norm_weight is None or p.norm_bias is None:
        return total, total
    return total, normalized(total.to(wide(p.x)), p.norm_weight, p.norm_bias, p.norm_eps).to(p.x.dtype)


def _norms(change: Tensor, order: float) -> Tensor:
    """[B, N]"""
    if change.shape[2] == 0:
        return change.new_zeros(change.shape[:2])
    return torch.linalg.vector_norm(change.detach(), order, dim=-1)


def _count(index: Tensor) -> Tensor:
    return (index >= 0).sum(-1, dtype=torch.int32)


def gate_gradients(problem: GateBackwardProblem) -> GateGradients:
    """Written out, because an operator runs below autograd.

    With J the chosen rows: dcurrent[J] = dvalues + ddelta + dreference[J], dreference_old[J] = -ddelta, elsewhere dreference. Where the
    reference is the whole frame, all of dreference goes to current. dx is that through the normalisation, plus dtotal.
    """
    p, dtype = problem, wide(problem.x)
    ids = row_ids(p.index, p.x.shape[0], p.x.shape[1])
    zero = torch.zeros_like(p.x, dtype=dtype)

    def spread(rows: Tensor | None) -> Tensor:
        return zero if rows is None else replaced(zero, rows.to(dtype), ids)

    current = spread(p.grad_values) + spread(p.grad_delta)
    reference = None if p.first else -spread(p.grad_delta)
    if p.grad_reference is not None:
        grad = p.grad_reference.to(dtype)
        chosen = listed(ids, p.x.shape[1]).unsqueeze(-1)
        current = current + (grad if p.whole or p.first else grad.masked_fill(~chosen, 0.0))
        if reference is not None and not p.whole:
            reference = reference + grad.masked_fill(chosen, 0.0)
    norm_weight, norm_bias = None, None
    if p.norm_weight is not None:
        current, norm_weight, norm_bias = normalized_gradients(current, p.x.to(dtype), p.norm_weight, p.norm_eps)
    if p.grad_total is not None:
        current = current + p.grad_total.to(dtype)
    return GateGradients(current, reference, norm_weight, norm_bias)


def check_gate(problem: GateProblem) -> None:
    """
    Raises:
        ValueError: a change that would decide is NaN.
    """
    p = problem
    if p.reference is None or p.index is not None:
        return
    at = (_current(p)[1] - p.reference).isnan().any(-1).nonzero()
    if len(at) > 0:
        sample, token = at[0].tolist()
        raise ValueError(f"x must not differ from reference by NaN, got NaN in token {token} of sample {sample}")
