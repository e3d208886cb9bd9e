"""The Triton kernels of the search for the most similar row of another grid, for every row.

A *slot* is a place in the list of rows that take part, a *row* is what the list names there; without a list slot s is row s. Scores are
products of tiles that live in registers: each program keeps, for a block of rows of ``a`` and every column of a tile, the best score so far
and the tile it came from, and finds the winner among the columns once, at the end. Lengths, scales and masks come to that as one factor for
each row, computed beforehand; NaN is the factor of a row that takes no part, for a score of NaN never wins.

Offsets are 64-bit from the row id on: a grid may hold more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

# largest magnitudes of a row between 2^-40 and 2^40: squares and products of such rows neither overflow nor vanish
USUAL = tl.constexpr(40)
LOWEST_INT = tl.constexpr(-(2**31))
HIGHEST_INT = tl.constexpr(2**31 - 1)
# blocks whose bounds are read at once
CHUNK = tl.constexpr(128)


@triton.jit
def _end(count, b, N):
    """How many slots there are. Whatever count holds, no slot outside the list is ever touched."""
    if count is None:
        return N
    else:
        return tl.minimum(tl.load(count + b), N)


@triton.jit
def _rows_at(rows, slots, end, N):
    """The rows that slots name, and which slots name one."""
    if rows is None:
        return slots, slots < end
    else:
        ids = tl.load(rows + slots, mask=slots < end, other=-1)
        return ids, (ids >= 0) & (ids < N)


@triton.jit
def _columns(x, ids, exists, stride, start, C: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """Some columns of rows; zeros where there are none."""
    at = start + tl.arange(0, BLOCK)
    within = exists[:, None]
    if C % BLOCK != 0:
        within = within & (at < C)[None, :]
    return tl.load(x + (ids.to(tl.int64) * stride)[:, None] * UNIT + at[None, :], mask=within, other=0.0)


@triton.jit
def _largest(tile):
    return tl.max(tl.abs(tile.to(tl.float32)), 1)


@triton.jit(do_not_specialize=["N", "blocks"])
def describe(
    x,  # [B, N, C]
    rows,  # [B, N] int32 or None
    count,  # [B] int32 or None
    mask,  # [1|B, N] bytes or None
    scale,  # [1|B, N] float32 or None
    place,  # [1|B, N, 3] int32; None where nobody reads the bounds
    factor,  # [B, blocks * BLOCK_N] float32: scale over length; NaN where nobody takes part
    shrink,  # [B, blocks * BLOCK_N] float32: the power of two that makes a row's numbers usual ones
    unusual,  # [B, blocks] int32: whether one of them is not 1
    bounds,  # [B, 6, blocks] int32: least t, y, x and greatest t, y, x
    x_strides,
    mask_strides,
    scale_strides,
    place_strides,
    N,
    blocks,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What the search has to know of a block of slots beside the rows themselves."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    slots = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if rows is not None:
        rows += b * N
    ids, exists = _rows_at(rows, slots, _end(count, b, N), N)
    wide = ids.to(tl.int64)
    takes_part = exists
    if mask is not None:
        takes_part = takes_part & (tl.load(mask + b * mask_strides[0] + wide * mask_strides[1], mask=exists, other=0) != 0)
    value = tl.full([BLOCK_N], 1.0, tl.float32)
    if scale is not None:
        value = tl.load(scale + b * scale_strides[0] + wide * scale_strides[1], mask=exists, other=0.0)
    if NORMALIZE:
        x += b * x_strides[0] * UNIT
        usual = tl.full([BLOCK_N], 1.0, tl.float32)
        if shrink is not None:
            largest = tl.zeros([BLOCK_N], tl.float32)
            for start in range(0, C, BLOCK_C):
                largest = tl.maximum(largest, _largest(_columns(x, ids, takes_part, x_strides[1], start, C, BLOCK_C, UNIT)))
            exponent = largest.to(tl.int32, bitcast=True) >> 23
            odd = (largest > 0.0) & ((exponent < 127 - USUAL) | (exponent > 127 + USUAL))
            # the reciprocal of the greatest power of two in it, as far as that is a number
            reciprocal = (254 - tl.minimum(tl.maximum(exponent, 1), 253)) << 23
            usual = tl.where(odd, reciprocal.to(tl.float32, bitcast=True), 1.0)
            tl.store(shrink + b * blocks * BLOCK_N + slots, usual)
            tl.store(unusual + b * blocks + block, tl.max(odd.to(tl.int32), 0))
        squares = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, C, BLOCK_C):
            tile = _columns(x, ids, takes_part, x_strides[1], start, C, BLOCK_C, UNIT).to(tl.float32) * usual[:, None]
            squares += tl.sum(tile * tile, 1)
        # a row of zeros is like nothing; an infinite scale stays one, for NaN would say that the row takes no part
        nothing = tl.where(tl.abs(value) == float("inf"), 1.0, 0.0)
        value *= tl.where(squares == 0.0, nothing, 1.0 / tl.sqrt(squares))
    tl.store(factor + b * blocks * BLOCK_N + slots, tl.where(takes_part, value, float("nan")))
    if place is not None:
        for axis in tl.static_range(3):
            at = tl.load(place + b * place_strides[0] + wide * place_strides[1] + axis * place_strides[2], mask=takes_part, other=0)
            least = tl.min(tl.where(takes_part, at, HIGHEST_INT), 0)
            greatest = tl.max(tl.where(takes_part, at, LOWEST_INT), 0)
            tl.store(bounds + (b * 6 + axis) * blocks + block, least)
            tl.store(bounds + (b * 6 + 3 + axis) * blocks + block, greatest)


@triton.jit
def _interval(place, below, above):
    """Which places of the other side are near enough, both ends included; empty where there is no such int32."""
    low = place.to(tl.int64) + below
    high = place.to(tl.int64) + above
    first = tl.minimum(tl.maximum(low, LOWEST_INT), HIGHEST_INT).to(tl.int32)
    last = tl.minimum(tl.maximum(high, LOWEST_INT), HIGHEST_INT).to(tl.int32)
    return tl.where(high < LOWEST_INT, HIGHEST_INT, first), tl.where(low > HIGHEST_INT, LOWEST_INT, last)


@triton.jit
def _near(place, place_strides, ids, exists, axis: tl.constexpr, below, above):
    """The interval of each row along one axis; empty for rows that do not exist."""
    at = tl.load(place + ids.to(tl.int64) * place_strides[1] + axis * place_strides[2], mask=exists, other=0)
    low, high = _interval(at, below, above)
    return tl.where(exists, low, HIGHEST_INT), tl.where(exists, high, LOWEST_INT)


@triton.jit
def _meets(bounds, axis: tl.constexpr, blocks, at, within, low, high):
    """Which blocks hold places that some row may find near."""
    least = tl.load(bounds + axis * blocks + at, mask=within, other=HIGHEST_INT)
    greatest = tl.load(bounds + (3 + axis) * blocks + at, mask=within, other=LOWEST_INT)
    return (least <= tl.max(high, 0)) & (greatest >= tl.min(low, 0))


@triton.jit
def _shrunk(tile, shrink):
    """A product with a power of two: exact in the tile's own type."""
    return (tile.to(tl.float32) * shrink[:, None]).to(tile.dtype)


