"""Merging and its way back: many rows to one along a plan, and one row to many."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenops.types import MergePlan


def merged(x: Tensor, plan: MergePlan, size: Tensor | None, mode: str) -> Tensor:
    """[B, n_out, W]: the rows of x [B, N, W] that share a slot as one, in float32 (float64 for float64). Empty rows are 0.

    sum, amax: over the members. mean: sum_i size[i] x[i] / sum_i size[i], size 1 if not given. replace, drop: the destination's own row.
    Members add up one after the other, the destination first and then ascending.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(dtype)
    if mode in ("replace", "drop"):
        ids = destinations(plan)
        return _rows(x, ids)
    member, row = members(plan)
    batch, width, n_out = x.shape[0], x.shape[2], plan.n_out
    values = _rows(x, member)
    # one row more than there are, for what belongs nowhere
    at = row.masked_fill(member < 0, n_out)
    if mode == "amax":
        out = x.new_zeros(batch, n_out + 1, width)
        return out.scatter_reduce(1, at[..., None].expand(values.shape), values, "amax", include_self=False)[:, :n_out]
    if size is None:
        weight = (member >= 0).to(dtype).expand(batch, -1)
    else:
        weight = _rows(size.to(dtype)[..., None], member)[..., 0].expand(batch, -1)
        values = values * weight[..., None]
    total = _sums(values, at, n_out)
    if mode == "sum":
        return total
    mass = _sums(weight[..., None], at, n_out)
    return total / mass.masked_fill(mass == 0.0, 1.0)


def _sums(values: Tensor, at: Tensor, n_out: int) -> Tensor:
    """[B, n_out, W], each row's values added in their order."""
    batch, positions, width = values.shape
    first = torch.arange(batch, device=at.device)[:, None] * (n_out + 1)
    flat = (at + first).reshape(-1)
    out = values.new_zeros(batch * (n_out + 1), width).index_add(0, flat, values.reshape(batch * positions, width))
    return out.view(batch, n_out + 1, width)[:, :n_out]


def _rows(x: Tensor, ids: Tensor) -> Tensor:
    """[B, K, W] from x [1|B, N, W] and ids [1|B, K]; 0 where the id is -1."""
    batch = max(x.shape[0], ids.shape[0]) if 0 not in (x.shape[0], ids.shape[0]) else 0
    if x.shape[1] == 0:
        return x.new_zeros(batch, ids.shape[1], x.shape[2])
    ids = ids.expand(batch, -1)[..., None]
    taken = x.expand(batch, -1, -1).gather(1, ids.clamp(min=0).expand(-1, -1, x.shape[2]))
    return taken.masked_fill(ids < 0, 0.0)


def members(plan: MergePlan) -> tuple[Tensor, Tensor]:
    """([1|B, N] token at each position of the order, [1|B, N] output row that owns the position). Out of range: token -1."""
    tokens = plan.slot.shape[1]
    positions = torch.arange(tokens, device=plan.order.device).expand(plan.order.shape).contiguous()
    row = torch.searchsorted(plan.offsets.long(), positions, right=True) - 1
    token = plan.order.long()
    outside = (token < 0) | (token >= tokens) | (row < 0) | (row >= plan.n_out)
    return token.masked_fill(outside, -1), row


def destinations(plan: MergePlan) -> Tensor:
    """[1|B, n_out] the token that each output row stands for, -1 where the row is empty."""
    tokens = plan.slot.shape[1]
    start, end = plan.offsets[:, :-1].long(), plan.offsets[:, 1:].long()
    if tokens == 0:
        return torch.full_like(start, -1)
    token = plan.order.long().gather(1, start.clamp(0, tokens - 1))
    return token.masked_fill((start >= end) | (start < 0) | (start >= tokens) | (token < 0) | (token >= tokens), -1)


def slots(plan: MergePlan) -> Tensor:
    """[1|B, N] int64, -1 out of range."""
    slot = plan.slot.long()
    return slot.masked_fill((slot < 0) | (slot >= plan.n_out), -1)


def unmerged(y: Tensor, plan: MergePlan, mode: str) -> Tensor:
    """[B, N, W]: each token gets the row of its slot; in mode "drop" only destinations do. 0 for the others and for dropped tokens."""
    slot = slots(plan)
    if mode == "drop":
        ids = torch.arange(slot.shape[1], device=slot.device)[None]
        slot = slot.masked_fill(_at(destinations(plan), slot) != ids, -1)
    return _rows(y, slot)


