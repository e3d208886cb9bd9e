"""From the arguments of the public functions to what operators take: ranks, dtypes, shapes. Contents are never read here."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenops.ops.arguments import check_device, check_tensor, dense, under_autocast
from tokenops.types import DeltaGate, TokenIndex

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_grid(name: str, x: object, form: str = "[B, N, C]") -> None:
    check_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() != form.count(",") + 1:
        raise ValueError(f"{name} must be {form}, got {list(x.shape)}")


def check_like(name: str, x: object, shape: tuple[int, ...], form: str, other_name: str, other: Tensor) -> None:
    """Whether x has this shape, and the dtype and device of another tensor."""
    check_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must be {form} = {list(shape)}, got {list(x.shape)}")
    check_device(name, x, other_name, other)


def as_attention_grids(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, N, D], [B, H, N, D] and [B, H, N, Dv], in autocast's dtype."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_grid(name, x, "[B, H, N, D]")
    query, key, value = under_autocast(query), under_autocast(key), under_autocast(value)
    if query.shape[3] == 0:
        raise ValueError(f"query must have a width of at least 1, got {list(query.shape)}")
    check_like("key", key, tuple(query.shape), "[B, H, N, D]", "query", query)
    check_like("value", value, (*query.shape[:3], value.shape[3]), "[B, H, N, Dv]", "query", query)
    return query, key, value


def check_cells(name: str, cell: tuple[int, int], grid: tuple[int, int], tokens: int, hint: str = "") -> None:
    """Whether the grid holds so many tokens and falls into cells of this size, which the caller names."""
    for pair_name, pair in ((name, cell), ("grid", grid)):
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"{pair_name} must be two positive numbers, got {tuple(pair)}")
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"grid must hold query's N = {tokens} tokens, got {tuple(grid)}")
    if grid[0] % cell[0] or grid[1] % cell[1]:
        raise ValueError(f"{name} must divide grid {tuple(grid)}{hint}, got {tuple(cell)}")


def plain_index(index: Tensor | TokenIndex | DeltaGate) -> Tensor:
    return index if isinstance(index, Tensor) else index.index


def as_norm(norm: tuple[Tensor, Tensor] | None, eps: float, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a layer normalisation of the rows of x, in float32 or the dtype of x."""
    if norm is None:
        return None, None
    if not isinstance(norm, tuple) or len(norm) != 2:
        raise TypeError(f"norm must be (weight, bias) of a layer normalisation, got {type(norm).__name__}")
    for name, part in zip(("norm's weight", "norm's bias"), norm, strict=True):
        check_tensor(name, part)
        allowed = {x.dtype} if x.dtype == torch.float64 else {x.dtype, torch.float32}
        if part.dtype not in allowed:
            raise TypeError(f"{name} must be {' or '.join(sorted(map(str, allowed)))} with {x.dtype} x, got {part.dtype}")
        if part.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be [C] = {list(x.shape[-1:])}, got {list(part.shape)}")
        check_device(name, part, "x", x)
    if not eps >= 0.0:
        raise ValueError(f"norm_eps must not be negative, got {eps}")
    return dense(norm[0]), dense(norm[1])
