"""The first hour on a GPU, in minutes: ``make gpu-test``.

First one tile of a matrix product, which says whether the emulator has its instructions right. Then, beside each other and each in a
process of its own: compute-sanitizer over calls of every operation, the tests of every operation on both GPU backends, file by file, and
those that name no backend (compiled, exported and mapped calls).
What fails does not keep the rest from running. ``--device cpu`` rehearses it: the CUDA kernels run emulated, and there is no sanitizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOMS = ("sparse_attention", "token_select", "token_merge", "delta_matmul")
# of compute-sanitizer
TOOLS = ("memcheck", "racecheck")
# what our kernels' mangled names have in them: torch's are watched elsewhere, and take time
OURS = ("--kernel-regex", "kns=8tokenops")
# Triton compiles several kernels for almost every test: the largest files are shared out among processes
SHARED = 25_000  # bytes
# every tensor a block of its own: in torch's pool the bytes behind one are another's, and no error
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class Result(NamedTuple):
    step: str
    seconds: float
    status: int | None  # None: it was cut off
    output: str


def run(step: str, command: Sequence[str | Path], device: str, limit: float, variables: Mapping[str, str] | None = None) -> Result:
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TOKENOPS_TEST_DEVICE": device, "PYTHONPATH": path, **(variables or {})}
    run_here = partial(subprocess.run, cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    start = time.monotonic()
    try:
        ran = run_here(command, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as cut:
        output = cut.stdout.decode() if isinstance(cut.stdout, bytes) else cut.stdout or ""
        return Result(step, time.monotonic() - start, None, output)
    return Result(step, time.monotonic() - start, ran.returncode, ran.stdout)


def report(result: Result) -> bool:
    """Prints a line, and of what failed the end; whether it passed."""
    # pytest: no test was chosen
    passed = result.status in (0, 5)
    lines = result.output.strip().splitlines()
    verdict = "cut off" if result.status is None else "passed" if passed else f"FAILED ({result.status})"
    print(f"{result.step:44} {result.seconds:6.0f} s  {verdict:12} {lines[-1] if lines else ''}", flush=True)
    if not passed:
        print("\n".join(f"    {line}" for line in lines[-60:]), flush=True)
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=5.0, help="what is not done by then is cut off (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=min(16, len(os.sched_getaffinity(0))), help="files beside each other")
    parser.add_argument("-k", dest="expression", default="", help="only tests that match, as pytest's -k")
    options = parser.parse_args(arguments)
    stop = time.monotonic() + 60 * options.minutes
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

    def left() -> float:
        return max(1.0, stop - time.monotonic())

    good = report(run("one tile of a matrix product", [*pytest, HERE / "test_tile_product.py"], options.device, left()))
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin:{os.environ['PATH']}")
    calls = [sys.executable, HERE / "gpu_calls.py", options.device]
    steps: list[tuple[str, list[str | Path], Mapping[str, str]]] = []
    if options.device == "cuda" and sanitizer:
        steps += [(tool, [sanitizer, "--tool", tool, *OURS, "--error-exitcode", "9", *calls], UNPOOLED) for tool in TOOLS]
    else:
        print("compute-sanitizer: not here; the calls run without it")
        steps.append(("calls of every operation", calls, {}))
    pytest += ["-k", options.expression] if options.expression else []
    files = [file for room in ROOMS for file in HERE.glob(f"test_{room}*.py")]
    beside = ["-n", "4", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    steps.append(("what names no backend", [*pytest, *beside, "--unnamed", *files], {}))
    # what takes longest first
    for backend in ("triton", "cuda") if options.device == "cuda" else ("cuda",):
        for file in sorted(files, key=lambda file: -file.stat().st_size):
            shared = beside if backend == "triton" and file.stat().st_size > SHARED else []
            steps.append((f"{file.stem}, {backend}", [*pytest, *shared, f"--backend={backend}", file], {}))
    with ThreadPoolExecutor(options.jobs) as pool:
        # the limit is what is left when a step begins
        begun = [pool.submit(lambda step: run(*step[:2], options.device, left(), step[2]), step) for step in steps]
        for done in as_completed(begun):
            good &= report(done.result())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
