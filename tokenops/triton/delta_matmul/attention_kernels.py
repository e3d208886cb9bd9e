"""The Triton kernels of attention on buffers of which a few rows changed: which rows to compute afresh, both modes' updates, the copy of
what changed.

Letters: B batch, N tokens, M key cells, J listed cells, H heads, D and DV widths. Weights are 2 ** (logit / ln 2 - maximum), so logits here
are in units of ln 2. Every maximum is a whole number: weights of a key at two maxima then differ by a power of two, which no rounding to a
half type can tell, and what is subtracted frames later is what was added.

One program owns a block of rows of one head, and nothing else writes there: no atomics, the same bits every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenops.triton.sparse_attention.kernels import _add_rel_pos, _ids, _load_rows, _named, _store_rows


@triton.jit(do_not_specialize=["N", "M", "K", "J", "slice_rows", "most"])
def order_rows(
    order,  # [B, N] int32: the rows to compute afresh, then the others, both ascending
    fresh,  # [B] int32: how many are to be computed afresh
    marks,  # [B, N] bytes, scratch
    rows,  # [1|B, K] int32: their query changed
    cells,  # [1|B, J] int32: their key or value changed
    turn,  # [] int32: this slice of rows has its turn
    rows_stride,
    cells_stride,
    N,
    M,
    K,
    J,
    slice_rows,
    most,  # with more changed cells than this all rows are computed afresh
    BLOCK: tl.constexpr,
):
    """One program a sample."""
    b = tl.program_id(0).to(tl.int64)
    rows += b * rows_stride
    cells += b * cells_stride
    marks += b * N
    order += b * N
    changed = 0
    for start in range(0, J, BLOCK):
        _, filled = _named(_ids(cells, start + tl.arange(0, BLOCK), J), M)
        changed += tl.sum(filled.to(tl.int32), 0)
    its_turn = tl.load(turn).to(tl.int64) * slice_rows
    for start in range(0, N, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        afresh = (changed > most) | ((ids >= its_turn) & (ids < its_turn + slice_rows))
        tl.store(marks + ids, afresh.to(tl.uint8), mask=ids < N)
    # the listed are written a second time
    tl.debug_barrier()
    for start in range(0, K, BLOCK):
        ids, filled = _named(_ids(rows, start + tl.arange(0, BLOCK), K), N)
        tl.store(marks + ids, filled.to(tl.uint8), mask=filled)
    tl.debug_barrier()
    count = 0
    for start in range(0, N, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        count += tl.sum(tl.load(marks + ids, mask=ids < N, other=0).to(tl.int32), 0)
    tl.store(fresh + b, count)
    before = 0
    for start in range(0, N, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        afresh = tl.load(marks + ids, mask=ids < N, other=0).to(tl.int32)
        # how many of those before this row are to be computed afresh
        rank = before + tl.cumsum(afresh, 0) - afresh
        tl.store(order + tl.where(afresh != 0, rank, count + ids - rank), ids, mask=ids < N)
        before += tl.sum(afresh, 0)


@triton.jit
def _logits(
    q,
    rows,
    filled,
    columns,
    seen,
    keys,
    key_stride,
    rel_h,
    rel_w,
    rel_strides,
    gh,
    gw,
    scale,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_Q, BLOCK_K] in units of ln 2, -inf where there is no key."""
    k = _load_rows(keys, columns, seen, key_stride, D, BLOCK_D)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    within = filled[:, None] & seen[None, :]
    logits = _add_rel_pos(logits, rel_h, rel_w, rel_strides, rows[:, None], columns[None, :], gh, gw, within, WIDE)
    return tl.where(seen[None, :], logits, float("-inf"))


