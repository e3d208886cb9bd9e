"""The CUDA kernels of attention on the emulator: random calls under several orders of threads."""

from __future__ import annotations

import test_sparse_attention as dense
import test_sparse_attention_varlen as varlen
from emulator_checks import RandomCalls
from hypothesis import strategies as st
from oracle import Call, assert_close, computed, expected, is_packed
from torch import Tensor

import tokenops


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
