"""VidTr in plain torch as its release describes it, written apart from the package: what the models are compared with.

Sequence first, tokens [N, B, C]; probabilities are stored, frames are gathered by ``gather``, weights have the names of the release.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]


class Pool(NamedTuple):
    drop: int
    keep_class: bool = False
    resoftmax: bool = True
    granularity: str = "head_location"


def split_heads(x: Tensor, heads: int) -> Tensor:  # [R, N, B, C] -> [H, B, R, N, D]
    return x.unflatten(-1, (heads, -1)).permute(3, 2, 0, 1, 4)


def gather_frames(x: Tensor, index: Tensor) -> Tensor:  # [H, B, R, N, D], [H, B, N, K] -> [H, B, K, N, D]
    return x.gather(2, index.transpose(2, 3)[..., None].expand(-1, -1, -1, -1, x.shape[-1]))


def choose(p: Tensor, pool: Pool) -> Tensor:
    """Rows to keep of temporal attention [H, B, N, R, R], ascending: [H, B, N, K]."""
    rows = p[..., 1:, :] if pool.keep_class else p
    deviation = rows.std(-1)
    if pool.granularity == "location":
        deviation = deviation.mean(0, keepdim=True).expand_as(deviation)
    if pool.granularity == "clip":
        deviation = deviation.mean((0, 2), keepdim=True).expand_as(deviation)
    kept = deviation.topk(rows.shape[-2] - pool.drop).indices.sort(-1).values
    return torch.cat([torch.zeros_like(kept[..., :1]), kept + 1], -1) if pool.keep_class else kept


def separable(state: State, at: str, x: Tensor, rows: int, heads: int, pool: Pool | None = None) -> tuple[Tensor, Tensor | None]:
    """Attention of a grid [R N, B, C] over time, then over space."""
    projected = x @ state[at + "in_proj_weight"].T + state[at + "in_proj_bias"]
    q, k, v = (split_heads(part.unflatten(0, (rows, -1)), heads) for part in projected.chunk(3, -1))
    scale = q.shape[-1] ** -0.5
    p = torch.einsum("hbind,hbjnd->hbnij", q, k).mul(scale).softmax(-1)
    kept = None
    if pool is not None:
        kept = choose(p, pool)
        p = p.gather(3, kept[..., None].expand(-1, -1, -1, -1, rows))
        if pool.resoftmax:
            p = p.softmax(-1)
        q, k = gather_frames(q, kept), gather_frames(k, kept)
    over_time = torch.einsum("hbnij,hbjnd->hbind", p, v)
    p = torch.einsum("hbind,hbimd->hbinm", q, k).mul(scale).softmax(-1)
    out = torch.einsum("hbinm,hbimd->inbhd", p, over_time).flatten(0, 1).flatten(2)
    return out @ state[at + "out_proj.weight"].T + state[at + "out_proj.bias"], kept


def joint(state: State, at: str, x: Tensor, values: Tensor, heads: int) -> Tensor:
    out, _ = torch.nn.functional.multi_head_attention_forward(
        x,
        x,
        values,
        x.shape[-1],
        heads,
        state[at + "in_proj_weight"],
        state[at + "in_proj_bias"],
        None,
        None,
        False,
        0.0,
        state[at + "out_proj.weight"],
        state[at + "out_proj.bias"],
        need_weights=True,
    )
    return out


def norm(state: State, at: str, x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], state[at + ".weight"], state[at + ".bias"], 1e-5)


def mlp(state: State, at: str, x: Tensor) -> Tensor:
    hidden = (x @ state[at + "linear1.weight"].T + state[at + "linear1.bias"]).relu()
    return hidden @ state[at + "linear2.weight"].T + state[at + "linear2.bias"]


def patches(state: State, clip: Tensor) -> Tensor:  # [B, 3, T, H, W] -> [T, N, B, C]
    side = state["conv_stem.weight"].shape[-1]
    cut = clip.unfold(3, side, side).unfold(4, side, side)  # [B, 3, T, h, w, side, side]
    out = torch.einsum("bcthwyx,dcyx->thwbd", cut, state["conv_stem.weight"][:, :, 0]) + state["conv_stem.bias"]
    return out.flatten(1, 2)


def depth(state: State) -> int:
    return 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layers."))


def logits(state: State, x: Tensor) -> Tensor:
    return norm(state, "encoder.norm", x)[0] @ state["fc.weight"].T + state["fc.bias"]


def full(state: State, clip: Tensor, heads: int, pools: dict[int, Pool] | None = None) -> tuple[Tensor, list[Tensor]]:
    """Class tokens for each frame and location."""
    x = patches(state, clip)
    frames, _, batch, _ = x.shape
    x = torch.cat([state["cls_s"][:, :, None].expand(-1, -1, batch, -1), x], 1)
    x = torch.cat([state["cls_t"].transpose(0, 1)[None].expand(-1, -1, batch, -1), x], 0).flatten(0, 1)
    position, rows, chosen = state["pos_embedding"].transpose(0, 1), frames + 1, []
    for i in range(depth(state)):
        at = f"encoder.layers.{i}."
        h = norm(state, at + "norm1", x)
        if i == 0 or frames == 16:
            h = h + position
        y, kept = separable(state, at + "self_attn.", h, rows, heads, (pools or {}).get(i))
        if kept is not None:
            x = gather_frames(split_heads(x.unflatten(0, (rows, -1)), heads), kept).permute(2, 3, 1, 0, 4).flatten(0, 1).flatten(2)
            rows = kept.shape[-1]
            chosen.append(kept)
        x = x + y
        x = x + mlp(state, at, norm(state, at + "norm2", x))
    return logits(state, x), chosen


def single(
    state: State, clip: Tensor, heads: int, last_separable: int, pools: dict[int, Pool], every_layer_at_16: bool
) -> tuple[Tensor, list[Tensor]]:
    """One class token: compact models, and the full one that merges later."""
    x = patches(state, clip)
    rows, _, batch, _ = x.shape
    everywhere = every_layer_at_16 and rows == 16
    x = torch.cat([state["cls"].expand(-1, batch, -1), x.flatten(0, 1)], 0)
    position, chosen = state["pos_embedding"].transpose(0, 1), []
    for i in range(depth(state)):
        at = f"encoder.layers.{i}."
        values = norm(state, at + "norm1", x)
        h = values + position if i == 0 or everywhere else values
        if i > last_separable:
            y = joint(state, at + "self_attn.", h, values, heads)
        else:
            y, kept = separable(state, at + "self_attn.", h[1:], rows, heads, pools.get(i))
            y = torch.cat([h[:1], y])
            if kept is not None:
                grid = gather_frames(split_heads(x[1:].unflatten(0, (rows, -1)), heads), kept)
                x = torch.cat([x[:1], grid.permute(2, 3, 1, 0, 4).flatten(0, 1).flatten(2)])
                rows = kept.shape[-1]
                chosen.append(kept)
        x = x + y
        x = x + mlp(state, at, norm(state, at + "norm2", x))
    return logits(state, x), chosen


def random_state(
    form: str,
    frames: int,
    locations: int,
    layers: int,
    *,
    dim: int = 24,
    hidden: int = 48,
    classes: int = 7,
    spread: float = 0.2,
    seed: int = 0,
) -> State:
    """Weights of a tiny model under the names of the release, float64. ``form`` is "full" or "single"."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * spread

    tokens = (frames + 1) * (locations + 1) if form == "full" else frames * locations + 1
    state = {"pos_embedding": draw(1, tokens, dim), "conv_stem.weight": draw(dim, 3, 1, 16, 16) / 8, "conv_stem.bias": draw(dim)}
    if form == "full":
        state |= {"cls_s": draw(frames, 1, dim), "cls_t": draw(1, locations + 1, dim)}
    else:
        state["cls"] = draw(1, 1, dim)
    for i in range(layers):
        at = f"encoder.layers.{i}."
        state |= {at + "self_attn.in_proj_weight": draw(3 * dim, dim) * 2, at + "self_attn.in_proj_bias": draw(3 * dim)}
        state |= {at + "self_attn.out_proj.weight": draw(dim, dim), at + "self_attn.out_proj.bias": draw(dim)}
        state |= {at + "linear1.weight": draw(hidden, dim), at + "linear1.bias": draw(hidden)}
        state |= {at + "linear2.weight": draw(dim, hidden), at + "linear2.bias": draw(dim)}
        for name in ("norm1", "norm2"):
            state |= {f"{at}{name}.weight": 1 + draw(dim), f"{at}{name}.bias": draw(dim)}
    state |= {"encoder.norm.weight": 1 + draw(dim), "encoder.norm.bias": draw(dim)}
    return state | {"fc.weight": draw(classes, dim), "fc.bias": draw(classes)}
