"""The backends of this room, in order of preference, and why each may refuse a call."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenops import native
from tokenops.ops.delta_matmul.cuda import NativeCUDA
from tokenops.ops.wings import backends, explain, width_objections
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
# implemented by csrc/cpu/delta_matmul.cpp and delta_matmul_attention.cpp; 0 = done, 1 = bad contents, 2 = no memory
# the new reference may be the old one
_library.define(
    "delta_matmul_cpu_gate(Tensor(a!) new_index, Tensor(b!) count, Tensor(c!) values, Tensor(d!) delta, Tensor(e!) new_reference, "
    f"Tensor(f!) total, Tensor x, Tensor? skip, Tensor? reference, {_NORM}, Tensor? index, float? threshold, float order, bool whole, "
    "str isa) -> int"
)
_library.define(
    "delta_matmul_cpu_gate_backward(Tensor(a!)? grad_x, Tensor(b!)? grad_old_reference, Tensor(c!)? grad_norm_weight, "
    f"Tensor(d!)? grad_norm_bias, Tensor x, {_NORM}, Tensor index, bool whole, bool first, Tensor? grad_values, Tensor? grad_delta, "
    "Tensor? grad_reference, Tensor? grad_total, str isa) -> int"
)
_library.define(
    f"delta_matmul_cpu_linear(Tensor(a!) out, Tensor x, Tensor index, Tensor weight, Tensor? bias, {_NORM}, str activation, "
    "Tensor? weight_2, Tensor? bias_2, bool into, str isa) -> int"
)
# without a buffer: zeros; out may be the buffer
_library.define("delta_matmul_cpu_update(Tensor(a!) out, Tensor? buffer, Tensor rows, Tensor index, str isa) -> int")
_library.define(
    "delta_matmul_cpu_update_backward(Tensor(a!)? grad_buffer, Tensor(b!)? grad_rows, Tensor grad_out, Tensor index, str isa) -> int"
)
_library.define(
    "delta_matmul_cpu_attention(Tensor(a!) out, Tensor query, Tensor key, Tensor value, Tensor? rows, Tensor? cells, Tensor? rel_h, "
    "Tensor? rel_w, float scale, float guard, int refresh, float crossover, Tensor(b!) output, Tensor(c!) old_value, Tensor(d!)? old_key, "
    "Tensor(e!)? maximum, Tensor(f!)? total, Tensor(g!)? peak, Tensor(h!)? turn, Tensor(i!)? probability, str isa) -> int"
)


class NativeCPU(NamedTuple):
    """The C++ kernels as a backend; ``isa`` "" means the best one."""

    isa: str

    def _isa(self) -> str:
        return self.isa or native.default_cpu_isa()

    def gate(self, problem: GateProblem, new: DeltaGate) -> None:
        problem = problem._replace(norm_weight=_float(problem.norm_weight), norm_bias=_float(problem.norm_bias))
        code = torch.ops.tokenops.delta_matmul_cpu_gate.default(*new, *problem, self._isa())
        explain("delta_gate", code, partial(_check_gate, problem))

    def gate_backward(self, problem: GateBackwardProblem, grads: GateGradients) -> None:
        problem = problem._replace(norm_weight=_float(problem.norm_weight), norm_bias=_float(problem.norm_bias))
        into = grads._replace(norm_weight=_float_like(grads.norm_weight), norm_bias=_float_like(grads.norm_bias))
        code = torch.ops.tokenops.delta_matmul_cpu_gate_backward.default(*into, *problem, self._isa())
        explain("delta_gate_backward", code, partial(reference.check_index, problem.index, problem.x.shape[1]))
        _give(grads[2:], into[2:])

    def linear(self, problem: LinearProblem, out: Tensor) -> None:
        self._linear(problem, out, False)

    def linear_into(self, problem: LinearProblem, out: Tensor) -> None:
        self._linear(problem, out, True)

    def _linear(self, problem: LinearProblem, out: Tensor, into: bool) -> None:
        problem = problem._replace(norm_weight=_float(problem.norm_weight), norm_bias=_float(problem.norm_bias))
        code = torch.ops.tokenops.delta_matmul_cpu_linear.default(out, *problem, into, self._isa())
        explain("gathered_linear", code, partial(reference.check_index, problem.index, problem.x.shape[1]))

    def linear_backward(self, problem: LinearProblem, grad_out: Tensor, grads: LinearGradients) -> None:
        """The matrix products are torch's, on the listed rows; only the gradient of x is spread over its grid here."""
        reference.check_index(problem.index, problem.x.shape[1])
        results = reference.listed_gradients(problem, grad_out, [grad is not None for grad in grads])
        if grads.x is not None:
            torch.ops.tokenops.delta_matmul_cpu_update.default(grads.x, None, results.x, problem.index, self._isa())
        _give(grads[1:], results[1:])

    def update(self, buffer: Tensor, rows: Tensor, index: Tensor, out: Tensor) -> None:
        code = torch.ops.tokenops.delta_matmul_cpu_update.default(out, buffer, rows, index, self._isa())
        explain("update_tokens", code, partial(reference.check_index, index, out.shape[1]))

    def update_backward(self, grad_out: Tensor, index: Tensor, grad_buffer: Tensor | None, grad_rows: Tensor | None) -> None:
        code = torch.ops.tokenops.delta_matmul_cpu_update_backward.default(grad_buffer, grad_rows, grad_out, index, self._isa())
        explain("update_tokens_backward", code, partial(reference.check_index, index, grad_out.shape[1]))

    def attention(self, problem: DeltaAttentionProblem, state: DeltaState, out: Tensor) -> None:
        code = torch.ops.tokenops.delta_matmul_cpu_attention.default(out, *problem, *state, self._isa())
        explain("delta_attention", code, partial(_check_lists, problem))


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _float_like(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)


