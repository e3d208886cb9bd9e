"""Between padded grids and packed rows, on every backend: against a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from token_select_oracle import lists, pack_loop, same_bits
from torch import Tensor

import tokenops
from tokenops.reference import token_select as reference
from tokenops.types import TokenIndex

ROWS = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int16, torch.bool, torch.uint8)


def grid(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 50
    return (x > 0 if dtype == torch.bool else x.to(dtype)).to(device)


def assert_packed(x: Tensor, index: Tensor, total: int, backend: str | None, form: Any = None) -> tuple[Tensor, Tensor]:
    """Of lists [B, K]; ``form`` is what the user gives."""
    tokens, bounds = tokenops.pack_tokens(x, index if form is None else form, total=total, backend=backend)
    want, want_bounds = pack_loop(x, index, total) if total else (x.new_zeros(0, *x.shape[2:]), [0] * (x.shape[0] + 1))
    assert torch.equal(tokens, want)
    assert tokens.dtype == x.dtype
    assert bounds.tolist() == want_bounds
    assert bounds.dtype == torch.int32
    return tokens, bounds


@pytest.mark.parametrize("dtype", ROWS, ids=str)
@pytest.mark.parametrize("inner", [(), (1,), (24,), (3, 8), (129,)], ids=str)
def test_packing_is_a_loop_and_unpacking_undoes_it(inner: tuple[int, ...], dtype: torch.dtype, backend: str, device: str) -> None:
    x = grid(3, 19, *inner, dtype=dtype, device=device)
    index = lists(3, 19, 11).to(device)
    tokens, bounds = assert_packed(x, index, 40, backend)
    back = tokenops.unpack_tokens(tokens, bounds, index, n=19, backend=backend)
    kept = tokenops.mask_from_index(index, 19)
    assert torch.equal(back[kept], x[kept])
    assert not back[~kept].any()
    assert back.dtype == dtype


def test_every_form_of_a_list(backend: str, device: str) -> None:
    x = grid(3, 19, 8, device=device)
    index = lists(3, 19, 11).to(device)
    assert_packed(x, index, 33, backend, index.long())
    assert_packed(x, index, 33, backend, TokenIndex(index, (index >= 0).sum(-1, dtype=torch.int32)))
    assert_packed(x, index[:1].expand(3, -1), 33, backend, index[0])
    assert_packed(x, index[:1].expand(3, -1), 33, backend, index[:1])
    assert_packed(x, index[:, ::2], 33, backend)
    assert_packed(x, index.T.contiguous().T, 33, backend)
    # the default has room for every slot
    assert tokenops.pack_tokens(x, index, backend=backend).tokens.shape == (33, 8)
    assert tokenops.pack_tokens(x, index[0], backend=backend).tokens.shape == (33, 8)


def test_count_takes_the_first_rows(backend: str, device: str) -> None:
    x = grid(4, 19, 8, device=device)
    for counts in ([3, 0, 19, 7], [0, 0, 0, 0], [19] * 4):
        count = torch.tensor(counts, device=device)
        tokens, bounds = tokenops.pack_tokens(x, count=count, backend=backend)
        want = torch.cat([x[b, :n] for b, n in enumerate(counts)])
        assert tokens.shape == (76, 8)
        assert torch.equal(tokens[: len(want)], want)
        assert not tokens[len(want) :].any()
        assert bounds.tolist() == [0, *torch.tensor(counts).cumsum(0).tolist()]
        for n in (19, 25):
            back = tokenops.unpack_tokens(tokens, bounds, n=n, backend=backend)
            inside = torch.arange(n, device=device) < count[:, None]
            assert torch.equal(back[inside], want)
            assert not back[~inside].any()


def test_packed_rows_are_packed_again(backend: str, device: str) -> None:
    rows, bounds = grid(30, 8, device=device), torch.tensor([0, 12, 12, 26], dtype=torch.int32, device=device)
    keep = torch.rand(30, generator=torch.Generator().manual_seed(0)).to(device) < 0.6
    index = tokenops.index_from_mask(keep, 14, cu_seqlens=bounds)
    fewer, new_bounds = tokenops.pack_tokens(rows, index, total=30, packed=True, backend=backend)
    inside = keep.clone()
    inside[26:] = False
    count = int(inside.sum())
    assert torch.equal(fewer[:count], rows[inside])
    assert not fewer[count:].any()
    assert new_bounds.tolist() == [int(inside[: int(bound)].sum()) for bound in bounds]
    assert new_bounds.tolist() == [0, *index.count.cumsum(0).tolist()]
    back = tokenops.unpack_tokens(fewer, new_bounds, index, n=30, packed=True, backend=backend)
    assert torch.equal(back, rows * inside[:, None])
    # one list is a list
    some = torch.tensor([4, -1, 2], device=device)
    assert torch.equal(tokenops.pack_tokens(rows, some, total=2, packed=True, backend=backend).tokens, rows[[4, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["index", "count", "packed"])
def test_each_is_the_gradient_of_the_other(form: str, dtype: torch.dtype, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    index: Tensor | None = lists(3, 19, 11).to(device)
    given: dict[str, Any] = {"index": index}
    x = grid(3, 19, 8, dtype=dtype, device=device)
    if form == "count":
        given = {"count": torch.tensor([3, 0, 19], device=device)}
        index = torch.arange(19, device=device).expand(3, -1).masked_fill(torch.arange(19, device=device) >= given["count"][:, None], -1)
    elif form == "packed":
        x = grid(57, 8, dtype=dtype, device=device)
        index = torch.where(index >= 0, index + 19 * torch.arange(3, device=device)[:, None], -1)
        given = {"index": index, "packed": True}
    x.requires_grad_()
    tokens, bounds = tokenops.pack_tokens(x, **given, total=60, backend=backend)
    weight = torch.randn(60, 8, generator=generator).to(device, dtype)
    [grad] = torch.autograd.grad((tokens * weight).sum(), x)
    assert index is not None
    rows = torch.cat([row[row >= 0] + (0 if form == "packed" else 19 * b) for b, row in enumerate(index)]).long()
    want = torch.zeros_like(x).flatten(0, -2).index_copy(0, rows, weight[: len(rows)]).view_as(x)
    assert torch.equal(grad, want)

    leaf = tokens.detach().requires_grad_()
    where = {} if form == "count" else given
    back = tokenops.unpack_tokens(leaf, bounds, **where, n=57 if form == "packed" else 19, backend=backend)
    weight = torch.randn(back.shape, generator=generator).to(device, dtype)
    [grad] = torch.autograd.grad((back * weight).sum(), leaf, create_graph=True)
    assert torch.equal(grad[: len(rows)], weight.flatten(0, -2)[rows])
    assert not grad[len(rows) :].any()


def test_gradients_of_gradients(backend: str, device: str) -> None:
    x = grid(2, 9, 4, device=device).requires_grad_()
    index = lists(2, 9, 5).to(device)
    tokens, bounds = tokenops.pack_tokens(x, index, backend=backend)
    [grad] = torch.autograd.grad(tokens.pow(3).sum(), x, create_graph=True)
    [second] = torch.autograd.grad(grad.sum(), x)
    kept = tokenops.mask_from_index(index, 9)[..., None]
    assert_close("second derivative", second, 6.0 * x * kept, torch.float32)
    leaf = tokens.detach().requires_grad_()
    back = tokenops.unpack_tokens(leaf, bounds, index, n=9, backend=backend)
    [grad] = torch.autograd.grad(back.pow(3).sum(), leaf, create_graph=True)
    [second] = torch.autograd.grad(grad.sum(), leaf)
    assert_close("second derivative", second, 6.0 * leaf, torch.float32)


def test_gradcheck_of_the_definition() -> None:
    x = grid(2, 5, 3, dtype=torch.float64).requires_grad_()
    index = lists(2, 5, 4)
    assert torch.autograd.gradgradcheck(lambda x: tokenops.pack_tokens(x, index).tokens, x)
    assert torch.autograd.gradcheck(lambda x: tokenops.pack_tokens(x, index).tokens, x)
    bounds = tokenops.pack_tokens(x, index).cu_seqlens
    tokens = grid(8, 3, dtype=torch.float64).requires_grad_()
    for where in ({"index": index}, {}):
        assert torch.autograd.gradcheck(lambda tokens, where=where: tokenops.unpack_tokens(tokens, bounds, **where, n=5), tokens)
        assert torch.autograd.gradgradcheck(lambda tokens, where=where: tokenops.unpack_tokens(tokens, bounds, **where, n=5), tokens)


def test_any_layout(backend: str, device: str) -> None:
    x = grid(3, 19, 4, 6, device=device)
    index = lists(3, 19, 11).to(device)
    forms = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.nn.functional.pad(x, (2, 3))[..., 2:8],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x[:1].expand(3, -1, -1, -1),
        x[:, :1].expand(-1, 19, -1, -1),
        x.flip(1)[:, ::2].repeat_interleave(2, dim=1)[:, :19],
    )
    for form in forms:
        tokens, bounds = assert_packed(form, index, 33, backend)
        for rows in (tokens.mT.contiguous().mT, torch.nn.functional.pad(tokens, (1, 2))[..., 1:7], tokens[:1].expand_as(tokens)):
            want = tokenops.unpack_tokens(rows.contiguous(), bounds, index, n=19, backend="reference")
            assert torch.equal(tokenops.unpack_tokens(rows, bounds, index, n=19, backend=backend), want)


@pytest.mark.parametrize("zero", ["samples", "tokens", "slots", "width", "total"])
def test_empty(zero: str, backend: str, device: str) -> None:
    x, index = grid(3, 19, 8, device=device), lists(3, 19, 11).to(device)
    total = 33
    if zero == "samples":
        x, index, total = x[:0], index[:0], 4
    elif zero == "tokens":
        x, index = x[:, :0], torch.full_like(index, -1)
    elif zero == "slots":
        index = index[:, :0]
    elif zero == "width":
        x = x[..., :0]
    else:
        index, total = torch.full_like(index, -1), 0
    if zero in ("samples", "tokens"):
        tokens, bounds = tokenops.pack_tokens(x, index, total=total, backend=backend)
        assert torch.equal(tokens, torch.zeros(total, 8, device=device))
        assert bounds.tolist() == [0] * (x.shape[0] + 1)
    else:
        tokens, bounds = assert_packed(x, index, total, backend)
    back = tokenops.unpack_tokens(tokens, bounds, index, n=x.shape[1], backend=backend)
    assert back.shape == x.shape


def test_bits_depend_neither_on_the_run_nor_on_threads(backend: str, device: str) -> None:
    x, index = grid(5, 900, 70, device=device), lists(5, 900, 700).to(device)

    def run() -> tuple[Tensor, ...]:
        tokens, bounds = tokenops.pack_tokens(x, index, backend=backend)
        return tokens, bounds, tokenops.unpack_tokens(tokens, bounds, index, n=900, backend=backend)

    same_bits(run, (1, 1, 2, 4, 3))


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 40))


@st.composite
def calls(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, int]] = SHAPES) -> tuple[Tensor, Tensor, int]:
    (batch, rows), width = draw(shapes), draw(st.integers(1, 70))
    x = grid(batch, rows, width, dtype=draw(st.sampled_from(ROWS)), seed=draw(st.integers(0, 99)))
    slots = draw(st.one_of(st.integers(0, rows), st.just(rows)))
    index = lists(batch, rows, slots, empty=draw(st.sampled_from((0.0, 0.4, 1.0))), seed=draw(st.integers(0, 99)))
    padding = torch.full((batch, draw(st.integers(0, 4))), -1, dtype=torch.int32)
    index = torch.cat([index, padding], dim=-1)
    return x, index, int((index >= 0).sum()) + draw(st.integers(0, 9))


@settings(max_examples=100)
@given(call=calls())
def test_any_call_is_the_loop(call: tuple[Tensor, Tensor, int], backend: str, device: str) -> None:
    x, index, total = (t.to(device) if isinstance(t, Tensor) else t for t in call)
    tokens, bounds = assert_packed(x, index, total, backend)
    back = tokenops.unpack_tokens(tokens, bounds, index, n=x.shape[1], backend=backend)
    kept = tokenops.mask_from_index(index, x.shape[1])
    assert torch.equal(back, x.masked_fill(~kept.unsqueeze(-1), 0))


# errors

X = torch.zeros(2, 5, 3)
INDEX = torch.tensor([[0, 4, -1], [2, -1, 1]])
BOUNDS = torch.tensor([0, 2, 4])
PACK_ERRORS = {
    "no tensor": (([1.0], INDEX), {}, TypeError, "x must be a Tensor, got list"),
    "rank": ((torch.zeros(3), INDEX), {}, ValueError, r"x must be \[B, N, ...\], got \[3\]"),
    "nothing said": ((X,), {}, ValueError, "exactly one of index and count must be given, got neither"),
    "both said": ((X, INDEX), {"count": torch.ones(2).int()}, ValueError, "exactly one of index and count must be given, got both"),
    "mask": ((X, INDEX > 0), {}, TypeError, "index must hold row ids .*tokenops.index_from_mask"),
    "float index": ((X, INDEX.float()), {}, TypeError, "index must be int32 or int64, got torch.float32"),
    "lists of other samples": ((X, INDEX.repeat(2, 1)), {}, ValueError, r"index must be \[K\] \| \[2, K\], got \[4, 3\]"),
    "lists per head": ((X, INDEX[None]), {}, ValueError, r"index must be \[K\] \| \[2, K\], got \[1, 2, 3\]"),
    "index elsewhere": ((X, INDEX.to("meta")), {}, ValueError, "index must be on x's device cpu, got meta"),
    "float count": ((X,), {"count": torch.ones(2)}, TypeError, "count must be int32 or int64, got torch.float32"),
    "counts of other samples": ((X,), {"count": torch.ones(3).int()}, ValueError, r"count must be \[B\] = \[2\] as x, got \[3\]"),
    "packed count": ((X,), {"count": torch.ones(2).int(), "packed": True}, ValueError, "packed rows are chosen by index, got count"),
    "negative total": ((X, INDEX), {"total": -1}, ValueError, "total must not be negative, got -1"),
    "unknown backend": ((X, INDEX), {"backend": "memcpy"}, ValueError, "backend must be one of .*, got 'memcpy'"),
}
UNPACK_ERRORS = {
    "no tensor": (([1.0], BOUNDS), {}, TypeError, "tokens must be a Tensor, got list"),
    "rank": ((torch.tensor(1.0), BOUNDS), {}, ValueError, r"tokens must be \[T, ...\], got \[\]"),
    "negative n": ((X[0], BOUNDS), {"n": -1}, ValueError, "n must not be negative, got -1"),
    "packed without index": ((X[0], BOUNDS), {"packed": True}, ValueError, "index must be given"),
    "float bounds": ((X[0], BOUNDS.float()), {}, TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    "no bounds": ((X[0], BOUNDS[:0]), {}, ValueError, r"cu_seqlens must be \[S \+ 1\], got \[0\]"),
    "lists of other samples": ((X[0], BOUNDS, INDEX.repeat(2, 1)), {}, ValueError, r"index must be \[K\] \| \[2, K\], got \[4, 3\]"),
}
BAD_PACK = {
    "id out of range": (
        {"index": [[0, 5, -1], [2, -1, 1]]},
        r"index must hold ids in \[0, 5\) or -1 for an empty slot, got 5 at position \[0, 1\]",
    ),
    "id below -1": ({"index": [[0, 4, -1], [2, -2, 1]]}, r"index must hold ids .*, got -2 at position \[1, 1\]"),
    "id twice": ({"index": [[0, 4, -1], [2, -1, 2]]}, "index must not repeat an id within a list, got 2 twice"),
    "too many": ({"index": INDEX.tolist(), "total": 3}, "total must be at least the number of rows to pack, 4, got 3"),
    "too many of one list": ({"index": [0, 2], "total": 3}, "total must be at least the number of rows to pack, 4, got 3"),
    "count too large": ({"count": [2, 6]}, r"count must be in \[0, 5\], got 6 for sample 1"),
    "negative count": ({"count": [-1, 3]}, r"count must be in \[0, 5\], got -1 for sample 0"),
}
BAD_UNPACK = {
    "bounds from 1": ({"cu_seqlens": [1, 2, 4]}, "cu_seqlens must start at 0, got 1"),
    "falling bounds": ({"cu_seqlens": [0, 3, 2]}, "cu_seqlens must not decrease, got 2 after 3 at position 2"),
    "bounds past the end": ({"cu_seqlens": [0, 2, 7]}, "cu_seqlens must end at or before the 5 rows it delimits, got 7"),
    "long sample": ({"cu_seqlens": [0, 0, 5], "n": 4}, "n must be at least the longest sample, 5 rows, got 4"),
    "id out of range": ({"index": [[0, 7, -1], [2, -1, 1]]}, r"index must hold ids in \[0, 5\) .*, got 7 at position \[0, 1\]"),
    "id twice": ({"index": [[0, 4, -1], [2, -1, 2]]}, "index must not repeat an id within a list, got 2 twice"),
    "more ids than rows": (
        {"index": [[0, 4, 3], [2, -1, 1]]},
        "index must name one row for each token, got 3 ids for the 2 tokens of sample 0",
    ),
    "fewer ids than rows": ({"index": [[0, 4, -1], [2, -1, -1]]}, "got 1 ids for the 2 tokens of sample 1"),
}


@pytest.mark.parametrize("name", PACK_ERRORS)
def test_errors_of_packing(name: str) -> None:
    arguments, options, error, message = PACK_ERRORS[name]
    with pytest.raises(error, match=message):
        tokenops.pack_tokens(*arguments, **options)


@pytest.mark.parametrize("name", UNPACK_ERRORS)
def test_errors_of_unpacking(name: str) -> None:
    arguments, options, error, message = UNPACK_ERRORS[name]
    with pytest.raises(error, match=message):
        tokenops.unpack_tokens(*arguments, **{"n": 5, **options})


@pytest.mark.parametrize("name", BAD_PACK)
def test_bad_contents_of_packing(name: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENOPS_CHECK", "1")
    given, message = BAD_PACK[name]
    call = {key: torch.tensor(value, device=device) if isinstance(value, list) else value for key, value in given.items()}
    with pytest.raises(ValueError, match=message):
        tokenops.pack_tokens(X.to(device), **call, backend=backend)


@pytest.mark.parametrize("name", BAD_UNPACK)
def test_bad_contents_of_unpacking(name: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENOPS_CHECK", "1")
    given, message = BAD_UNPACK[name]
    call = {"cu_seqlens": [0, 2, 4], "n": 5, **given}
    call = {key: torch.tensor(value, device=device) if isinstance(value, list) else value for key, value in call.items()}
    with pytest.raises(ValueError, match=message):
        tokenops.unpack_tokens(X[0].to(device), **call, backend=backend)


def test_lists_that_share_a_grid_may_not_meet(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENOPS_CHECK", "1")
    rows, index = torch.zeros(5, 3, device=device), torch.tensor([[0, 4, -1], [2, -1, 4]], device=device)
    with pytest.raises(ValueError, match="index must not repeat an id within lists that share a grid, got 4 twice"):
        tokenops.pack_tokens(rows, index, packed=True, backend=backend)
    bounds = torch.tensor([0, 2, 4], device=device)
    with pytest.raises(ValueError, match="index must not repeat an id within lists that share a grid, got 4 twice"):
        tokenops.unpack_tokens(rows, bounds, index, n=5, packed=True, backend=backend)


def test_ids_out_of_range_are_empty_slots_where_contents_are_not_read() -> None:
    x, index = grid(2, 5, 3), torch.tensor([[0, 9, -7, 3], [-1, 4, 5, 2**31 - 1]], dtype=torch.int32)
    tokens, bounds = reference.packing(x, index, None, 2)
    assert bounds.tolist() == [0, 2, 2]
    assert torch.equal(tokens, x[0, [0, 3]])
    wild = torch.tensor([0, 900, -5], dtype=torch.int32)
    assert reference.unpacking(tokens, wild, None, 4, False).isfinite().all()
    assert reference.unpacking(tokens, wild, index, 5, False).isfinite().all()
