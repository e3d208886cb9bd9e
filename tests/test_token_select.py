"""Choosing tokens by score, on every backend: against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_select_oracle import SCORES, same_bits, scores, select_loop
from torch import Tensor

import tokenops
from tokenops.reference import token_select as reference
from tokenops.types import TokenIndex

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_right(score: Tensor, width: int, backend: str | None, *, protect: int = 0, k: int | None = None, **how: object) -> TokenIndex:
    """Every list is the loop's. Returns them."""
    threshold = how.get("threshold")
    given = {**how, "k": k} if k is not None else how
    index, count = tokenops.select_tokens(score, protect=protect, backend=backend, **given)
    assert index.shape == (*score.shape[:-1], width)
    assert count.shape == score.shape[:-1]
    assert index.dtype == count.dtype == torch.int32
    rows, lists = (t.reshape(math.prod(t.shape[:-1]), t.shape[-1]).tolist() for t in (score.double(), index))
    for row, ids, number in zip(rows, lists, count.flatten().tolist(), strict=True):
        want = select_loop(row, width, threshold, protect)
        assert number == len(want)
        assert ids == want + [-1] * (width - len(want))
    return TokenIndex(index, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SCORES)
def test_k_best(kind: str, dtype: torch.dtype, backend: str, device: str) -> None:
    score = scores(2, 3, 61, dtype=dtype, kind=kind).to(device)
    for k in (0, 1, 17, 60, 61):
        assert_right(score, k, backend, k=k)
    for k in (5, 30):
        assert_right(score, k, backend, k=k, protect=5)


def test_scores_are_not_rounded(device: str) -> None:
    # in float32 they would be equal
    score = 1.0 + scores(2, 61, dtype=torch.float64).to(device) * 1e-12
    assert_right(score, 20, None, k=20)
    assert_right(score, 61, None, threshold=1.0 + 1e-13)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_any_floating_dtype_is_served(dtype: torch.dtype, device: str) -> None:
    score = scores(2, 61, kind="ties").to(device, dtype)
    assert_right(score, 20, None, k=20, protect=1)
    assert_right(score, 30, None, threshold=0.5, max_k=30)
    with pytest.raises(NotImplementedError, match=f"{str(dtype).removeprefix('torch.')} is served by the reference only"):
        tokenops.select_tokens(score, k=20, backend="cpu")


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 255, 256, 257, 1000, 4133, 20001])
def test_any_length(tokens: int, kind: str, backend: str, device: str) -> None:
    score = scores(2, tokens, kind=kind, seed=tokens).to(device)
    for k in {1, tokens // 4, tokens // 2, tokens - 1} if tokens < 2000 else {tokens // 3}:
        assert_right(score, k, backend, k=k, protect=min(1, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SCORES)
def test_threshold_is_strict(kind: str, dtype: torch.dtype, backend: str, device: str) -> None:
    score = scores(3, 61, dtype=dtype, kind=kind).to(device)
    for threshold in (0.25, 0.0, -0.0, -torch.inf, torch.inf, 1.5):
        assert_right(score, 61, backend, threshold=threshold)
        assert_right(score, 61, backend, threshold=threshold, protect=3)
        assert_right(score, 9, backend, threshold=threshold, max_k=9, protect=3)
        assert_right(score, 80, backend, threshold=threshold, max_k=80)
        assert_right(score, 0, backend, threshold=threshold, max_k=0)


def test_a_threshold_is_not_rounded_to_a_half_type(backend: str, device: str) -> None:
    # 0.9 would become 0.8984375 in bfloat16, and the score would not be greater
    score = torch.tensor([0.8984375, 0.90234375], dtype=torch.bfloat16, device=device)
    assert tokenops.select_tokens(score, threshold=0.898, backend=backend).count == 2
    assert tokenops.select_tokens(score, threshold=0.9, backend=backend).index.tolist() == [1, -1]


def test_fraction_is_rounded_down_as_python_does(backend: str, device: str) -> None:
    score = scores(2, 100).to(device)
    for fraction in (0.0, 0.29, 0.5, 0.57, 1.0):
        assert_right(score, math.floor(fraction * 100), backend, fraction=fraction)
    # 0.29 * 100 is 28.999...
    assert tokenops.select_tokens(score, fraction=0.29, backend=backend).index.shape == (2, 28)


def test_k_is_capped_unless_strict(backend: str, device: str) -> None:
    score = scores(2, 7).to(device)
    assert_right(score, 7, backend, k=9)
    assert_right(score, 7, backend, k=7, strict=True)
    with pytest.raises(ValueError, match=r"k must be at most the number of tokens 7 \(strict=True\), got 8"):
        tokenops.select_tokens(score, k=8, strict=True, backend=backend)


def test_protected_tokens_are_kept_whatever_their_score(backend: str, device: str) -> None:
    score = torch.tensor([-torch.inf, torch.nan, 3.0, 1.0, 2.0], device=device)
    assert tokenops.select_tokens(score, k=3, protect=2, backend=backend).index.tolist() == [0, 1, 2]
    assert tokenops.select_tokens(score, threshold=1.5, protect=2, backend=backend).index.tolist() == [0, 1, 2, 4, -1]
    assert tokenops.select_tokens(score, threshold=9.0, protect=2, max_k=2, backend=backend).index.tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5), (0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str, device: str) -> None:
    score = torch.zeros(shape, device=device)
    assert_right(score, min(3, shape[-1]), backend, k=3)
    assert_right(score, shape[-1], backend, threshold=0.0)
    assert_right(score, 4, backend, threshold=-1.0, max_k=4)


def test_any_layout(backend: str, device: str) -> None:
    score = scores(6, 2, 40).to(device)
    for view in (score.transpose(0, 1), score[::2], score[..., ::2], score[:1].expand(4, -1, -1), score.transpose(0, 2), score[..., 3:20]):
        assert_right(view, min(7, view.shape[-1]), backend, k=7)


def test_nan_sorts_below_everything() -> None:
    score = torch.tensor([[torch.nan, -torch.inf, 1.0, torch.nan, 2.0, -torch.nan]])
    for k, want in ((1, [4]), (2, [2, 4]), (3, [1, 2, 4]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4]), (6, [0, 1, 2, 3, 4, 5])):
        index, count = reference.selection(score, k, None, 0)
        assert index.tolist() == [want]
        assert count.tolist() == [k]
    assert reference.selection(score, 6, -torch.inf, 0).index.tolist() == [[2, 4, -1, -1, -1, -1]]
    assert reference.selection(score, 3, None, 1).index.tolist() == [[0, 2, 4]]