def _at(x: Tensor, ids: Tensor) -> Tensor:
    """x[ids] along the last dimension, -1 where the id is -1."""
    if x.shape[1] == 0:
        return torch.full_like(ids, -1)
    return x.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -1)


def gradients(
    grad_out: Tensor, x: Tensor | None, out: Tensor | None, plan: MergePlan, size: Tensor | None, mode: str, of_size: bool
) -> tuple[Tensor, Tensor | None]:
    """What ``merged`` returns to x [B, N, W] and to size [B, N] for grad_out [B, n_out, W].

    Written out, because an operator runs below autograd. With s the slot of token i and S the sum of its sizes:
    mean: dx_i = (size_i / S_s) dout_s, dsize_i = <dout_s, x_i - out_s> / S_s. amax: the tied maxima share dout_s equally.
    """
    dtype = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    grad_out = grad_out.to(dtype)
    if mode in ("sum", "replace", "drop"):
        return unmerged(grad_out, plan, "copy" if mode == "sum" else "drop"), None
    slot = slots(plan)
    grad = _rows(grad_out, slot)
    if mode == "amax":
        assert x is not None
        assert out is not None
        highest = (x == _rows(out, slot)) & (slot >= 0)[..., None]
        number = merged(highest.to(dtype), plan, None, "sum")
        return grad * highest / _rows(number, slot).clamp(min=1.0), None
    weight = torch.ones(1, 1, dtype=dtype, device=slot.device) if size is None else size.to(dtype)
    weight = weight.expand(grad_out.shape[0], slot.shape[1])
    total = _rows(merged(weight[..., None], plan, None, "sum"), slot)[..., 0]
    # nothing depends on tokens of a row without mass
    share = (weight / total.masked_fill(total == 0.0, 1.0)).masked_fill(total == 0.0, 0.0)
    grad_size = None
    if of_size:
        assert x is not None
        assert out is not None
        grad_size = (grad * (x.to(dtype) - _rows(out.to(dtype), slot))).sum(-1)
        grad_size = (grad_size / total.masked_fill(total == 0.0, 1.0)).masked_fill(total == 0.0, 0.0)
    return grad * share[..., None], grad_size


def check_merge(plan: MergePlan, size: Tensor | None = None) -> None:
    """Refuse a plan that contradicts itself, and sizes that are no weights.

    Raises:
        ValueError: so. Of the sizes only those of tokens that go somewhere are looked at.
    """
    if not _is_sound(plan):
        raise ValueError("plan must be as a function of tokenops made it, got slot, order and offsets that disagree")
    if size is None:
        return
    bad = (~(size >= 0.0) & (slots(plan) >= 0)).nonzero()
    if len(bad) > 0:
        # one sample's sizes, or one sample's plan, may serve all
        at = (min(int(bad[0, 0]), size.shape[0] - 1), int(bad[0, 1]))
        raise ValueError(f"size must not be negative, got {size[at].item()} at position {list(at)}")


def _is_sound(plan: MergePlan) -> bool:
    """Whether every row owns just the tokens that have its slot, the first one the destination and the others ascending."""
    slot, offsets = plan.slot.long(), plan.offsets.long()
    owned = (slot >= 0).sum(-1)
    if ((slot < -1) | (slot >= plan.n_out)).any() or (offsets[:, 0] != 0).any() or (offsets[:, -1] != owned).any():
        return False
    if (offsets.diff(dim=-1) < 0).any():
        return False
    token, row = members(plan)
    inside = torch.arange(slot.shape[1], device=slot.device) < owned[:, None]
    if (inside & ((token < 0) | (_at(slot, token) != row))).any():
        return False
    # no token twice: as many different ones as have a slot
    listed = torch.where(inside, token, -1).sort(-1).values
    if ((listed[:, 1:] == listed[:, :-1]) & (listed[:, 1:] >= 0)).any():
        return False
    in_one_row = (row[:, 2:] == row[:, :-2]) & inside[:, 2:]
    return not (in_one_row & (token[:, 2:] < token[:, 1:-1])).any()
