"""From the arguments of the public functions to an AttentionProblem: ranks, broadcasting, dtypes, shapes. Contents are never read here."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from tokenops.ops.arguments import (
    as_bounds,
    as_index,
    as_rel_pos,
    check_device,
    check_in_place,
    check_tensor,
    dense,
    flat_batch,
    per_head,
    refuse_forward_mode,
    rel_pos_parts,
)
from tokenops.types import AttentionProblem, Aux, TokenIndex

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Grids(NamedTuple):
    query: Tensor  # [B, Hq, N, D]
    key: Tensor  # [B, Hkv, M, D]
    value: Tensor  # [B, Hkv, M, Dv]
    batch: tuple[int, ...]  # as the user wrote it: () for 2-D and 3-D, (B,) for 4-D, two sizes for 5-D
    has_heads: bool  # False for 2-D


def as_grids(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> Grids:
    """Bring the ranks and broadcasts that scaled_dot_product_attention allows to one form."""
    q, k, v = query.shape, key.shape, value.shape
    plain = len(q) == len(k) == len(v) == 4 and q[0] == k[0] == v[0] and k[1] == v[1] and k[2] == v[2] and q[3] == k[3]
    if plain and (q[1] == k[1] or (k[1] == 1 and q[1] > 1) or (enable_gqa and k[1] > 0 and q[1] % k[1] == 0)):
        return Grids(query, key, value, (q[0],), True)
    for name, shape in (("query", q), ("key", k), ("value", v)):
        if not 2 <= len(shape) <= 5:
            raise ValueError(f"{name} must have 2 to 5 dimensions [..., heads, tokens, width], got {list(shape)}")
    if k[-1] != q[-1]:
        raise ValueError(f"key must be [..., M, D] with query's D = {q[-1]}, got {list(k)}")
    if v[-2] != k[-2]:
        raise ValueError(f"value must be [..., M, Dv] with key's M = {k[-2]}, got {list(v)}")
    try:
        batch = torch.broadcast_shapes(q[:-3], k[:-3], v[:-3])
    except RuntimeError as error:
        raise ValueError(f"batch sizes of query, key and value must agree or be 1, got {list(q)}, {list(k)}, {list(v)}") from error
    q_heads, k_heads, v_heads = (shape[-3] if len(shape) > 2 else 1 for shape in (q, k, v))
    kv_heads = k_heads if v_heads == 1 else v_heads
    if k_heads not in (1, kv_heads):
        raise ValueError(f"key and value must have the same number of heads (or 1), got {k_heads} and {v_heads}")
    if q_heads == 1:
        # as in torch, one query head serves many key heads
        q_heads = kv_heads
    if kv_heads not in (1, q_heads) and not (enable_gqa and kv_heads > 0 and q_heads % kv_heads == 0):
        wish = f"a divisor of query's {q_heads} heads" if enable_gqa else f"query's {q_heads} heads or 1 (or set enable_gqa=True)"
        raise ValueError(f"key and value must have {wish}, got {kv_heads}")

    def grid(x: Tensor, heads: int) -> Tensor:
        x = x if x.dim() > 2 else x.unsqueeze(0)
        x = x.expand(*batch, heads, *x.shape[-2:])
        # several batch dimensions become one: free for the usual layouts, torch copies where it cannot be a view
        return x.reshape(prod(batch), *x.shape[-3:])

    return Grids(grid(query, q_heads), grid(key, kv_heads), grid(value, kv_heads), tuple(batch), max(len(q), len(k), len(v)) > 2)


def check_values(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three, of one dtype and device; under autocast in its dtype, as it treats the inputs of matrix products."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
    kind = query.device.type
    # meta tensors, for one, know no autocast
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (query, key, value))
    if query.dtype not in DTYPES:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64, got {query.dtype}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
        check_device(name, x, "query", query)
    return query, key, value


def as_bias(kv_bias: Tensor, grids: Grids) -> Tensor:
    """[1|B, 1|Hkv, M]."""
    check_tensor("kv_bias", kv_bias)
    wanted = torch.float64 if grids.query.dtype == torch.float64 else torch.float32
    if kv_bias.dtype != wanted:
        raise TypeError(f"kv_bias must be {wanted} with {grids.query.dtype} inputs, got {kv_bias.dtype}")
    check_device("kv_bias", kv_bias, "key", grids.key)
    return dense(per_head("kv_bias", kv_bias, grids.batch, grids.key.shape[1], "M", grids.key.shape[2]))


def as_mask(attn_mask: Tensor, grids: Grids) -> Tensor:
    """[1|B, 1|Hq, 1|N, 1|M]."""
    check_tensor("attn_mask", attn_mask)
    dtype = attn_mask.dtype
    if dtype != torch.bool and not (dtype.is_floating_point and (dtype != torch.float64 or grids.query.dtype == torch.float64)):
        raise TypeError(f"attn_mask must be bool or floating (float64 only with float64 inputs), got {dtype}")
    check_device("attn_mask", attn_mask, "query", grids.query)
    heads, rows, columns = grids.query.shape[1], grids.query.shape[2], grids.key.shape[2]
    expected = (*grids.batch, heads, rows, columns)
    shape = attn_mask.shape
    if len(shape) > len(expected) or any(got not in (1, want) for got, want in zip(reversed(shape), reversed(expected), strict=False)):
        raise ValueError(f"attn_mask must broadcast to [..., Hq, N, M] = {list(expected)} (grid coordinates), got {list(shape)}")
    if len(shape) == 4 and len(expected) == 4:
        return attn_mask
    attn_mask = attn_mask[(None,) * (len(expected) - len(shape))]
    return flat_batch(attn_mask, grids.batch, 3) if grids.batch else attn_mask.unsqueeze(0)


def as_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    q_index: Tensor | TokenIndex | None = None,
    kv_index: Tensor | TokenIndex | None = None,
    kv_bias: Tensor | None = None,
    rel_pos: tuple[Tensor, Tensor] | None = None,
) -> tuple[AttentionProblem, Grids]:
    """What backends get for these arguments of ``sparse_attention``, and how the user wrote the grids."""
    grids = as_grids(*check_values(query, key, value), enable_gqa)
    rel_h, rel_w = as_rel_pos(rel_pos, grids.batch, grids.query, grids.key.shape[2])
    return _problem(grids, attn_mask, rel_h, rel_w, dropout_p, is_causal, scale, q_index, kv_index, kv_bias), grids


def _problem(
    grids: Grids,
    attn_mask: Tensor | None,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    q_index: Tensor | TokenIndex | None,
    kv_index: Tensor | TokenIndex | None,
    kv_bias: Tensor | None,
) -> AttentionProblem:
    query, key, value, batch, _ = grids
    refuse_forward_mode(query, key, value, kv_bias, attn_mask, rel_h, rel_w)
    if query.shape[3] == 0:
        raise ValueError(f"query must have a head width D of at least 1, got {list(query.shape)}")
    return AttentionProblem(
        query,
        key,
        value,
        None if q_index is None else as_index("q_index", q_index, batch, query.shape[1], "K", "query", query),
        None if kv_index is None else as_index("kv_index", kv_index, batch, key.shape[1], "L", "key", key),
        None if kv_bias is None else as_bias(kv_bias, grids),
        None if attn_mask is None else as_mask(attn_mask, grids),
        rel_h,
        rel_w,
        bool(is_causal),
        query.shape[3] ** -0.5 if scale is None else scale,
        dropout_p,
        draw_seed(dropout_p),
        None,
        None,
        None,
        None,
    )


def as_packed_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    q_index: Tensor | TokenIndex | None = None,
    kv_index: Tensor | TokenIndex | None = None,
    kv_bias: Tensor | None = None,
    rel_pos: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[AttentionProblem, tuple[Tensor, Tensor, Tensor]]:
    """What backends get for these arguments of ``sparse_attention_varlen``, and the packed rows that its grids are views of."""
    rows = query, key, value = check_values(query, key, value)
    for name, x in zip(("query", "key", "value"), rows, strict=True):
        if x.dim() != 3:
            raise ValueError(f"{name} must be packed rows [T, H, D], got {list(x.shape)}")
    q_heads, (tokens, kv_heads, d) = query.shape[1], key.shape
    if query.shape[2] != d:
        raise ValueError(f"key must be [Tk, Hkv, D] with query's D = {query.shape[2]}, got {list(key.shape)}")
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(f"value must be [Tk, Hkv, Dv] = [{tokens}, {kv_heads}, Dv] as key, got {list(value.shape)}")
    if kv_heads == 0 or q_heads % kv_heads != 0:
        raise ValueError(f"key and value must have a divisor of query's {q_heads} heads, got {kv_heads}")
    bounds = as_bounds("cu_seqlens_q", cu_seqlens_q, "query", query), as_bounds("cu_seqlens_k", cu_seqlens_k, "query", query)
    if bounds[0].shape != bounds[1].shape:
        raise ValueError(f"cu_seqlens_k must be [S + 1] = {list(bounds[0].shape)} as cu_seqlens_q, got {list(bounds[1].shape)}")
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if most is not None and most < 0:
            raise ValueError(f"{name} must not be negative, got {most}")
    q_grid, k_grid, v_grid = (x.transpose(0, 1).unsqueeze(0) for x in rows)
    grids = Grids(q_grid, k_grid, v_grid, (), True)
    rel_h, rel_w = _packed_rel_pos(rel_pos, q_grid)
    problem = _problem(grids, None, rel_h, rel_w, dropout_p, is_causal, scale, q_index, kv_index, kv_bias)
    problem = problem._replace(cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1], max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    return problem, rows


def _packed_rel_pos(rel_pos: tuple[Tensor, Tensor] | None, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The grids [1, Hq, Tq, gh], [1, Hq, Tq, gw] of packed rows [Tq, Hq, gh], [Tq, Hq, gw]."""
    for name, x in rel_pos_parts(rel_pos):
        if x.dim() != 3:
            raise ValueError(f"rel_pos: {name} must be packed rows [Tq, Hq, cells], got {list(x.shape)}")
    # how many keys a sequence has is known to who reads cu_seqlens
    return as_rel_pos(None if rel_pos is None else (rel_pos[0].transpose(0, 1), rel_pos[1].transpose(0, 1)), (), query, None)


