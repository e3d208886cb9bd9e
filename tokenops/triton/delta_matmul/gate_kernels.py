"""The Triton kernels of the gate: how much each token changed, and sending on the tokens that were chosen.

A frame is read once to measure, then token_select's kernel chooses, then the chosen rows are read once more. Letters, slots and rows are
row_kernels.py's; programs that need no list take the rows of all samples in one sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenops.triton.delta_matmul.row_kernels import _listed, _normalized, _places, _statistics, _sums

LARGEST_INT = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _current(tile, mean, inverse, norm_weight, norm_bias, columns, dtype, C: tl.constexpr):
    """What the gate compares, rounded as it is sent."""
    if norm_weight is not None:
        tile = _normalized(tile, mean, inverse, norm_weight, norm_bias, columns, C).to(dtype).to(tl.float32)
    return tile


@triton.jit
def _measured(size, change, order, ORDER: tl.constexpr):
    """The parts of a vector norm, so far."""
    if ORDER == "two":
        return size + change * change
    elif ORDER == "one":
        return size + tl.abs(change)
    elif ORDER == "zero":
        return size + tl.where(change != 0.0, 1.0, 0.0)
    elif ORDER == "inf":
        # magnitudes are in the order of their bits, in which NaN comes last
        bits = change.to(tl.int32, bitcast=True) & LARGEST_INT
        return tl.maximum(size.to(tl.int32, bitcast=True), bits).to(tl.float32, bitcast=True)
    else:
        return size + tl.exp2(order * tl.log2(tl.abs(change)))


@triton.jit
def _norm(size, order, ORDER: tl.constexpr):
    """The norm of each row, from the parts."""
    if ORDER == "two":
        return tl.sqrt_rn(tl.sum(size, 1))
    elif ORDER == "inf":
        return tl.max(size.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    elif ORDER == "any":
        return tl.exp2(tl.log2(tl.sum(size, 1)) / order)
    else:
        return tl.sum(size, 1)


@triton.jit(do_not_specialize=["N", "total"])
def compare(
    x,  # [B, N, C]
    skip,  # [B, N, C] or None
    old,  # [B, N, C] or None: the reference
    norm_weight,  # [C], both or neither
    norm_bias,
    sums,  # [B, N, C], given if and only if skip is: x + skip
    change,  # [B, N] float32 or None: how much each token changed
    new,  # [B, N, C] or None: the new reference, or its beginning
    values,  # [B, N, C], both or neither: every token, in a first frame
    delta,
    x_strides,
    skip_strides,
    old_strides,
    sums_strides,
    new_strides,
    values_strides,
    delta_strides,
    eps,
    order,  # of the norm; read where ORDER is "any" only
    N,
    total,  # B N
    ORDER: tl.constexpr,  # two, one, zero, inf, any
    KEEP: tl.constexpr,  # new is old, until the chosen rows are sent; else the whole frame
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One pass over a frame."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, _, n, here = _listed(None, rows, total, 0, N, N)
    mean = tl.zeros([BLOCK_N], tl.float32)
    inverse = mean
    if norm_weight is not None:
        mean, inverse = _statistics(x, skip, b, n, here, x_strides, skip_strides, eps, C, BLOCK_N, BLOCK_C)
    size = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        within = here[:, None] & (columns < C)[None, :]
        tile = _sums(x, skip, b, n, here, x_strides, skip_strides, columns, C)
        current = _current(tile, mean, inverse, norm_weight, norm_bias, columns, x.dtype.element_ty, C)
        if old is not None:
            before = tl.load(_places(old, b, n, old_strides, columns), mask=within, other=0.0).to(tl.float32)
            size = _measured(size, current - before, order, ORDER)
        if sums is not None:
            tl.store(_places(sums, b, n, sums_strides, columns), tile.to(sums.dtype.element_ty), mask=within)
        if new is not None:
            tl.store(_places(new, b, n, new_strides, columns), (before if KEEP else current).to(new.dtype.element_ty), mask=within)
        if values is not None:
            tl.store(_places(values, b, n, values_strides, columns), current.to(values.dtype.element_ty), mask=within)
            tl.store(_places(delta, b, n, delta_strides, columns), current.to(delta.dtype.element_ty), mask=within)
    if change is not None:
        tl.store(change + rows, _norm(size, order, ORDER), mask=here)


@triton.jit(do_not_specialize=["N", "K", "total"])
def send(
    x,  # [B, N, C], with the skip in it
    old,  # [B, N, C]: the reference
    norm_weight,  # [C], both or neither
    norm_bias,
    index,  # [B, K] int32
    values,  # [B, K, C]
    delta,  # [B, K, C]
    new,  # [B, N, C], of which the chosen rows are written; or None
    x_strides,
    old_strides,
    index_stride,
    values_strides,
    delta_strides,
    new_strides,
    eps,
    N,
    K,
    total,  # B K
    IN_PLACE: tl.constexpr,  # new is old
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The chosen tokens, and their change."""
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, k, ids, filled = _listed(index, slots, total, index_stride, N, K)
    mean = tl.zeros([BLOCK_N], tl.float32)
    inverse = mean
    if norm_weight is not None:
        mean, inverse = _statistics(x, None, b, ids, filled, x_strides, None, eps, C, BLOCK_N, BLOCK_C)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = (columns < C)[None, :]
        within = filled[:, None] & inside
        tile = _sums(x, None, b, ids, filled, x_strides, None, columns, C)
        current = _current(tile, mean, inverse, norm_weight, norm_bias, columns, x.dtype.element_ty, C)
        # the normalisation makes something of nothing
        current = tl.where(filled[:, None], current, 0.0)
        before = tl.load(_places(old, b, ids, old_strides, columns), mask=within, other=0.0).to(tl.float32)
        every = (slots < total)[:, None] & inside
        tl.store(_places(values, b, k, values_strides, columns), current.to(values.dtype.element_ty), mask=every)
        tl.store(_places(delta, b, k, delta_strides, columns), (current - before).to(delta.dtype.element_ty), mask=every)
        if new is not None:
            if IN_PLACE:
                # several threads may hold an element: all of them must have read it
                tl.debug_barrier()
            tl.store(_places(new, b, ids, new_strides, columns), current.to(new.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["N", "K", "total"])
def invert_lists(
    index,  # [B, K] int32
    slot_of,  # [B, N] int32, -1 to begin with: the slot that names each row
    index_stride,
    N,
    K,
    total,  # B K
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b, k, ids, filled = _listed(index, slots, total, index_stride, N, K)
    tl.store(slot_of + b.to(tl.int64) * N + ids, k, mask=filled)


@triton.jit
def _of_slots(grad, b, k, chosen, strides, columns, C: tl.constexpr):
    """Some columns of the chosen rows' gradients; None is zero."""
    if grad is None:
        return tl.zeros([chosen.shape[0], columns.shape[0]], tl.float32)
    else:
        places = _places(grad, b, k, strides, columns)
        return tl.load(places, mask=chosen[:, None] & (columns < C)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N", "total"])
def spread_gradients(
    slot_of,  # [B, N] int32, -1 = not chosen
    grad_values,  # [B, K, C] or None, each of these
    grad_delta,  # [B, K, C]
    grad_reference,  # [B, N, C]
    grad_sums,  # [B, N, C]: None where the gradient goes on to the normalisation
    of_current,  # [B, N, C] or None: gradient of what was compared
    of_old,  # [B, N, C] or None: of the old reference
    values_strides,
    delta_strides,
    reference_strides,
    sums_strides,
    of_current_strides,
    of_old_strides,
    N,
    total,  # B N
    WHOLE: tl.constexpr,  # the new reference is the whole frame
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What each row receives from where it was sent."""
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    columns = (tl.program_id(0) % PARTS) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = (tl.program_id(0) // PARTS) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, _, n, here = _listed(None, rows, total, 0, N, N)
    k = tl.load(slot_of + rows, mask=here, other=-1)
    chosen = k >= 0
    within = here[:, None] & (columns < C)[None, :]
    change = _of_slots(grad_delta, b, k, chosen, delta_strides, columns, C)
    kept = _of_slots(grad_reference, b, n, here, reference_strides, columns, C)
    current = _of_slots(grad_values, b, k, chosen, values_strides, columns, C) + change
    current += kept if WHOLE else tl.where(chosen[:, None], kept, 0.0)
    if of_current is not None:
        current += _of_slots(grad_sums, b, n, here, sums_strides, columns, C)
        tl.store(_places(of_current, b, n, of_current_strides, columns), current.to(of_current.dtype.element_ty), mask=within)
    if of_old is not None:
        old = tl.where(chosen[:, None], -change, 0.0 if WHOLE else kept)
        tl.store(_places(of_old, b, n, of_old_strides, columns), old.to(of_old.dtype.element_ty), mask=within)
