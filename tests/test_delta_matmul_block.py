"""A whole block, frame after frame, on every backend: what the published variants mean, gradients through frames, whole-frame graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from eventful_block import BlockResult, BlockState, Options, Weights, run_block
from eventful_oracle import Oracle
from oracle import assert_close
from torch import Tensor

HEADS, WIDTH = 2, 8


def weights_of(channels: int = HEADS * WIDTH, *, table: tuple[int, int] | None = None, seed: int = 0, device: str = "cpu") -> Weights:
    """Of a block. ``table``: the grid that position rows are for."""
    generator = torch.Generator().manual_seed(seed)

    def layer(name: str, rows: int, columns: int) -> Weights:
        scale = columns**-0.5
        return {
            f"{name}.weight": scale * torch.randn(rows, columns, generator=generator),
            f"{name}.bias": 0.05 * torch.randn(rows, generator=generator),
        }

    def norm(name: str) -> Weights:
        return {
            f"{name}.weight": 1.0 + 0.1 * torch.randn(channels, generator=generator),
            f"{name}.bias": 0.05 * torch.randn(channels, generator=generator),
        }

    weights = norm("input_layer_norm") | layer("qkv", 3 * channels, channels) | layer("projection", channels, channels)
    weights |= norm("mlp_layer_norm") | layer("mlp_1", 2 * channels, channels) | layer("mlp_2", channels, 2 * channels)
    if table is not None:
        for name, size in zip(("y_embedding", "x_embedding"), table, strict=True):
            weights[f"relative_position.{name}"] = 0.2 * torch.randn(2 * size - 1, WIDTH, generator=generator)
    return {name: x.to(device) for name, x in weights.items()}


def film(frames: int, batch: int, tokens: int, channels: int = HEADS * WIDTH, *, seed: int = 1, device: str = "cpu") -> list[Tensor]:
    """Frames [B, N, C]: all tokens stir a little, a few of each sample jump."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=generator)
    result = [x]
    for _ in range(frames - 1):
        jump = (torch.rand(batch, tokens, 1, generator=generator) < 0.3).float()
        x = x + (0.05 + jump) * torch.randn(x.shape, generator=generator)
        result.append(x)
    return [x.to(device) for x in result]


GRID = (4, 6)
TOP: dict[str, Any] = {"k": 7}
VARIANTS: dict[str, dict[str, Any]] = {
    "top-k": {},
    "one token": {"choice": {"k": 1}},
    "no token": {"choice": {"k": 0}},
    "every token": {"choice": {"k": 24}},
    "fraction": {"choice": {"fraction": 0.4}},
    "threshold": {"choice": {"threshold": 2.0}},
    "a threshold that nothing passes": {"choice": {"threshold": 1e3}},
    "greatest sums of changes": {"order": 1.0},
    "frame differences": {"whole": True},
    "gates before norms": {"gate_first": True},
    "gates before norms, threshold": {"gate_first": True, "choice": {"threshold": 2.0}},
    "position bias": {"rel_pos": True},
    "pooled keys": {"pool": (2, 2)},
    "pooled keys, position bias": {"pool": (2, 3), "rel_pos": True},
    "pooled keys, threshold": {"pool": (2, 2), "choice": {"threshold": 2.0}},
    "exact attention": {"mode": "exact"},
    "exact attention, position bias, threshold": {"mode": "exact", "rel_pos": True, "choice": {"threshold": 2.0}},
    "exact attention, pooled keys": {"mode": "exact", "pool": (2, 2)},
    "windows": {"window": (2, 3)},
    "windows that do not fit": {"window": (3, 4), "rel_pos": True},
}


def options_of(variant: str, **more: Any) -> Options:
    return Options(HEADS, GRID, **{"choice": TOP, **VARIANTS[variant], **more})


def table_of(options: Options) -> tuple[int, int] | None:
    return (options.window or options.grid) if options.rel_pos else None


def run(frames: list[Tensor], weights: Weights, options: Options, backend: str | None) -> list[BlockResult]:
    state, results = None, []
    for x in frames:
        results.append(run_block(x, weights, state, options, backend=backend))
        state = results[-1].state
    return results


