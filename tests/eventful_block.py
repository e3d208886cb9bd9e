"""A transformer block that works on what changed since the last frame, written with the public functions as a model would."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenops
from tokenops.types import DeltaGate, DeltaState, WindowState

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
    attention: DeltaState | WindowState
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
) -> tuple[Tensor, DeltaState | WindowState]:
    index, old = (None, None) if state is None else (gate.index, state.attention)
    if options.window is not None:
        assert old is None or isinstance(old, WindowState)
        return _attend_in_windows(qkv, weights, old, index, options, backend)
    assert old is None or isinstance(old, DeltaState)
    query, key, value = _split(qkv, options)
    out, new = tokenops.delta_attention(
        query,
        key,
        value,
        index,
        old,
        mode=options.mode,
        rel_pos=position_bias(query, weights, options.grid, options.pool) if options.rel_pos else None,
        pool=options.pool,
        grid=options.grid if options.pool is not None else None,
        cast=options.cast,
        backend=backend,
    )
    return out.transpose(1, 2).flatten(2), new


def _split(qkv: Tensor, options: Options) -> tuple[Tensor, ...]:
    """Three views [B, H, N, D]."""
    return qkv.unflatten(-1, (3, options.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _attend_in_windows(
    qkv: Tensor, weights: Weights, state: WindowState | None, index: Tensor | None, options: Options, backend: str | None
) -> tuple[Tensor, WindowState]:
    """On a grid that is filled up, below and on the right, with what the linear layer makes of zeros; that part never changes."""
    assert options.window is not None
    (height, width), window = options.grid, options.window
    rows, columns = (math.ceil(size / side) * side for size, side in zip(options.grid, window, strict=True))
    padded = weights["qkv.bias"].expand(qkv.shape[0], rows, columns, -1).clone()
    padded[:, :height, :width] = qkv.unflatten(1, options.grid)
    query, key, value = _split(padded.flatten(1, 2), options)
    if index is not None:
        index = torch.where(index < 0, -1, index // width * columns + index % width)
    rel_pos = position_bias(query, weights, (rows, columns), window=window) if options.rel_pos else None
    out, state = tokenops.delta_window_attention(
        query, key, value, index, state, grid=(rows, columns), window=window, rel_pos=rel_pos, backend=backend
    )
    return out.unflatten(2, (rows, columns))[:, :, :height, :width].flatten(2, 3).transpose(1, 2).flatten(2), state


def position_bias(
    query: Tensor, weights: Weights, grid: tuple[int, int], pool: tuple[int, int] | None = None, window: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """rel_h [B, H, N, gh], rel_w [B, H, N, gw]: products of the unscaled queries and the rows for their distances from the keys of the
    grid, or of their window.
    """

    def table(name: str, size: int, side: int, cell: int) -> Tensor:  # [size, side / cell, D]
        learned = weights[f"relative_position.{name}"]
        own = (len(learned) + 1) // 2
        at = torch.arange(own, device=query.device)
        rows = learned[at[:, None] - at[None] + own - 1]
        if own != side:
            # of another grid: published is an image of both places that is resized, not the list of distances
            rows = F.interpolate(rows.movedim(2, 0)[None], (side, side), mode="bicubic", align_corners=False)[0].movedim(0, 2)
        return rows.unflatten(1, (-1, cell)).mean(2)[torch.arange(size, device=query.device) % side]

    sizes = zip(("y_embedding", "x_embedding"), grid, window or grid, pool or (1, 1), strict=True)
    of_rows, of_columns = (table(*each) for each in sizes)
    on_grid = query.unflatten(2, grid)
    rel_h, rel_w = torch.einsum("bhijd,ikd->bhijk", on_grid, of_rows), torch.einsum("bhijd,jkd->bhijk", on_grid, of_columns)
    return rel_h.flatten(2, 3), rel_w.flatten(2, 3)
