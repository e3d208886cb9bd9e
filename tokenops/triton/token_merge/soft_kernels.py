"""The Triton kernels of soft merging.

Letters as everywhere: B samples, N tokens, M meta tokens, C channels of a token, F elements of a metric row. Token n gives meta token m the
weight w[n, m] = exp2(z[n, m] - origin[n]) * weight[n], where z is the similarity over the temperature, in base 2. Scores live in registers
only: every kernel that needs a tile of them multiplies it again. Each result tile has one program, which walks tokens (or meta tokens) in
ascending order: no atomics, the same bits in every run.

Where rows are compared by angle, ``unit_rows`` has first brought each to a usual magnitude by a power of two, which rounds nothing; the
products of such rows neither overflow nor vanish, and its inverse length then is a factor of a row or column of scores.

Offsets are 64-bit from the row id on: a grid may hold more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _places(base, first, stride, columns, ROWS: tl.constexpr):
    """Pointers to some columns of consecutive rows. Within a block offsets have 32 bits, which saves registers; launchers see to it."""
    return base + tl.cast(first, tl.int64) * stride + (tl.arange(0, ROWS)[:, None] * stride + columns[None, :])


@triton.jit
def _tile(base, first, exists, stride, columns, width, ROWS: tl.constexpr):
    """Some columns of consecutive rows, 0 outside."""
    return tl.load(_places(base, first, stride, columns, ROWS), mask=exists[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _store_tile(base, first, exists, stride, columns, tile, width, ROWS: tl.constexpr):
    places = _places(base, first, stride, columns, ROWS)
    tl.store(places, tile.to(base.dtype.element_ty), mask=exists[:, None] & (columns < width)[None, :])


@triton.jit
def _products(
    a,
    a_first,
    a_exists,
    a_stride,
    b,
    b_first,
    b_exists,
    b_stride,
    width,
    WHOLE: tl.constexpr,  # rows fit into one step
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of every row of a with every row of b."""
    BLOCK_A: tl.constexpr = a_exists.shape[0]
    BLOCK_B: tl.constexpr = b_exists.shape[0]
    products = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    if WHOLE:
        # not a loop, so that the loop around it is the innermost one, whose loads are copied ahead
        columns = tl.arange(0, BLOCK)
        rows = _tile(a, a_first, a_exists, a_stride, columns, width, BLOCK_A)
        others = _tile(b, b_first, b_exists, b_stride, columns, width, BLOCK_B)
        products = tl.dot(rows, tl.trans(others), products, input_precision=PRECISION)
    else:
        # the width is no constant to the compiler: it would unroll the loop, and registers would spill
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            rows = _tile(a, a_first, a_exists, a_stride, columns, width, BLOCK_A)
            others = _tile(b, b_first, b_exists, b_stride, columns, width, BLOCK_B)
            products = tl.dot(rows, tl.trans(others), products, input_precision=PRECISION)
    return products


@triton.jit
def _vector(base, rows, exists):
    """A number of each row, 0 outside."""
    return tl.load(base + rows, mask=exists, other=0.0)


@triton.jit
def _factors(lengths, rows, exists):
    """What scores of rows are multiplied with: one over the length where rows are compared by angle."""
    if lengths is None:
        return exists.to(tl.float32)
    else:
        return _vector(lengths, rows, exists)


@triton.jit
def _coolness(temperature, learned):
    """One over the temperature: a number, or what a tensor holds."""
    if learned is None:
        return 1.0 / temperature
    else:
        return 1.0 / tl.load(learned)


@triton.jit
def _masses(mass, b, rows, exists, strides):
    """What each token has to give."""
    if mass is None:
        return exists.to(tl.float32)
    else:
        return tl.load(mass + b * strides[0] + rows.to(tl.int64) * strides[1], mask=exists, other=0.0)


@triton.jit
def _divisors(mass):
    """Which meta tokens have a mass, and what weights are divided by; nothing depends on the row of one without.

    A weight may be as small as the mass, whose reciprocal overflows: the two are divided, before anything else.
    """
    opened = mass != 0.0
    return opened, tl.where(opened, mass, 1.0)


@triton.jit
def _similarity(products, of_tokens, of_metas):
    """Rounded alike in all kernels: at low temperatures the last bit of a score decides over a weight."""
    return products * of_tokens[:, None] * of_metas[None, :]


