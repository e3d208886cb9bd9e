"""HaltingVT as it was published: every token in every layer, those that have halted multiplied by zero. And weights made from a seed."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


class Case(NamedTuple):
    seed: int
    heads: int = 3
    dim: int = 96
    depth: int = 4
    keep_rate: tuple[float, ...] = (1.0, 0.5)
    frames: int = 4  # of the weights
    side: int = 4  # patches of a row of the weights' image
    clip: Shape = (2, 3, 4, 64, 64)
    center: float = 10.0
    halting: bool = True
    fuse_token: bool = False
    gain: float = 0.8
    start: float = 0.4
    drift: float = 0.5
    classes: int = 10


class Published(NamedTuple):
    logits: Tensor
    feature: Tensor
    motion_logits: Tensor
    token_counts: Tensor  # [B, J] active tokens entering each joint layer; 0 once the class token has halted
    layers: Tensor  # [B, N] joint layers that a token took part in
    rho: Tensor  # [B, N]
    kept: tuple[Tensor, ...]  # [B, T, K]
    margin: float  # how far the closest decision was from falling otherwise


def shapes(case: Case) -> dict[str, Shape]:
    """The released checkpoints' entries."""
    c = case.dim
    block = {"norm1": (c,), "attn.qkv": (3 * c, c), "attn.proj": (c, c), "norm2": (c,), "mlp.fc1": (4 * c, c), "mlp.fc2": (c, 4 * c)}
    time = {"temporal_norm1": (c,), "temporal_attn.qkv": (3 * c, c), "temporal_attn.proj": (c, c), "temporal_fc": (c, c)}
    layers: dict[str, Shape] = {"backbone.model.patch_embed.proj": (c, 3, 16, 16)}
    for i in range(case.depth):
        layers |= {f"backbone.model.blocks.{i}.{k}": v for k, v in (block | (time if i < len(case.keep_rate) else {})).items()}
    layers |= {"backbone.model.norm": (c,), "cls_head.fc_cls": (case.classes, c), "cls_head.fc_motion": (2, c)}
    tables = {"cls_token": (1, 1, c), "pos_embed": (1, 1 + case.side**2, c), "time_embed": (1, case.frames, c)}
    entries = {f"backbone.model.{k}": v for k, v in tables.items()}
    for name, weight in layers.items():
        entries |= {f"{name}.weight": weight, f"{name}.bias": weight[:1]}
    return entries


def noise(seed: int, name: str, shape: Shape) -> Tensor:
    generator = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def probed(matrix: Tensor) -> Tensor:
    """A matrix as two random sums over it, of its columns and of its rows: what golden data keeps of a large gradient."""
    matrix = matrix.flatten(1)
    return torch.cat([matrix @ noise(0, "columns", (matrix.shape[1],)), noise(0, "rows", (matrix.shape[0],)) @ matrix])


def weights(case: Case) -> dict[str, Tensor]:
    """Random, with channel 0, the halting score, pushed up from layer to layer."""
    state = {}
    for key, shape in shapes(case).items():
        n = noise(case.seed, key, shape)
        if "norm" in key.split(".")[-2]:
            n = 1.0 + 0.1 * n if key.endswith("weight") else 0.1 * n
        elif key.endswith("weight"):
            n = n * (case.gain / math.sqrt(n[0].numel()))
        else:
            n = n * (0.02 if key.endswith("bias") else 0.2)
        state[key] = n
    state["backbone.model.patch_embed.proj.bias"][0] += case.start
    for i in range(len(case.keep_rate), case.depth):
        state[f"backbone.model.blocks.{i}.mlp.fc2.bias"][0] += case.drift
    return state


