"""One layer of VidTr: attention over time, then over space, on one projection of the tokens; frames that are dropped between the two.

The sources are vidtr.py's. Over time every column is a sample of its own, thousands of problems of a few rows; over space every row of the
grid is one, of a few hundred. Both read the projected tokens where they stand: pooling is a list of rows, and only the residual stream is
gathered. (Several clips without pooling: time works on a copy.)

Letters: B batch, R rows of the grid, N columns, K rows kept, C channels, H heads, D head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.models.blocks import Attention, Mlp, attend, fused_linear, fused_mlp
from tokenops.ops.sparse_attention import sparse_attention, sparse_attention_varlen
from tokenops.ops.token_select import select_tokens
from tokenops.types import Aux

EPS = 1e-5


class TopKStd(NamedTuple):
    """pool_topK_std: keep the frames whose rows of the temporal attention vary most. A flat row tells nothing, a peaked one does."""

    drop: int  # frames to leave out (the release's NUMBER_OF_KEYS)
    granularity: str = "head_location"  # each head of each location keeps its own frames; or each "location" (mean over heads), or "clip"
    resoftmax: bool = True  # the kept rows, probabilities already, go through softmax once more, as in the release
    keep_class: bool = False  # the first row holds class tokens: it stays, and is not counted


class JointAttention(Attention):
    """Every token attends to every token."""

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None, source: Tensor | None = None) -> Tensor:  # [B, N, C]
        """Of normalised rows; with ``source`` the values are of that."""
        if source is None:
            return super().forward(x, norm)
        share = 2 * x.shape[-1]
        parts = ((x, slice(share)), (source, slice(share, None)))
        qkv = torch.cat([F.linear(rows, self.qkv.weight[part], self.qkv.bias[part]) for rows, part in parts], dim=-1)
        return self.proj(attend(*self.heads(qkv), dropout_p=self.dropout_p))


class SeparableAttention(Attention):
    """Attention over the rows of each column (time), then over the columns of each row (space): MSA(S) = MSA_s(MSA_t(S)).

    O_t = softmax_time(q k^T / sqrt(D)) v;  O = softmax_space(q k^T / sqrt(D)) O_t;  y = W_o O  (mode "shared_qk", the release).
    In mode "separate" (the paper) each of the two has projections of its own.

    With a pool the temporal step drops rows. Where heads and locations keep different frames, the spatial step mixes locations by rank:
    the first kept frame of each, the second of each, and so on.
    """

    def __init__(self, dim: int, num_heads: int, *, mode: str = "shared_qk", pool: TopKStd | None = None, dropout: float = 0.0) -> None:
        super().__init__(dim, num_heads, dropout)
        if mode not in ("shared_qk", "separate"):
            raise ValueError(f'mode must be "shared_qk" or "separate", got {mode!r}')
        if pool is not None and pool.granularity not in ("head_location", "location", "clip"):
            raise ValueError(f'pool.granularity must be "head_location", "location" or "clip", got {pool.granularity!r}')
        self.pool = pool
        self.spatial = Attention(dim, num_heads, dropout) if mode == "separate" else None

    def forward(self, x: Tensor, rows: int, norm: nn.LayerNorm | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """
        Args:
            x: [B, R N, C], row by row.
            rows: R.
            norm: of x, where that is still to be done.

        Returns:
            [B, K N, C], and which rows were kept: [B, N, H, K] int32, ascending in each list; None if there is no pool.
        """
        batch, columns, shape = len(x), x.shape[1] // rows, (3, self.num_heads, x.shape[2] // self.num_heads)
        order, kept = None, None
        if self.pool is not None:
            # column by column: over time a column is a stretch of rows, and over space a list names rows of all of them
            order = torch.arange(x.shape[1], dtype=torch.int32, device=x.device).view(rows, columns).T.flatten()
        qkv = fused_linear(x, self.qkv.weight, self.qkv.bias, norm, order)
        if self.pool is None:
            query, key, value = qkv.view(batch, rows, columns, *shape).permute(3, 0, 2, 4, 1, 5)  # [B, N, H, R, D]
            out = _attention(query, key, value, dropout_p=self.dropout_p)
        else:
            query, key, value = qkv.view(batch * columns, rows, *shape).permute(2, 0, 3, 1, 4)  # [B N, H, R, D]
            # as released, no dropout here
            probability, row_sq, unit = attention_matrix(query, key)
            kept = self.rank(*(part.unflatten(0, (batch, columns)) for part in (probability, row_sq)))
            if self.pool.resoftmax:
                # softmax(p) v is attention again: the row p is its own list of logits if the keys are unit vectors
                out = _attention(probability, unit, value, scale=1.0)
            else:
                out = _attention(query, key, value)
        if self.spatial is not None:
            grid = out.view(batch, columns, *out.shape[-3:]).permute(0, 3, 1, 2, 4)  # [B, R, N, H, D]
            grid = grid if kept is None else gather_rows(grid, kept)
            y = self.spatial(fused_linear(grid.flatten(3).flatten(0, 1), self.proj.weight, self.proj.bias))
        else:
            if kept is None:
                y = attend(*(part.transpose(1, 3) for part in (query, key, out)), dropout_p=self.dropout_p)
            else:
                y = self.over_space(query, key, out, kept)
            y = fused_linear(y.view(batch, -1, x.shape[2]), self.proj.weight, self.proj.bias)
        return y.view(batch, -1, x.shape[2]), kept

    def over_space(self, query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Tensor:
        """The attention of each rank of kept rows, [B, N, H, K] of three times [B N, H, R, D] -> [B K N, H, D]."""
        batch, columns = kept.shape[:2]
        at = partial(torch.arange, dtype=torch.int32, device=query.device)
        # what is listed is read where it stands: ids of B N R rows, [H, B K N]
        ids = (at(batch * columns).view(batch, columns, 1, 1) * query.shape[2] + kept).permute(2, 0, 3, 1).flatten(1)
        packed = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [B N R, H, D]
        bounds = at(0, ids.shape[1] + 1, columns)
        options: dict[str, Any] = {"q_index": ids, "kv_index": ids, "dropout_p": self.dropout_p}
        out = sparse_attention_varlen(packed[0], packed[1], packed[2], bounds, bounds, columns, columns, **options)
        assert isinstance(out, Tensor)
        return out

    def kept_of(self, rows: int) -> int:
        return rows if self.pool is None else rows - self.pool.drop

    def multiply_adds(self, rows: int, columns: int) -> int:
        """Of a grid of so many rows and columns."""
        dim, kept = self.proj.in_features, self.kept_of(rows)
        # what was kept is projected out, and in mode "separate" in and out once more
        projected = 3 * rows + (1 if self.spatial is None else 5) * kept
        return dim * columns * (dim * projected + rows * rows + rows * kept + 2 * kept * columns)

    def rank(self, probability: Tensor, row_sq: Tensor) -> Tensor:
        """The kept rows, [B, N, H, K], of attention rows [B, N, H, R, >= R]."""
        assert self.pool is not None
        drop, granularity, _, keep_class = self.pool
        rows = row_sq.shape[3]
        if not 0 <= drop < rows - keep_class:
            raise ValueError(f"pool.drop must be in [0, {rows - keep_class}), the frames that come in, got {drop}")
        # A row sums to 1, so its mean is 1 / R, and its squared deviations sum to row_sq - 1 / R. But row_sq is float32, and rows that are
        # nearly flat, as in a still clip, differ behind its last digit: their order would not be the release's. Half types are the other
        # way round: their rounded probabilities say less than row_sq.
        if probability.dtype in (torch.float32, torch.float64):
            squares = (probability.detach()[..., :rows] - 1.0 / rows).square().sum(-1)
        else:
            squares = (row_sq - 1.0 / rows).clamp(min=0.0)
        deviation = squares.sqrt()  # times the root of R - 1
        if granularity != "head_location":
            deviation = deviation.mean(2 if granularity == "location" else (1, 2), keepdim=True)
        kept = select_tokens(deviation.flatten(1, 2), k=rows - drop, protect=int(keep_class)).index
        return kept.view(*deviation.shape[:3], -1).expand(*row_sq.shape[:3], -1)


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    out = sparse_attention(query, key, value, **options)
    assert isinstance(out, Tensor)
    return out


def attention_matrix(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) of [B, H, R, D] as attention with unit vectors: the kernel of tiny problems serves it, and its gradient.

    Returns:
        [B, H, R, R'] with R' the multiple of 8 from R on that kernels take, zeros behind R; the sums of squares [B, H, R]; the unit
        vectors [1, 1, R, R'].
    """
    rows = query.shape[2]
    unit = torch.eye(rows, -(-rows // 8) * 8, dtype=query.dtype, device=query.device)[None, None]
    out, aux = sparse_attention(query, key, unit, return_aux=("row_sq",))
    assert isinstance(aux, Aux)
    assert isinstance(aux.row_sq, Tensor)
    return out, aux.row_sq, unit


def gather_rows(x: Tensor, kept: Tensor) -> Tensor:
    """Of [B, R, N, H, D] the rows [B, N, H, K], each head of each column by its own list: [B, K, N, H, D]."""
    batch, rows, columns, heads, width = x.shape
    sample, column, head = (torch.arange(size, device=x.device, dtype=kept.dtype) for size in (batch, columns, heads))
    ids = ((sample[:, None, None, None] * rows + kept.permute(0, 3, 1, 2)) * columns + column[:, None]) * heads + head
    return x.reshape(-1, width).index_select(0, ids.flatten()).view(*ids.shape, width)


class VidTrBlock(nn.Module):
    """x += attention(norm1(x) + position), x += mlp(norm2(x)), of a grid of tokens or of all of them jointly.

    A class token that stands alone takes no part in the attention of a grid: it passes by, and what is added to it there is its own input.
    """

    def __init__(self, attn: JointAttention | SeparableAttention, dim: int, mlp_dim: int, dropout: float, class_passes: bool) -> None:
        super().__init__()
        self.class_passes = class_passes
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = Mlp(dim, mlp_dim, "relu", dropout)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, rows: int, position: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, N, C], how many rows its grid has, [1, N, C] -> tokens and kept rows, see SeparableAttention."""
        # most layers have no position: they normalise as they project
        source, norm = (x, self.norm1) if position is None else (self.norm1(x), None)
        h = source if position is None else source + position
        if isinstance(self.attn, JointAttention):
            # as released, the values of joint attention lack the position
            y, kept = self.attn(h, norm, None if position is None else source), None
        else:
            alone = int(self.class_passes)
            y, kept = self.attn(h[:, alone:], rows, norm)
            own, grid = x[:, :alone], x[:, alone:]
            if kept is not None:
                # the residual stream is pooled alike
                grid = gather_rows(grid.unflatten(1, (rows, -1)).unflatten(3, (kept.shape[2], -1)), kept).view(y.shape)
                x = torch.cat([own, grid], dim=1) if alone else grid
            if alone:
                own = h[:, :1] if norm is None else norm(h[:, :1])
                y = torch.cat([own, y], dim=1)
        x = x + self.drop(y)
        return x + self.drop(fused_mlp(x, self.mlp, self.norm2)), kept
