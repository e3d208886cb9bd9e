"""Gathered-token attention on a GPU: launchers. ``kernels.py`` holds the device code, ``tiles.py`` the block sizes.

Triton itself is imported on the first launch, so that this package imports, and answers with its objections, where Triton is missing.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from tokenops.triton.sparse_attention.tiles import Tiles, choose_tiles, pad
from tokenops.types import AttentionGradients, AttentionProblem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def objections(problem: AttentionProblem, *, needs_mask_grad: bool = False) -> list[str]:
    """Why these kernels cannot serve a call; empty if they can."""
    reasons = []
    query, value = problem.query, problem.value
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if not query.is_cuda and not _interpreting():
        reasons.append(f"needs a GPU (or TRITON_INTERPRET=1), query is on {query.device}")
    if query.dtype not in DTYPES:
        reasons.append(f"takes float32, bfloat16 and float16, query is {str(query.dtype).removeprefix('torch.')}")
    for name, width in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if width % 8 or not 8 <= width <= 256:
            reasons.append(f"takes head widths that are multiples of 8 up to 256, {name} has {width}")
    if problem.dropout_p > 0:
        reasons.append("has no dropout")
    if problem.kv_bias is not None and problem.kv_bias.dtype != torch.float32:
        reasons.append(f"takes a float32 kv_bias, got {str(problem.kv_bias.dtype).removeprefix('torch.')}")
    if needs_mask_grad:
        reasons.append("computes no gradient of attn_mask")
    return reasons


def forward(problem: AttentionProblem, out: Tensor, lse: Tensor, row_sq: Tensor | None, by_row: bool) -> None:
    """Fills out ([B, Hq, K, Dv] by slot, or listed rows of [B, Hq, N, Dv] by row), lse and row_sq ([B, Hq, K] by slot)."""
    from tokenops.triton.sparse_attention import kernels

    inputs, unit = _inputs(problem, out)
    tiles = _tiles("forward", problem)
    blocks = _blocks(inputs["K"], tiles.block_q, problem.cu_seqlens_q)
    bias_or_mask = problem.kv_bias is not None or (problem.attn_mask is not None and problem.attn_mask.is_floating_point())
    _launch(
        kernels.forward,
        blocks * lse.shape[0] * lse.shape[1],
        problem.query,
        tiles,
        **inputs,
        out=out,
        lse=lse,
        row_sq=row_sq,
        out_strides=_row_strides(out, unit),
        blocks=blocks,
        BY_ROW=by_row,
        SCALE_FIRST=bias_or_mask or not problem.scale > 0,
    )


def backward(problem: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor, grads: AttentionGradients) -> None:
    """Fills every wanted gradient. ``out`` and ``grad_out`` are [B, Hq, K, Dv], lse [B, Hq, K], all by slot."""
    from tokenops.triton.sparse_attention import kernels

    grad_out = _dense(grad_out)
    inputs, unit = _inputs(problem, grad_out, out, grads.query, grads.key, grads.value)
    batch, heads, queries = lse.shape
    lse2, delta = torch.empty((2, *lse.shape), dtype=torch.float32, device=lse.device)
    rows = Tiles(block_q=64, block_k=0, num_warps=4, num_stages=1)
    blocks = _blocks(queries, rows.block_q, None)
    _launch(
        kernels.row_terms,
        blocks * batch * heads,
        problem.query,
        rows,
        grad_out=grad_out,
        out=out,
        lse=lse.contiguous(),
        lse2=lse2,
        delta=delta,
        grad_out_strides=_row_strides(grad_out, unit),
        out_strides=_row_strides(out, unit),
        K=queries,
        H=heads,
        blocks=blocks,
        DV=inputs["DV"],
        UNIT=unit,
        BLOCK_DV=pad(inputs["DV"]),
    )
    inputs |= {"grad_out": grad_out, "grad_out_strides": _row_strides(grad_out, unit), "lse2": lse2, "delta": delta}

    if grads.query is not None:
        if problem.q_index is not None:
            # rows that no slot names; a program owns the slots of a list, so it cannot know them
            grads.query.zero_()
        tiles = _tiles("backward_query", problem)
        blocks = _blocks(queries, tiles.block_q, problem.cu_seqlens_q)
        _launch(
            kernels.backward_query,
            blocks * batch * heads,
            problem.query,
            tiles,
            **inputs,
            grad_query=grads.query,
            grad_query_strides=_row_strides(grads.query, unit),
            blocks=blocks,
        )
    of_keys = (grads.key, grads.value, grads.kv_bias)
    if any(grad is not None for grad in of_keys):
        if problem.kv_index is not None:
            for grad in of_keys:
                if grad is not None:
                    grad.zero_()
        tiles = _tiles("backward_key_value", problem)
        blocks = _blocks(inputs["L"], tiles.block_k, problem.cu_seqlens_k)
        _launch(
            kernels.backward_key_value,
            blocks * batch * problem.key.shape[1],
            problem.query,
            tiles,
            **inputs,
            grad_key=grads.key,
            grad_value=grads.value,
            grad_bias=grads.kv_bias,
            grad_key_strides=_row_strides(grads.key, unit),
            grad_value_strides=_row_strides(grads.value, unit),
            grad_bias_strides=_list_strides(grads.kv_bias),
            blocks=blocks,
        )


def _inputs(problem: AttentionProblem, *others: Tensor | None) -> tuple[dict[str, Any], int]:
    """The arguments that the three attention kernels share, and the unit in which row strides are counted."""
    query, key, value = problem.query, problem.key, problem.value
    q_index, kv_index, bias = (None if x is None else _dense(x) for x in (problem.q_index, problem.kv_index, problem.kv_bias))
    mask = problem.attn_mask
    if mask is not None and mask.dtype == torch.bool:
        # the same bytes under a type that every Triton loads alike
        mask = mask.view(torch.uint8)
    unit = _unit(query, key, value, *others)
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "q_index": q_index,
        "kv_index": kv_index,
        "bias": bias,
        "mask": mask,
        "cu_seqlens_q": problem.cu_seqlens_q,
        "cu_seqlens_k": problem.cu_seqlens_k,
        "query_strides": _row_strides(query, unit),
        "key_strides": _row_strides(key, unit),
        "value_strides": _row_strides(value, unit),
        "q_index_strides": _list_strides(q_index),
        "kv_index_strides": _list_strides(kv_index),
        "bias_strides": _list_strides(bias),
        "mask_strides": (0, 0, 0, 0) if mask is None else _strides(mask),
        "scale": problem.scale * math.log2(math.e),
        "N": query.shape[2],
        "M": key.shape[2],
        "K": query.shape[2] if q_index is None else q_index.shape[-1],
        "L": key.shape[2] if kv_index is None else kv_index.shape[-1],
        "H": query.shape[1],
        "sequences": 0 if problem.cu_seqlens_q is None else problem.cu_seqlens_q.shape[0] - 1,
        "GROUP": query.shape[1] // max(1, key.shape[1]),
        "D": query.shape[-1],
        "DV": value.shape[-1],
        "UNIT": unit,
        "CAUSAL": problem.is_causal,
        "PRECISION": _dot_precision(query.dtype),
        "BLOCK_D": pad(query.shape[-1]),
        "BLOCK_DV": pad(value.shape[-1]),
    }
    return inputs, unit


def _tiles(kernel: str, problem: AttentionProblem) -> Tiles:
    query, key, value = problem.query, problem.key, problem.value
    queries = query.shape[2] if problem.q_index is None else problem.q_index.shape[-1]
    keys = key.shape[2] if problem.kv_index is None else problem.kv_index.shape[-1]
    if problem.max_seqlen_q is not None:
        queries = min(queries, problem.max_seqlen_q)
    if problem.max_seqlen_k is not None:
        keys = min(keys, problem.max_seqlen_k)
    limit = None if _interpreting() else _shared_memory(query.get_device())
    return choose_tiles(kernel, query.shape[-1], value.shape[-1], query.element_size(), queries, keys, limit)


def _blocks(slots: int, block: int, cu_seqlens: Tensor | None) -> int:
    """Programs a head: for packed sequences enough whatever their lengths are, since those stay on the device."""
    if cu_seqlens is None:
        return -(-slots // block)
    return slots // block + cu_seqlens.shape[0]


def _launch(kernel: Any, programs: int, on: Tensor, tiles: Tiles, **arguments: Any) -> None:
    if programs == 0:
        return
    blocks = {"BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k} if tiles.block_k else {"BLOCK_Q": tiles.block_q}
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(on):
        kernel[(programs,)](**arguments, **blocks, num_warps=tiles.num_warps, num_stages=tiles.num_stages)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides under which an axis of length 1 broadcasts."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _list_strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else _strides(tensor)[:2]


def _row_strides(tensor: Tensor | None, unit: int) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tuple(stride // unit for stride in _strides(tensor)[:3])


def _unit(*tensors: Tensor | None) -> int:
    """8 elements fill at least 16 bytes, the widest load there is; 1 where some stride does not allow it."""
    aligned = all(stride % 8 == 0 for tensor in tensors if tensor is not None for stride in _strides(tensor)[:3])
    return 8 if aligned else 1


def _dense(tensor: Tensor) -> Tensor:
    """Last dimension dense. Copies only what an expand made: a list, a bias, or the gradient of a sum."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _dot_precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's own switch for CUDA matrix products; half types have nothing to choose."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _shared_memory(device: int) -> int:
    """Bytes of shared memory that one program may use."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(max(device, 0))["max_shared_mem"])
