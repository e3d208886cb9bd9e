"""Between padded grids and packed rows: the operators and their public functions. Each is the other's gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenops.dispatch import choose
from tokenops.ops.arguments import as_bounds, as_int32, as_lists, check_device, check_tensor, dense, refuse_forward_mode
from tokenops.ops.token_select.backends import BACKENDS
from tokenops.ops.wings import reads_contents
from tokenops.reference import token_select as reference
from tokenops.types import PackedTokens, TokenIndex

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library("tokenops", "FRAGMENT")
# x [G, N, W] and lists [1|B, K]: with G = 1 all lists share the grid
_library.define(
    "pack_tokens(Tensor x, Tensor? index, Tensor? count, SymInt total, str? backend) -> (Tensor tokens, Tensor cu_seqlens)", tags=_TAGS
)
_library.define("unpack_tokens(Tensor tokens, Tensor cu_seqlens, Tensor? index, SymInt n, bool shared, str? backend) -> Tensor", tags=_TAGS)


def pack_tokens(
    x: Tensor,  # [B, N, ...]
    index: Tensor | TokenIndex | None = None,
    *,
    count: Tensor | None = None,
    total: int | None = None,
    packed: bool = False,
    backend: str | None = None,
) -> PackedTokens:  # tokens [T, ...], cu_seqlens [B + 1]
    """The tokens that were chosen, sample after sample without gaps, and the bounds of the samples: what varlen attention takes.

    Args:
        x: any dtype. A row (all that stands behind N) is read in place if it is dense.
        index: which rows and in which order, int32 (int64 accepted) or TokenIndex: [B, K] per sample or [K] for all. -1 marks an empty
            slot, anywhere in the list. Ids in one list differ.
        count: in place of an index, [B] int32 (int64 accepted): the first count[b] rows of each sample.
        total: T, rows of the result; default B * K (or B * N). It is fixed beforehand, so that the counts stay on the device: rows behind
            the last sample are 0.
        packed: x is packed itself, [T0, ...], and index [B, K] holds ids of its rows (``index_from_mask`` with cu_seqlens makes them): what
            it takes to drop rows from packed samples. No id stands in two lists.
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    Differentiable in x, as often as wanted: the gradient of packing is unpacking.

    Raises:
        ValueError: sizes, ranks or devices disagree, not exactly one of index and count is given; an id is out of range or repeated, a
            count is outside [0, N], total is too small (checked on the CPU; on a GPU if TOKENOPS_CHECK=1; there, rows beyond are dropped).
        TypeError: a dtype is wrong.
        NotImplementedError: the named backend cannot serve the call, with its reasons; a forward-mode derivative is asked for.

    >>> x = torch.arange(8).view(2, 4)
    >>> tokenops.pack_tokens(x, torch.tensor([[0, 3, -1], [2, -1, -1]]), total=4)
    PackedTokens(tokens=tensor([0, 3, 6, 0]), cu_seqlens=tensor([0, 2, 3], dtype=torch.int32))
    """
    check_tensor("x", x)
    lead = 1 if packed else 2
    if x.dim() < lead:
        raise ValueError(f"x must be {'[T, ...]' if packed else '[B, N, ...]'}, got {list(x.shape)}")
    if (index is None) == (count is None):
        raise ValueError(f"exactly one of index and count must be given, got {'neither' if index is None else 'both'}")
    if packed and index is None:
        raise ValueError("packed rows are chosen by index, got count")
    grid = _rows(x.unsqueeze(0) if packed else x, 2)
    if index is not None:
        index = as_lists(index, None if packed else x.shape[0], "x", x)
    if count is not None:
        count = _as_count(count, x)
    lists = index.shape[0] if packed and index is not None else x.shape[0]
    if total is None:
        total = lists * (x.shape[1] if index is None else index.shape[1])
    if total < 0:
        raise ValueError(f"total must not be negative, got {total}")
    refuse_forward_mode(x)
    tokens, cu_seqlens = torch.ops.tokenops.pack_tokens.default(grid, index, count, total, backend)
    return PackedTokens(tokens.view(total, *x.shape[lead:]), cu_seqlens)


def unpack_tokens(
    tokens: Tensor,  # [T, ...]
    cu_seqlens: Tensor,  # [B + 1]
    index: Tensor | TokenIndex | None = None,
    *,
    n: int,
    packed: bool = False,
    backend: str | None = None,
) -> Tensor:  # [B, n, ...]
    """``pack_tokens`` undone: packed rows back in a grid of n rows for each sample, the others 0.

    Args:
        tokens: any dtype. A row is read in place if it is dense.
        cu_seqlens: int32 (int64 accepted): sample b owns rows cu_seqlens[b] : cu_seqlens[b + 1]. Rows behind the last are not read.
        index: where they go, as given to ``pack_tokens``. Default: the first rows of each sample.
        n: rows of the grid.
        packed: the grid is a packed one of n rows for all samples, and the result [n, ...].
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    Differentiable in tokens, as often as wanted: the gradient of unpacking is packing.

    Raises:
        ValueError: sizes, ranks or devices disagree; cu_seqlens do not ascend from 0 to at most T, an id is out of range or repeated, a
            list has more or fewer ids than its sample rows, or n is too small (checked on the CPU; on a GPU if TOKENOPS_CHECK=1).
        TypeError: a dtype is wrong.
        NotImplementedError: the named backend cannot serve the call, with its reasons; a forward-mode derivative is asked for.

    >>> tokenops.unpack_tokens(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]), n=3)
    tensor([[1, 2, 0],
            [3, 0, 0]])
    """
    check_tensor("tokens", tokens)
    if tokens.dim() < 1:
        raise ValueError(f"tokens must be [T, ...], got {list(tokens.shape)}")
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    if packed and index is None:
        raise ValueError("index must be given: it says where rows of a packed grid go")
    cu_seqlens = as_bounds("cu_seqlens", cu_seqlens, "tokens", tokens)
    samples = cu_seqlens.shape[0] - 1
    if index is not None:
        index = as_lists(index, samples, "tokens", tokens)
    refuse_forward_mode(tokens)
    x = torch.ops.tokenops.unpack_tokens.default(_rows(tokens, 1), cu_seqlens, index, n, packed, backend)
    return x.view(*((n,) if packed else (samples, n)), *tokens.shape[1:])


def _rows(x: Tensor, lead: int) -> Tensor:
    """[..., W]: all that stands behind the first dimensions as one. Copied only if that is no view, or rows have gaps."""
    x = x.reshape(*x.shape[:lead], math.prod(x.shape[lead:]))
    return dense(x)


def _as_count(count: Tensor, x: Tensor) -> Tensor:
    check_tensor("count", count)
    if count.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"count must be int32 or int64, got {count.dtype}")
    if count.shape != x.shape[:1]:
        raise ValueError(f"count must be [B] = {list(x.shape[:1])} as x, got {list(count.shape)}")
    check_device("count", count, "x", x)
    return dense(as_int32(count))


def _pack(x: Tensor, index: Tensor | None, count: Tensor | None, total: int, backend: str | None) -> tuple[Tensor, Tensor]:
    tokens, cu_seqlens = _allocate_packed(x, index, count, total, backend)
    chosen = choose("pack_tokens", BACKENDS, backend, x, computes=False)
    if reads_contents(x.device, chosen.name):
        reference.check_pack(x, index, count, total)
    chosen.run.pack(x, index, count, tokens, cu_seqlens)
    return tokens, cu_seqlens


def _allocate_packed(x: Tensor, index: Tensor | None, count: Tensor | None, total: int, *_: Any) -> tuple[Tensor, Tensor]:
    lists = x.shape[0] if index is None or index.shape[0] == 1 else index.shape[0]
    return x.new_empty((total, x.shape[2])), x.new_empty((lists + 1,), dtype=torch.int32)


def _unpack(tokens: Tensor, cu_seqlens: Tensor, index: Tensor | None, n: int, shared: bool, backend: str | None) -> Tensor:
    x = _allocate_grid(tokens, cu_seqlens, index, n, shared, backend)
    chosen = choose("unpack_tokens", BACKENDS, backend, tokens, computes=False)
    if reads_contents(tokens.device, chosen.name):
        reference.check_unpack(tokens, cu_seqlens, index, n, shared)
    chosen.run.unpack(tokens, cu_seqlens, index, x)
    return x


def _allocate_grid(tokens: Tensor, cu_seqlens: Tensor, index: Tensor | None, n: int, shared: bool, *_: Any) -> Tensor:
    return tokens.new_empty((1 if shared else cu_seqlens.shape[0] - 1, n, tokens.shape[1]))


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, index, _, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.grids, ctx.rows = x.shape[:2]
    ctx.save_for_backward(output[1], index)


def _differentiate_pack(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    cu_seqlens, index = ctx.saved_tensors
    shared = ctx.grids == 1 and index is not None
    return torch.ops.tokenops.unpack_tokens.default(dense(grad), cu_seqlens, index, ctx.rows, shared, ctx.backend), None, None, None, None


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, cu_seqlens, index, _, _, ctx.backend = inputs
    ctx.total = tokens.shape[0]
    ctx.save_for_backward(cu_seqlens, index)


def _differentiate_unpack(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cu_seqlens, index = ctx.saved_tensors
    count = cu_seqlens.diff() if index is None else None
    tokens, _ = torch.ops.tokenops.pack_tokens.default(dense(grad), index, count, ctx.total, ctx.backend)
    return tokens, None, None, None, None, None


for _name, _run, _fake, _formula, _save in (
    ("pack_tokens", _pack, _allocate_packed, _differentiate_pack, _save_pack),
    ("unpack_tokens", _unpack, _allocate_grid, _differentiate_unpack, _save_unpack),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tokenops::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"tokenops::{_name}", _formula, setup_context=_save, lib=_library)
