"""Choosing tokens by score: the operator and its public function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenops.dispatch import choose
from tokenops.ops.arguments import check_tensor, dense
from tokenops.ops.token_select.backends import BACKENDS
from tokenops.ops.wings import reads_contents
from tokenops.reference import token_select as reference
from tokenops.types import TokenIndex

_library = torch.library.Library("tokenops", "FRAGMENT")
_library.define(
    "select_tokens(Tensor score, SymInt k, float? threshold, SymInt protect, str? backend) -> (Tensor index, Tensor count)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def select_tokens(
    score: Tensor,  # [..., N]
    *,
    k: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    protect: int = 0,
    max_k: int | None = None,
    strict: bool = False,
    backend: str | None = None,
) -> TokenIndex:  # index [..., K]
    """The tokens with the best scores, as an ascending list for each row of scores. Exactly one of k, fraction and threshold says how many.

    Args:
        score: [N], [B, N] or [B, H, N], any floating dtype. Of equal scores the lowest id is the better one.
        k: so many, at most N (more are as good as N, or an error if ``strict``).
        fraction: in [0, 1]; k = floor(fraction * N).
        threshold: all that are greater, strictly; compared as float32 (float64 with float64 scores). The list has N slots, or max_k.
        protect: the first so many tokens (a class token, say) are always kept, whatever their score. They count within k.
        max_k: with ``threshold``: slots of the list. If more pass, the best of them are kept.
        strict: k greater than N is an error.
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    Returns:
        TokenIndex of index [..., K] int32, ascending ids and then -1, and count [...] int32. K does not depend on contents: nothing waits
        for the device.

    NaN sorts last, below -inf. -inf may be selected by k. Not differentiable.

    Raises:
        ValueError: not exactly one of k, fraction, threshold; a number out of its range; protect greater than the slots or than N; a NaN
            among the scores that are not protected (checked on the CPU; on a GPU if TOKENOPS_CHECK=1).
        TypeError: score is no floating tensor.
        NotImplementedError: the named backend cannot serve the call, with its reasons.

    >>> tokenops.select_tokens(torch.tensor([0.1, 0.9, 0.3, 0.9, 0.5]), k=3, protect=1)
    TokenIndex(index=tensor([0, 1, 3], dtype=torch.int32), count=tensor(3, dtype=torch.int32))
    """
    check_tensor("score", score)
    if not score.is_floating_point():
        raise TypeError(f"score must be floating, got {score.dtype}")
    if not 1 <= score.dim() <= 3:
        raise ValueError(f"score must be [N] | [B, N] | [B, H, N], got {list(score.shape)}")
    tokens = score.shape[-1]
    slots = slots_of(tokens, k, fraction, threshold, max_k, strict)
    if not 0 <= protect <= min(slots, tokens):
        raise ValueError(f"protect must be in [0, {min(slots, tokens)}] (it counts within the slots of the list), got {protect}")
    # a call on small lists takes microseconds: where the lists have their form already, no view is made of them
    lists = score if score.dim() == 2 else score.reshape(math.prod(score.shape[:-1]), tokens)
    index, count = torch.ops.tokenops.select_tokens.default(dense(lists.detach()), slots, threshold, protect, backend)
    if score.dim() != 2:
        index, count = index.view(*score.shape[:-1], slots), count.view(score.shape[:-1])
    return TokenIndex(index, count)


def slots_of(tokens: int, k: int | None, fraction: float | None, threshold: float | None, max_k: int | None, strict: bool) -> int:
    """K: how many slots the lists have."""
    given = [name for name, value in (("k", k), ("fraction", fraction), ("threshold", threshold)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"exactly one of k, fraction and threshold must be given, got {', '.join(given) or 'none'}")
    if threshold is not None:
        if math.isnan(threshold):
            raise ValueError("threshold must be a number, got nan")
        if max_k is not None and max_k < 0:
            raise ValueError(f"max_k must not be negative, got {max_k}")
        return tokens if max_k is None else max_k
    if max_k is not None:
        raise ValueError(f"max_k goes with threshold, got {given[0]}")
    if fraction is not None:
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction must be in [0, 1], got {fraction}")
        return math.floor(fraction * tokens)
    assert k is not None
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if strict and k > tokens:
        raise ValueError(f"k must be at most the number of tokens {tokens} (strict=True), got {k}")
    return min(k, tokens)


def _forward(score: Tensor, k: int, threshold: float | None, protect: int, backend: str | None) -> tuple[Tensor, Tensor]:
    index, count = _allocate(score, k, threshold, protect, backend)
    chosen = choose("select_tokens", BACKENDS, backend, score)
    if reads_contents(score.device, chosen.name):
        reference.check_scores(score, protect)
    if index.shape[0] > 0:
        chosen.run.select(score, threshold, protect, index, count)
    return index, count


def _allocate(score: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    return score.new_empty((score.shape[0], k), dtype=torch.int32), score.new_empty((score.shape[0],), dtype=torch.int32)


def _vmap(info: Any, in_dims: tuple[int | None, ...], score: Tensor, *options: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    score = score.movedim(in_dims[0] or 0, 0)
    results = torch.ops.tokenops.select_tokens.default(score.flatten(0, 1), *options)
    return tuple(x.unflatten(0, score.shape[:2]) for x in results), (0, 0)


_library.impl("select_tokens", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("tokenops::select_tokens", _allocate, lib=_library)
torch.library.register_vmap("tokenops::select_tokens", _vmap, lib=_library)
