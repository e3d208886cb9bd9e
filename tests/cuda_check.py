"""Compiles the CUDA C++ kernels with nvcc, without a GPU, and counts what each would use of one.

``python tests/cuda_check.py`` (part of ``make gpu-check``) prints what each kernel in csrc/cuda takes of each architecture. It exits with 1
on a spill, on a half-precision kernel without the tensor core instructions it should have, or on an error. That shared memory fits is
asserted where a kernel asks for it (``shared_memory`` in csrc/cuda/device.cuh): more than every architecture has does not compile.

Compiling proves typing and resources; numbers are the emulator's (tests/emulator).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cubin

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90a", "sm_100")
# consumer parts
ALL_ARCHS = (*ARCHS, "sm_86", "sm_89", "sm_120")
# kernels that multiply matrices: in half precision that is the tensor cores' work
PRODUCTS = {
    *("tile_product", "attention_forward", "attention_backward", "attention_exact", "attention_paper", "layer", "layer_parameters"),
    *("search", "token_softmax", "token_terms", "gather"),
}
HALF_TYPES = ("bf16", "f16")


class Usage(NamedTuple):
    """What one kernel takes of one architecture."""

    source: str
    kernel: str  # with its template arguments
    arch: str
    registers: int
    spills: int  # instructions that store to or load from the stack, or its bytes where there are more
    tensor_core: int  # instructions
    complaints: tuple[str, ...]


def find_nvcc() -> str | None:
    folders = [str(Path(home, "bin")) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ["PATH"]]))


def check(source: Path, arch: str) -> list[Usage]:
    """Every kernel of a file."""
    nvcc, torch = find_nvcc(), importlib.util.find_spec("torch")
    assert nvcc
    assert torch
    assert torch.origin
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels.cubin")
        flags = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
        include = [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.origin).parent / "include")]
        ran = subprocess.run(
            [nvcc, "-cubin", f"-arch={arch}", *flags, *include, source, "-o", file], capture_output=True, text=True, check=False
        )
        if ran.returncode:
            reason = next((line for line in ran.stderr.splitlines() if "error" in line), ran.stderr.strip())
            return [Usage(source.stem, "?", arch, 0, 0, 0, (reason,))]
        kernels = cubin.read(file)
    names = subprocess.run(["c++filt", *kernels], capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(_judge(source.stem, arch, name, kernel) for name, kernel in zip(names, kernels.values(), strict=True))


def _judge(source: str, arch: str, name: str, compiled: cubin.Kernel) -> Usage:
    # void tokenops::(anonymous namespace)::kernel<tokenops::bf16, 64>(...)
    name = re.sub(r"\(anonymous namespace\)::|tokenops::|\((int|bool|unsigned int)\)|^void ", "", name)
    name = re.sub(r"\(.*", "", name)
    kernel, _, arguments = name.partition("<")
    tensor_core = len(re.findall(r"\bHMMA\b", compiled.code))
    complaints = []
    if compiled.spills:
        complaints.append("spills")
    if kernel in PRODUCTS and re.search(rf"\b({'|'.join(HALF_TYPES)})\b", arguments) and not tensor_core:
        complaints.append("no tensor cores")
    return Usage(source, name, arch, compiled.registers, compiled.spills, tensor_core, tuple(complaints))


COLUMNS = "{:<18} {:<64} {:<7} {:>4} {:>7} {:>7}  {}"


def show(usage: Usage) -> str:
    return COLUMNS.format(*usage[:6], "; ".join(usage.complaints) or "ok")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ALL_ARCHS, help=f"default: {', '.join(ARCHS)}")
    parser.add_argument("--source", action="append", choices=[source.stem for source in SOURCES], help="default: all of them")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    if find_nvcc() is None:
        print("nvcc is not installed (CUDA_HOME, PATH)", file=sys.stderr)
        return 2
    start = time.monotonic()
    work = [
        (source, arch) for arch in options.arch or ARCHS for source in SOURCES if options.source is None or source.stem in options.source
    ]
    print(COLUMNS.format("source", "kernel", "arch", "regs", "spills", "tensor", ""))
    usages = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(check, *zip(*work, strict=True)):
            usages += found
            for usage in found:
                print(show(usage), flush=True)
    bad = sum(bool(usage.complaints) for usage in usages)
    missing = PRODUCTS - {usage.kernel.partition("<")[0] for usage in usages} if options.source is None else set()
    for kernel in sorted(missing):
        print(f"{kernel} should multiply matrices, and there is no such kernel")
    print(f"{len(usages)} kernels, {bad} with complaints, {time.monotonic() - start:.0f} s")
    return 1 if bad or missing else 0


if __name__ == "__main__":
    sys.exit(main())
