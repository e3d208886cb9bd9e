"""The backends of this room, in order of preference, and why each may refuse a call."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenops import native
from tokenops.ops.wings import backends, explain
from tokenops.reference import token_select as reference
from tokenops.types import HaltBackwardProblem, HaltProblem, HaltState

_library = torch.library.Library("tokenops", "FRAGMENT")
# the new state may be the old one
_HALT = (
    "(Tensor(a!) new_cum, Tensor(b!) new_remain, Tensor(c!) new_active, Tensor(d!) new_rho, Tensor(e!) new_counter, "
    "Tensor(f!) new_out, Tensor x, Tensor? cum, Tensor? remain, Tensor? active, Tensor? rho, Tensor? counter, Tensor? out, "
    "Tensor? cu_seqlens, float scale, float center, float limit, bool last, bool class_only"
)
_HALT_BACKWARD = (
    "(Tensor(a!)? new_grad_x, Tensor(b!)? new_grad_remain, Tensor x, Tensor? grad_cum, Tensor? grad_remain, Tensor? grad_rho, "
    "Tensor? grad_out, Tensor? remain, Tensor? active, Tensor cum, Tensor? cu_seqlens, float scale, float center, float limit, bool last, "
    "bool class_only"
)
# implemented by csrc/cpu/token_select.cpp; 0 = done, 1 = bad contents, 2 = no memory
_library.define("token_select_cpu_select(Tensor(a!) index, Tensor(b!) count, Tensor score, float? threshold, int protect, str isa) -> int")
_library.define(f"token_select_cpu_halt{_HALT}, str isa) -> int")
_library.define(f"token_select_cpu_halt_backward{_HALT_BACKWARD}, str isa) -> int")
_library.define("token_select_cpu_pack(Tensor(a!) tokens, Tensor(b!) cu_seqlens, Tensor x, Tensor? index, Tensor? count, str isa) -> int")
_library.define("token_select_cpu_unpack(Tensor(a!) x, Tensor tokens, Tensor cu_seqlens, Tensor? index, str isa) -> int")
# implemented by csrc/cuda/token_select.cu
_library.define("token_select_cuda_select(Tensor(a!) index, Tensor(b!) count, Tensor score, float? threshold, int protect) -> ()")
_library.define(f"token_select_cuda_halt{_HALT}) -> ()")
_library.define(f"token_select_cuda_halt_backward{_HALT_BACKWARD}) -> ()")
# ranks, filled and source are room to work, with an index
_library.define(
    "token_select_cuda_pack(Tensor(a!) tokens, Tensor(b!) cu_seqlens, Tensor(c!)? ranks, Tensor(d!)? filled, Tensor x, Tensor? index, "
    "Tensor? count) -> ()"
)
_library.define("token_select_cuda_unpack(Tensor(a!) x, Tensor(b!)? source, Tensor tokens, Tensor cu_seqlens, Tensor? index) -> ()")


class NativeCPU(NamedTuple):
    """The C++ kernels as a backend; ``isa`` "" means the best one."""

    isa: str

    def _isa(self) -> str:
        return self.isa or native.default_cpu_isa()

    def select(self, score: Tensor, threshold: float | None, protect: int, index: Tensor, count: Tensor) -> None:
        code = torch.ops.tokenops.token_select_cpu_select.default(index, count, score, threshold, protect, self._isa())
        explain("select_tokens", code, partial(reference.check_scores, score, protect))

    def halt(self, problem: HaltProblem, new: HaltState) -> None:
        x, state, *rest = problem
        old = (None,) * len(new) if state is None else state
        code = torch.ops.tokenops.token_select_cpu_halt.default(*new, x, *old, *rest, self._isa())
        explain("halt_tokens", code, partial(reference.check_halt, problem))

    def halt_backward(self, problem: HaltBackwardProblem, grad_x: Tensor | None, grad_remain: Tensor | None) -> None:
        code = torch.ops.tokenops.token_select_cpu_halt_backward.default(grad_x, grad_remain, *problem, self._isa())
        explain("halt_tokens_backward", code, partial(reference.check_halt, problem))

    def pack(self, x: Tensor, index: Tensor | None, count: Tensor | None, tokens: Tensor, cu_seqlens: Tensor) -> None:
        code = torch.ops.tokenops.token_select_cpu_pack.default(tokens, cu_seqlens, x, index, count, self._isa())
        explain("pack_tokens", code, partial(reference.check_pack, x, index, count, tokens.shape[0]))

    def unpack(self, tokens: Tensor, cu_seqlens: Tensor, index: Tensor | None, x: Tensor) -> None:
        code = torch.ops.tokenops.token_select_cpu_unpack.default(x, tokens, cu_seqlens, index, self._isa())
        explain("unpack_tokens", code, partial(reference.check_unpack, tokens, cu_seqlens, index, x.shape[1], x.shape[0] == 1))


class NativeCUDA:
    """The CUDA C++ kernels as a backend."""

    def select(self, score: Tensor, threshold: float | None, protect: int, index: Tensor, count: Tensor) -> None:
        torch.ops.tokenops.token_select_cuda_select.default(index, count, score, threshold, protect)

    def halt(self, problem: HaltProblem, new: HaltState) -> None:
        x, state, *rest = problem
        old = (None,) * len(new) if state is None else state
        torch.ops.tokenops.token_select_cuda_halt.default(*new, x, *old, *rest)

    def halt_backward(self, problem: HaltBackwardProblem, grad_x: Tensor | None, grad_remain: Tensor | None) -> None:
        torch.ops.tokenops.token_select_cuda_halt_backward.default(grad_x, grad_remain, *problem)

    def pack(self, x: Tensor, index: Tensor | None, count: Tensor | None, tokens: Tensor, cu_seqlens: Tensor) -> None:
        ranks = None if index is None else torch.empty_like(index, memory_format=torch.contiguous_format)
        filled = None if index is None else index.new_empty(index.shape[:1])
        torch.ops.tokenops.token_select_cuda_pack.default(tokens, cu_seqlens, ranks, filled, x, index, count)

    def unpack(self, tokens: Tensor, cu_seqlens: Tensor, index: Tensor | None, x: Tensor) -> None:
        source = None if index is None else torch.full(x.shape[:2], -1, dtype=torch.int32, device=x.device)
        torch.ops.tokenops.token_select_cuda_unpack.default(x, source, tokens, cu_seqlens, index)


def _objections(problem: Tensor | HaltProblem | HaltBackwardProblem, computes: bool = True) -> list[str]:
    """What no compiled kernel of ours serves. Packing moves bytes and computes nothing, so it takes every dtype."""
    rows = {"x": problem} if isinstance(problem, Tensor) else {"x": problem.x}
    if isinstance(problem, HaltProblem) and problem.state is not None:
        rows["state.out"] = problem.state.out
    reasons = []
    if computes and rows["x"].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"{str(rows['x'].dtype).removeprefix('torch.')} is served by the reference only")
    for name, x in rows.items():
        if x.numel() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
            reasons.append(f"{name} must have a dense last dimension, got strides {x.stride()}")
    return reasons


BACKENDS = backends("token_select", NativeCPU, NativeCUDA(), reference, _objections)
