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

from . import token_merge


def attention(attn: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:  # [..., N, C]
    query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).movedim(-2, -4).unbind(-2)
    return attn.proj(sdpa(query, key, value, mask).transpose(-3, -2).flatten(-2))


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:  # [..., H, N, D]
    """With the one batch dimension that its fast kernels take."""
    flat = (x.flatten(0, -4) for x in (query, key, value))
    return F.scaled_dot_product_attention(*flat, mask).unflatten(0, query.shape[:-3])


def vit_block(block: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:  # [B, N, C]
    x = x + attention(block.attn, block.norm1(x), mask)
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
        h = block.norm1(x)
        if at == 0:
            h = h + model.pos_embed
        if hasattr(block.attn, "pool"):
            y, index = separable(block.attn, h[:, alone:], rows, pools.get(at))
            if index is not None:
                if chosen is not None:
                    chosen.append(index)
                old = x[:, alone:].unflatten(1, (rows, -1)).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4)  # [B, N, H, R, D]
                old = _listed(old, index).permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)
                x, rows = torch.cat([x[:, :alone], old], 1), index.shape[3]
            # a class token that stands alone is not attended to: what is added is its own input
            x = x + torch.cat([h[:, :alone], y], 1)
        else:
            x = x + attention(block.attn, h)
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x[:, 0]))


def separable(attn: Any, x: Tensor, rows: int, index: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Attention over time, then over space: [B, R N, C] -> [B, K N, C], and the rows that were kept, or given, [B, N, H, K]."""
    parts = (F.linear(x, weight, bias) for weight, bias in zip(attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), strict=True))
    grids = (part.unflatten(1, (rows, -1)).unflatten(-1, (attn.num_heads, -1)) for part in parts)
    query, key, value = (grid.permute(0, 2, 3, 1, 4) for grid in grids)  # [B, N, H, R, D]
    if attn.pool is None:
        value = sdpa(query, key, value)
    else:
        p = (query * query.shape[-1] ** -0.5 @ key.mT).softmax(-1)
        if index is None:
            index = p.std(-1).topk(rows - attn.pool.drop).indices.sort(-1).values
        value = _listed(p, index).softmax(-1) @ value
        query, key = _listed(query, index), _listed(key, index)
    query, key, value = (part.permute(0, 3, 2, 1, 4) for part in (query, key, value))  # [B, K, H, N, D]
    return attn.proj(sdpa(query, key, value).transpose(2, 3).flatten(3)).flatten(1, 2), index


def _listed(x: Tensor, index: Tensor) -> Tensor:  # [B, N, H, R, D], [B, N, H, K] -> [B, N, H, K, D]
    return x.gather(3, index.long()[..., None].expand(*index.shape, x.shape[-1]))


# ToMe and STTM


def video_vit(model: Any, clip: Tensor, block: Callable[[Any, Tensor], Tensor] = vit_block) -> Tensor:  # -> [B, C]
    x = model.embed(clip)
    for layer in model.blocks:
        x = block(layer, x)
    return model.norm(x).mean(1)


def tome(model: Any, clip: Tensor, forced: Sequence[Tensor] = (), chosen: list[Tensor] | None = None) -> Tensor:  # -> [B, C]
    """As published: attention with its matrix stored, the whole matrix of similarities, sorted; rows gathered and scattered.

    ``forced`` are the rows that tokens go to instead, [B, N] for each block that merges; ``chosen`` is given those that they went to.
    """
    x, plans = model.embed(clip), iter(forced)
    size = torch.ones_like(x[..., :1])
    for block in model.blocks:
        query, key, value = block.attn.heads(block.attn.qkv(block.norm1(x)))
        p = (query @ key.mT * query.shape[-1] ** -0.5 + size.log().mT[:, None]).softmax(-1)
        x = x + block.attn.proj((p @ value).transpose(1, 2).flatten(2))
        tokens = x.shape[1]
        r = min(model.config.r, tokens // 2)
        if forced:
            x, size = token_merge.means(token_merge.Inputs(x, x, size), next(plans), tokens - r)
        else:
            x, size, *split = token_merge.torch_match_merge(x, key.mean(1), size, r=r, class_token=False)
            if chosen is not None:
                chosen.append(token_merge.slots(token_merge.Split(*split), tokens))
        x = x + block.mlp(block.norm2(x))
    # each token has the row that it merged into
    return (model.norm(x) * size).sum(1) / size.sum(1)


def sttm(model: Any, clip: Tensor, forced: Tensor | None = None, chosen: list[Tensor] | None = None) -> Tensor:  # -> [B, C]
    """Our formulas, which no authors have published, as matrix products and softmax. Hard: ``forced`` and ``chosen`` are the meta tokens
    [B, T, N] that tokens go to.
    """
    stage, before = model.merger, model.config.layer
    x = model.embed(clip)
    for block in model.blocks[:before]:
        x = vit_block(block, x)
    x = x.unflatten(1, (stage.frames, -1))
    metric = stage.metric(stage.norm(x))
    z = stage.score(stage.norm(x)).flatten(1, 2).softmax(1).mT @ x.flatten(1, 2)
    unit, wanted = F.normalize(metric, dim=-1), F.normalize(stage.metric(stage.norm(z)), dim=-1)[:, None]
    logits = unit @ wanted.mT / stage.log_temperature.exp()
    if stage.mode == "soft":
        assigned = logits.softmax(-1)
    else:
        meta = logits.argmax(-1) if forced is None else forced.long()
        assigned = F.one_hot(meta, stage.meta_tokens).to(x)
        if chosen is not None:
            chosen.append(meta)

    # [B, windows, frames of a window, M, ...] from here
    mass = assigned.sum(2)
    safe, windows = mass.clamp(min=1e-12)[..., None], (stage.windows, -1)
    y, centre = assigned.mT @ x / safe, assigned.mT @ model.places / safe
    like = (F.normalize(stage.metric(y), dim=-1) * wanted).sum(-1) / stage.log_temperature.exp()
    y, centre, mass, weight = (part.unflatten(1, windows) for part in (y, centre, mass, mass * like.exp()))
    total = mass.sum(2)
    fused = (weight[..., None] * y).sum(2) / weight.sum(2).clamp(min=1e-12)[..., None]
    place = (mass[..., None] * centre).sum(2) / total.clamp(min=1e-12)[..., None]
    centre = torch.where(mass[..., None] > 0.0, centre, place[:, :, None])
    path = torch.cat([centre.transpose(2, 3).flatten(3), centre[:, :, -1] - centre[:, :, 0]], -1)
    rows = (fused + stage.motion(path)).flatten(1, 2)
    for block in model.blocks[before:]:
        rows = vit_block(block, rows, total.flatten(1).log()[:, None, None])
    rows = rows.unflatten(1, (stage.windows, -1)).repeat_interleave(stage.frames // stage.windows, 1)
    return model.norm(assigned @ rows).mean((1, 2))


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
