"""Checks and normalisation shared by the doors: what a user may pass becomes what a backend expects, or a clear error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tokenops.types import TokenIndex


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {value.device}")


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Operators have a gradient formula only; torch would silently take their forward-mode derivative for zero."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("no forward-mode derivative (jvp, jacfwd): differentiate backward instead")


def as_index(name: str, index: Tensor | TokenIndex, batch: tuple[int, ...], heads: int, last: str, grid_name: str, grid: Tensor) -> Tensor:
    """[1|B, 1|H, K] int32 from a user's list [K] | [*batch, K] | [*batch, H, K]."""
    if isinstance(index, TokenIndex):
        index = index.index
    check_tensor(name, index)
    if index.dtype == torch.bool:
        raise TypeError(f"{name} must hold row ids (int32 or int64), got a bool mask: tokenops.index_from_mask makes an index of it")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {index.dtype}")
    check_device(name, index, grid_name, grid)
    return dense(as_int32(per_head(name, index, batch, heads, last)))


def as_int32(x: Tensor) -> Tensor:
    # a number beyond int32 must stay out of range instead of wrapping around to a valid one
    return x if x.dtype == torch.int32 else x.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def as_lists(index: Tensor | TokenIndex, samples: int | None, other_name: str, other: Tensor) -> Tensor:
    """[1|B, K] int32 from [K] | [B, K]."""
    if isinstance(index, TokenIndex):
        index = index.index
    check_tensor("index", index)
    if index.dtype == torch.bool:
        raise TypeError("index must hold row ids (int32 or int64), got a bool mask: tokenops.index_from_mask makes an index of it")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    fits = index.dim() == 2 and (samples is None or index.shape[0] in (1, samples))
    if index.dim() != 1 and not fits:
        raise ValueError(f"index must be [K] | [{'B' if samples is None else samples}, K], got {list(index.shape)}")
    check_device("index", index, other_name, other)
    return dense(as_int32(index if index.dim() == 2 else index.unsqueeze(0)))


def as_bounds(name: str, bounds: Tensor, other_name: str, other: Tensor) -> Tensor:
    """[S + 1] int32."""
    check_tensor(name, bounds)
    if bounds.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {bounds.dtype}")
    if bounds.dim() != 1 or bounds.shape[0] < 1:
        raise ValueError(f"{name} must be [S + 1], got {list(bounds.shape)}")
    check_device(name, bounds, other_name, other)
    return dense(as_int32(bounds))


def per_head(name: str, x: Tensor, batch: tuple[int, ...], heads: int, last: str, size: int | None = None) -> Tensor:
    """[1|B, 1|H, last] from [last] | [*batch, last] | [*batch, H, last]; leading sizes of 1 serve all and stay 1."""
    rank, width = len(batch), size if size is not None else (x.shape[-1] if x.dim() else 0)
    fits = 1 <= x.dim() <= rank + 2 and x.dim() - 1 in (0, rank, rank + 1) and x.shape[-1] == width
    leading = (*batch, heads)[: x.dim() - 1]
    if not fits or any(got not in (1, want) for got, want in zip(x.shape[:-1], leading, strict=True)):
        tail = last if size is None else str(size)
        forms = {f"[{', '.join([*map(str, some), tail])}]": None for some in ((), batch, (*batch, heads))}
        raise ValueError(f"{name} must be {' | '.join(forms)} (a leading size of 1 serves all), got {list(x.shape)}")
    if x.dim() - 1 <= rank:
        x = x.unsqueeze(-2)
    return flat_batch(x, batch, 2)


def flat_batch(x: Tensor, batch: tuple[int, ...], inner: int) -> Tensor:
    """[1|B, ...]: the dimensions before the last ``inner`` ones as one batch dimension, still 1 if they are all 1."""
    leading = x.shape[:-inner]
    if len(leading) == 1:
        return x
    if all(size == 1 for size in leading):
        return x.reshape(1, *x.shape[-inner:])
    return x.expand(*batch, *x.shape[-inner:]).reshape(prod(batch), *x.shape[-inner:])


