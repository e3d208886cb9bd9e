"""The compiled op libraries: loaded if they were built, and what they offer on this machine."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

_library = torch.library.Library("tokenops", "FRAGMENT")
# the instruction sets that are built in and supported here, comma-separated, worst to best
_library.define("cpu_isas() -> str")
# product [16, 8] = a [16, 16] b [8, 16]^T, half types: csrc/cuda/tile_product.cu
_library.define("cuda_tile_product(Tensor(a!) product, Tensor a, Tensor b) -> ()")


def _load(name: str) -> str | None:
    """Why the library is absent, or None if it is loaded."""
    path = Path(__file__).parent / f"{name}.so"
    if not path.exists():
        return f"C++ library not built ({path.name} is not in {path.parent})"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"C++ library does not load: {error}"
    return None


# None = loaded, else the reason why not
CPU_ABSENT = _load("_C_cpu")
# the CUDA library links symbols that a CPU build of torch does not have
CUDA_ABSENT = _load("_C_cuda") if torch.version.cuda else "this torch is built without CUDA"
# the kind of device that has the CUDA kernels
CUDA_DEVICE = "cuda"


def emulate_cuda() -> None:
    """For tests: now the CUDA kernels run on CPU tensors and on no others, if their emulated form was built (TOKENOPS_EMULATED=1)."""
    global CUDA_ABSENT, CUDA_DEVICE
    CUDA_ABSENT, CUDA_DEVICE = _load("_C_emulated"), "cpu"


@cache
def cpu_isas() -> tuple[str, ...]:
    """Instruction sets whose kernels can run here, worst to best; empty if the library is absent."""
    return () if CPU_ABSENT else tuple(torch.ops.tokenops.cpu_isas().split(","))


@cache
def default_cpu_isa() -> str:
    """The best instruction set, no better than torch itself uses (ATEN_CPU_CAPABILITY) and than TOKENOPS_CPU_ISA allows."""
    isas = cpu_isas()
    level = torch.backends.cpu.get_cpu_capability().lower()
    # "avx2" and "avx512" begin the names of our own levels; torch's other levels leave the portable code
    allowed = [isa for isa in isas if isa == "generic" or (level.startswith("avx") and isa.partition("_")[0] <= level)]
    wish = os.environ.get("TOKENOPS_CPU_ISA")
    if wish:
        if wish not in isas:
            raise ValueError(f"TOKENOPS_CPU_ISA must be one of {', '.join(isas)}, got {wish!r}")
        allowed = [isa for isa in allowed if isas.index(isa) <= isas.index(wish)]
    return allowed[-1]
