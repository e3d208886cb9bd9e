"""Attention over gathered tokens: the executable specification.

``attention`` is the definition, differentiable and in float64 if asked; ``forward`` and ``backward`` serve it as a backend. Beside them
stand the check of index contents, example inputs, and what a call must cost at least. Letters: B batch, N query-grid rows, M key-grid rows,
K query slots, L key slots, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenops.types import AttentionGradients, AttentionProblem


class Attended(NamedTuple):
    out: Tensor  # [B, Hq, K, Dv], 0 in empty rows
    lse: Tensor  # [B, Hq, K], -inf in empty rows
    row_sq: Tensor  # [B, Hq, K], 0 in empty rows


def attention(problem: AttentionProblem) -> Attended:
    """Softmax attention of the listed query rows over the listed key rows. Half types are computed in float32, float64 in float64.

    logit[k, l] = scale <query[q_index[k]], key[kv_index[l]]> + kv_bias[kv_index[l]] + attn_mask[q_index[k], kv_index[l]]
                  + rel_h[q_index[k], r // gw] + rel_w[q_index[k], r % gw],  r = kv_index[l], or l's rank in its packed sequence
    out[k] = sum_l dropout(softmax_l(logit[k]))[l] value[kv_index[l]]
    """
    rows = _gather(problem)
    keep = _Dropout(problem)
    pieces = []
    for q_slots, k_slots in _sequences(problem):
        p, lse = _softmax(_logits(problem, rows, q_slots, k_slots))
        weights = p * keep.draw(p)
        pieces.append(Attended(weights @ rows.value[:, :, k_slots], lse, p.square().sum(-1)))
    batch, heads, slots, _ = rows.query.shape
    # slots behind the last sequence are padding
    padding = slots - sum(piece.lse.shape[2] for piece in pieces)
    pieces.append(
        Attended(
            rows.value.new_zeros(batch, heads, padding, rows.value.shape[3]),
            rows.value.new_full((batch, heads, padding), -torch.inf),
            rows.value.new_zeros(batch, heads, padding),
        )
    )
    return Attended(*(torch.cat(part, dim=2) for part in zip(*pieces, strict=True)))


class _Rows(NamedTuple):
    """The rows that take part, compact and one head of keys per query head. Rows of empty slots are 0."""

    query: Tensor  # [B, Hq, K, D]
    key: Tensor  # [B, Hq, L, D]
    value: Tensor  # [B, Hq, L, Dv]
    bias: Tensor | None  # [1|B, 1|Hq, L]
    rel_h: Tensor | None  # [B, Hq, K, gh]
    rel_w: Tensor | None  # [B, Hq, K, gw]
    q_ids: Tensor  # [1|B, 1|Hq, K] row of the query grid, -1 = empty slot
    k_ids: Tensor  # [1|B, 1|Hq, L]


def _gather(problem: AttentionProblem) -> _Rows:
    dtype = torch.float64 if problem.query.dtype == torch.float64 else torch.float32
    group = _group(problem)

    def per_query_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, dim=1) if x.shape[1] > 1 else x

    def keys(grid: Tensor) -> Tensor:
        rows = per_query_head(_take_rows(grid, problem.kv_index)).to(dtype)
        return rows.expand(-1, problem.query.shape[1], -1, -1)

    bias = None
    if problem.kv_bias is not None:
        bias = per_query_head(_take_rows(problem.kv_bias.unsqueeze(-1), problem.kv_index)).squeeze(-1).to(dtype)
    rel_h, rel_w = (None if rel is None else _take_rows(rel, problem.q_index).to(dtype) for rel in (problem.rel_h, problem.rel_w))
    return _Rows(
        _take_rows(problem.query, problem.q_index).to(dtype),
        keys(problem.key),
        keys(problem.value),
        bias,
        rel_h,
        rel_w,
        _row_ids(problem.q_index, problem.query),
        per_query_head(_row_ids(problem.kv_index, problem.key)),
    )


def _logits(problem: AttentionProblem, rows: _Rows, q_slots: slice, k_slots: slice) -> Tensor:
    """[B, Hq, K, L], -inf where a key is hidden."""
    logits = problem.scale * (rows.query[:, :, q_slots] @ rows.key[:, :, k_slots].mT)
    q_ids, k_ids = rows.q_ids[:, :, q_slots, None], rows.k_ids[:, :, None, k_slots]
    visible = (q_ids >= 0) & (k_ids >= 0)
    if rows.bias is not None:
        logits = logits + rows.bias[:, :, None, k_slots]
    if problem.attn_mask is not None and problem.attn_mask.numel() > 0:
        mask = problem.attn_mask[_mask_position(problem.attn_mask, q_ids, k_ids)]
        if mask.dtype == torch.bool:
            visible = visible & mask
        else:
            logits = logits + mask.to(logits.dtype)
    if rows.rel_h is not None and rows.rel_w is not None:
        on_grid, *at = _cells(problem, rows, k_slots)
        for rel, cell in zip((rows.rel_h, rows.rel_w), at, strict=True):
            if rel.shape[3] > 0:
                terms = rel[:, :, q_slots].gather(3, cell.expand(*logits.shape[:3], -1))
                logits = logits + terms.masked_fill(~on_grid, 0.0)
    if problem.is_causal:
        if problem.cu_seqlens_q is not None:
            # a packed sequence has no common grid for queries and keys: causal goes by rank within its lists
            q_ids = torch.arange(q_ids.shape[2], device=q_ids.device)[:, None]
            k_ids = torch.arange(k_ids.shape[3], device=k_ids.device)
        visible = visible & (k_ids <= q_ids)
    return logits.masked_fill(~visible, -torch.inf)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(probability, log of the denominator) over the last dimension. A row with no visible key: probability 0, lse -inf."""
    empty = (logits == -torch.inf).all(-1)
    # softmax of a harmless row instead, so that neither the value nor its gradient is NaN
    safe = logits.masked_fill(empty[..., None], 0.0)
    return safe.softmax(-1).masked_fill(empty[..., None], 0.0), safe.logsumexp(-1).masked_fill(empty, -torch.inf)


def _sequences(problem: AttentionProblem) -> Iterator[tuple[slice, slice]]:
    """Which query slots attend to which key slots: all to all, or sequence by sequence in a packed call."""
    if problem.cu_seqlens_q is None or problem.cu_seqlens_k is None:
        yield slice(None), slice(None)
        return
    q_bounds, k_bounds = problem.cu_seqlens_q.tolist(), problem.cu_seqlens_k.tolist()
    for s in range(len(q_bounds) - 1):
        yield slice(q_bounds[s], q_bounds[s + 1]), slice(k_bounds[s], k_bounds[s + 1])


def _cells(problem: AttentionProblem, rows: _Rows, k_slots: slice) -> tuple[Tensor, Tensor, Tensor]:
    """[1|B, 1|Hq, 1, L]: whether a key lies on the grid of rel_pos, its row there and its column (0 if it does not)."""
    assert rows.rel_h is not None
    assert rows.rel_w is not None
    place = rows.k_ids[:, :, None, k_slots]
    if problem.cu_seqlens_k is not None:
        # keys of a packed sequence have no common grid: as for causal, a key's place is its rank
        place = torch.arange(place.shape[3], device=place.device).expand_as(place)
    height, width = rows.rel_h.shape[3], rows.rel_w.shape[3]
    on_grid = (place >= 0) & (place < height * width)
    place = place.masked_fill(~on_grid, 0)
    return on_grid, place // max(width, 1), place % max(width, 1)


def _mask_position(mask: Tensor, q_ids: Tensor, k_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the mask entries of these rows stand; a dimension of size 1 serves all. Empty slots point at row 0, they are hidden anyway."""
    batch, heads, rows, columns = mask.shape
    device = mask.device
    nowhere = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    return (
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
        torch.arange(heads, device=device).view(1, -1, 1, 1),
        q_ids.clamp(min=0) if rows > 1 else nowhere,
        k_ids.clamp(min=0) if columns > 1 else nowhere,
    )


def _row_ids(index: Tensor | None, grid: Tensor) -> Tensor:
    """[1|B, 1|H, K] int64; an id outside the grid is an empty slot, as in every kernel."""
    rows = grid.shape[2]
    if index is None:
        return torch.arange(rows, device=grid.device).view(1, 1, -1)
    ids = index.long()
    return ids.masked_fill((ids < 0) | (ids >= rows), -1)


def _take_rows(grid: Tensor, index: Tensor | None) -> Tensor:
    """[B, H, K, C]: the listed rows of a grid [B, H, N, C]."""
    if index is None:
        return grid
    batch, heads = torch.broadcast_shapes(grid.shape[:2], index.shape[:2])
    shape = (batch, heads, index.shape[2], grid.shape[3])
    if grid.shape[2] == 0:
        return grid.new_zeros(shape)
    ids = _row_ids(index, grid)[..., None]
    taken = grid.expand(batch, heads, -1, -1).gather(2, ids.clamp(min=0).expand(shape))
    return taken.masked_fill(ids < 0, 0.0)


def _put_rows(rows: Tensor, index: Tensor | None, grid: Tensor) -> Tensor:
    """[B, H, N, C]: the transpose of ``_take_rows``, rows added up where they belong."""
    if index is None:
        return rows
    result = rows.new_zeros(*rows.shape[:2], grid.shape[2], rows.shape[3])
    if grid.shape[2] == 0:
        return result
    ids = _row_ids(index, grid)[..., None]
    return result.scatter_add_(2, ids.clamp(min=0).expand_as(rows), rows.masked_fill(ids < 0, 0.0))


def _group(problem: AttentionProblem) -> int:
    """Query heads per key head."""
    return problem.query.shape[1] // max(problem.key.shape[1], 1)


class _Dropout:
    """Which probabilities survive, times 1 / (1 - p): drawn from the call's own seed, so that the backward pass sees the same."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.p = problem.dropout_p
        if problem.dropout_seed is not None:
            self.generator = torch.Generator(problem.query.device).manual_seed(int(problem.dropout_seed))

    def draw(self, like: Tensor) -> Tensor | float:
        if self.p == 0.0:
            return 1.0
        if self.p == 1.0:
            return 0.0
        drawn = torch.rand(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)
        return (drawn >= self.p).to(like.dtype) / (1.0 - self.p)


def gradients(problem: AttentionProblem, grad_out: Tensor) -> AttentionGradients:
    """What ``attention`` returns to each differentiable argument for grad_out [B, Hq, K, Dv], in the dtype of the computation.

    Written out, because an operator runs below autograd. With p the probabilities and w = dropout(p):
    dvalue = w^T dout, dw = dout value^T, dp = dropout(dw), dlogit = p (dp - <p, dp>),
    dquery = scale dlogit key, dkey = scale dlogit^T query.
    """
    rows = _gather(problem)
    keep = _Dropout(problem)
    grad_out = grad_out.to(rows.query.dtype)
    d_query, d_key, d_value = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in rows[:3])
    d_bias = rows.key.new_zeros(rows.key.shape[:3])
    mask = problem.attn_mask
    d_mask = None
    if mask is not None and mask.is_floating_point():
        d_mask = torch.zeros(mask.shape, dtype=rows.query.dtype, device=mask.device)
    d_rel_h, d_rel_w = (None if rel is None else torch.zeros_like(rel) for rel in (rows.rel_h, rows.rel_w))
    for q_slots, k_slots in _sequences(problem):
        p, _ = _softmax(_logits(problem, rows, q_slots, k_slots))
        kept = keep.draw(p)
        d_piece = grad_out[:, :, q_slots]
        d_value[:, :, k_slots] = (p * kept).mT @ d_piece
        d_p = (d_piece @ rows.value[:, :, k_slots].mT) * kept
        d_logit = p * (d_p - (p * d_p).sum(-1, keepdim=True))
        d_query[:, :, q_slots] = problem.scale * (d_logit @ rows.key[:, :, k_slots])
        d_key[:, :, k_slots] = problem.scale * (d_logit.mT @ rows.query[:, :, q_slots])
        d_bias[:, :, k_slots] = d_logit.sum(2)
        if d_mask is not None and d_mask.numel() > 0:
            position = _mask_position(d_mask, rows.q_ids[:, :, q_slots, None], rows.k_ids[:, :, None, k_slots])
            d_mask.index_put_(tuple(at.expand_as(d_logit) for at in position), d_logit, accumulate=True)
        if d_rel_h is not None and d_rel_w is not None:
            on_grid, *at = _cells(problem, rows, k_slots)
            for d_rel, cell in zip((d_rel_h, d_rel_w), at, strict=True):
                if d_rel.shape[3] > 0:
                    d_rel[:, :, q_slots].scatter_add_(3, cell.expand_as(d_logit), d_logit.masked_fill(~on_grid, 0.0))

    def per_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (problem.key.shape[1], _group(problem))).sum(2)

    grad_bias = None
    if problem.kv_bias is not None:
        grad_bias = _put_rows(per_key_head(d_bias.unsqueeze(-1)), problem.kv_index, problem.key[..., :1]).squeeze(-1)
    return AttentionGradients(
        _put_rows(d_query, problem.q_index, problem.query),
        _put_rows(per_key_head(d_key), problem.kv_index, problem.key),
        _put_rows(per_key_head(d_value), problem.kv_index, problem.value),
        grad_bias,
        d_mask,
        None if d_rel_h is None else _put_rows(d_rel_h, problem.q_index, problem.query),
        None if d_rel_w is None else _put_rows(d_rel_w, problem.q_index, problem.query),
    )


