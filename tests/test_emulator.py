"""The emulator of CUDA that the CUDA kernels' numbers come from on a machine without a GPU: does it notice what it is there to notice?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokenops import native

pytestmark = pytest.mark.skipif(native.CUDA_DEVICE != "cpu" or native.CUDA_ABSENT is not None, reason=f"not emulated: {native.CUDA_ABSENT}")

ORDERS = (0, 1, 2, 3)


@pytest.fixture(params=ORDERS, ids=lambda seed: {0: "ascending", 1: "descending"}.get(seed, f"shuffled {seed}"))
def order(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of threads and blocks."""
    torch.ops.tokenops_emulator.set_order(request.param)
    yield request.param
    torch.ops.tokenops_emulator.set_order(0)


def _fault(name: str) -> tuple[Tensor, Tensor]:
    """What one block of 64 threads makes of 64 numbers, and the numbers."""
    out, x = torch.zeros(64), torch.randn(64, generator=torch.Generator().manual_seed(0))
    torch.ops.tokenops_emulator.fault(out, x, name)
    return out, x


def test_barrier(order: int) -> None:
    assert torch.equal(_fault("barrier")[0], (torch.arange(64.0) + 33) % 64)
    # what nobody has written yet is NaN
    assert _fault("no barrier")[0].isnan().any()


def test_wait(order: int) -> None:
    out, x = _fault("wait")
    assert torch.equal(out, x.flip(0))
    assert _fault("no wait")[0].isnan().any()


def test_left_out_barrier() -> None:
    """`skip` leaves out one barrier of a kernel that is right."""
    emulator = torch.ops.tokenops_emulator
    emulator.skip("")
    _fault("barrier")
    [site] = emulator.sites().split(",")
    try:
        emulator.skip(site)
        assert _fault("barrier")[0].isnan().any()
    finally:
        emulator.skip("")
    assert not _fault("barrier")[0].isnan().any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unfinished copy", r"ends with copies under way"),
        ("divergent block", r"divergent barrier: some threads wait at faults.cpp:\d+, others at faults.cpp:\d+"),
        ("divergent warp", r"thread 0 waits for lanes of its warp at faults.cpp:\d+, and they do not come"),
        ("divergent lanes", r"divergent lanes: some are at faults.cpp:\d+, others at faults.cpp:\d+"),
        ("overlapping masks", r"masks that overlap"),
        ("misaligned", r"not a multiple of 16"),
        ("outside", r"outside of shared memory"),
        ("too much shared memory", r"a kernel has 512 bytes of shared memory, and its launch gives it 256"),
    ],
)
def test_error(name: str, message: str, order: int) -> None:
    if order == 1 and name == "divergent warp":
        message = message.replace("thread 0", r"thread \d+")
    with pytest.raises(RuntimeError, match=message):
        _fault(name)
    # and the next launch is none the worse
    assert not _fault("barrier")[0].isnan().any()


def test_orders_differ() -> None:
    """A sum by atomics has another rounding in another order: were a kernel to depend on it, a test under two orders would show it."""
    sums = set()
    for seed in range(8):
        torch.ops.tokenops_emulator.set_order(seed)
        sums.add(_fault("order")[0][0].item())
    torch.ops.tokenops_emulator.set_order(0)
    assert len(sums) > 1
