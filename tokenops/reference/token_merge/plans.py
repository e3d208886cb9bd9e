"""From "token i goes there" to a MergePlan: slots for the way back, and the members of every output row in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenops.types import MergePlan


def roots(parent: Tensor) -> Tensor:
    """[B, N]: where the chain of parents ends. -1 where it ends in a dropped token or nowhere (a cycle).

    Pointer jumping: each round doubles the steps taken, so log2 N rounds reach the end of the longest chain.
    """
    tokens = parent.shape[1]
    parent = parent.long()
    parent = parent.masked_fill((parent < 0) | (parent >= tokens), -1)
    at = parent
    for _ in range(tokens.bit_length()):
        at = _follow(at, at)
    return at.masked_fill(_follow(parent, at) != at, -1)


def _follow(pointer: Tensor, at: Tensor) -> Tensor:
    """pointer[at]; nowhere from nowhere."""
    if pointer.shape[1] == 0:
        return at
    return pointer.gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)


def plan_of(target: Tensor, is_slot: bool, n_out: int) -> MergePlan:
    """The plan in which token i goes to output row ``target[i]``, or merges into token ``target[i]``: rows then ascend by the ids of roots.

    What does not fit into n_out rows is dropped.
    """
    batch, tokens = target.shape
    ids = torch.arange(tokens, device=target.device).expand(batch, tokens)
    if is_slot:
        slot, first = target.long(), torch.zeros_like(ids, dtype=torch.bool)
    else:
        root = roots(target)
        first = root == ids
        slot = _follow(first.cumsum(-1) - 1, root)
    slot = slot.masked_fill((slot < 0) | (slot >= n_out), -1)
    # by row, in a row the destination first and then ascending; the dropped ones behind the last row
    row = slot.masked_fill(slot < 0, n_out)
    place = (row * (tokens + 1) + (ids + 1).masked_fill(first, 0)).argsort(-1)
    row = row.gather(1, place)
    bounds = torch.arange(n_out + 1, device=target.device).expand(batch, -1).contiguous()
    offsets = torch.searchsorted(row, bounds)
    order = place.masked_fill(row == n_out, -1)
    count = (offsets.diff(dim=-1) > 0).sum(-1)
    slot, count, order, offsets = (x.to(torch.int32) for x in (slot, count, order, offsets))
    return MergePlan(slot, count, n_out, order, offsets)


def check_target(target: Tensor, is_slot: bool, n_out: int) -> None:
    """Refuse what ``plan_of`` would drop silently.

    Raises:
        ValueError: a parent or slot is out of range, parents form a cycle, or there are more roots than rows.
    """
    tokens = target.shape[1]
    name, kind, end = ("slot", "output rows", n_out) if is_slot else ("parent", "token ids", tokens)
    outside = ((target < -1) | (target >= end)).nonzero()
    if len(outside) > 0:
        at = outside[0].tolist()
        raise ValueError(f"{name} must hold {kind} in [0, {end}) or -1 to drop a token, got {int(target[tuple(at)])} at position {at}")
    if is_slot:
        return
    circle = circles(target)
    if len(circle) > 0:
        raise ValueError(f"parent must lead every token to one that stays, got a circle behind the token at position {circle[0].tolist()}")
    rows = rows_needed(target)
    if rows > n_out:
        raise ValueError(f"n_out must be at least {rows}, the number of tokens that stay, got {n_out}")


def circles(parent: Tensor) -> Tensor:
    """[., 2] positions of the tokens whose chain of parents never ends."""
    end = parent.long()
    for _ in range(parent.shape[1].bit_length()):
        end = _follow(end, end)
    return ((end >= 0) & (roots(parent) < 0)).nonzero()


def rows_needed(parent: Tensor) -> int:
    """The most tokens that stay in one sample."""
    stays = roots(parent) == torch.arange(parent.shape[1], device=parent.device)
    return int(stays.sum(-1).max()) if stays.numel() > 0 else 0