def forward(problem: AttentionProblem, out: Tensor, lse: Tensor, row_sq: Tensor | None, by_row: bool) -> None:
    """Serve as a backend. out is [B, Hq, K, Dv], or with ``by_row`` a grid [B, Hq, N, Dv] of which only the listed rows are written."""
    result = attention(problem)
    if by_row:
        _write_rows(problem, result.out, out)
    else:
        out.copy_(result.out)
    lse.copy_(result.lse)
    if row_sq is not None:
        row_sq.copy_(result.row_sq)


def backward(problem: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor, grads: AttentionGradients) -> None:
    """Serve as a backend. Computes the probabilities anew, so out and lse are not read."""
    for wanted, result in zip(grads, gradients(problem, grad_out), strict=True):
        if wanted is not None and result is not None:
            wanted.copy_(result)


def _write_rows(problem: AttentionProblem, rows: Tensor, grid: Tensor) -> None:
    ids = _row_ids(problem.q_index, problem.query).expand(rows.shape[:3])
    if problem.cu_seqlens_q is not None:
        ids = ids[:, :, : int(problem.cu_seqlens_q[-1])]
    batch, head, slot = (ids >= 0).nonzero(as_tuple=True)
    grid[batch, head, ids[batch, head, slot]] = rows[batch, head, slot].to(grid.dtype)


