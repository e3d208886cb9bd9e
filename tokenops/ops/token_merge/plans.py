"""Plans made by other means than matching, and what can be done with plans."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenops.ops.arguments import as_int32, check_device, check_tensor
from tokenops.ops.token_merge import operators as operators
from tokenops.types import MergePlan


def plan_from_parents(parent: Tensor, n_out: int | None = None, *, backend: str | None = None) -> MergePlan:
    """The plan in which every token merges into its parent, and on into the parent's parent, down to one that stays.

    Args:
        parent: [B, N] int32 (int64 accepted): the id of another token, its own id to stay, -1 to be dropped with all that merges into it.
        n_out: rows of the output, at least as many as tokens stay. Default N, with empty rows at the end.
        backend: as in ``match_tokens``.

    Returns:
        MergePlan. Output rows ascend by the ids of the tokens that stay; those are the destinations.

    Raises:
        ValueError: an id is out of range, parents form a circle, more tokens stay than n_out (checked on the CPU; on a GPU if
            TOKENOPS_CHECK=1, else such tokens are dropped), or parent is not [B, N].
        TypeError: parent is not int32 or int64.

    >>> tokenops.plan_from_parents(torch.tensor([[0, 0, 1, 3]]), n_out=2).slot
    tensor([[0, 0, 0, 1]], dtype=torch.int32)
    """
    parent = _as_targets("parent", parent)
    return _plan(parent, False, parent.shape[1] if n_out is None else n_out, backend)


def plan_from_slots(slot: Tensor, n_out: int, *, backend: str | None = None) -> MergePlan:
    """The plan in which token i goes to output row slot[i], say the cluster or meta token that it was assigned to.

    Args:
        slot: [B, N] int32 (int64 accepted): the output row of each token, -1 to drop it.
        n_out: rows of the output. Rows may stay empty anywhere; ``count`` then is the number of rows that are not.
        backend: as in ``match_tokens``.

    Returns:
        MergePlan. The destination of a row is its member with the lowest id.

    Raises:
        ValueError: a slot is out of range (checked as in ``plan_from_parents``), or slot is not [B, N].
        TypeError: slot is not int32 or int64.

    >>> tokenops.plan_from_slots(torch.tensor([[2, 0, 2, -1]]), n_out=3).order
    tensor([[ 1,  0,  2, -1]], dtype=torch.int32)
    """
    return _plan(_as_targets("slot", slot), True, n_out, backend)


def _as_targets(name: str, target: Tensor) -> Tensor:
    check_tensor(name, target)
    if target.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {target.dtype}")
    if target.dim() != 2:
        raise ValueError(f"{name} must be [B, N], got {list(target.shape)}")
    return as_int32(target).contiguous()


def _plan(target: Tensor, is_slot: bool, n_out: int, backend: str | None) -> MergePlan:
    if n_out < 0:
        raise ValueError(f"n_out must not be negative, got {n_out}")
    slot, count, order, offsets = operators.plan_tokens(target, is_slot, n_out, backend)
    return MergePlan(slot, count, n_out, order, offsets)


def compose_plans(first: MergePlan, second: MergePlan) -> MergePlan:
    """One plan for what ``first`` and then ``second`` do: the tokens of the first, the output rows of the second.

    A row's destination is the first plan's destination of the second's. Sums, maxima and size-weighted means come out as in two steps.

    Raises:
        ValueError: second is not for the output rows of first, or their batches or devices disagree.
        TypeError: one is no MergePlan.
    """
    for name, plan in (("first", first), ("second", second)):
        if not isinstance(plan, MergePlan):
            raise TypeError(f"{name} must be a MergePlan, got {type(plan).__name__}")
    if second.slot.shape[1] != first.n_out:
        raise ValueError(f"second must be a plan for first's {first.n_out} output rows, got one for {second.slot.shape[1]} tokens")
    batches = first.slot.shape[0], second.slot.shape[0]
    if batches[0] != batches[1] and 1 not in batches:
        raise ValueError(f"second must be for first's {batches[0]} samples or for 1, got {batches[1]}")
    check_device("second.slot", second.slot, "first.slot", first.slot)
    batch, tokens, n_out = max(batches), first.slot.shape[1], second.n_out
    slot = _follow(second.slot.long().expand(batch, -1), first.slot.long().expand(batch, -1))
    # the token that stands for each output row: the destination of a destination
    stands = _follow(_destinations(first).expand(batch, -1), _destinations(second).expand(batch, -1))
    ids = torch.arange(tokens, device=slot.device)
    row = slot.masked_fill(slot < 0, n_out)
    # by row, in a row the destination first and then ascending; the dropped ones behind the last row
    order = (row * (tokens + 1) + (ids + 1).masked_fill(_follow(stands, slot) == ids, 0)).argsort(-1)
    row = row.gather(1, order)
    offsets = torch.searchsorted(row, torch.arange(n_out + 1, device=slot.device).expand(batch, -1).contiguous())
    count = (offsets.diff(dim=-1) > 0).sum(-1)
    slot, count, order, offsets = (x.to(torch.int32) for x in (slot, count, order.masked_fill(row == n_out, -1), offsets))
    return MergePlan(slot, count, n_out, order, offsets)


def _follow(pointer: Tensor, at: Tensor) -> Tensor:
    """pointer[at], -1 from -1 and from anywhere outside."""
    if pointer.shape[1] == 0:
        return torch.full_like(at, -1)
    inside = (at >= 0) & (at < pointer.shape[1])
    return pointer.gather(1, at.masked_fill(~inside, 0)).masked_fill(~inside, -1)


def _destinations(plan: MergePlan) -> Tensor:
    """[1|B, n_out] int64, the token that each output row stands for, -1 where it is empty."""
    start, end = plan.offsets[:, :-1].long(), plan.offsets[:, 1:].long()
    return _follow(plan.order.long(), start.masked_fill(start >= end, -1))


def merge_schedule(r: int | list[int] | tuple[int, float], layers: int) -> list[int]:
    """How many tokens to merge in each layer.

    Args:
        r: a number for every layer; a list of numbers, continued with zeros; or the pair (r, inflection) for a straight line from
            r (1 - inflection) to r (1 + inflection): inflection -1 merges most in the first layer and nothing in the last, +1 the other way
            round. The numbers of a line are rounded down.
        layers: how many there are.

    Source: D. Bolya et al., "Token Merging: Your ViT But Faster", 2023, section 4.1 (a decreasing schedule is (r, -1.0)).

    Raises:
        ValueError: layers or a number of tokens is negative, more numbers than layers, or an inflection outside [-1, 1].

    >>> tokenops.merge_schedule((16, -1.0), 12)
    [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    """
    if layers < 0:
        raise ValueError(f"layers must not be negative, got {layers}")
    if isinstance(r, int):
        numbers = [r] * layers
    elif isinstance(r, tuple):
        if len(r) != 2 or not -1.0 <= r[1] <= 1.0:
            raise ValueError(f"r must be a number, a list of numbers or (r, inflection) with an inflection in [-1, 1], got {r}")
        first = int(r[0] * (1.0 - r[1]))
        step = (2 * r[0] - 2 * first) / (layers - 1) if layers > 1 else 0.0
        numbers = [int(first + step * layer) for layer in range(layers)]
    else:
        numbers = [*map(int, r), *[0] * (layers - len(r))]
    if len(numbers) > layers:
        raise ValueError(f"r must have at most {layers} numbers, one for each layer, got {len(numbers)}")
    if min(numbers, default=0) < 0:
        raise ValueError(f"r must not be negative in any layer, got {numbers}")
    return numbers
