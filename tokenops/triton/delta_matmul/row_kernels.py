"""The Triton kernels that move listed rows, and those of layer normalisation on listed rows.

Letters as everywhere: B samples, N tokens, K slots of a list, C channels. A *slot* is a place in an index list, a *row* is what the list
names there; an id that is no row of the grid makes an empty slot. Programs take slots of all samples in one sequence: slot s is slot s % K
of sample s // K. Every value has one program that writes it: no atomics, the same bits in every run.

Offsets are 64-bit from the row id on: a grid may hold more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _listed(index, slots, total, stride, N, K):
    """Sample, place in the list and row of each slot, and which slots name a row. Without a list slot k names row k."""
    exists = slots < total
    b = slots // K
    k = slots - b * K
    if index is None:
        return b, k, k, exists
    else:
        ids = tl.load(index + b.to(tl.int64) * stride + k, mask=exists, other=-1)
        return b, k, ids, exists & (ids >= 0) & (ids < N)


@triton.jit
def _places(base, b, rows, strides, columns):
    """Pointers to some columns of rows of a grid."""
    return base + (b.to(tl.int64) * strides[0] + rows.to(tl.int64) * strides[1])[:, None] + columns[None, :] * strides[2]


@triton.jit
def _sums(x, skip, b, rows, here, x_strides, skip_strides, columns, C: tl.constexpr):
    """Some columns of x, or of x + skip as rounded to the dtype of x: what is compared is what is returned."""
    within = here[:, None] & (columns < C)[None, :]
    tile = tl.load(_places(x, b, rows, x_strides, columns), mask=within, other=0.0)
    if skip is not None:
        added = tl.load(_places(skip, b, rows, skip_strides, columns), mask=within, other=0.0).to(tl.float32)
        tile = (tile.to(tl.float32) + added).to(x.dtype.element_ty)
    return tile.to(tl.float32)


@triton.jit
def _statistics(x, skip, b, rows, here, x_strides, skip_strides, eps, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and inverse standard deviation of rows. Where a row fits into a block it is loaded once: the compiler sees equal loads."""
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        total += _sums(x, skip, b, rows, here, x_strides, skip_strides, start + tl.arange(0, BLOCK_C), C)
    mean = tl.sum(total, 1) / C
    squares = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        tile = _sums(x, skip, b, rows, here, x_strides, skip_strides, columns, C)
        centered = tl.where((columns < C)[None, :], tile - mean[:, None], 0.0)
        squares += centered * centered
    return mean, 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / C + eps)


@triton.jit
def _normalized(tile, mean, inverse, weight, bias, columns, C: tl.constexpr):
    """Some columns of rows after the layer normalisation, 0 behind the last one."""
    scale = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)
    return (tile - mean[:, None]) * inverse[:, None] * scale[None, :] + shift[None, :]