def check_contents(problem: AttentionProblem, *, unique_queries: bool = False, unique_keys: bool = False) -> None:
    """Read the index lists and sequence bounds and refuse what no backend may be trusted with.

    A row may stand in several sequences of a packed call, unless ``unique_queries`` / ``unique_keys`` (results of both would land in it).

    Raises:
        ValueError: an id out of range or repeated; cu_seqlens that do not start at 0, decrease, or pass the end; a packed sequence of more
            keys than rel_pos has cells.
    """
    q, k = problem.query, problem.key
    for side, index, grid, bounds, unique in (
        ("q", problem.q_index, q, problem.cu_seqlens_q, unique_queries),
        ("k", problem.kv_index, k, problem.cu_seqlens_k, unique_keys),
    ):
        if bounds is not None:
            slots = grid.shape[2] if index is None else index.shape[2]
            check_bounds(f"cu_seqlens_{side}", bounds, slots)
            if side == "k" and problem.rel_h is not None and problem.rel_w is not None:
                _check_lengths(bounds, problem.rel_h.shape[3], problem.rel_w.shape[3])
        if index is not None:
            _check_index("q_index" if side == "q" else "kv_index", index, grid.shape[2], bounds, unique)


def check_bounds(name: str, bounds: Tensor, slots: int) -> None:
    values = bounds.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}")
    for at in range(1, len(values)):
        if values[at] < values[at - 1]:
            raise ValueError(f"{name} must not decrease, got {values[at]} after {values[at - 1]} at position {at}")
    if values[-1] > slots:
        raise ValueError(f"{name} must end at or before the {slots} rows it delimits, got {values[-1]}")


