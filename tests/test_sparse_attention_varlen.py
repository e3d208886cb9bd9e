"""Packed sequences: against the definition, and against one dense call per sequence."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Call, assert_close, assert_right, assert_same_bits, by_tensor, computed
from torch import Tensor

import tokenops

Serve = Callable[..., str]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Q_LENGTHS, K_LENGTHS = (5, 0, 1, 33, 4, 17), (7, 3, 0, 40, 1, 17)


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def packed(
    q_lengths: tuple[int, ...] = Q_LENGTHS,
    k_lengths: tuple[int, ...] = K_LENGTHS,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    value_width: int = 24,
    padding: int = 0,
    listed: str | None = None,
    empty: float = 0.0,
    bias: bool = False,
    rel_grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Call:
    """Keyword arguments of sparse_attention_varlen; with ``listed`` ("shared", "head") they are stretches of lists over larger grids."""
    generator = torch.Generator().manual_seed(seed)
    call: Call = {"cu_seqlens_q": bounds(q_lengths), "cu_seqlens_k": bounds(k_lengths)}
    spare = 9 if listed else 0
    slots = sum(q_lengths) + padding, sum(k_lengths) + padding
    for name, n_heads, n_slots, n_columns in (
        ("query", heads, slots[0], width),
        ("key", kv_heads, slots[1], width),
        ("value", kv_heads, slots[1], value_width),
    ):
        call[name] = torch.randn(n_slots + spare, n_heads, n_columns, generator=generator).to(dtype)
    if listed:
        for name, n_heads, n_slots in (("q_index", heads, slots[0]), ("kv_index", kv_heads, slots[1])):
            order = torch.rand(*((n_heads,) if listed == "head" else ()), n_slots + spare, generator=generator).argsort(-1)
            index = order[..., :n_slots].to(torch.int32)
            call[name] = index.masked_fill(torch.rand(index.shape, generator=generator) < empty, -1)
    if bias:
        call["kv_bias"] = torch.randn(kv_heads, slots[1] + spare, generator=generator)
    call = {name: x.to(device) for name, x in call.items()}
    if rel_grid:
        call["rel_pos"] = tuple(torch.randn(slots[0] + spare, heads, cells, generator=generator).to(device, dtype) for cells in rel_grid)
    return call


FORMS = {
    "plain": {},
    "one sequence": {"q_lengths": (50,), "k_lengths": (70,)},
    "equal short sequences": {"q_lengths": (8,) * 20, "k_lengths": (8,) * 20, "value_width": 16},
    "unequal short sequences": {"q_lengths": tuple(range(17)), "k_lengths": tuple(range(17, 0, -1))},
    "long": {"q_lengths": (130, 3, 200), "k_lengths": (260, 90, 40), "heads": 2, "kv_heads": 1},
    "padding": {"padding": 13},
    "no sequence": {"q_lengths": (), "k_lengths": (), "padding": 6},
    "shared lists": {"listed": "shared", "padding": 5},
    "lists per head": {"listed": "head", "padding": 5, "bias": True},
    "empty slots": {"listed": "head", "empty": 0.4, "padding": 5, "bias": True},
    "nothing but empty slots": {"listed": "shared", "empty": 1.0},
    "bias": {"bias": True},
    "rel_pos": {"rel_grid": (5, 8)},
    "rel_pos, one sequence": {"q_lengths": (50,), "k_lengths": (70,), "rel_grid": (7, 10)},
    "rel_pos, long": {"q_lengths": (130, 3, 200), "k_lengths": (260, 90, 40), "heads": 2, "kv_heads": 1, "rel_grid": (20, 13)},
    "rel_pos, equal short sequences": {"q_lengths": (16,) * 9, "k_lengths": (16,) * 9, "value_width": 16, "rel_grid": (4, 4)},
    "rel_pos, empty slots": {"listed": "head", "empty": 0.4, "padding": 5, "bias": True, "rel_grid": (4, 11)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("form", FORMS)
def test_matches_the_definition(form: str, is_causal: bool, dtype: torch.dtype, backend: str, device: str) -> None:
    assert_right({**packed(**FORMS[form], dtype=dtype, device=device), "is_causal": is_causal}, backend)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("form", FORMS)
def test_reference_backward_is_autograd_of_the_definition(form: str, is_causal: bool, device: str) -> None:
    call = packed(**FORMS[form], device=device)
    call = {name: x.double() if x.is_floating_point() else x for name, x in by_tensor(call).items()}
    assert_right({**call, "is_causal": is_causal}, "reference")


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_is_a_loop_of_dense_calls(is_causal: bool, backend: str, device: str) -> None:
    call = packed(padding=3, bias=True, device=device)
    q, k, v = (call[name].transpose(0, 1)[None] for name in ("query", "key", "value"))
    got, aux = tokenops.sparse_attention_varlen(**call, is_causal=is_causal, return_aux=("lse", "row_sq"), backend=backend)
    for (q0, q1), (k0, k1) in zip(pairwise(call["cu_seqlens_q"].tolist()), pairwise(call["cu_seqlens_k"].tolist()), strict=True):
        part = slice(q0, q1)
        want, want_aux = tokenops.sparse_attention(
            q[:, :, part],
            k[:, :, k0:k1],
            v[:, :, k0:k1],
            is_causal=is_causal,
            enable_gqa=True,
            kv_bias=call["kv_bias"][None, :, k0:k1],
            return_aux=("lse", "row_sq"),
            backend=backend,
        )
        assert_close("out", got[part].transpose(0, 1)[None], want, torch.float32)
        assert_close("lse", aux.lse[:, part], want_aux.lse[0], torch.float32)
        assert_close("row_sq", aux.row_sq[:, part], want_aux.row_sq[0], torch.float32)
    # the padding behind the last sequence
    assert (got[q1:] == 0.0).all()
    assert (aux.lse[:, q1:] == -torch.inf).all()
    assert (aux.row_sq[:, q1:] == 0.0).all()


def test_lists_are_a_gather(backend: str, device: str) -> None:
    call = packed(listed="shared", padding=2, bias=True, device=device)
    q_index, kv_index = call.pop("q_index").long(), call.pop("kv_index").long()
    gathered = {**call, "query": call["query"][q_index], "key": call["key"][kv_index], "value": call["value"][kv_index]}
    gathered["kv_bias"] = call["kv_bias"][:, kv_index]
    want = tokenops.sparse_attention_varlen(**gathered, is_causal=True, backend=backend)
    got = tokenops.sparse_attention_varlen(**call, q_index=q_index, kv_index=kv_index, is_causal=True, backend=backend)
    assert_close("out", got, want, torch.float32)


def test_out_of_range_slots_in_the_padding_are_not_read(backend: str, device: str) -> None:
    call = packed(listed="shared", padding=4, device=device)
    want = tokenops.sparse_attention_varlen(**call, backend=backend)
    for name, side in (("q_index", "q"), ("kv_index", "k")):
        call[name][call[f"cu_seqlens_{side}"][-1] :] = 10_000
    assert torch.equal(tokenops.sparse_attention_varlen(**call, backend=backend), want)


@pytest.mark.parametrize("form", ["plain", "padding", "shared lists", "empty slots"])
def test_grid_gets_the_listed_rows_only(form: str, backend: str, device: str) -> None:
    call = packed(**FORMS[form], device=device)
    compact = tokenops.sparse_attention_varlen(**call, backend=backend)
    rows, heads, _ = call["query"].shape
    grid = torch.full((rows, heads, 24), 7.0, device=device)
    assert tokenops.sparse_attention_varlen(**call, out=grid, backend=backend) is grid
    index = call.get("q_index", torch.arange(rows, device=device)).expand(heads, -1)
    want = torch.full_like(grid, 7.0)
    for h in range(heads):
        for slot in range(int(call["cu_seqlens_q"][-1])):
            if index[h, slot] >= 0:
                want[index[h, slot], h] = compact[slot, h]
    assert torch.equal(grid, want)


def test_a_row_may_stand_in_several_sequences_without_gradient(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENOPS_CHECK", "1")
    call = packed(listed="shared", device=device)
    for name, side in (("q_index", "q"), ("kv_index", "k")):
        cu = call[f"cu_seqlens_{side}"]
        # the fourth sequence's rows again in the last one
        call[name][cu[5] : cu[5] + 5] = call[name][cu[3] : cu[3] + 5]
    assert_close("out", computed(call, None, backend).out, computed(call, None, "reference").out, torch.float32)
    leaf = call["query"].clone().requires_grad_()
    out = tokenops.sparse_attention_varlen(**{**call, "query": leaf}, backend=backend)
    with pytest.raises(ValueError, match=r"q_index must not repeat an id within the call.* at positions"):
        out.sum().backward()
    with pytest.raises(ValueError, match="q_index must not repeat an id within the call"):
        tokenops.sparse_attention_varlen(**call, out=torch.empty(call["query"].shape[0], 4, 24, device=device), backend=backend)


def test_a_key_may_stand_in_several_sequences_of_a_call_that_writes_a_grid(backend: str, device: str) -> None:
    call = packed(listed="shared", device=device)
    cu = call["cu_seqlens_k"]
    call["kv_index"][cu[5] : cu[5] + 5] = call["kv_index"][cu[3] : cu[3] + 5]
    compact = tokenops.sparse_attention_varlen(**call, backend=backend)
    grid = torch.zeros(call["query"].shape[0], 4, 24, device=device)
    tokenops.sparse_attention_varlen(**call, out=grid, backend=backend)
    used = int(call["cu_seqlens_q"][-1])
    slots = [slot for slot in range(used) if call["q_index"][slot] >= 0]
    assert torch.equal(grid[call["q_index"][slots].long()], compact[slots])


@pytest.mark.parametrize("max_seqlen", [None, 40, 1000])
def test_longest_length_is_a_hint(max_seqlen: int | None, backend: str, device: str) -> None:
    call = packed(device=device)
    want = tokenops.sparse_attention_varlen(**call, backend="reference")
    got = tokenops.sparse_attention_varlen(**call, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, backend=backend)
    assert_close("out", got, want, torch.float32)


def test_strided_rows_are_read_in_place(backend: str, device: str) -> None:
    call = packed(heads=2, kv_heads=2, q_lengths=K_LENGTHS, value_width=16, device=device)
    q, k, v = torch.stack([call[name] for name in ("query", "key", "value")], dim=1).unbind(1)
    assert not q.is_contiguous()
    assert_right({**call, "query": q, "key": k, "value": v}, backend)


def test_one_sequence_does_not_see_anothers_nan(backend: str, device: str) -> None:
    call = packed(device=device)
    q_end, k_end = int(call["cu_seqlens_q"][3]), int(call["cu_seqlens_k"][3])
    call["key"][k_end] = torch.nan
    call["value"][k_end + 1] = torch.nan
    got = computed(call, torch.ones(call["query"].shape[0], 4, 24, device=device), backend)
    assert got.out[:q_end].isfinite().all()
    assert got.out[q_end].isnan().all()
    assert got.out[int(call["cu_seqlens_q"][4]) :].isfinite().all()
    assert got.grads["query"][:q_end].isfinite().all()
    # also where a block of queries ends within the other sequence
    for name in ("key", "value"):
        assert got.grads[name][:k_end].isfinite().all(), name
        assert got.grads[name][int(call["cu_seqlens_k"][4]) :].isfinite().all(), name


@pytest.mark.parametrize("form", ["long", "empty slots", "equal short sequences"])
def test_bits_depend_neither_on_the_run_nor_on_threads(form: str, backend: str, device: str) -> None:
    call = packed(**FORMS[form], device=device)
    grad_out = torch.randn(computed(call, None, backend).out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    threads = (1, 1) if backend == "reference" else (1, 1, 2, 4)
    assert_same_bits(call, grad_out, backend, threads)


def test_dropout_is_repeatable() -> None:
    call = packed()
    outs = []
    for _ in range(2):
        torch.manual_seed(0)
        outs.append(tokenops.sparse_attention_varlen(**call, dropout_p=0.5))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], tokenops.sparse_attention_varlen(**call))


@st.composite
def packed_calls(draw: st.DrawFn) -> Call:
    sequences = draw(st.integers(1, 6))
    lengths = st.lists(st.integers(0, 40), min_size=sequences, max_size=sequences)
    kv_heads = draw(st.integers(1, 2))
    call = packed(
        tuple(draw(lengths)),
        tuple(draw(lengths)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        width=8 * draw(st.integers(1, 9)),
        value_width=8 * draw(st.integers(1, 9)),
        padding=draw(st.integers(0, 4)),
        listed=draw(st.sampled_from((None, "shared", "head"))),
        empty=draw(st.sampled_from((0.0, 0.3))),
        bias=draw(st.booleans()),
        rel_grid=draw(st.sampled_from((None, (5, 8), (1, 40), (41, 1)))),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**32)),
    )
    return {**call, "is_causal": draw(st.booleans())}


@settings(max_examples=100)
@given(call=packed_calls())
def test_any_packed_call_gives_the_right_output(call: Call, backend: str, device: str) -> None:
    call = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in by_tensor(call).items()}
    dtype = call["query"].dtype
    got, want = computed(call, None, backend), computed(call, None, "reference")
    for name in ("out", "lse", "row_sq"):
        assert_close(name, getattr(got, name), getattr(want, name), dtype)
