"""What all tests share: backends, a device, one thread, and memory that shows what nobody wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from oracle import Call, objections

from tokenops.ops.sparse_attention import BACKENDS
from tokenops.reference.sparse_attention import example_inputs

# `make gpu-test` sets it to cuda
DEVICE = os.environ.get("TOKENOPS_TEST_DEVICE", "cpu")

# the same examples every time here; `make test-full` draws new ones
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("full", deadline=None, print_blob=True)
settings.load_profile("repeatable")


def _refusals() -> dict[str, list[str]]:
    simple = example_inputs(1, 1, 8, width=8, device=DEVICE)
    return {backend.name: objections(backend.name, simple) for backend in BACKENDS}


REFUSALS = _refusals()
AVAILABLE = [name for name, reasons in REFUSALS.items() if not reasons]


@pytest.fixture(params=AVAILABLE, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here. Which cannot, and why, is reported by test_dispatch.py."""
    return request.param


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