def _check_lengths(bounds: Tensor, height: int, width: int) -> None:
    longest = int(bounds.diff().max()) if len(bounds) > 1 else 0
    if longest > height * width:
        raise ValueError(f"cu_seqlens_k must delimit sequences of at most {height} x {width} keys, the grid of rel_pos, got {longest}")


def _check_index(name: str, index: Tensor, rows: int, bounds: Tensor | None, unique: bool) -> None:
    ids = index.long()
    sequence = torch.zeros(ids.shape[2], dtype=torch.int64, device=ids.device)
    if bounds is not None:
        # slots behind the last sequence are padding, nobody reads them
        ids = ids[:, :, : int(bounds[-1])]
        sequence = torch.searchsorted(bounds.long(), torch.arange(ids.shape[2], device=ids.device), right=True)
    outside = ((ids < -1) | (ids >= rows)).nonzero()
    if len(outside) > 0:
        at = outside[0].tolist()
        raise ValueError(f"{name} must hold ids in [0, {rows}) or -1 for an empty slot, got {int(ids[tuple(at)])} at position {at}")
    # one sortable number for (sequence, id); empty slots get distinct negative ones
    places = torch.arange(ids.shape[2], device=ids.device)
    number = ids if unique else ids + sequence * rows
    number = torch.where(ids < 0, -1 - places, number)
    ordered, order = number.sort(dim=-1, stable=True)
    repeated = (ordered[..., 1:] == ordered[..., :-1]).nonzero()
    if len(repeated) > 0:
        b, h, at = repeated[0].tolist()
        first, second = int(order[b, h, at]), int(order[b, h, at + 1])
        scope = "the call, because results of its sequences would meet," if unique and bounds is not None else "a list,"
        where = f"positions {[b, h, first]} and {[b, h, second]}"
        raise ValueError(f"{name} must not repeat an id within {scope} got {int(ids[b, h, first])} at {where}")