def ids_of(index: Tensor) -> list[int]:
    return sorted(set(index.tolist()) - {-1})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_is_the_published_one(variant: str, backend: str, device: str) -> None:
    """Two samples that change in different tokens; the same choices as from the equations in float64."""
    options = options_of(variant)
    weights = weights_of(table=table_of(options), device=device)
    frames = film(6, 2, 24, device=device)
    oracles = [Oracle({name: x.cpu() for name, x in weights.items()}, options) for _ in range(2)]
    for frame, (x, result) in enumerate(zip(frames, run(frames, weights, options, backend), strict=True)):
        want = torch.stack([oracle.frame(sample) for oracle, sample in zip(oracles, x.cpu().double(), strict=True)])
        for sample, oracle in enumerate(oracles):
            # a choice that rounding could turn would say nothing
            assert oracle.margin > 1e-4
            for gate, ids in zip(result.gates, oracle.chosen, strict=True):
                assert ids_of(gate.index[sample]) == ids.tolist(), (frame, sample)
                assert gate.count[sample] == len(ids)
        assert_close(f"frame {frame}", result.out, want, torch.float32)


@pytest.mark.parametrize("variant", ["top-k", "threshold", "pooled keys", "exact attention", "frame differences"])
def test_many_frames(variant: str, backend: str, device: str) -> None:
    """Errors do not add up: after 24 frames as after one."""
    options = options_of(variant)
    weights, frames = weights_of(device=device), film(24, 1, 24, device=device, seed=3)
    oracle = Oracle({name: x.cpu() for name, x in weights.items()}, options)
    for x, result in zip(frames, run(frames, weights, options, backend), strict=True):
        want = oracle.frame(x[0].cpu().double())
        assert oracle.margin > 1e-5
        assert_close("out", result.out[0], want, torch.float32)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_attention_in_half_types(cast: torch.dtype, backend: str, device: str) -> None:
    """Choices are the oracle's: rounded attention may make others of its own."""
    options, weights, frames = options_of("top-k"), weights_of(device=device), film(6, 1, 24, device=device)
    oracle = Oracle({name: x.cpu() for name, x in weights.items()}, options)
    state = None
    for x in frames:
        want = oracle.frame(x[0].cpu().double())
        forced = tuple(ids.to(device)[None] for ids in oracle.chosen)
        assert len(forced) == 3
        out, state, _ = run_block(x, weights, state, options._replace(cast=cast), forced, backend)
        assert state.attention is not None
        assert state.attention.probability is not None
        assert state.attention.probability.dtype == cast
        assert_close("out", out[0], want, cast)


# gradients through frames


@pytest.mark.parametrize("detach", [False, True], ids=["unrolled", "detached"])
@pytest.mark.parametrize("variant", ["exact attention", "exact attention, position bias, threshold", "gates before norms", "windows"])
def test_in_pieces_equals_whole(variant: str, detach: bool, backend: str, device: str) -> None:
    """Frame after frame through the operators: outputs and gradients of autograd through the equations of all frames at once."""
    options = options_of(variant, mode="exact")
    leaves = {name: x.requires_grad_() for name, x in weights_of(table=table_of(options), device=device).items()}
    frames = [x.requires_grad_() for x in film(4, 1, 24, device=device)]
    weights = {name: x.detach().cpu().double().requires_grad_() for name, x in leaves.items()}
    exact_frames = [x.detach().cpu().double().requires_grad_() for x in frames]
    oracle, state = Oracle(weights, options), None
    total, exact_total = torch.zeros((), device=device), torch.zeros((), dtype=torch.float64)
    for at, (x, exact_x) in enumerate(zip(frames, exact_frames, strict=True)):
        if state is not None and detach:
            state = state.detach()
            oracle.kept = {name: part.detach() for name, part in oracle.kept.items()}
        out, state, _ = run_block(x, leaves, state, options, backend=backend)
        want = oracle.frame(exact_x[0])
        assert oracle.margin > 1e-4
        assert_close(f"frame {at}", out[0], want, torch.float32)
        direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(at))
        total, exact_total = total + (out[0] * direction.to(device)).sum(), exact_total + (want * direction.double()).sum()
    names = [*leaves, *(f"frame {at}" for at in range(4))]
    grads = torch.autograd.grad(total, [*leaves.values(), *frames])
    exact_grads = torch.autograd.grad(exact_total, [*weights.values(), *exact_frames])
    for name, grad, want in zip(names, grads, exact_grads, strict=True):
        want = want.unsqueeze(0) if grad.dim() > want.dim() else want
        assert_close(f"gradient of {name}", grad, want, torch.float32)


