"""Compiles the Triton kernels for GPUs that are not here, and counts what each would use of one.

``python tests/gpu_check.py`` (``make gpu-check``) runs the real launchers on meta tensors under a driver that knows an architecture but has
no device, so every choice (tiles, specialisation, shared memory) is the one a GPU would get. It prints registers, spills and shared memory
of every kernel, and exits with 1 on a spill, on more shared memory than there is or than the room promised, on a kernel without the tensor
core instructions it should have, on a kernel that no case compiles, or on an error. The cases are in gpu_cases/, a file for each room.

Compiling proves typing and resources, not numbers: those are test_triton_interpreter.py's.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cubin
import gpu_cases
import torch
from gpu_cases import Case


class Arch(NamedTuple):
    backend: str
    name: int | str
    warp: int
    shared: int  # bytes one program may use


ARCHS = {
    "sm_80": Arch("cuda", 80, 32, 166912),
    "sm_90": Arch("cuda", 90, 32, 232448),
    "sm_100": Arch("cuda", 100, 32, 232448),
    # consumer parts: 99 KiB
    "sm_89": Arch("cuda", 89, 32, 101376),
    "sm_120": Arch("cuda", 120, 32, 101376),
    "gfx942": Arch("hip", "gfx942", 64, 65536),
}
DEFAULT_ARCHS = ("sm_80", "sm_90", "sm_100")
# what a tensor core instruction is called
TENSOR_CORE = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_120": "HMMA", "sm_90": "HGMMA|HMMA", "sm_100": r"UTC\w*MMA|HMMA", "gfx942": "v_mfma"}
ROOMS = sorted(module.name for module in pkgutil.iter_modules(gpu_cases.__path__))


class Usage(NamedTuple):
    """What one kernel takes of one architecture."""

    room: str
    kernel: str
    case: str
    arch: str
    options: str  # blocks, warps, stages
    registers: int
    spills: int  # instructions that store to or load from the stack; scratch bytes on AMD
    shared: int
    promised: int  # the room's bound, or the architecture's
    limit: int
    tensor_core: int  # instructions
    complaints: tuple[str, ...]


class DeviceLessDriver:
    """What Triton 3.6 asks of a driver to compile and launch, with nothing behind it."""

    def __init__(self, arch: Arch) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(arch.backend, arch.name, arch.warp)
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": arch.shared, "multiprocessor_count": 132, "warpSize": arch.warp},
            load_binary=lambda name, binary, shared, device: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments, **options: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    @staticmethod
    def is_active() -> bool:
        return True


def set_driver(arch: str) -> None:
    """Once a process: Triton keeps what it learned of a device."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler, unset it")
    from triton.runtime import driver

    driver.set_active(DeviceLessDriver(ARCHS[arch]))


def check(arch: str, room: str, case: Case) -> list[Usage]:
    """Compiles every kernel of the case, as the launchers do."""
    from triton.runtime import JITFunction

    run, usages = JITFunction.run, []

    def watch(kernel: Any, *arguments: Any, **options: Any) -> None:
        usages.append(measure(arch, room, case, kernel, options, run(kernel, *arguments, **options)))

    JITFunction.run = watch
    try:
        case.launch()
    except Exception as error:
        # a compiler begins with the place and ends with the reason
        complaint = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        usages.append(Usage(room, "?", str(case), arch, "", 0, 0, 0, 0, ARCHS[arch].shared, 0, (complaint,)))
    finally:
        JITFunction.run = run
    return usages


def measure(arch: str, room: str, case: Case, kernel: Any, options: Mapping[str, Any], compiled: Any) -> Usage:
    limit = ARCHS[arch].shared
    registers, spills, code = read_hip(compiled) if ARCHS[arch].backend == "hip" else read_cuda(compiled)
    tensor_core = len(re.findall(rf"\b(?:{TENSOR_CORE[arch]})", code))
    shared, promise = compiled.metadata.shared, case.promise(kernel.__name__, options)
    promised = limit if promise.shared is None else promise.shared
    complaints = []
    if spills:
        complaints.append("spills")
    if shared > limit:
        complaints.append("too much shared memory")
    if shared > promised:
        complaints.append("more shared memory than promised")
    if promise.tensor_core and not tensor_core:
        complaints.append("no tensor cores")
    blocks = (f"{name.removeprefix('BLOCK').removeprefix('_')}{options[name]}" for name in kernel.arg_names if name.startswith("BLOCK"))
    chosen = " ".join((*blocks, f"w{compiled.metadata.num_warps}", f"s{compiled.metadata.num_stages}"))
    return Usage(room, kernel.__name__, str(case), arch, chosen, registers, spills, shared, promised, limit, tensor_core, tuple(complaints))


def kernels_of(room: str) -> set[str]:
    """The kernels that a room may launch: what its module decorates, but for the helpers, whose names begin with an underscore."""
    from triton.runtime import JITFunction

    kernels = importlib.import_module(importlib.import_module(f"gpu_cases.{room}").KERNELS)
    return {name for name, value in vars(kernels).items() if isinstance(value, JITFunction) and not name.startswith("_")}


def read_cuda(compiled: Any) -> cubin.Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        [kernel] = cubin.read(Path(file.name)).values()
    return kernel


def read_hip(compiled: Any) -> tuple[int, int, str]:
    code = compiled.asm["amdgcn"]
    registers, scratch = (int(re.search(rf"\.{key}:\s*(\d+)", code)[1]) for key in ("vgpr_count", "private_segment_fixed_size"))  # type: ignore[index]
    return registers, scratch, code


COLUMNS = "{:<17} {:<19} {:<36} {:<7} {:<25} {:>4} {:>7} {:>8} {:>8} {:>8} {:>7}  {}"


def show(usage: Usage) -> str:
    verdict = "; ".join(usage.complaints) or "ok"
    sizes = (f"{size / 1024:.1f}K" for size in (usage.shared, usage.promised, usage.limit))
    return COLUMNS.format(*usage[:5], usage.registers, usage.spills, *sizes, usage.tensor_core, verdict)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help=f"default: {', '.join(DEFAULT_ARCHS)}")
    parser.add_argument("--room", action="append", choices=ROOMS, help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="a few cases, on sm_80 and sm_90 unless --arch says else")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    archs = options.arch or (["sm_80", "sm_90"] if options.quick else list(DEFAULT_ARCHS))
    print(COLUMNS.format("room", "kernel", "case", "arch", "blocks", "regs", "spills", "shared", "promised", "limit", "tensor", ""))
    count, bad, start = 0, 0, time.monotonic()
    rooms = options.room or ROOMS
    missing = {(room, kernel) for room in rooms for kernel in kernels_of(room)}
    work = []
    for room in rooms:
        module = importlib.import_module(f"gpu_cases.{room}")
        work += [(room, case) for case in (module.QUICK if options.quick else module.CASES)]
    for arch in archs:
        # a process serves one architecture; forked, so that they share what it took to import torch and Triton
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(options.jobs, context, initializer=set_driver, initargs=(arch,)) as pool:
            for usages in pool.map(check, [arch] * len(work), *zip(*work, strict=True)):
                for usage in usages:
                    print(show(usage), flush=True)
                    count += 1
                    bad += bool(usage.complaints)
                    missing.discard((usage.room, usage.kernel))
    for room, kernel in sorted(missing):
        print(f"{room} {kernel} is compiled by no case")
    print(f"{count} kernels, {bad} with complaints, {time.monotonic() - start:.0f} s")
    return 1 if bad or missing else 0


if __name__ == "__main__":
    sys.exit(main())
