"""The backends of this room, in order of preference, and why each may refuse a call."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenops import native
from tokenops.ops.wings import backends, explain, width_objections
from tokenops.reference import sparse_attention as reference
from tokenops.types import AttentionGradients, AttentionProblem

_library = torch.library.Library("tokenops", "FRAGMENT")
_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? q_index, Tensor? kv_index, Tensor? kv_bias, Tensor? attn_mask, "
    "Tensor? rel_h, Tensor? rel_w, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool is_causal, float scale"
)
# implemented by csrc/cpu/sparse_attention.cpp; 0 = done, 1 = bad contents of an index or cu_seqlens, 2 = no memory
_library.define(
    f"sparse_attention_cpu_forward(Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? row_sq, {_PROBLEM}, bool by_row, str isa) -> int"
)
_library.define(
    "sparse_attention_cpu_backward(Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, Tensor(d!)? grad_bias, "
    "Tensor(e!)? grad_rel_h, Tensor(f!)? grad_rel_w, "
    f"Tensor grad_out, Tensor out, Tensor lse, {_PROBLEM}, str isa) -> int"
)
# implemented by csrc/cuda/sparse_attention.cu; most_queries: slots that a head or packed sequence has at most, to choose a kernel by
_library.define(
    f"sparse_attention_cuda_forward(Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? row_sq, {_PROBLEM}, int most_queries, bool by_row) -> ()"
)


class NativeCPU(NamedTuple):
    """The C++ kernels as a backend; ``isa`` "" means the best one."""

    isa: str

    def forward(self, problem: AttentionProblem, out: Tensor, lse: Tensor, row_sq: Tensor | None, by_row: bool) -> None:
        run = torch.ops.tokenops.sparse_attention_cpu_forward.default
        code = run(out, lse, row_sq, *_native_arguments(problem), by_row, self.isa or native.default_cpu_isa())
        explain("sparse_attention", code, partial(reference.check_contents, problem, unique_queries=by_row))

    def backward(self, problem: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor, grads: AttentionGradients) -> None:
        run = torch.ops.tokenops.sparse_attention_cpu_backward.default
        code = run(*grads[:4], *grads[5:], grad_out, out, lse, *_native_arguments(problem), self.isa or native.default_cpu_isa())
        explain("sparse_attention", code, partial(reference.check_contents, problem, unique_queries=True, unique_keys=True))


class NativeCUDA:
    """The CUDA C++ kernels as a backend."""

    @staticmethod
    def objections(problem: AttentionProblem, needs: tuple[str, ...] = ()) -> list[str]:
        """Why these kernels, beyond what no compiled kernel of this room serves, cannot serve a call; empty if they can."""
        widths = {"D": problem.query.shape[3], "Dv": problem.value.shape[3]}
        reasons = [f"{name} must be at most 128, got {width}" for name, width in widths.items() if width > 128]
        mask = problem.attn_mask
        if mask is not None and mask.dtype == torch.float64:
            reasons.append("a float64 attn_mask is served by the reference only")
        if any(name != "attn_mask" for name in needs):
            reasons.append("the backward pass is not written yet")
        return reasons

    @staticmethod
    def forward(problem: AttentionProblem, out: Tensor, lse: Tensor, row_sq: Tensor | None, by_row: bool) -> None:
        most = lse.shape[2] if problem.max_seqlen_q is None else problem.max_seqlen_q
        torch.ops.tokenops.sparse_attention_cuda_forward.default(out, lse, row_sq, *_native_arguments(problem), most, by_row)


def _native_arguments(p: AttentionProblem) -> tuple[object, ...]:
    return (*p[:9], p.cu_seqlens_q, p.cu_seqlens_k, p.is_causal, p.scale)


def _objections(problem: AttentionProblem, needs: tuple[str, ...] = ()) -> list[str]:
    """What no compiled kernel of ours serves."""
    query, key, value = problem.query, problem.key, problem.value
    reasons = []
    if query.dtype == torch.float64:
        reasons.append("float64 is served by the reference only")
    reasons += width_objections(query, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(3) != 1 and x.numel() > 0:
            reasons.append(f"{name} must have a dense last dimension, got strides {x.stride()}")
    if problem.dropout_p > 0.0:
        reasons.append("dropout is served by the reference only")
    if "attn_mask" in needs:
        reasons.append("the gradient of attn_mask is served by the reference only")
    return reasons


BACKENDS = backends("sparse_attention", NativeCPU, NativeCUDA, reference, _objections)
