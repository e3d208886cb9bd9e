"""The Triton kernels of gathered-token attention: forward, per-row terms, grad_query, grad_key/grad_value/grad_bias.

Letters as everywhere: B batch, N and M grid rows, K and L kept slots, D and DV head widths. A *slot* is a place in an index list, a *row*
is what the list names there. Without a list slot s is row s. Logits, lse and biases are kept in base 2 inside the kernels, so that exp2
needs no multiplication.

One program owns one block of slots of one head, and nothing else writes there: no atomics, the same bits every run. Strides come in units
of ``UNIT`` elements (8 whenever every stride allows it), which is how the compiler learns that a row starts at a 16-byte boundary even if
the head width is not a multiple of 16. Offsets are 64-bit from the row id on: a grid may hold more than 2^31 elements.

Each loop carries the ids of its next block in registers. With the list read in the same turn as the rows it names, the pipeliner spends its
stages on that chain and waits for every copy before the next product; with the ids at hand it copies rows ahead as deep as for a dense
tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of the finite float32
# how many ids one step of a causal bound reads: one id per thread of a wide program
CHUNK = tl.constexpr(512)


@triton.jit
def _bounds(cu_seqlens, sequence, sequences, slots):
    """First slot of a packed sequence and the slot after its last; sequence number ``sequences`` is the padding behind the last one."""
    begin = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1, mask=sequence < sequences, other=slots)
    # whatever cu_seqlens holds, no slot outside the list is ever touched
    begin = tl.minimum(tl.maximum(begin, 0), slots)
    return begin, tl.minimum(tl.maximum(end, begin), slots)


@triton.jit
def _packed_block(block, cu_seqlens, sequences, slots, BLOCK: tl.constexpr):
    """Which sequence a block belongs to, its first slot, and the sequence's bounds.

    Sequence s owns the blocks from cu_seqlens[s] // BLOCK + s on. That is never fewer than it needs, so the launch grid (slots // BLOCK +
    sequences + 1) is known on the host without reading a count from the device; the surplus blocks, at most one a sequence, find themselves
    past the end.
    """
    low = 0
    high = sequences
    while low < high:
        middle = (low + high + 1) // 2
        # a bound below 0 begins at 0, see _bounds: searched as it is, its blocks would lie before the list
        if tl.maximum(tl.load(cu_seqlens + middle), 0) // BLOCK + middle <= block:
            low = middle
        else:
            high = middle - 1
    begin, end = _bounds(cu_seqlens, low, sequences, slots)
    first = begin + (block - (begin // BLOCK + low)) * BLOCK
    return low, first, begin, end


@triton.jit
def _ids(index, slots, end):
    """What an index list holds at some slots: -1 behind its end."""
    return tl.load(index + slots, mask=slots < end, other=-1)


@triton.jit
def _named(ids, rows):
    """The rows that ids name, and which ids name one: -1 and ids outside the grid are empty slots."""
    filled = (ids >= 0) & (ids < rows)
    return tl.where(filled, ids, 0), filled


@triton.jit
def _listed(index, slots, end, rows):
    """The rows that slots name, and which slots name one. Without a list a slot is its own row."""
    if index is None:
        return slots, slots < end
    else:
        return _named(_ids(index, slots, end), rows)


@triton.jit
def _tile(base, rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to whole rows, padded to BLOCK columns."""
    return base + rows.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _within(filled, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a padded tile exist."""
    within = filled[:, None]
    if WIDTH < BLOCK:
        within = within & (tl.arange(0, BLOCK) < WIDTH)[None, :]
    return within


@triton.jit
def _load_rows(base, rows, filled, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    return tl.load(_tile(base, rows, stride, WIDTH, BLOCK), mask=_within(filled, WIDTH, BLOCK), other=0.0)


@triton.jit
def _store_rows(base, rows, filled, stride, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(_tile(base, rows, stride, WIDTH, BLOCK), tile.to(base.dtype.element_ty), mask=_within(filled, WIDTH, BLOCK))


@triton.jit
def _to_log2(x):
    """Natural units to units of log2. What was finite stays finite, so that a row of the lowest float is not an empty row."""
    scaled = x * LOG2E
    return tl.where((scaled < LOWEST) & (x >= LOWEST), LOWEST, scaled)


@triton.jit
def _weights(logits, lse2):
    """At most 1, also where a huge lse was rounded by more than its distance to a logit. NaN stays NaN."""
    return tl.exp2(tl.minimum(logits - lse2, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _mask_at(mask, strides, n, m, WIDE: tl.constexpr):
    """Pointers to a tile of the mask. Offsets of 64 bits cost two registers for every element: only a plane of 2^31 of them gets those."""
    if WIDE:
        return mask + (n.to(tl.int64) * strides[2] + m.to(tl.int64) * strides[3])
    else:
        return mask + (n * strides[2] + m * strides[3])


@triton.jit
def _add_mask(logits, mask, strides, n, m, within, WIDE: tl.constexpr):
    """Adds a floating mask. ``n`` and ``m`` are the tile's query and key rows, each along its own axis, so either orientation works."""
    if mask is not None:
        if mask.dtype.element_ty.is_floating():
            logits += _to_log2(tl.load(_mask_at(mask, strides, n, m, WIDE), mask=within, other=0.0).to(tl.float32))
    return logits


@triton.jit
def _hide(tile, hidden, mask, strides, n, m, within, WIDE: tl.constexpr):
    """Puts ``hidden`` where a boolean mask hides a key."""
    if mask is not None:
        if not mask.dtype.element_ty.is_floating():
            tile = tl.where(tl.load(_mask_at(mask, strides, n, m, WIDE), mask=within, other=0) != 0, tile, hidden)
    return tile


@triton.jit
def _add_rel_pos(logits, rel_h, rel_w, strides, n, rank, gh, gw, within, WIDE: tl.constexpr):
    """Adds rel_h[n, rank // gw] + rel_w[n, rank % gw] for query rows ``n`` and cells ``rank`` of a gh x gw grid; behind its end nothing.

    ``n`` and ``rank`` lie along their own axes, so either orientation works. Each load is a tile, but of few addresses: rel_h has one value
    for gw neighbouring cells, and a row of either stays in the first cache while a program walks over the cells.
    """
    if rel_h is not None:
        within = within & (rank < gh * gw)
        if WIDE:
            n = n.to(tl.int64)
        h = tl.load(rel_h + (n * strides[0][2] + rank // gw), mask=within, other=0.0).to(tl.float32)
        w = tl.load(rel_w + (n * strides[1][2] + rank % gw), mask=within, other=0.0).to(tl.float32)
        logits += _to_log2(h + w)
    return logits


@triton.jit
def _causal_end(kv_index, begin, end, last, RANKED: tl.constexpr):
    """The slot behind the last one that query ``last`` sees. Of an ascending list this skips all the rest; of any list, nothing visible."""
    if RANKED:
        return tl.minimum(end, begin + last + 1)
    else:
        bound = 0
        for start in range(begin, end, CHUNK):
            slots = start + tl.arange(0, CHUNK)
            ids = tl.load(kv_index + slots, mask=slots < end, other=-1)
            bound = tl.maximum(bound, tl.max(tl.where((ids >= 0) & (ids <= last), slots + 1, 0), 0))
        return bound


@triton.jit
def _causal_begin(q_index, begin, end, nearest, RANKED: tl.constexpr, BLOCK: tl.constexpr):
    """The first slot of a block of queries that may see key ``nearest``."""
    if RANKED:
        return begin + tl.minimum(nearest, end - begin) // BLOCK * BLOCK
    else:
        bound = end
        for start in range(begin, end, CHUNK):
            slots = start + tl.arange(0, CHUNK)
            ids = tl.load(q_index + slots, mask=slots < end, other=-1)
            bound = tl.minimum(bound, tl.min(tl.where(ids >= nearest, slots, end), 0))
        return bound // BLOCK * BLOCK


@triton.jit(do_not_specialize=["N", "M", "K", "L", "gh", "gw", "blocks", "sequences"])
def forward(
    query,  # [B, H, N, D]
    key,  # [B, H / GROUP, M, D]
    value,  # [B, H / GROUP, M, DV]
    out,  # [B, H, K, DV] by slot, or [B, H, N, DV] by row
    lse,  # [B, H, K] float32
    row_sq,  # [B, H, K] float32 or None
    q_index,  # [1|B, 1|H, K] int32 or None
    kv_index,  # [1|B, 1|H / GROUP, L] int32 or None
    bias,  # [1|B, 1|H / GROUP, M] float32 or None
    mask,  # [1|B, 1|H, 1|N, 1|M] bytes, floats or None
    rel_h,  # [B, H, N, gh] or None
    rel_w,  # [B, H, N, gw] or None
    cu_seqlens_q,  # [sequences + 1] int32 or None
    cu_seqlens_k,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    q_index_strides,
    kv_index_strides,
    bias_strides,
    mask_strides,
    rel_strides,  # (rel_h's, rel_w's), each of batch, head and row
    scale,  # natural scale * log2(e)
    N,
    M,
    K,
    L,
    gh,
    gw,
    H,
    blocks,  # query blocks a head
    sequences,
    GROUP: tl.constexpr,  # query heads that share a key head
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,  # the mask or rel_pos of one head has offsets beyond 32 bits
    BY_ROW: tl.constexpr,
    SCALE_FIRST: tl.constexpr,  # terms are added to the logits, or scale <= 0: the maximum has to be taken of scaled logits
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    PACKED: tl.constexpr = cu_seqlens_q is not None
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks % H).to(tl.int64)
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    if PACKED:
        sequence, first, begin, end = _packed_block(block, cu_seqlens_q, sequences, K, BLOCK_Q)
        if first >= end:
            return
        k_begin, k_end = _bounds(cu_seqlens_k, sequence, sequences, L)
        # the padding behind the last sequence sees nothing
        k_end = tl.where(sequence < sequences, k_end, k_begin)
    else:
        if CAUSAL:
            # the longest blocks start first
            block = blocks - 1 - block
        first = block * BLOCK_Q
        begin, end = 0, K
        k_begin, k_end = 0, L

    query += (b * query_strides[0] + h * query_strides[1]) * UNIT
    key += (b * key_strides[0] + h // GROUP * key_strides[1]) * UNIT
    value += (b * value_strides[0] + h // GROUP * value_strides[1]) * UNIT
    out += (b * out_strides[0] + h * out_strides[1]) * UNIT
    if q_index is not None:
        q_index += b * q_index_strides[0] + h * q_index_strides[1]
    if kv_index is not None:
        kv_index += b * kv_index_strides[0] + h // GROUP * kv_index_strides[1]
    if bias is not None:
        bias += b * bias_strides[0] + h // GROUP * bias_strides[1]
    if mask is not None:
        mask += b * mask_strides[0] + h * mask_strides[1]
    if rel_h is not None:
        rel_h += b * rel_strides[0][0] + h * rel_strides[0][1]
        rel_w += b * rel_strides[1][0] + h * rel_strides[1][1]

    q_slots = first + tl.arange(0, BLOCK_Q)
    rows, filled = _listed(q_index, q_slots, end, N)
    if PACKED:
        # what stands in the padding behind the last sequence names no row: a grid would be overwritten there
        filled = filled & (sequence < sequences)
    q = _load_rows(query, rows, filled, query_strides[2] * UNIT, D, BLOCK_D)
    order_q = rows
    if PACKED:
        order_q = q_slots - begin
    if CAUSAL:
        last = tl.max(tl.where(filled, order_q, -1), 0)
        k_end = _causal_end(kv_index, k_begin, k_end, last, PACKED or kv_index is None)

    # of the logits and their maximum
    unit = scale
    if SCALE_FIRST:
        unit = 1.0
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    squares = tl.zeros([BLOCK_Q], tl.float32)
    weighted = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    if kv_index is not None:
        ids = _ids(kv_index, k_begin + tl.arange(0, BLOCK_K), k_end)
    for start in range(k_begin, k_end, BLOCK_K):
        k_slots = start + tl.arange(0, BLOCK_K)
        if kv_index is None:
            columns, seen = k_slots, k_slots < k_end
        else:
            columns, seen = _named(ids, M)
            ids = _ids(kv_index, k_slots + BLOCK_K, k_end)
        k = _load_rows(key, columns, seen, key_strides[2] * UNIT, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SCALE_FIRST:
            logits *= scale
        if bias is not None:
            logits += _to_log2(tl.load(bias + columns, mask=seen, other=0.0))[None, :]
        within = filled[:, None] & seen[None, :]
        order_k = columns
        if PACKED:
            order_k = k_slots - k_begin
        logits = _add_mask(logits, mask, mask_strides, rows[:, None], columns[None, :], within, WIDE)
        logits = _add_rel_pos(logits, rel_h, rel_w, rel_strides, rows[:, None], order_k[None, :], gh, gw, within, WIDE)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        logits = _hide(logits, float("-inf"), mask, mask_strides, rows[:, None], columns[None, :], within, WIDE)
        if CAUSAL:
            logits = tl.where(order_k[None, :] <= order_q[:, None], logits, float("-inf"))
        above = tl.maximum(highest, tl.max(logits, 1))
        # as long as a row has seen no key its maximum is -inf, and -inf - -inf would be NaN
        origin = tl.where(above == float("-inf"), 0.0, above)
        # not logits * unit - maximum * unit: a multiply-add rounds only one of them, which for logits of 1e10 is a factor of 2^512
        p = tl.exp2((logits - origin[:, None]) * unit)
        shrink = tl.exp2((highest - origin) * unit)
        total = total * shrink + tl.sum(p, 1)
        if row_sq is not None:
            squares = squares * shrink * shrink + tl.sum(p * p, 1)
        v = _load_rows(value, columns, seen, value_strides[2] * UNIT, DV, BLOCK_DV)
        weighted = weighted * shrink[:, None]
        weighted = tl.dot(p.to(v.dtype), v, weighted, input_precision=PRECISION)
        highest = above

    # not "highest == -inf": a row of NaN logits is no empty row
    empty = (total == 0.0) | ~filled
    divisor = tl.where(empty, 1.0, total)
    result = tl.where(empty[:, None], 0.0, weighted * (1.0 / divisor)[:, None])
    at = (b * H + h) * K + q_slots
    natural = highest * unit + tl.log2(divisor)
    if SCALE_FIRST:
        # what _to_log2 clamped to the lowest float is the lowest float in either unit
        natural = tl.where(highest == LOWEST, natural, natural * LN2)
    else:
        natural *= LN2
    tl.store(lse + at, tl.where(empty, float("-inf"), natural), mask=q_slots < end)
    if row_sq is not None:
        tl.store(row_sq + at, tl.where(empty, 0.0, squares / (divisor * divisor)), mask=q_slots < end)
    if BY_ROW:
        _store_rows(out, rows, filled, out_strides[2] * UNIT, result, DV, BLOCK_DV)
    else:
        _store_rows(out, q_slots, q_slots < end, out_strides[2] * UNIT, result, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["K", "blocks"])
def row_terms(
    grad_out,  # [B, H, K, DV]
    out,  # [B, H, K, DV]
    lse,  # [B, H, K] float32
    lse2,  # [B, H, pitch] float32: lse in base 2, +inf for an empty row, so that its probabilities come out as 0
    delta,  # [B, H, pitch] float32: sum(grad_out * out), what softmax's gradient subtracts
    grad_out_strides,
    out_strides,
    K,
    pitch,
    H,
    blocks,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """What both gradient kernels need of every query slot, computed once.

    The rows of lse2 and delta are padded with what an empty slot has, so that a block of them is read whole: a mask would cost an address
    and a predicate for every element a thread holds, which is where the registers of ``backward_key_value`` went.
    """
    h = (tl.program_id(0) // blocks % H).to(tl.int64)
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    slots = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = slots < K
    grad_out += (b * grad_out_strides[0] + h * grad_out_strides[1]) * UNIT
    out += (b * out_strides[0] + h * out_strides[1]) * UNIT
    do = _load_rows(grad_out, slots, exists, grad_out_strides[2] * UNIT, DV, BLOCK_DV).to(tl.float32)
    o = _load_rows(out, slots, exists, out_strides[2] * UNIT, DV, BLOCK_DV).to(tl.float32)
    natural = tl.load(lse + (b * H + h) * K + slots, mask=exists, other=float("-inf"))
    empty = natural == float("-inf")
    at = (b * H + h) * pitch + slots
    tl.store(lse2 + at, tl.where(empty, float("inf"), _to_log2(natural)))
    tl.store(delta + at, tl.where(empty, 0.0, tl.sum(do * o, 1)))


@triton.jit(do_not_specialize=["N", "M", "K", "L", "gh", "gw", "blocks", "sequences"])
def backward_query(
    query,
    key,
    value,
    grad_out,  # [B, H, K, DV]
    lse2,  # [B, H, pitch], see row_terms
    delta,
    grad_query,  # [B, H, N, D], zero in rows that no slot names
    q_index,
    kv_index,
    bias,
    mask,
    rel_h,
    rel_w,
    cu_seqlens_q,
    cu_seqlens_k,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    grad_query_strides,
    q_index_strides,
    kv_index_strides,
    bias_strides,
    mask_strides,
    rel_strides,
    scale,
    N,
    M,
    K,
    L,
    gh,
    gw,
    pitch,
    H,
    blocks,
    sequences,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    PACKED: tl.constexpr = cu_seqlens_q is not None
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks % H).to(tl.int64)
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    if PACKED:
        sequence, first, begin, end = _packed_block(block, cu_seqlens_q, sequences, K, BLOCK_Q)
        if first >= end:
            return
        k_begin, k_end = _bounds(cu_seqlens_k, sequence, sequences, L)
        k_end = tl.where(sequence < sequences, k_end, k_begin)
    else:
        if CAUSAL:
            block = blocks - 1 - block
        first = block * BLOCK_Q
        begin, end = 0, K
        k_begin, k_end = 0, L

    query += (b * query_strides[0] + h * query_strides[1]) * UNIT
    key += (b * key_strides[0] + h // GROUP * key_strides[1]) * UNIT
    value += (b * value_strides[0] + h // GROUP * value_strides[1]) * UNIT
    grad_out += (b * grad_out_strides[0] + h * grad_out_strides[1]) * UNIT
    grad_query += (b * grad_query_strides[0] + h * grad_query_strides[1]) * UNIT
    if q_index is not None:
        q_index += b * q_index_strides[0] + h * q_index_strides[1]
    if kv_index is not None:
        kv_index += b * kv_index_strides[0] + h // GROUP * kv_index_strides[1]
    if bias is not None:
        bias += b * bias_strides[0] + h // GROUP * bias_strides[1]
    if mask is not None:
        mask += b * mask_strides[0] + h * mask_strides[1]
    if rel_h is not None:
        rel_h += b * rel_strides[0][0] + h * rel_strides[0][1]
        rel_w += b * rel_strides[1][0] + h * rel_strides[1][1]

    q_slots = first + tl.arange(0, BLOCK_Q)
    rows, filled = _listed(q_index, q_slots, end, N)
    q = _load_rows(query, rows, filled, query_strides[2] * UNIT, D, BLOCK_D)
    do = _load_rows(grad_out, q_slots, filled, grad_out_strides[2] * UNIT, DV, BLOCK_DV)
    lse2 += (b * H + h) * pitch
    delta += (b * H + h) * pitch
    row_lse2 = tl.load(lse2 + q_slots)
    row_delta = tl.load(delta + q_slots)
    order_q = rows
    if PACKED:
        order_q = q_slots - begin
    if CAUSAL:
        last = tl.max(tl.where(filled, order_q, -1), 0)
        k_end = _causal_end(kv_index, k_begin, k_end, last, PACKED or kv_index is None)

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if kv_index is not None:
        ids = _ids(kv_index, k_begin + tl.arange(0, BLOCK_K), k_end)
    for start in range(k_begin, k_end, BLOCK_K):
        k_slots = start + tl.arange(0, BLOCK_K)
        if kv_index is None:
            columns, seen = k_slots, k_slots < k_end
        else:
            columns, seen = _named(ids, M)
            ids = _ids(kv_index, k_slots + BLOCK_K, k_end)
        k = _load_rows(key, columns, seen, key_strides[2] * UNIT, D, BLOCK_D)
        v = _load_rows(value, columns, seen, value_strides[2] * UNIT, DV, BLOCK_DV)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if bias is not None:
            logits += _to_log2(tl.load(bias + columns, mask=seen, other=0.0))[None, :]
        within = filled[:, None] & seen[None, :]
        order_k = columns
        if PACKED:
            order_k = k_slots - k_begin
        logits = _add_mask(logits, mask, mask_strides, rows[:, None], columns[None, :], within, WIDE)
        logits = _add_rel_pos(logits, rel_h, rel_w, rel_strides, rows[:, None], order_k[None, :], gh, gw, within, WIDE)
        p = _weights(logits, row_lse2[:, None])
        p = tl.where(seen[None, :], p, 0.0)
        p = _hide(p, 0.0, mask, mask_strides, rows[:, None], columns[None, :], within, WIDE)
        if CAUSAL:
            p = tl.where(order_k[None, :] <= order_q[:, None], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store_rows(grad_query, rows, filled, grad_query_strides[2] * UNIT, dq * (scale * LN2), D, BLOCK_D)


@triton.jit(do_not_specialize=["M", "L", "blocks"])
def mark_rows(
    index,  # [1|B, 1|H, L] int32
    marks,  # [1|B, 1|H, M] bytes, all 0
    index_strides,
    M,
    L,
    H,
    blocks,  # blocks of slots a list
    BLOCK: tl.constexpr,
):
    """1 where some slot names a row. A row is named once, so every mark has one writer."""
    list_number = (tl.program_id(0) // blocks).to(tl.int64)
    index += list_number // H * index_strides[0] + list_number % H * index_strides[1]
    rows, filled = _named(_ids(index, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), L), M)
    tl.store(marks + list_number * M + rows, filled.to(tl.uint8), mask=filled)


@triton.jit(do_not_specialize=["N", "M", "K", "gh", "gw", "blocks", "chunks", "sequences"])
def backward_rel_pos(
    query,
    key,
    value,
    grad_out,  # [B, H, K, DV]
    lse2,
    delta,
    grad_rel_h,  # [chunks, B, H, N, gh] or None: what each chunk adds; this and the next are zero in rows that no slot names
    grad_rel_w,  # [B, H, N, gw] or None
    q_index,
    kv_index,  # of packed sequences only
    listed,  # [1|B, 1|H / GROUP, M] bytes, not 0 = some slot names this key; None: all, or packed
    bias,
    mask,
    rel_h,
    rel_w,
    cu_seqlens_q,
    cu_seqlens_k,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    grad_rel_h_strides,  # of chunk, batch, head and row
    grad_rel_w_strides,
    q_index_strides,
    kv_index_strides,
    listed_strides,
    bias_strides,
    mask_strides,
    rel_strides,
    scale,
    N,
    M,
    K,
    L,
    gh,
    gw,
    pitch,
    H,
    blocks,  # query blocks a head
    chunks,  # pieces of a row of cells
    sequences,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """A program owns a block of queries and some columns of the grid of cells, and walks down its rows.

    In whatever order a list names the keys, a tile here is a piece of one row of cells: its sum over the tile is one element of grad_rel_h,
    and tiles lie on top of each other for grad_rel_w. So neither needs a scatter, and each is one sum in one order.
    """
    PACKED: tl.constexpr = cu_seqlens_q is not None
    chunk = tl.program_id(0) % chunks
    block = tl.program_id(0) // chunks % blocks
    h = (tl.program_id(0) // chunks // blocks % H).to(tl.int64)
    b = (tl.program_id(0) // chunks // blocks // H).to(tl.int64)
    if PACKED:
        sequence, first, begin, end = _packed_block(block, cu_seqlens_q, sequences, K, BLOCK_Q)
        if first >= end:
            return
        k_begin, k_end = _bounds(cu_seqlens_k, sequence, sequences, L)
        k_end = tl.where(sequence < sequences, k_end, k_begin)
    else:
        first = block * BLOCK_Q
        begin, end = 0, K
        k_begin, k_end = 0, M

    query += (b * query_strides[0] + h * query_strides[1]) * UNIT
    key += (b * key_strides[0] + h // GROUP * key_strides[1]) * UNIT
    value += (b * value_strides[0] + h // GROUP * value_strides[1]) * UNIT
    grad_out += (b * grad_out_strides[0] + h * grad_out_strides[1]) * UNIT
    if q_index is not None:
        q_index += b * q_index_strides[0] + h * q_index_strides[1]
    if kv_index is not None:
        kv_index += b * kv_index_strides[0] + h // GROUP * kv_index_strides[1]
    if listed is not None:
        listed += b * listed_strides[0] + h // GROUP * listed_strides[1]
    if bias is not None:
        bias += b * bias_strides[0] + h // GROUP * bias_strides[1]
    if mask is not None:
        mask += b * mask_strides[0] + h * mask_strides[1]
    rel_h += b * rel_strides[0][0] + h * rel_strides[0][1]
    rel_w += b * rel_strides[1][0] + h * rel_strides[1][1]

    q_slots = first + tl.arange(0, BLOCK_Q)
    rows, filled = _listed(q_index, q_slots, end, N)
    q = _load_rows(query, rows, filled, query_strides[2] * UNIT, D, BLOCK_D)
    do = _load_rows(grad_out, q_slots, filled, grad_out_strides[2] * UNIT, DV, BLOCK_DV)
    row_lse2 = tl.load(lse2 + (b * H + h) * pitch + q_slots)
    row_delta = tl.load(delta + (b * H + h) * pitch + q_slots)
    order_q = rows
    if PACKED:
        order_q = q_slots - begin
    if grad_rel_h is not None:
        strides = grad_rel_h_strides
        grad_rel_h += chunk.to(tl.int64) * strides[0] + b * strides[1] + h * strides[2] + rows.to(tl.int64) * strides[3]

    at = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    dw = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for cell_row in range(gh):
        cells = cell_row * gw + at
        k_slots = k_begin + cells
        columns, seen = _listed(kv_index, k_slots, k_end, M)
        seen = seen & (at < gw)
        if listed is not None:
            seen = seen & (tl.load(listed + cells, mask=seen, other=0) != 0)
        k = _load_rows(key, columns, seen, key_strides[2] * UNIT, D, BLOCK_D)
        v = _load_rows(value, columns, seen, value_strides[2] * UNIT, DV, BLOCK_DV)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if bias is not None:
            logits += _to_log2(tl.load(bias + columns, mask=seen, other=0.0))[None, :]
        within = filled[:, None] & seen[None, :]
        logits = _add_mask(logits, mask, mask_strides, rows[:, None], columns[None, :], within, WIDE)
        logits = _add_rel_pos(logits, rel_h, rel_w, rel_strides, rows[:, None], cells[None, :], gh, gw, within, WIDE)
        p = _weights(logits, row_lse2[:, None])
        p = tl.where(seen[None, :], p, 0.0)
        p = _hide(p, 0.0, mask, mask_strides, rows[:, None], columns[None, :], within, WIDE)
        if CAUSAL:
            p = tl.where(cells[None, :] <= order_q[:, None], p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - row_delta[:, None])
        dw += ds
        if grad_rel_h is not None:
            tl.store(grad_rel_h + cell_row, tl.sum(ds, 1).to(grad_rel_h.dtype.element_ty), mask=filled)
    if grad_rel_w is not None:
        grad_rel_w += b * grad_rel_w_strides[0] + h * grad_rel_w_strides[1]
        target = grad_rel_w + rows.to(tl.int64)[:, None] * grad_rel_w_strides[2] + at[None, :]
        tl.store(target, dw.to(grad_rel_w.dtype.element_ty), mask=filled[:, None] & (at < gw)[None, :])


@triton.jit(do_not_specialize=["N", "M", "K", "L", "gh", "gw", "blocks", "sequences"])
def backward_key_value(
    query,
    key,
    value,
    grad_out,  # [B, H, K, DV]
    lse2,
    delta,
    grad_key,  # [B, H / GROUP, M, D] or None; this and the next two are zero in rows that no slot names
    grad_value,  # [B, H / GROUP, M, DV] or None
    grad_bias,  # [B, H / GROUP, M] float32 or None
    q_index,
    kv_index,
    bias,
    mask,
    rel_h,
    rel_w,
    cu_seqlens_q,
    cu_seqlens_k,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    grad_key_strides,
    grad_value_strides,
    grad_bias_strides,
    q_index_strides,
    kv_index_strides,
    bias_strides,
    mask_strides,
    rel_strides,
    scale,
    N,
    M,
    K,
    L,
    gh,
    gw,
    pitch,
    H,
    blocks,  # key blocks a head
    sequences,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """A program owns a block of kept keys and walks over all queries that may see them: each gradient row is one sum in one order."""
    PACKED: tl.constexpr = cu_seqlens_q is not None
    block = tl.program_id(0) % blocks
    kv_head = (tl.program_id(0) // blocks % (H // GROUP)).to(tl.int64)
    b = (tl.program_id(0) // blocks // (H // GROUP)).to(tl.int64)
    if PACKED:
        sequence, first, begin, end = _packed_block(block, cu_seqlens_k, sequences, L, BLOCK_K)
        if first >= end:
            return
        q_begin, q_end = _bounds(cu_seqlens_q, sequence, sequences, K)
        q_end = tl.where(sequence < sequences, q_end, q_begin)
    else:
        first = block * BLOCK_K
        begin, end = 0, L
        q_begin, q_end = 0, K

    key += (b * key_strides[0] + kv_head * key_strides[1]) * UNIT
    value += (b * value_strides[0] + kv_head * value_strides[1]) * UNIT
    if kv_index is not None:
        kv_index += b * kv_index_strides[0] + kv_head * kv_index_strides[1]

    k_slots = first + tl.arange(0, BLOCK_K)
    columns, seen = _listed(kv_index, k_slots, end, M)
    k = _load_rows(key, columns, seen, key_strides[2] * UNIT, D, BLOCK_D)
    v = _load_rows(value, columns, seen, value_strides[2] * UNIT, DV, BLOCK_DV)
    if bias is not None:
        column_bias = _to_log2(tl.load(bias + b * bias_strides[0] + kv_head * bias_strides[1] + columns, mask=seen, other=0.0))
    order_k = columns
    if PACKED:
        order_k = k_slots - begin

    query += b * query_strides[0] * UNIT
    grad_out += b * grad_out_strides[0] * UNIT
    lse2 += b * H * pitch
    delta += b * H * pitch
    if q_index is not None:
        q_index += b * q_index_strides[0]
    if mask is not None:
        mask += b * mask_strides[0]
    if rel_h is not None:
        rel_h += b * rel_strides[0][0]
        rel_w += b * rel_strides[1][0]
    first_head = kv_head * GROUP
    q_from = q_begin
    if CAUSAL:
        nearest = tl.min(tl.where(seen, order_k, 2147483647), 0)
        if PACKED or q_index is None:
            q_from = _causal_begin(q_index, q_begin, q_end, nearest, True, BLOCK_Q)
        else:
            q_from = q_end
            for member in range(GROUP):
                head_index = q_index + (first_head + member) * q_index_strides[1]
                q_from = tl.minimum(q_from, _causal_begin(head_index, q_begin, q_end, nearest, False, BLOCK_Q))

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    db = tl.zeros([BLOCK_K], tl.float32)
    if q_index is not None:
        ids = _ids(q_index + first_head * q_index_strides[1], q_from + tl.arange(0, BLOCK_Q), q_end)
    # one loop over the blocks of all heads of the group: a loop around a loop holds registers of its own and drains the pipeline every turn
    for step in range(tl.cdiv(q_end - q_from, BLOCK_Q) * GROUP):
        h = first_head + step % GROUP
        q_slots = q_from + step // GROUP * BLOCK_Q + tl.arange(0, BLOCK_Q)
        if q_index is None:
            rows, filled = q_slots, q_slots < q_end
        else:
            rows, filled = _named(ids, N)
            next_index = q_index + (first_head + (step + 1) % GROUP) * q_index_strides[1]
            ids = _ids(next_index, q_from + (step + 1) // GROUP * BLOCK_Q + tl.arange(0, BLOCK_Q), q_end)
        q = _load_rows(query + h * query_strides[1] * UNIT, rows, filled, query_strides[2] * UNIT, D, BLOCK_D)
        do = _load_rows(grad_out + h * grad_out_strides[1] * UNIT, q_slots, filled, grad_out_strides[2] * UNIT, DV, BLOCK_DV)
        # an empty slot has probability exp2(-inf) = 0 for every key; a key that is none spoils only its own row, which is not stored
        row_lse2 = tl.load(lse2 + h * pitch + q_slots)
        if PACKED:
            # behind the end lies the next sequence, and its NaN times a weight of 0 would be NaN; a select here spills on sm_100
            row_lse2 = tl.where(q_slots < q_end, row_lse2, float("inf"))
            row_delta = tl.load(delta + h * pitch + q_slots, mask=q_slots < q_end, other=0.0)
        else:
            row_delta = tl.load(delta + h * pitch + q_slots)
        # the tiles are [BLOCK_K, BLOCK_Q]: both gradients then take p and ds as a left operand, with no transposition
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if bias is not None:
            logits += column_bias[:, None]
        within = seen[:, None] & filled[None, :]
        order_q = rows
        if PACKED:
            order_q = q_slots - q_begin
        head_mask = mask
        if mask is not None:
            head_mask = mask + h * mask_strides[1]
        logits = _add_mask(logits, head_mask, mask_strides, rows[None, :], columns[:, None], within, WIDE)
        head_rel_h, head_rel_w = rel_h, rel_w
        if rel_h is not None:
            head_rel_h = rel_h + h * rel_strides[0][1]
            head_rel_w = rel_w + h * rel_strides[1][1]
        logits = _add_rel_pos(logits, head_rel_h, head_rel_w, rel_strides, rows[None, :], order_k[:, None], gh, gw, within, WIDE)
        p = _weights(logits, row_lse2[None, :])
        p = _hide(p, 0.0, head_mask, mask_strides, rows[None, :], columns[:, None], within, WIDE)
        if CAUSAL:
            p = tl.where(order_k[:, None] <= order_q[None, :], p, 0.0)
        if grad_value is not None:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        if grad_key is not None or grad_bias is not None:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - row_delta[None, :])
            if grad_key is not None:
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            if grad_bias is not None:
                db += tl.sum(ds, 1)

    if grad_key is not None:
        grad_key += (b * grad_key_strides[0] + kv_head * grad_key_strides[1]) * UNIT
        _store_rows(grad_key, columns, seen, grad_key_strides[2] * UNIT, dk * (scale * LN2), D, BLOCK_D)
    if grad_value is not None:
        grad_value += (b * grad_value_strides[0] + kv_head * grad_value_strides[1]) * UNIT
        _store_rows(grad_value, columns, seen, grad_value_strides[2] * UNIT, dv, DV, BLOCK_DV)
    if grad_bias is not None:
        tl.store(grad_bias + b * grad_bias_strides[0] + kv_head * grad_bias_strides[1] + columns, db, mask=seen)