@triton.jit
def _add_keys(
    highest,
    total,
    weighted,
    q,
    rows,
    filled,
    keys,
    values,
    key_stride,
    value_stride,
    cells,  # [slots] int32 or None: all cells
    slots,
    M,
    rel_h,
    rel_w,
    rel_strides,
    gh,
    gw,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    GONE: tl.constexpr,  # take their terms away, at the maximum as it is
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Sums of a block of rows with the terms of some keys added. None for ``values``: the sums of the weights alone."""
    if cells is not None:
        ids = _ids(cells, tl.arange(0, BLOCK_K), slots)
    for start in range(0, slots, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        if cells is None:
            columns, seen = at, at < slots
        else:
            columns, seen = _named(ids, M)
            # those of the next turn, see the kernels of sparse_attention
            ids = _ids(cells, at + BLOCK_K, slots)
        logits = _logits(
            q, rows, filled, columns, seen, keys, key_stride, rel_h, rel_w, rel_strides, gh, gw, scale, D, WIDE, PRECISION, BLOCK_D
        )
        if GONE:
            p = tl.exp2(logits - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
            total -= tl.sum(p, 1)
            p = -p
        else:
            above = tl.maximum(highest, tl.floor(tl.max(logits, 1)))
            # as long as a row has seen no key its maximum is -inf, and -inf - -inf would be NaN
            origin = tl.where(above == float("-inf"), 0.0, above)
            p = tl.exp2(logits - origin[:, None])
            shrink = tl.exp2(highest - origin)
            total = total * shrink + tl.sum(p, 1)
            if values is not None:
                weighted = weighted * shrink[:, None]
            highest = above
        if values is not None:
            v = _load_rows(values, columns, seen, value_stride, DV, BLOCK_DV)
            weighted = tl.dot(p.to(v.dtype), v, weighted, input_precision=PRECISION)
    return highest, total, weighted


@triton.jit
def _store_sums(
    output,
    maximum,
    total,
    peak,
    out,
    first,
    rows,
    written,
    o,
    m,
    s,
    top,
    out_stride,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Sums of a block of rows into the state, and their quotient into the result."""
    tl.store(maximum + first + rows, m, mask=written)
    tl.store(total + first + rows, s, mask=written)
    tl.store(peak + first + rows, top, mask=written)
    _store_rows(output + first * DV, rows, written, DV, o, DV, BLOCK_DV)
    _store_rows(out, rows, written, out_stride * UNIT, o / s[:, None], DV, BLOCK_DV)


@triton.jit(do_not_specialize=["N", "M", "J", "gh", "gw", "blocks"])
def exact(
    query,  # [B, H, N, D]
    key,  # [B, H, M, D]
    value,  # [B, H, M, DV]
    out,  # [B, H, N, DV]
    old_key,  # [B, H, M, D]; this and the next as they were in the last frame
    old_value,  # [B, H, M, DV]
    output,  # [B, H, N, DV] float32; this and the next three are the state's sums, replaced
    maximum,  # [B, H, N] float32
    total,
    peak,
    order,  # [B, N] int32, see order_rows; None: every row afresh
    fresh,  # [B] int32
    cells,  # [1|B, J] int32
    rel_h,  # [B, H, N, gh] or None
    rel_w,  # [B, H, N, gw] or None
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    old_key_strides,
    old_value_strides,
    cells_stride,
    rel_strides,
    scale,  # natural scale * log2(e)
    guard,
    N,
    M,
    J,
    gh,
    gw,
    H,
    blocks,  # blocks of rows a head
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Carries the sums of a block of rows over to this frame, or computes them afresh; few blocks have rows of both kinds."""
    # those with rows to compute afresh come first in each head, and take longest: they start first, in all heads
    heads = tl.num_programs(0) // blocks
    block = tl.program_id(0) // heads
    h = (tl.program_id(0) % heads % H).to(tl.int64)
    b = (tl.program_id(0) % heads // H).to(tl.int64)
    query += (b * query_strides[0] + h * query_strides[1]) * UNIT
    key += (b * key_strides[0] + h * key_strides[1]) * UNIT
    value += (b * value_strides[0] + h * value_strides[1]) * UNIT
    out += (b * out_strides[0] + h * out_strides[1]) * UNIT
    key_stride = key_strides[2] * UNIT
    value_stride = value_strides[2] * UNIT
    if rel_h is not None:
        rel_h += b * rel_strides[0][0] + h * rel_strides[0][1]
        rel_w += b * rel_strides[1][0] + h * rel_strides[1][1]
    first = (b * H + h) * N

    places = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows = places
    filled = places < N
    afresh = filled
    if order is not None:
        rows = tl.load(order + b * N + places, mask=filled, other=0)
        afresh = filled & (places < tl.load(fresh + b))
    q = _load_rows(query, rows, filled, query_strides[2] * UNIT, D, BLOCK_D)

    if order is not None:
        old_key += (b * old_key_strides[0] + h * old_key_strides[1]) * UNIT
        old_value += (b * old_value_strides[0] + h * old_value_strides[1]) * UNIT
        cells += b * cells_stride
        carried = filled & (places >= tl.load(fresh + b))
        m = tl.load(maximum + first + rows, mask=carried, other=0.0)
        s = tl.load(total + first + rows, mask=carried, other=1.0)
        top = tl.load(peak + first + rows, mask=carried, other=1.0)
        o = _load_rows(output + first * DV, rows, carried, DV, DV, BLOCK_DV)
        before = m
        slots = tl.where(tl.max(carried.to(tl.int32), 0) > 0, J, 0)
        m, s, o = _add_keys(
            m, s, o, q, rows, filled, old_key, old_value, old_key_strides[2] * UNIT, old_value_strides[2] * UNIT, cells, slots, M,
            rel_h, rel_w, rel_strides, gh, gw, scale, D, DV, WIDE, PRECISION, True, BLOCK_K, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        m, s, o = _add_keys(
            m, s, o, q, rows, filled, key, value, key_stride, value_stride, cells, slots, M,
            rel_h, rel_w, rel_strides, gh, gw, scale, D, DV, WIDE, PRECISION, False, BLOCK_K, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        top = tl.maximum(top * tl.exp2(before - m), s)
        finite = tl.min((tl.abs(o) < float("inf")).to(tl.int32), 1) != 0
        # a comparison with NaN is false
        sound = carried & (s >= guard * top) & (s > 0.0) & finite
        # several threads hold the same row: all of them must have read it
        tl.debug_barrier()
        _store_sums(output, maximum, total, peak, out, first, rows, sound, o, m, s, top, out_strides[2], DV, UNIT, BLOCK_DV)
        afresh = filled & ~sound

    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_Q], tl.float32)
    o = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    # over a tile and not over its rows: the compiler for sm_100 cannot reduce what was reduced from an accumulator
    slots = tl.where(tl.max(tl.broadcast_to(afresh[:, None], o.shape).to(tl.int32)) > 0, M, 0)
    m, s, o = _add_keys(
        m, s, o, q, rows, filled, key, value, key_stride, value_stride, None, slots, M,
        rel_h, rel_w, rel_strides, gh, gw, scale, D, DV, WIDE, PRECISION, False, BLOCK_K, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    _store_sums(output, maximum, total, peak, out, first, rows, afresh, o, m, s, s, out_strides[2], DV, UNIT, BLOCK_DV)


@triton.jit(do_not_specialize=["N", "M", "J", "gh", "gw", "blocks"])
def paper(
    query,
    key,
    value,
    out,
    old_value,  # [B, H, M, DV] in the dtype of probability, as it was in the last frame
    output,  # [B, H, N, DV] float32, replaced
    probability,  # [B, H, M, N], replaced in the listed rows
    cells,  # [1|B, J] int32; None: a first frame, all of them are new
    rel_h,
    rel_w,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    old_value_strides,
    cells_stride,
    rel_strides,
    scale,
    N,
    M,
    J,
    gh,
    gw,
    H,
    blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    STORED_PRECISION: tl.constexpr,  # of products in the dtype of probability
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """What the listed columns of the attention matrix, as stored, gave to a block of rows goes, and what they give now comes."""
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks % H).to(tl.int64)
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    query += (b * query_strides[0] + h * query_strides[1]) * UNIT
    key += (b * key_strides[0] + h * key_strides[1]) * UNIT
    value += (b * value_strides[0] + h * value_strides[1]) * UNIT
    out += (b * out_strides[0] + h * out_strides[1]) * UNIT
    probability += (b * H + h) * M * N
    output += (b * H + h) * N * DV
    if rel_h is not None:
        rel_h += b * rel_strides[0][0] + h * rel_strides[0][1]
        rel_w += b * rel_strides[1][0] + h * rel_strides[1][1]
    STORED: tl.constexpr = probability.dtype.element_ty

    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    filled = rows < N
    if cells is None:
        weighted = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    else:
        cells += b * cells_stride
        old_value += (b * old_value_strides[0] + h * old_value_strides[1]) * UNIT
        # minus what it was, plus what goes of it
        weighted = -_load_rows(output, rows, filled, DV, DV, BLOCK_DV)
        ids = _ids(cells, tl.arange(0, BLOCK_K), J)
        for start in range(0, J, BLOCK_K):
            columns, seen = _named(ids, M)
            ids = _ids(cells, start + BLOCK_K + tl.arange(0, BLOCK_K), J)
            p = tl.load(probability + columns.to(tl.int64)[None, :] * N + rows[:, None], mask=filled[:, None] & seen[None, :], other=0.0)
            v = _load_rows(old_value, columns, seen, old_value_strides[2] * UNIT, DV, BLOCK_DV)
            weighted = tl.dot(p, v, weighted, input_precision=STORED_PRECISION)
        weighted = -weighted
        # a thread may write what another one reads: all of them must have read it
        tl.debug_barrier()

    q = _load_rows(query, rows, filled, query_strides[2] * UNIT, D, BLOCK_D)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_Q], tl.float32)
    m, s, _ = _add_keys(
        m, s, s, q, rows, filled, key, None, key_strides[2] * UNIT, 0, None, M, M,
        rel_h, rel_w, rel_strides, gh, gw, scale, D, DV, WIDE, PRECISION, False, BLOCK_K, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    share = 1.0 / s
    if cells is not None:
        ids = _ids(cells, tl.arange(0, BLOCK_K), J)
    for start in range(0, J, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        if cells is None:
            columns, seen = at, at < J
        else:
            columns, seen = _named(ids, M)
            ids = _ids(cells, at + BLOCK_K, J)
        logits = _logits(
            q,
            rows,
            filled,
            columns,
            seen,
            key,
            key_strides[2] * UNIT,
            rel_h,
            rel_w,
            rel_strides,
            gh,
            gw,
            scale,
            D,
            WIDE,
            PRECISION,
            BLOCK_D,
        )
        p = (tl.exp2(logits - m[:, None]) * share[:, None]).to(STORED)
        tl.store(probability + columns.to(tl.int64)[None, :] * N + rows[:, None], p, mask=filled[:, None] & seen[None, :])
        v = _load_rows(value, columns, seen, value_strides[2] * UNIT, DV, BLOCK_DV)
        weighted = tl.dot(p, v.to(STORED), weighted, input_precision=STORED_PRECISION)
    _store_rows(output, rows, filled, DV, weighted, DV, BLOCK_DV)
    _store_rows(out, rows, filled, out_strides[2] * UNIT, weighted, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["M", "J", "turns", "blocks"])
def replace_cells(
    old_key,  # [B, H, M, D] or None
    old_value,  # [B, H, M, DV]
    key,  # [B, H, M, D]
    value,  # [B, H, M, DV]
    cells,  # [1|B, J] int32
    turn,  # [] int32 or None
    old_key_strides,
    old_value_strides,
    key_strides,
    value_strides,
    cells_stride,
    M,
    J,
    turns,
    H,
    blocks,  # blocks of slots a head
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Listed keys and values into the state, and the next slice of rows has its turn."""
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks % H).to(tl.int64)
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    columns, seen = _named(_ids(cells + b * cells_stride, block * BLOCK_K + tl.arange(0, BLOCK_K), J), M)
    if old_key is not None:
        old_key += (b * old_key_strides[0] + h * old_key_strides[1]) * UNIT
        key += (b * key_strides[0] + h * key_strides[1]) * UNIT
        k = _load_rows(key, columns, seen, key_strides[2] * UNIT, D, BLOCK_D)
        _store_rows(old_key, columns, seen, old_key_strides[2] * UNIT, k, D, BLOCK_D)
    old_value += (b * old_value_strides[0] + h * old_value_strides[1]) * UNIT
    value += (b * value_strides[0] + h * value_strides[1]) * UNIT
    v = _load_rows(value, columns, seen, value_strides[2] * UNIT, DV, BLOCK_DV)
    _store_rows(old_value, columns, seen, old_value_strides[2] * UNIT, v, DV, BLOCK_DV)
    if turn is not None:
        if tl.program_id(0) == 0:
            tl.store(turn, (tl.load(turn) + 1) % turns)