@triton.jit(do_not_specialize=["N", "blocks"])
def unit_rows(
    source,  # [B, N, F]
    rows,  # [B, N, F]: the rows of source times a power of two, the largest element between 1 and 2
    inverse,  # [B, N] float32: one over their length, 0 for a zero row
    powers,  # [B, N] float32: the powers
    source_strides,
    rows_strides,
    N,
    blocks,
    F,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n_first = (tl.program_id(0) % blocks) * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)
    exists = n < N
    source += b * source_strides[0]
    largest = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for start in range(0, F, BLOCK_F):
        tile = _tile(source, n_first, exists, source_strides[1], start + tl.arange(0, BLOCK_F), F, BLOCK_N).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(tile), propagate_nan=tl.PropagateNan.ALL)
    exponent = tl.max(largest, 1).to(tl.int32, bitcast=True) >> 23
    # a normal number, also for the smallest denormal: its row stays small but no longer vanishes when squared
    power = (tl.minimum(tl.maximum(254 - exponent, 1), 253) << 23).to(tl.float32, bitcast=True)
    squares = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for start in range(0, F, BLOCK_F):
        columns = start + tl.arange(0, BLOCK_F)
        tile = _tile(source, n_first, exists, source_strides[1], columns, F, BLOCK_N).to(tl.float32) * power[:, None]
        squares += tile * tile
        _store_tile(rows + b * rows_strides[0], n_first, exists, rows_strides[1], columns, tile, F, BLOCK_N)
    square = tl.sum(squares, 1)
    zero = square == 0.0
    tl.store(inverse + b * N + n, tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, square))), mask=exists)
    tl.store(powers + b * N + n, power, mask=exists)


