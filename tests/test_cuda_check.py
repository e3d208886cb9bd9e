"""The CUDA C++ kernels compile without spilling; and the check that says so can say no."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cuda_check
import pytest

pytestmark = [
    pytest.mark.skipif(cuda_check.find_nvcc() is None, reason="nvcc is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton, whose tools read what nvcc compiled, is not installed"),
]

SPILLS = """
#include "launch.h"
namespace tokenops {
template <class T>
__global__ void tile_product(const T* from, T* to, int n) {
  T numbers[300];
  for (int i = 0; i < 300; ++i) numbers[i] = from[i];
  for (int i = 0; i < n; ++i) to[i] = numbers[from[i].bits % 300];
}
template __global__ void tile_product<bf16>(const bf16*, bf16*, int);
}  // namespace tokenops
"""

TOO_MUCH = """
#include "launch.h"
namespace tokenops {
struct Much { float numbers[60000]; };
__global__ void much(float* to) { to[0] = shared_memory<Much>().numbers[threadIdx.x]; }
}  // namespace tokenops
"""


def test_layouts_compile(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_check.main(["--source", "tile_product", "--arch", "sm_80", "--arch", "sm_90a"]) == 0
    header, *rows, summary = capsys.readouterr().out.splitlines()
    assert header.split() == ["source", "kernel", "arch", "regs", "spills", "tensor"]
    assert sorted(row.split()[1] for row in rows) == ["tile_product<bf16>"] * 2 + ["tile_product<f16>"] * 2
    assert all(row.endswith("  ok") and int(row.split()[5]) > 0 for row in rows)
    assert "4 kernels, 0 with complaints" in summary


@pytest.mark.parametrize(("source", "complaints"), [(SPILLS, ["spills", "no tensor cores"]), (TOO_MUCH, ["shared memory than there is"])])
def test_complaints(source: str, complaints: list[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.cu"
    file.write_text(source.replace('"launch.h"', f'"{cuda_check.ROOT}/csrc/cuda/launch.h"'))
    [usage] = cuda_check.check(file, "sm_90a")
    assert len(usage.complaints) == len(complaints)
    assert all(expected in complaint for expected, complaint in zip(complaints, usage.complaints, strict=True))


@pytest.mark.full
def test_every_kernel() -> None:
    assert cuda_check.main([]) == 0
