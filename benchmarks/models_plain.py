"""The models in plain torch, on the weights of ours: dense, as everybody would write them today, and as they were published.

Both are peers, and in float64 what our results are compared with. Nothing here calls an operator of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.models import EventfulBackbone, HaltingVT
from tokenops.models.eventful_block import GATES


def attention(attn: Any, x: Tensor) -> Tensor:  # [..., N, C]
    query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).movedim(-2, -4).unbind(-2)
    return attn.proj(F.scaled_dot_product_attention(query, key, value).transpose(-3, -2).flatten(-2))


def vit_block(block: Any, x: Tensor) -> Tensor:  # [B, N, C]
    x = x + attention(block.attn, block.norm1(x))
    return x + block.mlp(block.norm2(x))


# HaltingVT


def embed(model: HaltingVT, clip: Tensor) -> tuple[Tensor, Tensor]:  # class token [B, 1, C], patches [B, S, T, C]
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    patch = weight.shape[-1]
    x = F.conv3d(clip, weight[:, :, None], bias, (1, patch, patch)).flatten(3).permute(0, 3, 2, 1)
    x = x + model.pos_embed[:, 1:, None] + model.time_embed[:, None]
    return (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x


def joint_vit(model: HaltingVT, clip: Tensor, block: Callable[[Any, Tensor], Tensor] = vit_block) -> Tensor:  # -> [B, C]
    """The transformer that HaltingVT saves on: every patch of every frame in every layer, and no attention over time alone."""
    class_token, x = embed(model, clip)
    z = torch.cat([class_token, x.flatten(1, 2)], 1)
    for layer in model.blocks:
        z = block(layer, z)
    return model.norm(z[:, 0])


def halting(model: HaltingVT, clip: Tensor) -> Tensor:  # -> [B, C]
    """As published: all tokens in all layers, those that have halted are multiplied by zero."""
    config, frames = model.config, clip.shape[2]
    blocks: list[Any] = list(model.blocks)
    c, x = embed(model, clip)
    for block in blocks[: len(config.keep_rate)]:
        x = x + block.temporal_fc(attention(block.temporal_attn, block.temporal_norm1(x)))
        rows = block.norm1(torch.cat([c[:, None].expand(-1, frames, -1, -1), x.transpose(1, 2)], 2))  # [B, T, 1 + S, C]
        query, key, value = block.attn.qkv(rows).unflatten(-1, (3, block.attn.num_heads, -1)).movedim(-2, -4).unbind(-2)
        p = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        residual = block.attn.proj((p @ value).transpose(-3, -2).flatten(-2))
        x = x.transpose(1, 2) + residual[:, :, 1:]
        mean = residual[:, :, 0].mean(1, keepdim=True)
        if block.keep_rate == 1.0:
            c = c + mean
        else:
            kept = p[..., 0, 1:].mean(2).topk(math.ceil(block.keep_rate * x.shape[2])).indices
            c, x = mean, x.take_along_dim(kept[..., None], 2)
        z = torch.cat([c, x.transpose(1, 2).flatten(1, 2)], 1)
        z = z + block.mlp(block.norm2(z))
        c, x = z[:, :1], z[:, 1:].unflatten(1, (-1, frames))
    z = torch.cat([c, x.flatten(1, 2)], 1)
    joint = blocks[len(config.keep_rate) :]
    cum, remain, active, out = torch.zeros_like(z[..., 0]), torch.ones_like(z[..., 0]), torch.ones_like(z[..., 0]), torch.zeros_like(z)
    for block in joint:
        z = vit_block(block, z * active[..., None])
        score = torch.sigmoid(config.halt_scale * z[..., 0] - config.halt_center) if block is not joint[-1] else torch.ones_like(cum)
        cum = cum + score
        reached, going = (cum > 1.0 - config.eps) * active, (cum < 1.0 - config.eps).to(z)
        out = out + z * torch.where(reached > 0, remain, score * going)[..., None] * active[..., None]
        remain, active = remain - score * going, going
    return model.norm(out[:, 0])


# ViTDet


def vitdet(model: EventfulBackbone, x: Tensor) -> Tensor:  # [B, N, C]
    """Every block in full: windows cut out and put back, the position bias as a mask of SDPA."""
    x = x + model.encoding()
    for block in model.blocks:
        attended = _in_windows(block, block.attn.qkv(block.norm1(x)), model.grid, F.scaled_dot_product_attention)
        x = x + block.attn.proj(attended)
        x = x + block.mlp(block.norm2(x))
    return x


def eventful(
    model: EventfulBackbone, k: int, x: Tensor, states: list[dict[str, Tensor]], chosen: dict[str, Tensor] | None = None
) -> Tensor:
    """The next frame [B, N, C] as published: gates and buffers, in global blocks the matrices [B, H, N, N] of logits and of attention.

    ``states`` holds a dict for each block, empty before a first frame, and is written over. ``chosen`` is given the gates' choices.
    The published column gate subtracts the whole matrix that it keeps, and uses the chosen columns of the difference; here only those
    are subtracted.
    """
    x = x + model.encoding()
    for at, (block, kept) in enumerate(zip(model.blocks, states, strict=True)):
        current = block.norm1(x)
        index = _gate(kept, "qkv", current, k)
        qkv = _buffer(kept, "qkv", block.attn.qkv(_rows(current, index)), index)
        if block.kind == "EventfulBlock":
            attended = _update_attention(block, kept, qkv, index)
        else:
            attended = _in_windows(block, qkv, model.grid, _materialised)
        lists = [index, _gate(kept, "projection", attended, k)]
        x = x + _buffer(kept, "projection", block.attn.proj(_rows(attended, lists[1])), lists[1])
        current = block.norm2(x)
        lists.append(_gate(kept, "mlp", current, k))
        x = x + _buffer(kept, "mlp", block.mlp(_rows(current, lists[2])), lists[2])
        if chosen is not None and index is not None:
            chosen.update({f"blocks.{at}.{gate}": ids for gate, ids in zip(GATES, lists, strict=True) if ids is not None})
    return x


def _gate(kept: dict[str, Tensor], name: str, current: Tensor, k: int) -> Tensor | None:  # [B, N, C] -> [B, K]
    """The tokens that changed most since they last were chosen; None: all, in a first frame."""
    reference = kept.setdefault(f"{name} reference", current)
    if reference is current:
        kept[f"{name} reference"] = current.clone()
        return None
    index = torch.linalg.vector_norm(current - reference, dim=-1).topk(k, sorted=False).indices
    reference.scatter_(1, _wide(index, current), _rows(current, index))
    return index


def _buffer(kept: dict[str, Tensor], name: str, rows: Tensor, index: Tensor | None) -> Tensor:  # [B, K, C] -> [B, N, C]
    if index is None:
        kept[name] = rows
    else:
        kept[name].scatter_(1, _wide(index, rows), rows)
    return kept[name]


def _rows(x: Tensor, index: Tensor | None) -> Tensor:  # [B, N, C] -> [B, K, C]
    return x if index is None else x.gather(1, _wide(index, x))


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[2])


def _update_attention(block: Any, kept: dict[str, Tensor], qkv: Tensor, index: Tensor | None) -> Tensor:  # [B, N, 3 C] -> [B, N, C]
    query, key, value = block.attn.heads(qkv)
    scaled = query * query.shape[-1] ** -0.5
    if index is None:
        kept["logits"] = scaled @ key.mT
    else:
        heads, tokens, width = query.shape[1:]
        rows = index[:, None, :, None].expand(-1, heads, -1, width)
        across, down = rows[..., :1].expand(-1, -1, -1, tokens), rows[..., 0].unsqueeze(2).expand(-1, -1, tokens, -1)
        kept["logits"].scatter_(2, across, scaled.gather(2, rows) @ key.mT)
        kept["logits"].scatter_(3, down, scaled @ key.gather(2, rows).mT)
    attention = _biased(block, query, kept["logits"]).softmax(-1)
    if index is None:
        kept["attention"], kept["value"], kept["product"] = attention, value.clone(), attention @ value
    else:
        new, new_value = attention.gather(3, down), value.gather(2, rows)
        change, value_change = new - kept["attention"].gather(3, down), new_value - kept["value"].gather(2, rows)
        kept["attention"].scatter_(3, down, new)
        kept["value"].scatter_(2, rows, new_value)
        kept["product"].add_(new @ value_change).add_(change @ (new_value - value_change))
    return kept["product"].transpose(1, 2).flatten(2)


def _biased(block: Any, query: Tensor, logits: Tensor) -> Tensor:  # [B, H, N, M], other memory than the one given
    if not block.has_tables:
        return logits
    by_row, by_column = _position_bias(block, query)
    h, w = by_row.shape[-1], by_column.shape[-1]
    biased = logits.unflatten(3, (h, w)) + by_row[..., None]
    return biased.add_(by_column[..., None, :]).flatten(3)


def _position_bias(block: Any, query: Tensor) -> tuple[Tensor, Tensor]:  # [B, H, N, h], [B, H, N, w]
    over_rows, over_columns = block.tables()
    on_grid = query.unflatten(2, block.window or block.grid)
    by_row = torch.einsum("bhijd,ikd->bhijk", on_grid, over_rows).flatten(2, 3)
    return by_row, torch.einsum("bhijd,jkd->bhijk", on_grid, over_columns).flatten(2, 3)


def _materialised(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    logits = (query * query.shape[-1] ** -0.5) @ key.mT
    return (logits if bias is None else logits + bias).softmax(-1) @ value


def _in_windows(block: Any, qkv: Tensor, grid: Sequence[int], attend: Callable[..., Tensor]) -> Tensor:  # [B, N, 3 C] -> [B, N, C]
    """A grid that no whole number of windows covers is filled up with what the layer makes of zeros."""
    h, w = block.window or grid
    rows, columns = -(-grid[0] // h), -(-grid[1] // w)
    x = qkv.unflatten(1, tuple(grid))
    if (rows * h, columns * w) != tuple(grid):
        x = block.attn.qkv.bias.expand(len(qkv), rows * h, columns * w, -1).clone()
        x[:, : grid[0], : grid[1]] = qkv.unflatten(1, tuple(grid))
    x = x.unflatten(2, (columns, w)).unflatten(1, (rows, h)).transpose(2, 3).flatten(3, 4).flatten(0, 2)  # [B windows, h w, 3 C]
    query, key, value = block.attn.heads(x)
    mask = None
    if block.has_tables:
        by_row, by_column = _position_bias(block, query)
        mask = (by_row[..., :, None] + by_column[..., None, :]).flatten(3)
    out = attend(query, key, value, mask).transpose(1, 2).flatten(2)
    out = out.unflatten(1, (h, w)).unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out[:, : grid[0], : grid[1]].flatten(1, 2)


# VidTr


def vidtr(model: Any, clip: Tensor, forced: Sequence[Tensor] = (), chosen: list[Tensor] | None = None) -> Tensor:  # -> logits
    """Dense or compact. As published, pooling ranks the rows of a stored attention matrix.

    ``forced`` are the rows to keep instead, [B, N, H, K] for each pooling layer; ``chosen`` is given those that were kept.
    """
    config, heads = model.config, model.config.num_heads
    x = model.patch_embed(clip).flatten(3).permute(0, 2, 3, 1)  # [B, T, N, C]
    batch, rows = x.shape[:2]
    alone = int(not model.class_grid)
    if alone:
        x = torch.cat([model.cls_token.expand(batch, -1, -1), x.flatten(1, 2)], 1)
    else:
        x = torch.cat([model.cls_spatial.expand(batch, -1, -1, -1), x], 2)
        x, rows = torch.cat([model.cls_temporal.expand(batch, -1, -1), x.flatten(1, 2)], 1), rows + 1
    pools = dict(zip(config.pool_layers, forced or [None] * len(config.pool_layers), strict=True))
    for at, block in enumerate(model.blocks):
        source = block.norm1(x)
        h = source + model.pos_embed if at == 0 else source
        if hasattr(block.attn, "pool"):
            grid = _split(h[:, alone:], rows, block, heads)
            old = x[:, alone:].unflatten(1, (rows, -1)).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4)
            query, key, value = (part.permute(0, 2, 3, 1, 4) for part in grid)  # [B, N, H, R, D]
            if at in pools:
                p = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
                drop, given = block.attn.pool.drop, pools[at]
                index = p.std(-1).topk(rows - drop).indices.sort(-1).values if given is None else given.long()
                if chosen is not None:
                    chosen.append(index)
                value = p.take_along_dim(index[..., None], 3).softmax(-1) @ value
                query, key, old = (part.take_along_dim(index[..., None], 3) for part in (query, key, old))
                rows -= drop
            else:
                value = F.scaled_dot_product_attention(query, key, value)
            query, key, value = (part.permute(0, 3, 2, 1, 4) for part in (query, key, value))  # [B, R, H, N, D]
            y = block.attn.proj(F.scaled_dot_product_attention(query, key, value).transpose(2, 3).flatten(3)).flatten(1, 2)
            x = torch.cat([x[:, :alone], old.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)], 1)
            # a class token that stands alone is not attended to: what is added is its own input
            x = x + torch.cat([h[:, :alone], y], 1)
        else:
            query, key, value = (_heads(part, heads) for part in block.attn.project(h, source))
            x = x + block.attn.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x[:, 0]))


def _heads(x: Tensor, heads: int) -> Tensor:  # [B, N, C] -> [B, H, N, D]
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _split(x: Tensor, rows: int, block: Any, heads: int) -> list[Tensor]:  # [B, R N, C] -> three times [B, R, N, H, D]
    return [part.unflatten(1, (rows, -1)).unflatten(-1, (heads, -1)) for part in block.attn.project(x, x)]


# weights


@torch.no_grad()
def liven(model: nn.Module, gain: float, seed: int = 0) -> None:
    """Random weights with which a model behaves: attention is not flat, and tokens differ. Initial ones give every token the same."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embed" in name.rpartition(".")[2] or "cls" in name.rpartition(".")[2] or "rel_pos" in name:
            parameter.copy_(0.2 * noise)
        elif parameter.dim() > 1:
            parameter.copy_(noise * gain * parameter[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1.0 + 0.1 * noise)
        else:
            parameter.copy_(0.02 * noise)
