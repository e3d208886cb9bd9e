"""Gathered-token attention on a GPU: launchers. ``kernels.py`` holds the device code, ``tiles.py`` the block sizes.

Triton itself is imported on the first launch, so that this package imports, and answers with its objections, where Triton is missing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenops.triton.launch import (
    device_objections,
    dot_precision,
    grid_strides,
    interpreting,
    launch,
    registers,
    shared_memory,
    strides_of,
)
from tokenops.triton.sparse_attention.tiles import LARGEST, Tiles, choose_tiles, pad, pad_heads, row_tiles
from tokenops.types import AttentionGradients, AttentionProblem

MASK_DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.float16)


def objections(problem: AttentionProblem, needs: tuple[str, ...] = ()) -> list[str]:
    """Why these kernels, beyond what no compiled kernel of this room serves, cannot serve a call; empty if they can."""
    mask, reasons = problem.attn_mask, device_objections("query", problem.query)
    if mask is not None and mask.dtype not in MASK_DTYPES:
        reasons.append(f"attn_mask must be bool, float32, bfloat16 or float16, got {mask.dtype}")
    if "attn_mask" in needs:
        reasons.append("the gradient of attn_mask is served by the reference only")
    return reasons


def forward(problem: AttentionProblem, out: Tensor, lse: Tensor, row_sq: Tensor | None, by_row: bool) -> None:
    """Fills out ([B, Hq, K, Dv] by slot, or listed rows of [B, Hq, N, Dv] by row), lse and row_sq ([B, Hq, K] by slot)."""
    from tokenops.triton.sparse_attention import kernels

    inputs, (out_strides,) = _inputs(problem, out)
    tiles = _tiles("forward", problem)
    blocks = _blocks(inputs["K"], tiles.block_q, problem.cu_seqlens_q)
    float_mask = problem.attn_mask is not None and problem.attn_mask.is_floating_point()
    has_terms = problem.kv_bias is not None or float_mask or problem.rel_h is not None
    _launch(
        kernels.forward,
        blocks * lse.shape[0] * lse.shape[1],
        problem.query,
        tiles,
        **inputs,
        out=out,
        lse=lse,
        row_sq=row_sq,
        out_strides=out_strides,
        blocks=blocks,
        BY_ROW=by_row,
        SCALE_FIRST=has_terms or not problem.scale > 0,
        # left to itself, the assembler spills where that lets one more program run beside the others; other products spill more with it
        **(registers(255) if inputs["PRECISION"] == "tf32" else {}),
    )


def backward(problem: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor, grads: AttentionGradients) -> None:
    """Fills every wanted gradient. ``out`` and ``grad_out`` are [B, Hq, K, Dv], lse [B, Hq, K], all by slot."""
    from tokenops.triton.sparse_attention import kernels

    grad_out = _dense(grad_out)
    inputs, (grad_out_strides, out_strides, *grad_strides) = _inputs(problem, grad_out, out, grads.query, grads.key, grads.value)
    batch, heads, queries = lse.shape
    value_head = out.shape[-1]
    # whole blocks of any kernel, and a spare one: a packed sequence may begin anywhere, and its last block is still read whole
    pitch = (_blocks(queries, LARGEST, None) + (problem.cu_seqlens_q is not None)) * LARGEST
    rows = row_tiles(value_head, out.element_size())
    blocks = pitch // rows.block_q
    lse2, delta = torch.empty((2, batch, heads, pitch), dtype=torch.float32, device=lse.device)
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
        grad_out_strides=grad_out_strides,
        out_strides=out_strides,
        K=queries,
        pitch=pitch,
        H=heads,
        blocks=blocks,
        DV=value_head,
        UNIT=inputs["UNIT"],
        BLOCK_DV=pad(value_head),
    )
    inputs |= {"grad_out": grad_out, "grad_out_strides": grad_out_strides, "lse2": lse2, "delta": delta, "pitch": pitch}

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
            grad_query_strides=grad_strides[0],
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
            grad_key_strides=grad_strides[1],
            grad_value_strides=grad_strides[2],
            grad_bias_strides=_list_strides(grads.kv_bias),
            blocks=blocks,
        )
    if grads.rel_h is not None or grads.rel_w is not None:
        _backward_rel_pos(problem, inputs, grads.rel_h, grads.rel_w)


def _backward_rel_pos(problem: AttentionProblem, inputs: dict[str, Any], grad_h: Tensor | None, grad_w: Tensor | None) -> None:
    from tokenops.triton.sparse_attention import kernels

    batch, heads, rows, _ = problem.query.shape
    height, width = inputs["gh"], inputs["gw"]
    for grad in (grad_h, grad_w):
        if grad is not None and (problem.q_index is not None or grad.shape[3] == 1):
            # rows that no slot names; and what all keys of a query have in common, its softmax does not know of
            grad.zero_()
    grad_h, grad_w = (None if grad is None or grad.shape[3] == 1 else grad for grad in (grad_h, grad_w))
    if grad_h is None and grad_w is None:
        return
    kv_index, listed = problem.kv_index, None
    if kv_index is not None and problem.cu_seqlens_k is None:
        listed = _listed_keys(kv_index, problem.key.shape[2])
        inputs = {**inputs, "kv_index": None, "kv_index_strides": (0, 0)}
    tiles = _tiles("backward_query", problem, keys=width)
    chunks = -(-width // tiles.block_k)
    parts = None
    if grad_h is not None:
        # what is added up is rounded once
        parts = grad_h.unsqueeze(0) if chunks == 1 else grad_h.new_zeros((chunks, batch, heads, rows, height), dtype=torch.float32)
    blocks = _blocks(inputs["K"], tiles.block_q, problem.cu_seqlens_q)
    _launch(
        kernels.backward_rel_pos,
        blocks * chunks * batch * heads,
        problem.query,
        tiles,
        **inputs,
        grad_rel_h=parts,
        grad_rel_w=grad_w,
        listed=listed,
        grad_rel_h_strides=(0, 0, 0, 0) if parts is None else parts.stride()[:4],
        grad_rel_w_strides=(0, 0, 0) if grad_w is None else grad_w.stride()[:3],
        listed_strides=_list_strides(listed),
        blocks=blocks,
        chunks=chunks,
        # left to itself, the assembler of sm_100 spills a register where that lets one more program run beside the others
        **registers(255),
    )
    if parts is not None and grad_h is not None and chunks != 1:
        grad_h.copy_(parts.sum(0))


def _listed_keys(index: Tensor, rows: int) -> Tensor:
    """[1|B, 1|Hkv, M] bytes: 1 where some slot of [1|B, 1|Hkv, L] names the row."""
    from tokenops.triton.sparse_attention import kernels

    samples, heads, slots = index.shape
    marks = torch.zeros((samples, heads, rows), dtype=torch.uint8, device=index.device)
    blocks = -(-slots // 1024)
    launch(
        kernels.mark_rows,
        samples * heads * blocks,
        index,
        index=index,
        marks=marks,
        index_strides=_list_strides(index),
        M=rows,
        L=slots,
        H=heads,
        blocks=blocks,
        BLOCK=1024,
        num_warps=4,
    )
    return marks


def _inputs(problem: AttentionProblem, *others: Tensor | None) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """The arguments that the three attention kernels share, and the row strides of what else they read and write."""
    query, key, value = problem.query, problem.key, problem.value
    q_index, kv_index, bias = (None if x is None else _dense(x) for x in (problem.q_index, problem.kv_index, problem.kv_bias))
    mask = problem.attn_mask
    if mask is not None and mask.dtype == torch.bool:
        # the same bytes under a type that every Triton loads alike
        mask = mask.view(torch.uint8)
    mask_strides = (0, 0, 0, 0) if mask is None else strides_of(mask)
    rel_h, rel_w = (None if x is None else _dense(x) for x in (problem.rel_h, problem.rel_w))
    rel_strides = tuple((0, 0, 0) if x is None else strides_of(x)[:3] for x in (rel_h, rel_w))
    reaches = [query.shape[2] * mask_strides[2] + key.shape[2] * mask_strides[3], *(query.shape[2] * rows[2] for rows in rel_strides)]
    unit, (query_strides, key_strides, value_strides, *other_strides) = grid_strides(query, key, value, *others)
    block_d, block_dv = pad_heads(query.shape[-1], value.shape[-1])
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "q_index": q_index,
        "kv_index": kv_index,
        "bias": bias,
        "mask": mask,
        "rel_h": rel_h,
        "rel_w": rel_w,
        "cu_seqlens_q": problem.cu_seqlens_q,
        "cu_seqlens_k": problem.cu_seqlens_k,
        "query_strides": query_strides,
        "key_strides": key_strides,
        "value_strides": value_strides,
        "q_index_strides": _list_strides(q_index),
        "kv_index_strides": _list_strides(kv_index),
        "bias_strides": _list_strides(bias),
        "mask_strides": mask_strides,
        "rel_strides": rel_strides,
        "scale": problem.scale * math.log2(math.e),
        "N": query.shape[2],
        "M": key.shape[2],
        "K": query.shape[2] if q_index is None else q_index.shape[-1],
        "L": key.shape[2] if kv_index is None else kv_index.shape[-1],
        "gh": 0 if rel_h is None else rel_h.shape[3],
        "gw": 0 if rel_w is None else rel_w.shape[3],
        "H": query.shape[1],
        "sequences": 0 if problem.cu_seqlens_q is None else problem.cu_seqlens_q.shape[0] - 1,
        "GROUP": query.shape[1] // max(1, key.shape[1]),
        "D": query.shape[-1],
        "DV": value.shape[-1],
        "UNIT": unit,
        "CAUSAL": problem.is_causal,
        "WIDE": max(reaches) >= 2**31,
        "PRECISION": dot_precision(query.dtype),
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
    }
    return inputs, other_strides


def _tiles(kernel: str, problem: AttentionProblem, keys: int | None = None) -> Tiles:
    """``keys``: how many a program walks over at once, if not all that it sees."""
    query, key, value = problem.query, problem.key, problem.value
    queries = query.shape[2] if problem.q_index is None else problem.q_index.shape[-1]
    if keys is None:
        keys = key.shape[2] if problem.kv_index is None else problem.kv_index.shape[-1]
    if problem.max_seqlen_q is not None:
        queries = min(queries, problem.max_seqlen_q)
    if problem.max_seqlen_k is not None:
        keys = min(keys, problem.max_seqlen_k)
    return choose_tiles(
        kernel,
        query.shape[-1],
        value.shape[-1],
        query.element_size(),
        queries,
        keys,
        biased=problem.kv_bias is not None or problem.is_causal,
        gathered=sum(0 if x is None else x.element_size() for x in (problem.attn_mask, problem.rel_h, problem.rel_w)),
        limit=None if interpreting() else shared_memory(query.get_device()),
    )


def _blocks(slots: int, block: int, cu_seqlens: Tensor | None) -> int:
    """Programs a head: for packed sequences enough whatever their lengths are, since those stay on the device."""
    if cu_seqlens is None:
        return -(-slots // block)
    return slots // block + cu_seqlens.shape[0]


def _launch(kernel: Any, programs: int, on: Tensor, tiles: Tiles, **arguments: Any) -> None:
    blocks = {"BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k} if tiles.block_k else {"BLOCK_Q": tiles.block_q}
    launch(kernel, programs, on, **arguments, **blocks, num_warps=tiles.num_warps, num_stages=tiles.num_stages)


def _list_strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else strides_of(tensor)[:2]


def _dense(tensor: Tensor) -> Tensor:
    """Last dimension dense. Copies only what an expand made: a list, a bias, or the gradient of a sum."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
