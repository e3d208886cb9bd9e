"""Attention over gathered tokens: the door of this room. Behind it: reference/, triton/ and csrc/ under the same name.

Sources: A. Vaswani et al., "Attention Is All You Need", 2017, eq. 1 (the definition); T. Dao et al., "FlashAttention", 2022, section 3.1
(softmax by blocks, lse kept for the backward pass); D. Bolya et al., "Token Merging", 2023, eq. 1 (proportional attention: the log of the
token size added to the logits, here ``kv_bias``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenops.ops.sparse_attention import operators as operators
from tokenops.ops.sparse_attention import transforms as transforms
from tokenops.ops.sparse_attention.arguments import as_grid_view, as_packed_problem, as_problem, check_aux, check_grid
from tokenops.ops.sparse_attention.backends import BACKENDS as BACKENDS
from tokenops.types import Aux, TokenIndex


def sparse_attention(
    query: Tensor,  # [B, Hq, N, D]
    key: Tensor,  # [B, Hkv, M, D]
    value: Tensor,  # [B, Hkv, M, Dv]
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
    return_aux: Sequence[str] | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Aux]:  # [B, Hq, K, Dv]
    """Softmax attention of some query rows over some key rows, read from full grids without gathering them first.

    out[b, h, k] = sum_l softmax_l(scale <query[b, h, n], key[b, h, m]> + kv_bias[b, h, m] + attn_mask[b, h, n, m]) value[b, h, m]
    with n = q_index[b, h, k] and m = kv_index[b, h, l].

    Without an index it is ``torch.nn.functional.scaled_dot_product_attention``, with its positional arguments, ranks (2-D has one head, no
    batch; 3-D is [H, N, D]; the batch of a 5-D call has two sizes) and broadcasting of batches and of one head. The output has the query's
    memory layout.

    Args:
        query, key, value: float32, bfloat16, float16 or float64, any strides. A row is read in place if its last dimension is dense.
        attn_mask: bool (True = visible) or floating (added to the logits), broadcastable to [B, Hq, N, M]: it speaks of the full grids.
        dropout_p: chance that a probability becomes 0; the seed is drawn from torch's default CPU generator.
        is_causal: key row m is visible to query row n if m <= n, in rows of the full grids. With attn_mask both must allow it.
        scale: logit scale, dimensionless. Default D ** -0.5.
        enable_gqa: allow key and value to have a divisor of query's heads; each of their heads serves Hq / Hkv neighbours.
        q_index: query rows to compute, int32 (int64 accepted) or TokenIndex: [K] for all, [B, K] per sample or [B, Hq, K] per head.
            -1 marks an empty slot, anywhere in the list; it gives out 0, lse -inf, row_sq 0. Ids in one list differ. None = every row.
        kv_index: visible key rows in the same forms, [L], [B, L] or [B, Hkv, L].
        kv_bias: [M], [B, M] or [B, Hkv, M], float32 (float64 with float64 inputs): added to every logit of key m. The log of a merged
            token's size, or -inf to hide a key.
        rel_pos: (rel_h [B, Hq, N, gh], rel_w [B, Hq, N, gw]), float32 or query's dtype, broadcast as attn_mask is: adds
            rel_h[n, m // gw] + rel_w[n, m % gw] to the logit of query row n and key row m, which lie on a gh x gw grid, gh gw = M. The
            decomposed position bias of ViTDet and SAM, and no N x M tensor.
        return_aux: names out of "lse", "row_sq": return (out, Aux) with lse, row_sq [B, Hq, K] float32. lse is the natural log of the
            softmax denominator, row_sq the sum of squared probabilities (before dropout). Neither is differentiable.
        out: a grid [B, Hq, N, Dv] to write the computed rows into, at their row; other rows keep their values. Returned. Only where no
            gradient is needed.
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    A query row that sees no key gives out 0, lse -inf and zero gradients. NaN in a visible row propagates. Half types accumulate in
    float32. Differentiable once in query, key, value, kv_bias, rel_pos and a floating attn_mask. Results depend neither on the run nor on
    the number of threads, forward and backward (the reference leaves its matrix products to torch). Under autocast only query, key and
    value are cast.

    Raises:
        ValueError: sizes, ranks or devices disagree, an id is out of range or repeated (checked on the CPU; on a GPU if TOKENOPS_CHECK=1),
            the name of a backend or of an aux is unknown, out overlaps an input.
        TypeError: a dtype is wrong, or an index is a bool mask (see ``index_from_mask``).
        NotImplementedError: the named backend cannot serve the call, with its reasons; a forward-mode derivative is asked for.
        RuntimeError: out is given where a gradient is needed; the result is differentiated twice.

    >>> x = torch.randn(2, 8, 196, 64)
    >>> kept = torch.stack([torch.randperm(196)[:98].sort().values for _ in range(2)])
    >>> tokenops.sparse_attention(x, x, x, q_index=kept, kv_index=kept).shape
    torch.Size([2, 8, 98, 64])
    """
    aux = () if return_aux is None else check_aux(return_aux)
    problem, grids = as_problem(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        q_index=q_index,
        kv_index=kv_index,
        kv_bias=kv_bias,
        rel_pos=rel_pos,
    )
    # the operator's arguments are the fields of the problem that a dense call has
    given = (*problem[:9], problem.dropout_seed, problem.dropout_p, problem.is_causal, problem.scale, "row_sq" in aux, backend)
    lead = grids.batch if not grids.has_heads else (*grids.batch, grids.query.shape[1])
    if out is None:
        result, lse, row_sq = torch.ops.tokenops.sparse_attention.default(*given)
        if len(lead) != 2:
            result = result.reshape(*lead, *result.shape[2:])
    else:
        check_grid(out, (*lead, grids.query.shape[2], grids.value.shape[3]), problem)
        lse, row_sq = torch.ops.tokenops.sparse_attention_.default(as_grid_view(out, grids), *given)
        result = out
    if return_aux is None:
        return result
    return result, _aux(aux, lse, row_sq, lead)


def _aux(names: Sequence[str], lse: Tensor, row_sq: Tensor, lead: tuple[int, ...]) -> Aux:
    shape = (*lead, lse.shape[-1])
    return Aux(lse.view(shape) if "lse" in names else None, row_sq.view(shape) if "row_sq" in names else None)


def sparse_attention_varlen(
    query: Tensor,  # [Tq, Hq, D]
    key: Tensor,  # [Tk, Hkv, D]
    value: Tensor,  # [Tk, Hkv, Dv]
    cu_seqlens_q: Tensor,  # [S + 1] int32
    cu_seqlens_k: Tensor,  # [S + 1] int32
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
    return_aux: Sequence[str] | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Aux]:  # [K, Hq, Dv]
    """``sparse_attention`` of packed sequences: sequence s owns rows cu_seqlens[s] : cu_seqlens[s + 1] and sees no other.

    Without an index the sequences are stretches of the rows themselves. With one they are stretches of the list: slots
    cu_seqlens_q[s] : cu_seqlens_q[s + 1] of q_index name the query rows of sequence s, in any order. Rows or slots behind the last sequence
    are padding: out 0, lse -inf, zero gradient. So the counts may stay on the device.

    Args:
        query, key, value: as in ``sparse_attention``. Hq must be a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k: ascending from 0, at most Tq and Tk (or the lengths of the lists), int32 (int64 accepted).
        max_seqlen_q, max_seqlen_k: upper bounds on a sequence's length that a GPU launch may use; default the number of rows.
        q_index, kv_index: [K] or [Hq, K], [L] or [Hkv, L]; -1 = empty slot. A row may stand in several sequences only where no
            gradient is needed (and, for q_index, no ``out`` is given).
        kv_bias: [Tk] or [Hkv, Tk].
        rel_pos: (rel_h [Tq, Hq, gh], rel_w [Tq, Hq, gw]): slot r of a sequence's keys lies at (r // gw, r % gw) of its grid, for instance
            a window of an image. A sequence has at most gh gw keys.
        is_causal: by rank within the sequence's lists: slot l of its keys is visible to slot k of its queries if l <= k.
        return_aux: lse, row_sq are [Hq, K].
        out: a grid [Tq, Hq, Dv] to write the computed rows into.

    All else, errors included, as in ``sparse_attention``; ValueError also for cu_seqlens that do not start at 0, decrease or pass the end.
    """
    aux = () if return_aux is None else check_aux(return_aux)
    problem, rows = as_packed_problem(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        q_index=q_index,
        kv_index=kv_index,
        kv_bias=kv_bias,
        rel_pos=rel_pos,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
    )
    rel_rows = [None if x is None else x.squeeze(0).transpose(0, 1) for x in (problem.rel_h, problem.rel_w)]
    lists = (
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        problem.q_index,
        problem.kv_index,
        problem.kv_bias,
        *rel_rows,
        problem.dropout_seed,
    )
    given = (*rows, *lists, max_seqlen_q, max_seqlen_k, problem.dropout_p, problem.is_causal, problem.scale, "row_sq" in aux, backend)
    if out is None:
        out, lse, row_sq = torch.ops.tokenops.sparse_attention_varlen.default(*given)
    else:
        check_grid(out, (*query.shape[:2], value.shape[2]), problem)
        lse, row_sq = torch.ops.tokenops.sparse_attention_varlen_.default(out, *given)
    if return_aux is None:
        return out
    return out, _aux(aux, lse, row_sq, lse.shape[:1])
