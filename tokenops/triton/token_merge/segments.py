"""Launchers of merging along a plan, its way back, and its gradient. ``segment_kernels.py`` holds the device code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenops.triton.launch import launch, registers, row_strides, tile_of
from tokenops.types import MergePlan

# elements of a program's tile, 8 a thread of 4 warps
TILE = 1024


def merge(x: Tensor, plan: MergePlan, size: Tensor | None, mode: str, out: Tensor) -> None:
    """Fills out [B, n_out, W] from x [B, N, W]."""
    from tokenops.triton.token_merge import segment_kernels as kernels

    batch, rows, width = out.shape
    tile = tile_of(width, TILE)
    blocks = -(-rows // tile.rows)
    launch(
        kernels.merge_rows,
        batch * blocks * -(-width // tile.columns),
        x,
        x=x,
        order=plan.order,
        offsets=plan.offsets,
        size=size,
        out=out,
        x_strides=row_strides(x),
        order_strides=row_strides(plan.order),
        offsets_strides=row_strides(plan.offsets),
        size_strides=row_strides(size),
        out_strides=row_strides(out),
        N=x.shape[1],
        rows_out=rows,
        blocks=blocks,
        W=width,
        MODE="keep" if mode in ("replace", "drop") else mode,
        BLOCK_N=tile.rows,
        BLOCK_W=tile.columns,
        num_warps=4,
        # left to itself, the assembler spills two registers of sm_80 to fit one more program beside the others
        **registers(255),
    )


def merge_backward(
    grad_out: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    plan: MergePlan,
    size: Tensor | None,
    mode: str,
    grad_x: Tensor | None,
    grad_size: Tensor | None,
) -> None:
    """Fills grad_x [B, N, W] and grad_size [B, N], where wanted, from grad_out [B, n_out, W]."""
    if mode == "mean":
        _spread(grad_out, plan, grad_x, mass=_masses(plan, size), size=size, x=x, merged=out, grad_size=grad_size)
    elif grad_x is None:
        return
    elif mode == "amax":
        assert x is not None
        assert out is not None
        _share_maxima(grad_out, x, out, plan, grad_x)
    else:
        _spread(grad_out, plan, grad_x, keep=mode != "sum")


def unmerge(y: Tensor, plan: MergePlan, mode: str, out: Tensor) -> None:
    """Fills out [B, N, W] from y [B, n_out, W]."""
    _spread(y, plan, out, keep=mode == "drop")


def _spread(
    y: Tensor,
    plan: MergePlan,
    out: Tensor | None,
    *,
    keep: bool = False,
    mass: Tensor | None = None,
    grad_size: Tensor | None = None,
    **others: Tensor | None,
) -> None:
    """Rows to members; ``mass`` and the like as the kernel says."""
    from tokenops.triton.token_merge import segment_kernels as kernels

    batch, rows, width = y.shape
    tokens = plan.slot.shape[1]
    tile = tile_of(width, TILE)
    blocks = -(-tokens // tile.rows)
    tensors: dict[str, Tensor | None] = {
        "y": y,
        "slot": plan.slot,
        "order": plan.order,
        "offsets": plan.offsets,
        "out": out,
        "mass": mass,
        "grad_size": grad_size,
        **dict.fromkeys(("size", "x", "merged")),
        **others,
    }
    launch(
        kernels.spread_rows,
        batch * blocks,
        y,
        **tensors,
        **{f"{name}_strides": row_strides(tensor) for name, tensor in tensors.items()},
        N=tokens,
        rows_out=rows,
        blocks=blocks,
        W=width,
        KEEP=keep,
        BLOCK_N=tile.rows,
        BLOCK_W=tile.columns,
        num_warps=4,
    )


def _masses(plan: MergePlan, size: Tensor | None) -> Tensor:
    """[1|B, n_out]"""
    from tokenops.triton.token_merge import segment_kernels as kernels

    batch = plan.slot.shape[0] if size is None else max(plan.slot.shape[0], size.shape[0])
    mass = torch.empty((batch, plan.n_out), dtype=torch.float32, device=plan.slot.device)
    block = 128
    blocks = -(-plan.n_out // block)
    launch(
        kernels.add_masses,
        batch * blocks,
        mass,
        order=plan.order,
        offsets=plan.offsets,
        size=size,
        mass=mass,
        order_strides=row_strides(plan.order),
        offsets_strides=row_strides(plan.offsets),
        size_strides=row_strides(size),
        N=plan.slot.shape[1],
        rows_out=plan.n_out,
        blocks=blocks,
        BLOCK_N=block,
        num_warps=4,
    )
    return mass


def _share_maxima(grad_out: Tensor, x: Tensor, out: Tensor, plan: MergePlan, grad_x: Tensor) -> None:
    from tokenops.triton.token_merge import segment_kernels as kernels

    batch, tokens, width = grad_x.shape
    tile = tile_of(width, TILE)
    blocks = -(-max(tokens, plan.n_out) // tile.rows)
    tensors: dict[str, Any] = {"grad_out": grad_out, "x": x, "out": out, "grad_x": grad_x}
    tensors |= {"slot": plan.slot, "order": plan.order, "offsets": plan.offsets}
    launch(
        kernels.share_maxima,
        batch * blocks * -(-width // tile.columns),
        grad_out,
        **tensors,
        **{f"{name}_strides": row_strides(tensor) for name, tensor in tensors.items()},
        N=tokens,
        rows_out=plan.n_out,
        blocks=blocks,
        W=width,
        BLOCK_N=tile.rows,
        BLOCK_W=tile.columns,
        num_warps=4,
    )
