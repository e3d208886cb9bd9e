"""The Triton kernels that merge rows along a plan and spread them again.

Letters as everywhere: B samples, N tokens, W elements of a row. An *output row* s owns the tokens order[offsets[s] : offsets[s + 1]], its
members, the destination first. A sum runs over them in that order in float32, and every result has one program that writes it: no atomics,
the same bits in every run. Whatever a plan holds, only rows of the grids are touched: bounds are cut to the order, and an id or a slot out
of range is nobody.

Offsets are 64-bit from the row id on: a grid may hold more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

# members that are on their way at once: a sum needs one after the other, loading them does not
AHEAD = tl.constexpr(4)


@triton.jit
def _segments(offsets, rows, exists, stride, N):
    """Where the members of output rows begin in the order, and how many they are."""
    at = offsets + rows.to(tl.int64) * stride
    begin = tl.minimum(tl.maximum(tl.load(at, mask=exists, other=0), 0), N)
    end = tl.minimum(tl.maximum(tl.load(at + stride, mask=exists, other=0), begin), N)
    return begin, end - begin


@triton.jit
def _members(order, begin, k, count, stride, N):
    """The k-th member of each output row, and which rows have one."""
    listed = k < count
    ids = tl.load(order + (begin + k).to(tl.int64) * stride, mask=listed, other=-1)
    return ids, listed & (ids >= 0) & (ids < N)


@triton.jit
def _sizes(size, ids, there, stride):
    """What members weigh; nobody weighs nothing."""
    if size is None:
        return there.to(tl.float32)
    else:
        return tl.load(size + ids.to(tl.int64) * stride, mask=there, other=0.0)


@triton.jit
def _rows_of(base, ids, stride, column):
    return base + ids.to(tl.int64)[:, None] * stride + column[None, :]


@triton.jit
def _or_zero(rows, here):
    return tl.where(here[:, None], rows, 0.0)


@triton.jit(do_not_specialize=["N", "rows_out", "blocks"])
def merge_rows(
    x,  # [B, N, W]
    order,  # [1|B, N] int32
    offsets,  # [1|B, rows_out + 1] int32
    size,  # [1|B, N] float32, or None: every member weighs 1
    out,  # [B, rows_out, W]
    x_strides,
    order_strides,
    offsets_strides,
    size_strides,
    out_strides,
    N,
    rows_out,
    blocks,  # row blocks a sample
    W: tl.constexpr,
    MODE: tl.constexpr,  # mean, sum, amax; keep: the destination's own row
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A block of output rows, and a block of their columns."""
    COLUMNS: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    column = (tl.program_id(0) % COLUMNS) * BLOCK_W + tl.arange(0, BLOCK_W)
    within = (column < W)[None, :]
    block = tl.program_id(0) // COLUMNS
    b = (block // blocks).to(tl.int64)
    rows = (block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = rows < rows_out
    x += b * x_strides[0]
    order += b * order_strides[0]
    if size is not None:
        size += b * size_strides[0]
    begin, count = _segments(offsets + b * offsets_strides[0], rows, exists, offsets_strides[1], N)
    if MODE == "keep":
        count = tl.minimum(count, 1)
    single = count == 1

    mass = tl.zeros([BLOCK_N], tl.float32)
    merged = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    if MODE == "amax":
        merged += float("-inf")
    for first in range(0, tl.max(count, 0), AHEAD):
        for step in tl.static_range(AHEAD):
            ids, there = _members(order, begin, first + step, count, order_strides[1], N)
            row = tl.load(_rows_of(x, ids, x_strides[1], column), mask=there[:, None] & within, other=0.0).to(tl.float32)
            weight = _sizes(size, ids, there, size_strides[1])
            mass += weight
            if MODE == "amax":
                # no number is the maximum wherever it stands, as in torch
                merged = tl.where(there[:, None] & ((row > merged) | (row != row)), row, merged)
            else:
                # the only member is copied: times its size and divided by it would round
                merged += row * tl.where(single & there, 1.0, weight)[:, None]
    if MODE == "mean":
        # not times a reciprocal, which overflows where sizes are denormal
        merged = merged / tl.where(single | (mass == 0.0), 1.0, mass)[:, None]
    # nobody's row, or a mean without mass
    merged = _or_zero(merged, mass != 0.0)
    tl.store(
        _rows_of(out + b * out_strides[0], rows, out_strides[1], column), merged.to(out.dtype.element_ty), mask=exists[:, None] & within
    )


@triton.jit(do_not_specialize=["N", "rows_out", "blocks"])
def add_masses(
    order,  # [1|B, N] int32
    offsets,  # [1|B, rows_out + 1] int32
    size,  # [1|B, N] float32 or None
    mass,  # [1|B, rows_out] float32
    order_strides,
    offsets_strides,
    size_strides,
    N,
    rows_out,
    blocks,
    BLOCK_N: tl.constexpr,
):
    """What the members of each output row weigh."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = rows < rows_out
    order += b * order_strides[0]
    if size is not None:
        size += b * size_strides[0]
    begin, count = _segments(offsets + b * offsets_strides[0], rows, exists, offsets_strides[1], N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, tl.max(count, 0), AHEAD):
        for step in tl.static_range(AHEAD):
            ids, there = _members(order, begin, first + step, count, order_strides[1], N)
            total += _sizes(size, ids, there, size_strides[1])
    tl.store(mass + b * rows_out + rows, total, mask=exists)


@triton.jit(do_not_specialize=["N", "rows_out", "blocks"])
def spread_rows(
    y,  # [B, rows_out, W]
    slot,  # [1|B, N] int32
    order,  # [1|B, N] int32; read with KEEP only
    offsets,  # [1|B, rows_out + 1] int32
    mass,  # [1|B, rows_out] float32, or None: rows are copied
    size,  # [1|B, N] float32 or None; read beside mass only
    x,  # [B, N, W]; with merged, for the gradient of the size
    merged,  # [B, rows_out, W]
    out,  # [B, N, W] or None
    grad_size,  # [B, N] float32 or None
    y_strides,
    slot_strides,
    order_strides,
    offsets_strides,
    mass_strides,
    size_strides,
    x_strides,
    merged_strides,
    out_strides,
    grad_size_strides,
    N,
    rows_out,
    blocks,  # row blocks a sample
    W: tl.constexpr,
    KEEP: tl.constexpr,  # to the destination only
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A block of tokens: to each the output row of its slot, times size / mass; 0 without a slot."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    tokens = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = tokens < N
    y += b * y_strides[0]
    rows = tl.load(slot + b * slot_strides[0] + tokens.to(tl.int64) * slot_strides[1], mask=exists, other=-1)
    here = (rows >= 0) & (rows < rows_out)
    if KEEP:
        begin, count = _segments(offsets + b * offsets_strides[0], rows, here, offsets_strides[1], N)
        destination, there = _members(order + b * order_strides[0], begin, 0, count, order_strides[1], N)
        here = there & (destination == tokens)
    if mass is not None:
        total = tl.load(mass + b * mass_strides[0] + rows, mask=here, other=0.0)
        # nothing depends on the members of a row without mass
        counts = total != 0.0
        divisor = tl.where(counts, total, 1.0)
        own = tl.full([BLOCK_N], 1.0, tl.float32)
        if size is not None:
            own = tl.load(size + b * size_strides[0] + tokens.to(tl.int64) * size_strides[1], mask=here, other=0.0)
        # a size may be as small as the mass, whose reciprocal overflows: the two are divided
        weight = tl.where(counts, own / divisor, 0.0)
    if grad_size is not None:
        x += b * x_strides[0]
        merged += b * merged_strides[0]
    products = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for start in range(0, W, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)
        within = (column < W)[None, :]
        read = here[:, None] & within
        row = tl.load(_rows_of(y, rows, y_strides[1], column), mask=read, other=0.0).to(tl.float32)
        if grad_size is not None:
            away = tl.load(_rows_of(x, tokens, x_strides[1], column), mask=read, other=0.0).to(tl.float32)
            away -= tl.load(_rows_of(merged, rows, merged_strides[1], column), mask=read, other=0.0).to(tl.float32)
            products += row * away
        if out is not None:
            if mass is not None:
                row *= weight[:, None]
            target = _rows_of(out + b * out_strides[0], tokens, out_strides[1], column)
            tl.store(target, row.to(out.dtype.element_ty), mask=exists[:, None] & within)
    if grad_size is not None:
        target = grad_size + b * grad_size_strides[0] + tokens.to(tl.int64) * grad_size_strides[1]
        tl.store(target, tl.where(counts, tl.sum(products, 1) / divisor, 0.0), mask=exists)


@triton.jit(do_not_specialize=["N", "rows_out", "blocks"])
def share_maxima(
    grad_out,  # [B, rows_out, W]
    x,  # [B, N, W]
    out,  # [B, rows_out, W]
    slot,  # [1|B, N] int32
    order,  # [1|B, N] int32
    offsets,  # [1|B, rows_out + 1] int32
    grad_x,  # [B, N, W]
    grad_out_strides,
    x_strides,
    out_strides,
    slot_strides,
    order_strides,
    offsets_strides,
    grad_x_strides,
    N,
    rows_out,
    blocks,  # blocks a sample, enough for its tokens and for its output rows
    W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Gradients of the members of a block of output rows: the members that reach the maximum share its gradient. In a block of columns.

    Of a block of tokens, those without an output row get their zeros here too.
    """
    COLUMNS: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    column = (tl.program_id(0) % COLUMNS) * BLOCK_W + tl.arange(0, BLOCK_W)
    within = (column < W)[None, :]
    block = tl.program_id(0) // COLUMNS
    b = (block // blocks).to(tl.int64)
    rows = (block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = rows < rows_out
    x += b * x_strides[0]
    grad_x += b * grad_x_strides[0]
    order += b * order_strides[0]

    owner = tl.load(slot + b * slot_strides[0] + rows.to(tl.int64) * slot_strides[1], mask=rows < N, other=0)
    dropped = (rows < N) & ((owner < 0) | (owner >= rows_out))
    zeros = tl.zeros([BLOCK_N, BLOCK_W], grad_x.dtype.element_ty)
    tl.store(_rows_of(grad_x, rows, grad_x_strides[1], column), zeros, mask=dropped[:, None] & within)

    begin, count = _segments(offsets + b * offsets_strides[0], rows, exists, offsets_strides[1], N)
    longest = tl.max(count, 0)
    read = (count > 0)[:, None] & within
    top = tl.load(_rows_of(out + b * out_strides[0], rows, out_strides[1], column), mask=read, other=0.0).to(tl.float32)
    share = tl.load(_rows_of(grad_out + b * grad_out_strides[0], rows, grad_out_strides[1], column), mask=read, other=0.0).to(tl.float32)
    reached = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for first in range(0, longest, AHEAD):
        for step in tl.static_range(AHEAD):
            ids, there = _members(order, begin, first + step, count, order_strides[1], N)
            row = tl.load(_rows_of(x, ids, x_strides[1], column), mask=there[:, None] & within, other=0.0).to(tl.float32)
            reached += (there[:, None] & (row == top)).to(tl.float32)
    # not reached by anyone: the maximum is NaN
    share = share / tl.maximum(reached, 1.0)
    for first in range(0, longest, AHEAD):
        for step in tl.static_range(AHEAD):
            ids, there = _members(order, begin, first + step, count, order_strides[1], N)
            row = tl.load(_rows_of(x, ids, x_strides[1], column), mask=there[:, None] & within, other=0.0).to(tl.float32)
            grad = tl.where(row == top, share, 0.0).to(grad_x.dtype.element_ty)
            tl.store(_rows_of(grad_x, ids, grad_x_strides[1], column), grad, mask=there[:, None] & within)
