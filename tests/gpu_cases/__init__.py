"""What gpu_check.py compiles, a module for each room.

A room's module holds ``KERNELS``, the name of the module of its kernels, and two lists of cases: ``CASES``, which between them compile
every kernel in every configuration that its launchers may choose, and ``QUICK``, which compile every kernel once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Promise(NamedTuple):
    """What a compiled kernel has to keep, beyond no spills and no more shared memory than there is."""

    shared: int | None = None  # bytes of shared memory at most
    tensor_core: bool = False  # it has to multiply with tensor core instructions


class Case(Protocol):
    """One problem, which every kernel that it needs is compiled for. Printed by ``str``; picklable."""

    def launch(self) -> None:
        """Calls the room's launchers as its door does, with meta tensors."""

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        """What a kernel, launched with these keyword arguments, has to keep."""


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16, int32 ..."""
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
