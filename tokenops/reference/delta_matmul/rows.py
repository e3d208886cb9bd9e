"""Rows of a grid by list: taking them, putting them back, and normalising them. What the other files of this room stand on."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """What x is computed in: half types in float32, float64 in float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_ids(index: Tensor, batch: int, rows: int) -> Tensor:
    """[B, K] int64; an id outside the grid is an empty slot, as in every kernel."""
    ids = index.long().expand(batch, -1)
    return ids.masked_fill((ids < 0) | (ids >= rows), -1)


def taken(grid: Tensor, ids: Tensor) -> Tensor:
    """[B, K, C]: the listed rows of grid [B, N, C], 0 in empty slots."""
    if grid.shape[1] == 0:
        return grid.new_zeros(*ids.shape, grid.shape[2])
    at = ids.clamp(min=0).unsqueeze(-1).expand(-1, -1, grid.shape[2])
    return grid.gather(1, at).masked_fill((ids < 0).unsqueeze(-1), 0.0)


def replaced(grid: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """[B, N, C]: the grid with the listed rows replaced."""
    # empty slots all write to one more row, which is cut off
    at = ids.masked_fill(ids < 0, grid.shape[1]).unsqueeze(-1).expand_as(rows)
    return torch.nn.functional.pad(grid, (0, 0, 0, 1)).scatter(1, at, rows)[:, :-1]


def listed(ids: Tensor, rows: int) -> Tensor:
    """[B, N] bool: whether a row stands in its list."""
    at = ids.masked_fill(ids < 0, rows)
    return torch.zeros(ids.shape[0], rows + 1, dtype=torch.bool, device=ids.device).scatter(1, at, True)[:, :-1]


def normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation of rows, in the dtype of x."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def normalized_gradients(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias, for grad and x of the same dtype. Written out, because an operator runs below autograd.

    With y = (x - mean) r, r = (var + eps)^(-1/2) and d = grad weight: dx = r (d - mean(d) - y mean(d y)); dweight = sum grad y;
    dbias = sum grad.
    """
    centered = x - x.mean(-1, keepdim=True)
    r = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    y, d = centered * r, grad * weight.to(x.dtype)
    grad_x = r * (d - d.mean(-1, keepdim=True) - y * (d * y).mean(-1, keepdim=True))
    return grad_x, (grad * y).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0)
