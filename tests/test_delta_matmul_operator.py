"""What torch asks of the operators beside opcheck: vmap, counted operations; and what calls are said to cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from delta_matmul_oracle import lists, normal
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tokenops
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaAttentionProblem, DeltaState, GateProblem, LinearProblem


def assert_vmap_is_a_loop(run: Callable[..., Any], *stacked: Any, in_dims: Any = 0) -> None:
    got = torch.vmap(run, in_dims=in_dims)(*stacked)
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(stacked)
    calls = [run(*(x if dim is None else x.select(dim, at) for x, dim in zip(stacked, dims, strict=True))) for at in range(3)]
    want = torch.stack(calls) if isinstance(got, Tensor) else [torch.stack(parts) for parts in zip(*calls, strict=True)]
    for have, expect in zip([got] if isinstance(got, Tensor) else got, [want] if isinstance(want, Tensor) else want, strict=True):
        torch.testing.assert_close(have, expect)


def test_vmap_of_a_gate_is_a_loop(device: str) -> None:
    x, old, skip = (normal(3, 2, 7, 4, device=device, seed=at) for at in range(3))
    norm = normal(4, device=device, seed=3), normal(4, device=device, seed=4)
    gate = tokenops.delta_gate
    assert_vmap_is_a_loop(lambda x, old: gate(x, old, k=3), x, old)
    assert_vmap_is_a_loop(lambda x, old: gate(x, old, threshold=2.5, norm=norm), x, old.movedim(0, 2), in_dims=(0, 2))
    assert_vmap_is_a_loop(lambda x: gate(x, old[0], k=3, skip=skip[0]), x)
    assert_vmap_is_a_loop(lambda x, skip: gate(x, skip=skip), x, skip)
    index = lists(3, 7, 3, device=device)
    assert_vmap_is_a_loop(lambda x: gate(x, old[0], index=index[0]), x)
    assert_vmap_is_a_loop(lambda index: gate(x[0], old[0], index=index), index)
    # a layer normalisation of its own for each call
    weights = normal(3, 4, device=device)
    assert_vmap_is_a_loop(lambda weight: gate(x[0], old[0], k=2, norm=(weight, norm[1])), weights)


def test_vmap_of_layers_and_buffers_is_a_loop(device: str) -> None:
    x, weights = normal(3, 2, 7, 4, device=device), normal(3, 5, 4, device=device)
    index, shared = torch.stack([lists(2, 7, 3, seed=at, device=device) for at in range(3)]), lists(1, 7, 3, device=device)[0]
    assert_vmap_is_a_loop(lambda x, index: tokenops.gathered_linear(x, weights[0], index=index), x, index)
    assert_vmap_is_a_loop(lambda x: tokenops.gathered_linear(x, weights[0], index=shared, activation="gelu"), x)
    assert_vmap_is_a_loop(lambda weight: tokenops.gathered_mlp(x[0], weight, None, weight.T, None, index=shared), weights)
    rows = normal(3, 2, 3, 4, device=device, seed=1)
    assert_vmap_is_a_loop(lambda x, rows, index: tokenops.update_tokens(x, rows, index=index), x, rows, index)
    assert_vmap_is_a_loop(lambda rows: tokenops.update_tokens(x[0], rows, index=shared), rows)


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_vmap_of_attention_is_a_loop(mode: str, device: str) -> None:
    """Films of their own, each with its state."""
    grids = normal(3, 1, 2, 6, 4, device=device)
    index = torch.tensor([[1, 4], [2, -1], [0, 5]], device=device)
    has = ("output", "value", "probability") if mode == "paper" else DeltaState._fields[:-1]

    def start(x: Tensor) -> tuple[Tensor, ...]:
        out, state = tokenops.delta_attention(x, x, x, mode=mode)
        return out, *(getattr(state, name) for name in has)

    assert_vmap_is_a_loop(start, grids)
    _, *parts = torch.vmap(start)(grids)

    def go_on(x: Tensor, index: Tensor, *parts: Tensor) -> Tensor:
        state = DeltaState(**dict.fromkeys(DeltaState._fields, None) | dict(zip(has, parts, strict=True)))
        return tokenops.delta_attention(x, x, x, index, state, mode=mode)[0]

    # as a caller must not, all rows differ from the state's: the mapped call and the loop still agree
    assert_vmap_is_a_loop(go_on, grids.flip(0), index, *parts)


def test_vmap_passes_gradients_on(device: str) -> None:
    x, old, buffer = (normal(3, 1, 6, 4, device=device, seed=at).requires_grad_() for at in range(3))
    weight, norm = normal(4, 4, device=device).requires_grad_(), normal(2, 4, device=device).requires_grad_()

    def run(x: Tensor, old: Tensor, buffer: Tensor) -> Tensor:
        gate = tokenops.delta_gate(x, old, k=2, norm=(norm[0], norm[1]))
        rows = tokenops.gathered_linear(gate.reference, weight, index=gate, activation="silu")
        grid = tokenops.update_tokens(buffer, rows, index=gate).unsqueeze(1)
        out, _ = tokenops.delta_attention(grid, grid, grid)
        return out.square().sum() + gate.delta.square().sum()

    given = (x, old, buffer, weight, norm)
    got = torch.autograd.grad(torch.vmap(run)(x, old, buffer).sum(), given)
    want = torch.autograd.grad(sum(run(*one) for one in zip(x, old, buffer, strict=True)), given)
    for have, expect in zip(got, want, strict=True):
        torch.testing.assert_close(have, expect, rtol=1e-4, atol=1e-4)


# costs


def attention_problem(index: Tensor | None, cells: Tensor | None, device: str = "cpu") -> DeltaAttentionProblem:
    query, key, value = normal(2, 3, 12, 4, device=device), normal(2, 3, 6, 4, device=device), normal(2, 3, 6, 5, device=device)
    return DeltaAttentionProblem(query, key, value, index, cells, None, None, 0.5, 0.0, 0, 0.5)


def pairs_of_a_frame(rows: int, changed: int) -> int:
    """Counted one by one: with which keys, old or new, each of 12 rows is multiplied."""
    return sum(6 if row < rows else 2 * changed for row in range(12))


def test_operations_of_attention_are_those_of_filled_slots() -> None:
    rows, cells = torch.tensor([[0, -1, 3], [1, 2, -1]]), torch.tensor([[0, -1, -1], [1, 2, 3]])
    dense = 2 * 3 * 2 * 12 * 6 * (4 + 5)
    assert reference.attention_flops(attention_problem(None, None), False) == dense
    # in the second sample half of the cells changed, which is not more than half
    expected = 3 * 2 * (4 + 5) * (pairs_of_a_frame(2, 1) + pairs_of_a_frame(2, 3))
    assert reference.attention_flops(attention_problem(rows, cells), False) == expected
    above = attention_problem(rows, cells)._replace(crossover=0.49)
    assert reference.attention_flops(above, False) == 3 * 2 * (4 + 5) * (pairs_of_a_frame(2, 1) + 12 * 6)
    paper = 3 * 2 * 12 * sum(6 * 4 + 2 * changed * 5 for changed in (1, 3))
    assert reference.attention_flops(attention_problem(rows, cells), True) == paper


def test_the_formula_of_the_issue() -> None:
    """3 J N - 2 J^2 pairs where no key is pooled."""
    for tokens, changed in ((4096, 768), (4096, 256), (10, 0)):
        got = reference.attention_flops_of(tokens, tokens, changed, changed, 64, 64, False, 0.5)
        assert got == 2 * 128 * (3 * changed * tokens - 2 * changed**2)


def test_bytes_are_those_of_the_tensors(device: str) -> None:
    x = torch.zeros(2, 7, 4, dtype=torch.float16)
    gate = GateProblem(x, x, x, None, None, 1e-6, None, None, 2.0, False)
    # x, skip and reference are read, the total and three rows for each of three slots written, and their ids
    assert reference.gate_bytes(gate, 3) == 4 * x.nbytes + 3 * 3 * 2 * 4 * 2 + 2 * 3 * 4
    assert reference.gate_bytes(gate._replace(skip=None), 0) == 2 * x.nbytes
    weight = torch.zeros(5, 4, dtype=torch.float16)
    linear = LinearProblem(x, torch.tensor([[0, -1, 3]]), weight, None, None, None, 1e-6, "none", None, None)
    assert reference.linear_bytes(linear) == weight.nbytes + 2 * 2 * (4 + 5) * 2
    assert reference.linear_flops(linear) == 2 * 4 * 4 * 5
    q = normal(1, 2, 8, 4)
    _, state = tokenops.delta_attention(q, q, q)
    problem = DeltaAttentionProblem(q, q, q, None, None, None, None, 0.5, 0.0, 0, 0.5)
    sums = q.nbytes + 3 * 4 * 2 * 8
    assert reference.attention_bytes(problem, state) == 4 * q.nbytes + sums + 2 * q.nbytes
    # a quarter of the kept rows is read and written
    index = torch.tensor([[3, -1, 5]])
    assert reference.attention_bytes(problem._replace(rows=index, cells=index), state) == 4 * q.nbytes + 2 * sums + q.nbytes
    assert reference.state_bytes(state) == sums + 2 * q.nbytes + 4


def test_operations_are_counted(device: str) -> None:
    x, weight = normal(2, 9, 4, device=device).requires_grad_(), normal(6, 4, device=device).requires_grad_()
    index = torch.tensor([0, -1, 3], device=device)
    with FlopCounterMode(display=False) as counter:
        tokenops.gathered_linear(x, weight, index=index)
    assert counter.get_total_flops() == 2 * 2 * 3 * 24
    with FlopCounterMode(display=False) as counter:
        tokenops.gathered_mlp(x, weight, None, weight.mT, None, index=index).sum().backward()
    # two layers; of each the gradient of rows and weights, and the first once more
    assert counter.get_total_flops() == 2 * 2 * 3 * (48 + 2 * 48 + 24)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokenops.gathered_linear(x, weight, index=index, out=torch.zeros(2, 9, 6, device=device))
    assert counter.get_total_flops() == 2 * 2 * 3 * 24
    q = normal(1, 2, 8, 4, device=device)
    with FlopCounterMode(display=False) as counter:
        _, state = tokenops.delta_attention(q, q, q)
        tokenops.delta_attention(q, q, q, index, state)
        tokenops.delta_attention_(q, q, q, index, state)
        _, paper = tokenops.delta_attention(q, q, q, mode="paper")
        tokenops.delta_attention_(q, q, q, index, paper)
    frame, published = 8 * (3 * 8 + 2 * 5 * 3), 8 * (8 * 4 + 2 * 3 * 4)
    assert counter.get_total_flops() == 2 * 2 * (2 * 8 * 8 * 8 + 2 * frame + published)


def test_example_inputs_differ_where_they_say() -> None:
    inputs = reference.example_inputs(2, 9, 4, 3, dtype=torch.bfloat16)
    gate = tokenops.delta_gate(inputs["x"], inputs["reference"], threshold=0.0)
    for sample in range(2):
        assert gate.index[sample, :3].tolist() == inputs["index"][sample].tolist()
    assert gate.count.tolist() == [3, 3]
    rows = tokenops.gathered_linear(inputs["x"], inputs["weight"], inputs["bias"], index=inputs["index"])
    assert rows.shape == (2, 3, 4)
