"""What torch's transforms need to know of this room's operators: how vmap folds into the batch, and how many operations a call takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("tokenops", "FRAGMENT")
# how many of the leading tensors have a row for each sample; the tensors behind them may serve all samples
_BATCHED = {"pairwise_argmax": 2, "match_tokens": 1, "plan_tokens": 1, "merge_tokens": 1, "unmerge_tokens": 1, "soft_merge": 3}
_SOFT_TEMPERATURE = 3


def _front(x: Tensor, dim: int | None) -> Tensor:
    """[V, ...] if mapped over, [1, ...] if not."""
    return x.unsqueeze(0) if dim is None else x.movedim(dim, 0)


def _fold(x: Any, dim: int | None, size: int, batch: int, always: bool) -> Any:
    """[V * B, ...] from [V, B, ...]; what all mapped calls and samples share stays [1, ...] unless ``always``."""
    if not isinstance(x, Tensor) or (dim is None and x.dim() == 0):
        return x
    x = _front(x, dim)
    if not always and x.shape[0] == 1 and x.shape[1] == 1:
        return x.squeeze(0)
    return x.expand(size, batch, *x.shape[2:]).reshape(size * batch, *x.shape[2:])


def _vmap_folded(name: str, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """One call on a larger batch. Every result has the batch in front."""
    if name == "soft_merge" and in_dims[_SOFT_TEMPERATURE] is not None:
        return _vmap_looped(name, info, in_dims, *arguments)
    batch = _front(arguments[0], in_dims[0]).shape[1]
    # the tensors of a plan stay together
    plan = range(1, 5) if name in ("merge_tokens", "unmerge_tokens") and any(dim is not None for dim in in_dims[1:5]) else ()
    folded = [
        _fold(x, dim, info.batch_size, batch, at < _BATCHED[name] or at in plan)
        for at, (x, dim) in enumerate(zip(arguments, in_dims, strict=True))
    ]
    results = getattr(torch.ops.tokenops, name).default(*folded)
    if isinstance(results, Tensor):
        return results.unflatten(0, (info.batch_size, batch)), 0
    return tuple(x.unflatten(0, (info.batch_size, batch)) for x in results), (0,) * len(results)


def _vmap_looped(name: str, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """One call after the other: each has a temperature, or a gradient of shared arguments, of its own."""
    operator = getattr(torch.ops.tokenops, name).default
    calls = [
        operator(*(x if dim is None else x.select(dim, at) for x, dim in zip(arguments, in_dims, strict=True)))
        for at in range(info.batch_size)
    ]
    results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return results, (0,) * len(results)


for _name in _BATCHED:
    torch.library.register_vmap(f"tokenops::{_name}", partial(_vmap_folded, _name), lib=_library)
for _name in ("merge_tokens_backward", "soft_merge_backward"):
    torch.library.register_vmap(f"tokenops::{_name}", partial(_vmap_looped, _name), lib=_library)


@register_flop_formula(torch.ops.tokenops.pairwise_argmax)
def _pairwise_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """By shapes, as if everybody took part: a formula may not read contents."""
    return 2 * a[0] * a[1] * b[1] * a[2]


@register_flop_formula(torch.ops.tokenops.match_tokens)
def _match_flops(metric: Any, role: Any, *_: Any, **__: Any) -> int:
    batch, tokens, width = metric
    pairs = (tokens + 1) // 2 * (tokens // 2) if role is None else tokens * tokens
    return 2 * batch * pairs * width


@register_flop_formula(torch.ops.tokenops.soft_merge)
def _soft_flops(x: Any, metric: Any, meta: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * meta[1] * (metric[2] + x[2])


@register_flop_formula(torch.ops.tokenops.soft_merge_backward)
def _soft_backward_flops(grad_out: Any, grad_mass: Any, x: Any, metric: Any, meta: Any, *_: Any, **__: Any) -> int:
    # the scores anew, and products for d scores, d x, d metric, d meta
    return 2 * x[0] * x[1] * meta[1] * (3 * metric[2] + 2 * x[2])
