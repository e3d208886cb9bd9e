"""Which tokens are most alike, and which of them merge."""

from __future__ import annotations

from math import floor

import torch
from torch import Tensor

from tokenops.ops.arguments import check_tensor, under_autocast
from tokenops.ops.token_merge import operators as operators
from tokenops.ops.token_merge.arguments import (
    as_mask,
    as_place,
    as_statistic,
    as_window,
    check_grids,
    check_same_size,
    check_width,
)
from tokenops.ops.token_merge.schemes import Request, as_scheme, with_masks
from tokenops.types import MergePlan, Window

_NO_WINDOW = (0, 0, 0, 0)


def pairwise_argmax(
    a: Tensor,  # [B, Na, C]
    b: Tensor,  # [B, Nb, C]
    *,
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    a_place: Tensor | None = None,
    b_place: Tensor | None = None,
    window: str | tuple[int, ...] | Window | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # best [B, Na] float32, index [B, Na] int32
    """For each row of ``a`` the most similar row of ``b``. The scores are never stored.

    index[i] = argmax_j s(a[i], b[j]) b_scale[j], the lowest of several; best[i] = a_scale[i] times that maximum. s is the cosine of the
    angle, or with ``normalize=False`` the dot product.

    Args:
        a, b: float32, bfloat16, float16 or float64. Half types accumulate in float32. A zero row has similarity 0.
        a_mask, b_mask: [Na] or [B, Na], [Nb] or [B, Nb], bool: True takes part.
        a_scale, b_scale: in the same forms, float32 (float64 with float64 rows).
        a_place, b_place: [Na, 3] or [B, Na, 3], [Nb, 3] or [B, Nb, 3], int32 (int64 accepted): (t, y, x) of each row, at most 2^29 from 0.
        window: which rows of b may be chosen by place, given with a_place and b_place: "frame" (same t), "location" (same y and x),
            (reach_y, reach_x) in any frame, (reach_t, reach_y, reach_x), or a ``Window``, whose bounds on t(b) - t(a) may differ.
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    Returns:
        best [B, Na] float32 (float64 with float64 rows), index [B, Na] int32. A row that is masked out or may choose nobody has best -inf,
        index -1; a score of NaN or -inf never wins. Not differentiable: where a gradient matters, compute the winner's similarity anew.

    Under autocast a and b are cast.

    Raises:
        ValueError: sizes, ranks or devices disagree; a row that takes part is not finite, or its scale is NaN (checked on the CPU; on a GPU
            if TOKENOPS_CHECK=1).
        TypeError: a dtype is wrong.
        NotImplementedError: the named backend cannot serve the call, with its reasons.

    >>> best, index = tokenops.pairwise_argmax(torch.eye(3)[None], torch.eye(3)[None].flip(1))
    >>> index
    tensor([[2, 1, 0]], dtype=torch.int32)
    """
    for name, x in (("a", a), ("b", b)):
        check_tensor(name, x)
    a, b = under_autocast(a), under_autocast(b)
    check_grids("NaC NbC", a=a, b=b)
    check_same_size("b", b, "a", a, 2, "C")
    check_width("a", a)
    if (window is None) != (a_place is None) or (window is None) != (b_place is None):
        raise ValueError("window, a_place and b_place must be given together")
    bounds = _NO_WINDOW if window is None else as_window("window", window)
    best, index = operators.pairwise_argmax(
        a,
        b,
        None if a_mask is None else as_mask("a_mask", a_mask, "a", a),
        None if b_mask is None else as_mask("b_mask", b_mask, "b", b),
        None if a_scale is None else as_statistic("a_scale", a_scale, "a", a),
        None if b_scale is None else as_statistic("b_scale", b_scale, "b", b),
        None if a_place is None else as_place("a_place", a_place, "a", a),
        None if b_place is None else as_place("b_place", b_place, "b", b),
        *bounds,
        normalize,
        backend,
    )
    return best, index


def match_tokens(
    metric: Tensor,  # [B, N, C]
    *,
    r: int | None = None,
    ratio: float | None = None,
    threshold: float | None = None,
    class_token: bool = False,
    distill_token: bool = False,
    scheme: str | Tensor = "bipartite",
    k: int | None = None,
    grid: tuple[int, ...] | None = None,
    cell: tuple[int, int] | None = None,
    locality: str | tuple[int, ...] | Window | None = None,
    place: Tensor | None = None,
    source_mask: Tensor | None = None,
    destination_mask: Tensor | None = None,
    source_scale: Tensor | None = None,
    destination_scale: Tensor | None = None,
    generator: torch.Generator | None = None,
    n_out: int | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> MergePlan:
    """Pair every token that may leave with the most similar one that may receive, and let the best pairs merge.

    A source's score is source_scale * max over destinations of (similarity * destination_scale), the lowest destination of several. The r
    sources with the highest scores merge, the lowest first among equals; or all whose score is above the threshold.

    Args:
        metric: what tokens are compared by, say the keys averaged over heads: float32, bfloat16, float16 or float64.
        r: so many sources merge, or as many as there can be: half of the unprotected tokens in scheme "bipartite", else all sources.
        ratio: r as a share of N in (0, 1], rounded down. (torch.export with a dynamic N needs r: it cannot reason about the rounding.)
        threshold: sources merge whose score is greater. One of r, ratio and threshold must be given (scheme "kth" takes none, "random" no
            threshold, roles at most one; without any all sources merge).
        class_token, distill_token: token 0, token 1 neither leaves nor receives.
        scheme: who may merge into whom.
            "bipartite": even tokens into odd ones.
            "kth": all others into the last of every k tokens; an incomplete group at the end is dropped. No protected tokens.
            "random": r tokens drawn for each sample into the others.
            "grid": all others into one token drawn in each ``cell`` of the ``grid``, the same for all samples; tokens beyond the last whole
            cell are sources.
            "previous_frame": every token into one of the frame before, wherever that one goes itself.
            Or roles per token, [N] or [B, N] integers of ``Role``. A token with Role.BOTH may also choose itself, and stays: give it a
            ``locality`` that looks one way in t, in which nothing can merge in a circle.
        k: size of a group in scheme "kth".
        grid: (height, width) or (frames, height, width) of the tokens, x fastest, protected tokens before them and not counted.
        cell: (height, width) of a cell in scheme "grid".
        locality: which destinations are near enough: "frame" (the same), "location" (the same y and x, any frame), (reach_y, reach_x) in
            any frame, (reach_t, reach_y, reach_x), or a ``Window``. Needs ``grid`` or ``place``.
        place: (t, y, x) of each token, [N, 3] or [B, N, 3] int32 (int64 accepted), instead of a grid.
        source_mask, destination_mask: [N] or [B, N] bool; False: may not leave, may not receive.
        source_scale, destination_scale: [N] or [B, N] float32 (float64 with a float64 metric). A score that they make -inf never merges:
            to leave tokens out give masks, whose n_out allows for it, or n_out itself.
        generator: draws for "random" and "grid", on the metric's device. Default: torch's own.
        n_out: rows of the output. Default N - r where exactly r tokens merge whatever the tensors hold, else N with empty rows at the end
            (masks, a threshold, roles, or a locality that may leave a source without a destination). Given, it must hold all tokens that
            are left.
        normalize: compare by the cosine of the angle, a zero row having similarity 0; False: by the dot product.
        backend: as in ``pairwise_argmax``.

    Returns:
        MergePlan. Output rows ascend by their destination's id. Not differentiable.

    Under autocast the metric is cast.

    Raises:
        ValueError: an argument is out of its range or missing, sizes disagree, a token that takes part is not finite or its scale is NaN,
            a role does not exist, tokens merge in a circle, n_out is too small (contents are checked on the CPU; on a GPU if
            TOKENOPS_CHECK=1, else NaN never wins and what does not fit is dropped).
        TypeError: a dtype is wrong.
        NotImplementedError: the named backend cannot serve the call, with its reasons.

    >>> x = torch.randn(2, 197, 768)
    >>> plan = tokenops.match_tokens(x, r=16, class_token=True)
    >>> tokenops.merge_tokens(x, plan).shape
    torch.Size([2, 181, 768])
    """
    check_tensor("metric", metric)
    metric = under_autocast(metric)
    check_grids("NC", metric=metric)
    check_width("metric", metric)
    tokens = metric.shape[1]
    r = _amount(scheme, r, ratio, threshold, tokens)
    request = Request(metric, class_token, distill_token, r, k, grid, cell, locality, place, generator)
    role, place, window, most, certain, dropped = as_scheme(scheme, request)
    # by a branch: min() of a traced size would be an expression that no range of sizes decides
    if r is not None and r > most:
        r = most
    if source_mask is not None or destination_mask is not None:
        masks = (
            None if source_mask is None else as_mask("source_mask", source_mask, "metric", metric),
            None if destination_mask is None else as_mask("destination_mask", destination_mask, "metric", metric),
        )
        role, certain = with_masks(role, request, *masks), False
    if n_out is None:
        n_out = tokens - dropped
        if certain and threshold is None:
            n_out -= most if r is None else r
    elif n_out < 0:
        raise ValueError(f"n_out must not be negative, got {n_out}")
    slot, count, order, offsets = operators.match_tokens(
        metric,
        role,
        class_token,
        distill_token,
        place,
        *(_NO_WINDOW if window is None else window),
        None if source_scale is None else as_statistic("source_scale", source_scale, "metric", metric),
        None if destination_scale is None else as_statistic("destination_scale", destination_scale, "metric", metric),
        r,
        threshold,
        normalize,
        n_out,
        backend,
    )
    return MergePlan(slot, count, n_out, order, offsets)


def _amount(scheme: str | Tensor, r: int | None, ratio: float | None, threshold: float | None, tokens: int) -> int | None:
    """How many sources may merge at most; None: as the threshold says, or all."""
    given = [name for name, value in (("r", r), ("ratio", ratio), ("threshold", threshold)) if value is not None]
    allowed: tuple[str, ...] = ("r", "ratio", "threshold")
    least = 1
    if isinstance(scheme, Tensor):
        least = 0
    elif scheme == "kth":
        allowed, least = (), 0
    elif scheme == "random":
        allowed = ("r", "ratio")
    if not least <= len(given) <= 1 or any(name not in allowed for name in given):
        number = "none" if not allowed else "one" if least else "at most one"
        wish = " or ".join(allowed) if allowed else "r, ratio and threshold"
        kind = "a scheme of roles" if isinstance(scheme, Tensor) else f"scheme {scheme!r}"
        raise ValueError(f"{number} of {wish} must be given in {kind}, got {', '.join(given) or 'none'}")
    if r is not None:
        if isinstance(r, bool) or not isinstance(r, (int, torch.SymInt)):
            raise TypeError(f"r must be an int, got {type(r).__name__}")
        if r < 0:
            raise ValueError(f"r must not be negative, got {r}")
        return r
    if ratio is not None:
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratio must be in (0, 1], got {ratio}")
        return floor(ratio * tokens)
    if threshold is not None and threshold != threshold:
        raise ValueError("threshold must be a number, got NaN")
    return None