@triton.jit(do_not_specialize=["N", "K", "total"])
def put_rows(
    rows,  # [B, K, C], or None: zeros
    index,  # [1|B, K] int32
    out,  # [B, N, C]
    rows_strides,
    index_stride,
    out_strides,
    N,
    K,
    total,  # B K
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes the listed rows of a grid."""
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    columns = (tl.program_id(0) % PARTS) * BLOCK_C + tl.arange(0, BLOCK_C)
    slots = (tl.program_id(0) // PARTS) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, k, ids, filled = _listed(index, slots, total, index_stride, N, K)
    within = filled[:, None] & (columns < C)[None, :]
    tile = tl.zeros([BLOCK_N, BLOCK_C], out.dtype.element_ty)
    if rows is not None:
        tile = tl.load(_places(rows, b, k, rows_strides, columns), mask=within, other=0.0)
    tl.store(_places(out, b, ids, out_strides, columns), tile, mask=within)


@triton.jit(do_not_specialize=["N", "K", "total"])
def take_rows(
    source,  # [B, N, C]
    index,  # [1|B, K] int32
    rows,  # [B, K, C]: 0 in empty slots
    source_strides,
    index_stride,
    rows_strides,
    N,
    K,
    total,  # B K
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copies the listed rows of a grid."""
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    columns = (tl.program_id(0) % PARTS) * BLOCK_C + tl.arange(0, BLOCK_C)
    slots = (tl.program_id(0) // PARTS) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, k, ids, filled = _listed(index, slots, total, index_stride, N, K)
    inside = (columns < C)[None, :]
    tile = tl.load(_places(source, b, ids, source_strides, columns), mask=filled[:, None] & inside, other=0.0)
    tl.store(_places(rows, b, k, rows_strides, columns), tile, mask=(slots < total)[:, None] & inside)


@triton.jit(do_not_specialize=["N", "K", "total"])
def normalize_statistics(
    x,  # [B, N, C]
    index,  # [1|B, K] int32 or None
    mean,  # [B, K] float32
    inverse,  # [B, K] float32: one over the standard deviation; both 0 in empty slots
    x_strides,
    index_stride,
    eps,
    N,
    K,
    total,  # B K
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, _, ids, filled = _listed(index, slots, total, index_stride, N, K)
    means, inverses = _statistics(x, None, b, ids, filled, x_strides, None, eps, C, BLOCK_N, BLOCK_C)
    tl.store(mean + slots, means, mask=slots < total)
    tl.store(inverse + slots, tl.where(filled, inverses, 0.0), mask=slots < total)


@triton.jit(do_not_specialize=["N", "K", "total"])
def normalize_backward(
    grad,  # [B, K, C] float32, of the normalised rows
    x,  # [B, N, C]
    index,  # [1|B, K] int32 or None
    mean,  # [B, K] float32
    inverse,  # [B, K] float32
    weight,  # [C]
    added,  # [B, N, C] or None: gradient that reaches the rows without the normalisation
    grad_x,  # [B, N, C], of which the listed rows are written
    x_strides,
    index_stride,
    added_strides,
    grad_x_strides,
    N,
    K,
    total,  # B K
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """With y = (x - mean) r and d = grad weight: dx = r (d - mean(d) - y mean(d y))."""
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, _, ids, filled = _listed(index, slots, total, index_stride, N, K)
    means = tl.load(mean + slots, mask=filled, other=0.0)[:, None]
    inverses = tl.load(inverse + slots, mask=filled, other=0.0)[:, None]
    sum_d = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    sum_dy = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        scale = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)
        d = _compact(grad, slots, filled, columns, C) * scale[None, :]
        y = (_sums(x, None, b, ids, filled, x_strides, None, columns, C) - means) * inverses
        sum_d += d
        sum_dy += d * y
    mean_d = (tl.sum(sum_d, 1) / C)[:, None]
    mean_dy = (tl.sum(sum_dy, 1) / C)[:, None]
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        scale = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)
        d = _compact(grad, slots, filled, columns, C) * scale[None, :]
        y = (_sums(x, None, b, ids, filled, x_strides, None, columns, C) - means) * inverses
        within = filled[:, None] & (columns < C)[None, :]
        result = inverses * (d - mean_d - y * mean_dy)
        if added is not None:
            result += tl.load(_places(added, b, ids, added_strides, columns), mask=within, other=0.0).to(tl.float32)
        tl.store(_places(grad_x, b, ids, grad_x_strides, columns), result.to(grad_x.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["N", "K", "total", "strip"])
def normalize_parameters(
    grad,  # [B, K, C] float32, of the normalised rows
    x,  # [B, N, C]
    index,  # [1|B, K] int32 or None
    mean,  # [B, K] float32
    inverse,  # [B, K] float32
    of_weight,  # [strips, C] float32
    of_bias,  # [strips, C] float32
    x_strides,
    index_stride,
    N,
    K,
    total,  # B K
    strip,  # slots of a strip, whole blocks
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over a strip of slots. The launcher adds the strips up."""
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    columns = (tl.program_id(0) % PARTS) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = (tl.program_id(0) // PARTS).to(tl.int64)
    weights = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    biases = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, strip, BLOCK_N):
        slots = (at * strip + first).to(tl.int32) + tl.arange(0, BLOCK_N)
        b, _, ids, filled = _listed(index, slots, total, index_stride, N, K)
        means = tl.load(mean + slots, mask=filled, other=0.0)[:, None]
        inverses = tl.load(inverse + slots, mask=filled, other=0.0)[:, None]
        d = _compact(grad, slots, filled, columns, C)
        weights += d * (_sums(x, None, b, ids, filled, x_strides, None, columns, C) - means) * inverses
        biases += d
    tl.store(of_weight + at * C + columns, tl.sum(weights, 0), mask=columns < C)
    tl.store(of_bias + at * C + columns, tl.sum(biases, 0), mask=columns < C)


@triton.jit
def _compact(base, slots, here, columns, C: tl.constexpr):
    """Some columns of dense rows."""
    return tl.load(base + slots.to(tl.int64)[:, None] * C + columns[None, :], mask=here[:, None] & (columns < C)[None, :], other=0.0)
