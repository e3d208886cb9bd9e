"""Launchers of the gate. ``gate_kernels.py`` holds the device code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenops.triton.delta_matmul.rows import by_parts, by_rows, normalization, normalization_backward, slots_of, strides
from tokenops.triton.launch import launch
from tokenops.triton.token_select import select
from tokenops.types import DeltaGate, GateBackwardProblem, GateGradients, GateProblem

# norms that need no power
ORDERS = {2.0: "two", 1.0: "one", 0.0: "zero", math.inf: "inf"}


def gate(problem: GateProblem, new: DeltaGate) -> None:
    """Fills the result; its reference may be the problem's own. Without a skip, its total is not filled."""
    p = problem
    in_place = p.reference is not None and p.reference is new.reference
    if p.reference is None:
        new.index.copy_(torch.arange(p.x.shape[1], dtype=torch.int32, device=p.x.device))
        new.count.fill_(p.x.shape[1])
        _compare(p, new, reference=new.reference, first=True)
        return
    change = None
    if p.index is None:
        change = torch.empty(p.x.shape[:2], dtype=torch.float32, device=p.x.device)
    else:
        new.index.copy_(p.index)
        torch.sum(new.index >= 0, -1, dtype=torch.int32, out=new.count)
    if change is not None or p.skip is not None or not in_place:
        _compare(p, new, change=change, reference=None if in_place else new.reference)
    if change is not None:
        select(change, p.threshold, 0, new.index, new.count)
    summed = p if p.skip is None else p._replace(x=new.total, skip=None)
    _send(summed, new)
    if p.whole and in_place:
        # only now: the chosen rows were compared with the old one
        _compare(summed._replace(reference=None), new, reference=new.reference)


def gate_backward(problem: GateBackwardProblem, grads: GateGradients) -> None:
    """Fills every wanted gradient."""
    from tokenops.triton.delta_matmul import gate_kernels as kernels

    p = problem
    (batch, tokens, width), device = p.x.shape, p.x.device
    slot_of = torch.full((batch, tokens), -1, dtype=torch.int32, device=device)
    lists = slots_of(p.index, p.x)
    launch(kernels.invert_lists, -(-lists["total"] // 256), p.x, slot_of=slot_of, **lists, BLOCK=256, num_warps=4)
    through_norm = p.norm_weight is not None and any(grad is not None for grad in (grads.x, grads.norm_weight, grads.norm_bias))
    of_current = torch.empty(p.x.shape, dtype=torch.float32, device=device) if through_norm else grads.x
    tensors = {
        "values": p.grad_values,
        "delta": p.grad_delta,
        "reference": p.grad_reference,
        "sums": None if through_norm else p.grad_total,
    }
    results = {"of_current": of_current, "of_old": grads.reference}
    programs, blocks = by_parts(batch * tokens, width)
    launch(
        kernels.spread_gradients,
        programs,
        p.x,
        slot_of=slot_of,
        **{f"grad_{name}": tensor for name, tensor in tensors.items()},
        **results,
        **{f"{name}_strides": strides(tensor) for name, tensor in (tensors | results).items()},
        N=tokens,
        total=batch * tokens,
        WHOLE=p.whole or p.first,
        **blocks,
    )
    if through_norm:
        assert p.norm_weight is not None
        assert p.norm_bias is not None
        assert of_current is not None
        norm = normalization(p.x, None, p.norm_weight, p.norm_bias, p.norm_eps)
        normalization_backward(of_current, p.x, None, norm, p.grad_total, grads.x, grads.norm_weight, grads.norm_bias)


def _compare(p: GateProblem, new: DeltaGate, *, reference: Tensor | None, change: Tensor | None = None, first: bool = False) -> None:
    """Writes what is there to write of: x + skip, how much each token changed, the new reference."""
    from tokenops.triton.delta_matmul import gate_kernels as kernels

    batch, tokens, width = p.x.shape
    tensors = {
        "x": p.x,
        "skip": p.skip,
        "old": p.reference,
        "sums": None if p.skip is None else new.total,
        "new": reference,
        "values": new.values if first else None,
        "delta": new.delta if first else None,
    }
    programs, blocks = by_rows(batch * tokens, width)
    launch(
        kernels.compare,
        programs,
        p.x,
        **_frame(p, tensors),
        change=change,
        order=float(p.order),
        N=tokens,
        total=batch * tokens,
        ORDER=ORDERS.get(float(p.order), "any"),
        KEEP=not p.whole and p.reference is not None,
        **blocks,
    )


def _send(p: GateProblem, new: DeltaGate) -> None:
    from tokenops.triton.delta_matmul import gate_kernels as kernels

    lists = slots_of(new.index, p.x)
    in_place = p.reference is new.reference
    tensors = {
        "x": p.x,
        "old": p.reference,
        "values": new.values,
        "delta": new.delta,
        "new": None if p.whole else new.reference,
    }
    programs, blocks = by_rows(lists["total"], p.x.shape[2])
    launch(kernels.send, programs, p.x, **_frame(p, tensors), **lists, IN_PLACE=in_place, **blocks)


def _frame(p: GateProblem, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """Grids with their strides, and the normalisation."""
    norm = {"norm_weight": p.norm_weight, "norm_bias": p.norm_bias, "eps": float(p.norm_eps)}
    return {**tensors, **{f"{name}_strides": strides(tensor) for name, tensor in tensors.items()}, **norm}
