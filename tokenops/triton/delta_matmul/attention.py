"""Attention on buffers of which a few rows changed, on a GPU: launchers. ``attention_kernels.py`` holds the device code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenops.triton.launch import (
    device_objections,
    dot_precision,
    grid_strides,
    interpreting,
    launch,
    power_of_two,
    shared_memory,
    strides_of,
)
from tokenops.triton.sparse_attention.tiles import TABLE, Rows, Tiles, choose_tiles, pad_heads
from tokenops.types import DeltaAttentionProblem, DeltaState


def _rows(listed: Tiles, gathered: Tiles) -> Rows:
    return Rows(plain=listed, biased=listed, masked=gathered)


# as the table of sparse_attention, and found in the same way: its forward kernel's loop three times over takes more registers
EXACT = {
    ("forward", 2): {
        64: _rows(Tiles(128, 32, 8, 3), gathered=Tiles(64, 32, 8, 2)),
        128: _rows(Tiles(64, 32, 8, 2), gathered=Tiles(64, 16, 8, 2)),
        256: _rows(Tiles(32, 32, 8, 2), gathered=Tiles(32, 16, 8, 2)),
    },
    ("forward", 4): {
        64: _rows(Tiles(32, 16, 4, 2), gathered=Tiles(32, 16, 4, 2)),
        128: _rows(Tiles(16, 16, 8, 2), gathered=Tiles(16, 16, 4, 2)),
        256: _rows(Tiles(16, 16, 8, 2), gathered=Tiles(16, 16, 8, 2)),
    },
}


def attention_objections(problem: DeltaAttentionProblem) -> list[str]:
    """Why these kernels, beyond what no compiled kernel of this room serves, cannot serve a call; empty if they can."""
    return device_objections("query", problem.query)


def attention(problem: DeltaAttentionProblem, state: DeltaState, out: Tensor) -> None:
    """Fills out [B, H, N, Dv] and brings the state, of which nothing is known in a first frame, up to this frame."""
    if state.probability is None:
        _exact(problem, state, out)
    else:
        _paper(problem, state, state.probability, out)


def _exact(problem: DeltaAttentionProblem, state: DeltaState, out: Tensor) -> None:
    from tokenops.triton.delta_matmul import attention_kernels as kernels

    assert state.key is not None
    assert state.turn is not None
    order, fresh = None, None
    slice_rows, turns = _rotation(problem.query.shape[2], problem.refresh)
    if problem.rows is not None and problem.cells is not None:
        order, fresh = _order_rows(problem, problem.rows, problem.cells, state.turn, slice_rows)
    inputs, (out_strides, old_key_strides, old_value_strides) = _inputs(problem, out, state.key, state.value)
    tiles = _tiles(problem, None)
    _launch(
        kernels.exact,
        problem,
        tiles,
        **inputs,
        out=out,
        old_key=state.key,
        old_value=state.value,
        output=state.output,
        maximum=state.maximum,
        total=state.total,
        peak=state.peak,
        order=order,
        fresh=fresh,
        out_strides=out_strides,
        old_key_strides=old_key_strides,
        old_value_strides=old_value_strides,
        guard=float(problem.guard),
    )
    _replace_cells(problem, state, max(1, turns))


def _paper(problem: DeltaAttentionProblem, state: DeltaState, probability: Tensor, out: Tensor) -> None:
    from tokenops.triton.delta_matmul import attention_kernels as kernels

    inputs, (out_strides, old_value_strides) = _inputs(problem, out, state.value)
    if problem.cells is None:
        # a first frame: every cell is new
        inputs["J"] = inputs["M"]
    _launch(
        kernels.paper,
        problem,
        _tiles(problem, probability),
        **inputs,
        out=out,
        old_value=state.value,
        output=state.output,
        probability=probability,
        out_strides=out_strides,
        old_value_strides=old_value_strides,
        STORED_PRECISION=dot_precision(probability.dtype),
    )
    _replace_cells(problem, state, 1)


def _rotation(tokens: int, refresh: int) -> tuple[int, int]:
    """(rows computed afresh in a frame, frames until all had their turn) if each row has its turn at least every ``refresh`` frames."""
    if refresh == 0:
        return 0, 0
    rows = -(-tokens // refresh)
    return rows, -(-tokens // rows)


def _order_rows(problem: DeltaAttentionProblem, rows: Tensor, cells: Tensor, turn: Tensor, slice_rows: int) -> tuple[Tensor, Tensor]:
    """(order [B, N], fresh [B]): row ids with those to compute afresh in front, and how many those are."""
    from tokenops.triton.delta_matmul import attention_kernels as kernels

    batch, _, tokens, _ = problem.query.shape
    keys = problem.key.shape[2]
    order = torch.empty((batch, tokens), dtype=torch.int32, device=rows.device)
    fresh = torch.empty(batch, dtype=torch.int32, device=rows.device)
    block = min(2048, max(256, power_of_two(tokens)))
    launch(
        kernels.order_rows,
        batch,
        problem.query,
        order=order,
        fresh=fresh,
        marks=torch.empty_like(order, dtype=torch.uint8),
        rows=rows,
        cells=cells,
        turn=turn,
        rows_stride=strides_of(rows)[0],
        cells_stride=strides_of(cells)[0],
        N=tokens,
        M=keys,
        K=rows.shape[1],
        J=cells.shape[1],
        slice_rows=slice_rows,
        # infinity is a crossover, too
        most=math.floor(min(problem.crossover, 1.0) * keys),
        BLOCK=block,
        num_warps=min(8, block // 256),
    )
    return order, fresh


def _replace_cells(problem: DeltaAttentionProblem, state: DeltaState, turns: int) -> None:
    """What the frame's cells are, for the next frame; and whose turn it is then."""
    from tokenops.triton.delta_matmul import attention_kernels as kernels

    key, value, cells = problem.key, problem.value, problem.cells
    if cells is None:
        state.value.copy_(value)
        if state.key is not None and state.turn is not None:
            state.key.copy_(key)
            state.turn.zero_()
        return
    unit, (old_key_strides, old_value_strides, key_strides, value_strides) = grid_strides(state.key, state.value, key, value)
    block_d, block_dv = pad_heads(key.shape[3], value.shape[3])
    block = 4096 // max(block_d, block_dv)
    # without a slot the turn goes on all the same
    blocks = max(1, -(-cells.shape[1] // block))
    launch(
        kernels.replace_cells,
        key.shape[0] * key.shape[1] * blocks,
        key,
        old_key=state.key,
        old_value=state.value,
        key=key,
        value=value,
        cells=cells,
        turn=state.turn,
        old_key_strides=old_key_strides,
        old_value_strides=old_value_strides,
        key_strides=key_strides,
        value_strides=value_strides,
        cells_stride=strides_of(cells)[0],
        M=key.shape[2],
        J=cells.shape[1],
        turns=turns,
        H=key.shape[1],
        blocks=blocks,
        D=key.shape[3],
        DV=value.shape[3],
        UNIT=unit,
        BLOCK_K=block,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        num_warps=4,
    )


def _inputs(problem: DeltaAttentionProblem, *others: Tensor | None) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """The arguments that the kernels of both modes share, and the row strides of what else they read and write."""
    query, key, value, cells = problem.query, problem.key, problem.value, problem.cells
    rel_h, rel_w = problem.rel_h, problem.rel_w
    rel_strides = tuple((0, 0, 0) if x is None else strides_of(x)[:3] for x in (rel_h, rel_w))
    unit, (query_strides, key_strides, value_strides, *other_strides) = grid_strides(query, key, value, *others)
    block_d, block_dv = pad_heads(query.shape[3], value.shape[3])
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "cells": cells,
        "rel_h": rel_h,
        "rel_w": rel_w,
        "query_strides": query_strides,
        "key_strides": key_strides,
        "value_strides": value_strides,
        "cells_stride": 0 if cells is None else strides_of(cells)[0],
        "rel_strides": rel_strides,
        "scale": problem.scale * math.log2(math.e),
        "N": query.shape[2],
        "M": key.shape[2],
        "J": 0 if cells is None else cells.shape[1],
        "gh": 0 if rel_h is None else rel_h.shape[3],
        "gw": 0 if rel_w is None else rel_w.shape[3],
        "H": query.shape[1],
        "D": query.shape[3],
        "DV": value.shape[3],
        "UNIT": unit,
        "WIDE": max(query.shape[2] * rows[2] for rows in rel_strides) >= 2**31,
        "PRECISION": dot_precision(query.dtype),
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
    }
    return inputs, other_strides


def _tiles(problem: DeltaAttentionProblem, probability: Tensor | None) -> Tiles:
    """Those of dense attention, whose loop this is, with a gathered tile where there is rel_pos or a stored matrix."""
    query, value = problem.query, problem.value
    gathered = [x for x in (problem.rel_h, problem.rel_w, probability) if x is not None]
    return choose_tiles(
        "forward",
        query.shape[3],
        value.shape[3],
        max(query.element_size(), 0 if probability is None else probability.element_size()),
        query.shape[2],
        problem.key.shape[2],
        biased=True,
        gathered=sum(x.element_size() for x in gathered),
        limit=None if interpreting() else shared_memory(query.get_device()),
        table=EXACT if probability is None else TABLE,
    )


def _launch(kernel: Any, problem: DeltaAttentionProblem, tiles: Tiles, **arguments: Any) -> None:
    batch, heads, tokens, _ = problem.query.shape
    blocks = -(-tokens // tiles.block_q)
    launch(
        kernel,
        blocks * batch * heads,
        problem.query,
        **arguments,
        blocks=blocks,
        BLOCK_Q=tiles.block_q,
        BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
