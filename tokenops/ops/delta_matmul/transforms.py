"""What torch's transforms need to know of this room's operators: how vmap folds into the batch, and how many operations a call takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# the operators, which must be there first
from tokenops.ops.delta_matmul import attention, gate, linear, update  # noqa: F401
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaAttentionProblem, DeltaState, GateProblem, LinearProblem

_library = torch.library.Library("tokenops", "FRAGMENT")
# places of arguments that have a row for each sample, and of lists, which may serve all samples; the rest are shared layers and numbers
_GRIDS = {"delta_gate": (0, 1, 2), "gathered_linear": (0,), "update_tokens": (0, 1)}
_LISTS = {
    "delta_gate": GateProblem._fields.index("index"),
    "gathered_linear": LinearProblem._fields.index("index"),
    "update_tokens": 2,
}


def _fold(x: Any, dim: int | None, size: int, batch: int, may_be_shared: bool) -> Any:
    """[V * B, ...] from [V, B, ...]; a list that all mapped calls and samples share stays [1, ...]."""
    if not isinstance(x, Tensor):
        return x
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    if may_be_shared and x.shape[0] == 1 and x.shape[1] == 1:
        return x.squeeze(0)
    return x.expand(size, batch, *x.shape[2:]).reshape(size * batch, *x.shape[2:])


def _vmap_folded(name: str, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """One call on a larger batch."""
    grids, lists = _GRIDS[name], _LISTS[name]
    if any(dim is not None for at, dim in enumerate(in_dims) if at not in (*grids, lists)):
        return _vmap_looped(name, info, in_dims, *arguments)
    first, dim = arguments[0], in_dims[0]
    batch = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]
    folded = list(arguments)
    for at in (*grids, lists):
        folded[at] = _fold(arguments[at], in_dims[at], info.batch_size, batch, at == lists)
    results = getattr(torch.ops.tokenops, name).default(*folded)
    if isinstance(results, Tensor):
        return results.unflatten(0, (info.batch_size, batch)), 0
    # without a skip the gate has no total, and gives an empty tensor of one dimension in its place
    none = [x.dim() == 1 and x.dtype.is_floating_point for x in results]
    parts = (x if gone else x.unflatten(0, (info.batch_size, batch)) for x, gone in zip(results, none, strict=True))
    return tuple(parts), tuple(None if gone else 0 for gone in none)


def _vmap_looped(name: str, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """One call after the other: each has layers, a turn, or gradients of shared arguments, of its own."""
    operator = getattr(torch.ops.tokenops, name).default
    calls = [
        operator(*(x if dim is None else x.select(dim, at) for x, dim in zip(arguments, in_dims, strict=True)))
        for at in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return results, (0,) * len(results)


for _name in _GRIDS:
    torch.library.register_vmap(f"tokenops::{_name}", partial(_vmap_folded, _name), lib=_library)
for _name in ("delta_attention", "delta_gate_backward", "gathered_linear_backward", "update_tokens_backward"):
    torch.library.register_vmap(f"tokenops::{_name}", partial(_vmap_looped, _name), lib=_library)


def _linear_flops(lead: int, backward: bool, *shapes: Any, **_: Any) -> int:
    """By shapes, every slot of a list counted: a formula may not read contents."""
    p: Any = LinearProblem._make(shapes[lead : lead + len(LinearProblem._fields)])
    first, second = (0 if weight is None else weight[0] * weight[1] for weight in (p.weight, p.weight_2))
    return reference.linear_flops_of(p.x[0] * p.index[-1], first, second, p.activation != "none", backward)


def _attention_flops(in_place: bool, *shapes: Any, **_: Any) -> int:
    size = len(DeltaAttentionProblem._fields)
    problem: Any = DeltaAttentionProblem._make(shapes[:size])
    paper = shapes[size + DeltaState._fields.index("probability")] is not None if in_place else shapes[size]
    (batch, heads, tokens, width), (*_outer, cells, value_width) = problem.query, problem.value
    rows, changed = (None if lists is None else lists[-1] for lists in (problem.rows, problem.cells))
    return batch * heads * reference.attention_flops_of(tokens, cells, rows, changed, width, value_width, paper, problem.crossover)


register_flop_formula(torch.ops.tokenops.gathered_linear)(partial(_linear_flops, 0, False))
register_flop_formula(torch.ops.tokenops.gathered_linear_)(partial(_linear_flops, 1, False))
register_flop_formula(torch.ops.tokenops.gathered_linear_backward)(partial(_linear_flops, 1, True))
# the gradient of attention is counted with the operators of sparse_attention, which make it
register_flop_formula(torch.ops.tokenops.delta_attention)(partial(_attention_flops, False))
register_flop_formula(torch.ops.tokenops.delta_attention_)(partial(_attention_flops, True))