@triton.jit(do_not_specialize=["N", "M", "blocks"])
def token_softmax(
    metric,  # [B, N, F]
    meta,  # [B, M, F]
    metric_inverse,  # [B, N] float32 or None
    meta_inverse,  # [B, M] float32 or None
    temperature,  # a number, read without learned_temperature only
    learned_temperature,  # [] float32 or None
    mass,  # [1|B, N] float32 or None
    lse,  # [B, N] float32
    origin,  # [B, N] float32: the highest score
    weight,  # [B, N] float32: mass over the sum of the exponentials
    metric_strides,
    meta_strides,
    mass_strides,
    N,
    M,
    blocks,  # token blocks a sample
    F,
    WHOLE_F: tl.constexpr,  # metric rows fit into one step of a product
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The softmax's terms of a block of tokens."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n_first = (tl.program_id(0) % blocks) * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)
    exists = n < N
    metric += b * metric_strides[0]
    meta += b * meta_strides[0]
    if meta_inverse is not None:
        metric_inverse += b * N
        meta_inverse += b * M
    inverse = _factors(metric_inverse, n, exists)
    cool = _coolness(temperature, learned_temperature) * LOG2E
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for m_first in range(0, M, BLOCK_M):
        m = m_first + tl.arange(0, BLOCK_M)
        here = m < M
        products = _products(
            metric, n_first, exists, metric_strides[1], meta, m_first, here, meta_strides[1], F, WHOLE_F, PRECISION, BLOCK_F
        )
        scores = _similarity(products, inverse, _factors(meta_inverse, m, here)) * cool
        scores = tl.where(here[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        total = total * tl.exp2(highest - above) + tl.sum(tl.exp2(scores - above[:, None]), 1)
        highest = above
    at = b * N + n
    tl.store(lse + at, (highest + tl.log2(total)) * LN2, mask=exists)
    tl.store(origin + at, highest, mask=exists)
    tl.store(weight + at, _masses(mass, b, n, exists, mass_strides) / total, mask=exists)


@triton.jit(do_not_specialize=["N", "M", "blocks", "parts"])
def collect(
    x,  # [B, N, C]
    metric,  # [B, N, F]
    meta,  # [B, M, F]
    metric_inverse,
    meta_inverse,
    temperature,  # a number, read without learned_temperature only
    learned_temperature,  # [] float32 or None
    origin,  # [B, N] float32
    weight,  # [B, N] float32
    out,  # [B, M, C] float32
    mass_out,  # [B, M] float32
    x_strides,
    metric_strides,
    meta_strides,
    N,
    M,
    blocks,  # meta blocks a sample
    parts,  # channel blocks of out
    C,
    F,
    WHOLE_F: tl.constexpr,  # metric rows fit into one step of a product
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Some channels of a block of meta tokens."""
    channel = (tl.program_id(0) % parts) * BLOCK_O + tl.arange(0, BLOCK_O)
    block = tl.program_id(0) // parts
    b = (block // blocks).to(tl.int64)
    m_first = (block % blocks) * BLOCK_M
    m = m_first + tl.arange(0, BLOCK_M)
    exists = m < M
    x += b * x_strides[0]
    metric += b * metric_strides[0]
    meta += b * meta_strides[0]
    origin += b * N
    weight += b * N
    if meta_inverse is not None:
        metric_inverse += b * N
        meta_inverse += b * M
    inverse = _factors(meta_inverse, m, exists)
    cool = _coolness(temperature, learned_temperature) * LOG2E
    mass = tl.zeros([BLOCK_M], tl.float32)
    rounded = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    # float16 loses the weights of a meta token that resembles no token: there they count in the highest one so far
    RELATIVE: tl.constexpr = x.dtype.element_ty == tl.float16
    highest = tl.zeros([BLOCK_M], tl.float32)
    for n_first in range(0, N, BLOCK_N):
        n = n_first + tl.arange(0, BLOCK_N)
        here = n < N
        # tokens first, as ``token_softmax`` multiplies them
        products = _products(
            metric, n_first, here, metric_strides[1], meta, m_first, exists, meta_strides[1], F, WHOLE_F, PRECISION, BLOCK_F
        )
        scores = _similarity(products, _factors(metric_inverse, n, here), inverse) * cool
        w = tl.exp2(scores - _vector(origin, n, here)[:, None]) * _vector(weight, n, here)[:, None]
        w = tl.where(exists[None, :], w, 0.0)
        rows = _tile(x, n_first, here, x_strides[1], channel, C, BLOCK_N)
        mass += tl.sum(w, 0)
        if RELATIVE:
            above = tl.maximum(highest, tl.max(w, 0))
            unit = tl.where(above == 0.0, 1.0, above)
            w = w / unit[None, :]
            rounded *= highest / unit
            total *= (highest / unit)[:, None]
            highest = above
        narrow = w.to(rows.dtype)
        rounded += tl.sum(narrow.to(tl.float32), 0)
        total = tl.dot(tl.trans(narrow), rows, total, input_precision=PRECISION)
    # by the sum of the rounded weights: else means are off by its rounding, and gradients are differences of means
    empty = rounded == 0.0
    total = tl.where(empty[:, None], 0.0, total / tl.where(empty, 1.0, rounded)[:, None])
    _store_tile(out + b * M * C, m_first, exists, C, channel, total, C, BLOCK_M)
    if tl.program_id(0) % parts == 0:
        tl.store(mass_out + b * M + m, mass, mask=exists)


@triton.jit(do_not_specialize=["M", "blocks"])
def meta_terms(
    grad_out,  # [B, M, C]
    out,  # [B, M, C] float32
    grad_mass,  # [B, M] float32
    mass_out,  # [B, M] float32
    meta_mass,  # [B, M] float32: mass_out, dense
    added,  # [B, M] float32: what the gradient of every weight, times the mass, has beside its token's product with grad_out
    grad_out_strides,
    out_strides,
    grad_mass_strides,
    mass_out_strides,
    M,
    blocks,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    m_first = (tl.program_id(0) % blocks) * BLOCK_M
    m = m_first + tl.arange(0, BLOCK_M)
    exists = m < M
    products = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        grad = _tile(grad_out + b * grad_out_strides[0], m_first, exists, grad_out_strides[1], channel, C, BLOCK_M).to(tl.float32)
        products += grad * _tile(out + b * out_strides[0], m_first, exists, out_strides[1], channel, C, BLOCK_M)
    mass = tl.load(mass_out + b * mass_out_strides[0] + m.to(tl.int64) * mass_out_strides[1], mask=exists, other=0.0)
    of_mass = tl.load(grad_mass + b * grad_mass_strides[0] + m.to(tl.int64) * grad_mass_strides[1], mask=exists, other=0.0)
    opened, divisor = _divisors(mass)
    tl.store(meta_mass + b * M + m, mass, mask=exists)
    tl.store(added + b * M + m, of_mass * divisor - tl.where(opened, tl.sum(products, 1), 0.0), mask=exists)


@triton.jit(do_not_specialize=["N", "M", "blocks"])
def token_terms(
    x,  # [B, N, C]
    metric,  # [B, N, F]
    meta,  # [B, M, F]
    metric_inverse,
    meta_inverse,
    temperature,  # a number, read without learned_temperature only
    learned_temperature,  # [] float32 or None
    mass,  # [1|B, N] float32 or None
    lse,  # [B, N] float32
    grad_out,  # [B, M, C] in x's dtype
    meta_mass,  # [B, M] float32
    added,  # [B, M] float32
    origin,  # [B, N] float32: lse in base 2
    weight,  # [B, N] float32: mass over the sum of the exponentials
    share,  # [B, N] float32: the mean of the weights' gradients; the gradient of the token's mass
    x_strides,
    metric_strides,
    meta_strides,
    mass_strides,
    lse_strides,
    grad_out_strides,
    N,
    M,
    blocks,  # token blocks a sample
    C,
    F,
    WHOLE_F: tl.constexpr,  # metric rows fit into one step of a product
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """What the softmax's gradient needs of all scores of a token."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n_first = (tl.program_id(0) % blocks) * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)
    exists = n < N
    x += b * x_strides[0]
    metric += b * metric_strides[0]
    meta += b * meta_strides[0]
    grad_out += b * grad_out_strides[0]
    meta_mass += b * M
    added += b * M
    if meta_inverse is not None:
        metric_inverse += b * N
        meta_inverse += b * M
    inverse = _factors(metric_inverse, n, exists)
    cool = _coolness(temperature, learned_temperature) * LOG2E
    base = tl.load(lse + b * lse_strides[0] + n.to(tl.int64) * lse_strides[1], mask=exists, other=0.0) * LOG2E
    total = tl.zeros([BLOCK_N], tl.float32)
    along = tl.zeros([BLOCK_N], tl.float32)
    for m_first in range(0, M, BLOCK_M):
        m = m_first + tl.arange(0, BLOCK_M)
        here = m < M
        products = _products(
            metric, n_first, exists, metric_strides[1], meta, m_first, here, meta_strides[1], F, WHOLE_F, PRECISION, BLOCK_F
        )
        scores = _similarity(products, inverse, _factors(meta_inverse, m, here)) * cool
        p = tl.where(here[None, :], tl.exp2(scores - base[:, None]), 0.0)
        grad = _products(x, n_first, exists, x_strides[1], grad_out, m_first, here, grad_out_strides[1], C, False, PRECISION, BLOCK_C)
        opened, divisor = _divisors(_vector(meta_mass, m, here))
        grad = tl.where(opened[None, :], grad, 0.0) + _vector(added, m, here)[None, :]
        total += tl.sum(p, 1)
        along += tl.sum(p / divisor[None, :] * grad, 1)
    # a token's weights sum to one only up to rounding: what is taken off must match them, or it does not cancel
    by = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    at = b * N + n
    tl.store(origin + at, base, mask=exists)
    tl.store(weight + at, _masses(mass, b, n, exists, mass_strides) * by, mask=exists)
    tl.store(share + at, along * by, mask=exists)


@triton.jit(do_not_specialize=["N", "M", "blocks", "parts"])
def backward_x(
    metric,  # [B, N, F]
    meta,  # [B, M, F]
    metric_inverse,
    meta_inverse,
    temperature,  # a number, read without learned_temperature only
    learned_temperature,  # [] float32 or None
    grad_out,  # [B, M, C] in x's dtype
    meta_mass,  # [B, M] float32
    origin,  # [B, N] float32
    weight,  # [B, N] float32
    grad_x,  # [B, N, C]
    metric_strides,
    meta_strides,
    grad_out_strides,
    N,
    M,
    blocks,  # token blocks a sample
    parts,  # channel blocks of grad_x
    C,
    F,
    WHOLE_F: tl.constexpr,  # metric rows fit into one step of a product
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Some channels of a block of tokens."""
    channel = (tl.program_id(0) % parts) * BLOCK_O + tl.arange(0, BLOCK_O)
    block = tl.program_id(0) // parts
    b = (block // blocks).to(tl.int64)
    n_first = (block % blocks) * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)
    exists = n < N
    metric += b * metric_strides[0]
    meta += b * meta_strides[0]
    grad_out += b * grad_out_strides[0]
    meta_mass += b * M
    if meta_inverse is not None:
        metric_inverse += b * N
        meta_inverse += b * M
    inverse = _factors(metric_inverse, n, exists)
    cool = _coolness(temperature, learned_temperature) * LOG2E
    base = _vector(origin + b * N, n, exists)
    own = _vector(weight + b * N, n, exists)
    total = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for m_first in range(0, M, BLOCK_M):
        m = m_first + tl.arange(0, BLOCK_M)
        here = m < M
        products = _products(
            metric, n_first, exists, metric_strides[1], meta, m_first, here, meta_strides[1], F, WHOLE_F, PRECISION, BLOCK_F
        )
        scores = _similarity(products, inverse, _factors(meta_inverse, m, here)) * cool
        # a share of the meta token's mass: at most 1, whatever the masses are
        opened, divisor = _divisors(_vector(meta_mass, m, here))
        w = tl.where(opened[None, :], tl.exp2(scores - base[:, None]) * own[:, None] / divisor[None, :], 0.0)
        rows = _tile(grad_out, m_first, here, grad_out_strides[1], channel, C, BLOCK_M)
        total = tl.dot(w.to(rows.dtype), rows, total, input_precision=PRECISION)
    _store_tile(grad_x + b * N * C, n_first, exists, C, channel, total, C, BLOCK_N)


@triton.jit(do_not_specialize=["N", "M", "blocks", "parts"])
def backward_metric(
    x,  # [B, N, C]
    metric,  # [B, N, F]
    meta,  # [B, M, F]
    metric_inverse,
    meta_inverse,
    temperature,  # a number, read without learned_temperature only
    learned_temperature,  # [] float32 or None
    grad_out,  # [B, M, C] in x's dtype
    meta_mass,  # [B, M] float32
    added,  # [B, M] float32
    origin,  # [B, N] float32
    weight,  # [B, N] float32
    share,  # [B, N] float32
    powers,  # [B, N] float32 or None: of metric
    grad_metric,  # [B, N, F] or None
    grad_temperature,  # [B, blocks] float32 or None
    x_strides,
    metric_strides,
    meta_strides,
    grad_out_strides,
    N,
    M,
    blocks,  # token blocks a sample
    parts,  # column blocks of grad_metric; 1 without it
    C,
    F,
    WHOLE_F: tl.constexpr,  # metric rows fit into one step of a product
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Some columns of a block of tokens, and the block's part of the temperature's gradient."""
    column = (tl.program_id(0) % parts) * BLOCK_O + tl.arange(0, BLOCK_O)
    block = tl.program_id(0) // parts
    b = (block // blocks).to(tl.int64)
    n_first = (block % blocks) * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)
    exists = n < N
    x += b * x_strides[0]
    metric += b * metric_strides[0]
    meta += b * meta_strides[0]
    grad_out += b * grad_out_strides[0]
    meta_mass += b * M
    added += b * M
    if meta_inverse is not None:
        metric_inverse += b * N
        meta_inverse += b * M
    inverse = _factors(metric_inverse, n, exists)
    cool = _coolness(temperature, learned_temperature)
    base = _vector(origin + b * N, n, exists)
    own = _vector(weight + b * N, n, exists)
    taken = _vector(share + b * N, n, exists)
    along = tl.zeros([BLOCK_N], tl.float32)
    warmth = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for m_first in range(0, M, BLOCK_M):
        m = m_first + tl.arange(0, BLOCK_M)
        here = m < M
        products = _products(
            metric, n_first, exists, metric_strides[1], meta, m_first, here, meta_strides[1], F, WHOLE_F, PRECISION, BLOCK_F
        )
        of_meta = _factors(meta_inverse, m, here)
        similar = _similarity(products, inverse, of_meta)
        below = similar * (cool * LOG2E) - base[:, None]
        w = tl.exp2(below) * own[:, None]
        grad = _products(x, n_first, exists, x_strides[1], grad_out, m_first, here, grad_out_strides[1], C, False, PRECISION, BLOCK_C)
        opened, divisor = _divisors(_vector(meta_mass, m, here))
        grad = tl.where(opened[None, :], grad, 0.0) + (_vector(added, m, here)[None, :] - divisor[None, :] * taken[:, None])
        grad = tl.where(here[None, :], w / divisor[None, :] * grad, 0.0)
        along += tl.sum(grad * similar, 1)
        if grad_temperature is not None:
            # a token's gradients sum to zero, so its scores may count from anywhere: from here they are small where weights are large
            warmth += tl.sum(grad * below, 1)
        if grad_metric is not None:
            rows = _tile(meta, m_first, here, meta_strides[1], column, F, BLOCK_M)
            total = tl.dot((grad * of_meta[None, :]).to(rows.dtype), rows, total, input_precision=PRECISION)
    if grad_metric is not None:
        if powers is not None:
            # only what turns the row changes its direction
            direction = _tile(metric, n_first, exists, metric_strides[1], column, F, BLOCK_N).to(tl.float32) * inverse[:, None]
            total = (total - along[:, None] * direction) * (inverse * _vector(powers + b * N, n, exists))[:, None]
        _store_tile(grad_metric + b * N * F, n_first, exists, F, column, total * cool, F, BLOCK_N)
    if grad_temperature is not None:
        if tl.program_id(0) % parts == 0:
            tl.store(grad_temperature + block, -tl.sum(warmth, 0) * LN2 * cool)


@triton.jit(do_not_specialize=["N", "M", "blocks", "parts"])
def backward_meta(
    x,  # [B, N, C]
    metric,  # [B, N, F]
    meta,  # [B, M, F]
    metric_inverse,
    meta_inverse,
    temperature,  # a number, read without learned_temperature only
    learned_temperature,  # [] float32 or None
    grad_out,  # [B, M, C] in x's dtype
    meta_mass,  # [B, M] float32
    added,  # [B, M] float32
    origin,  # [B, N] float32
    weight,  # [B, N] float32
    share,  # [B, N] float32
    powers,  # [B, M] float32 or None: of meta
    grad_meta,  # [B, M, F]
    x_strides,
    metric_strides,
    meta_strides,
    grad_out_strides,
    N,
    M,
    blocks,  # meta blocks a sample
    parts,  # column blocks of grad_meta
    C,
    F,
    WHOLE_F: tl.constexpr,  # metric rows fit into one step of a product
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Some columns of a block of meta tokens."""
    column = (tl.program_id(0) % parts) * BLOCK_O + tl.arange(0, BLOCK_O)
    block = tl.program_id(0) // parts
    b = (block // blocks).to(tl.int64)
    m_first = (block % blocks) * BLOCK_M
    m = m_first + tl.arange(0, BLOCK_M)
    exists = m < M
    x += b * x_strides[0]
    metric += b * metric_strides[0]
    meta += b * meta_strides[0]
    grad_out += b * grad_out_strides[0]
    origin += b * N
    weight += b * N
    share += b * N
    if meta_inverse is not None:
        metric_inverse += b * N
        meta_inverse += b * M
    inverse = _factors(meta_inverse, m, exists)
    cool = _coolness(temperature, learned_temperature)
    opened, divisor = _divisors(_vector(meta_mass + b * M, m, exists))
    more = _vector(added + b * M, m, exists)
    along = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for n_first in range(0, N, BLOCK_N):
        n = n_first + tl.arange(0, BLOCK_N)
        here = n < N
        products = _products(
            meta, m_first, exists, meta_strides[1], metric, n_first, here, metric_strides[1], F, WHOLE_F, PRECISION, BLOCK_F
        )
        of_metric = _factors(metric_inverse, n, here)
        similar = products * of_metric[None, :] * inverse[:, None]
        w = tl.exp2(similar * (cool * LOG2E) - _vector(origin, n, here)[None, :]) * _vector(weight, n, here)[None, :]
        grad = _products(grad_out, m_first, exists, grad_out_strides[1], x, n_first, here, x_strides[1], C, False, PRECISION, BLOCK_C)
        grad = tl.where(opened[:, None], grad, 0.0) + (more[:, None] - divisor[:, None] * _vector(share, n, here)[None, :])
        grad = w / divisor[:, None] * grad
        along += tl.sum(grad * similar, 1)
        rows = _tile(metric, n_first, here, metric_strides[1], column, F, BLOCK_N)
        total = tl.dot((grad * of_metric[None, :]).to(rows.dtype), rows, total, input_precision=PRECISION)
    if powers is not None:
        direction = _tile(meta, m_first, exists, meta_strides[1], column, F, BLOCK_M).to(tl.float32) * inverse[:, None]
        total = (total - along[:, None] * direction) * (inverse * _vector(powers + b * M, m, exists))[:, None]
    _store_tile(grad_meta + b * M * F, m_first, exists, F, column, total * cool, F, BLOCK_M)