def draw_seed(dropout_p: float) -> Tensor | None:
    """From torch's default generator: torch.manual_seed makes a call repeatable, and to a tracer it is an ordinary random tensor."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be a probability in [0, 1], got {dropout_p}")
    return torch.randint(2**63 - 1, (), dtype=torch.int64) if dropout_p > 0.0 else None


def check_aux(names: Sequence[str]) -> Sequence[str]:
    names = (names,) if isinstance(names, str) else names
    for name in names:
        if name not in Aux._fields:
            raise ValueError(f"return_aux must be names out of {Aux._fields}, got {name!r}")
    return names


def check_grid(out: Tensor, shape: tuple[int, ...], problem: AttentionProblem) -> None:
    """Whether results may be written into this grid."""
    check_tensor("out", out)
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"out must be the query's grid {list(shape)}, got {list(out.shape)}")
    if out.dtype != problem.query.dtype:
        raise TypeError(f"out must have the result's dtype {problem.query.dtype}, got {out.dtype}")
    check_device("out", out, "query", problem.query)
    check_in_place("out", out, problem, "leave out=None")
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"out must have a dense last dimension, got strides {out.stride()}")


def as_grid_view(out: Tensor, grids: Grids) -> Tensor:
    """[B, Hq, N, Dv], the same memory."""
    if out.dim() == 4:
        return out
    try:
        return out.view(*grids.query.shape[:3], out.shape[-1])
    except RuntimeError as error:
        raise ValueError(f"out must have batch dimensions that can be seen as one, got strides {out.stride()}") from error
