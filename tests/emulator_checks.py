"""What the tests of the emulated CUDA kernels share: thread orders, and what becomes of random calls when a barrier or a wait is left out.

``python tests/emulator_checks.py token_select`` leaves out, one at a time, every barrier and wait that the random calls of that room
(emulator_calls/) meet, and prints for each, as a line of JSON, what was noticed. A kernel without one may write anywhere or never end, so
each is tried in a process of its own.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from tokenops import native

HERE = Path(__file__).parent
KERNELS = HERE.parent / "csrc" / "cuda"
ROOMS = ("delta_matmul", "sparse_attention", "token_merge", "token_select")
# of threads and blocks: ascending, descending, shuffled
ORDERS = (0, 1, 2)
# how many random calls a kernel without a barrier gets to show it
EXAMPLES = 100
# seconds for them; they take a few
PATIENCE = 120

emulated = pytest.mark.skipif(native.CUDA_DEVICE != "cpu" or native.CUDA_ABSENT is not None, reason=f"not emulated: {native.CUDA_ABSENT}")


class RandomCalls(NamedTuple):
    """Of some kernels of a room, those that one call runs."""

    calls: SearchStrategy[Any]
    # runs a call on backend "cuda", forward and backward, asserts that everything is right, and returns all results
    check: Callable[[Any], Iterable[Tensor]]


def in_every_order(check: Callable[[], Iterable[Tensor]]) -> None:
    """Right in every order of threads and blocks, and the same to the last bit."""
    emulator = torch.ops.tokenops_emulator
    first: list[Tensor] = []
    try:
        for order in ORDERS:
            emulator.set_order(order)
            results = list(check())
            for got, want in zip(results, first or results, strict=True):
                assert torch.equal(got.nan_to_num(), want.nan_to_num()), f"other bits in order {order}"
            first = first or results
    finally:
        emulator.set_order(0)


def assert_every_site_counts(room: str) -> None:
    """No barrier or wait of the room's kernels can be left out without a check's noticing, and its random calls meet all of them. What they
    meet of other rooms' kernels, those rooms' calls try."""
    command = [sys.executable, str(HERE / "emulator_checks.py"), room]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} failed"
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    others = tuple(other for other in ROOMS if other != room)
    idle = [f"{site} of {kernels}" for kernels, site, noticed in answers if not noticed and not site.startswith(others)]
    assert not idle, f"can be left out: {', '.join(idle)}"
    written = {f"{file.name}:{number}" for file in KERNELS.glob(f"{room}*") for number in _waits(file.read_text())}
    missed = written - {site for _, site, _ in answers}
    assert not missed, f"no call meets {', '.join(sorted(missed))}"


def _waits(source: str) -> Iterator[int]:
    """The lines with a barrier or a wait that the emulator can leave out."""
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(r"__syncthreads\(\)|__syncwarp\(|cp_async_wait<", line):
            yield number


def _explore(kernels: RandomCalls) -> None:
    """The same random calls every time; raises at the first that is not right."""

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(call=kernels.calls)
    def explore(call: Any) -> None:
        in_every_order(functools.partial(kernels.check, call))

    explore()


def _notices(kernels: RandomCalls, site: str) -> str:
    """What shows that a site is left out; empty if nothing does."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.ops.tokenops_emulator.skip(site)
            _explore(kernels)
            status = 0
        except BaseException:
            pass
        finally:
            # nothing that the parent has begun must be finished here
            os._exit(status)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "", 1: "a wrong result"}.get(code, f"a crash ({code})")
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"no end in {PATIENCE} s"


def main(room: str) -> None:
    # what a test module finds under pytest: the emulated kernels, and hypothesis's profiles
    importlib.import_module("conftest")
    torch.set_num_threads(1)
    # torch.empty gives NaN, so a result that a kernel left out shows
    torch.use_deterministic_algorithms(True)
    emulator = torch.ops.tokenops_emulator
    groups: dict[str, RandomCalls] = importlib.import_module(f"emulator_calls.{room}").RANDOM_CALLS
    for name, kernels in groups.items():
        emulator.skip("")
        _explore(kernels)
        for site in filter(None, emulator.sites().split(",")):
            print(json.dumps([name, site, _notices(kernels, site)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
