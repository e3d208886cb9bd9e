"""Soft merging into meta tokens: every token gives its mass to the meta tokens it resembles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenops.reference.token_merge.matching import check_rows
from tokenops.types import SoftMergeGradients, SoftMergeProblem


class Assigned(NamedTuple):
    out: Tensor  # [B, M, C]
    mass: Tensor  # [B, M]
    lse: Tensor  # [B, N]


def assigned(problem: SoftMergeProblem) -> Assigned:
    """p = softmax over M of similarity / temperature; mass[m] = sum_n p[n, m] mass_in[n]; out[m] = sum_n p[n, m] mass_in[n] x[n] / mass[m].

    Computed in float32 (float64 for float64). A meta token that gets no mass is 0.
    """
    dtype = _accumulator(problem)
    logits = _directions(problem.metric.to(dtype), problem.normalize)[0] @ _directions(problem.meta.to(dtype), problem.normalize)[0].mT
    logits = logits / problem.temperature
    weights = logits.softmax(-1)
    if problem.mass is not None:
        weights = weights * problem.mass.to(dtype)[..., None]
    mass = weights.sum(1)
    total = weights.mT @ problem.x.to(dtype)
    return Assigned(_share(total, mass[..., None]), mass, logits.logsumexp(-1))


def _accumulator(problem: SoftMergeProblem) -> torch.dtype:
    return torch.float64 if problem.x.dtype == torch.float64 else torch.float32


def _directions(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """(rows divided by their length, one over the length). Zero rows stay zero, and so is their gradient."""
    if not normalize:
        return rows, None
    largest = rows.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0.0
    # the largest element is divided out first: squares of 1e30 would overflow
    scaled = rows / largest.masked_fill(zero, 1.0)
    # ones in zero rows, so that no square root is differentiated at 0
    length = scaled.masked_fill(zero, 1.0).norm(dim=-1, keepdim=True)
    inverse = (1.0 / (length * largest.masked_fill(zero, 1.0))).masked_fill(zero, 0.0)
    return (scaled / length).masked_fill(zero, 0.0), inverse


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return (part / whole.masked_fill(whole == 0.0, 1.0)).masked_fill(whole == 0.0, 0.0)


def soft_gradients(problem: SoftMergeProblem, grad_out: Tensor, grad_mass: Tensor) -> SoftMergeGradients:
    """What ``assigned`` returns to each argument for grad_out [B, M, C] and grad_mass [B, M].

    Written out, because an operator runs below autograd. With w = p mass_in and u, v the compared directions:
    dw[n, m] = <dout[m], x[n] - out[m]> / mass[m] + dmass[m], dx[n] = sum_m w[n, m] dout[m] / mass[m], dmass_in[n] = sum_m p dw,
    dlogit = p (mass_in dw - <p, mass_in dw>), du = dlogit v / temperature, dtemperature = -sum logit dlogit / temperature.
    A mass may be as small as the p in it: p / mass comes first, for 1 / mass overflows where a meta token resembles nothing.
    """
    dtype = _accumulator(problem)
    x, metric, meta = (rows.to(dtype) for rows in problem[:3])
    (u, u_inverse), (v, v_inverse) = (_directions(rows, problem.normalize) for rows in (metric, meta))
    logits = u @ v.mT / problem.temperature
    p = logits.softmax(-1)
    mass_in = p.new_ones(1, 1) if problem.mass is None else problem.mass.to(dtype)
    w = p * mass_in[..., None]
    mass = w.sum(1)
    grad_out = grad_out.to(dtype)
    out = _share(w.mT @ x, mass[..., None])
    ratio = _share(p, mass[:, None])
    p_d_w = ratio * (x @ grad_out.mT - (grad_out * out).sum(-1)[:, None]) + p * grad_mass.to(dtype)[:, None]
    d_mass_in = p_d_w.sum(-1)
    d_logits = mass_in[..., None] * (p_d_w - p * d_mass_in[..., None])
    d_similarity = d_logits / problem.temperature
    return SoftMergeGradients(
        (ratio * mass_in[..., None]) @ grad_out,
        _through_length(d_similarity @ v, u, u_inverse),
        _through_length(d_similarity.mT @ u, v, v_inverse),
        -(logits * d_logits).sum((1, 2)) / problem.temperature,
        d_mass_in,
    )


def _through_length(grad: Tensor, direction: Tensor, inverse: Tensor | None) -> Tensor:
    if inverse is None:
        return grad
    return inverse * (grad - direction * (direction * grad).sum(-1, keepdim=True))


def check_soft(problem: SoftMergeProblem) -> None:
    """Refuse rows that cannot be compared, masses that are no weights, and a temperature that is none.

    Raises:
        ValueError: a row of metric or meta is not finite, a mass is negative or NaN, or the temperature is not positive.
    """
    check_rows("metric", problem.metric)
    check_rows("meta", problem.meta)
    if problem.mass is not None:
        bad = (~(problem.mass >= 0.0)).nonzero()
        if len(bad) > 0:
            at = bad[0].tolist()
            raise ValueError(f"mass must not be negative, got {problem.mass[tuple(at)].item()} at position {at}")
    check_temperature(float(problem.temperature))


def check_temperature(temperature: float) -> float:
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return temperature