@pytest.mark.parametrize("how", [{"k": 1}, {"k": 40}, {"threshold": 0.0}], ids=str)
@pytest.mark.parametrize("at", [3, 39])
def test_nan_is_reported(at: int, how: dict[str, float], backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENOPS_CHECK", "1")
    score = scores(3, 40).to(device)
    score[1, at] = torch.nan
    with pytest.raises(ValueError, match=f"score must not be NaN, got NaN for token {at} of list 1"):
        tokenops.select_tokens(score, backend=backend, **how)


def test_of_equal_scores_the_lowest_ids_are_kept(backend: str, device: str) -> None:
    score = torch.zeros(2, 3000, device=device)
    score[1, 1::2] = -0.0
    index = tokenops.select_tokens(score, k=1234, backend=backend).index
    assert torch.equal(index, torch.arange(1234, dtype=torch.int32, device=device).expand(2, -1))


def test_bits_depend_neither_on_the_run_nor_on_threads(backend: str, device: str) -> None:
    for shape in ((1, 60000), (7, 900)):
        score = scores(*shape, kind="ties").to(device)
        same_bits(lambda score=score: tokenops.select_tokens(score, k=score.shape[1] // 3, backend=backend), (1, 1, 2, 4, 3))


LENGTHS = st.integers(1, 90)


@st.composite
def calls(draw: st.DrawFn, lengths: st.SearchStrategy[int] = LENGTHS) -> tuple[Tensor, int, dict[str, object]]:
    tokens, batch = draw(lengths), draw(st.integers(1, 3))
    score = scores(batch, tokens, dtype=draw(st.sampled_from(DTYPES)), kind=draw(st.sampled_from(SCORES)), seed=draw(st.integers(0, 999)))
    if draw(st.booleans()):
        width = draw(st.integers(0, tokens))
        how: dict[str, object] = {"k": width}
    else:
        width = draw(st.integers(0, tokens + 5))
        how = {"threshold": draw(st.sampled_from((-1.0, 0.0, 0.5, float(score[0, 0])))), "max_k": width}
    return score, width, {**how, "protect": draw(st.integers(0, min(width, tokens)))}


@settings(max_examples=150)
@given(call=calls())
def test_any_call_is_the_loop(call: tuple[Tensor, int, dict[str, object]], backend: str, device: str) -> None:
    score, width, how = call
    assert_right(score.to(device), width, backend, **how)


ERRORS = {
    "no tensor": (([1.0],), {"k": 1}, TypeError, "score must be a Tensor, got list"),
    "integers": ((torch.ones(3, dtype=torch.int32),), {"k": 1}, TypeError, "score must be floating, got torch.int32"),
    "rank": ((torch.ones(1, 1, 1, 3),), {"k": 1}, ValueError, r"score must be \[N\] \| \[B, N\] \| \[B, H, N\], got \[1, 1, 1, 3\]"),
    "nothing said": ((torch.ones(3),), {}, ValueError, "exactly one of k, fraction and threshold must be given, got none"),
    "two said": ((torch.ones(3),), {"k": 1, "fraction": 0.5}, ValueError, "exactly one of k, fraction and threshold .*, got k, fraction"),
    "negative k": ((torch.ones(3),), {"k": -1}, ValueError, "k must not be negative, got -1"),
    "fraction above 1": ((torch.ones(3),), {"fraction": 1.1}, ValueError, r"fraction must be in \[0, 1\], got 1.1"),
    "fraction NaN": ((torch.ones(3),), {"fraction": math.nan}, ValueError, r"fraction must be in \[0, 1\], got nan"),
    "threshold NaN": ((torch.ones(3),), {"threshold": math.nan}, ValueError, "threshold must be a number, got nan"),
    "max_k with k": ((torch.ones(3),), {"k": 1, "max_k": 2}, ValueError, "max_k goes with threshold, got k"),
    "negative max_k": ((torch.ones(3),), {"threshold": 0.0, "max_k": -2}, ValueError, "max_k must not be negative, got -2"),
    "protect more than k": ((torch.ones(3),), {"k": 1, "protect": 2}, ValueError, r"protect must be in \[0, 1\] .*, got 2"),
    "protect more than N": (
        (torch.ones(3),),
        {"threshold": 0.0, "max_k": 9, "protect": 4},
        ValueError,
        r"protect must be in \[0, 3\] .*, got 4",
    ),
    "negative protect": ((torch.ones(3),), {"k": 1, "protect": -1}, ValueError, r"protect must be in \[0, 1\] .*, got -1"),
    "unknown backend": ((torch.ones(3),), {"k": 1, "backend": "cub"}, ValueError, "backend must be one of .*'reference', got 'cub'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name: str) -> None:
    arguments, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        tokenops.select_tokens(*arguments, **options)
