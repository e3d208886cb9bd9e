"""What all tests share: backends, a device, one thread, and memory that shows what nobody wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from oracle import Call, objections, problem_of

from tokenops import native
from tokenops.ops import delta_matmul, sparse_attention, token_merge, token_select
from tokenops.reference.sparse_attention import example_inputs as sparse_attention_inputs

# `make gpu-test` sets it to cuda
DEVICE = os.environ.get("TOKENOPS_TEST_DEVICE", "cpu")

# the same examples every time here; `make test-full` draws new ones
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("full", deadline=None, print_blob=True)
settings.load_profile("repeatable")


if DEVICE == "cpu":
    # the CUDA kernels run on an emulator, where that is built; test_dispatch.py says so where it is not
    native.emulate_cuda()

# a simple call of each room: a backend that objects to it cannot run here
ROOMS = {
    "delta_matmul": (delta_matmul.BACKENDS, torch.zeros(1, 8, 8, device=DEVICE)),
    "sparse_attention": (sparse_attention.BACKENDS, problem_of(sparse_attention_inputs(1, 1, 8, width=8, device=DEVICE))),
    "token_merge": (token_merge.BACKENDS, torch.zeros(1, 8, 8, device=DEVICE)),
    "token_select": (token_select.BACKENDS, torch.zeros(1, 8, device=DEVICE)),
}
# what the call has to serve besides: every test of attention wants a gradient too
NEEDS = {"sparse_attention": {"needs": ("query",)}}
REFUSALS = {
    room: {backend.name: backend.objections(call, **NEEDS.get(room, {})) for backend in backends}
    for room, (backends, call) in ROOMS.items()
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", help="only tests of this backend, which must be able to run; repeatable")
    parser.addoption("--unnamed", action="store_true", help="only tests on the device that leave it to the call which backend serves")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --backend, what no backend takes part in is left out; --unnamed is for that of it which runs on the device."""
    named, unnamed = config.getoption("--backend"), config.getoption("--unnamed")
    if named or unnamed:
        used = [(item, getattr(item, "fixturenames", ())) for item in items]
        items[:] = [item for item, names in used if ("backend" in names if named else "device" in names and "backend" not in names)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``backend``: every backend of the room that can run here. Which cannot, and why, is reported by test_dispatch.py."""
    if "backend" not in metafunc.fixturenames:
        return
    # test_<room>*.py
    file = metafunc.module.__name__.removeprefix("test_")
    [room] = [room for room in ROOMS if file.startswith(room)] or ["sparse_attention"]
    asked = metafunc.config.getoption("--backend")
    for name in asked or ():
        # or a GPU whose library does not load would pass its tests, all of them skipped
        if REFUSALS[room].get(name):
            raise pytest.UsageError(f"--backend={name} cannot run here: {'; '.join(REFUSALS[room][name])}")
    available = [name for name, reasons in REFUSALS[room].items() if not reasons and (not asked or name in asked)]
    metafunc.parametrize("backend", available, scope="session")


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so a result that a kernel left out shows. It comes with deterministic mode, in which no backend may object."""
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def serve(backend: str):
    """Name of a backend that serves the call, or the test is skipped with the backend's reasons."""

    def check(call: Call, needs: tuple[str, ...] = ()) -> str:
        reasons = objections(backend, call, needs)
        if reasons:
            pytest.skip(f"{backend}: {'; '.join(reasons)}")
        return backend

    return check
