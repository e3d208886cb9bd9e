"""What torch asks of an operator: schema, fakes, gradients through the dispatcher, compile, export, autocast, vmap."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import LISTED, Call, Case, as_bshd, build, with_mask
from oracle import as_call, assert_close, by_tensor, expected, problem_of
from test_sparse_attention_varlen import packed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import tokenops
from tokenops.reference import sparse_attention as reference

ops = torch.ops.tokenops


def listed(device: str, change: Callable[[Call], Call] = lambda call: call, **more: Any) -> Call:
    return build(Case("", {**LISTED, "empty": 0.2, **more}, change), torch.float32, device)


def dense_arguments(call: Call) -> tuple[Any, ...]:
    """Of the operator, up to the options that its relatives do not share."""
    p = problem_of(call)
    return (*p[:9], p.dropout_seed, p.dropout_p, p.is_causal, p.scale)


def packed_arguments(call: Call) -> tuple[Any, ...]:
    p = problem_of(call)
    rows = (call["query"], call["key"], call["value"], p.cu_seqlens_q, p.cu_seqlens_k, p.q_index, p.kv_index, p.kv_bias)
    rel = (None if x is None else x.squeeze(0).transpose(0, 1) for x in (p.rel_h, p.rel_w))
    return (*rows, *rel, p.dropout_seed, p.max_seqlen_q, p.max_seqlen_k, p.dropout_p, p.is_causal, p.scale)


def differentiable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


OPERATORS = {
    "lists": ("sparse_attention", dense_arguments, lambda device: listed(device)),
    "grouped heads, bias": ("sparse_attention", dense_arguments, lambda device: listed(device, kv_heads=2, bias=True)),
    "mask, causal": ("sparse_attention", dense_arguments, lambda device: listed(device, with_mask("bool", "bhNM", is_causal=True))),
    "float mask": ("sparse_attention", dense_arguments, lambda device: listed(device, with_mask("float", "BhNM"))),
    "rel_pos, lists": ("sparse_attention", dense_arguments, lambda device: listed(device, rel_grid=(4, 6), key_rows=24)),
    "BSHD, no lists": ("sparse_attention", dense_arguments, lambda device: as_bshd(listed(device, kept=None, kv_kept=None))),
    "packed": ("sparse_attention_varlen", packed_arguments, lambda device: packed(device=device)),
    "packed, rel_pos": ("sparse_attention_varlen", packed_arguments, lambda device: packed(rel_grid=(6, 7), device=device)),
    "packed, lists, bias": (
        "sparse_attention_varlen",
        packed_arguments,
        lambda device: packed(listed="head", padding=3, empty=0.2, bias=True, device=device),
    ),
}


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest, device: str) -> tuple[str, tuple[Any, ...]]:
    """A name and arguments."""
    name, arguments_of, make = OPERATORS[request.param]
    return name, arguments_of(make(device))


def test_functional_operator_passes_opcheck(operator: tuple[str, tuple[Any, ...]]) -> None:
    name, arguments = operator
    opcheck(getattr(ops, name).default, (*differentiable(arguments), True, None))


def test_in_place_operator_passes_opcheck(operator: tuple[str, tuple[Any, ...]]) -> None:
    name, arguments = operator
    query, value = arguments[0], arguments[2]
    grid = torch.zeros(*query.shape[:-1], value.shape[-1], device=query.device)
    opcheck(getattr(ops, name + "_").default, (grid, *arguments, False, None))


@pytest.mark.parametrize("wanted", [[True] * 4, [False, True, False, False]], ids=["all gradients", "one gradient"])
def test_backward_operator_passes_opcheck(operator: tuple[str, tuple[Any, ...]], wanted: list[bool]) -> None:
    name, arguments = operator
    out, lse, _ = getattr(ops, name).default(*arguments, False, None)
    rel_h = 7 if name == "sparse_attention" else 8
    of_rel = wanted[0] and arguments[rel_h] is not None
    mask = arguments[6] if name == "sparse_attention" else None
    of_mask = wanted[0] and mask is not None and mask.is_floating_point()
    wanted = [*wanted, of_mask, of_rel, of_rel]
    opcheck(getattr(ops, name + "_backward").default, (torch.randn_like(out), out, lse, *arguments, wanted, None))


@pytest.mark.parametrize("name", ["grouped heads, bias", "rel_pos, lists", "packed, rel_pos", "packed, lists, bias"])
def test_every_backend_passes_opcheck(name: str, backend: str, device: str) -> None:
    operator, arguments_of, make = OPERATORS[name]
    opcheck(getattr(ops, operator).default, (*differentiable(arguments_of(make(device))), True, backend))


def test_double_backward_is_refused(operator: tuple[str, tuple[Any, ...]]) -> None:
    name, arguments = operator
    arguments = differentiable(arguments)
    out = getattr(ops, name).default(*arguments, False, None)[0]
    (grad,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} cannot be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["query", "key", "value", "kv_bias"])
def test_forward_mode_is_refused(name: str, device: str) -> None:
    call = listed(device, bias=True)
    tangent = torch.ones_like(call[name])
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: tokenops.sparse_attention(**{**call, name: x}), (call[name],), (tangent,))
    # of something else, beside a call that it does not pass through
    _, derivative = torch.func.jvp(lambda x: tokenops.sparse_attention(**call).sum() * x.sum(), (call[name],), (tangent,))
    torch.testing.assert_close(derivative, tokenops.sparse_attention(**call).sum() * tangent.numel())


# compiled


@pytest.fixture
def compiling() -> Iterator[None]:
    """Inductor has its own ideas of deterministic mode, and a cache that must not answer for an earlier test."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    """Projection, attention over kept tokens, merged heads: what a model does around the operator."""
    q, k, v = (x @ weight).unflatten(-1, (3, 4, 16)).transpose(1, 3).unbind(2)
    index = tokenops.index_from_mask(keep, max_k=12)
    out, aux = tokenops.sparse_attention(q, k, v, is_causal=True, q_index=index, kv_index=index, kv_bias=bias, return_aux=("lse",))
    return out.transpose(1, 2).flatten(2) + aux.lse.transpose(1, 2).masked_fill(~aux.lse.transpose(1, 2).isfinite(), 0.0).sum(
        -1, keepdim=True
    )


def layer_inputs(rows: int, device: str, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((batch, rows, 32), (32, 192), (batch, rows)))
    keep = torch.rand(batch, rows, generator=generator) < 0.5
    return tuple(t.to(device) for t in (x, weight, bias, keep))


def run_layer(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, weight, bias = (t.clone().requires_grad_() for t in inputs[:3])
    out = function(x, weight, bias, inputs[3])
    return out, *torch.autograd.grad(out.square().sum(), (x, weight, bias))


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool, device: str) -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for rows, stance in ((20, "default"), (27, "fail_on_recompile")) if dynamic else ((20, "default"),):
        inputs = layer_inputs(rows, device)
        with torch.compiler.set_stance(stance):
            results = run_layer(compiled, inputs)
        for got, want in zip(results, run_layer(layer, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compiling")
def test_packed_grid_and_dropout_forms_compile(device: str) -> None:
    call = packed(listed="shared", device=device)

    def forms(query: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plain = tokenops.sparse_attention_varlen(**{**call, "query": query})
        dropped = tokenops.sparse_attention_varlen(**{**call, "query": query}, dropout_p=1.0)
        tokenops.sparse_attention_varlen(**{**call, "query": query}, out=grid)
        return plain, dropped, grid * 1.0

    with torch.no_grad():
        grids = [torch.zeros(*call["query"].shape[:2], 24, device=device) for _ in range(2)]
        got = torch.compile(forms, fullgraph=True, backend="aot_eager")(call["query"], grids[0])
        want = forms(call["query"], grids[1])
    assert torch.equal(grids[0], grids[1])
    for have, expect in zip(got, want, strict=True):
        assert torch.equal(have, expect)


@pytest.mark.usefixtures("compiling")
def test_exported_program_is_saved_and_loaded(device: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
            return layer(x, weight, bias, keep)

    batch, rows = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("rows", min=13, max=4096)
    shapes = ({0: batch, 1: rows}, None, {0: batch, 1: rows}, {0: batch, 1: rows})
    program = torch.export.export(Layer(), layer_inputs(20, device), dynamic_shapes=shapes)
    # the graph holds the operator itself, and no choice of a backend
    calls = [node for node in program.graph.nodes if node.target is ops.sparse_attention.default]
    assert [node.args[-1] for node in calls] == [None]
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for inputs in (layer_inputs(20, device), layer_inputs(31, device, batch=5)):
        torch.testing.assert_close(loaded(*inputs), layer(*inputs))


# autocast, fake tensors, transforms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_query_key_and_value_only(dtype: torch.dtype, device: str) -> None:
    call = listed(device, with_mask("float", "bhNM"), bias=True, key_rows=24, rel_grid=(4, 6))
    half = {name: call[name].to(dtype) for name in ("query", "key", "value")}
    want = tokenops.sparse_attention(**{**call, **half})
    with torch.autocast(device, dtype):
        got = tokenops.sparse_attention(**call)
        # mixed inputs are what autocast is for
        mixed = tokenops.sparse_attention(**{**call, "key": half["key"]})
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert torch.equal(mixed, want)
    # a bias rounded to a half type would be off by more than the result's own rounding
    assert_close("out", got, expected({**call, **half}, None).out, dtype)
    leaf = call["query"].clone().requires_grad_()
    with torch.autocast(device, dtype):
        tokenops.sparse_attention(**{**call, "query": leaf}).float().sum().backward()
    assert leaf.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(device: str) -> None:
    call = build(Case("", LISTED), torch.float64, device)
    with torch.autocast(device, torch.bfloat16):
        assert tokenops.sparse_attention(**call).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_need_no_gpu(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 19, 4, 16, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))
        index = torch.empty(2, 7, device="cuda", dtype=torch.int32)
        out, aux = tokenops.sparse_attention(q, k, v, q_index=index, kv_index=index, return_aux=("lse", "row_sq"))
        assert out.shape == (2, 4, 7, 16)
        assert out.stride() == (7 * 64, 16, 64, 1)
        assert (out.dtype, out.device.type) == (dtype, "cuda")
        assert aux.lse.shape == aux.row_sq.shape == (2, 4, 7)
        assert aux.lse.dtype == torch.float32
        # by the operator itself: without CUDA, autograd in torch aborts the process at a fake CUDA tensor that requires a gradient
        problem = (q, k, v, index.unsqueeze(1), index.unsqueeze(1), None, None, None, None, None, 0.0, False, 0.25)
        wanted = [True] * 3 + [False] * 4
        grads = ops.sparse_attention_backward.default(torch.empty_like(out), out, aux.lse, *problem, wanted, None)
        for grad, grid in zip(grads[:3], (q, k, v), strict=True):
            assert (grad.shape, grad.stride(), grad.dtype, grad.device.type) == (grid.shape, grid.stride(), dtype, "cuda")
        bounds = torch.empty(3, device="cuda", dtype=torch.int32)
        rows = torch.empty(30, 4, 16, device="cuda", dtype=dtype)
        assert tokenops.sparse_attention_varlen(rows, rows, rows, bounds, bounds).shape == (30, 4, 16)


def test_meta_tensors_pass_through() -> None:
    call = listed("meta", bias=True)
    out, aux = tokenops.sparse_attention(**call, return_aux=("lse",))
    assert (out.shape, out.device.type, aux.lse.shape) == ((2, 4, 11, 24), "meta", (2, 4, 11))
    call["key"].requires_grad_()
    assert torch.autograd.grad(tokenops.sparse_attention(**call).sum(), call["key"])[0].shape == call["key"].shape


@pytest.mark.parametrize("mapped", ["query", "lists", "positions", "everything"])
def test_vmap_is_a_loop(mapped: str, device: str) -> None:
    sizes = {**LISTED, "bias": True, "empty": 0.2, "key_rows": 24, "rel_grid": (4, 6)}
    calls = [by_tensor(build(Case("", sizes), torch.float32, device, seed=seed)) for seed in range(3)]
    names = {"query": ("query",), "lists": ("q_index", "kv_index"), "positions": ("rel_w",), "everything": tuple(calls[0])}[mapped]
    stacked = [torch.stack([call[name] for call in calls], dim=1) for name in names]

    def run(*values: Tensor) -> Tensor:
        return tokenops.sparse_attention(**as_call({**calls[0], **dict(zip(names, values, strict=True))}))

    got = torch.vmap(run, in_dims=1)(*stacked)
    want = torch.stack([run(*(call[name] for name in names)) for call in calls])
    torch.testing.assert_close(got, want)


def test_vmap_passes_gradients_on(device: str) -> None:
    call = by_tensor(listed(device, with_mask("float", "bhNM"), bias=True, key_rows=24, rel_grid=(4, 6)))
    names = ("query", "value", "kv_bias", "attn_mask", "rel_h", "rel_w")
    leaves = [call[name].detach().requires_grad_() for name in names]
    queries = torch.randn(3, *call["query"].shape, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()

    def run(query: Tensor) -> Tensor:
        return tokenops.sparse_attention(**as_call({**call, **dict(zip(names, leaves, strict=True)), "query": query}))

    got = torch.autograd.grad(torch.vmap(run)(queries).square().sum(), [queries, *leaves[1:]])
    want = torch.autograd.grad(torch.stack([run(query) for query in queries]).square().sum(), [queries, *leaves[1:]])
    for have, expect in zip(got, want, strict=True):
        torch.testing.assert_close(have, expect)


@pytest.mark.parametrize("bias_batch", [1, 2], ids=["shared bias", "bias per sample"])
def test_vmap_of_the_backward_pass(bias_batch: int, device: str) -> None:
    call = by_tensor(listed(device, bias=True, key_rows=24, rel_grid=(4, 6)))
    call["kv_bias"] = call["kv_bias"][:bias_batch]
    leaves = [call[name].requires_grad_() for name in ("query", "key", "value", "kv_bias", "rel_h", "rel_w")]
    out = tokenops.sparse_attention(**as_call(call))
    grad_outs = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    got = torch.autograd.grad(out, leaves, grad_outs, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(out, leaves, grad_out, retain_graph=True) for grad_out in grad_outs]
    for have, *expect in zip(got, *want, strict=True):
        torch.testing.assert_close(have, torch.stack(expect))


def test_operations_are_counted(device: str) -> None:
    call = listed(device, empty=0.0)
    call["query"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = tokenops.sparse_attention(**call)
    assert counter.get_total_flops() == reference.flops(problem_of(call)) == 2 * 2 * 4 * 11 * 13 * (16 + 24)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == reference.flops(problem_of(call), backward=True) == 2 * 2 * 4 * 11 * 13 * (3 * 16 + 2 * 24)
    dense = listed(device, kept=None, kv_kept=None)
    with FlopCounterMode(display=False) as ours:
        tokenops.sparse_attention(**dense)
    with FlopCounterMode(display=False) as torchs:
        scaled_dot_product_attention(dense["query"], dense["key"], dense["value"])
    assert ours.get_total_flops() == torchs.get_total_flops()
    sequences = packed(device=device)
    with FlopCounterMode(display=False) as counter:
        tokenops.sparse_attention_varlen(**sequences)
    assert counter.get_total_flops() == reference.flops(problem_of(sequences))


def test_operations_of_listed_sequences_are_counted_without_contents() -> None:
    rows, bounds = torch.empty(24, 2, 16), torch.arange(0, 13, 6, dtype=torch.int32)
    ids = torch.stack([torch.randperm(24)[:12] for _ in range(2)]).int()
    counts = []
    for device in ("cpu", "meta"):
        x, cu_seqlens, index = rows.to(device), bounds.to(device), ids.to(device)
        with FlopCounterMode(display=False) as counter:
            tokenops.sparse_attention_varlen(x, x, x, cu_seqlens, cu_seqlens, 6, 6, q_index=index, kv_index=index)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 2 * 6 * 6 * (16 + 16)] * 2


def test_checkpointing_repeats_the_call(device: str) -> None:
    call = listed(device)
    grads = []
    for run in (
        tokenops.sparse_attention,
        lambda **given: torch.utils.checkpoint.checkpoint(tokenops.sparse_attention, **given, use_reentrant=False),
    ):
        leaf = call["key"].clone().requires_grad_()
        run(**{**call, "key": leaf}).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_inference_mode(device: str) -> None:
    call = listed(device)
    want = tokenops.sparse_attention(**call)
    with torch.inference_mode():
        assert torch.equal(tokenops.sparse_attention(**call), want)
        grid = torch.zeros(2, 4, 19, 24, device=device)
        tokenops.sparse_attention(**call, out=grid)
    assert (grid[tokenops.mask_from_index(call["q_index"], 19)] != 0.0).any()
