"""The published block written from its equations, sample by sample in float64: logits of the buffered queries and keys as a plain product,
and a patchwork attention matrix whose columns are those of when their token last changed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from eventful_block import Options, Weights, position_bias
from torch import Tensor


class Oracle:
    """One block on one sample. ``chosen``: the lists of the three gates in the last frame; ``margin``: how clear choices were so far."""

    def __init__(self, weights: Weights, options: Options) -> None:
        self.weights = {name: x.double() for name, x in weights.items()}
        self.options = options
        self.kept: dict[str, Tensor] = {}
        self.chosen: list[Tensor] = []
        self.margin = math.inf

    def frame(self, x: Tensor) -> Tensor:  # [N, C] -> [N, C]
        o = self.options
        self.chosen = []
        late = o.gate_first
        current = x if late else self.normalized("input_layer_norm", x)
        ids = self.gate("qkv", current)
        rows = self.kept["qkv reference"][ids]
        qkv = self.buffer("qkv", ids, self.linear("qkv", self.normalized("input_layer_norm", rows) if late else rows))
        attended = self.attend(qkv, ids)
        ids = self.gate("projection", attended)
        total = x + self.buffer("projection", ids, self.linear("projection", self.kept["projection reference"][ids]))
        ids = self.gate("mlp", total if late else self.normalized("mlp_layer_norm", total))
        rows = self.kept["mlp reference"][ids]
        hidden = F.gelu(self.linear("mlp_1", self.normalized("mlp_layer_norm", rows) if late else rows))
        return total + self.buffer("mlp", ids, self.linear("mlp_2", hidden))

    def linear(self, name: str, rows: Tensor) -> Tensor:
        return rows @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def normalized(self, name: str, rows: Tensor) -> Tensor:
        centered = rows - rows.mean(-1, keepdim=True)
        unit = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def gate(self, name: str, current: Tensor) -> Tensor:
        """Ids of the chosen tokens, ascending."""
        everything = torch.arange(len(current))
        old = self.kept.get(f"{name} reference")
        ids = everything if old is None else self.choose((current - old).abs())
        self.kept[f"{name} reference"] = current.clone() if old is None or self.options.whole else old.index_copy(0, ids, current[ids])
        self.chosen.append(ids)
        return ids

    def choose(self, change: Tensor) -> Tensor:
        [(how, limit)] = self.options.choice.items()
        order = self.options.order
        norms = change.amax(-1) if math.isinf(order) else change.pow(order).sum(-1).pow(1.0 / order)
        if how == "threshold":
            self.margin = min(self.margin, (norms - limit).abs().min().item())
            return (norms > limit).nonzero().flatten()
        k = limit if how == "k" else math.floor(limit * len(norms))
        ranked = norms.sort(descending=True)
        if 0 < k < len(norms):
            self.margin = min(self.margin, (ranked.values[k - 1] - ranked.values[k]).item())
        return ranked.indices[:k].sort().values

    def buffer(self, name: str, ids: Tensor, rows: Tensor) -> Tensor:
        old = self.kept.get(name)
        self.kept[name] = rows if old is None else old.index_copy(0, ids, rows)
        return self.kept[name]

    def attend(self, qkv: Tensor, ids: Tensor) -> Tensor:
        o = self.options
        if o.window is not None:
            return attend_in_windows(qkv[None], self.weights, o)[0]
        query, key, value = qkv.unflatten(-1, (3, o.heads, -1)).permute(1, 2, 0, 3)  # [H, N, D]
        bias = position_bias(query[None], self.weights, o.grid, o.pool) if o.rel_pos else None
        cells = ids
        if o.pool is not None:
            key, value, cells = *(self.pooled(x) for x in (key, value)), self.cells(ids)
        logits = query @ key.mT / math.sqrt(query.shape[-1])
        if bias is not None:
            logits = logits + (bias[0][0].unsqueeze(-1) + bias[1][0].unsqueeze(-2)).flatten(-2)
        attention = logits.softmax(-1)
        old = self.kept.get("attention")
        if o.mode == "paper" and old is not None:
            attention = old.index_copy(2, cells, attention[:, :, cells])
        self.kept["attention"] = attention
        return (attention @ value).transpose(0, 1).flatten(1)

    def pooled(self, x: Tensor) -> Tensor:
        assert self.options.pool is not None
        return F.avg_pool2d(x.mT.unflatten(2, self.options.grid), self.options.pool).flatten(2).mT

    def cells(self, ids: Tensor) -> Tensor:
        assert self.options.pool is not None
        (_, width), (pool_h, pool_w) = self.options.grid, self.options.pool
        return (ids // width // pool_h * (width // pool_w) + ids % width // pool_w).unique()


def attend_in_windows(qkv: Tensor, weights: Weights, options: Options) -> Tensor:
    """Dense attention within windows of a grid that is filled up, below and on the right, with what the linear layer makes of zeros."""
    assert options.window is not None
    (height, width), (h, w) = options.grid, options.window
    down, across = math.ceil(height / h), math.ceil(width / w)
    padded = weights["qkv.bias"].expand(qkv.shape[0], down * h, across * w, -1).clone()
    padded[:, :height, :width] = qkv.unflatten(1, options.grid)
    windows = padded.unflatten(2, (across, w)).unflatten(1, (down, h)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
    query, key, value = windows.unflatten(-1, (3, options.heads, -1)).permute(2, 0, 3, 1, 4)
    logits = query @ key.mT * query.shape[-1] ** -0.5
    if options.rel_pos:
        rel_h, rel_w = position_bias(query, weights, options.window)
        logits = logits + (rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).flatten(-2)
    out = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
    on_grid = out.unflatten(1, (h, w)).unflatten(0, (-1, down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return on_grid[:, :height, :width].flatten(1, 2)
