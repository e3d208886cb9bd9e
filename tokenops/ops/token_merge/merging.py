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
    return_size: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # [B, n_out] | [B, n_out, ...], and with return_size [B, n_out] | [B, n_out, 1]
    """Merge the rows that share an output row of the plan. One plan serves any number of tensors: tokens, sizes, positions.

    Args:
        x: float32, bfloat16, float16 or float64, a row (of any shape) per token. Read in place where its rows are dense.
        plan: from ``match_tokens`` or its like, for as many tokens and samples as x has, or for one sample that stands for all.
        size: [N], [B, N] or [B, N, 1] float32 (float64 with float64 x), with mode "mean" only: how many original tokens each one is. Of
            size 0 it weighs nothing.
        mode: "mean" (weighted by size), "sum", "amax", or the destination's own row: "replace" and "drop" differ only in what
            ``unmerge_tokens`` then does for the others.
        return_size: also return the size of each output row, shaped like size: the sum over its members, or how many they are without size.
            The same as ``merge_tokens(size, plan, mode="sum")`` by a second call.
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    A row without members is 0, so is a mean over sizes
    that sum to 0. Members add up in float32 (float64 for float64), the destination first and then ascending: results depend neither on the
    run nor on the number of threads. In "amax" NaN wins, as in torch, and tied maxima share the gradient equally. Differentiable once in x
    and size.

    Source: D. Bolya et al., "Token Merging: Your ViT But Faster", 2023, section 3.

    Raises:
        ValueError: the plan is for other sizes or contradicts itself, a size is negative or NaN (contents are checked on the CPU; on a GPU
            if TOKENOPS_CHECK=1), the mode is unknown.
        TypeError: a dtype is wrong, or plan is no MergePlan.
        NotImplementedError: the named backend cannot serve the call, with its reasons; a forward-mode derivative is asked for.
        RuntimeError: the result is differentiated twice.

    >>> plan = tokenops.plan_from_parents(torch.tensor([[0, 0, 2]]), n_out=2)
    >>> tokenops.merge_tokens(torch.tensor([[1.0, 4.0, 5.0]]), plan, size=torch.tensor([2.0, 1.0, 1.0]))
    tensor([[2., 5.]])
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    rows = _as_rows("x", x)
    check_plan(plan, x.shape[0], x.shape[1], False, "x", x)
    column = False
    if size is not None:
        if mode != "mean":
            raise ValueError(f"size must be left out unless mode is 'mean', got it with {mode!r}")
        column = isinstance(size, Tensor) and size.dim() == 3
        size = as_statistic("size", size, "x", rows, last=True)
    refuse_forward_mode(x, size)
    slot, count, n_out, order, offsets = plan
    out, out_size = operators.merge_tokens(rows, slot, count, order, offsets, size, mode, return_size, backend)
    if rows is not x:
        out = out.view(x.shape[0], n_out, *x.shape[2:])
    return (out, out_size.unsqueeze(2) if column else out_size) if return_size else out


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
    """Give every token the output row that it was merged into, in the order of the tokens.

    Args:
        y: float32, bfloat16, float16 or float64, a row (of any shape) per output row of the plan.
        plan: the plan, or plans in the order in which they merged; the last is undone first.
        mode: "copy" to every member, or "drop": to the destination only, 0 to the others.
        backend: as in ``merge_tokens``.

    A token without an output row gets 0. Differentiable in y: the gradient is ``merge_tokens`` with mode "sum".

    Raises:
        As ``merge_tokens``.

    >>> plan = tokenops.plan_from_parents(torch.tensor([[0, 0, 2]]), n_out=2)
    >>> tokenops.unmerge_tokens(torch.tensor([[2.0, 5.0]]), plan)
    tensor([[2., 2., 5.]])
    """
    if mode not in ("copy", "drop"):
        raise ValueError(f"mode must be 'copy' or 'drop', got {mode!r}")
    rows = _as_rows("y", y)
    refuse_forward_mode(y)
    shape = y.shape
    plans: Sequence[MergePlan] = plan if isinstance(plan, Sequence) and not isinstance(plan, MergePlan) else (plan,)
    for one in reversed(plans):
        check_plan(one, rows.shape[0], rows.shape[1], True, "y", y)
        rows = operators.unmerge_tokens(rows, one.slot, one.count, one.order, one.offsets, mode, backend)
    return rows if len(shape) == 3 else rows.view(shape[0], rows.shape[1], *shape[2:])
