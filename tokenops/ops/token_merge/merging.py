"""Rows along a plan: many to one, and one to many."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenops.ops.arguments import check_tensor, refuse_forward_mode
from tokenops.ops.token_merge import operators as operators
from tokenops.ops.token_merge.arguments import DTYPES, as_statistic, check_plan
from tokenops.types import MergePlan

MODES = ("mean", "sum", "amax", "replace", "drop")


def merge_tokens(
    x: Tensor,  # [B, N] | [B, N, ...]
    plan: MergePlan,
    *,
    size: Tensor | None = None,
    mode: str = "mean",
    backend: str | None = None,
) -> Tensor:  # [B, n_out] | [B, n_out, ...]
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    rows = _as_rows("x", x)
    check_plan(plan, x.shape[0], x.shape[1], False, "x", x)
    if size is not None:
        if mode != "mean":
            raise ValueError(f"size must be left out unless mode is 'mean', got it with {mode!r}")
        size = as_statistic("size", size, "x", rows, last=True)
    refuse_forward_mode(x, size)
    slot, count, n_out, order, offsets = plan
    out = operators.merge_tokens(rows, slot, count, order, offsets, size, mode, backend)
    return out if rows is x else out.view(x.shape[0], n_out, *x.shape[2:])


def _as_rows(name: str, x: Tensor) -> Tensor:
    """[B, N, W]"""
    check_tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() == 3:
        return x
    if x.dim() < 2:
        raise ValueError(f"{name} must be [B, N] or [B, N, ...], got {list(x.shape)}")
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def unmerge_tokens(
    y: Tensor,  # [B, n_out] | [B, n_out, ...]
    plan: MergePlan | Sequence[MergePlan],
    *,
    mode: str = "copy",
    backend: str | None = None,
) -> Tensor:  # [B, N] | [B, N, ...]
    if mode not in ("copy", "drop"):
        raise ValueError(f"mode must be 'copy' or 'drop', got {mode!r}")
    rows = _as_rows("y", y)
    refuse_forward_mode(y)
    shape = y.shape
    for one in reversed((plan,) if isinstance(plan, MergePlan) or not isinstance(plan, Sequence) else plan):
        check_plan(one, rows.shape[0], rows.shape[1], True, "y", y)
        rows = operators.unmerge_tokens(rows, one.slot, one.count, one.order, one.offsets, mode, backend)
    return rows if len(shape) == 3 else rows.view(shape[0], rows.shape[1], *shape[2:])
