"""From the arguments of the public functions to what operators take: ranks, dtypes, shapes. Contents are never read here."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenops.ops.arguments import as_int32, check_device, check_tensor, dense
from tokenops.ops.token_merge.operators import statistic_dtype
from tokenops.types import MergePlan, Window

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# farther than any two places are apart; sums and differences of such numbers stay within int32
FAR = 2**30


def check_grids(letters: str, **grids: Tensor) -> None:
    """Whether these are [B, rows, width] of one dtype, device and batch. ``letters``: rows and width of each, for the message."""
    first_name, first = next(iter(grids.items()))
    for (name, x), form in zip(grids.items(), letters.split(), strict=True):
        check_tensor(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must be [B, {form[:-1]}, {form[-1]}], got {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x is first:
            continue
        if x.dtype != first.dtype:
            raise TypeError(f"{name} must have {first_name}'s dtype {first.dtype}, got {x.dtype}")
        check_device(name, x, first_name, first)
        if x.shape[0] != first.shape[0]:
            raise ValueError(f"{name} must have {first_name}'s batch size {first.shape[0]}, got {list(x.shape)}")


def check_same_size(name: str, x: Tensor, other_name: str, other: Tensor, dim: int, what: str) -> None:
    if x.shape[dim] != other.shape[dim]:
        raise ValueError(f"{name} must have {other_name}'s {what} = {other.shape[dim]}, got {list(x.shape)}")


def check_width(name: str, x: Tensor) -> None:
    if x.shape[2] == 0:
        raise ValueError(f"{name} must have a width of at least 1, got {list(x.shape)}")


def as_statistic(name: str, x: Tensor, grid_name: str, grid: Tensor, *, last: bool = False) -> Tensor:
    """[1|B, N] from numbers per token [N] | [B, N] (with ``last`` also [B, N, 1]), float32 (float64 with a float64 grid)."""
    check_tensor(name, x)
    wanted = statistic_dtype(grid)
    if x.dtype != wanted:
        raise TypeError(f"{name} must be {wanted} with {grid.dtype} {grid_name}, got {x.dtype}")
    if last and x.dim() == 3 and x.shape[2] == 1:
        x = x.squeeze(2)
    return _per_token(name, x, grid_name, grid)


def as_mask(name: str, x: Tensor, grid_name: str, grid: Tensor) -> Tensor:
    """[1|B, N] bool."""
    check_tensor(name, x)
    if x.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = takes part), got {x.dtype}")
    return _per_token(name, x, grid_name, grid)


def _per_token(name: str, x: Tensor, grid_name: str, grid: Tensor) -> Tensor:
    batch, tokens = grid.shape[0], grid.shape[1]
    check_device(name, x, grid_name, grid)
    if x.dim() == 1 and x.shape[0] == tokens:
        return dense(x).unsqueeze(0)
    if x.dim() != 2 or x.shape[1] != tokens or x.shape[0] not in (1, batch):
        raise ValueError(f"{name} must be [{tokens}] | [{batch}, {tokens}], a number for each row of {grid_name}, got {list(x.shape)}")
    return dense(x)


def as_place(name: str, place: Tensor, grid_name: str, grid: Tensor) -> Tensor:
    """[1|B, N, 3] int32 from (t, y, x) of each token, [N, 3] | [B, N, 3]."""
    check_tensor(name, place)
    if place.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {place.dtype}")
    check_device(name, place, grid_name, grid)
    batch, tokens = grid.shape[0], grid.shape[1]
    if place.dim() == 2:
        place = place.unsqueeze(0)
    if place.dim() != 3 or tuple(place.shape[1:]) != (tokens, 3) or place.shape[0] not in (1, batch):
        raise ValueError(
            f"{name} must be [{tokens}, 3] | [{batch}, {tokens}, 3], (t, y, x) for each row of {grid_name}, got {list(place.shape)}"
        )
    return as_int32(place.clamp(-FAR // 2, FAR // 2)).contiguous()


def as_window(name: str, locality: str | tuple[int, ...] | Window) -> Window:
    if isinstance(locality, str):
        if locality == "frame":
            return Window(0, 0, FAR, FAR)
        if locality == "location":
            return Window(-FAR, FAR, 0, 0)
        raise ValueError(f"{name} must be 'frame', 'location', numbers or a Window, got {locality!r}")
    if not isinstance(locality, tuple) or not all(isinstance(part, int) for part in locality):
        raise TypeError(f"{name} must be 'frame', 'location', numbers or a Window, got {locality!r}")
    if not isinstance(locality, Window):
        if len(locality) not in (2, 3):
            raise ValueError(f"{name} must be (reach_y, reach_x), (reach_t, reach_y, reach_x) or a Window, got {locality!r}")
        t = FAR if len(locality) == 2 else locality[0]
        locality = Window(-t, t, *locality[-2:])
    if locality.t_low > locality.t_high or locality.reach_y < 0 or locality.reach_x < 0:
        raise ValueError(f"{name} must leave a place to look at, got {locality!r}")
    return Window(*(min(max(part, -FAR), FAR) for part in locality))


def check_plan(plan: object, batch: int, rows: int, of_output: bool, name: str, x: Tensor) -> None:
    """Whether the plan is for tensors like x [B, rows, ...]. Only its sizes are looked at."""
    if not isinstance(plan, MergePlan):
        raise TypeError(f"plan must be a MergePlan, got {type(plan).__name__}")
    check_tensor("plan.slot", plan.slot)
    if plan.slot.dim() != 2:
        raise ValueError(f"plan.slot must be [B, N], got {list(plan.slot.shape)}")
    samples, tokens = plan.slot.shape
    for part, t, shape in (
        ("slot", plan.slot, (samples, tokens)),
        ("order", plan.order, (samples, tokens)),
        ("offsets", plan.offsets, (samples, plan.n_out + 1)),
    ):
        check_tensor(f"plan.{part}", t)
        if t.dtype != torch.int32:
            raise TypeError(f"plan.{part} must be int32, got {t.dtype}")
        if t.shape != shape:
            raise ValueError(f"plan.{part} must be {list(shape)} as its slot and n_out say, got {list(t.shape)}")
        check_device(f"plan.{part}", t, name, x)
    planned = plan.n_out if of_output else plan.slot.shape[1]
    if planned != rows:
        kind = "output rows" if of_output else "tokens"
        raise ValueError(f"{name} must have the plan's {planned} {kind}, got {list(x.shape)}")
    if plan.slot.shape[0] not in (1, batch):
        raise ValueError(f"plan must be for the {batch} samples of {name} or for 1, got {plan.slot.shape[0]}")