def _give(wanted: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...]) -> None:
    """Gradients in the dtypes of their arguments."""
    for grad, result in zip(wanted, results, strict=True):
        if grad is not None and result is not None and grad is not result:
            grad.copy_(result)


def _check_gate(problem: GateProblem) -> None:
    reference.check_gate(problem)
    if problem.index is not None:
        reference.check_index(problem.index, problem.x.shape[1])


def _check_lists(problem: DeltaAttentionProblem) -> None:
    for index, rows in ((problem.rows, problem.query.shape[2]), (problem.cells, problem.key.shape[2])):
        if index is not None:
            reference.check_index(index, rows)


def _objections(
    problem: Tensor | GateProblem | GateBackwardProblem | LinearProblem | DeltaAttentionProblem, out: Tensor | None = None
) -> list[str]:
    """What no compiled kernel of ours serves. Replacing rows (the problem is a tensor) moves bytes and computes nothing, so it takes every
    dtype."""
    if isinstance(problem, DeltaAttentionProblem):
        return _attention_objections(problem)
    grids = {"buffer": problem} if isinstance(problem, Tensor) else {"x": problem.x}
    reasons = []
    if not isinstance(problem, Tensor) and problem.x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"{str(problem.x.dtype).removeprefix('torch.')} is served by the reference only")
    if isinstance(problem, GateProblem) and problem.reference is not None:
        grids["reference"] = problem.reference
    if out is not None:
        grids["out"] = out
    for name, x in grids.items():
        if x.numel() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
            reasons.append(f"{name} must have a dense last dimension, got strides {x.stride()}")
    return reasons


def _attention_objections(problem: DeltaAttentionProblem) -> list[str]:
    reasons = []
    if problem.query.dtype == torch.float64:
        reasons.append("float64 is served by the reference only")
    reasons += width_objections(problem.query, problem.value)
    if problem.rel_h is not None and problem.rel_w is not None and problem.rel_h.dtype != problem.rel_w.dtype:
        reasons.append("rel_h and rel_w must have one dtype")
    return reasons


BACKENDS = backends("delta_matmul", NativeCPU, NativeCUDA(), reference, _objections)
