"""Launchers of the search for the most similar row of another grid. ``pair_kernels.py`` holds the device code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenops.triton.launch import dot_precision, interpreting, launch, power_of_two, processors
from tokenops.types import PairProblem, Window


class Side(NamedTuple):
    """One of the two grids, and which of its rows take part."""

    x: Tensor  # [B, N, C], last dimension dense, any other strides
    mask: Tensor | None  # [1|B, N] bool
    scale: Tensor | None  # [1|B, N] float32
    place: Tensor | None  # [1|B, N, 3] int32
    rows: Tensor | None = None  # [B, slots] int32, ascending: the list of those that take part
    listed: Tensor | None = None  # [B] int32, how many there are


class Tiles(NamedTuple):
    """How one program cuts its work."""

    block_a: int
    block_b: int
    block_c: int
    num_warps: int
    num_stages: int


def argmax(problem: PairProblem, best: Tensor, index: Tensor) -> None:
    """Fills best and index [B, Na]."""
    p = problem
    a, b = Side(p.a, p.a_mask, p.a_scale, p.a_place), Side(p.b, p.b_mask, p.b_scale, p.b_place)
    launch_search(a, b, p.window, p.normalize, best, index)


def launch_search(
    a: Side,
    b: Side,
    window: Window | None,
    normalize: bool,
    best: Tensor,
    index: Tensor,
    first_id: int = 0,
    id_step: int = 1,
    splits: int | None = None,
) -> None:
    """Fills best and index [B, Na], by slots of a; index names row j of b by first_id + j * id_step.

    ``splits`` is how many programs share a block of a, each with a part of b; None: as many as keep the device busy.
    """
    from tokenops.triton.token_merge import pair_kernels as kernels

    samples, rows, width = a.x.shape
    tiles = _tiles(a.x, b.x.shape[1], window is not None)
    if splits is None:
        splits = _splits(a.x, b.x.shape[1], tiles)
    share_best, share_index = (x if splits == 1 else x.new_empty((splits, samples, rows)) for x in (best, index))
    unit = 8 if all(stride % 8 == 0 for x in (a.x, b.x) for stride in _strides(x)[:2]) else 1
    of_a = _describe(a._replace(place=None), tiles.block_a, unit, normalize)
    of_b = _describe(b, tiles.block_b, unit, normalize)
    t_low, t_high, reach_y, reach_x = window or (0, 0, 0, 0)
    launch(
        kernels.search,
        samples * splits * of_a.blocks,
        a.x,
        a=a.x,
        b=b.x,
        a_rows=a.rows,
        b_rows=b.rows,
        a_count=a.listed,
        b_count=b.listed,
        a_factor=of_a.factor,
        b_factor=of_b.factor,
        a_shrink=of_a.shrink,
        b_shrink=of_b.shrink,
        a_unusual=of_a.unusual,
        b_unusual=of_b.unusual,
        b_bounds=of_b.bounds,
        a_place=a.place,
        b_place=b.place,
        best=share_best,
        index=share_index,
        a_strides=_strides(a.x, unit),
        b_strides=_strides(b.x, unit),
        a_place_strides=_strides(a.place),
        b_place_strides=_strides(b.place),
        NA=rows,
        NB=b.x.shape[1],
        samples=samples,
        a_blocks=of_a.blocks,
        b_blocks=of_b.blocks,
        splits=splits,
        t_low=t_low,
        t_high=t_high,
        reach_y=reach_y,
        reach_x=reach_x,
        first_id=first_id,
        id_step=id_step,
        C=width,
        UNIT=unit,
        PRECISION=dot_precision(a.x.dtype),
        BLOCK_A=tiles.block_a,
        BLOCK_B=tiles.block_b,
        BLOCK_C=tiles.block_c,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        launch(
            kernels.best_of_shares,
            samples * of_a.blocks,
            a.x,
            share_best=share_best,
            share_index=share_index,
            a_factor=of_a.factor,
            best=best,
            index=index,
            NA=rows,
            samples=samples,
            a_blocks=of_a.blocks,
            pitch=of_a.blocks * tiles.block_a,
            splits=splits,
            BLOCK_A=tiles.block_a,
            num_warps=max(1, tiles.block_a // 32),
        )


class _Description(NamedTuple):
    """What the kernel ``describe`` fills."""

    blocks: int
    factor: Tensor
    shrink: Tensor | None
    unusual: Tensor | None
    bounds: Tensor | None


def _describe(side: Side, block: int, unit: int, normalize: bool) -> _Description:
    from tokenops.triton.token_merge import pair_kernels as kernels

    x = side.x
    batch, tokens, width = x.shape
    blocks = -(-tokens // block)
    factor = torch.empty((batch, blocks * block), dtype=torch.float32, device=x.device)
    # whatever float16 holds, its products and squares are float32 numbers
    shrinks = normalize and x.dtype != torch.float16
    description = _Description(
        blocks,
        factor,
        torch.empty_like(factor) if shrinks else None,
        torch.empty((batch, blocks), dtype=torch.int32, device=x.device) if shrinks else None,
        None if side.place is None else torch.empty((batch, 6, blocks), dtype=torch.int32, device=x.device),
    )
    launch(
        kernels.describe,
        batch * blocks,
        x,
        x=x,
        rows=side.rows,
        count=side.listed,
        mask=None if side.mask is None else side.mask.view(torch.uint8),
        scale=side.scale,
        place=side.place,
        factor=factor,
        shrink=description.shrink,
        unusual=description.unusual,
        bounds=description.bounds,
        x_strides=_strides(x, unit),
        mask_strides=_strides(side.mask),
        scale_strides=_strides(side.scale),
        place_strides=_strides(side.place),
        N=tokens,
        blocks=blocks,
        C=width,
        UNIT=unit,
        NORMALIZE=normalize,
        BLOCK_N=block,
        # 128 bytes of each row at a time
        BLOCK_C=min(128 // x.element_size(), power_of_two(width)),
        num_warps=4,
    )
    return description


def _tiles(a: Tensor, columns: int, window: bool) -> Tiles:
    samples, rows, width = a.shape
    # tl.dot takes no smaller block than 16
    rows, columns, width = (max(16, power_of_two(size)) for size in (rows, columns, width))
    if a.dtype == torch.float32:
        # products on the ordinary cores hold both operands in registers
        block_a = min(rows, 32 if window else 64)
        return Tiles(block_a, min(columns, 32), width if width <= 32 and not window else 16, 4 if block_a > 16 else 1, 2)
    # small blocks where large ones would leave processors idle
    block_a = min(rows, 128 if samples * -(-rows // 128) >= _processors(a) else 64)
    # places, and rows too wide to be held whole, take the registers of half a block
    wide = width > 128
    block_b = min(columns, 32 if window or wide else 64)
    return Tiles(block_a, block_b, 64 if wide else width, max(4, block_a // 16), 2 if window and wide else 3)


def _splits(a: Tensor, columns: int, tiles: Tiles) -> int:
    """As many programs as the device runs at once, but two blocks of b for each at least."""
    programs = a.shape[0] * -(-a.shape[1] // tiles.block_a)
    return max(1, min(2 * _processors(a) // max(programs, 1), columns // (2 * tiles.block_b)))


def _processors(on: Tensor) -> int:
    return 1 if interpreting() else processors(on.get_device())


def _strides(tensor: Tensor | None, unit: int = 1) -> tuple[int, ...]:
    """In units; that of a sample is 0 where one serves all."""
    if tensor is None:
        return (0, 0, 0)
    first, *others = tensor.stride()
    return (0 if tensor.shape[0] == 1 else first // unit, others[0] // unit, *others[1:])
