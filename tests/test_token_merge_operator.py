"""What torch asks of an operator: schema, fakes, gradients through the dispatcher, compile, export, autocast, vmap."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import assert_close
from token_merge_oracle import random_plan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import tokenops
from tokenops import MergePlan

ops = torch.ops.tokenops
NO_WINDOW = (0, 0, 0, 0)


def normal(*shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def lists(plan: MergePlan) -> tuple[Tensor, ...]:
    return plan.slot, plan.count, plan.order, plan.offsets


def sizes(device: str, batch: int = 2, tokens: int = 12) -> Tensor:
    return torch.arange(1.0, batch * tokens + 1, device=device).view(batch, tokens)


def calls(device: str) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Operators and arguments up to the backend."""
    x, metric, meta = normal(2, 12, 6, device=device), normal(2, 12, 8, device=device, seed=1), normal(2, 5, 8, device=device, seed=2)
    place = torch.cartesian_prod(*(torch.arange(n, dtype=torch.int32, device=device) for n in (3, 4, 1)))
    place, keep = place[None], torch.arange(12, device=device)[None] % 5 > 0
    role = torch.tensor([[0, 1, 2] * 4], dtype=torch.int8, device=device)
    plan, shared = lists(random_plan(2, 12, 7, device)), lists(random_plan(1, 12, 7, device))
    temperature = torch.tensor(0.3, device=device)
    no_more = (None,) * 6
    return {
        "pairs": ("pairwise_argmax", (metric, meta, *no_more, *NO_WINDOW, True)),
        "pairs in a window": (
            "pairwise_argmax",
            (metric, metric, keep, None, sizes(device), None, place, place, -1, 1, 2, 0, False),
        ),
        "match": ("match_tokens", (metric, None, True, False, None, *NO_WINDOW, None, None, 3, None, True, 9)),
        "match by roles": ("match_tokens", (metric, role, False, False, place, -1, 1, 2, 0, sizes(device), None, None, 0.1, True, 12)),
        "plan": ("plan_tokens", (torch.arange(12, dtype=torch.int32, device=device)[None] // 3 * 3, False, 9)),
        "plan of slots": ("plan_tokens", (plan[0], True, 7)),
        "mean": ("merge_tokens", (x, *plan, None, "mean", False)),
        "weighted": ("merge_tokens", (x, *shared, sizes(device), "mean", True)),
        "shared sizes": ("merge_tokens", (x, *plan, sizes(device)[:1], "mean", True)),
        "amax": ("merge_tokens", (x, *plan, None, "amax", True)),
        "drop": ("merge_tokens", (x, *plan, None, "drop", False)),
        "unmerge": ("unmerge_tokens", (x[:, :7], *plan, "copy")),
        "soft": ("soft_merge", (x, metric, meta, None, 0.3, sizes(device), True)),
        "soft, learned": ("soft_merge", (x, metric, meta, temperature, 1.0, None, False)),
    }


CALLS = calls("cpu")
DIFFERENTIABLE = ("merge_tokens", "unmerge_tokens", "soft_merge")
# a choice, and the statistics it is made with, have no gradient
every_call = pytest.mark.parametrize("name", CALLS)
differentiable_call = pytest.mark.parametrize("name", [name for name, (operator, _) in CALLS.items() if operator in DIFFERENTIABLE])


def leaves(operator: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if operator not in DIFFERENTIABLE:
        return arguments
    return tuple(x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


@every_call
def test_operators_pass_opcheck(name: str, backend: str, device: str) -> None:
    operator, arguments = calls(device)[name]
    opcheck(getattr(ops, operator).default, (*leaves(operator, arguments), backend))


@pytest.mark.parametrize("wanted", [[True, True], [True, False], [False, True]], ids=["both", "x", "size"])
@pytest.mark.parametrize("name", ["mean", "weighted", "shared sizes", "amax", "drop"])
def test_backward_of_merging_passes_opcheck(name: str, wanted: list[bool], device: str) -> None:
    _, arguments = calls(device)[name]
    x, *plan, size, mode, _ = arguments
    out, _ = ops.merge_tokens.default(*arguments, None)
    opcheck(ops.merge_tokens_backward.default, (torch.randn_like(out), x, out, *plan, size, mode, wanted, None))


@pytest.mark.parametrize("wanted", [[True] * 5, [False, True, False, False, False]], ids=["all gradients", "one gradient"])
@pytest.mark.parametrize("name", ["soft", "soft, learned"])
def test_backward_of_soft_merging_passes_opcheck(name: str, wanted: list[bool], device: str) -> None:
    _, arguments = calls(device)[name]
    out, mass, lse = ops.soft_merge.default(*arguments, None)
    opcheck(ops.soft_merge_backward.default, (torch.randn_like(out), torch.randn_like(mass), *arguments, out, mass, lse, wanted, None))


def test_a_choice_is_not_differentiable(backend: str, device: str) -> None:
    metric = normal(2, 12, 8, device=device).requires_grad_()
    best, index = tokenops.pairwise_argmax(metric, metric, backend=backend)
    plan = tokenops.match_tokens(metric, r=3, backend=backend)
    assert not best.requires_grad
    assert not index.requires_grad
    assert not any(x.requires_grad for x in plan if isinstance(x, Tensor))
    # what is merged by it is
    (grad,) = torch.autograd.grad(tokenops.merge_tokens(metric, plan, backend=backend).sum(), metric)
    assert grad.count_nonzero() == grad.numel()


@pytest.mark.parametrize("name", ["weighted", "amax", "soft"])
def test_double_backward_is_refused(name: str, device: str) -> None:
    operator, arguments = calls(device)[name]
    arguments = leaves(operator, arguments)
    out = getattr(ops, operator).default(*arguments, None)
    out = out if isinstance(out, Tensor) else out[0]
    (grad,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{operator} cannot be differentiated twice"):
        grad.sum().backward()


def test_forward_mode_is_refused(device: str) -> None:
    x, meta = normal(2, 12, 8, device=device), normal(2, 5, 8, device=device)
    plan = tokenops.match_tokens(x, r=3)
    for run in (
        lambda x: tokenops.merge_tokens(x, plan),
        lambda x: tokenops.unmerge_tokens(x[:, :9], plan),
        lambda x: tokenops.soft_merge(x, x.detach(), meta, temperature=0.1)[0],
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(run, (x,), (torch.ones_like(x),))


# compiled


@pytest.fixture
def compiling() -> Iterator[None]:
    """Inductor has its own ideas of deterministic mode, and a cache that must not answer for an earlier test."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(x: Tensor, weight: Tensor, meta: Tensor, temperature: Tensor, second: str = "ratio") -> tuple[Tensor, Tensor]:
    """Two merging layers with sizes, the way back, and meta tokens: what a model does around the operators."""
    plans, start = [], x
    size = x.new_ones(x.shape[:2])
    for options in ({"r": 4}, {"ratio": 0.25} if second == "ratio" else {"r": 3}):
        x = torch.tanh(x @ weight)
        plan = tokenops.match_tokens(x, class_token=True, **options)
        x, size = tokenops.merge_tokens(x, plan, size=size, return_size=True)
        plans.append(plan)
    whole = tokenops.compose_plans(*plans)
    merged, mass = tokenops.soft_merge(x, x @ weight, meta, temperature=temperature, mass=size)
    return tokenops.unmerge_tokens(x, whole) + tokenops.unmerge_tokens(x, plans) + start, merged * mass[..., None].log1p()


def layer_inputs(tokens: int, device: str, batch: int = 2) -> tuple[Tensor, ...]:
    shapes = (batch, tokens, 16), (16, 16), (batch, 3, 16)
    return *(normal(*shape, device=device, seed=tokens + at) for at, shape in enumerate(shapes)), torch.tensor(0.2, device=device)


def run_layer(function: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    given = tuple(x.clone().requires_grad_() for x in inputs)
    out, merged = function(*given)
    return out, merged, *torch.autograd.grad(out.square().sum() + merged.sum(), given)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool, device: str) -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for tokens, stance in ((20, "default"), (27, "fail_on_recompile")) if dynamic else ((20, "default"),):
        inputs = layer_inputs(tokens, device)
        with torch.compiler.set_stance(stance):
            results = run_layer(compiled, inputs)
        for got, want in zip(results, run_layer(layer, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compiling")
def test_every_scheme_compiles(device: str) -> None:
    x = normal(2, 25, 8, device=device)
    mask = torch.arange(25, device=device) % 7 > 0

    def forms(x: Tensor, mask: Tensor) -> list[Tensor]:
        def match(**options: Any) -> Tensor:
            return tokenops.merge_tokens(x, tokenops.match_tokens(x, **options), mode="amax")

        return [
            match(scheme="kth", k=3),
            match(scheme="grid", grid=(4, 6), cell=(2, 2), ratio=0.4, class_token=True, locality=(2, 2)),
            match(scheme="random", r=7),
            match(scheme="previous_frame", grid=(2, 3, 4), class_token=True, threshold=0.1),
            match(r=5, source_mask=mask, destination_scale=x.detach().abs().amax(-1)),
            match(r=5, grid=(2, 3, 4), class_token=True, locality="frame"),
            tokenops.merge_tokens(x, tokenops.plan_from_parents(torch.arange(25, device=x.device)[None] // 3 * 3, 9)),
            tokenops.merge_tokens(x, tokenops.plan_from_slots(tokenops.pairwise_argmax(x, x[:, :4])[1], 4)),
        ]

    with torch.no_grad():
        # the draws of a compiled graph follow the same generator
        torch.manual_seed(1)
        got = torch.compile(forms, fullgraph=True, backend="aot_eager")(x, mask)
        torch.manual_seed(1)
        for have, want in zip(got, forms(x, mask), strict=True):
            torch.testing.assert_close(have, want)


@pytest.mark.usefixtures("compiling")
def test_exported_program_is_saved_and_loaded(device: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, meta: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
            # a share of a size that is not known yet is more than torch can reason about
            return layer(x, weight, meta, temperature, "r")

    batch, tokens = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("tokens", min=20, max=4096)
    shapes = ({0: batch, 1: tokens}, None, {0: batch}, None)
    program = torch.export.export(Layer(), layer_inputs(24, device), dynamic_shapes=shapes)
    # the graph holds the operators themselves, and no choice of a backend
    made = [node for node in program.graph.nodes if node.target in (ops.match_tokens.default, ops.merge_tokens.default)]
    assert [node.args[-1] for node in made] == [None] * 4
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for inputs in (layer_inputs(24, device), layer_inputs(41, device, batch=5)):
        torch.testing.assert_close(loaded(*inputs), layer(*inputs, "r"))


# autocast, fake tensors, transforms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_what_is_multiplied(dtype: torch.dtype, device: str) -> None:
    x, meta, size = normal(2, 40, 16, device=device), normal(2, 5, 16, device=device, seed=1), sizes(device, tokens=40)
    half, half_meta = x.to(dtype), meta.to(dtype)
    with torch.autocast(device, dtype):
        plan = tokenops.match_tokens(x, r=9, source_scale=size)
        best, index = tokenops.pairwise_argmax(x, half_meta, a_scale=size)
        merged, mass = tokenops.soft_merge(x, half, meta, temperature=0.2, mass=size)
        # nothing is multiplied with anything: x as it is
        kept = tokenops.merge_tokens(x, plan, size=size)
        leaf = x.clone().requires_grad_()
        tokenops.soft_merge(leaf, leaf, meta, temperature=0.2)[0].float().sum().backward()
    assert torch.equal(plan.slot, tokenops.match_tokens(half, r=9, source_scale=size).slot)
    for got, want in zip((best, index), tokenops.pairwise_argmax(half, half_meta, a_scale=size), strict=True):
        assert torch.equal(got, want)
    want_merged, want_mass = tokenops.soft_merge(half, half, half_meta, temperature=0.2, mass=size)
    assert (merged.dtype, mass.dtype, best.dtype, kept.dtype) == (dtype, torch.float32, torch.float32, torch.float32)
    assert torch.equal(merged, want_merged)
    # sizes in a half type would be off by far more
    assert_close("mass", mass.sum(1), size.double().sum(1), torch.float32)
    assert torch.equal(mass, want_mass)
    assert leaf.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(device: str) -> None:
    x = normal(2, 12, 8, device=device).double()
    with torch.autocast(device, torch.bfloat16):
        assert tokenops.pairwise_argmax(x, x)[0].dtype == torch.float64
        assert tokenops.soft_merge(x, x, x, temperature=1.0)[1].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_need_no_gpu(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 197, 64, device="cuda", dtype=dtype)
        size = torch.empty(2, 197, device="cuda")
        meta = torch.empty(2, 8, 64, device="cuda", dtype=dtype)
        best, index = tokenops.pairwise_argmax(x, meta)
        assert (best.shape, best.dtype, best.device.type) == ((2, 197), torch.float32, "cuda")
        assert (index.shape, index.dtype, index.device.type) == ((2, 197), torch.int32, "cuda")
        plan = tokenops.match_tokens(x, r=16, class_token=True, source_scale=size)
        shapes = [t.shape for t in plan if isinstance(t, Tensor)]
        assert shapes == [(2, 197), (2,), (2, 197), (2, 182)]
        assert all(t.dtype == torch.int32 and t.device.type == "cuda" for t in plan if isinstance(t, Tensor))
        for scheme in ({"scheme": "grid", "grid": (14, 14), "cell": (2, 2), "class_token": True, "r": 99}, {"scheme": "kth", "k": 4}):
            assert tokenops.match_tokens(x, **scheme).n_out in (98, 49)
        merged = tokenops.merge_tokens(x, plan, size=size)
        assert (merged.shape, merged.dtype, merged.device.type) == ((2, 181, 64), dtype, "cuda")
        assert tokenops.unmerge_tokens(merged, plan).shape == x.shape
        soft, mass = tokenops.soft_merge(x, x, meta, temperature=torch.empty((), device="cuda"), mass=size)
        assert (soft.shape, soft.dtype, mass.shape, mass.dtype) == ((2, 8, 64), dtype, (2, 8), torch.float32)
        # by the operators themselves: without CUDA, autograd in torch aborts the process at a fake CUDA tensor that requires a gradient
        of_x, of_size = ops.merge_tokens_backward.default(merged, x, merged, *plan[:2], *plan[3:], size, "mean", [True, True], None)
        assert (of_x.shape, of_x.dtype, of_size.shape, of_size.dtype) == (x.shape, dtype, size.shape, torch.float32)


def test_meta_tensors_pass_through() -> None:
    x = torch.empty(2, 20, 8, device="meta", requires_grad=True)
    plan = tokenops.match_tokens(x, r=4)
    out = tokenops.merge_tokens(x, plan)
    assert (out.shape, out.device.type) == ((2, 16, 8), "meta")
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def assert_vmap_is_a_loop(run: Callable[..., Any], *stacked: Tensor, in_dims: Any = 0) -> None:
    got = torch.vmap(run, in_dims=in_dims)(*stacked)
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(stacked)
    calls = [run(*(x if dim is None else x.select(dim, at) for x, dim in zip(stacked, dims, strict=True))) for at in range(3)]
    want = torch.stack(calls) if isinstance(got, Tensor) else [torch.stack(parts) for parts in zip(*calls, strict=True)]
    for have, expect in zip([got] if isinstance(got, Tensor) else got, [want] if isinstance(want, Tensor) else want, strict=True):
        torch.testing.assert_close(have, expect)


def test_vmap_is_a_loop(device: str) -> None:
    x, metas, size = normal(3, 2, 12, 8, device=device), normal(3, 2, 5, 8, device=device), sizes(device)
    plan = random_plan(2, 12, 7, device)
    shared = tokenops.match_tokens(x[0, :1], r=3)

    def merge(x: Tensor, size: Tensor) -> Tensor:
        return tokenops.merge_tokens(x, tokenops.match_tokens(x, r=3), size=size)

    assert_vmap_is_a_loop(lambda x: tokenops.pairwise_argmax(x, metas[0], a_scale=size), x)
    assert_vmap_is_a_loop(lambda b: tokenops.pairwise_argmax(x[0], b), metas.movedim(0, 1), in_dims=1)
    assert_vmap_is_a_loop(merge, x, size.expand(3, -1, -1))
    assert_vmap_is_a_loop(merge, x, size, in_dims=(0, None))
    assert_vmap_is_a_loop(lambda x: tokenops.merge_tokens(x, shared), x)
    assert_vmap_is_a_loop(lambda x: tokenops.unmerge_tokens(x[:, :7], plan, mode="drop"), x)
    assert_vmap_is_a_loop(lambda x, meta: tokenops.soft_merge(x, x, meta, temperature=0.1, mass=size), x, metas)
    temperatures = torch.tensor([0.1, 0.2, 0.4], device=device)
    assert_vmap_is_a_loop(lambda t: tokenops.soft_merge(x[0], x[0], metas[0], temperature=t), temperatures)
    targets = torch.stack([plan.slot, plan.slot.flip(1), plan.slot * 0])
    assert_vmap_is_a_loop(lambda t: tokenops.plan_from_slots(t, 7).order, targets)


def test_vmap_passes_gradients_on(device: str) -> None:
    x, meta = normal(3, 2, 12, 8, device=device).requires_grad_(), normal(2, 5, 8, device=device).requires_grad_()
    size, temperature = sizes(device).requires_grad_(), torch.tensor(0.3, device=device, requires_grad=True)
    plan = random_plan(2, 12, 7, device)

    def run(x: Tensor) -> Tensor:
        merged = tokenops.merge_tokens(x, plan, size=size)
        soft, mass = tokenops.soft_merge(x, x, meta, temperature=temperature, mass=size)
        return tokenops.unmerge_tokens(merged, plan).sum((1, 2)) + (soft * mass[..., None]).square().sum((1, 2))

    given = (x, meta, size, temperature)
    got = torch.autograd.grad(torch.vmap(run)(x).square().sum(), given)
    want = torch.autograd.grad(torch.stack([run(one) for one in x]).square().sum(), given)
    for have, expect in zip(got, want, strict=True):
        torch.testing.assert_close(have, expect, rtol=1e-4, atol=1e-4)
    # and the other way round: many gradients of one call
    out = run(x[0])
    batched = torch.autograd.grad(out, given[1:], torch.eye(2, device=device), is_grads_batched=True, retain_graph=True)
    looped = [torch.autograd.grad(out, given[1:], row, retain_graph=True) for row in torch.eye(2, device=device)]
    for have, expect in zip(batched, zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(have, torch.stack(expect), rtol=1e-4, atol=1e-4)


def test_operations_are_counted(device: str) -> None:
    x, meta = normal(2, 13, 8, device=device).requires_grad_(), normal(2, 5, 8, device=device)
    with FlopCounterMode(display=False) as counter:
        tokenops.pairwise_argmax(x, meta)
        tokenops.match_tokens(x, r=3)
        tokenops.match_tokens(x, r=3, scheme=torch.ones(13, dtype=torch.int8, device=device))
        tokenops.soft_merge(x, x, meta, temperature=0.1)[0].sum().backward()
    products = 13 * 5 * 8 + 7 * 6 * 8 + 13 * 13 * 8 + 13 * 5 * (8 + 8) + 13 * 5 * (3 * 8 + 2 * 8)
    assert counter.get_total_flops() == 2 * 2 * products
