"""What the video transformers share: the pre-norm block under its usual names, and reading published weights into it.

Letters: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenops.ops.sparse_attention import sparse_attention


class MultiplyAdds(NamedTuple):
    """What a forward pass costs, in both conventions. The video literature prints multiply-adds as "FLOPs"."""

    total: int  # every multiply-add of convolutions, linear layers and attention products
    published: int  # as the paper of the model counts them


class Attention(nn.Module):
    """The projections around attention: fused query, key and value, and the output's."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the width {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, N, 3 C] -> three times [B, H, N, D], views
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        return self.proj(attend(*self.heads(self.qkv(x))))


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:  # [B, H, N, D] -> [B, N, H D]
    """``sparse_attention`` with its heads merged."""
    out = sparse_attention(query, key, value, **options)
    assert isinstance(out, Tensor)
    return merge_heads(out)


def merge_heads(x: Tensor) -> Tensor:  # [B, H, N, D] -> [B, N, H D]
    return x.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, activation: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training a sample loses the branch with this probability, and keeps 1 / (1 - p) of it otherwise."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.p
        return x * kept / (1.0 - self.p)


class Block(nn.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def initialise(module: nn.Module) -> None:
    """ViT's: matrices from a normal distribution of 0.02 cut at two deviations, biases zero."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def read_checkpoint(path: str | Path, *inside: str) -> dict[str, Tensor]:
    """The state of a checkpoint file, which may lie under the first of these keys that it has. Never runs code of the file."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for key in inside:
        if key in checkpoint:
            return checkpoint[key]
    return checkpoint


def renamed(state_dict: Mapping[str, Tensor], rules: Iterable[tuple[str, str | None]]) -> dict[str, Tensor]:
    """The entries under other names: of (pattern, replacement) the first that matches from the start; None drops the entry."""
    result = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            if re.match(pattern, key):
                if replacement is not None:
                    result[re.sub(pattern, replacement, key, count=1)] = value
                break
        else:
            result[key] = value
    return result


def load_strictly(module: nn.Module, state_dict: Mapping[str, Tensor], what: str) -> None:
    """
    Raises:
        ValueError: entries are missing, unexpected or of another shape: all of them in one message.
    """
    own = module.state_dict()
    faults = [f"missing {key} {list(own[key].shape)}" for key in own if key not in state_dict]
    faults += [f"unexpected {key} {list(state_dict[key].shape)}" for key in state_dict if key not in own]
    faults += [
        f"{key} must be {list(own[key].shape)}, got {list(state_dict[key].shape)}"
        for key in own
        if key in state_dict and own[key].shape != state_dict[key].shape
    ]
    if faults:
        raise ValueError(f"{what}: the state does not fit the model\n  " + "\n  ".join(faults))
    module.load_state_dict(dict(state_dict))