@triton.jit
def _best_of_columns(
    a,
    b,
    a_ids,
    a_exists,
    a_shrink,
    b_rows,
    b_factor,
    b_shrink,
    b_place,
    a_stride,
    b_stride,
    b_place_strides,
    near,
    first,
    last,
    NB,
    b_end,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    SHRINK: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For every row and every column of a tile the best score, and the block of b in which it was met first (-1 = none)."""
    best = tl.full([BLOCK_A, BLOCK_B], float("-inf"), tl.float32)
    met = tl.full([BLOCK_A, BLOCK_B], -1, tl.int32)
    if C <= BLOCK_C:
        whole = _columns(a, a_ids, a_exists, a_stride, 0, C, BLOCK_C, UNIT)
        if SHRINK:
            whole = _shrunk(whole, a_shrink)
    for block in range(first, last):
        slots = block * BLOCK_B + tl.arange(0, BLOCK_B)
        ids, exists = _rows_at(b_rows, slots, b_end, NB)
        if C <= BLOCK_C:
            other = _columns(b, ids, exists, b_stride, 0, C, BLOCK_C, UNIT)
            if SHRINK:
                other = _shrunk(other, tl.load(b_shrink + slots))
            score = tl.dot(whole, other.T, input_precision=PRECISION)
        else:
            score = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
            for start in range(0, C, BLOCK_C):
                part = _columns(a, a_ids, a_exists, a_stride, start, C, BLOCK_C, UNIT)
                other = _columns(b, ids, exists, b_stride, start, C, BLOCK_C, UNIT)
                if SHRINK:
                    part = _shrunk(part, a_shrink)
                    other = _shrunk(other, tl.load(b_shrink + slots))
                score = tl.dot(part, other.T, score, input_precision=PRECISION)
        score *= tl.load(b_factor + slots)[None, :]
        better = score > best
        if near is not None:
            for axis in tl.static_range(3):
                place = b_place + ids.to(tl.int64) * b_place_strides[1] + axis * b_place_strides[2]
                at = tl.load(place, mask=exists, other=0)[None, :]
                better = better & (at >= near[2 * axis][:, None]) & (at <= near[2 * axis + 1][:, None])
        best = tl.where(better, score, best)
        met = tl.where(better, block, met)
    return best, met


@triton.jit(
    do_not_specialize=[
        "NA",
        "NB",
        "samples",
        "a_blocks",
        "b_blocks",
        "splits",
        "t_low",
        "t_high",
        "reach_y",
        "reach_x",
        "first_id",
        "id_step",
    ]
)
def search(
    a,  # [B, NA, C]
    b,  # [B, NB, C]
    a_rows,  # [B, NA] int32 or None
    b_rows,  # [B, NB] int32 or None
    a_count,  # [B] int32 or None
    b_count,
    a_factor,  # what describe says of both
    b_factor,
    a_shrink,
    b_shrink,
    a_unusual,
    b_unusual,
    b_bounds,
    a_place,  # [1|B, NA, 3] int32 or None
    b_place,  # [1|B, NB, 3] int32 or None
    best,  # [splits, B, NA] float32, by slot
    index,  # [splits, B, NA] int32, by slot: a row of b, to be called first_id + row * id_step
    a_strides,
    b_strides,
    a_place_strides,
    b_place_strides,
    NA,
    NB,
    samples,
    a_blocks,
    b_blocks,
    splits,
    t_low,
    t_high,
    reach_y,
    reach_x,
    first_id,
    id_step,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program a block of slots of a, and a share of those of b."""
    block = tl.program_id(0) % a_blocks
    share = tl.program_id(0) // a_blocks % splits
    sample = (tl.program_id(0) // a_blocks // splits).to(tl.int64)
    slots = block * BLOCK_A + tl.arange(0, BLOCK_A)
    a_end = _end(a_count, sample, NA)
    b_end = _end(b_count, sample, NB)
    if a_rows is not None:
        a_rows += sample * NA
    if b_rows is not None:
        b_rows += sample * NB
    a += sample * a_strides[0] * UNIT
    b += sample * b_strides[0] * UNIT
    ids, _ = _rows_at(a_rows, slots, a_end, NA)
    factor = tl.load(a_factor + sample * a_blocks * BLOCK_A + slots)
    # NaN is not equal to itself
    takes_part = factor == factor
    b_factor += sample * b_blocks * BLOCK_B
    first = 0
    last = tl.cdiv(b_end, BLOCK_B)
    near = None
    if a_place is not None:
        a_place += sample * a_place_strides[0]
        b_place += sample * b_place_strides[0]
        t_least, t_greatest = _near(a_place, a_place_strides, ids, takes_part, 0, t_low.to(tl.int64), t_high.to(tl.int64))
        y_least, y_greatest = _near(a_place, a_place_strides, ids, takes_part, 1, -reach_y.to(tl.int64), reach_y.to(tl.int64))
        x_least, x_greatest = _near(a_place, a_place_strides, ids, takes_part, 2, -reach_x.to(tl.int64), reach_x.to(tl.int64))
        near = (t_least, t_greatest, y_least, y_greatest, x_least, x_greatest)
        # from the first to the last block that any row may look at
        b_bounds += sample * 6 * b_blocks
        first = last
        behind = 0
        for start in range(0, last, CHUNK):
            at = start + tl.arange(0, CHUNK)
            meets = _meets(b_bounds, 0, b_blocks, at, at < last, t_least, t_greatest)
            meets = meets & _meets(b_bounds, 1, b_blocks, at, at < last, y_least, y_greatest)
            meets = meets & _meets(b_bounds, 2, b_blocks, at, at < last, x_least, x_greatest)
            first = tl.minimum(first, tl.min(tl.where(meets, at, last), 0))
            behind = tl.maximum(behind, tl.max(tl.where(meets, at + 1, 0), 0))
        last = behind
    if tl.max(takes_part.to(tl.int32), 0) == 0:
        last = first
    length = tl.cdiv(tl.maximum(last - first, 0), splits)
    first += share * length
    last = tl.minimum(last, first + length)

    # float32 tiles pass through registers anyway; tiles of half types go from memory to the tensor cores wherever their numbers are usual
    DIRECT: tl.constexpr = a.dtype.element_ty != tl.float32
    odd = 0
    if a_shrink is not None:
        b_shrink += sample * b_blocks * BLOCK_B
        shrink = tl.load(a_shrink + sample * a_blocks * BLOCK_A + slots)
        if DIRECT:
            odd = tl.load(a_unusual + sample * a_blocks + block)
            for start in range(first, last, CHUNK):
                at = start + tl.arange(0, CHUNK)
                odd = tl.maximum(odd, tl.max(tl.load(b_unusual + sample * b_blocks + at, mask=at < last, other=0), 0))
    if a_shrink is None:
        value, met = _best_of_columns(
            a, b, ids, takes_part, None, b_rows, b_factor, None, b_place, a_strides[1], b_strides[1], b_place_strides,
            near, first, last, NB, b_end, C, UNIT, PRECISION, False, BLOCK_A, BLOCK_B, BLOCK_C,
        )  # fmt: skip
    elif not DIRECT:
        value, met = _best_of_columns(
            a, b, ids, takes_part, shrink, b_rows, b_factor, b_shrink, b_place, a_strides[1], b_strides[1], b_place_strides,
            near, first, last, NB, b_end, C, UNIT, PRECISION, True, BLOCK_A, BLOCK_B, BLOCK_C,
        )  # fmt: skip
    elif odd == 0:
        value, met = _best_of_columns(
            a, b, ids, takes_part, None, b_rows, b_factor, None, b_place, a_strides[1], b_strides[1], b_place_strides,
            near, first, last, NB, b_end, C, UNIT, PRECISION, False, BLOCK_A, BLOCK_B, BLOCK_C,
        )  # fmt: skip
    else:
        value, met = _best_of_columns(
            a, b, ids, takes_part, shrink, b_rows, b_factor, b_shrink, b_place, a_strides[1], b_strides[1], b_place_strides,
            near, first, last, NB, b_end, C, UNIT, PRECISION, True, BLOCK_A, BLOCK_B, BLOCK_C,
        )  # fmt: skip

    greatest = tl.max(value, 1)
    slot = met * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    winner = tl.min(tl.where((value == greatest[:, None]) & (met >= 0), slot, HIGHEST_INT), 1)
    won = takes_part & (winner < HIGHEST_INT)
    if b_rows is not None:
        winner = tl.load(b_rows + winner, mask=won, other=-1)
    at = (share * samples + sample) * NA + slots
    if splits == 1:
        greatest *= factor
    tl.store(best + at, tl.where(won, greatest, float("-inf")), mask=slots < NA)
    tl.store(index + at, tl.where(won, first_id + winner * id_step, -1), mask=slots < NA)


@triton.jit(do_not_specialize=["NA", "samples", "a_blocks", "pitch", "splits"])
def best_of_shares(
    share_best,  # [splits, B, NA] float32
    share_index,  # [splits, B, NA] int32
    a_factor,  # [B, pitch] float32
    best,  # [B, NA] float32
    index,  # [B, NA] int32
    NA,
    samples,
    a_blocks,
    pitch,
    splits,
    BLOCK_A: tl.constexpr,
):
    """The winner of the winners, the first of several."""
    sample = (tl.program_id(0) // a_blocks).to(tl.int64)
    slots = (tl.program_id(0) % a_blocks) * BLOCK_A + tl.arange(0, BLOCK_A)
    exists = slots < NA
    value = tl.full([BLOCK_A], float("-inf"), tl.float32)
    winner = tl.full([BLOCK_A], -1, tl.int32)
    for share in range(splits):
        at = (share * samples + sample) * NA + slots
        other = tl.load(share_best + at, mask=exists, other=float("-inf"))
        better = other > value
        value = tl.where(better, other, value)
        winner = tl.where(better, tl.load(share_index + at, mask=exists, other=-1), winner)
    factor = tl.load(a_factor + sample * pitch + slots, mask=exists, other=0.0)
    tl.store(best + sample * NA + slots, tl.where(winner >= 0, value * factor, float("-inf")), mask=exists)
    tl.store(index + sample * NA + slots, winner, mask=exists)
