"""What a number depends on beside the code: recorded with every result, shown by ``tokenops info``, compared by ``tokenops compare``."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import tokenops

from .allocator import ISA_VARIABLES, MARKER, THRESHOLDS

PACKAGES = ("torch", "triton", "numpy", "av", "matplotlib")

# of the many CPU flags, those that kernels here or in torch ask for
CPU_FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16"),
)

VARIABLES = (
    *THRESHOLDS,
    *sorted({name for variables in ISA_VARIABLES.values() for name in variables}),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "LD_PRELOAD", "TOKENOPS_CPU_ISA", "TOKENOPS_CHECK"),
)

# two files whose values differ here come from different conditions: their ratio says little about the code
CONDITIONS = ("cpu", "cpu_flags", "cores", "device", "threads", "torch_isa", "restarted", "torch")


def environment(device: str = "cpu") -> dict[str, Any]:
    cpu = _cpu()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "cpu": cpu["name"],
        "cpu_flags": cpu["flags"],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "restarted": MARKER in os.environ,
        "tokenops": tokenops.__version__,
        **{name: package_version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        # virtual machines often hide the model's name
        name += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    present = fields.get("flags", "").split()
    return {"name": name, "flags": [flag for flag in CPU_FLAGS if flag in present]}


def _git_commit() -> str | None:
    """Of the checkout this file is tracked in, with a mark if that has local changes; None for an installed copy."""
    here = Path(__file__).resolve()
    try:
        for command in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]):
            answer = subprocess.run(["git", "-C", str(here.parent), *command], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
