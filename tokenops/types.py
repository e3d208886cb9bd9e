"""The values that operators take and return. Plain NamedTuples: state is an argument and a result, never hidden."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenIndex(NamedTuple):
    """Which tokens of a grid take part. Accepted wherever an index tensor is."""

    # both names also are methods of tuple, which nobody needs here
    index: Tensor  # type: ignore[assignment]  # [K] | [B, K] | [B, H, K] int32 row ids, -1 = empty slot
    count: Tensor  # type: ignore[assignment]  # [] | [B] | [B, H] int32, how many slots of each list are filled


class Aux(NamedTuple):
    """What attention can report beside its output (``return_aux``). Not differentiable."""

    lse: Tensor | None  # [B, Hq, K] float32, natural log of the softmax denominator; -inf where no key is visible
    row_sq: Tensor | None  # [B, Hq, K] float32, sum over keys of the squared attention probability


class AttentionProblem(NamedTuple):
    """One attention call after the door has checked and normalised it: what every backend receives.

    Packed (varlen) calls arrive with B = 1, the packed rows as the grid, and ``cu_seqlens_*``: sequence s then owns the slots
    ``cu_seqlens_q[s] : cu_seqlens_q[s + 1]`` of the query list (of ``q_index`` if given, else of the grid's rows), and the like for keys.
    """

    query: Tensor  # [B, Hq, N, D], last dimension dense, any other strides (0 included)
    key: Tensor  # [B, Hkv, M, D]
    value: Tensor  # [B, Hkv, M, Dv]
    q_index: Tensor | None  # [1|B, 1|Hq, K] int32, rows of the query grid, -1 = empty slot
    kv_index: Tensor | None  # [1|B, 1|Hkv, L] int32, rows of the key grid, -1 = empty slot
    kv_bias: Tensor | None  # [1|B, 1|Hkv, M] float32 (float64 with float64 inputs)
    attn_mask: Tensor | None  # [1|B, 1|Hq, 1|N, 1|M] bool (True = visible) or floating (added to the logits)
    is_causal: bool  # m <= n in grid rows; in a packed call by rank within the sequence's list
    scale: float
    dropout_p: float
    dropout_seed: Tensor | None  # [] int64, CPU; given if and only if dropout_p > 0
    cu_seqlens_q: Tensor | None  # [S + 1] int32, both or neither
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None  # upper bounds, hints for a launch grid
    max_seqlen_k: int | None


class AttentionGradients(NamedTuple):
    """Where a backward pass puts its results; None where no gradient is wanted. Uninitialised: every element must be written."""

    query: Tensor | None  # [B, Hq, N, D] in query's dtype, zero in rows that were not computed
    key: Tensor | None  # [B, Hkv, M, D]
    value: Tensor | None  # [B, Hkv, M, Dv]
    kv_bias: Tensor | None  # [B, Hkv, M] in kv_bias's dtype; the door sums it down to kv_bias's own shape
    attn_mask: Tensor | None  # attn_mask's own (broadcastable) shape