def test_a_cut_between_frames_stops_the_gradient(backend: str, device: str) -> None:
    """What a token was in the first frame reaches the loss of the second through references and buffers, unless they are detached."""
    options, weights = options_of("exact attention"), weights_of(device=device)
    first, second = (x.requires_grad_() for x in film(2, 1, 24, device=device))
    for detach in (False, True):
        state: BlockState = run_block(first, weights, None, options, backend=backend).state
        out = run_block(second, weights, state.detach() if detach else state, options, backend=backend).out
        [grad] = torch.autograd.grad(out.square().sum(), [first], allow_unused=True, materialize_grads=True)
        assert (grad == 0).all() == detach


# whole frames as graphs


@pytest.fixture
def compiling() -> Iterator[None]:
    """Inductor has its own ideas of deterministic mode, and a cache that must not answer for an earlier test."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(x: Tensor, weights: Weights, state: BlockState, grid: tuple[int, int], mode: str) -> tuple[Tensor, BlockState]:
    out, new, _ = run_block(x, weights, state, Options(HEADS, grid, TOP, mode))
    return out, new


def parts(results: tuple[Tensor, BlockState]) -> list[Tensor]:
    """Every tensor of a step's results."""
    out, state = results
    attention = [] if state.attention is None else list(state.attention)
    return [out, *(part for part in (*state._replace(attention=None), *attention) if part is not None)]


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("mode", ["exact", "paper"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_frame_compiles_without_a_graph_break(dynamic: bool, mode: str, device: str) -> None:
    """Gates, layers, buffers and attention; dynamic: films of another batch and number of tokens need no new graph.

    Sizes that are equal by chance count as one: the batch is not the number of heads.
    """
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    weights = weights_of(device=device)
    for grid, batch, stance in (((4, 6), 3, "default"), ((5, 6), 5, "fail_on_recompile")) if dynamic else (((4, 6), 3, "default"),):
        frames = film(3, batch, grid[0] * grid[1], device=device)
        state = run_block(frames[0], weights, None, Options(HEADS, grid, TOP, mode)).state
        for x in frames[1:]:
            with torch.compiler.set_stance(stance):
                got = compiled(x, weights, state, grid, mode)
            want = step(x, weights, state, grid, mode)
            for have, expect in zip(parts(got), parts(want), strict=True):
                torch.testing.assert_close(have, expect, rtol=1e-4, atol=1e-4)
            state = want[1]


@pytest.mark.usefixtures("compiling")
def test_a_compiled_frame_has_gradients(device: str) -> None:
    """By inductor, forward and backward."""
    frames, grads = film(2, 1, 24, device=device), []
    for run in (step, torch.compile(step, fullgraph=True)):
        leaves = {name: x.requires_grad_() for name, x in weights_of(device=device).items()}
        state = run_block(frames[0], leaves, None, options_of("exact attention")).state
        out, _ = run(frames[1], leaves, state, GRID, "exact")
        grads.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    for want, have in zip(*grads, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("compiling")
def test_a_frame_is_exported(device: str) -> None:
    class Step(torch.nn.Module):
        def forward(self, x: Tensor, weights: Weights, state: BlockState) -> tuple[Tensor, BlockState]:
            return step(x, weights, state, GRID, "exact")

    weights, frames = weights_of(device=device), film(3, 2, 24, device=device)
    state = run_block(frames[0], weights, None, options_of("exact attention")).state
    program = torch.export.export(Step(), (frames[1], weights, state))
    # the graph holds the operators themselves, and no choice of a backend
    made = [node for node in program.graph.nodes if str(node.target).startswith("tokenops.")]
    assert {str(node.target).split(".")[1] for node in made} >= {"delta_gate", "gathered_linear", "update_tokens", "delta_attention"}
    assert all(node.args[-1] is None for node in made)
    for x in frames[1:]:
        for have, expect in zip(parts(program.module()(x, weights, state)), parts(step(x, weights, state, GRID, "exact")), strict=True):
            torch.testing.assert_close(have, expect, rtol=1e-4, atol=1e-4)
