"""Compiles the Triton kernels for GPUs that are not here, and counts what each would use of one.

``python tests/gpu_check.py`` (``make gpu-check``) runs the real launchers on meta tensors under a driver that knows an architecture but has
no device, so every choice (tiles, specialisation, shared memory) is the one a GPU would get. It prints registers, spills and shared memory
of every kernel, and exits with 1 on a spill, on more shared memory than there is or than tiles.py promised, on a half-precision kernel
without tensor core instructions, or on an error.

Compiling proves typing and resources, not numbers: those are test_triton_interpreter.py's.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenops.triton import sparse_attention as launchers
from tokenops.triton.sparse_attention.tiles import Tiles, shared_bytes
from tokenops.types import AttentionGradients, AttentionProblem


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
ATTENTION = ("forward", "backward_query", "backward_key_value")


class Case(NamedTuple):
    """One problem; every kernel is compiled for it."""

    dtype: torch.dtype = torch.bfloat16
    width: int = 64
    value_width: int | None = None  # width if None
    rows: int = 1569
    kept: int | None = 784  # None: no lists
    group: int = 1  # query heads a key head
    bias: bool = False
    causal: bool = False
    mask: torch.dtype | None = None
    packed: bool = False
    by_row: bool = False
    row_sq: bool = True
    tf32: bool = False

    def __str__(self) -> str:
        kind = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
        words = [kind, f"D{self.width}" + (f",{self.value_width}" if self.value_width else "")]
        words += [f"{self.rows}->{self.kept}" if self.kept else f"{self.rows}"]
        words += [word for word in ("bias", "causal", "packed", "by_row") if getattr(self, word)]
        words += [f"group{self.group}"] * (self.group > 1) + ["no row_sq"] * (not self.row_sq)
        words += [] if self.mask is None else ["bool mask" if self.mask == torch.bool else f"{str(self.mask).removeprefix('torch.')} mask"]
        return " ".join(words)


def _grid() -> list[Case]:
    """Every row of the tile table with the features that need the most registers."""
    kinds = ({"dtype": torch.bfloat16}, {"dtype": torch.float32}, {"dtype": torch.float32, "tf32": True})
    extras = (
        {"packed": True},
        {"bias": True, "causal": True, "group": 2},
        {"bias": True, "causal": True, "mask": torch.float32},
    )
    return [Case(width=width, **kind, **extra) for kind in kinds for width in (32, 64, 128, 256) for extra in extras]


CASES = [
    *_grid(),
    # the plain ones, which should be fastest
    *(Case(dtype=dtype, width=width) for dtype in (torch.bfloat16, torch.float16) for width in (64, 128)),
    Case(kept=None),
    Case(kept=None, packed=True),
    Case(kept=None, causal=True),
    Case(bias=True),
    Case(group=4),
    Case(group=3, bias=True),
    Case(by_row=True, row_sq=False),
    Case(mask=torch.bool),
    Case(mask=torch.bfloat16, kept=None),
    Case(width=72),
    Case(width=96),
    Case(width=40, value_width=24),
    Case(width=8, value_width=256),
    # short sequences
    *(Case(rows=rows, kept=None, width=width) for rows in (8, 32, 64) for width in (64, 128)),
    *(Case(rows=16, kept=None, width=width, bias=True, causal=True) for width in (32, 64, 256)),
    *(Case(rows=rows, kept=None, dtype=torch.float32) for rows in (8, 32)),
]
QUICK = [
    Case(),
    Case(bias=True, causal=True, group=2),
    Case(mask=torch.bool, width=128),
    Case(dtype=torch.float32),
    Case(rows=16, kept=None),
]


class Usage(NamedTuple):
    """What one kernel takes of one architecture."""

    kernel: str
    case: str
    arch: str
    tiles: str
    registers: int
    spills: int  # instructions that store to or load from the stack; scratch bytes on AMD
    shared: int
    promised: int  # tiles.py's estimate
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


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def problem(case: Case) -> AttentionProblem:
    batch, heads = (1 if case.packed else 2), 4 * case.group
    value_width = case.value_width or case.width
    index = None if case.kept is None else _meta(batch, 1, case.kept, dtype=torch.int32)
    bounds = _meta(9, dtype=torch.int32) if case.packed else None
    return AttentionProblem(
        query=_meta(batch, heads, case.rows, case.width, dtype=case.dtype),
        key=_meta(batch, 4, case.rows, case.width, dtype=case.dtype),
        value=_meta(batch, 4, case.rows, value_width, dtype=case.dtype),
        q_index=index,
        kv_index=index,
        kv_bias=_meta(batch, 4, case.rows) if case.bias else None,
        attn_mask=None if case.mask is None else _meta(1, 1, case.rows, case.rows, dtype=case.mask),
        is_causal=case.causal,
        scale=0.125,
        dropout_p=0.0,
        dropout_seed=None,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=None,
        max_seqlen_k=None,
    )


def run_launchers(case: Case) -> None:
    call = problem(case)
    batch, heads, rows, _ = call.query.shape
    slots = rows if case.kept is None else case.kept
    out = _meta(batch, heads, rows if case.by_row else slots, call.value.shape[-1], dtype=case.dtype)
    lse = _meta(batch, heads, slots)
    launchers.forward(call, out, lse, torch.empty_like(lse) if case.row_sq else None, case.by_row)
    if not case.by_row:
        bias = _meta(*call.key.shape[:3]) if case.bias else None
        grads = AttentionGradients(torch.empty_like(call.query), torch.empty_like(call.key), torch.empty_like(call.value), bias, None)
        launchers.backward(call, out, out, lse, grads)


def set_driver(arch: str) -> None:
    """Once a process: Triton keeps what it learned of a device."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler, unset it")
    from triton.runtime import driver

    driver.set_active(DeviceLessDriver(ARCHS[arch]))


