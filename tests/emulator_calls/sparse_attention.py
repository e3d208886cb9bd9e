"""The CUDA kernels of attention on the emulator: random calls under several orders of threads."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import test_sparse_attention as dense
import test_sparse_attention_varlen as varlen
import torch
from emulator_checks import RandomCalls, assert_every_site_counts, emulated, in_every_order
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Call, assert_close, computed, expected, is_packed
from torch import Tensor

import tokenops

pytestmark = emulated


def check_forward(call: Call) -> tuple[Tensor, ...]:
    """Output and statistics; and the output alone, which other kernels have."""
    dtype = call["query"].dtype
    want, got = expected(call, None), computed(call, None, "cuda")
    run = tokenops.sparse_attention_varlen if is_packed(call) else tokenops.sparse_attention
    alone, aux = run(**call, return_aux=("lse",), backend="cuda")
    for name, result in (("out", got.out), ("lse", got.lse), ("row_sq", got.row_sq), ("out", alone), ("lse", aux.lse)):
        assert_close(name, result, getattr(want, name), dtype)
    return got.out, got.lse, got.row_sq, alone, aux.lse


def check_gradients(call: Call) -> tuple[Tensor, ...]:
    got = dense.matches(call, "cuda", "cpu")
    return got.out, *got.grads.values()


# short sequences have kernels of their own, and so have long ones and few queries of many keys
RANDOM_CALLS = {
    "grids": RandomCalls(st.one_of(dense.calls(32, 80, 128), dense.calls(300, 80, 128)), check_forward),
    "few queries": RandomCalls(dense.calls(16, 300, 128), check_forward),
    "packed sequences": RandomCalls(varlen.packed_calls(), check_forward),
    "gradients of grids": RandomCalls(st.one_of(dense.calls(32, 80, 128), dense.calls(300, 80, 128)), check_gradients),
    "gradients of packed sequences": RandomCalls(varlen.packed_calls(), check_gradients),
}


def check(name: str, data: Any) -> None:
    kernels = RANDOM_CALLS[name]
    in_every_order(functools.partial(kernels.check, data.draw(kernels.calls)))


@pytest.mark.parametrize("name", RANDOM_CALLS)
@settings(max_examples=20)
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
def test_no_barrier_can_be_left_out() -> None:
    assert_every_site_counts("test_emulator_sparse_attention", "sparse_attention*")


@pytest.mark.parametrize("dtype", dense.DTYPES, ids=str)
def test_rows_that_are_not_aligned(dtype: torch.dtype) -> None:
    """Grids that begin, or whose rows begin, at no multiple of 16 bytes are copied number by number: to the same bits."""
    generator = torch.Generator().manual_seed(0)
    aligned = [torch.randn(2, 3, rows, 24, generator=generator).to(dtype) for rows in (40, 70, 70)]
    want = tokenops.sparse_attention(*aligned, backend="cuda")
    for shift, width in ((1, 32), (0, 25)):
        grids = [torch.full((*x.shape[:3], width), torch.nan, dtype=dtype)[..., shift : shift + 24].copy_(x) for x in aligned]
        out = torch.zeros(2, 3, 40, width, dtype=dtype)[..., shift : shift + 24]
        assert torch.equal(tokenops.sparse_attention(*grids, backend="cuda"), want)
        assert torch.equal(tokenops.sparse_attention(*grids, out=out, backend="cuda"), want)


@pytest.mark.parametrize("dtype", dense.DTYPES, ids=str)
def test_gradients_of_rows_that_are_not_aligned(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    *aligned, grad_out = (torch.randn(2, 3, rows, 24, generator=generator).to(dtype) for rows in (40, 70, 70, 40))
    call = dict(zip(("query", "key", "value"), aligned, strict=True))
    want = computed(call, grad_out, "cuda").grads
    for shift, width in ((1, 32), (0, 25)):
        grids = {
            name: torch.full((*x.shape[:3], width), torch.nan, dtype=dtype)[..., shift : shift + 24].copy_(x) for name, x in call.items()
        }
        grad = torch.full((*grad_out.shape[:3], width), torch.nan, dtype=dtype)[..., shift : shift + 24].copy_(grad_out)
        for name, got in computed(grids, grad, "cuda").grads.items():
            assert torch.equal(got, want[name]), name
