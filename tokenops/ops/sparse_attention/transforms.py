"""What torch's transforms need to know of this room's operators: how vmap folds into the batch, and how many operations a call takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from tokenops.ops.sparse_attention.operators import DENSE, PACKED, packed_problem
from tokenops.reference import sparse_attention as reference

_library = torch.library.Library("tokenops", "FRAGMENT")
# places of the lists, bias and mask among the dense operator's arguments, and of what stands behind all tensors with a batch
_LISTS, _SEED = (3, 4, 5, 6), 9


def _front(x: Tensor, dim: int | None) -> Tensor:
    """[V, ...] if mapped over, [1, ...] if not."""
    return x.unsqueeze(0) if dim is None else x.movedim(dim, 0)


def _fold(x: Tensor | None, dim: int | None, size: int, batch: int, always: bool) -> Tensor | None:
    """[V * B, ...] from [V, B, ...]; what all mapped calls and samples share stays [1, ...] unless ``always``."""
    if x is None:
        return None
    x = _front(x, dim)
    if not always and x.shape[0] == 1 and x.shape[1] == 1:
        return x.squeeze(0)
    return x.expand(size, batch, *x.shape[2:]).reshape(size * batch, *x.shape[2:])


def _folded(in_dims: tuple[int | None, ...], size: int, arguments: tuple[Any, ...], lead: int, always: bool) -> tuple[list[Any], int]:
    """The arguments with the mapped dimension folded into the batch, and the batch size B. ``lead`` tensors like the output come first."""
    folded = list(arguments)
    batch = _front(arguments[lead], in_dims[lead]).shape[1]
    if in_dims[lead + _SEED] is not None:
        raise NotImplementedError("sparse_attention: vmap needs one dropout seed for all (randomness='same')")
    for at in range(lead + _SEED):
        is_list = at >= lead and at - lead in _LISTS
        folded[at] = _fold(arguments[at], in_dims[at], size, batch, always or not is_list)
    return folded, batch


def _vmap_forward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    folded, batch = _folded(in_dims, info.batch_size, arguments, 0, False)
    results = torch.ops.tokenops.sparse_attention.default(*folded)
    return tuple(x.unflatten(0, (info.batch_size, batch)) for x in results), (0, 0, 0)


def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    # each mapped call has a bias gradient of its own, so nothing may stay shared
    folded, batch = _folded(in_dims, info.batch_size, arguments, 3, True)
    results, wanted = [], arguments[-2]
    places = [at for at in DENSE.differentiable if at is not None]
    for at, grad in enumerate(torch.ops.tokenops.sparse_attention_backward.default(*folded)):
        if wanted[at]:
            grad = grad.unflatten(0, (info.batch_size, batch))
            place = 3 + places[at]
            if _front(arguments[place], in_dims[place]).shape[1] == 1:
                grad = grad.sum(1, keepdim=True)
        results.append(grad)
    return tuple(results), tuple(0 if want else None for want in wanted)


torch.library.register_vmap("tokenops::sparse_attention", _vmap_forward, lib=_library)
torch.library.register_vmap("tokenops::sparse_attention_backward", _vmap_backward, lib=_library)


def _dense_flops(lead: int, backward: bool, *shapes: Any, **_: Any) -> int:
    """By shapes, every slot of a list counted: a formula may not read contents."""
    query, key, value, q_index, kv_index = shapes[lead : lead + 5]
    slots = query[2] if q_index is None else q_index[-1]
    keys = key[2] if kv_index is None else kv_index[-1]
    width = 3 * query[3] + 2 * value[3] if backward else query[3] + value[3]
    return 2 * query[0] * query[1] * slots * keys * width


def _packed_flops(lead: int, backward: bool, *arguments: Any, **_: Any) -> int:
    """By the sequences' bounds; without contents (fake or meta tensors) as if every query row saw the longest sequence."""
    problem = packed_problem(*arguments[lead:-2])
    if not (isinstance(problem.query, FakeTensor) or problem.query.is_meta):
        return reference.flops(problem, backward=backward)
    longest = problem.key.shape[2] if problem.max_seqlen_k is None else problem.max_seqlen_k
    key = (*problem.key.shape[:2], longest)
    listed = None if problem.q_index is None else problem.q_index.shape
    return _dense_flops(0, backward, problem.query.shape, (*key, None), problem.value.shape, listed, None)


for _form, _formula, _raw in ((DENSE, _dense_flops, False), (PACKED, _packed_flops, True)):
    for _suffix, _lead, _is_backward in (("", 0, False), ("_", 1, False), ("_backward", 3, True)):
        _operator = getattr(torch.ops.tokenops, f"{_form.name}{_suffix}")
        register_flop_formula(_operator, get_raw=_raw)(partial(_formula, _lead, _is_backward))
