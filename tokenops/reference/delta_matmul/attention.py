"""Attention on buffers of which a few rows changed since the last frame."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenops.reference.delta_matmul.rows import listed, row_ids, taken, wide
from tokenops.types import DeltaAttentionProblem, DeltaState

_LOG2E = 1.0 / math.log(2.0)


def dense(problem: DeltaAttentionProblem) -> Tensor:
    """[B, H, N, Dv]: what every mode gives in a first frame, and what is differentiated. Half types are computed in float32.

    logit[n, m] = scale <query[n], key[m]> + rel_h[n, m // gw] + rel_w[n, m % gw];  out[n] = sum_m softmax_m(logit[n])[m] value[m]
    """
    return (_logits(problem, problem.key).softmax(-1) @ problem.value.to(wide(problem.value))).to(problem.query.dtype)


def exact(problem: DeltaAttentionProblem, state: DeltaState | None) -> tuple[Tensor, DeltaState]:
    """Dense attention on the buffers, but with the sums of each row carried along: changed keys leave them and come back new.

    With J the changed cells, s the logits of a row and m' = max(m, s_new[J]):
    l' = l exp(m - m') - sum_J exp(s_old - m') + sum_J exp(s_new - m'), and the same for o with the values; out = o / l.

    A row is computed afresh instead if its query changed; if l' is less than ``guard`` times the largest l since it was last computed, for
    then digits have cancelled; if it is not finite; if it is its turn; and all rows of a sample if more than crossover * M cells changed.
    Here all rows are computed afresh and those taken that should be: this says what the numbers are, not how to save work.
    """
    p, dtype = problem, wide(problem.query)
    fresh = _sums(_logits(p, p.key) * _LOG2E, p.value.to(dtype))
    batch, _, tokens = p.query.shape[:3]
    if state is None:
        turn = torch.zeros((), dtype=torch.int32, device=p.query.device)
        return _divided(p, *fresh[::2]), DeltaState(fresh[2], p.value, p.key, fresh[1], fresh[0], fresh[0], turn, None)
    old_key, old_maximum, old_total, old_peak, old_turn = (_given(part) for part in state[2:7])
    rows, ids = row_ids(_given(p.rows), batch, tokens), row_ids(_given(p.cells), batch, p.key.shape[2])
    empty = (ids < 0)[:, None, None, :]
    old, new = (
        (_logits(p, rows_of(grid, ids), ids) * _LOG2E).masked_fill(empty, -torch.inf) for grid in (old_key, p.key)
    )  # [B, H, N, J], -inf adds nothing
    maximum = old_maximum if ids.shape[1] == 0 else torch.maximum(old_maximum, new.amax(-1))
    shrink, gone, come = torch.exp2(old_maximum - maximum), torch.exp2(old - maximum[..., None]), torch.exp2(new - maximum[..., None])
    total = old_total * shrink - gone.sum(-1) + come.sum(-1)
    output = state.output * shrink[..., None] - gone @ rows_of(state.value, ids).to(dtype) + come @ rows_of(p.value, ids).to(dtype)
    peak = torch.maximum(old_peak * shrink, total)

    everything = (ids >= 0).sum(-1, keepdim=True) > p.crossover * p.key.shape[2]
    slice_rows, turns = rotation(tokens, p.refresh)
    its_turn = torch.zeros(tokens, dtype=torch.bool, device=ids.device)
    if turns > 0:
        its_turn = torch.arange(tokens, device=ids.device) // slice_rows == old_turn
    # a comparison with NaN is false
    sound = (total >= p.guard * peak) & (total > 0.0) & output.isfinite().all(-1)
    afresh = (listed(rows, tokens) | everything | its_turn)[:, None, :] | ~sound
    total, maximum, output = (
        torch.where(afresh, fresh[0], total),
        torch.where(afresh, fresh[1], maximum),
        torch.where(afresh[..., None], fresh[2], output),
    )
    turn = (old_turn + 1) % max(turns, 1)
    return _divided(p, total, output), DeltaState(
        output, p.value, p.key, maximum, total, torch.where(afresh, total, peak), turn.to(torch.int32), None
    )


def paper(problem: DeltaAttentionProblem, state: DeltaState | None, stored: torch.dtype) -> tuple[Tensor, DeltaState]:
    """The published update: the result is P V, where column j of P is that of the attention matrix when cell j was last listed.

    With J the changed cells, A the attention matrix of this frame: out += A[:, J] dV + (A[:, J] - P[:, J]) V_old; P[:, J] = A[:, J].
    What became of the other columns is discarded, so rows of P need not sum to 1. P and V are ``stored`` in this dtype.
    """
    p, dtype = problem, wide(problem.query)
    attention, value = _logits(p, p.key).softmax(-1).mT.to(stored), p.value.to(stored)
    if state is None:
        output = attention.mT.to(dtype) @ value.to(dtype)
        return output.to(p.query.dtype), DeltaState(output, value, None, None, None, None, None, attention)
    probability, ids = _given(state.probability), row_ids(_given(p.cells), p.key.shape[0], p.key.shape[2])
    before, after, old, new = (rows_of(grid, ids).to(dtype) for grid in (probability, attention, state.value, value))
    output = state.output + after.mT @ (new - old) + (after - before).mT @ old
    changed = listed(ids, p.key.shape[2])[:, None, :, None]
    probability = torch.where(changed, attention, probability)
    return output.to(p.query.dtype), DeltaState(output, value, None, None, None, None, None, probability)


def pooled(x: Tensor, grid: tuple[int, int], pool: tuple[int, int]) -> Tensor:
    """[B, H, M, D]: averages over cells of the token grid, rounded to the dtype of x."""
    (height, width), (pool_h, pool_w) = grid, pool
    on_grid = x.to(wide(x)).unflatten(2, (height // pool_h, pool_h, width // pool_w, pool_w))
    return on_grid.mean((3, 5)).flatten(2, 3).to(x.dtype)


def pooled_index(index: Tensor, grid: tuple[int, int], pool: tuple[int, int]) -> Tensor:
    """[1|B, J] int32: the cells of the listed tokens, each once; -1 in empty slots. An id outside the grid gives no cell."""
    (height, width), (pool_h, pool_w) = grid, pool
    cells, slots = height // pool_h * (width // pool_w), index.shape[1]
    ids = row_ids(index, index.shape[0], height * width)
    cell = ids // width // pool_h * (width // pool_w) + ids % width // pool_w
    marked = listed(cell.masked_fill(ids < 0, -1), cells)
    order = marked.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[:, :slots]
    return order.masked_fill(~marked.gather(1, order), -1).to(torch.int32)


def rotation(tokens: int, refresh: int) -> tuple[int, int]:
    """(rows computed afresh in a frame, frames until all had their turn) if each row has its turn at least every ``refresh`` frames."""
    if refresh == 0 or tokens == 0:
        return 0, 0
    rows = -(-tokens // refresh)
    return rows, -(-tokens // rows)


def rows_of(grid: Tensor, ids: Tensor) -> Tensor:
    """[B, H, J, D]: the listed rows of a grid [B, H, M, D], the same for every head; 0 in empty slots."""
    return taken(grid.flatten(0, 1), ids.repeat_interleave(grid.shape[1], 0)).unflatten(0, grid.shape[:2])


def _given(part: Tensor | None) -> Tensor:
    """A part that goes with the mode."""
    assert part is not None
    return part


def _logits(p: DeltaAttentionProblem, key: Tensor, ids: Tensor | None = None) -> Tensor:
    """[B, H, N, J] of the keys [B, H, J, D] that stand in cells ``ids`` [B, J]; by default in all, in order."""
    dtype = wide(p.query)
    logits = p.scale * (p.query.to(dtype) @ key.to(dtype).mT)
    if p.rel_h is None or p.rel_w is None:
        return logits
    bias = (p.rel_h.to(dtype).unsqueeze(-1) + p.rel_w.to(dtype).unsqueeze(-2)).flatten(-2)
    if ids is not None:
        bias = bias.gather(3, ids.clamp(min=0)[:, None, None, :].expand(*bias.shape[:3], -1))
    return logits + bias


def _sums(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(l, m, o) of each row: denominator and numerator of the softmax average, both times 2 ** -m. Logits are in units of ln 2."""
    maximum = logits.amax(-1)
    weight = torch.exp2(logits - maximum[..., None])
    return weight.sum(-1), maximum, weight @ value


def _divided(p: DeltaAttentionProblem, total: Tensor, output: Tensor) -> Tensor:
    return (output / total[..., None]).to(p.query.dtype)
