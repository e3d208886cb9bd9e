"""The CUDA kernels on the emulator: random calls of each room under several orders of threads, and with each barrier and wait left out."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

import emulator_calls
import pytest
from emulator_checks import RandomCalls, assert_every_site_counts, emulated, in_every_order
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = emulated

ROOMS = sorted(module.name for module in pkgutil.iter_modules(emulator_calls.__path__))
RANDOM_CALLS: dict[str, RandomCalls] = {
    f"{room}: {name}": calls for room in ROOMS for name, calls in importlib.import_module(f"emulator_calls.{room}").RANDOM_CALLS.items()
}


def check(name: str, data: Any) -> None:
    calls = RANDOM_CALLS[name]
    in_every_order(functools.partial(calls.check, data.draw(calls.calls)))


@pytest.mark.parametrize("name", RANDOM_CALLS)
@settings(max_examples=6)
@given(data=st.data())
def test_any_call_in_any_order(name: str, data: Any) -> None:
    check(name, data)


@pytest.mark.full
@pytest.mark.parametrize("name", RANDOM_CALLS)
@settings(max_examples=200)
@given(data=st.data())
def test_many_calls_in_any_order(name: str, data: Any) -> None:
    check(name, data)


@pytest.mark.full
@pytest.mark.parametrize("room", ROOMS)
def test_no_barrier_can_be_left_out(room: str) -> None:
    assert_every_site_counts(room)
