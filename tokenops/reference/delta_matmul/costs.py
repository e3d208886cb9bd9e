"""What calls of this room cost at least, whoever computes them, and inputs to try them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenops.types import DeltaAttentionProblem, DeltaState, GateProblem, LinearProblem


def example_inputs(
    batch: int = 1,
    tokens: int = 197,
    channels: int = 768,
    slots: int = 48,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Two frames: reference [B, N, C]; x [B, N, C], in which the tokens of index [B, K] are others; weight [C, C], bias [C] of a layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    reference = normal(batch, tokens, channels)
    index = torch.rand(batch, tokens, generator=generator).argsort(-1)[:, :slots].sort(-1).values
    x = reference.scatter(1, index[..., None].expand(-1, -1, channels), normal(batch, slots, channels))
    floats = {"reference": reference, "x": x, "weight": normal(channels, channels) * channels**-0.5, "bias": normal(channels)}
    return {**{name: part.to(device, dtype) for name, part in floats.items()}, "index": index.to(device, torch.int32)}


def gate_bytes(problem: GateProblem, slots: int) -> int:
    """Least traffic with memory: each grid read once and the total written; of the chosen rows values, change and reference written."""
    p = problem
    grids = 1 + (p.reference is not None) + 2 * (p.skip is not None)
    rows = (grids * p.x.shape[1] + 3 * slots) * p.x.shape[0]
    return rows * p.x.shape[2] * p.x.element_size() + 4 * slots * p.x.shape[0]


def linear_flops(problem: LinearProblem, *, backward: bool = False) -> int:
    """Multiplications and additions of the products with the weights, of filled slots only."""
    p = problem
    filled = int((p.index >= 0).sum()) * (p.x.shape[0] // max(p.index.shape[0], 1))
    return linear_flops_of(filled, p.weight.numel(), 0 if p.weight_2 is None else p.weight_2.numel(), p.activation != "none", backward)


def linear_flops_of(rows: int, first: int, second: int, activated: bool, backward: bool) -> int:
    """Of so many rows, and so many weights of the layers. Backward: gradients of rows and weights, and what was activated once more."""
    again = first if activated or second > 0 else 0
    return 2 * rows * (2 * (first + second) + again if backward else first + second)


def linear_bytes(problem: LinearProblem) -> int:
    """Least traffic with memory: weights and listed rows read once, results written once."""
    p = problem
    filled = int((p.index >= 0).sum()) * (p.x.shape[0] // max(p.index.shape[0], 1))
    outputs = (p.weight if p.weight_2 is None else p.weight_2).shape[0]
    weights = sum(part.nbytes for part in (p.weight, p.bias, p.weight_2, p.bias_2) if part is not None)
    return filled * (p.x.shape[2] + outputs) * p.x.element_size() + weights


def attention_flops(problem: DeltaAttentionProblem, paper: bool) -> int:
    """Multiplications and additions of one frame, of filled slots only. Rows that the guard and the rotation add are not counted."""
    p = problem
    batch, heads, tokens, width = p.query.shape
    cells, value_width = p.value.shape[2:]
    if p.rows is None or p.cells is None:
        return batch * heads * attention_flops_of(tokens, cells, None, None, width, value_width, paper, p.crossover)
    counts = torch.stack(torch.broadcast_tensors(*((index >= 0).sum(-1) for index in (p.rows, p.cells))), -1).expand(batch, 2)
    return heads * sum(
        attention_flops_of(tokens, cells, rows, changed, width, value_width, paper, p.crossover) for rows, changed in counts.tolist()
    )


def attention_flops_of(
    tokens: int, cells: int, rows: int | None, changed: int | None, width: int, value_width: int, paper: bool, crossover: float
) -> int:
    """Of one head. Mode "exact": changed rows against all keys, the others against changed keys as they were and as they are. Mode "paper":
    all logits, because the softmax needs them, and two products of changed columns. None: a frame of its own.
    """
    dense = 2 * tokens * cells * (width + value_width)
    if rows is None or changed is None:
        return dense
    if paper:
        return 2 * tokens * (cells * width + 2 * changed * value_width)
    if changed > crossover * cells:
        return dense
    return 2 * (rows * cells + 2 * (tokens - rows) * changed) * (width + value_width)


def attention_bytes(problem: DeltaAttentionProblem, state: DeltaState) -> int:
    """Least traffic with memory: the buffers read once and the result written; sums and statistics of the state read and written; of what
    else the state holds the changed rows, read and written.
    """
    p = problem
    out = p.query[..., :1].numel() * p.value.shape[3] * p.query.element_size()
    grids = p.query.nbytes + p.key.nbytes + p.value.nbytes + out
    sums = sum(part.nbytes for part in (state.output, state.maximum, state.total, state.peak) if part is not None)
    kept = sum(part.nbytes for part in (state.key, state.value, state.probability) if part is not None)
    if p.cells is None:
        return grids + sums + kept
    share = int((p.cells >= 0).sum()) / max(p.cells.shape[0] * p.key.shape[2], 1)
    return grids + 2 * sums + round(2 * kept * share)


def state_bytes(state: DeltaState) -> int:
    return sum(part.nbytes for part in state if part is not None)
