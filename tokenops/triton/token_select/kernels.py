"""The Triton kernels of token selection, halting and packing.

Letters as everywhere: B samples, N tokens, K slots of a list, T packed rows, C channels, W elements of a row. A *slot* is a place in an
index list, a *row* is what the list names there. Every value has one program that writes it: no atomics on results, the same bits in every
run. Nothing is read back to the host: counts stay on the device, and launch grids follow from shapes.

Offsets are 64-bit from the row id on: a grid may hold more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

# bits that one pass of the search decides. Counting costs a ballot for each bit and an addition for every 32 bins: 8 bits cost the least
# instructions for 32 bits (measured on sm_90: 4 x 67 an element; 5 x 60 with 7 bits, 3 x 90 with 10)
DIGIT = tl.constexpr(8)
BINS = tl.constexpr(256)
# how many counts a program adds up at once
CHUNK = tl.constexpr(256)


@triton.jit
def _keys(score, ids, stride, N, protect, threshold, BITS: tl.constexpr, INFINITY: tl.constexpr, THRESHOLD: tl.constexpr):
    """Unsigned numbers in the order of the scores: 0 for NaN and for what the threshold stops, the largest for protected tokens.

    ``score`` holds bit patterns as signed integers, and they are put in order as such; ``threshold`` and INFINITY are places in that order.
    """
    bits = tl.load(score + ids.to(tl.int64) * stride, mask=ids < N, other=0).to(tl.int32)
    # negative numbers run backwards, and -0 is 0
    order = bits ^ ((bits >> 31) & ((1 << (BITS - 1)) - 1))
    order = tl.where(order == -1, 0, order)
    key = order.to(tl.uint32, bitcast=True) + (1 << (BITS - 1))
    passes = (order <= INFINITY) & (order >= -INFINITY - 1)
    if THRESHOLD:
        passes = passes & (order > threshold)
    key = tl.where(passes, key, 0)
    return tl.where(ids < protect, (1 << BITS) - 1, key)


@triton.jit(do_not_specialize=["N", "K", "protect", "threshold"])
def select(
    score,  # [L, N] int16 or int32: bit patterns of floats
    index,  # [L, K] int32
    count,  # [L] int32
    score_strides,
    index_stride,
    N,
    K,  # at least 1
    protect,
    threshold,
    BITS: tl.constexpr,  # of a score
    INFINITY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SEARCH: tl.constexpr,  # K < N: there may be more candidates than slots
    BLOCK: tl.constexpr,  # at most 32768: two counts share an int32
):
    """One program a list. Finds the key of the worst token to keep, digit by digit, and then writes the ids in one ascending pass."""
    row = tl.program_id(0).to(tl.int64)
    score += row * score_strides[0]
    index += row * index_stride
    # so many tokens of the worst key are kept; with a threshold, key 0 is what it stopped
    room = K
    worst = tl.full([], 0, tl.uint32)
    if SEARCH:
        bins = tl.arange(0, BINS)
        for step in tl.static_range(BITS // DIGIT):
            shift = BITS - DIGIT * (step + 1)
            counts = tl.zeros([BINS], tl.int32)
            for start in range(0, N, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                key = _keys(score, ids, score_strides[1], N, protect, threshold, BITS, INFINITY, THRESHOLD)
                counted = ids < N
                if step > 0:
                    counted = counted & ((key >> (shift + DIGIT)) == worst)
                digit = (key >> shift) & (BINS - 1)
                counts += tl.histogram(digit.to(tl.int32), BINS, mask=counted)
            above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
            here = (above < room) & (room <= above + counts)
            worst = (worst << DIGIT) | tl.sum(tl.where(here, bins, 0), 0).to(tl.uint32)
            room -= tl.sum(tl.where(here, above, 0), 0)
    if THRESHOLD:
        room = tl.where(worst == 0, 0, room)

    kept = 0
    for start in range(0, N, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        key = _keys(score, ids, score_strides[1], N, protect, threshold, BITS, INFINITY, THRESHOLD)
        better = (key > worst) & (ids < N)
        equal = (key == worst) & (ids < N)
        # one scan counts both
        both = (better.to(tl.int32) << 16) | equal.to(tl.int32)
        before = tl.cumsum(both, 0) - both
        equals_before = before & 0xFFFF
        keep = better | (equal & (equals_before < room))
        slots = kept + (before >> 16) + tl.minimum(equals_before, room)
        tl.store(index + slots, ids, mask=keep)
        total = tl.sum(both, 0)
        equals = tl.minimum(total & 0xFFFF, room)
        kept += (total >> 16) + equals
        room -= equals
    tl.store(count + row, kept)
    for start in range(kept, K, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        tl.store(index + slots, tl.full([BLOCK], -1, tl.int32), mask=slots < K)


@triton.jit
def _sequence_of(rows, cu_seqlens, sequences, steps):
    """The last packed sequence that begins at or before each row: the one that holds the row, if any does. 2**steps > sequences."""
    low = tl.zeros_like(rows)
    high = low + sequences
    for _ in range(steps):
        middle = (low + high + 1) // 2
        begun = tl.load(cu_seqlens + middle) <= rows
        low = tl.where(begun, middle, low)
        # never below 0, whatever cu_seqlens holds
        high = tl.where(begun, high, tl.maximum(middle - 1, low))
    return low


@triton.jit
def _first_rows(rows, b, cu_seqlens, sequences, steps):
    """Which rows are the first of their sample, and the samples."""
    if cu_seqlens is None:
        return rows == 0, b + tl.zeros_like(rows)
    else:
        sequence = _sequence_of(rows, cu_seqlens, sequences, steps)
        return tl.load(cu_seqlens + sequence) == rows, sequence


@triton.jit
def _inside(rows, cu_seqlens, sequences, N):
    """Which rows belong to a sample."""
    inside = rows < N
    if cu_seqlens is not None:
        inside = inside & (rows < tl.load(cu_seqlens + sequences))
    return inside


@triton.jit
def _of_rows(pointer, b, strides, rows, exists, initial):
    """A value of every row of a sample; without a tensor the initial one."""
    if pointer is None:
        return tl.zeros_like(rows).to(tl.float32) + initial
    else:
        return tl.load(pointer + b * strides[0] + rows.to(tl.int64) * strides[1], mask=exists, other=0.0)


@triton.jit
def _active(pointer, b, strides, rows, inside):
    """Which rows of a sample take part in the step; without a tensor all of them."""
    if pointer is None:
        return inside
    else:
        return inside & (tl.load(pointer + b * strides[0] + rows.to(tl.int64) * strides[1], mask=inside, other=0) != 0)


@triton.jit
def _store_of_rows(pointer, b, strides, rows, exists, value):
    tl.store(pointer + b * strides[0] + rows.to(tl.int64) * strides[1], value, mask=exists)


@triton.jit
def _gate(x, rows, stride, inside, scale, center, LAST: tl.constexpr):
    """The halting score of each row: channel 0 through a sigmoid."""
    if LAST:
        return tl.zeros_like(rows).to(tl.float32) + 1.0
    else:
        channel = tl.load(x + rows.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)
        return 1.0 / (1.0 + tl.exp(center - channel * scale))


@triton.jit(do_not_specialize=["N", "sequences", "steps", "blocks"])
def halt(
    x,  # [B, N, C]
    cum,  # the old state: [B, N] float32, all None in the first step
    remain,
    active,  # [B, N] bytes
    rho,
    counter,
    out,  # [B, N, C] float32; None where new_out holds it, and in the first step
    new_cum,  # the new state, which may be the old one
    new_remain,
    new_active,
    new_rho,
    new_counter,
    new_out,  # [B, N, C]; or [S, C], which holds the old output already
    cu_seqlens,  # [sequences + 1] int32 or None
    x_strides,
    state_strides,  # of sample and row, of the [B, N] in the order of the arguments
    out_strides,
    new_strides,
    new_out_strides,
    scale,
    center,
    limit,
    N,
    sequences,
    steps,
    blocks,  # row blocks a sample
    C: tl.constexpr,
    LAST: tl.constexpr,
    CLASS: tl.constexpr,  # out is that of each sample's first row
    IN_PLACE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One step for a block of rows of one sample."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = rows < N
    x += b * x_strides[0]
    inside = _inside(rows, cu_seqlens, sequences, N)
    h = tl.where(inside, _gate(x, rows, x_strides[1], inside, scale, center, LAST), 0.0)
    was = _active(active, b, state_strides[2], rows, inside)
    old_cum = _of_rows(cum, b, state_strides[0], rows, exists, 0.0)
    old_remain = _of_rows(remain, b, state_strides[1], rows, exists, 1.0)
    old_rho = _of_rows(rho, b, state_strides[3], rows, exists, 0.0)
    old_counter = _of_rows(counter, b, state_strides[4], rows, exists, 1.0)
    total = old_cum + h
    reached = (total > limit) & was
    going = (total < limit) & inside
    taking = was & (reached | going)
    weight = tl.where(taking, tl.where(reached, old_remain, h), 0.0)
    if IN_PLACE:
        # several threads hold the same row: all of them must have read it
        tl.debug_barrier()
    _store_of_rows(new_cum, b, new_strides[0], rows, exists, total)
    _store_of_rows(new_remain, b, new_strides[1], rows, exists, old_remain - tl.where(going, h, 0.0))
    _store_of_rows(new_active, b, new_strides[2], rows, exists, going.to(tl.uint8))
    spent = tl.where(was, 1.0, 0.0) + tl.where(reached, old_remain, 0.0)
    _store_of_rows(new_rho, b, new_strides[3], rows, exists, old_rho + spent)
    _store_of_rows(new_counter, b, new_strides[4], rows, exists, old_counter + tl.where(going, 1.0, 0.0))

    if CLASS:
        first, sample = _first_rows(rows, b, cu_seqlens, sequences, steps)
        taking = taking & first
        written = taking
        targets = new_out + sample.to(tl.int64) * new_out_strides[0]
        # most blocks hold no first row
        columns = tl.where(tl.max(taking.to(tl.int32), 0) > 0, C, 0)
    else:
        written = taking if IN_PLACE else exists
        targets = new_out + b * new_out_strides[0] + rows.to(tl.int64) * new_out_strides[1]
        columns = C
    for start in range(0, columns, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        within = (channel < C)[None, :]
        token = tl.load(x + rows.to(tl.int64)[:, None] * x_strides[1] + channel[None, :], mask=taking[:, None] & within, other=0.0)
        target = targets[:, None] + channel[None, :]
        added = weight[:, None] * token.to(tl.float32)
        if CLASS or IN_PLACE:
            added += tl.load(target, mask=written[:, None] & within, other=0.0)
        elif out is not None:
            source = out + b * out_strides[0] + rows.to(tl.int64)[:, None] * out_strides[1] + channel[None, :]
            added += tl.load(source, mask=written[:, None] & within, other=0.0)
        tl.store(target, added, mask=written[:, None] & within)


@triton.jit
def _products(grad_out, grad_rows, x, rows, stride, taking, channel, C: tl.constexpr):
    """Some channels of grad_out on the rows that take part, and their products with x."""
    within = taking[:, None] & (channel < C)[None, :]
    if grad_out is None:
        grad = tl.zeros(within.shape, tl.float32)
        return grad, grad
    else:
        grad = tl.load(grad_out + grad_rows[:, None] + channel[None, :], mask=within, other=0.0)
        token = tl.load(x + rows.to(tl.int64)[:, None] * stride + channel[None, :], mask=within, other=0.0)
        return grad, grad * token.to(tl.float32)


@triton.jit
def _store_block(pointer, b, strides, rows, exists, channel, C: tl.constexpr, block):
    target = pointer + b * strides[0] + rows.to(tl.int64)[:, None] * strides[1] + channel[None, :]
    tl.store(target, block.to(pointer.dtype.element_ty), mask=exists[:, None] & (channel < C)[None, :])


@triton.jit(do_not_specialize=["N", "sequences", "steps", "blocks"])
def halt_backward(
    x,  # [B, N, C]
    grad_cum,  # [B, N] float32 each, or None = zero
    grad_remain,
    grad_rho,
    grad_out,  # [B, N, C] or [S, C] float32, or None
    remain,  # [B, N] float32 before the step; None in the first one
    active,  # [B, N] bytes before the step; None in the first one
    cum,  # [B, N] float32 after the step
    new_grad_x,  # [B, N, C] or None
    new_grad_remain,  # [B, N] float32 or None
    cu_seqlens,
    x_strides,
    row_strides,  # of sample and row, of the [B, N] in the order of the arguments
    grad_out_strides,
    grad_x_strides,
    scale,
    center,
    limit,
    N,
    sequences,
    steps,
    blocks,
    C: tl.constexpr,
    LAST: tl.constexpr,
    CLASS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of x and remain for a block of rows of one sample. The masks follow from ``cum``, which the forward pass compared."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = rows < N
    if CLASS:
        contributes, sample = _first_rows(rows, b, cu_seqlens, sequences, steps)
        grad_rows = sample.to(tl.int64) * grad_out_strides[0]
    else:
        contributes = exists
        grad_rows = b * grad_out_strides[0] + rows.to(tl.int64) * grad_out_strides[1]
    x += b * x_strides[0]
    inside = _inside(rows, cu_seqlens, sequences, N)
    h = _gate(x, rows, x_strides[1], inside, scale, center, LAST)
    was = _active(active, b, row_strides[4], rows, inside)
    total = _of_rows(cum, b, row_strides[5], rows, exists, 0.0)
    reached = (total > limit) & was
    going = (total < limit) & inside
    taking = was & (reached | going)
    weight = tl.where(reached, _of_rows(remain, b, row_strides[3], rows, exists, 1.0), h)
    weight = tl.where(taking, weight, 0.0)
    taking = taking & contributes

    products = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(BLOCK_C, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        grad, product = _products(grad_out, grad_rows, x, rows, x_strides[1], taking, channel, C)
        products += product
        if new_grad_x is not None:
            _store_block(new_grad_x, b, grad_x_strides, rows, exists, channel, C, weight[:, None] * grad)
    # the first channels come last: the gradient of channel 0 takes the products of all
    channel = tl.arange(0, BLOCK_C)
    grad, product = _products(grad_out, grad_rows, x, rows, x_strides[1], taking, channel, C)
    grad_weight = tl.sum(products + product, 1)
    of_remain = _of_rows(grad_remain, b, row_strides[1], rows, exists, 0.0)
    if new_grad_x is not None:
        of_x = weight[:, None] * grad
        if not LAST:
            of_h = _of_rows(grad_cum, b, row_strides[0], rows, exists, 0.0) - tl.where(going, of_remain, 0.0)
            of_h += tl.where(going & was, grad_weight, 0.0)
            of_gate = tl.where(inside, scale * h * (1.0 - h) * of_h, 0.0)
            of_x += tl.where((channel == 0)[None, :], of_gate[:, None], 0.0)
        _store_block(new_grad_x, b, grad_x_strides, rows, exists, channel, C, of_x)
    if new_grad_remain is not None:
        of_rho = _of_rows(grad_rho, b, row_strides[2], rows, exists, 0.0)
        of_old = of_remain + tl.where(reached, of_rho + grad_weight, 0.0)
        _store_of_rows(new_grad_remain, b, row_strides[6], rows, exists, of_old)


@triton.jit(do_not_specialize=["N", "K"])
def scan_lists(
    index,  # [1|L, K] int32
    cu_seqlens,  # [L + 1] int32, or None: ranks and counts are wanted
    ranks,  # [L, K] int32: place of each slot among the filled ones of its list, -1 = empty
    counts,  # [L] int32: filled slots
    source,  # [1|L, N] int32, -1 to begin with: which packed row belongs to each row of a grid
    index_stride,
    source_stride,
    N,  # rows of a grid
    K,
    BLOCK: tl.constexpr,
):
    """Numbers the filled slots of a list; for unpacking, turns that number round. One program a list."""
    row = tl.program_id(0).to(tl.int64)
    index += row * index_stride
    seen = 0
    for start in range(0, K, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        ids = tl.load(index + slots, mask=slots < K, other=-1)
        filled = (ids >= 0) & (ids < N)
        rank = seen + tl.cumsum(filled.to(tl.int32), 0) - 1
        if cu_seqlens is None:
            tl.store(ranks + row * K + slots, tl.where(filled, rank, -1), mask=slots < K)
        else:
            begin = tl.load(cu_seqlens + row)
            length = tl.load(cu_seqlens + row + 1) - begin
            tl.store(source + row * source_stride + ids, begin + rank, mask=filled & (rank < length))
        seen += tl.sum(filled.to(tl.int32), 0)
    if cu_seqlens is None:
        tl.store(counts + row, seen)


@triton.jit(do_not_specialize=["N", "K", "T", "lists", "blocks"])
def pack_rows(
    x,  # [G, N, W] integers of the elements' size
    index,  # [1|B, K] int32; None: slot s is row s, and counts says how many
    ranks,  # [1|B, K] int32, or None
    counts,  # [1|B] int32
    tokens,  # [T, W]
    cu_seqlens,  # [B + 1] int32
    x_strides,
    index_stride,  # of a list, 0 if all samples share it; of ranks too
    counts_stride,
    tokens_stride,
    N,
    K,
    T,
    lists,  # B
    blocks,  # slot blocks a list
    W,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Copies a block of slots of one list, and zeros its share of the rows behind the last sample."""
    b = tl.program_id(0) // blocks
    slots = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    before = 0
    until = 0
    total = 0
    for start in range(0, lists, CHUNK):
        other = start + tl.arange(0, CHUNK)
        length = tl.load(counts + other * counts_stride, mask=other < lists, other=0)
        if index is None:
            length = tl.minimum(tl.maximum(length, 0), N)
        before += tl.sum(tl.where(other < b, length, 0), 0)
        until += tl.sum(tl.where(other <= b, length, 0), 0)
        total += tl.sum(length, 0)
    if tl.program_id(0) == 0:
        tl.store(cu_seqlens, 0)
    if (tl.program_id(0) % blocks == 0) & (b < lists):
        tl.store(cu_seqlens + b + 1, tl.minimum(until, T))

    listed = (slots < K) & (b < lists)
    if index is None:
        ids = slots
        targets = before + slots
        filled = listed & (slots < until - before)
    else:
        ids = tl.load(index + b.to(tl.int64) * index_stride + slots, mask=listed, other=-1)
        rank = tl.load(ranks + b.to(tl.int64) * index_stride + slots, mask=listed, other=-1)
        targets = before + rank
        filled = rank >= 0
    filled = filled & (targets < T)
    tail = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    empty = (tail >= total) & (tail < T)
    sources = x + b.to(tl.int64) * x_strides[0] + ids.to(tl.int64) * x_strides[1]
    targets = tokens + targets.to(tl.int64) * tokens_stride
    tail = tokens + tail.to(tl.int64) * tokens_stride
    for start in range(0, W, BLOCK_W):
        at = start + tl.arange(0, BLOCK_W)
        within = (at < W)[None, :]
        row = tl.load(sources[:, None] + at[None, :], mask=filled[:, None] & within, other=0)
        tl.store(targets[:, None] + at[None, :], row, mask=filled[:, None] & within)
        tl.store(tail[:, None] + at[None, :], tl.zeros_like(row), mask=empty[:, None] & within)


