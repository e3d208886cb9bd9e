"""The Triton kernels of layers on listed rows.

A layer is a product of tiles whose rows are gathered as they are loaded, normalised on their way into the product, and scattered as they
are stored. The same kernel serves forward and backward: a gradient goes back through a layer as rows go through the transposed one.
Letters, slots and rows are row_kernels.py's; O output channels. Slots that name no row multiply zeros, and a block of nothing but those
multiplies nothing.

Each result tile has one program, which adds up in ascending order: no atomics, the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenops.triton.delta_matmul.row_kernels import _listed, _normalized, _places

# programs that run at the same time share so many blocks of rows and, in turn, blocks of weights
SHARED = tl.constexpr(8)
SQRT_HALF = tl.constexpr(0.7071067811865476)
# 1 / sqrt(2 pi)
DENSITY = tl.constexpr(0.3989422804014327)
# of the approximation by tanh: 2 sqrt(2 / pi), for tanh(u) = 2 sigmoid(2 u) - 1
STEEP = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(h):
    return 1.0 / (1.0 + tl.exp(-h))


@triton.jit
def _activated(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return h * _sigmoid(STEEP * (h + CUBIC * h * h * h))
    elif ACTIVATION == "relu":
        return tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        return h * _sigmoid(h)
    else:
        return h


@triton.jit
def _slope(h, ACTIVATION: tl.constexpr):
    """Derivative of the activation."""
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(h * SQRT_HALF)) + h * tl.exp(-0.5 * h * h) * DENSITY
    elif ACTIVATION == "gelu_tanh":
        s = _sigmoid(STEEP * (h + CUBIC * h * h * h))
        return s + h * s * (1.0 - s) * STEEP * (1.0 + 3.0 * CUBIC * h * h)
    elif ACTIVATION == "relu":
        return tl.where(h > 0.0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        s = _sigmoid(h)
        return s * (1.0 + h * (1.0 - s))
    else:
        return tl.full(h.shape, 1.0, tl.float32)


@triton.jit
def _vector(base, at, exists):
    """A number of each slot or channel in float32, 0 where there is none."""
    return tl.load(base + at, mask=exists, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N", "K", "total", "blocks"])
def layer(
    a,  # rows that go in: of [B, N, C] by row, or of [B, K, C] by slot
    index,  # [1|B, K] int32
    mean,  # [B, K] float32; these four are given if and only if rows are normalised
    inverse,
    norm_weight,  # [C]
    norm_bias,
    weight,  # [O, C]
    bias,  # [O] or None
    other,  # [B, K, O] or None, see OTHER
    out,  # rows that come out: of [B, N, O] by row, or [B, K, O] by slot
    a_strides,
    index_stride,
    weight_strides,
    other_strides,
    out_strides,
    N,
    K,
    total,  # B K
    blocks,  # of slots
    C,
    outputs,
    GATHER: tl.constexpr,  # a is by row
    SCATTER: tl.constexpr,  # out is by row, and empty slots write nothing; else they write zeros
    ACTIVATION: tl.constexpr,
    OTHER: tl.constexpr,  # none; gradient: times what comes back to the activation; inner: times the slope of the activation there
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of output channels of a block of slots."""
    parts = tl.cdiv(outputs, BLOCK_O)
    group = tl.program_id(0) // (SHARED * parts)
    members = tl.minimum(blocks - group * SHARED, SHARED)
    place = tl.program_id(0) % (SHARED * parts)
    slots = (group * SHARED + place % members) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = (place // members) * BLOCK_O + tl.arange(0, BLOCK_O)
    b, k, ids, filled = _listed(index, slots, total, index_stride, N, K)
    rows = ids if GATHER else k
    means = tl.zeros([BLOCK_N], tl.float32)
    inverses = means
    if norm_weight is not None:
        means = _vector(mean, slots, filled)
        inverses = _vector(inverse, slots, filled)
    product = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for start in range(0, tl.where(tl.max(filled.to(tl.int32), 0) > 0, C, 0), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        tile = tl.load(_places(a, b, rows, a_strides, c), mask=filled[:, None] & (c < C)[None, :], other=0.0)
        if norm_weight is not None:
            tile = _normalized(tile.to(tl.float32), means, inverses, norm_weight, norm_bias, c, C).to(weight.dtype.element_ty)
        places = weight + o.to(tl.int64)[None, :] * weight_strides[0] + c.to(tl.int64)[:, None] * weight_strides[1]
        weights = tl.load(places, mask=(o < outputs)[None, :] & (c < C)[:, None], other=0.0)
        product = tl.dot(tile, weights, product, input_precision=PRECISION)
    if bias is not None:
        product += _vector(bias, o, o < outputs)[None, :]
    within = filled[:, None] & (o < outputs)[None, :]
    if OTHER == "none":
        product = _activated(product, ACTIVATION)
    else:
        factor = tl.load(_places(other, b, k, other_strides, o), mask=within, other=0.0).to(tl.float32)
        if OTHER == "gradient":
            product = _slope(product, ACTIVATION) * factor
        else:
            product *= _slope(factor, ACTIVATION)
    product = product.to(out.dtype.element_ty)
    if SCATTER:
        tl.store(_places(out, b, ids, out_strides, o), product, mask=within)
    else:
        every = (slots < total)[:, None] & (o < outputs)[None, :]
        tl.store(_places(out, b, k, out_strides, o), tl.where(filled[:, None], product, 0.0), mask=every)


@triton.jit(do_not_specialize=["N", "K", "total"])
def layer_parameters(
    grad,  # [B, K, O]
    a,  # rows that went in: of [B, N, C] by row, or of [B, K, C] by slot
    index,  # [1|B, K] int32
    mean,  # as in ``layer``
    inverse,
    norm_weight,
    norm_bias,
    of_weight,  # [O, C] or None
    of_bias,  # [O] or None
    grad_strides,
    a_strides,
    index_stride,
    N,
    K,
    total,  # B K
    C,
    outputs,
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,  # through which the rows went in
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of the gradient of a layer's weight, and with the first columns the gradient of its bias."""
    parts = tl.cdiv(outputs, BLOCK_O)
    o = (tl.program_id(0) % parts) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = (tl.program_id(0) // parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    weights = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    biases = tl.zeros([BLOCK_O], tl.float32)
    for first in range(0, total, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        b, k, ids, filled = _listed(index, slots, total, index_stride, N, K)
        places = grad + (b.to(tl.int64) * grad_strides[0] + k.to(tl.int64) * grad_strides[1])[None, :] + o[:, None] * grad_strides[2]
        come = tl.load(places, mask=filled[None, :] & (o < outputs)[:, None], other=0.0)
        if of_bias is not None:
            biases += tl.sum(come.to(tl.float32), 1)
        if of_weight is not None:
            tile = tl.load(_places(a, b, ids if GATHER else k, a_strides, c), mask=filled[:, None] & (c < C)[None, :], other=0.0)
            if norm_weight is not None:
                means = _vector(mean, slots, filled)
                inverses = _vector(inverse, slots, filled)
                tile = _normalized(tile.to(tl.float32), means, inverses, norm_weight, norm_bias, c, C).to(come.dtype)
            if ACTIVATION != "none":
                tile = _activated(tile.to(tl.float32), ACTIVATION).to(come.dtype)
            weights = tl.dot(come, tile, weights, input_precision=PRECISION)
    if of_weight is not None:
        places = of_weight + o.to(tl.int64)[:, None] * C + c[None, :]
        tl.store(places, weights.to(of_weight.dtype.element_ty), mask=(o < outputs)[:, None] & (c < C)[None, :])
    if of_bias is not None:
        if tl.program_id(0) < parts:
            tl.store(of_bias + o, biases.to(of_bias.dtype.element_ty), mask=o < outputs)
