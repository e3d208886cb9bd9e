"""Long films in mode "exact": sums that are added to and subtracted from for many frames stay those of dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokenops

# relative error against float64, in any frame
BOUND = 2e-5
SHAPE = (1, 2, 48, 16)
SLOTS = 8

Change = Callable[[Tensor, torch.Generator], Tensor]


def replaced(rows: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(rows.shape, generator=generator)


def stirred(rows: Tensor, generator: torch.Generator) -> Tensor:
    """As a film does: a little in most frames; it neither grows nor vanishes."""
    return 0.98 * rows + 0.2 * torch.randn(rows.shape, generator=generator)


def peaked(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Now and then a key that owns most of the weight comes, and leaves again: what is left of a sum has lost its digits."""
    loud = torch.rand(rows.shape[:3], generator=generator)[..., None] < 0.1
    return torch.randn(rows.shape, generator=generator) * torch.where(loud, 4.0, 1.0)


CHANGES: dict[str, Change] = {"replaced": replaced, "stirred": stirred, "peaked": peaked}


def errors(name: str, frames: int, every: int, backend: str, device: str) -> Iterator[float]:
    """Relative errors of every so many frames."""
    change = CHANGES[name]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    _, state = tokenops.delta_attention(query.to(device), key.to(device), value.to(device), backend=backend)
    for frame in range(1, frames + 1):
        index = torch.randperm(SHAPE[2], generator=generator)[:SLOTS]
        for buffer in (query, key, value):
            buffer[:, :, index] = change(buffer[:, :, index], generator)
        call = (query.to(device), key.to(device), value.to(device), index.to(device), state)
        out = tokenops.delta_attention_(*call, backend=backend)
        if frame % every == 0:
            want = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
            yield float((out.cpu().double() - want).norm() / want.norm())


@pytest.mark.parametrize("name", CHANGES)
def test_300_frames(name: str, backend: str, device: str) -> None:
    assert max(errors(name, 300, 5, backend, device)) <= BOUND


@pytest.mark.full
@pytest.mark.parametrize("name", CHANGES)
def test_10000_frames(name: str, backend: str, device: str) -> None:
    """The last thousand are no worse than the first."""
    found = torch.tensor(list(errors(name, 10_000, 10, backend, device)))
    assert found.max() <= BOUND
    first, last = found[:100].median(), found[-100:].median()
    assert last <= 1.5 * first, (first, last)
