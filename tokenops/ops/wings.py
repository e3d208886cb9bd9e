"""What the backend tables of all rooms share: which wing can run here, who checks contents, and what a kernel's answer means."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tokenops import native
from tokenops.dispatch import Backend
from tokenops.ops import preference

# Triton too reads it once: when it is imported
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Triton:
    """A room's Triton kernels as a backend. Imported when first needed: the package works without triton."""

    def __init__(self, room: str) -> None:
        self.room = room
        self._name = f"tokenops.triton.{room}"

    def written(self) -> bool:
        return find_spec(self._name) is not None

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)


def backends(
    room: str,
    native_cpu: Callable[[str], Any],
    native_cuda: Any | None,
    reference: Any,
    objections: Callable[..., list[str]],
) -> tuple[Backend, ...]:
    """The backends of a room, in order of preference.

    Args:
        native_cpu: makes the backend of one instruction set of the C++ kernels; "" means the best one.
        native_cuda: the backend of the CUDA C++ kernels. None: the room has none yet. It may have ``objections`` of its own.
        objections: called with the problem (a tensor, or a tuple that begins with one): what no compiled kernel serves.
    """
    return (
        Backend("triton", Triton(room), partial(_triton_objections, Triton(room), objections)),
        *(
            Backend(f"cpu:{isa}" if isa else "cpu", native_cpu(isa), partial(_cpu_objections, isa, objections))
            for isa in ("", "avx512_bf16", "avx512", "avx2", "generic")
        ),
        # behind those for the CPU, so that an emulator is never chosen unless it is named
        Backend("cuda", native_cuda, partial(_cuda_objections, native_cuda, objections), partial(_cuda_leads, room))
        if native_cuda is not None
        else Backend("cuda", None, lambda *problem, **request: [f"{room} has no CUDA C++ kernels yet"]),
        Backend("reference", reference, lambda *problem, **request: []),
    )


def _cpu_objections(isa: str, objections: Callable[..., list[str]], *problem: Any, **request: Any) -> list[str]:
    reasons = []
    device = _device_of(problem)
    if device.type != "cpu":
        reasons.append(f"runs on CPU tensors, got {device}")
    if native.CPU_ABSENT:
        reasons.append(native.CPU_ABSENT)
    elif isa and isa not in native.cpu_isas():
        reasons.append(f"{isa} is not built in or not supported by this processor (here: {', '.join(native.cpu_isas())})")
    return reasons + objections(*problem, **request)


def _cuda_objections(native_cuda: Any, objections: Callable[..., list[str]], *problem: Any, **request: Any) -> list[str]:
    reasons = []
    device = _device_of(problem)
    if device.type != native.CUDA_DEVICE:
        reasons.append(f"runs on {native.CUDA_DEVICE.upper()} tensors, got {device}")
    if native.CUDA_ABSENT:
        reasons.append(native.CUDA_ABSENT)
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append(f"needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {torch.cuda.get_device_capability(device)}")
    own = getattr(native_cuda, "objections", None)
    return reasons + objections(*problem, **request) + (own(*problem, **request) if own else [])


def _cuda_leads(room: str, *problem: Any) -> bool:
    device = _device_of(problem)
    return device.type == "cuda" and preference.rule_for(room, torch.cuda.get_device_capability(device), problem).backend == "cuda"


def _triton_objections(triton: Triton, objections: Callable[..., list[str]], *problem: Any, **request: Any) -> list[str]:
    if not triton.written():
        return [f"{triton.room} has no Triton kernels yet"]
    if _device_of(problem).type == "cpu" and not _INTERPRETED:
        return ["runs on a GPU, got CPU tensors"]
    try:
        own = triton.objections
    except ImportError as error:
        return [f"triton is not installed ({error})"]
    return objections(*problem, **request) + own(*problem, **request)


def _device_of(problem: tuple[Any, ...]) -> torch.device:
    first = problem[0]
    return (first if isinstance(first, Tensor) else first[0]).device


def width_objections(query: Tensor, value: Tensor) -> list[str]:
    """What the attention kernels have against head widths D and Dv."""
    widths = {"D": query.shape[-1], "Dv": value.shape[-1]}
    return [
        f"{name} must be a multiple of 8 up to 256, got {width}" for name, width in widths.items() if width % 8 or not 8 <= width <= 256
    ]


def reads_contents(device: torch.device, backend: str) -> bool:
    """Whether to check ids, bounds and NaN here. The C++ kernels do it while they work; on a GPU it costs a wait, so only on request."""
    if device.type == "cpu":
        return not backend.startswith("cpu")
    return os.environ.get("TOKENOPS_CHECK") == "1"


def explain(operation: str, code: int, check: Callable[[], object]) -> None:
    """What a C++ kernel answered (0 = done) as an exception. Of bad contents (1) it only knows that: ``check`` finds argument and place."""
    if code == 0:
        return
    if code == 2:
        raise MemoryError(f"{operation}: no memory for the scratch space of the C++ kernel")
    check()
    raise RuntimeError(f"{operation}: the C++ kernel refused a call that is in order (code {code}); please report it")