def check(arch: str, case: Case) -> list[Usage]:
    """Compiles every kernel of the case, as the launchers do."""
    launch, usages = launchers._launch, []

    def watch(kernel: Any, programs: int, on: Tensor, tiles: Tiles, **arguments: Any) -> None:
        compiled = launch(kernel, programs, on, tiles, **arguments)
        usages.append(measure(arch, case, kernel.__name__, tiles, compiled))

    launchers._launch = watch
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    try:
        run_launchers(case)
    except Exception as error:
        complaint = f"{type(error).__name__}: {error}".splitlines()[0]
        usages.append(Usage("?", str(case), arch, "", 0, 0, 0, 0, ARCHS[arch].shared, 0, (complaint,)))
    finally:
        launchers._launch = launch
        torch.backends.cuda.matmul.fp32_precision = before
    return usages


def measure(arch: str, case: Case, kernel: str, tiles: Tiles, compiled: Any) -> Usage:
    limit = ARCHS[arch].shared
    registers, spills, code = read_hip(compiled) if ARCHS[arch].backend == "hip" else read_cuda(compiled)
    tensor_core = len(re.findall(rf"\b(?:{TENSOR_CORE[arch]})", code))
    shared = compiled.metadata.shared
    promised = limit
    if kernel in ATTENTION:
        masked = 0 if case.mask is None else case.mask.itemsize
        promised = shared_bytes(kernel, tiles, case.width, case.value_width or case.width, case.dtype.itemsize, masked)
    complaints = []
    if spills:
        complaints.append("spills")
    if shared > limit:
        complaints.append("too much shared memory")
    if shared > promised:
        complaints.append("more shared memory than tiles.py promised")
    if kernel in ATTENTION and not tensor_core and (case.dtype != torch.float32 or case.tf32):
        complaints.append("no tensor cores")
    shape = f"{tiles.block_q}x{tiles.block_k} w{tiles.num_warps} s{tiles.num_stages}"
    return Usage(kernel, str(case), arch, shape, registers, spills, shared, promised, limit, tensor_core, tuple(complaints))


def read_cuda(compiled: Any) -> tuple[int, int, str]:
    """Registers, spill instructions and SASS of a cubin, by the tools that come with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool.path, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in ((knobs.nvidia.cuobjdump, "-res-usage"), (knobs.nvidia.nvdisasm, "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    # a stack without loads or stores would be news, and no good one
    return int(found[1]), max(spills, int(found[2])), code


def read_hip(compiled: Any) -> tuple[int, int, str]:
    code = compiled.asm["amdgcn"]
    registers, scratch = (int(re.search(rf"\.{key}:\s*(\d+)", code)[1]) for key in ("vgpr_count", "private_segment_fixed_size"))  # type: ignore[index]
    return registers, scratch, code


COLUMNS = "{:<19} {:<36} {:<7} {:<15} {:>4} {:>7} {:>8} {:>8} {:>8} {:>7}  {}"


def show(usage: Usage) -> str:
    verdict = "; ".join(usage.complaints) or "ok"
    sizes = (f"{size / 1024:.1f}K" for size in (usage.shared, usage.promised, usage.limit))
    return COLUMNS.format(
        usage.kernel, usage.case, usage.arch, usage.tiles, usage.registers, usage.spills, *sizes, usage.tensor_core, verdict
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help=f"default: {', '.join(DEFAULT_ARCHS)}")
    parser.add_argument("--quick", action="store_true", help="a few cases, on sm_80 and sm_90 unless --arch says else")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    archs = options.arch or (["sm_80", "sm_90"] if options.quick else list(DEFAULT_ARCHS))
    cases = QUICK if options.quick else CASES
    print(COLUMNS.format("kernel", "case", "arch", "tiles", "regs", "spills", "shared", "promised", "limit", "tensor", ""))
    count, bad, start = 0, 0, time.monotonic()
    importlib.import_module("tokenops.triton.sparse_attention.kernels")
    for arch in archs:
        # a process serves one architecture; forked, so that they share what it took to import torch and Triton
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(options.jobs, context, initializer=set_driver, initargs=(arch,)) as pool:
            for usages in pool.map(check, [arch] * len(cases), cases):
                for usage in usages:
                    print(show(usage), flush=True)
                    count += 1
                    bad += bool(usage.complaints)
    print(f"{count} kernels, {bad} with complaints, {time.monotonic() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
