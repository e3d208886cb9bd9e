"""Choosing, halting and packing tokens: the executable specification.

``selection``, ``halting``, ``packing`` and ``unpacking`` are the definitions, differentiable but for the first; halting takes float64 too.
``select``, ``halt``, ``halt_backward``, ``pack`` and ``unpack`` serve them as a backend. Beside them stand the checks of contents; nothing
else here waits for the device. Letters: L lists, B samples, G grids (B, or 1
that all lists share), N tokens, K slots of a list, T packed rows, C channels, W elements of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenops.reference.sparse_attention import check_bounds
from tokenops.types import HaltBackwardProblem, HaltProblem, HaltState, PackedTokens, TokenIndex

# choosing


def selection(score: Tensor, k: int, threshold: float | None, protect: int) -> TokenIndex:
    """The k best of each row of score [L, N] that are greater than ``threshold``, as ascending ids filled up with -1.

    The first ``protect`` tokens come before all others, whatever their score. Of equal scores the lowest id wins; NaN is worse than -inf.
    """
    # torch would round the threshold to a half type
    score = score if score.dtype == torch.float64 else score.float()
    rows = score.shape[1]
    ids = torch.arange(rows, device=score.device)
    protected = ids < protect
    passes = torch.ones_like(score, dtype=torch.bool) if threshold is None else score > threshold
    passes = passes | protected
    # three classes, each sorted behind the one before: protected, numbers, NaN; then those that do not pass
    rank = torch.where(passes, torch.where(protected, 0, torch.where(score.isnan(), 2, 1)), 3)
    value = score.masked_fill(score.isnan() | protected, 0.0)
    order = value.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, rank.gather(-1, order).argsort(dim=-1, stable=True))
    chosen = order[:, :k]
    chosen = chosen.masked_fill(~passes.gather(-1, chosen), rows).sort(-1).values
    index = torch.full((score.shape[0], k), -1, dtype=torch.int32, device=score.device)
    index[:, : chosen.shape[1]] = chosen.masked_fill(chosen == rows, -1)
    return TokenIndex(index, passes.sum(-1, dtype=torch.int32).clamp(max=k))


def select(score: Tensor, threshold: float | None, protect: int, index: Tensor, count: Tensor) -> None:
    """Serve as a backend: fill index [L, k] and count [L]."""
    result = selection(score, index.shape[1], threshold, protect)
    index.copy_(result.index)
    count.copy_(result.count)


def check_scores(score: Tensor, protect: int) -> None:
    """
    Raises:
        ValueError: a score that matters is NaN.
    """
    at = score[:, protect:].isnan().nonzero()
    if len(at) > 0:
        row, column = at[0].tolist()
        raise ValueError(f"score must not be NaN, got NaN for token {protect + column} of list {row}")


# halting


def halting(problem: HaltProblem) -> HaltState:
    """One step of adaptive computation time. Half types are computed in float32, float64 in float64. Masks are constants to autograd.

    h = sigmoid(scale x[..., 0] - center), 1 in the last layer;  cum += h;  rho += active
    reached = (cum > 1 - eps) and active;  going = cum < 1 - eps
    out += x * (remain where reached, h where going) on active rows;  rho += remain where reached;  counter += going
    remain -= h where going;  active = going

    Rows behind the last sample of a packed call keep their state and are not active any more.
    """
    x, state = problem.x, first_state(problem) if problem.state is None else problem.state
    dtype = state.cum.dtype
    h = torch.sigmoid(x[..., 0].to(dtype) * problem.scale - problem.center)
    if problem.last:
        h = torch.ones_like(h)
    inside = _inside(problem.x, problem.cu_seqlens)
    h = torch.where(inside, h, 0.0)
    active = state.active & inside
    cum = state.cum + h
    reached = (cum > problem.limit) & active
    going = (cum < problem.limit) & inside
    weight = torch.where(reached, state.remain, torch.where(going & active, h, 0.0))
    return HaltState(
        cum,
        state.remain - torch.where(going, h, 0.0),
        going,
        state.rho + active.to(dtype) + torch.where(reached, state.remain, 0.0),
        state.counter + going.to(dtype),
        _accumulate(problem, state.out, weight, active & (reached | going)),
    )


def first_state(problem: HaltProblem) -> HaltState:
    """Before the first step: nothing halted, nothing accumulated."""
    x, bounds = problem.x, problem.cu_seqlens
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    zero = torch.zeros(x.shape[:2], dtype=dtype, device=x.device)
    samples = x.shape[0] if bounds is None else bounds.shape[0] - 1
    out = zero.new_zeros((samples, x.shape[2]) if problem.class_only else x.shape)
    return HaltState(zero, torch.ones_like(zero), torch.ones_like(zero, dtype=torch.bool), zero, torch.ones_like(zero), out)


def _inside(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[1, N] bool: which rows belong to a sample."""
    row = torch.arange(x.shape[1], device=x.device)
    return (row < (x.shape[1] if cu_seqlens is None else cu_seqlens[-1])).unsqueeze(0)


