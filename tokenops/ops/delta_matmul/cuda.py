"""The CUDA C++ kernels of this room as a backend: csrc/cuda/delta_matmul*.cu. Scratch is allocated here; nothing waits for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenops.ops.token_select.backends import NativeCUDA as Selecting
from tokenops.reference import delta_matmul as reference
from tokenops.types import (
    DeltaAttentionProblem,
    DeltaGate,
    DeltaState,
    GateBackwardProblem,
    GateGradients,
    GateProblem,
    LinearGradients,
    LinearProblem,
)

_library = torch.library.Library("tokenops", "FRAGMENT")
_NORM = "Tensor? norm_weight, Tensor? norm_bias, float norm_eps"
# what is None is not wanted. keep: the new reference begins as the old one
_library.define(
    "delta_matmul_cuda_compare(Tensor(a!)? change, Tensor(b!)? total, Tensor(c!)? new_reference, Tensor(d!)? values, Tensor(e!)? delta, "
    f"Tensor x, Tensor? skip, Tensor? reference, {_NORM}, float order, bool keep) -> ()"
)
# the new reference may be the old one
_library.define(
    "delta_matmul_cuda_send(Tensor(a!) values, Tensor(b!) delta, Tensor(c!)? new_reference, Tensor x, Tensor reference, "
    f"{_NORM}, Tensor index) -> ()"
)
# slot_of [B, N] int32 comes as -1; parts [2, strips, C] and moments [B, N, 2] float32 are for gradients of the norm: the sums of strips
_library.define(
    "delta_matmul_cuda_gate_backward(Tensor(a!)? grad_x, Tensor(b!)? grad_old_reference, Tensor(c!)? parts, Tensor(d!) slot_of, "
    f"Tensor(e!)? moments, Tensor x, {_NORM}, Tensor index, bool whole, Tensor? grad_values, Tensor? grad_delta, Tensor? grad_reference, "
    "Tensor? grad_total) -> ()"
)
# take: listed rows into slots, zeros into empty ones; else slots into listed rows, or zeros where there is no source
_library.define("delta_matmul_cuda_move(Tensor(a!) to, Tensor? source, Tensor index, bool take) -> ()")
# the listed rows into slots; nothing is written into empty ones
_library.define(
    "delta_matmul_cuda_normalize(Tensor(a!) out, Tensor x, Tensor norm_weight, Tensor norm_bias, float norm_eps, Tensor index) -> ()"
)
# rows [B, tokens, C] where gather, out [B, tokens, O] where scatter, else by slot. form: plain; gradient: the slope of the activation,
# times other [B, K, O], which comes back to it; inner: times the slope of the activation at other. A plain out by slot may be float32
# beside half types
_library.define(
    "delta_matmul_cuda_layer(Tensor(a!) out, Tensor rows, Tensor index, int tokens, Tensor weight, Tensor? bias, Tensor? other, str form, "
    "str activation, bool gather, bool scatter) -> ()"
)
_library.define(
    "delta_matmul_cuda_layer_parameters(Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, Tensor grad, Tensor rows, Tensor index, "
    "int tokens, bool gather) -> ()"
)
# order [B, N]: rows to compute afresh, then the others; fresh [B]: how many those are; marks [B, N] bytes are scratch
_library.define(
    "delta_matmul_cuda_order(Tensor(a!) order, Tensor(b!) fresh, Tensor(c!) marks, Tensor rows, Tensor cells, Tensor turn, int keys, "
    "int slice_rows, int most) -> ()"
)
# without an order every row is computed afresh
_library.define(
    "delta_matmul_cuda_exact(Tensor(a!) out, Tensor query, Tensor key, Tensor value, Tensor? order, Tensor? fresh, Tensor? cells, "
    "Tensor? rel_h, Tensor? rel_w, float scale, float guard, Tensor(b!) output, Tensor(c!) old_value, Tensor(d!) old_key, "
    "Tensor(e!) maximum, Tensor(f!) total, Tensor(g!) peak) -> ()"
)
# without cells it is a first frame
_library.define(
    "delta_matmul_cuda_paper(Tensor(a!) out, Tensor query, Tensor key, Tensor value, Tensor? cells, Tensor? rel_h, Tensor? rel_w, "
    "float scale, Tensor(b!) output, Tensor(c!) old_value, Tensor(d!) probability) -> ()"
)
_library.define(
    "delta_matmul_cuda_replace(Tensor(a!) old_value, Tensor(b!)? old_key, Tensor(c!)? turn, Tensor key, Tensor value, Tensor cells, "
    "int turns) -> ()"
)

# sums over all rows are cut into so many, at most: the same on every device
_STRIPS = 64


class NativeCUDA:
    """The C++ kernels for GPUs."""

    def objections(self, problem: Any, **_: Any) -> list[str]:
        """What these kernels, beyond what no compiled kernel of this room serves, do not serve."""
        if not isinstance(problem, DeltaAttentionProblem):
            return []
        widths = {"D": problem.query.shape[3], "Dv": problem.value.shape[3]}
        return [f"{name} must be at most 128, got {width}" for name, width in widths.items() if width > 128]

    def gate(self, problem: GateProblem, new: DeltaGate) -> None:
        p, norm = problem, (problem.norm_weight, problem.norm_bias, problem.norm_eps)
        compare = torch.ops.tokenops.delta_matmul_cuda_compare.default
        total = None if p.skip is None else new.total
        if p.reference is None:
            new.index.copy_(torch.arange(p.x.shape[1], dtype=torch.int32, device=p.x.device))
            new.count.fill_(p.x.shape[1])
            compare(None, total, new.reference, new.values, new.delta, p.x, p.skip, None, *norm, p.order, False)
            return
        # writing over the old reference has to wait until the chosen rows are compared with it
        in_place = p.reference is new.reference
        change = None
        if p.index is None:
            change = torch.empty(p.x.shape[:2], dtype=torch.float32, device=p.x.device)
        else:
            new.index.copy_(p.index)
            torch.sum(new.index >= 0, -1, dtype=torch.int32, out=new.count)
        if change is not None or p.skip is not None or not in_place:
            compare(change, total, None if in_place else new.reference, None, None, p.x, p.skip, p.reference, *norm, p.order, not p.whole)
        if change is not None:
            Selecting().select(change, p.threshold, 0, new.index, new.count)
        x = p.x if total is None else total
        send = torch.ops.tokenops.delta_matmul_cuda_send.default
        send(new.values, new.delta, None if p.whole else new.reference, x, p.reference, *norm, new.index)
        if p.whole and in_place:
            compare(None, None, new.reference, None, None, x, None, None, *norm, p.order, False)

    def gate_backward(self, problem: GateBackwardProblem, grads: GateGradients) -> None:
        x, *norm, index, whole, first, of_values, of_delta, of_reference, of_total = problem
        batch, tokens, width = x.shape
        slot_of = torch.full((batch, tokens), -1, dtype=torch.int32, device=x.device)
        parts, moments = None, None
        if grads.norm_weight is not None or grads.norm_bias is not None:
            parts = torch.empty((2, max(1, min(_STRIPS, batch * tokens // 8)), width), dtype=torch.float32, device=x.device)
            moments = torch.empty((batch, tokens, 2), dtype=torch.float32, device=x.device)
        torch.ops.tokenops.delta_matmul_cuda_gate_backward.default(
            grads.x,
            grads.reference,
            parts,
            slot_of,
            moments,
            x,
            *norm,
            index,
            whole or first,
            of_values,
            of_delta,
            of_reference,
            of_total,
        )
        if parts is not None:
            for wanted, part in zip((grads.norm_weight, grads.norm_bias), parts, strict=True):
                if wanted is not None:
                    wanted.copy_(part.sum(0))

    def linear(self, problem: LinearProblem, out: Tensor) -> None:
        self._linear(problem, out, False)

    def linear_into(self, problem: LinearProblem, out: Tensor) -> None:
        self._linear(problem, out, True)

    def _linear(self, problem: LinearProblem, out: Tensor, into: bool) -> None:
        p, rows, gather = problem, *_rows_of(problem)
        if p.weight_2 is None:
            _layer(p, out, rows, p.weight, p.bias, activation=p.activation, gather=gather, scatter=into)
            return
        hidden = _slots_by(p, p.weight.shape[0])
        _layer(p, hidden, rows, p.weight, p.bias, activation=p.activation, gather=gather)
        _layer(p, out, hidden, p.weight_2, p.bias_2, scatter=into)

    def linear_backward(self, problem: LinearProblem, grad_out: Tensor, grads: LinearGradients) -> None:
        """The layers are computed anew, as far as their activation needs them. What goes back through a layer goes through the copy of its
        weight that has rows of its inputs: small beside the product, and one kernel serves both directions."""
        p, grad, norm_wanted = problem, grad_out, grads.norm_weight is not None or grads.norm_bias is not None
        rows, gather = _rows_of(p)
        if p.weight_2 is not None:
            inner = _slots_by(p, p.weight.shape[0])
            _layer(p, inner, rows, p.weight, p.bias, gather=gather)
            hidden = inner if grads.weight_2 is None else reference.activated(inner, p.activation)
            _parameters(p, grad, hidden, grads.weight_2, grads.bias_2)
            if all(wanted is None for wanted in grads[:5]):
                return
            grad = torch.empty_like(inner)
            _layer(p, grad, grad_out, p.weight_2.T.contiguous(), other=inner, form="inner", activation=p.activation)
        elif p.activation != "none":
            grad = _slots_by(p, p.weight.shape[0])
            _layer(p, grad, rows, p.weight, p.bias, other=grad_out, form="gradient", activation=p.activation, gather=gather)
        _parameters(p, grad, rows, grads.weight, grads.bias, gather=gather)
        if p.norm_weight is None:
            if grads.x is not None:
                # rows that no slot names
                grads.x.zero_()
                _layer(p, grads.x, grad, p.weight.T.contiguous(), scatter=True)
        elif grads.x is not None or norm_wanted:
            # gradients that nearly cancel there must not be rounded before
            of_normalized = _slots_by(p, p.x.shape[2], torch.float32)
            _layer(p, of_normalized, grad, p.weight.T.contiguous())
            norm = (p.norm_weight, p.norm_bias, p.norm_eps)
            sent = GateBackwardProblem(p.x, *norm, p.index, False, False, of_normalized, None, None, None)
            self.gate_backward(sent, GateGradients(grads.x, None, grads.norm_weight, grads.norm_bias))

    def update(self, buffer: Tensor, rows: Tensor, index: Tensor, out: Tensor) -> None:
        if out is not buffer:
            out.copy_(buffer)
        torch.ops.tokenops.delta_matmul_cuda_move.default(out, rows, index, False)

    def update_backward(self, grad_out: Tensor, index: Tensor, grad_buffer: Tensor | None, grad_rows: Tensor | None) -> None:
        move = torch.ops.tokenops.delta_matmul_cuda_move.default
        if grad_buffer is not None:
            grad_buffer.copy_(grad_out)
            move(grad_buffer, None, index, False)
        if grad_rows is not None:
            move(grad_rows, grad_out, index, True)

    def attention(self, problem: DeltaAttentionProblem, state: DeltaState, out: Tensor) -> None:
        if state.probability is not None:
            kept = (state.output, state.value, state.probability)
            rest = (problem.cells, problem.rel_h, problem.rel_w, problem.scale)
            torch.ops.tokenops.delta_matmul_cuda_paper.default(out, problem.query, problem.key, problem.value, *rest, *kept)
            self._replace(problem, state, 1)
            return
        assert state.turn is not None
        p = problem
        batch, _, tokens, _ = p.query.shape
        # so many rows are computed afresh in a frame, and so many frames pass until all had their turn
        rows = -(-tokens // p.refresh) if p.refresh else 0
        turns = -(-tokens // rows) if rows else 1
        order, fresh = None, None
        if p.rows is not None and p.cells is not None:
            order, fresh = p.rows.new_empty((batch, tokens)), p.rows.new_empty(batch)
            marks = p.rows.new_empty((batch, tokens), dtype=torch.uint8)
            keys = p.key.shape[2]
            # infinity is a crossover, too
            most = math.floor(min(p.crossover, 1.0) * keys)
            torch.ops.tokenops.delta_matmul_cuda_order.default(order, fresh, marks, p.rows, p.cells, state.turn, keys, rows, most)
        sums = (state.output, state.value, state.key, state.maximum, state.total, state.peak)
        torch.ops.tokenops.delta_matmul_cuda_exact.default(
            out, p.query, p.key, p.value, order, fresh, p.cells, p.rel_h, p.rel_w, p.scale, p.guard, *sums
        )
        self._replace(p, state, turns)

    def _replace(self, problem: DeltaAttentionProblem, state: DeltaState, turns: int) -> None:
        """What the frame's cells are, for the next frame; and whose turn it is then."""
        if problem.cells is not None:
            cells = (problem.key, problem.value, problem.cells)
            torch.ops.tokenops.delta_matmul_cuda_replace.default(state.value, state.key, state.turn, *cells, turns)
            return
        state.value.copy_(problem.value)
        if state.key is not None and state.turn is not None:
            state.key.copy_(problem.key)
            state.turn.zero_()


