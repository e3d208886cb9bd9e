"""The CUDA kernels that choose, halt and pack, on the emulator: random calls under several orders of threads."""

from __future__ import annotations

import functools

import test_token_select as choosing
import test_token_select_halt as halting
import test_token_select_pack as packing
import torch
from emulator_checks import RandomCalls
from hypothesis import strategies as st
from oracle import assert_close
from token_select_oracle import GRADIENTS, Halting, assert_state_close, halting_call, halting_gradients, packed_halting
from torch import Tensor

import tokenops
from tokenops.reference import token_select as reference

# lists for each kernel that a length chooses, and of several chunks
TOKENS = st.one_of(st.integers(1, 90), st.integers(1, 600), st.sampled_from((512, 513, 4096, 4097, 16385, 40000)))
# samples and rows: several warps, and several chunks, of slots in a list and of lists
SHAPES = st.one_of(packing.SHAPES, st.tuples(st.integers(30, 200), st.integers(1, 3)), st.sampled_from(((2, 2050), (1, 5000), (1100, 2))))


def check_selection(call: tuple[Tensor, int, dict[str, object]]) -> tuple[Tensor, ...]:
    score, width, how = call
    return choosing.assert_right(score, width, "cuda", **how)


@st.composite
def halting_calls(draw: st.DrawFn) -> Halting:
    batch, rows, channels = draw(st.integers(1, 4)), draw(st.integers(1, 50)), draw(st.integers(1, 300))
    call = halting_call(
        batch,
        rows,
        # most widths are no multiple of 16 bytes
        draw(st.sampled_from((channels, channels * 8))),
        output=draw(st.sampled_from(("all", "class"))),
        dtype=draw(st.sampled_from(halting.DTYPES)),
        seed=draw(st.integers(0, 99)),
        last=draw(st.booleans()),
    )
    if draw(st.booleans()):
        call = packed_halting(
            call, draw(st.lists(st.integers(0, rows), min_size=batch, max_size=batch)), draw(st.integers(0, min(rows, 9)))
        )
    return call


def check_halting(call: Halting) -> tuple[Tensor, ...]:
    """The new state, in place too, and every gradient."""
    dtype = call.x.dtype
    wide = halting.wide(call)
    new = tokenops.halt_tokens(call.x, call.state, **call.options, backend="cuda")
    assert_state_close(new, tokenops.halt_tokens(wide.x, wide.state, **wide.options, backend="reference"), dtype)
    state = tokenops.halt_tokens_(call.x, call.state._make(t.clone() for t in call.state), **call.options, backend="cuda")
    for got, want in zip(state, new, strict=True):
        assert torch.equal(got, want)
    grads = halting_gradients(call, functools.partial(tokenops.halt_tokens, backend="cuda"))
    for name, want in halting_gradients(wide, functools.partial(tokenops.halt_tokens, backend="reference")).items():
        assert_close(f"gradient of {name}", grads[name], want, dtype if name == "x" else torch.float32)
    return (*new, *(grads[name] for name in GRADIENTS))


def check_packing(call: tuple[Tensor, Tensor, int], by_count: bool = False) -> tuple[Tensor, ...]:
    """By lists, or as many of the first rows as a list has ids."""
    x, index, total = call
    count = (index >= 0).sum(-1, dtype=torch.int32) if by_count else None
    given = {"count": count} if by_count else {"index": index}
    results = tokenops.pack_tokens(x, **given, total=total, backend="cuda")
    for got, want in zip(results, reference.packing(x, None if by_count else index, count, total), strict=True):
        assert torch.equal(got, want)
    return results


def check_unpacking(call: tuple[Tensor, Tensor, int]) -> tuple[Tensor, ...]:
    """By the lists, and to the first rows of each sample."""
    x, index, total = call
    rows = x.shape[1]
    tokens, bounds = reference.packing(x, index, None, total)
    results = []
    for where in (index, None):
        results.append(tokenops.unpack_tokens(tokens, bounds, where, n=rows, backend="cuda"))
        assert torch.equal(results[-1], reference.unpacking(tokens, bounds, where, rows, False))
    return tuple(results)


RANDOM_CALLS = {
    "select_tokens": RandomCalls(choosing.calls(TOKENS), check_selection),
    "halt_tokens": RandomCalls(halting_calls(), check_halting),
    "pack_tokens": RandomCalls(packing.calls(SHAPES), check_packing),
    "pack_tokens by count": RandomCalls(packing.calls(SHAPES), functools.partial(check_packing, by_count=True)),
    "unpack_tokens": RandomCalls(packing.calls(SHAPES), check_unpacking),
}