def example_inputs(
    batch: int = 2,
    heads: int = 4,
    query_rows: int = 33,
    key_rows: int | None = None,
    width: int = 16,
    *,
    value_width: int | None = None,
    kv_heads: int | None = None,
    kept: int | float | None = None,
    kv_kept: int | float | None = None,
    lists: str = "sample",
    empty: float = 0.0,
    bias: bool = False,
    rel_grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Seeded keyword arguments for ``tokenops.sparse_attention``.

    Args:
        kept, kv_kept: slots of q_index and kv_index, a number or a fraction of the grid; None leaves the index out.
        lists: one list for all ("shared"), one per "sample" or one per "head".
        empty: fraction of slots that become -1, anywhere in the lists; each list loses a different number.
        bias: add a kv_bias like the log sizes of merged tokens.
        rel_grid: add a rel_pos for keys on a grid of so many rows and columns.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_heads = heads if kv_heads is None else kv_heads
    key_rows = query_rows if key_rows is None else key_rows

    def rows(n_heads: int, n_rows: int, n_columns: int) -> Tensor:
        return torch.randn(batch, n_heads, n_rows, n_columns, generator=generator, dtype=torch.float64).to(device, dtype)

    inputs: dict[str, Any] = {
        "query": rows(heads, query_rows, width),
        "key": rows(kv_heads, key_rows, width),
        "value": rows(kv_heads, key_rows, width if value_width is None else value_width),
    }
    for name, count, n_heads, n_rows in (("q_index", kept, heads, query_rows), ("kv_index", kv_kept, kv_heads, key_rows)):
        if count is not None:
            slots = int(count * n_rows) if isinstance(count, float) else count
            leading = {"shared": (), "sample": (batch,), "head": (batch, n_heads)}[lists]
            inputs[name] = _example_index(leading, n_rows, slots, empty, generator).to(device)
    if bias:
        sizes = torch.randint(1, 5, (batch, key_rows), generator=generator)
        inputs["kv_bias"] = sizes.to(device, torch.float64 if dtype == torch.float64 else torch.float32).log()
    if rel_grid is not None:
        inputs["rel_pos"] = rows(heads, query_rows, rel_grid[0]), rows(heads, query_rows, rel_grid[1])
    return inputs


def _example_index(leading: tuple[int, ...], rows: int, slots: int, empty: float, generator: torch.Generator) -> Tensor:
    """[*leading, slots] int32: ascending distinct ids, some slots emptied."""
    order = torch.rand(*leading, rows, generator=generator).argsort(-1)
    index = order[..., :slots].sort(-1).values.to(torch.int32)
    # each list has its own chance of losing slots, so that lists differ in length
    chance = 2 * empty * torch.rand(*leading, 1, generator=generator)
    return index.masked_fill(torch.rand(index.shape, generator=generator) < chance, -1)


def pairs(problem: AttentionProblem) -> int:
    """How many (query, key) logits the call needs over all query heads: filled slots only, and under is_causal only m <= n."""
    batch, heads = problem.query.shape[:2]
    q_ids = _row_ids(problem.q_index, problem.query).expand(batch, heads, -1)
    k_ids = _row_ids(problem.kv_index, problem.key).expand(batch, problem.key.shape[1], -1).repeat_interleave(_group(problem), dim=1)
    total = 0
    for q_slots, k_slots in _sequences(problem):
        queries, keys = q_ids[:, :, q_slots], k_ids[:, :, k_slots]
        if not problem.is_causal:
            total += int(((queries >= 0).sum(-1) * (keys >= 0).sum(-1)).sum())
            continue
        q_place, k_place = queries, keys
        if problem.cu_seqlens_q is not None:
            q_place = torch.arange(queries.shape[2], device=queries.device).expand_as(queries).masked_fill(queries < 0, -1)
            k_place = torch.arange(keys.shape[2], device=keys.device).expand_as(keys).masked_fill(keys < 0, -1)
        ordered = k_place.sort(-1).values.contiguous()
        up_to = torch.searchsorted(ordered, q_place.contiguous(), right=True) - (k_place < 0).sum(-1, keepdim=True)
        total += int(up_to.clamp(min=0).masked_fill(queries < 0, 0).sum())
    return total


def flops(problem: AttentionProblem, *, backward: bool = False) -> int:
    """Multiplications and additions of the matrix products, on kept tokens only. Backward counts the logits it computes anew."""
    d, dv = problem.query.shape[3], problem.value.shape[3]
    # forward: q k^T and p v; backward: q k^T, dout v^T, p^T dout, dlogit k, dlogit^T q
    return 2 * pairs(problem) * (3 * d + 2 * dv if backward else d + dv)


def bytes(problem: AttentionProblem, *, backward: bool = False) -> int:
    """Least traffic with memory: kept rows read once, results written once (gradients of inputs as full grids)."""
    batch, heads = problem.query.shape[:2]
    size, d, dv = problem.query.element_size(), problem.query.shape[3], problem.value.shape[3]
    q_slots = int((_row_ids(problem.q_index, problem.query).expand(batch, heads, -1) >= 0).sum())
    k_slots = int((_row_ids(problem.kv_index, problem.key).expand(batch, problem.key.shape[1], -1) >= 0).sum())
    lists = [problem.q_index, problem.kv_index, problem.kv_bias, problem.attn_mask, problem.cu_seqlens_q, problem.cu_seqlens_k]
    # query and out (and lse), key and value
    total = q_slots * ((d + dv) * size + 4) + k_slots * (d + dv) * size
    total += sum(x.numel() * x.element_size() for x in lists if x is not None)
    rel_rows = sum(rel.shape[3] * rel.element_size() for rel in (problem.rel_h, problem.rel_w) if rel is not None)
    total += q_slots * rel_rows
    if backward:
        grids = (problem.query, problem.key, problem.value)
        total += q_slots * dv * size + sum(grid.numel() * size for grid in grids)
        if problem.kv_bias is not None:
            total += problem.kv_bias.numel() * problem.kv_bias.element_size()
        total += batch * heads * problem.query.shape[2] * rel_rows
    return total