def _accumulate(problem: HaltProblem, out: Tensor, weight: Tensor, taking: Tensor) -> Tensor:
    """out plus the weighted rows. A row that takes no part is not read: whatever stands there, it adds nothing."""
    rows = problem.x
    if problem.class_only:
        rows, weight, taking = (_first_rows(t, problem.cu_seqlens) for t in (rows, weight, taking))
        if problem.cu_seqlens is not None:
            taking = taking & (problem.cu_seqlens[1:] > problem.cu_seqlens[:-1])
    # selected before it is multiplied: 0 times infinity is NaN
    return out + weight.unsqueeze(-1) * torch.where(taking.unsqueeze(-1), rows.to(out.dtype), 0.0)


def _first_rows(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[S, ...] from [B, N, ...]: the first row of each sample. An empty sample gets any row."""
    if cu_seqlens is None:
        return x[:, 0]
    if x.shape[1] == 0:
        return x.new_zeros(cu_seqlens.shape[0] - 1, *x.shape[2:])
    return x[0, cu_seqlens[:-1].long().clamp(0, x.shape[1] - 1)]


def halt(problem: HaltProblem, new: HaltState) -> None:
    """Serve as a backend: fill the new state, which may be the old one (in place)."""
    for target, result in zip(new, halting(problem), strict=True):
        target.copy_(result)


def halt_backward(problem: HaltBackwardProblem, grad_x: Tensor | None, grad_remain: Tensor | None) -> None:
    """Serve as a backend: fill grad_x [B, N, C] and grad_remain [B, N]. Written out, because an operator runs below autograd.

    With w the weight of a row, dw = <grad_out, x>, dh = grad_cum - going grad_remain + (going and active) dw:
    dx = w grad_out, dx[..., 0] += scale h (1 - h) dh;  dremain = grad_remain + reached (grad_rho + dw).
    The gradients of cum, rho and out pass through a step unchanged.
    """
    p, x, dtype = problem, problem.x, problem.cum.dtype
    zero = torch.zeros_like(p.cum)
    inside = _inside(x, p.cu_seqlens)
    active = inside.expand_as(p.cum) if p.active is None else p.active & inside
    reached, going = (p.cum > p.limit) & active, (p.cum < p.limit) & inside
    h = torch.ones_like(zero) if p.last else torch.sigmoid(x[..., 0].to(dtype) * p.scale - p.center)
    remain = torch.ones_like(zero) if p.remain is None else p.remain
    weight = torch.where(reached, remain, torch.where(going & active, h, 0.0))
    taking = active & (reached | going)

    d_out = torch.zeros_like(x, dtype=dtype)
    if p.grad_out is not None and p.class_only:
        d_out = _put_first_rows(p.grad_out.to(dtype), d_out, p.cu_seqlens)
    elif p.grad_out is not None:
        d_out = p.grad_out.to(dtype)
    d_out = d_out.masked_fill(~taking.unsqueeze(-1), 0.0)
    d_weight = (d_out * x.to(dtype).masked_fill(~taking.unsqueeze(-1), 0.0)).sum(-1)
    g_cum, g_remain, g_rho = (zero if g is None else g for g in (p.grad_cum, p.grad_remain, p.grad_rho))
    if grad_x is not None:
        d_h = torch.where(inside, g_cum, 0.0) - torch.where(going, g_remain, 0.0) + torch.where(going & active, d_weight, 0.0)
        d_x = weight.unsqueeze(-1) * d_out
        if not p.last:
            d_x[..., 0] += torch.where(inside, p.scale * h * (1.0 - h) * d_h, 0.0)
        grad_x.copy_(d_x)
    if grad_remain is not None:
        grad_remain.copy_(g_remain + torch.where(reached, g_rho + d_weight, 0.0))


def _put_first_rows(rows: Tensor, grid: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B, N, C]: ``grid`` with rows [S, C] added at the first row of each sample that has one."""
    if cu_seqlens is None:
        return torch.cat([rows.unsqueeze(1), grid[:, 1:]], dim=1)
    if grid.shape[1] == 0:
        return grid
    filled = (cu_seqlens[1:] > cu_seqlens[:-1]).unsqueeze(-1)
    # an empty sample adds nothing to whatever row it points at
    at = cu_seqlens[:-1].long().clamp(0, grid.shape[1] - 1)
    return grid[0].index_add(0, at, rows.masked_fill(~filled, 0.0)).unsqueeze(0)


def check_halt(problem: HaltProblem | HaltBackwardProblem) -> None:
    """
    Raises:
        ValueError: cu_seqlens that do not start at 0, decrease or pass the end.
    """
    if problem.cu_seqlens is not None:
        check_bounds("cu_seqlens", problem.cu_seqlens, problem.x.shape[1])


# packing


def packing(x: Tensor, index: Tensor | None, count: Tensor | None, total: int) -> PackedTokens:
    """The listed rows of x [G, N, W], list after list, as [total, W]; zero behind them.

    Args:
        index: [1|B, K] row ids in the order wanted, -1 (or any id outside the grid) = empty slot.
        count: [B], in place of index: the first rows of each grid.
    """
    ids = _ids(x.shape[1], index, count)
    lists = max(x.shape[0], ids.shape[0])
    ids = ids.expand(lists, -1)
    # rows numbered through all grids; with one grid for all lists they are so already
    rows = ids + torch.arange(lists, device=x.device)[:, None] * (x.shape[1] if x.shape[0] > 1 else 0)
    rows = rows.masked_fill(ids < 0, -1).flatten()
    # filled slots first, in their order
    order = (rows < 0).to(torch.int8).sort(stable=True).indices[:total]
    rows = torch.nn.functional.pad(rows[order], (0, total - order.shape[0]), value=-1)
    ends = (ids >= 0).sum(-1, dtype=torch.int32).cumsum(0, dtype=torch.int32).clamp(max=total)
    return PackedTokens(_take(x.flatten(0, 1), rows), torch.nn.functional.pad(ends, (1, 0)))


def unpacking(tokens: Tensor, cu_seqlens: Tensor, index: Tensor | None, n: int, shared: bool) -> Tensor:
    """[G, n, W]: the transpose of ``packing``, tokens [T, W] at the rows that the lists name and zero elsewhere.

    Args:
        index: [1|B, K] as given to ``packing``; None: the first rows of each grid.
        shared: one grid for all lists.
    """
    lists = cu_seqlens.shape[0] - 1
    starts, lengths = cu_seqlens[:-1, None].long(), cu_seqlens.diff()[:, None]
    if index is None:
        slot = torch.arange(n, device=tokens.device).expand(lists, -1)
        source = torch.where(slot < lengths, starts + slot, -1)
    else:
        ids = _ids(n, index, None).expand(lists, -1)
        rank = (ids >= 0).cumsum(-1) - 1
        filled = (ids >= 0) & (rank < lengths)
        grids = 1 if shared else lists
        offset = torch.arange(lists, device=tokens.device)[:, None] * (0 if shared else n)
        # empty slots all write to one more row, which is cut off
        target = torch.where(filled, ids + offset, grids * n).flatten()
        source = torch.full((grids * n + 1,), -1, device=tokens.device).scatter(0, target, (starts + rank).flatten())[:-1].view(grids, n)
    return _take(tokens, source)


def _ids(rows: int, index: Tensor | None, count: Tensor | None) -> Tensor:
    """[1|B, K] int64, -1 in empty slots; an id outside the grid is one, as in every kernel."""
    if index is not None:
        ids = index.long()
        return ids.masked_fill((ids < 0) | (ids >= rows), -1)
    assert count is not None
    ids = torch.arange(rows, device=count.device).expand(count.shape[0], -1)
    return ids.masked_fill(ids >= count[:, None], -1)


def _take(rows: Tensor, source: Tensor) -> Tensor:
    """rows[source], zero where source is no row."""
    missing = (source < 0) | (source >= rows.shape[0])
    if rows.shape[0] == 0:
        return rows.new_zeros(*source.shape, rows.shape[1])
    return rows[source.clamp(0, rows.shape[0] - 1)].masked_fill(missing.unsqueeze(-1), 0)


def pack(x: Tensor, index: Tensor | None, count: Tensor | None, tokens: Tensor, cu_seqlens: Tensor) -> None:
    """Serve as a backend: fill tokens [T, W] and cu_seqlens [B + 1]."""
    result = packing(x, index, count, tokens.shape[0])
    tokens.copy_(result.tokens)
    cu_seqlens.copy_(result.cu_seqlens)


def unpack(tokens: Tensor, cu_seqlens: Tensor, index: Tensor | None, x: Tensor) -> None:
    """Serve as a backend: fill x [G, n, W]. One grid serves all lists."""
    x.copy_(unpacking(tokens, cu_seqlens, index, x.shape[1], shared=x.shape[0] == 1))


def check_pack(x: Tensor, index: Tensor | None, count: Tensor | None, total: int) -> None:
    """
    Raises:
        ValueError: an id out of range or repeated, a count outside [0, N], or more rows than ``total``.
    """
    rows = x.shape[1]
    if index is not None:
        check_lists(index, rows, shared=x.shape[0] == 1)
    if count is not None:
        outside = ((count < 0) | (count > rows)).nonzero()
        if len(outside) > 0:
            at = int(outside[0])
            raise ValueError(f"count must be in [0, {rows}], got {int(count[at])} for sample {at}")
    ids = _ids(rows, index, count)
    needed = int((ids >= 0).sum()) * (max(x.shape[0], ids.shape[0]) // max(ids.shape[0], 1))
    if needed > total:
        raise ValueError(f"total must be at least the number of rows to pack, {needed}, got {total}")


def check_unpack(tokens: Tensor, cu_seqlens: Tensor, index: Tensor | None, n: int, shared: bool) -> None:
    """
    Raises:
        ValueError: cu_seqlens that do not start at 0, decrease or pass the end, an id out of range or repeated, or lists of other lengths.
    """
    check_bounds("cu_seqlens", cu_seqlens, tokens.shape[0])
    lengths = cu_seqlens.diff()
    if index is None:
        if lengths.numel() > 0 and int(lengths.max()) > n:
            raise ValueError(f"n must be at least the longest sample, {int(lengths.max())} rows, got {n}")
        return
    check_lists(index, n, shared)
    filled = (index >= 0).sum(-1).expand_as(lengths)
    wrong = (filled != lengths).nonzero()
    if len(wrong) > 0:
        at = int(wrong[0])
        got = f"{int(filled[at])} ids for the {int(lengths[at])} tokens of sample {at}"
        raise ValueError(f"index must name one row for each token, got {got}")


def check_lists(index: Tensor, rows: int, shared: bool) -> None:
    """
    Raises:
        ValueError: an id out of range or repeated; in lists that share a grid, repeated anywhere.
    """
    outside = ((index < -1) | (index >= rows)).nonzero()
    if len(outside) > 0:
        at = outside[0].tolist()
        raise ValueError(f"index must hold ids in [0, {rows}) or -1 for an empty slot, got {int(index[tuple(at)])} at position {at}")
    ids = index.reshape(1, -1) if shared else index
    # empty slots get distinct negative numbers
    ids = torch.where(ids < 0, -1 - torch.arange(ids.shape[1], device=ids.device), ids.long())
    ordered = ids.sort(-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
    if len(repeated) > 0:
        row, at = repeated[0].tolist()
        scope = "lists that share a grid" if shared and index.shape[0] > 1 else "a list"
        raise ValueError(f"index must not repeat an id within {scope}, got {int(ordered[row, at])} twice")
