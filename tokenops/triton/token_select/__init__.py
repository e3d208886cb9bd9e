"""Token selection, halting and packing on a GPU: launchers. ``kernels.py`` holds the device code.

Triton itself is imported on the first launch, so that this package imports, and answers with its objections, where Triton is missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenops.triton.launch import device_objections, launch, power_of_two, registers, row_strides, tile_of
from tokenops.types import HaltBackwardProblem, HaltProblem, HaltState

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def objections(problem: Tensor | HaltProblem | HaltBackwardProblem, computes: bool = True) -> list[str]:
    """Why these kernels, beyond what no compiled kernel of this room serves, cannot serve a call; empty if they can.

    ``computes`` is False for packing, which moves bytes.
    """
    name, x = ("the tensor", problem) if isinstance(problem, Tensor) else ("x", problem.x)
    reasons = device_objections(name, x)
    if computes and x.dtype not in FLOATS:
        reasons.append(f"computes with float32, bfloat16 and float16, got {x.dtype}")
    if isinstance(problem, HaltProblem) and problem.state is not None and not _is_dense(problem.state.out):
        reasons.append(f"state.out must have a dense last dimension, got strides {problem.state.out.stride()}")
    if x.element_size() not in INTEGERS:
        reasons.append(f"moves elements of 1, 2, 4 or 8 bytes, got {x.dtype}")
    return reasons


def select(score: Tensor, threshold: float | None, protect: int, index: Tensor, count: Tensor) -> None:
    """Fills index [L, K] and count [L] from score [L, N]."""
    from tokenops.triton.token_select import kernels

    tokens, slots = score.shape[1], index.shape[1]
    if tokens == 0 or slots == 0:
        index.fill_(-1)
        count.zero_()
        return
    block = min(8192, max(256, power_of_two(tokens)))
    launch(
        kernels.select,
        score.shape[0],
        score,
        score=score.view(INTEGERS[score.element_size()]),
        index=index,
        count=count,
        score_strides=score.stride(),
        index_stride=index.stride(0),
        N=tokens,
        K=slots,
        protect=protect,
        threshold=0 if threshold is None else _order_of(threshold, score.dtype),
        BITS=8 * score.element_size(),
        INFINITY=_order_of(float("inf"), score.dtype),
        THRESHOLD=threshold is not None,
        SEARCH=slots < tokens,
        BLOCK=block,
        # 16 scores a thread: with more of them registers spill, with fewer the same work takes more instructions
        num_warps=max(1, block // 512),
        # as many as there are for 16 warps; left to itself, the assembler spills a few to fit one more program beside the others
        **registers(128),
    )


def halt(problem: HaltProblem, new: HaltState) -> None:
    """Fills the new state, which may be the old one."""
    from tokenops.triton.token_select import kernels

    old: tuple[Tensor | None, ...] = (None,) * len(new) if problem.state is None else problem.state
    in_place = old[-1] is new.out
    if problem.class_only and not in_place:
        # the output of a sample without rows stays, and no program meets that sample
        new.out.zero_() if problem.state is None else new.out.copy_(problem.state.out)
    out = None if problem.class_only or in_place else old[-1]
    vectors = {name: _as_bytes(t) for name, t in zip(HaltState._fields[:-1], old[:-1], strict=True)}
    new_vectors = {f"new_{name}": _as_bytes(t) for name, t in zip(HaltState._fields[:-1], new[:-1], strict=True)}
    _launch_halt(
        kernels.halt,
        problem,
        **vectors,
        **new_vectors,
        out=out,
        new_out=new.out,
        state_strides=tuple(map(row_strides, vectors.values())),
        new_strides=tuple(map(row_strides, new_vectors.values())),
        out_strides=row_strides(out),
        new_out_strides=row_strides(new.out),
        IN_PLACE=in_place,
    )


def halt_backward(problem: HaltBackwardProblem, grad_x: Tensor | None, grad_remain: Tensor | None) -> None:
    """Fills grad_x [B, N, C] and grad_remain [B, N]."""
    from tokenops.triton.token_select import kernels

    vectors = {
        "grad_cum": problem.grad_cum,
        "grad_remain": problem.grad_remain,
        "grad_rho": problem.grad_rho,
        "remain": problem.remain,
        "active": _as_bytes(problem.active),
        "cum": problem.cum,
        "new_grad_remain": grad_remain,
    }
    _launch_halt(
        kernels.halt_backward,
        problem,
        **vectors,
        grad_out=problem.grad_out,
        new_grad_x=grad_x,
        row_strides=tuple(map(row_strides, vectors.values())),
        # left to itself, the assembler of sm_90 and sm_100 spills a register where that lets one more program run beside the others
        **registers(128),
        grad_out_strides=row_strides(problem.grad_out),
        grad_x_strides=row_strides(grad_x),
    )


def _launch_halt(kernel: Any, problem: HaltProblem | HaltBackwardProblem, **arguments: Any) -> None:
    samples, tokens, channels = problem.x.shape
    sequences = 0 if problem.cu_seqlens is None else problem.cu_seqlens.shape[0] - 1
    tile = tile_of(channels, 1024)
    blocks = -(-tokens // tile.rows)
    launch(
        kernel,
        samples * blocks,
        problem.x,
        **arguments,
        x=problem.x,
        cu_seqlens=problem.cu_seqlens,
        x_strides=row_strides(problem.x),
        scale=float(problem.scale),
        center=float(problem.center),
        limit=float(problem.limit),
        N=tokens,
        sequences=sequences,
        steps=sequences.bit_length(),
        blocks=blocks,
        C=channels,
        LAST=problem.last,
        CLASS=problem.class_only,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        num_warps=4,
    )


def pack(x: Tensor, index: Tensor | None, count: Tensor | None, tokens: Tensor, cu_seqlens: Tensor) -> None:
    """Fills tokens [T, W] and cu_seqlens [B + 1] from x [G, N, W]."""
    from tokenops.triton.token_select import kernels

    rows, lists = x.shape[1], cu_seqlens.shape[0] - 1
    ranks = None
    if index is not None:
        ranks = torch.empty_like(index, memory_format=torch.contiguous_format)
        count = index.new_empty(index.shape[:1])
        _launch_scan(index, None, ranks, count, None, rows)
        # both are read by the same stride
        index = index.contiguous()
    assert count is not None
    slots = rows if index is None else index.shape[1]
    x, tokens = _as_integers(x, tokens)
    tile = tile_of(x.shape[2], min(2048, 8192 // x.element_size()))
    blocks = max(1, -(-slots // tile.rows))
    launch(
        kernels.pack_rows,
        # the first one writes cu_seqlens[0], whatever there is to copy
        max(1, lists * blocks, -(-tokens.shape[0] // tile.rows)),
        x,
        x=x,
        index=index,
        ranks=ranks,
        counts=count,
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        x_strides=row_strides(x),
        index_stride=_list_stride(index),
        counts_stride=0 if count.shape[0] == 1 else count.stride(0),
        tokens_stride=tokens.stride(0),
        N=rows,
        K=slots,
        T=tokens.shape[0],
        lists=lists,
        blocks=blocks,
        W=x.shape[2],
        BLOCK_N=tile.rows,
        BLOCK_W=tile.columns,
        num_warps=4,
    )


def unpack(tokens: Tensor, cu_seqlens: Tensor, index: Tensor | None, x: Tensor) -> None:
    """Fills x [G, N, W] from tokens [T, W]."""
    from tokenops.triton.token_select import kernels

    grids, rows = x.shape[:2]
    source = None
    if index is not None:
        source = torch.full((grids, rows), -1, dtype=torch.int32, device=tokens.device)
        _launch_scan(index, cu_seqlens, None, None, source, rows)
    tokens, x = _as_integers(tokens, x)
    tile = tile_of(x.shape[2], min(2048, 8192 // x.element_size()))
    blocks = -(-rows // tile.rows)
    launch(
        kernels.unpack_rows,
        grids * blocks,
        tokens,
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        source=source,
        x=x,
        tokens_stride=tokens.stride(0),
        x_strides=row_strides(x),
        N=rows,
        T=tokens.shape[0],
        blocks=blocks,
        W=x.shape[2],
        BLOCK_N=tile.rows,
        BLOCK_W=tile.columns,
        num_warps=4,
    )


def _launch_scan(
    index: Tensor, cu_seqlens: Tensor | None, ranks: Tensor | None, counts: Tensor | None, source: Tensor | None, rows: int
) -> None:
    from tokenops.triton.token_select import kernels

    lists, slots = index.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, index.shape[1]
    block = min(2048, max(256, power_of_two(slots)))
    launch(
        kernels.scan_lists,
        lists,
        index,
        index=index,
        cu_seqlens=cu_seqlens,
        ranks=ranks,
        counts=counts,
        source=source,
        index_stride=_list_stride(index),
        source_stride=_list_stride(source),
        N=rows,
        K=slots,
        BLOCK=block,
        num_warps=min(8, block // 256),
    )


def _order_of(number: float, dtype: torch.dtype) -> int:
    """The place of a float32 number in the order of a dtype's bit patterns, read as the kernel reads them; rounded down if it is between
    two. Compared with that, a score is as it is compared with the number."""
    exact = torch.tensor(number, dtype=torch.float32, device="cpu")
    nearest = exact.to(dtype)
    size = nearest.element_size()
    bits = int(nearest.view(INTEGERS[size]).item())
    order = bits if bits >= 0 else bits ^ ((1 << (8 * size - 1)) - 1)
    # -1 is -0, which is 0
    return (0 if order == -1 else order) - int(nearest.float() > exact)


def _as_integers(*tensors: Tensor) -> list[Tensor]:
    """Rows of tensors as integers: moving them needs no more of their type. The widest integers that fit all rows, since a thread moves one
    at a time wherever the compiler cannot tell that more are in line.
    """
    size = max(size for size in INTEGERS if all(_fits(tensor, size) for tensor in tensors))
    return [tensor.view(INTEGERS[size]) for tensor in tensors]


def _fits(tensor: Tensor, size: int) -> bool:
    """Whether integers of so many bytes tile the rows."""
    item = tensor.element_size()
    if size <= item:
        return size == item
    places = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and tensor.data_ptr() % size == 0 and all(place * item % size == 0 for place in places)


def _as_bytes(tensor: Tensor | None) -> Tensor | None:
    """Booleans as what every Triton loads alike."""
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor


def _is_dense(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 or tensor.shape[-1] <= 1


def _list_stride(index: Tensor | None) -> int:
    """Of [1|B, K]: 0 where one list serves all samples."""
    return 0 if index is None or index.shape[0] == 1 else index.stride(0)
