"""Masks and lists of row ids: against simple loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokenops


def loop(row: list[bool], width: int) -> tuple[list[int], int]:
    ids = [n for n, kept in enumerate(row) if kept][:width]
    return ids + [-1] * (width - len(ids)), len(ids)


@pytest.mark.parametrize("shape", [(9,), (2, 9), (2, 3, 9), (2, 0), (0, 9), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("max_k", [None, 0, 1, 4, 9, 13])
@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_index_from_mask_is_a_loop(shape: tuple[int, ...], max_k: int | None, chance: float, device: str) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < chance
    index, count = tokenops.index_from_mask(mask.to(device), max_k)
    width = shape[-1] if max_k is None else max_k
    assert index.shape == (*shape[:-1], width)
    assert count.shape == shape[:-1]
    assert index.dtype == count.dtype == torch.int32
    rows, lists = (torch.atleast_2d(x).flatten(0, -2) for x in (mask, index))
    for row, ids, number in zip(rows, lists, count.flatten(), strict=True):
        assert (ids.tolist(), number.item()) == loop(row.tolist(), width)


@given(st.lists(st.booleans(), max_size=40))
def test_there_and_back(row: list[bool]) -> None:
    mask = torch.tensor(row, dtype=torch.bool)
    index = tokenops.index_from_mask(mask)
    assert torch.equal(tokenops.mask_from_index(index, len(row)), mask)
    assert torch.equal(tokenops.mask_from_index(index.index.flip(0), len(row)), mask)


def test_mask_from_index(device: str) -> None:
    index = torch.tensor([[3, -1, 0], [-1, -1, 9]], device=device)
    want = torch.tensor([[True, False, False, True], [False] * 4], device=device)
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(tokenops.mask_from_index(index.to(dtype), 4), want)
    assert tokenops.mask_from_index(index, 4).is_contiguous()
    assert tokenops.mask_from_index(index, 0).shape == (2, 0)


def test_an_index_from_a_mask_selects_what_the_mask_shows(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 19, 16, generator=generator).to(device) for _ in range(3))
    mask = (torch.rand(2, 19, generator=generator) < 0.5).to(device)
    got = tokenops.sparse_attention(q, k, v, kv_index=tokenops.index_from_mask(mask))
    want = tokenops.sparse_attention(q, k, v, mask[:, None, None])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("max_k", [None, 0, 3, 40])
@pytest.mark.parametrize("bounds", [[0, 9, 9, 20], [0], [0, 0], [3, 9], [0, 25]], ids=str)
def test_a_packed_mask_gives_each_sample_its_list(bounds: list[int], max_k: int | None, device: str) -> None:
    mask = torch.rand(25, generator=torch.Generator().manual_seed(0)) < 0.6
    index, count = tokenops.index_from_mask(mask.to(device), max_k, cu_seqlens=torch.tensor(bounds, device=device))
    width = 25 if max_k is None else max_k
    assert index.shape == (len(bounds) - 1, width)
    assert index.dtype == count.dtype == torch.int32
    for ids, number, first, last in zip(index, count, bounds[:-1], bounds[1:], strict=True):
        want = [n for n in range(first, last) if mask[n]][:width]
        assert number == len(want)
        assert ids.tolist() == want + [-1] * (width - len(want))


def test_vmap_is_a_loop(device: str) -> None:
    masks = torch.rand(4, 19, generator=torch.Generator().manual_seed(0)).to(device) > 0.5
    assert torch.equal(torch.vmap(lambda mask: tokenops.mask_from_index(tokenops.index_from_mask(mask), 19))(masks), masks)


@pytest.mark.parametrize(
    ("mask", "max_k", "error", "message"),
    [
        ([True], None, TypeError, "mask must be a Tensor, got list"),
        (torch.ones(3), None, TypeError, "mask must be bool, got torch.float32"),
        (torch.ones(1, 1, 1, 3, dtype=torch.bool), None, ValueError, r"mask must be \[N\] \| \[B, N\] \| \[B, H, N\], got \[1, 1, 1, 3\]"),
        (torch.tensor(True), None, ValueError, r"mask must be .*, got \[\]"),
        (torch.ones(3, dtype=torch.bool), -1, ValueError, "max_k must not be negative, got -1"),
    ],
)
def test_bad_mask(mask: Tensor, max_k: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tokenops.index_from_mask(mask, max_k)


@pytest.mark.parametrize(
    ("index", "n", "error", "message"),
    [
        ([1], 3, TypeError, "index must be a Tensor, got list"),
        (torch.ones(3), 3, TypeError, "index must be int32 or int64, got torch.float32"),
        (torch.zeros(1, 1, 1, 3, dtype=torch.int32), 3, ValueError, r"index must be \[K\] \| \[B, K\] \| \[B, H, K\], got \[1, 1, 1, 3\]"),
        (torch.zeros(3, dtype=torch.int32), -1, ValueError, "n must not be negative, got -1"),
    ],
)
def test_bad_index(index: Tensor, n: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tokenops.mask_from_index(index, n)


def test_bad_packed_mask() -> None:
    mask, bounds = torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"mask must be \[T\] with cu_seqlens, got \[2, 3\]"):
        tokenops.index_from_mask(mask, cu_seqlens=bounds)
    with pytest.raises(TypeError, match=r"cu_seqlens must be int32 or int64, got torch.float32"):
        tokenops.index_from_mask(mask[0], cu_seqlens=bounds.float())
