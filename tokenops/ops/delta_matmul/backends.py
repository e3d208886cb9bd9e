"""The backends of this room, in order of preference, and why each may refuse a call."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenops import native
from tokenops.ops.wings import backends, explain
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaAttentionProblem, DeltaState

_library = torch.library.Library("tokenops", "FRAGMENT")
# implemented by csrc/cpu/delta_matmul_attention.cpp; 0 = done, 1 = bad contents of rows or cells, 2 = no memory
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

    def attention(self, problem: DeltaAttentionProblem, state: DeltaState, out: Tensor) -> None:
        code = torch.ops.tokenops.delta_matmul_cpu_attention.default(out, *problem, *state, self._isa())
        explain("delta_attention", code, partial(_check_lists, problem))


def _check_lists(problem: DeltaAttentionProblem) -> None:
    for index, rows in ((problem.rows, problem.query.shape[2]), (problem.cells, problem.key.shape[2])):
        if index is not None:
            reference.check_index(index, rows)


def _objections(problem: Any, **_: Any) -> list[str]:
    """What no compiled kernel of ours serves."""
    if not isinstance(problem, DeltaAttentionProblem):
        return ["gates and layers have no kernels yet"]
    reasons = []
    if problem.query.dtype == torch.float64:
        reasons.append("float64 is served by the reference only")
    for name, x in (("D", problem.query), ("Dv", problem.value)):
        width = x.shape[3]
        if width % 8 != 0 or not 8 <= width <= 256:
            reasons.append(f"{name} must be a multiple of 8 up to 256, got {width}")
    if problem.rel_h is not None and problem.rel_w is not None and problem.rel_h.dtype != problem.rel_w.dtype:
        reasons.append("rel_h and rel_w must have one dtype")
    return reasons


BACKENDS = backends("delta_matmul", NativeCPU, reference, _objections)
