"""Who is most similar to whom, and which tokens merge for it. Scores exist for a block of rows at a time, never all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenops.types import MatchProblem, PairProblem, Role

# scores that exist at one time
_BLOCK = 1 << 22


class Pairs(NamedTuple):
    best: Tensor  # [B, Na], score of the winner, -inf where there is none
    index: Tensor  # type: ignore[assignment]  # [B, Na] int64, row of b, -1 where there is none


def pairs(problem: PairProblem) -> Pairs:
    """For each row of a the row of b with the highest score, the lowest of several. A score of NaN or -inf never wins.

    score[i, j] = <a[i], b[j]> b_scale[j], of the rows' directions if normalize; best[i] = a_scale[i] max_j score[i, j].
    """
    a, b = (_unit(x) if problem.normalize else x.to(_accumulator(x)) for x in (problem.a, problem.b))
    batch, rows, columns = a.shape[0], a.shape[1], b.shape[1]
    best, index = a.new_full((batch, rows), -torch.inf), torch.full((batch, rows), -1, device=a.device)
    if columns == 0:
        return Pairs(best, index)
    step = max(_BLOCK // max(batch * columns, 1), 1)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        scores = a[:, block] @ b.mT
        if problem.b_scale is not None:
            scores = scores * problem.b_scale[:, None, :]
        scores = scores.masked_fill(~_allowed(problem, block) | scores.isnan(), -torch.inf)
        best[:, block], index[:, block] = scores.max(dim=-1)
    index = index.masked_fill(best == -torch.inf, -1)
    if problem.a_scale is not None:
        best = (best * problem.a_scale).masked_fill(index < 0, -torch.inf)
    return Pairs(best, index)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _unit(x: Tensor) -> Tensor:
    """The direction of each row; zero for a zero row. The largest element is divided out first: squares of 1e30 would overflow."""
    x = x.to(_accumulator(x))
    largest = x.abs().amax(-1, keepdim=True)
    x = x / largest.masked_fill(largest == 0.0, 1.0)
    length = x.norm(dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0.0, 1.0)


def _allowed(problem: PairProblem, block: slice) -> Tensor:
    """[1|B, rows of the block, Nb], whether row i may choose row j."""
    allowed = torch.ones(1, 1, 1, dtype=torch.bool, device=problem.a.device)
    if problem.a_mask is not None:
        allowed = allowed & problem.a_mask[:, block, None]
    if problem.b_mask is not None:
        allowed = allowed & problem.b_mask[:, None, :]
    if problem.window is not None and problem.a_place is not None and problem.b_place is not None:
        t_low, t_high, reach_y, reach_x = problem.window
        away = problem.b_place.long()[:, None, :] - problem.a_place.long()[:, block, None]
        allowed = allowed & (away[..., 0] >= t_low) & (away[..., 0] <= t_high)
        allowed = allowed & (away[..., 1].abs() <= reach_y) & (away[..., 2].abs() <= reach_x)
    return allowed


def roles(problem: MatchProblem) -> Tensor:
    """[1|B, N] int8."""
    if problem.role is not None:
        return problem.role
    return turns(problem.metric.shape[1], problem.class_token, problem.distill_token, problem.metric.device)


def turns(tokens: int, class_token: bool, distill_token: bool, device: torch.device) -> Tensor:
    """[1, N] int8, the default roles: even tokens may leave, odd ones receive, the protected do neither."""
    position = torch.arange(tokens, device=device)
    role = torch.where(position % 2 == 0, int(Role.SOURCE), int(Role.DESTINATION))
    # the class token is number 0, the distillation token number 1
    protected = [number for number, stays in ((0, class_token), (1, distill_token)) if stays]
    for number in protected:
        role = role.masked_fill(position == number, int(Role.STAY))
    return role.to(torch.int8).unsqueeze(0)


def parents(problem: MatchProblem) -> Tensor:
    """[B, N] int64: the token that each one merges into, itself if it stays, -1 if it is dropped.

    Of the sources whose score is above -inf (and above the threshold) the r best leave, the lowest id first among equals.
    """
    batch, tokens, _ = problem.metric.shape
    role = roles(problem)
    score, partner = _candidates(problem, role)
    leaves = score > (-torch.inf if problem.threshold is None else problem.threshold)
    if problem.r is not None:
        ranked = score.masked_fill(~leaves, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        among_best = torch.zeros_like(leaves).scatter_(1, ranked[:, : problem.r], True)
        leaves = leaves & among_best
    stay = torch.arange(tokens, device=score.device).expand(batch, tokens)
    return torch.where(leaves, partner, stay).masked_fill(role == Role.DROPPED, -1)


def _candidates(problem: MatchProblem, role: Tensor) -> Pairs:
    """The best partner of each token as a token id, -inf and -1 for tokens that are no sources."""
    metric, place = problem.metric, problem.place
    may_leave, may_receive = (role & Role.SOURCE) > 0, (role & Role.DESTINATION) > 0

    def pair(rows: slice, columns: slice) -> Pairs:
        def side(x: Tensor | None, of: slice) -> Tensor | None:
            return None if x is None else x[:, of]

        sides = metric[:, rows], metric[:, columns], may_leave[:, rows], may_receive[:, columns]
        scales = side(problem.source_scale, rows), side(problem.destination_scale, columns)
        places = side(place, rows), side(place, columns)
        return pairs(PairProblem(*sides, *scales, *places, problem.window, problem.normalize))

    everyone = slice(None)
    if problem.role is not None:
        return pair(everyone, everyone)
    # the default roles are known beforehand: a quarter of the scores
    even, odd = slice(0, None, 2), slice(1, None, 2)
    best, index = pair(even, odd)
    score, partner = best.new_full(metric.shape[:2], -torch.inf), torch.full(metric.shape[:2], -1, device=metric.device)
    score[:, even], partner[:, even] = best, torch.where(index < 0, -1, 2 * index + 1)
    return Pairs(score, partner)


def check_pairs(problem: PairProblem) -> None:
    """Refuse rows that cannot be compared.

    Raises:
        ValueError: a row that takes part is not finite, or its scale is NaN.
    """
    for name, x, scale, mask in (("a", problem.a, problem.a_scale, problem.a_mask), ("b", problem.b, problem.b_scale, problem.b_mask)):
        check_rows(name, x, mask)
        _check_scale(f"{name}_scale", scale, mask)


def check_metric(problem: MatchProblem) -> None:
    """Refuse tokens that cannot be compared, and roles that do not exist.

    Raises:
        ValueError: a token that takes part is not finite, its scale is NaN, or there is no such role.
    """
    role = roles(problem)
    unknown = ((role < 0) | (role > max(Role))).nonzero()
    if len(unknown) > 0:
        at = unknown[0].tolist()
        raise ValueError(f"scheme must hold roles in [0, {int(max(Role))}], got {int(role[tuple(at)])} at position {at}")
    check_rows("metric", problem.metric, (role & Role.BOTH) > 0)
    _check_scale("source_scale", problem.source_scale, (role & Role.SOURCE) > 0)
    _check_scale("destination_scale", problem.destination_scale, (role & Role.DESTINATION) > 0)


def check_rows(name: str, x: Tensor, mask: Tensor | None = None) -> None:
    """Refuse a row of x [B, N, C] that takes part and is not finite."""
    bad = ~x.isfinite().all(-1)
    if mask is not None:
        bad = bad & mask
    if bad.any():
        at = bad.nonzero()[0].tolist()
        number = x[at[0], at[1]]
        raise ValueError(f"{name} must be finite, got {number[~number.isfinite()][0].item()} in row {at}")


def _check_scale(name: str, scale: Tensor | None, mask: Tensor | None) -> None:
    if scale is None:
        return
    bad = scale.isnan() if mask is None else scale.isnan() & mask
    if bad.any():
        raise ValueError(f"{name} must not be NaN, got it at position {bad.nonzero()[0].tolist()}")
