"""What ``tokenops info`` shows: everything a bug report should say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

import tokenops
from tokenops import native
from tokenops.ops import preference

from .environment import PACKAGES, environment

LIBRARIES = {"_C_cpu": native.CPU_ABSENT, "_C_cuda": native.CUDA_ABSENT}


def build_record(library: str) -> dict[str, Any] | None:
    """What the build wrote beside a library: compiler, targets, torch."""
    path = Path(tokenops.__file__).parent / f"{library}.json"
    return json.loads(path.read_text()) if path.exists() else None


def print_info(out: Console, rooms: list[ModuleType]) -> None:
    env = environment()
    versions = {"tokenops": f"{env['tokenops']} (git {env['git'] or '-'})", "Python": env["python"]}
    _section(out, "versions", {**versions, **{name: env[name] or "not installed" for name in PACKAGES}})
    isas = native.cpu_isas()
    has_gpu = torch.cuda.is_available()
    _section(
        out,
        "machine",
        {
            "cpu": f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads in use",
            "cpu flags": " ".join(env["cpu_flags"]) or "-",
            "torch runs": env["torch_isa"],
            "tokenops runs": f"{native.default_cpu_isa()} (has {', '.join(isas)})" if isas else "no C++ kernels",
            "gpu": torch.cuda.get_device_name() if has_gpu else f"no device (torch built for CUDA: {torch.version.cuda})",
            **env["variables"],
        },
    )
    for library, absent in LIBRARIES.items():
        _section(out, library, {"state": absent or "loaded", **(build_record(library) or {})})
    preferences = {f"{room}: {rule.calls}": rule.backend for room, rules in preference.RULES.items() for rule in rules}
    _section(out, f"on a GPU, where no backend is named ({preference.ORIGIN})", preferences)
    devices = ["cpu", "cuda"] if has_gpu else ["cpu"]
    for room in rooms:
        name = room.__name__.rpartition(".")[2]
        for device in devices:
            verdicts = {backend: "; ".join(reasons) or "on" for backend, reasons in room.example_objections(device).items()}
            _section(out, f"{name} on {device} (float32, forward and backward)", verdicts)


def _section(out: Console, title: str, rows: dict[str, Any]) -> None:
    out.print(f"[bold]{title}[/]")
    width = max(map(len, rows))
    for name, value in rows.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        out.print(f"  {name:{width}}  {text}", soft_wrap=True, markup=False)
    out.print()
