"""What results are compared with: the definition in float64 on the same rounded inputs, by one tolerance rule for everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokenops
from tokenops.ops.sparse_attention import BACKENDS, as_packed_problem, as_problem
from tokenops.reference import sparse_attention as reference
from tokenops.types import AttentionProblem

# ||a - b|| <= tolerance (||b|| + 0.01 sqrt(numel)): for every result, backend and gradient
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DIFFERENTIABLE = ("query", "key", "value", "kv_bias", "rel_h", "rel_w")
# arguments of the call that say how it is run, not what it computes
HOW = ("return_aux", "out", "backend")

Call = dict[str, Any]  # keyword arguments of sparse_attention, or of sparse_attention_varlen if it has cu_seqlens


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    row_sq: Tensor
    grads: dict[str, Tensor]


def assert_close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """The one tolerance rule. -inf (the lse of an empty row) must stand where it should; everything else must be finite."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    empty = want == -torch.inf
    assert torch.equal(got == -torch.inf, empty), (
        f"{name}: -inf at {(got == -torch.inf).nonzero().tolist()}, expected at {empty.nonzero().tolist()}"
    )
    got, want = got.masked_fill(empty, 0.0), want.masked_fill(empty, 0.0)
    assert got.isfinite().all(), f"{name}: {got[~got.isfinite()][:4].tolist()} at {(~got.isfinite()).nonzero()[:4].tolist()}"
    error, bound = (got - want).norm().item(), TOLERANCE[dtype] * (want.norm().item() + 0.01 * want.numel() ** 0.5)
    assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}, the norm is {want.norm():.3g}"


def is_packed(call: Call) -> bool:
    return "cu_seqlens_q" in call


def by_tensor(call: Call) -> Call:
    """rel_pos as two entries, rel_h and rel_w, so that every tensor of the call has a name."""
    rest = {name: x for name, x in call.items() if name != "rel_pos"}
    return rest if call.get("rel_pos") is None else {**rest, "rel_h": call["rel_pos"][0], "rel_w": call["rel_pos"][1]}


def as_call(call: Call) -> Call:
    """The other way round: as the public functions take it."""
    rest = {name: x for name, x in call.items() if name not in ("rel_h", "rel_w")}
    return {**rest, "rel_pos": (call["rel_h"], call["rel_w"])} if "rel_h" in call else rest


def problem_of(call: Call) -> AttentionProblem:
    call = {name: value for name, value in as_call(call).items() if name not in HOW}
    return (as_packed_problem(**call) if is_packed(call) else as_problem(**call))[0]


def objections(backend: str, call: Call, needs: tuple[str, ...] = ()) -> list[str]:
    """Why a backend would refuse the call."""
    [chosen] = [candidate for candidate in BACKENDS if candidate.name == backend]
    return chosen.objections(problem_of(call), needs=needs)


def expected(call: Call, grad_out: Tensor | None, wanted: tuple[str, ...] = DIFFERENTIABLE) -> Results:
    """By autograd through the definition, in float64."""
    call = {name: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in by_tensor(call).items()}
    leaves = {name: call[name].requires_grad_() for name in wanted if call.get(name) is not None}
    out, lse, row_sq = reference.attention(problem_of(call))
    if is_packed(call):
        out, lse, row_sq = out.squeeze(0).transpose(0, 1), lse.squeeze(0), row_sq.squeeze(0)
    grads = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    # a packed call of no sequences depends on none of them
    if grad_out is not None and out.requires_grad:
        found = torch.autograd.grad(out, list(leaves.values()), grad_out.double(), allow_unused=True, materialize_grads=True)
        grads = dict(zip(leaves, found, strict=True))
    return Results(out.detach(), lse.detach(), row_sq.detach(), grads)


def computed(call: Call, grad_out: Tensor | None, backend: str | None, wanted: tuple[str, ...] = DIFFERENTIABLE) -> Results:
    """By the public function."""
    run = tokenops.sparse_attention_varlen if is_packed(call) else tokenops.sparse_attention
    call = by_tensor(call)
    # detach keeps the memory layout, which is part of the case
    leaves = {name: call[name].detach().requires_grad_(grad_out is not None) for name in wanted if call.get(name) is not None}
    out, aux = run(**as_call({**call, **leaves}), return_aux=("lse", "row_sq"), backend=backend)
    grads = {}
    if grad_out is not None:
        grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad_out), strict=True))
    return Results(out.detach(), aux.lse, aux.row_sq, grads)


def assert_right(call: Call, backend: str | None, grad_out: Tensor | None = None, seed: int = 1) -> Results:
    """Output, statistics and every gradient of one call on one backend are those of the definition. Returns what was computed."""
    call = by_tensor(call)
    dtype, device = call["query"].dtype, call["query"].device
    if grad_out is None:
        shape = expected(call, None).out.shape
        grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    want = expected(call, grad_out)
    got = computed(call, grad_out, backend)
    assert got.out.dtype == dtype
    assert got.lse.dtype == got.row_sq.dtype == torch.float32
    # statistics are float32 also of float64 inputs
    aux_dtype = torch.float32 if dtype == torch.float64 else dtype
    assert_close("out", got.out, want.out, dtype)
    assert_close("lse", got.lse, want.lse, aux_dtype)
    assert_close("row_sq", got.row_sq, want.row_sq, aux_dtype)
    for name, grad in want.grads.items():
        assert got.grads[name].dtype == call[name].dtype
        assert_close(f"gradient of {name}", got.grads[name], grad, dtype)
    return got


def assert_same_numbers(name: str, got: Tensor, want: Tensor, backend: str) -> None:
    """Of the same call with its tensors laid out otherwise."""
    if backend == "triton" and got.is_floating_point():
        # which lanes add up a row, and with it the order, its compiler chooses by what it knows of alignment
        assert_close(name, got, want, got.dtype)
    else:
        assert torch.equal(got, want), name


def assert_same_bits(call: Call, grad_out: Tensor | None, backend: str | None, threads: Sequence[int]) -> None:
    """One run for each number of threads, all of them equal to the last bit."""
    runs = []
    for number in threads:
        torch.set_num_threads(number)
        got = computed(call, grad_out, backend)
        runs.append([got.out, got.lse, got.row_sq, *got.grads.values()])
    for run in runs[1:]:
        for first, other in zip(runs[0], run, strict=True):
            assert torch.equal(first, other)