def _rows_of(p: LinearProblem) -> tuple[Tensor, bool]:
    """What goes into the first layer, and whether it is by row: x, or else its normalised rows by slot."""
    if p.norm_weight is None or p.norm_bias is None:
        return p.x, True
    normalized = _slots_by(p, p.x.shape[2])
    torch.ops.tokenops.delta_matmul_cuda_normalize.default(normalized, p.x, p.norm_weight, p.norm_bias, p.norm_eps, p.index)
    return normalized, False


def _slots_by(p: LinearProblem, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Scratch, a row for every slot."""
    return p.x.new_empty((p.x.shape[0], p.index.shape[1], width), dtype=dtype)


def _layer(
    p: LinearProblem,
    out: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    other: Tensor | None = None,
    form: str = "plain",
    activation: str = "none",
    gather: bool = False,
    scatter: bool = False,
) -> None:
    options = (other, form, activation, gather, scatter)
    torch.ops.tokenops.delta_matmul_cuda_layer.default(out, rows, p.index, p.x.shape[1], weight, bias, *options)


def _parameters(
    p: LinearProblem, grad: Tensor, rows: Tensor, of_weight: Tensor | None, of_bias: Tensor | None, gather: bool = False
) -> None:
    if of_weight is not None or of_bias is not None:
        torch.ops.tokenops.delta_matmul_cuda_layer_parameters.default(of_weight, of_bias, grad, rows, p.index, p.x.shape[1], gather)
