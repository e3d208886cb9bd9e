"""Keeps page faults out of the numbers.

glibc gives a large block back to the kernel as soon as it is freed. A tensor that is allocated and freed inside the timed call then pays
for fresh zeroed pages every time, which can double the time of every contender and hides their differences. glibc reads its thresholds
when a process starts, so the benchmark starts itself again with higher ones, and then touches a pool of memory once: with the thresholds
alone, blocks still reach pages that nobody touched yet for dozens of calls.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

MARKER = "TOKENOPS_BENCH_RESTARTED"

THRESHOLDS = {
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}

# each library looks at its own variable; on some CPUs MKL ignores its one, so the roof measured in the same run is what counts
ISA_VARIABLES = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}


def restart_environment(environment: Mapping[str, str], isa: str | None = None) -> dict[str, str] | None:
    """The environment to start again with, or None if this process has already been started so, or need not be."""
    if MARKER in environment:
        return None
    glibc = platform.libc_ver()[0] == "glibc"
    if not glibc and isa is None:
        return None
    # thresholds that the user has set stay
    return {**(THRESHOLDS if glibc else {}), **environment, **(ISA_VARIABLES[isa] if isa else {}), MARKER: "1"}


def restart(arguments: Sequence[str], isa: str | None = None) -> None:
    """Replaces this process by one with the raised thresholds; returns only if that is not needed."""
    environment = restart_environment(os.environ, isa)
    if environment is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, "-m", __package__, *arguments], environment)


def touch_pool(size: int = 1 << 30, piece: int = 1 << 18) -> int:
    """Writes to ``size`` bytes once (at most a quarter of what is free), so that later blocks find their pages present. Bytes touched.

    In pieces, because they also fill the gaps between blocks in use, whose pages ``added_memory`` gives back.
    """
    if platform.libc_ver()[0] != "glibc" or MARKER not in os.environ:
        return 0
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = min(size, free // 4)
    pieces = [torch.ones(piece, dtype=torch.uint8) for _ in range(size // piece)]
    return len(pieces) * piece


def added_memory(call: Callable[[], object]) -> int | None:
    """Bytes that ``call`` adds to this process at its peak, results included. Counts pages, so it sees what any library allocates: torch's
    own statistics miss the scratch space of a kernel or of MKL. None where the system does not keep a peak that can be reset."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if platform.libc_ver()[0] != "glibc" or not reset.exists():
        return None
    # free blocks go back to the kernel: a call that reuses them adds their pages again
    ctypes.CDLL(None).malloc_trim(0)
    before = _status_bytes(status.read_text(), "VmRSS")
    try:
        # 5: the peak becomes the present size
        reset.write_text("5")
    except OSError:
        return None
    results = call()
    peak = _status_bytes(status.read_text(), "VmHWM")
    del results
    return peak - before


def _status_bytes(status: str, field: str) -> int:
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def page_faults() -> int | None:
    """Pages this process had to fetch so far."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