def published(state: Mapping[str, Tensor], clip: Tensor, case: Case) -> Published:
    w = {key.removeprefix("backbone.model."): value for key, value in state.items()}
    batch, _, frames, height, width = clip.shape
    margins: list[Tensor] = []

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def attention(name: str, x: Tensor) -> tuple[Tensor, Tensor]:  # [..., N, C]
        q, k, v = linear(f"{name}.qkv", x).unflatten(-1, (3, case.heads, -1)).movedim(-2, -4).unbind(-2)
        p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return linear(f"{name}.proj", (p @ v).transpose(-3, -2).flatten(-2)), p

    def mlp(i: int, x: Tensor) -> Tensor:
        return x + linear(f"blocks.{i}.mlp.fc2", F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))))

    # embedding: token 1 + s T + t
    x = F.conv2d(clip.transpose(1, 2).flatten(0, 1), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).unflatten(0, (batch, frames)).permute(0, 3, 1, 2)  # [B, S, T, C]
    pos = w["pos_embed"][:, 1:].mT.unflatten(2, (case.side, case.side))
    pos = F.interpolate(pos, (height // 16, width // 16), mode="nearest").flatten(2).mT
    time = F.interpolate(w["time_embed"].mT, frames, mode="nearest").mT
    x = x + pos[:, :, None] + time[:, None]
    c = (w["cls_token"] + w["pos_embed"][:, :1]).expand(batch, -1, -1)  # [B, 1, C]

    z, kept = torch.cat([c, x.flatten(1, 2)], 1), []
    for i, rate in enumerate(case.keep_rate):
        x = x + linear(f"blocks.{i}.temporal_fc", attention(f"blocks.{i}.temporal_attn", norm(f"blocks.{i}.temporal_norm1", x))[0])
        seq = torch.cat([c[:, None].expand(-1, frames, -1, -1), x.transpose(1, 2)], 2)  # [B, T, 1 + S, C]
        r, p = attention(f"blocks.{i}.attn", norm(f"blocks.{i}.norm1", seq))
        x = x.transpose(1, 2) + r[:, :, 1:]  # [B, T, S, C]
        if rate == 1.0:
            c = c + r[:, :, 0].mean(1, keepdim=True)
        else:
            c = r[:, :, 0].mean(1, keepdim=True)
            k = math.ceil(rate * x.shape[2])
            score, order = p[..., 0, 1:].mean(2).sort(-1, descending=True)
            margins.append(1.0 - score[..., 1:] / score[..., :-1])
            index = order[..., :k]
            kept.append(index)
            most = x.take_along_dim(index[..., None], 2)
            if case.fuse_token:
                rest = x.take_along_dim(order[..., k:, None], 2) * score[..., k:, None]
                most = torch.cat([most, rest.sum(2, keepdim=True)], 2)
            x = most
        z = mlp(i, torch.cat([c, x.transpose(1, 2).flatten(1, 2)], 1))
        c, x = z[:, :1], z[:, 1:].unflatten(1, (-1, frames))

    cum, remain, rho = (z.new_full(z.shape[:2], start) for start in (0.0, 1.0, 0.0))
    active = torch.ones(z.shape[:2], dtype=torch.bool)
    layers, out, counts = torch.zeros(z.shape[:2]), torch.zeros_like(z), []
    for i in range(len(case.keep_rate), case.depth):
        counts.append(active.sum(1) * active[:, 0])
        layers += active
        z = z * active[..., None] if case.halting else z
        z = z + attention(f"blocks.{i}.attn", norm(f"blocks.{i}.norm1", z))[0]
        z = mlp(i, z)
        if not case.halting:
            out = z
            continue
        h = torch.sigmoid(10.0 * z[..., 0] - case.center) if i < case.depth - 1 else torch.ones_like(cum)
        cum, rho = cum + h, rho + active
        margins.append((cum - 0.99).abs()[active])
        reached, going = (cum > 0.99) & active, cum < 0.99
        out = out + z * (active * torch.where(reached, remain, h * going))[..., None]
        rho, remain, active = rho + remain * reached, remain - h * going, going
    feature = norm("norm", out)[:, 0]
    margin = min((m.min().item() for m in margins if m.numel()), default=1.0)
    return Published(
        linear("cls_head.fc_cls", feature),
        feature,
        linear("cls_head.fc_motion", feature),
        torch.stack(counts, 1),
        layers,
        rho,
        tuple(kept),
        margin,
    )
