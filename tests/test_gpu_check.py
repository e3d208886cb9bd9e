"""The Triton kernels compile for GPUs that are not here, without spilling; and the check that says so can say no."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Triton decides at import whether it interprets, and the check's driver is for good: both take a process of its own
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_quick_check_has_no_complaints() -> None:
    ran = subprocess.run([sys.executable, HERE / "gpu_check.py", "--quick"], capture_output=True, text=True, env=ENVIRONMENT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    header, *rows, summary = ran.stdout.splitlines()
    assert header.split()[:5] == ["room", "kernel", "case", "arch", "blocks"]
    assert {row.split()[0] for row in rows} == {path.stem for path in (HERE / "gpu_cases").glob("[!_]*.py")}
    assert all(row.endswith("  ok") for row in rows)
    assert f"{len(rows)} kernels, 0 with complaints" in summary


def test_check_complains() -> None:
    """Tiles that spill, tiles that do not fit, products without tensor cores, and a kernel that does not compile."""
    program = """
import torch
import gpu_check
from gpu_cases.sparse_attention import Attention, launchers
from tokenops.triton.sparse_attention.tiles import Tiles

def complaints(tiles, case):
    launchers._tiles = lambda kernel, problem: Tiles(*tiles)
    return {usage.kernel: usage.complaints for usage in gpu_check.check("sm_80", "sparse_attention", case._replace(by_row=True))}

gpu_check.set_driver("sm_80")
print(complaints((128, 128, 4, 3), Attention(width=128)))
print(complaints((128, 64, 8, 4), Attention(width=256, dtype=torch.float32, tf32=True)))
print(complaints((64, 24, 4, 2), Attention()))
gpu_check.TENSOR_CORE["sm_80"] = "HGMMA"
print(complaints((64, 32, 4, 2), Attention()))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert ran.returncode == 0, ran.stderr
    spilled, too_much, broken, plain = ran.stdout.splitlines()
    assert "'spills'" in spilled
    assert "OutOfResources" in too_much
    assert "CompilationError" in broken
    assert plain == "{'forward': ('no tensor cores',)}"


def test_check_misses_a_kernel() -> None:
    """A kernel that no case compiles is a complaint."""
    program = """
import gpu_check
from gpu_cases import sparse_attention as cases
cases.QUICK = [cases.Attention(by_row=True)]
raise SystemExit(gpu_check.main(["--quick", "--room", "sparse_attention", "--arch", "sm_80"]))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert ran.returncode == 1, ran.stderr
    assert "sparse_attention backward_query is compiled by no case" in ran.stdout
    assert "1 kernels, 0 with complaints" in ran.stdout
