"""What the launchers of all rooms share: where their kernels run, and how one is launched."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Rows and columns of one program's block. Both are powers of two; rows times columns are enough for every thread of 4 warps."""

    rows: int
    columns: int


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
    """A launch option: how many registers a thread may use. The assembler takes them before it spills. Only NVIDIA's has this option."""
    if interpreting():
        return {}
    from triton.runtime import driver

    return {"maxnreg": most} if driver.active.get_current_target().backend == "cuda" else {}


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that one program may use."""
    return _property(device, "max_shared_mem")


@functools.cache
def processors(device: int) -> int:
    """How many multiprocessors there are."""
    return _property(device, "multiprocessor_count")


def _property(device: int, name: str) -> int:
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(max(device, 0))[name])


def tile_of(width: int, elements: int) -> Tile:
    """So many elements at most, and an eighth of them from one row."""
    columns = min(power_of_two(width), max(elements // 8, 1))
    return Tile(min(256, elements // columns), columns)


def power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def row_strides(tensor: Tensor | None) -> tuple[int, int]:
    """Of [B, N, ...] the first two, under which one sample serves all; of [S, C], too, the first is a sample's."""
    return (0, 0) if tensor is None else (0 if tensor.shape[0] == 1 else tensor.stride(0), tensor.stride(1))


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Strides under which an axis of length 1 broadcasts."""
    return tuple([0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])


def grid_strides(*tensors: Tensor | None) -> tuple[int, list[tuple[int, ...]]]:
    """Batch, head and row strides of grids [B, H, N, C], and the unit they are counted in.

    The unit is 8 elements, which fill at least 16 bytes (the widest load there is), or 1 where some stride does not allow it. Kernels
    multiply row strides by it: one beyond 32 bits has to go in whole, or the product of what is left of it would wrap around.
    """
    strides = [(0, 0, 0) if tensor is None else strides_of(tensor)[:3] for tensor in tensors]
    if any(stride % 8 or stride >= 2**31 for three in strides for stride in three):
        return 1, strides
    return 8, [(batch // 8, head // 8, row // 8) for batch, head, row in strides]


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's own switch for CUDA matrix products; half types have nothing to choose."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
