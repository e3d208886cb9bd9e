"""The backends of this room, in order of preference, and why each may refuse a call."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenops import native
from tokenops.ops.token_merge.cuda import NativeCUDA
from tokenops.ops.wings import backends, explain
from tokenops.reference import token_merge as reference
from tokenops.types import MatchProblem, MergePlan, PairProblem, SoftMergeGradients, SoftMergeProblem

_library = torch.library.Library("tokenops", "FRAGMENT")
# implemented by csrc/cpu/token_merge.cpp; 0 = done, 1 = bad contents, 2 = no memory. Where there is no place, the window is not read
_WINDOW = "int t_low, int t_high, int reach_y, int reach_x"
_PLAN = "Tensor(a!) slot, Tensor(b!) count, Tensor(c!) order, Tensor(d!) offsets"
_SOFT = "Tensor x, Tensor metric, Tensor meta, float temperature, Tensor? mass, bool normalize"
for _schema in (
    (
        "argmax(Tensor(a!) best, Tensor(b!) index, Tensor a, Tensor b, Tensor? a_mask, Tensor? b_mask, Tensor? a_scale, Tensor? b_scale, "
        f"Tensor? a_place, Tensor? b_place, {_WINDOW}, bool normalize, str isa) -> int"
    ),
    (
        f"match({_PLAN}, Tensor metric, Tensor? role, bool class_token, bool distill_token, Tensor? place, {_WINDOW}, "
        "Tensor? source_scale, Tensor? destination_scale, int? r, float? threshold, bool normalize, str isa) -> int"
    ),
    f"plan({_PLAN}, Tensor target, bool is_slot) -> int",
    "merge(Tensor(a!) out, Tensor x, Tensor slot, Tensor order, Tensor offsets, Tensor? size, str mode, str isa) -> int",
    (
        "merge_backward(Tensor(a!)? grad_x, Tensor(b!)? grad_size, Tensor grad_out, Tensor x, Tensor out, Tensor slot, Tensor order, "
        "Tensor offsets, Tensor? size, str mode, str isa) -> int"
    ),
    "unmerge(Tensor(a!) out, Tensor y, Tensor slot, Tensor order, Tensor offsets, str mode, str isa) -> int",
    f"soft(Tensor(a!) out, Tensor(b!) mass_out, Tensor(c!) lse, {_SOFT}, str isa) -> int",
    (
        "soft_backward(Tensor(a!)? grad_x, Tensor(b!)? grad_metric, Tensor(c!)? grad_meta, Tensor(d!)? grad_temperature, Tensor(e!)? "
        f"grad_mass, Tensor grad_out, Tensor grad_mass_out, {_SOFT}, Tensor out, Tensor mass_out, Tensor lse, str isa) -> int"
    ),
):
    _library.define(f"token_merge_cpu_{_schema}")
_cpu = torch.ops.tokenops

_NO_WINDOW = (0, 0, 0, 0)


class NativeCPU(NamedTuple):
    """The C++ kernels as a backend; ``isa`` "" means the best one."""

    isa: str

    def argmax(self, p: PairProblem, best: Tensor, index: Tensor) -> None:
        code = _cpu.token_merge_cpu_argmax(best, index, *p[:8], *(p.window or _NO_WINDOW), p.normalize, self._isa())
        explain("pairwise_argmax", code, partial(reference.check_pairs, p))

    def match(self, p: MatchProblem, slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor) -> None:
        code = _cpu.token_merge_cpu_match(slot, count, order, offsets, *p[:5], *(p.window or _NO_WINDOW), *p[6:], self._isa())
        explain("match_tokens", code, partial(reference.check_match, p, offsets.shape[1] - 1))

    def plan(self, target: Tensor, is_slot: bool, slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor) -> None:
        code = _cpu.token_merge_cpu_plan(slot, count, order, offsets, target, is_slot)
        explain("plan_tokens", code, partial(reference.check_target, target, is_slot, offsets.shape[1] - 1))

    def merge(self, x: Tensor, plan: MergePlan, size: Tensor | None, mode: str, out: Tensor) -> None:
        code = _cpu.token_merge_cpu_merge(out, x, plan.slot, plan.order, plan.offsets, size, mode, self._isa())
        explain("merge_tokens", code, partial(reference.check_merge, plan, size))

    def merge_backward(
        self,
        grad_out: Tensor,
        x: Tensor | None,
        out: Tensor | None,
        plan: MergePlan,
        size: Tensor | None,
        mode: str,
        grad_x: Tensor | None,
        grad_size: Tensor | None,
    ) -> None:
        # where nothing depends on x and out, tensors of their shape stand in
        rows = (grad_x if x is None else x), (grad_out if out is None else out)
        lists = plan.slot, plan.order, plan.offsets
        code = _cpu.token_merge_cpu_merge_backward(grad_x, grad_size, grad_out, *rows, *lists, size, mode, self._isa())
        explain("merge_tokens_backward", code, partial(reference.check_merge, plan, size))

    def unmerge(self, y: Tensor, plan: MergePlan, mode: str, out: Tensor) -> None:
        code = _cpu.token_merge_cpu_unmerge(out, y, plan.slot, plan.order, plan.offsets, mode, self._isa())
        explain("unmerge_tokens", code, partial(reference.check_merge, plan))

    def soft_merge(
        self,
        x: Tensor,
        metric: Tensor,
        meta: Tensor,
        temperature: float | Tensor,
        mass: Tensor | None,
        normalize: bool,
        out: Tensor,
        mass_out: Tensor,
        lse: Tensor,
    ) -> None:
        problem = SoftMergeProblem(x, metric, meta, reference.check_temperature(float(temperature)), mass, normalize)
        code = _cpu.token_merge_cpu_soft(out, mass_out, lse, *problem, self._isa())
        explain("soft_merge", code, partial(reference.check_soft, problem))

    def soft_merge_backward(
        self,
        grad_out: Tensor,
        grad_mass: Tensor,
        x: Tensor,
        metric: Tensor,
        meta: Tensor,
        temperature: float | Tensor,
        mass: Tensor | None,
        normalize: bool,
        out: Tensor,
        mass_out: Tensor,
        lse: Tensor,
        grads: SoftMergeGradients,
    ) -> None:
        problem = SoftMergeProblem(x, metric, meta, reference.check_temperature(float(temperature)), mass, normalize)
        code = _cpu.token_merge_cpu_soft_backward(*grads, grad_out, grad_mass, *problem, out, mass_out, lse, self._isa())
        explain("soft_merge_backward", code, partial(reference.check_soft, problem))

    def _isa(self) -> str:
        return self.isa or native.default_cpu_isa()


def _objections(*grids: Tensor, names: str = "x") -> list[str]:
    """What no compiled kernel of ours serves. ``grids``: what the operation reads row by row, with their names."""
    reasons = []
    for name, x in zip(names.split(), grids, strict=True):
        if x.dtype == torch.float64:
            reasons.append("float64 is served by the reference only")
        if x.numel() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
            reasons.append(f"{name} must have a dense last dimension, got strides {x.stride()}")
        if name in ("a", "metric") and x.shape[-1] % 8 != 0:
            reasons.append(f"{name} must have a width that is a multiple of 8, got {x.shape[-1]}")
    return list(dict.fromkeys(reasons))


BACKENDS = backends("token_merge", NativeCPU, NativeCUDA(), reference, _objections)
