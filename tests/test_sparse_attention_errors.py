"""Bad input: an exception that names the argument, what was expected and what came. Never a crash, never a wild read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LISTED, Call, Case, build
from oracle import as_call, by_tensor
from test_sparse_attention_varlen import packed
from torch import Tensor

import tokenops
from tokenops import native
from tokenops.ops.sparse_attention import BACKENDS
from tokenops.ops.wings import explain, reads_contents
from tokenops.reference.sparse_attention import check_contents


def listed(device: str, **more: Any) -> Call:
    return build(Case("", {**LISTED, **more}), torch.float32, device)


def ids(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# arguments to put in place of good ones, the exception, and what its message says
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query is no tensor": ({"query": [1.0]}, TypeError, "query must be a Tensor, got list"),
    "query of integers": (
        {"query": torch.zeros(2, 4, 19, 16, dtype=torch.int32)},
        TypeError,
        r"query must be float32, .*, got torch.int32",
    ),
    "query of complex": (
        {"query": torch.zeros(2, 4, 19, 16, dtype=torch.complex64)},
        TypeError,
        "query must be float32, .*, got torch.complex64",
    ),
    "key of another dtype": (
        {"key": torch.zeros(2, 4, 23, 16).half()},
        TypeError,
        "key must have query's dtype torch.float32, got torch.float16",
    ),
    "value of another dtype": (
        {"value": torch.zeros(2, 4, 23, 24).double()},
        TypeError,
        "value must have query's dtype torch.float32, got torch.float64",
    ),
    "key on another device": ({"key": torch.zeros(2, 4, 23, 16, device="meta")}, ValueError, "key must be on query's device .*, got meta"),
    "query of one dimension": ({"query": torch.zeros(16)}, ValueError, r"query must have 2 to 5 dimensions .*, got \[16\]"),
    "key of six dimensions": (
        {"key": torch.zeros(1, 1, 2, 4, 23, 16)},
        ValueError,
        r"key must have 2 to 5 dimensions .*, got \[1, 1, 2, 4, 23, 16\]",
    ),
    "other head width": (
        {"key": torch.zeros(2, 4, 23, 8)},
        ValueError,
        r"key must be \[..., M, D\] with query's D = 16, got \[2, 4, 23, 8\]",
    ),
    "other number of values": (
        {"value": torch.zeros(2, 4, 22, 24)},
        ValueError,
        r"value must be \[..., M, Dv\] with key's M = 23, got \[2, 4, 22, 24\]",
    ),
    "other batch": (
        {"key": torch.zeros(3, 4, 23, 16)},
        ValueError,
        r"batch sizes .* must agree or be 1, got \[2, 4, 19, 16\], \[3, 4, 23, 16\]",
    ),
    "other number of heads": (
        {"key": torch.zeros(2, 2, 23, 16), "value": torch.zeros(2, 2, 23, 24)},
        ValueError,
        r"query's 4 heads or 1 \(or set enable_gqa=True\), got 2",
    ),
    "heads that do not divide": (
        {"key": torch.zeros(2, 3, 23, 16), "value": torch.zeros(2, 3, 23, 24), "enable_gqa": True},
        ValueError,
        "a divisor of query's 4 heads, got 3",
    ),
    "key and value of different heads": (
        {"key": torch.zeros(2, 2, 23, 16), "enable_gqa": True},
        ValueError,
        r"key and value must have the same number of heads \(or 1\), got 2 and 4",
    ),
    "width zero": ({"query": torch.zeros(2, 4, 19, 0), "key": torch.zeros(2, 4, 23, 0)}, ValueError, "head width D of at least 1"),
    "mask of integers": (
        {"attn_mask": torch.zeros(19, 23, dtype=torch.int32)},
        TypeError,
        "attn_mask must be bool or floating .*, got torch.int32",
    ),
    "mask of float64": ({"attn_mask": torch.zeros(19, 23).double()}, TypeError, "float64 only with float64 inputs.*, got torch.float64"),
    "mask of another shape": (
        {"attn_mask": torch.zeros(11, 13)},
        ValueError,
        r"\[..., Hq, N, M\] = \[2, 4, 19, 23\] \(grid coordinates\), got \[11, 13\]",
    ),
    "mask of too many dimensions": (
        {"attn_mask": torch.zeros(1, 2, 4, 19, 23)},
        ValueError,
        r"attn_mask must broadcast to .* got \[1, 2, 4, 19, 23\]",
    ),
    "mask on another device": (
        {"attn_mask": torch.zeros(19, 23, device="meta")},
        ValueError,
        "attn_mask must be on query's device .*, got meta",
    ),
    "dropout over 1": ({"dropout_p": 1.5}, ValueError, r"dropout_p must be a probability in \[0, 1\], got 1.5"),
    "list that is a mask": (
        {"q_index": torch.ones(19, dtype=torch.bool)},
        TypeError,
        "q_index must hold row ids .*, got a bool mask: tokenops.index_from_mask",
    ),
    "list of floats": ({"kv_index": torch.zeros(5)}, TypeError, "kv_index must be int32 or int64, got torch.float32"),
    "list that is no tensor": ({"q_index": [0, 1]}, TypeError, "q_index must be a Tensor, got list"),
    "list on another device": (
        {"q_index": torch.zeros(5, dtype=torch.int32, device="meta")},
        ValueError,
        "q_index must be on query's device .*, got meta",
    ),
    "list of another batch": (
        {"q_index": torch.zeros(3, 5, dtype=torch.int32)},
        ValueError,
        r"q_index must be \[K\] \| \[2, K\] \| \[2, 4, K\] .*, got \[3, 5\]",
    ),
    "list of other heads": (
        {"kv_index": torch.zeros(2, 3, 5, dtype=torch.int32)},
        ValueError,
        r"kv_index must be \[L\] \| \[2, L\] \| \[2, 4, L\] .*, got \[2, 3, 5\]",
    ),
    "list of four dimensions": (
        {"q_index": torch.zeros(1, 1, 1, 5, dtype=torch.int32)},
        ValueError,
        r"q_index must be .*, got \[1, 1, 1, 5\]",
    ),
    "list without dimensions": ({"q_index": torch.tensor(3)}, ValueError, r"q_index must be .*, got \[\]"),
    "id past the end": (
        {"q_index": ids(3, 19)},
        ValueError,
        r"q_index must hold ids in \[0, 19\) or -1 for an empty slot, got 19 at position \[0, 0, 1\]",
    ),
    "id below -1": ({"kv_index": ids(-2, 4)}, ValueError, r"kv_index must hold ids in \[0, 23\) .*, got -2 at position \[0, 0, 0\]"),
    "id past int32": (
        {"kv_index": ids(1, 2**32, dtype=torch.int64)},
        ValueError,
        r"kv_index must hold ids in \[0, 23\) .* at position \[0, 0, 1\]",
    ),
    "id far below zero": (
        {"q_index": ids(1, -(2**32), dtype=torch.int64)},
        ValueError,
        r"q_index must hold ids in \[0, 19\) .* at position \[0, 0, 1\]",
    ),
    "id twice": (
        {"q_index": ids(3, -1, 7, 3, -1)},
        ValueError,
        r"q_index must not repeat an id within a list, got 3 at positions \[0, 0, 0\] and \[0, 0, 3\]",
    ),
    "key id twice": (
        {"kv_index": ids(5, 22, 0, 22)},
        ValueError,
        r"kv_index must not repeat an id within a list, got 22 at positions \[0, 0, 1\] and \[0, 0, 3\]",
    ),
    "bias of a half type": (
        {"kv_bias": torch.zeros(23).half()},
        TypeError,
        "kv_bias must be torch.float32 with torch.float32 inputs, got torch.float16",
    ),
    "bias of another length": (
        {"kv_bias": torch.zeros(2, 13)},
        ValueError,
        r"kv_bias must be \[23\] \| \[2, 23\] \| \[2, 4, 23\] .*, got \[2, 13\]",
    ),
    "bias of other heads": (
        {"kv_bias": torch.zeros(2, 2, 23)},
        ValueError,
        r"kv_bias must be \[23\] \| \[2, 23\] \| \[2, 4, 23\] .*, got \[2, 2, 23\]",
    ),
    "bias on another device": ({"kv_bias": torch.zeros(23, device="meta")}, ValueError, "kv_bias must be on key's device .*, got meta"),
    "unknown aux": ({"return_aux": ("lse", "max")}, ValueError, r"return_aux must be names out of \('lse', 'row_sq'\), got 'max'"),
    "unknown backend": ({"backend": "cudnn"}, ValueError, "backend must be one of 'triton', 'cpu', .*'reference', got 'cudnn'"),
    "rel_pos of one tensor": (
        {"rel_pos": torch.zeros(2, 4, 19, 23)},
        TypeError,
        r"rel_pos must be two tensors \(rel_h, rel_w\), got Tensor",
    ),
    "rel_pos of one in a tuple": ({"rel_pos": (torch.zeros(19, 23),)}, TypeError, r"rel_pos must be two tensors .*, got 1 of them"),
    "rel_pos without rel_w": ({"rel_pos": (torch.zeros(19, 23), None)}, TypeError, "rel_pos: rel_w must be a Tensor, got NoneType"),
    "rel_pos of half type": (
        {"rel_pos": (torch.zeros(19, 23).half(), torch.zeros(19, 1).half())},
        TypeError,
        "rel_pos: rel_h must be torch.float32 with torch.float32 inputs, got torch.float16",
    ),
    "rel_pos of two dtypes": (
        {name: torch.zeros(2, 4, 8, 16).half() for name in ("query", "key", "value")}
        | {"rel_pos": (torch.zeros(8, 8), torch.zeros(8, 1).half())},
        TypeError,
        "rel_pos: rel_w must have rel_h's dtype torch.float32, got torch.float16",
    ),
    "rel_pos of another grid": (
        {"rel_pos": (torch.zeros(19, 4), torch.zeros(19, 6))},
        ValueError,
        "rel_pos must be for a gh x gw grid of 23 key cells, got 4 x 6",
    ),
    "rel_pos of other rows": (
        {"rel_pos": (torch.zeros(2, 4, 11, 23), torch.zeros(2, 4, 11, 1))},
        ValueError,
        r"rel_pos: rel_h must be \[2, 4, 19, gh\] \(leading sizes may be 1 or missing\), got \[2, 4, 11, 23\]",
    ),
    "rel_pos of other heads": (
        {"rel_pos": (torch.zeros(4, 19, 23), torch.zeros(3, 19, 1))},
        ValueError,
        r"rel_pos: rel_w must be \[2, 4, 19, gw\] .*, got \[3, 19, 1\]",
    ),
    "rel_pos of too many dimensions": (
        {"rel_pos": (torch.zeros(1, 2, 4, 19, 23), torch.zeros(19, 1))},
        ValueError,
        r"rel_pos: rel_h must be .*, got \[1, 2, 4, 19, 23\]",
    ),
    "rel_pos of one dimension": ({"rel_pos": (torch.zeros(23), torch.zeros(1))}, ValueError, r"rel_pos: rel_h must be .*, got \[23\]"),
    "rel_pos on another device": (
        {"rel_pos": (torch.zeros(19, 23, device="meta"), torch.zeros(19, 1))},
        ValueError,
        "rel_pos: rel_h must be on query's device .*, got meta",
    ),
    "out of another shape": (
        {"out": torch.zeros(2, 4, 11, 24)},
        ValueError,
        r"out must be the query's grid \[2, 4, 19, 24\], got \[2, 4, 11, 24\]",
    ),
    "out of another dtype": (
        {"out": torch.zeros(2, 4, 19, 24).half()},
        TypeError,
        "out must have the result's dtype torch.float32, got torch.float16",
    ),
    "out on another device": ({"out": torch.zeros(2, 4, 19, 24, device="meta")}, ValueError, "out must be on query's device .*, got meta"),
    "out expanded": (
        {"out": torch.zeros(1, 4, 19, 24).expand(2, 4, 19, 24)},
        ValueError,
        r"out must not be expanded .*, got strides \(0, 456, 24, 1\)",
    ),
    "out in columns": ({"out": torch.zeros(2, 4, 24, 19).mT}, ValueError, r"out must have a dense last dimension, got strides"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name: str, device: str) -> None:
    change, error, message = BAD[name]
    change = {key: x.to(device) if isinstance(x, Tensor) and x.device.type == "cpu" else x for key, x in change.items()}
    with pytest.raises(error, match=message):
        tokenops.sparse_attention(**{**listed(device), **change})


CONTENTS = {
    "past the end": ([0, 5, 19], "must hold ids"),
    "below -1": ([0, -7, 3], "must hold ids"),
    "far past the end": ([2**31 - 1, 1, 2], "must hold ids"),
    "twice": ([4, 9, 4], "must not repeat an id"),
}


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("argument", ["q_index", "kv_index"])
@pytest.mark.parametrize("fault", CONTENTS)
def test_bad_contents_on_every_backend(
    fault: str, argument: str, sample: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward and in place; on a GPU if asked to look."""
    monkeypatch.setenv("TOKENOPS_CHECK", "1")
    bad, message = CONTENTS[fault]
    call = listed(device, query_rows=19, key_rows=19)
    good = {name: x.clone() for name, x in call.items()}
    call[argument][sample, 1, :3] = torch.tensor(bad, dtype=torch.int32)
    # what the operator then finds twice is only what was put there
    call[argument][sample, 1, 3:] = -1
    where = rf"{argument} {message}.* \[{sample}, 1, \d\]"
    with pytest.raises(ValueError, match=where):
        tokenops.sparse_attention(**call, backend=backend)
    with pytest.raises(ValueError, match=where):
        tokenops.sparse_attention(**call, out=torch.zeros(2, 4, 19, 24, device=device), backend=backend)
    leaf = good["query"].requires_grad_()
    out = tokenops.sparse_attention(**good, backend=backend)
    # lists that go bad between forward and backward
    good[argument].data.copy_(call[argument])
    with pytest.raises((ValueError, RuntimeError), match=f"{where}|modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaf)


def test_on_a_gpu_contents_are_read_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert reads_contents(cpu, "reference")
    assert not reads_contents(cpu, "cpu:avx2")
    monkeypatch.delenv("TOKENOPS_CHECK", raising=False)
    assert not reads_contents(gpu, "triton")
    monkeypatch.setenv("TOKENOPS_CHECK", "1")
    assert reads_contents(gpu, "triton")


def test_an_id_out_of_range_is_an_empty_slot_to_the_definition() -> None:
    call = listed("cpu")
    bad, empty = call["kv_index"].clone(), call["kv_index"].clone()
    bad[..., 2], empty[..., 2] = 99, -1
    problem = tokenops.ops.sparse_attention.as_problem(**{**call, "kv_index": bad})[0]
    want = tokenops.sparse_attention(**{**call, "kv_index": empty}, backend="reference")
    assert torch.equal(tokenops.reference.sparse_attention.attention(problem).out, want)


# out= and gradients


def test_grid_refuses_a_gradient(device: str) -> None:
    call = listed(device)
    grid = torch.zeros(2, 4, 19, 24, device=device)
    call["key"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"out is written in place and has no gradient: call under torch.no_grad\(\)"):
        tokenops.sparse_attention(**call, out=grid)
    with torch.no_grad():
        tokenops.sparse_attention(**call, out=grid)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_grid_must_not_share_memory_with_an_input(name: str, device: str) -> None:
    buffer = torch.zeros(3, 2, 4, 19, 16, device=device)
    call = dict(zip(("query", "key", "value"), buffer.unbind(0), strict=True))
    with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
        tokenops.sparse_attention(**call, out=call[name])
    shifted = buffer.flatten()[8:][: call[name].numel() * 3]
    with pytest.raises(ValueError, match="out must not share memory with"):
        tokenops.sparse_attention(**call, out=shifted[: call[name].numel()].view(2, 4, 19, 16))
    # nor past the door
    p = tokenops.ops.sparse_attention.as_problem(**call)[0]
    with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
        torch.ops.tokenops.sparse_attention_(call[name], *p[:9], None, 0.0, False, p.scale, False, None)
    # slices that interleave in one buffer do not overlap
    slices = torch.zeros(2, 19, 4, 4, 16, device=device).transpose(1, 3).unbind(2)
    tokenops.sparse_attention(*slices[:3], out=slices[3])


# packed sequences

BAD_PACKED: dict[str, tuple[Callable[[Call], dict[str, Any]], type[Exception], str]] = {
    "not starting at 0": (lambda call: {"cu_seqlens_q": call["cu_seqlens_q"] + 1}, ValueError, "cu_seqlens_q must start at 0, got 1"),
    "decreasing": (
        lambda call: {"cu_seqlens_k": call["cu_seqlens_k"][[0, 2, 1, 3, 4, 5, 6]]},
        ValueError,
        "cu_seqlens_k must not decrease, got 7 after 10 at position 2",
    ),
    "below zero": (
        lambda call: {"cu_seqlens_q": call["cu_seqlens_q"] * torch.tensor([1, -1, 1, 1, 1, 1, 1])},
        ValueError,
        "cu_seqlens_q must not decrease, got -5 after 0 at position 1",
    ),
    "past the end": (
        lambda call: {"cu_seqlens_k": call["cu_seqlens_k"] * 2},
        ValueError,
        "cu_seqlens_k must end at or before the 68 rows it delimits, got 136",
    ),
    "far past the end": (
        lambda call: {"cu_seqlens_q": call["cu_seqlens_q"].long() * 2**40},
        ValueError,
        "cu_seqlens_q must end at or before the 60 rows",
    ),
    "of floats": (
        lambda call: {"cu_seqlens_q": call["cu_seqlens_q"].float()},
        TypeError,
        "cu_seqlens_q must be int32 or int64, got torch.float32",
    ),
    "of two dimensions": (
        lambda call: {"cu_seqlens_k": call["cu_seqlens_k"][None]},
        ValueError,
        r"cu_seqlens_k must be \[S \+ 1\], got \[1, 7\]",
    ),
    "empty": (lambda call: {"cu_seqlens_q": call["cu_seqlens_q"][:0]}, ValueError, r"cu_seqlens_q must be \[S \+ 1\], got \[0\]"),
    "of another length": (
        lambda call: {"cu_seqlens_k": call["cu_seqlens_k"][:-1]},
        ValueError,
        r"cu_seqlens_k must be \[S \+ 1\] = \[7\] as cu_seqlens_q, got \[6\]",
    ),
    "on another device": (
        lambda call: {"cu_seqlens_q": call["cu_seqlens_q"].to("meta")},
        ValueError,
        "cu_seqlens_q must be on query's device .*, got meta",
    ),
    "no tensor": (lambda call: {"cu_seqlens_q": [0, 60]}, TypeError, "cu_seqlens_q must be a Tensor, got list"),
    "negative bound": (lambda call: {"max_seqlen_q": -1}, ValueError, "max_seqlen_q must not be negative, got -1"),
    "query of four dimensions": (
        lambda call: {"query": call["query"][None]},
        ValueError,
        r"query must be packed rows \[T, H, D\], got \[1, 60, 4, 16\]",
    ),
    "other head width": (
        lambda call: {"key": call["key"][..., :8]},
        ValueError,
        r"key must be \[Tk, Hkv, D\] with query's D = 16, got \[68, 2, 8\]",
    ),
    "other number of values": (
        lambda call: {"value": call["value"][1:]},
        ValueError,
        r"value must be \[Tk, Hkv, Dv\] = \[68, 2, Dv\] as key, got \[67, 2, 24\]",
    ),
    "heads that do not divide": (lambda call: {"query": call["query"][:, :3]}, ValueError, "a divisor of query's 3 heads, got 2"),
    "list of another number of heads": (
        lambda call: {"q_index": torch.zeros(3, 60, dtype=torch.int32)},
        ValueError,
        r"q_index must be \[K\] \| \[4, K\] .*, got \[3, 60\]",
    ),
    "list shorter than the sequences": (
        lambda call: {"kv_index": torch.arange(40)},
        ValueError,
        "cu_seqlens_k must end at or before the 40 rows it delimits, got 68",
    ),
    "id twice in a sequence": (
        lambda call: {"q_index": torch.arange(60).index_fill(0, torch.tensor([6]), 20)},
        ValueError,
        r"q_index must not repeat an id within a list, got 20 at positions \[0, 0, 6\] and \[0, 0, 20\]",
    ),
    "bias of another length": (lambda call: {"kv_bias": torch.zeros(5)}, ValueError, r"kv_bias must be \[68\] \| \[2, 68\] .*, got \[5\]"),
    "positions of fewer cells than keys": (
        lambda call: {"rel_pos": (torch.zeros(60, 4, 3), torch.zeros(60, 4, 13))},
        ValueError,
        "cu_seqlens_k must delimit sequences of at most 3 x 13 keys, the grid of rel_pos, got 40",
    ),
    "positions of no cell": (
        lambda call: {"rel_pos": (torch.zeros(60, 4, 0), torch.zeros(60, 4, 13))},
        ValueError,
        "cu_seqlens_k must delimit sequences of at most 0 x 13 keys, the grid of rel_pos, got 40",
    ),
    "positions as a grid": (
        lambda call: {"rel_pos": (torch.zeros(1, 4, 60, 5), torch.zeros(1, 4, 60, 8))},
        ValueError,
        r"rel_pos: rel_h must be packed rows \[Tq, Hq, cells\], got \[1, 4, 60, 5\]",
    ),
    "positions of other rows": (
        lambda call: {"rel_pos": (torch.zeros(60, 4, 5), torch.zeros(59, 4, 8))},
        ValueError,
        r"rel_pos: rel_w must be \[4, 60, gw\] .*, got \[4, 59, 8\]",
    ),
    "out of another shape": (
        lambda call: {"out": torch.zeros(60, 4, 16)},
        ValueError,
        r"out must be the query's grid \[60, 4, 24\], got \[60, 4, 16\]",
    ),
}


@pytest.mark.parametrize("name", BAD_PACKED)
def test_bad_packed_argument(name: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENOPS_CHECK", "1")
    change, error, message = BAD_PACKED[name]
    call = packed()
    call |= change(call)
    call = {key: x.to(device) if isinstance(x, Tensor) and x.device.type == "cpu" else x for key, x in by_tensor(call).items()}
    with pytest.raises(error, match=message):
        tokenops.sparse_attention_varlen(**as_call(call), backend=backend)


# backends that object


def test_a_backend_that_objects_says_why_and_nothing_takes_its_place(device: str) -> None:
    call = listed(device, width=12)
    with pytest.raises(NotImplementedError, match=r"cpu:generic: .*D must be a multiple of 8 up to 256, got 12"):
        tokenops.sparse_attention(**call, backend="cpu:generic")
    call = listed(device)
    for arguments, reason in (
        ({"dropout_p": 0.5}, "dropout is served by the reference only"),
        (
            {"query": call["query"].double(), "key": call["key"].double(), "value": call["value"].double()},
            "float64 is served by the reference only",
        ),
        (
            {"attn_mask": torch.zeros(19, 23, device=device, requires_grad=True)},
            "the gradient of attn_mask is served by the reference only",
        ),
    ):
        with pytest.raises(NotImplementedError, match=f"cpu: .*{reason}"):
            tokenops.sparse_attention(**{**call, **arguments}, backend="cpu")
        # without a name, the reference takes it
        tokenops.sparse_attention(**{**call, **arguments})


def test_what_a_kernel_reports_becomes_an_exception() -> None:
    good = tokenops.ops.sparse_attention.as_problem(**listed("cpu"))[0]
    with pytest.raises(MemoryError, match=r"no memory for the scratch space of the C\+\+ kernel"):
        explain("sparse_attention", 2, lambda: check_contents(good))
    with pytest.raises(ValueError, match="q_index must hold ids"):
        explain("sparse_attention", 1, lambda: check_contents(good._replace(q_index=good.q_index + 19)))
    # a kernel and the check may never disagree; if they did, it must not pass in silence
    with pytest.raises(RuntimeError, match="refused a call that is in order"):
        explain("sparse_attention", 1, lambda: check_contents(good))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_index", lambda x: x[0], "q_index must have 3 dimensions, got 2"),
        ("kv_index", lambda x: x.unsqueeze(3), "kv_index must have 3 dimensions, got 4"),
        ("kv_index", lambda x: x.long(), "kv_index has the wrong dtype"),
        ("q_index", lambda x: x.expand(2, 5, -1), "q_index must have size 1 or 4 in dimension 1, got 5"),
        ("value", lambda x: x[0], "value must have 4 dimensions, got 3"),
        ("attn_mask", lambda x: x.int(), "attn_mask must be float32, bfloat16 or float16"),
    ],
)
def test_cpu_kernels_guard_memory_by_themselves(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    if native.CPU_ABSENT:
        pytest.skip(native.CPU_ABSENT)
    call = build(Case("", {**LISTED, "lists": "shared"}), torch.float32, "cpu")
    problem = tokenops.ops.sparse_attention.as_problem(**call, attn_mask=torch.zeros(19, 23))[0]
    bad = problem._replace(**{name: change(getattr(problem, name))})
    [cpu] = [backend for backend in BACKENDS if backend.name == "cpu"]
    with pytest.raises(RuntimeError, match=message):
        cpu.run.forward(bad, torch.empty(2, 4, 11, 24), torch.empty(2, 4, 11), None, False)


def test_every_backend_answers_for_tensors_it_cannot_reach() -> None:
    problem = tokenops.ops.sparse_attention.as_problem(**listed("meta"))[0]
    for backend in BACKENDS:
        if backend.name.startswith("cpu"):
            assert any("runs on CPU tensors, got meta" in reason for reason in backend.objections(problem))
