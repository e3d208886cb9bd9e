"""A transformer block that works on what changed since the last frame, written with the public functions as a model would."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokenops
from tokenops.types import DeltaGate, DeltaState

Weights = dict[str, Tensor]


class Options(NamedTuple):
    """What the published blocks can be set to."""

    heads: int
    grid: tuple[int, int]  # of the tokens; a class token before it belongs to no place
    choice: dict[str, Any]  # k, fraction or threshold
    mode: str = "paper"
    order: float = 2.0
    whole: bool = False  # gates compare with the frame before
    gate_first: bool = False  # gates stand before the layer norms
    rel_pos: bool = False
    pool: tuple[int, int] | None = None
    window: tuple[int, int] | None = None
    cast: torch.dtype | None = None


class BlockState(NamedTuple):
    qkv_reference: Tensor
    qkv: Tensor
    attention: DeltaState | None  # None: in windows
    projection_reference: Tensor
    projection: Tensor
    mlp_reference: Tensor
    mlp: Tensor

    def detach(self) -> BlockState:
        return self._make(part.detach() if isinstance(part, Tensor) else part for part in self)


class BlockResult(NamedTuple):
    out: Tensor  # [B, N, C]
    state: BlockState
    gates: tuple[DeltaGate, DeltaGate, DeltaGate]  # qkv, projection, mlp


def run_block(
    x: Tensor,
    weights: Weights,
    state: BlockState | None,
    options: Options,
    forced: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> BlockResult:
    """One frame. ``forced``: lists for the three gates instead of their choice."""

    def gate(at: int, x: Tensor, reference: Tensor | None, skip: Tensor | None, norm: str | None) -> DeltaGate:
        choice = options.choice if forced is None or reference is None else {"index": forced[at]}
        more = {"skip": skip, "norm": None if norm is None or options.gate_first else _affine(weights, norm)}
        return tokenops.delta_gate(x, reference, order=options.order, whole=options.whole, **choice, **more, backend=backend)

    def into(buffer: Tensor | None, rows: Tensor, gate: DeltaGate) -> Tensor:
        return rows if buffer is None else tokenops.update_tokens(buffer, rows, index=gate, backend=backend)

    late = {name: _affine(weights, name) if options.gate_first else None for name in ("input_layer_norm", "mlp_layer_norm")}
    g1 = gate(0, x, state and state.qkv_reference, None, "input_layer_norm")
    # the chosen rows of the new reference are the chosen tokens
    rows = tokenops.gathered_linear(g1.reference, *_affine(weights, "qkv"), index=g1, norm=late["input_layer_norm"], backend=backend)
    qkv = into(state and state.qkv, rows, g1)
    attended, attention = _attend(qkv, weights, state, g1, options, backend)
    g2 = gate(1, attended, state and state.projection_reference, None, None)
    rows = tokenops.gathered_linear(g2.reference, *_affine(weights, "projection"), index=g2, backend=backend)
    projection = into(state and state.projection, rows, g2)
    g3 = gate(2, projection, state and state.mlp_reference, x, "mlp_layer_norm")
    layers = (*_affine(weights, "mlp_1"), *_affine(weights, "mlp_2"))
    rows = tokenops.gathered_mlp(g3.reference, *layers, index=g3, norm=late["mlp_layer_norm"], backend=backend)
    mlp = into(state and state.mlp, rows, g3)
    new = BlockState(g1.reference, qkv, attention, g2.reference, projection, g3.reference, mlp)
    return BlockResult(g3.total + mlp, new, (g1, g2, g3))


def _affine(weights: Weights, name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _attend(
    qkv: Tensor, weights: Weights, state: BlockState | None, gate: DeltaGate, options: Options, backend: str | None
) -> tuple[Tensor, DeltaState | None]:
    if options.window is not None:
        return attend_in_windows(qkv, weights, options), None
    query, key, value = qkv.unflatten(-1, (3, options.heads, -1)).permute(2, 0, 3, 1, 4)
    out, attention = tokenops.delta_attention(
        query,
        key,
        value,
        None if state is None else gate,
        state and state.attention,
        mode=options.mode,
        rel_pos=position_bias(query, weights, options.grid, options.pool) if options.rel_pos else None,
        pool=options.pool,
        grid=options.grid if options.pool is not None else None,
        cast=options.cast,
        backend=backend,
    )
    return out.transpose(1, 2).flatten(2), attention


def position_bias(query: Tensor, weights: Weights, grid: tuple[int, int], pool: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """rel_h [B, H, N, gh], rel_w [B, H, N, gw]: products of the unscaled queries and the rows for their distances from each key."""

    def table(name: str, size: int, cell: int) -> Tensor:  # [size, size / cell, D]
        at = torch.arange(size, device=query.device)
        rows = weights[f"relative_position.{name}"][at[:, None] - at[None] + size - 1]
        return rows.unflatten(1, (-1, cell)).mean(2)

    (height, width), (pool_h, pool_w) = grid, pool or (1, 1)
    on_grid = query.unflatten(2, grid)
    rel_h = torch.einsum("bhijd,ikd->bhijk", on_grid, table("y_embedding", height, pool_h))
    rel_w = torch.einsum("bhijd,jkd->bhijk", on_grid, table("x_embedding", width, pool_w))
    return rel_h.flatten(2, 3), rel_w.flatten(2, 3)


def attend_in_windows(qkv: Tensor, weights: Weights, options: Options) -> Tensor:
    """Dense attention within windows of a grid that is filled up, below and on the right, with what the linear layer makes of zeros."""
    assert options.window is not None
    (height, width), (h, w) = options.grid, options.window
    down, across = math.ceil(height / h), math.ceil(width / w)
    padded = weights["qkv.bias"].expand(qkv.shape[0], down * h, across * w, -1).clone()
    padded[:, :height, :width] = qkv.unflatten(1, options.grid)
    windows = padded.unflatten(2, (across, w)).unflatten(1, (down, h)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
    query, key, value = windows.unflatten(-1, (3, options.heads, -1)).permute(2, 0, 3, 1, 4)
    logits = query @ key.mT * query.shape[-1] ** -0.5
    if options.rel_pos:
        rel_h, rel_w = position_bias(query, weights, options.window)
        logits = logits + (rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).flatten(-2)
    out = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
    on_grid = out.unflatten(1, (h, w)).unflatten(0, (-1, down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return on_grid[:, :height, :width].flatten(1, 2)
