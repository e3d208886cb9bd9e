"""The Triton kernels' numbers, forward and every gradient, by Triton's interpreter in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from triton_checks import all_checks

HERE = Path(__file__).parent
# the slowest check takes a few seconds; a kernel that never ends must not hold up the run
PATIENCE = 120

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Worker:
    """A process that runs checks, one after the other, and is replaced when one of them kills it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, name: str) -> dict[str, str]:
        """Empty if the check passed, else the "failure" or the backend's "refusal"."""
        if self.process is None:
            environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self.process = subprocess.Popen(
                [sys.executable, HERE / "triton_interpreter.py"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(json.dumps(name), file=process.stdin, flush=True)
            ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
            answer = process.stdout.readline() if ready else None
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        self.stop()
        if answer is None:
            return {"failure": f"no answer in {PATIENCE} s"}
        return {"failure": f"the interpreter died (exit status {process.returncode}): a load or store out of bounds?"}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.stop()


# take 6 to 30 s each
LONG = {
    "token_merge_soft: tokens give away what they have at any temperature",
    "token_merge_soft: lengths neither overflow nor vanish",
    "token_merge_segments: bad plans stay inside",
    "sparse_attention: positions and long ragged lists, fp32",
    "sparse_attention: positions in a window, fp32",
}


def _checks() -> list[object]:
    """The interpreter is slow. For the long run are the longest checks, and where a case is not tried in float16, its bfloat16 form."""
    names = all_checks()
    assert names.keys() >= LONG
    long = LONG | {name for name in names if name.endswith(", bf16") and f"{name.removesuffix('bf16')}fp16" not in names}
    return [pytest.param(name, marks=pytest.mark.full) if name in long else name for name in names]


@pytest.mark.parametrize("name", _checks())
def test_interpreted(name: str, worker: Worker) -> None:
    answer = worker.run(name)
    if "refusal" in answer:
        pytest.skip(answer["refusal"])
    if "failure" in answer:
        pytest.fail(answer["failure"], pytrace=False)
