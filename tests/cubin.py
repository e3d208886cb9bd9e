"""What a compiled GPU program takes of a GPU, by the tools that come with Triton."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple


class Kernel(NamedTuple):
    registers: int
    spills: int  # instructions that store to or load from the stack, or its bytes where there are more
    code: str  # SASS


def read(file: Path) -> dict[str, Kernel]:
    """The kernels of a cubin, by their mangled names."""
    from triton import knobs

    usage, code = (
        subprocess.run([tool.path, option, str(file)], capture_output=True, text=True, check=True).stdout
        for tool, option in ((knobs.nvidia.cuobjdump, "-res-usage"), (knobs.nvidia.nvdisasm, "-c"))
    )
    # one section of code a kernel, whose name begins it
    sections = dict(re.findall(r"\.section\s+\.text\.(\S+?),(.*?)(?=\.section\s|\Z)", code, re.DOTALL))
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    kernels = {}
    for name, registers, stack in found:
        spills = len(re.findall(r"\b(?:STL|LDL)\b", sections[name]))
        # a stack without loads or stores would be news, and no good one
        kernels[name] = Kernel(int(registers), max(spills, int(stack)), sections[name])
    return kernels
