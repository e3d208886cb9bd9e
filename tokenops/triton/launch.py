"""What the launchers of all rooms share: where their kernels run, and how one is launched."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor


def device_objections(name: str, tensor: Tensor) -> list[str]:
    """Why no Triton kernel can run on a tensor, the argument ``name`` of the call; empty if one can."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if not tensor.is_cuda and not (tensor.is_cpu and interpreting()):
        reasons.append(f"runs on CUDA and ROCm GPUs (on CPU tensors under TRITON_INTERPRET=1 only), {name} is on {tensor.device}")
    return reasons


def launch(kernel: Any, programs: int, on: Tensor, **arguments: Any) -> None:
    """Runs ``programs`` programs of a kernel on a tensor's device, and nothing for an empty problem."""
    if programs == 0:
        return
    # Triton launches on the current device, which need not be the tensor's
    with torch.cuda.device_of(on):
        kernel[(programs,)](**arguments)


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def registers(most: int) -> dict[str, int]:
    """A launch option: how many registers a thread may use. The assembler then spends them before it spills; only NVIDIA's has the option."""
    if interpreting():
        return {}
    from triton.runtime import driver

    return {"maxnreg": most} if driver.active.get_current_target().backend == "cuda" else {}


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that one program may use."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(max(device, 0))["max_shared_mem"])
