"""What the video transformers share: the pre-norm block under its usual names, and reading published weights into it.

Letters: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.ops.delta_matmul import gathered_linear, gathered_mlp
from tokenops.ops.sparse_attention import sparse_attention


class MultiplyAdds(NamedTuple):
    """What a forward pass costs, in both conventions. The video literature prints multiply-adds as "FLOPs"."""

    total: int  # every multiply-add of convolutions, linear layers and attention products
    published: int  # as the paper of the model counts them


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class Attention(nn.Module):
    """The projections around attention: fused query, key and value, and the output's. ``dropout`` is of the probabilities."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the width {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, N, 3 C] -> three times [B, H, N, D], views
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    @property
    def dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:  # [B, N, C], normalised first
        qkv = fused_linear(x, self.qkv.weight, self.qkv.bias, norm)
        return fused_linear(attend(*self.heads(qkv), dropout_p=self.dropout_p), self.proj.weight, self.proj.bias)


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:  # [..., H, N, D] -> [..., N, H D]
    """``sparse_attention`` with its heads merged."""
    out = sparse_attention(query, key, value, **options)
    assert isinstance(out, Tensor)
    return merge_heads(out)


def merge_heads(x: Tensor) -> Tensor:  # [..., H, N, D] -> [..., N, H D]
    return x.transpose(-3, -2).flatten(-2)


class Mlp(nn.Module):
    """Two layers with one of ACTIVATIONS between them, and dropout after it."""

    def __init__(self, dim: int, hidden: int, activation: str = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden)
        self.act = ACTIVATIONS[activation]()
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm | None = None, order: Tensor | None = None
) -> Tensor:  # [..., C] -> [..., O]
    """A linear layer of normalised rows; those of [B, N, C] may be wanted in another ``order``, [N] int32."""
    if not gathers(x):
        rows = x if norm is None else norm(x)
        return F.linear(rows if order is None else rows[:, order], weight, bias)
    rows, index = _all_rows(x)
    affine, eps = _norm(norm)
    out = gathered_linear(rows, weight, bias, index=index if order is None else order, norm=affine, norm_eps=eps)
    return out.view(*x.shape[:-1], len(weight))


def fused_mlp(x: Tensor, mlp: Mlp, norm: nn.LayerNorm | None = None) -> Tensor:  # [..., C] -> [..., C]
    """A block's two layers of normalised rows."""
    if not gathers(x) or (mlp.training and mlp.drop.p > 0.0):
        return mlp(x if norm is None else norm(x))
    rows, index = _all_rows(x)
    affine, eps = _norm(norm)
    layers = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    return gathered_mlp(rows, *layers, index=index, activation=mlp.activation, norm=affine, norm_eps=eps).view(x.shape)


def gathers(x: Tensor) -> bool:
    """Whether the gathered layers serve even a call that lists every row: they normalise as they read, and are quicker than the BLAS that
    torch has on a CPU. Their backward pass computes the layer anew, so training is better off without.
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _all_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    # samples may stand apart in memory
    rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    return rows, torch.arange(rows.shape[1], dtype=torch.int32)


def _norm(norm: nn.LayerNorm | None) -> tuple[tuple[Tensor, Tensor] | None, float]:
    return (None, 0.0) if norm is None else ((norm.weight, norm.bias), norm.eps)


class DropPath(nn.Module):
    """Stochastic depth: in training a sample loses the branch with this probability, and keeps 1 / (1 - p) of it otherwise."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, owner: Tensor | None = None, owners: int = 0) -> Tensor:
        """x [B, ...], sample by sample. Or rows [R, ...] of several samples, with ``owner`` [R] naming each row's, out of so many."""
        if not self.training or self.p == 0.0:
            return x
        kept = torch.rand(x.shape[0] if owner is None else owners, device=x.device) >= self.p
        if owner is not None:
            kept = kept[owner]
        return x * kept.view(-1, *[1] * (x.dim() - 1)) / (1.0 - self.p)


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
        x = x + self.drop_path(self.attn(x, self.norm1))
        return x + self.drop_path(fused_mlp(x, self.mlp, self.norm2))


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
