"""Attention on buffers of which a few rows changed since the last frame."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenops.reference.delta_matmul.rows import listed, row_ids, taken, wide
from tokenops.types import DeltaAttentionGradients, DeltaAttentionProblem, DeltaState


def dense(problem: DeltaAttentionProblem) -> Tensor:
    """[B, H, N, Dv]: what every mode gives in a first frame, and what is differentiated. Half types are computed in float32.

    logit[n, m] = scale <query[n], key[m]> + rel_h[n, m // gw] + rel_w[n, m % gw];  out[n] = sum_m softmax_m(logit[n])[m] value[m]

    over cells m of the token grid, pooled if the problem says so.
    """
    key, value = cells(problem)
    return (_logits(problem, key).softmax(-1) @ value.to(wide(value))).to(problem.query.dtype)


def exact(problem: DeltaAttentionProblem, state: DeltaState | None) -> tuple[Tensor, DeltaState]:
    """Dense attention on the buffers, but with the sums of each row carried along: changed keys leave them and come back new.

    With J the changed cells, s the logits of a row and m' = max(m, s_new[J]):
    l' = l exp(m - m') - sum_J exp(s_old - m') + sum_J exp(s_new - m'), and the same for o with the values; out = o / l.

    A row is computed afresh instead if its query changed; if l' is less than ``guard`` times the largest l since it was last computed, for
    then digits have cancelled; if it is not finite; if it is its turn; and all rows of a sample if more than crossover * M cells changed.
    Here all rows are computed afresh and those taken that should be: this says what the numbers are, not how to save work.
    """
    p, dtype = problem, wide(problem.query)
    key, value = cells(p)
    fresh = _sums(_logits(p, key), value.to(dtype))
    batch, _, tokens = p.query.shape[:3]
    if p.index is None or state is None:
        turn = torch.zeros((), dtype=torch.int32, device=p.query.device)
        return _divided(p, *fresh[::2]), DeltaState(fresh[2], value, key, fresh[1], fresh[0], fresh[0], turn, None)
    old_key, old_maximum, old_total, old_peak, old_turn = (_given(part) for part in state[2:7])
    ids = changed_cells(p)
    empty = (ids < 0)[:, None, None, :]
    old, new = (
        _logits(p, rows_of(grid, ids), ids).masked_fill(empty, -torch.inf) for grid in (old_key, key)
    )  # [B, H, N, J], -inf adds nothing
    maximum = old_maximum if ids.shape[1] == 0 else torch.maximum(old_maximum, new.amax(-1))
    shrink, gone, come = torch.exp(old_maximum - maximum), torch.exp(old - maximum[..., None]), torch.exp(new - maximum[..., None])
    total = old_total * shrink - gone.sum(-1) + come.sum(-1)
    output = state.output * shrink[..., None] - gone @ rows_of(state.value, ids).to(dtype) + come @ rows_of(value, ids).to(dtype)
    peak = torch.maximum(old_peak * shrink, total)

    row_changed = listed(row_ids(p.index, batch, tokens), tokens)
    everything = (ids >= 0).sum(-1, keepdim=True) > p.crossover * key.shape[2]
    slice_rows, turns = rotation(tokens, p.refresh)
    its_turn = torch.zeros_like(row_changed)
    if turns > 0:
        its_turn = torch.arange(tokens, device=ids.device) // slice_rows == old_turn
    # a comparison with NaN is false
    sound = (total >= p.guard * peak) & (total > 0.0) & output.isfinite().all(-1)
    afresh = (row_changed | everything | its_turn)[:, None, :] | ~sound
    total, maximum, output = (
        torch.where(afresh, fresh[0], total),
        torch.where(afresh, fresh[1], maximum),
        torch.where(afresh[..., None], fresh[2], output),
    )
    turn = (old_turn + 1) % max(turns, 1)
    return _divided(p, total, output), DeltaState(output, value, key, maximum, total, torch.where(afresh, total, peak), turn, None)


def paper(problem: DeltaAttentionProblem, state: DeltaState | None) -> tuple[Tensor, DeltaState]:
    """The published update: the result is P V, where column j of P is that of the attention matrix when cell j was last listed.

    With J the changed cells, A the attention matrix of this frame: out += A[:, J] dV + (A[:, J] - P[:, J]) V_old; P[:, J] = A[:, J].
    What became of the other columns is discarded, so rows of P need not sum to 1. P and V are stored in the dtype of ``cast`` (of value).
    """
    p, dtype = problem, wide(problem.query)
    key, value = cells(p)
    stored = p.value.dtype if p.cast is None else p.cast
    probability, value = _logits(p, key).softmax(-1).to(stored), value.to(stored)
    if p.index is None or state is None:
        output = probability.to(dtype) @ value.to(dtype)
        return output.to(p.query.dtype), DeltaState(output, value, None, None, None, None, None, probability)
    old_probability = _given(state.probability)
    ids = changed_cells(p)
    at = ids.clamp(min=0)[:, None, None, :].expand(*probability.shape[:3], -1)
    empty = (ids < 0)[:, None, None, :]
    before, after = (x.gather(3, at).to(dtype).masked_fill(empty, 0.0) for x in (old_probability, probability))
    old, new = rows_of(state.value, ids).to(dtype), rows_of(value, ids).to(dtype)
    output = state.output + after @ (new - old) + (after - before) @ old
    columns = listed(ids, key.shape[2])[:, None, None, :]
    probability = torch.where(columns, probability, old_probability)
    return output.to(p.query.dtype), DeltaState(output, value, None, None, None, None, None, probability)


def dense_gradients(problem: DeltaAttentionProblem, grad_out: Tensor) -> DeltaAttentionGradients:
    """Of ``dense``, written out, because an operator runs below autograd. The state is constant to it."""
    p, dtype = problem, wide(problem.query)
    key, value = (x.to(dtype) for x in cells(p))
    probability, grad = _logits(p, key).softmax(-1), grad_out.to(dtype)
    d_probability = grad @ value.mT
    d_logit = probability * (d_probability - (probability * d_probability).sum(-1, keepdim=True))
    rel_h, rel_w = None, None
    if p.rel_h is not None and p.rel_w is not None:
        on_grid = d_logit.unflatten(-1, (p.rel_h.shape[3], p.rel_w.shape[3]))
        rel_h, rel_w = on_grid.sum(-1), on_grid.sum(-2)
    d_key = p.scale * (d_logit.mT @ p.query.to(dtype))
    return DeltaAttentionGradients(p.scale * (d_logit @ key), _spread(p, d_key), _spread(p, probability.mT @ grad), rel_h, rel_w)


def cells(problem: DeltaAttentionProblem) -> tuple[Tensor, Tensor]:
    """key [B, H, M, D] and value [B, H, M, Dv], averaged over the cells of the token grid if the problem pools; of their own dtype."""
    return _pooled(problem, problem.key), _pooled(problem, problem.value)


def changed_cells(problem: DeltaAttentionProblem) -> Tensor:
    """[B, J] int64: the cells of the listed tokens, each once; -1 in empty slots."""
    assert problem.index is not None
    batch, _, tokens = problem.query.shape[:3]
    ids = row_ids(problem.index, batch, tokens)
    if problem.pooling is None:
        return ids
    _, width, pool_h, pool_w = problem.pooling
    cell = ids // width // pool_h * (width // pool_w) + ids % width // pool_w
    marked = listed(cell.masked_fill(ids < 0, -1), tokens // (pool_h * pool_w))
    order = marked.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[:, : ids.shape[1]]
    return order.masked_fill(~marked.gather(1, order), -1)


def rotation(tokens: int, refresh: int) -> tuple[int, int]:
    """(rows computed afresh in a frame, frames until all had their turn) if each row has its turn at least every ``refresh`` frames."""
    if refresh == 0 or tokens == 0:
        return 0, 0
    rows = -(-tokens // refresh)
    return rows, -(-tokens // rows)


def rows_of(grid: Tensor, ids: Tensor) -> Tensor:
    """[B, H, J, D]: the listed rows of a grid [B, H, M, D], the same for every head."""
    return taken(grid.flatten(0, 1), ids.repeat_interleave(grid.shape[1], 0)).unflatten(0, grid.shape[:2])


def _given(part: Tensor | None) -> Tensor:
    """A part of the state that its mode has."""
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
    """(l, m, o) of each row: denominator and numerator of the softmax average, both times exp(-m)."""
    maximum = logits.amax(-1)
    weight = torch.exp(logits - maximum[..., None])
    return weight.sum(-1), maximum, weight @ value


def _divided(p: DeltaAttentionProblem, total: Tensor, output: Tensor) -> Tensor:
    return (output / total[..., None]).to(p.query.dtype)


def _pooled(p: DeltaAttentionProblem, x: Tensor) -> Tensor:
    if p.pooling is None:
        return x
    height, width, pool_h, pool_w = p.pooling
    on_grid = x.to(wide(x)).unflatten(2, (height // pool_h, pool_h, width // pool_w, pool_w))
    return on_grid.mean((3, 5)).flatten(2, 3).to(x.dtype)


def _spread(p: DeltaAttentionProblem, grad: Tensor) -> Tensor:
    """The transpose of ``_pooled``."""
    if p.pooling is None:
        return grad
    height, width, pool_h, pool_w = p.pooling
    on_grid = grad.unflatten(2, (height // pool_h, width // pool_w)) / (pool_h * pool_w)
    return on_grid.repeat_interleave(pool_h, 2).repeat_interleave(pool_w, 3).flatten(2, 3)