def rel_pos_parts(rel_pos: tuple[Tensor, Tensor] | None) -> tuple[tuple[str, Tensor], ...]:
    """("rel_h", rel_h), ("rel_w", rel_w); nothing for None."""
    if rel_pos is None:
        return ()
    if not isinstance(rel_pos, (tuple, list)) or len(rel_pos) != 2:
        got = f"{len(rel_pos)} of them" if isinstance(rel_pos, (tuple, list)) else type(rel_pos).__name__
        raise TypeError(f"rel_pos must be two tensors (rel_h, rel_w), got {got}")
    parts = tuple(zip(("rel_h", "rel_w"), rel_pos, strict=True))
    for name, x in parts:
        check_tensor(f"rel_pos: {name}", x)
    return parts


def as_rel_pos(
    rel_pos: tuple[Tensor, Tensor] | None, batch: tuple[int, ...], query: Tensor, cells: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """rel_h [B, H, N, gh] and rel_w [B, H, N, gw] for query [B, H, N, D] on a grid of so many key cells (None: of any number).

    As with attn_mask, leading dimensions may be missing or 1 and then serve all; the batch may be written as several dimensions.
    """
    heads, rows = query.shape[1:3]
    allowed = {query.dtype} if query.dtype == torch.float64 else {query.dtype, torch.float32}
    leading = (*batch, heads, rows)
    ready = []
    for name, x in rel_pos_parts(rel_pos):
        if x.dtype not in allowed:
            raise TypeError(f"rel_pos: {name} must be {' or '.join(sorted(map(str, allowed)))} with {query.dtype} inputs, got {x.dtype}")
        check_device(f"rel_pos: {name}", x, "query", query)
        fits = 2 <= x.dim() <= len(leading) + 1 and x.shape[-2] == rows
        if not fits or any(got not in (1, want) for got, want in zip(reversed(x.shape[:-2]), reversed(leading[:-1]), strict=False)):
            form = ", ".join([*map(str, leading), "gh" if name == "rel_h" else "gw"])
            raise ValueError(f"rel_pos: {name} must be [{form}] (leading sizes may be 1 or missing), got {list(x.shape)}")
        ready.append(dense(x).expand(*leading, x.shape[-1]).reshape(prod(batch), heads, rows, x.shape[-1]))
    if not ready:
        return None, None
    rel_h, rel_w = ready
    if rel_h.dtype != rel_w.dtype:
        raise TypeError(f"rel_pos: rel_w must have rel_h's dtype {rel_h.dtype}, got {rel_w.dtype}")
    if cells is not None and rel_h.shape[3] * rel_w.shape[3] != cells:
        raise ValueError(f"rel_pos must be for a gh x gw grid of {cells} key cells, got {rel_h.shape[3]} x {rel_w.shape[3]}")
    return rel_h, rel_w


def dense(x: Tensor) -> Tensor:
    """The last dimension without gaps, as kernels read it. For lists and bias vectors: a grid is never copied."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def under_autocast(x: Tensor) -> Tensor:
    """In autocast's dtype, as it treats the inputs of matrix products."""
    kind = x.device.type
    # meta tensors, for one, know no autocast
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def check_in_place(name: str, target: Tensor, inputs: Iterable[object], instead: str) -> None:
    """Whether results of these inputs may be written into this tensor, as far as a tracer can tell."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (target, *inputs) if isinstance(x, Tensor)):
        raise RuntimeError(f"{name} is written in place and has no gradient: call under torch.no_grad(), or {instead}")
    if any(stride == 0 and size > 1 for stride, size in zip(target.stride(), target.shape, strict=True)):
        raise ValueError(f"{name} must not be expanded (several rows in one place), got strides {target.stride()}")


def check_overlap(name: str, target: Tensor, others: Mapping[str, object]) -> None:
    """Whether they lie apart. Asked where the operator runs: a tracer's tensors have no memory to compare."""
    for other_name, x in others.items():
        if isinstance(x, Tensor) and _overlap(target, x):
            raise ValueError(f"{name} must not share memory with {other_name}")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share an element, where that is certain. As in torch, interleaved views get the benefit of the doubt."""
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    if a.data_ptr() == b.data_ptr():
        return True
    if not (_gapless(a) and _gapless(b)):
        return False
    starts = [x.storage_offset() * x.element_size() for x in (a, b)]
    ends = [start + x.numel() * x.element_size() for start, x in zip(starts, (a, b), strict=True)]
    return starts[0] < ends[1] and starts[1] < ends[0]


def _gapless(x: Tensor) -> bool:
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1 == x.numel()