@triton.jit(do_not_specialize=["N", "T", "blocks"])
def unpack_rows(
    tokens,  # [T, W] integers of the elements' size
    cu_seqlens,  # [G + 1] int32; read without source only
    source,  # [G, N] int32, -1 = none; None: the rows of a sample are the first ones of its grid
    x,  # [G, N, W]
    tokens_stride,
    x_strides,
    N,
    T,
    blocks,  # row blocks a grid
    W,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Fills a block of rows of one grid: copies or zeros."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = rows < N
    if source is None:
        begin = tl.load(cu_seqlens + b)
        packed = begin + rows
        filled = rows < tl.load(cu_seqlens + b + 1) - begin
    else:
        packed = tl.load(source + b * N + rows, mask=exists, other=-1)
        filled = exists
    filled = filled & exists & (packed >= 0) & (packed < T)
    sources = tokens + packed.to(tl.int64) * tokens_stride
    targets = x + b * x_strides[0] + rows.to(tl.int64) * x_strides[1]
    for start in range(0, W, BLOCK_W):
        at = start + tl.arange(0, BLOCK_W)
        within = (at < W)[None, :]
        row = tl.load(sources[:, None] + at[None, :], mask=filled[:, None] & within, other=0)
        tl.store(targets[:, None] + at[None, :], row, mask=exists[:, None] & within)
