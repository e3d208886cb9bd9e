"""The layers of HaltingVT: pruning by a glimpse, and joint layers over the tokens that have not halted. The source is haltingvt.py's.

Between two joint layers the tokens of all clips lie one after the other in one [R, C]; letters are haltingvt.py's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.models.blocks import Attention, Block, attend, fused_linear, fused_mlp
from tokenops.ops.sparse_attention import sparse_attention_varlen
from tokenops.ops.token_select import index_from_mask, pack_tokens
from tokenops.types import HaltState


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, clip: Tensor) -> Tensor:  # [B, 3, T, H, W] -> [B, H / P, W / P, T, C]
        p = self.proj.kernel_size[0]
        if clip.dim() != 5 or clip.shape[1] != 3 or clip.shape[3] % p or clip.shape[4] % p or clip.numel() == 0:
            raise ValueError(f"clip must be [B, 3, T, H, W], not empty, H and W multiples of {p}, got {list(clip.shape)}")
        patches = clip.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 3, 5, 2, 1, 4, 6)
        # not the convolution: as a matrix product the result comes in the order of the tokens
        return fused_linear(patches.flatten(4), self.proj.weight.flatten(1), self.proj.bias)


class Glimpser(Block):
    """Divided space-time attention, which then keeps the patches of each frame that its class token looks at most."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, keep_rate: float, *, fuse_token: bool, drop_path: float) -> None:
        super().__init__(dim, num_heads, mlp_ratio, drop_path=drop_path)
        self.keep_rate, self.fuse_token = keep_rate, fuse_token
        self.temporal_norm1 = nn.LayerNorm(dim, 1e-6)
        self.temporal_attn = Attention(dim, num_heads)
        self.temporal_fc = nn.Linear(dim, dim)

    # a block that also needs the number of frames, and tells what it kept
    def forward(  # type: ignore[override]
        self,
        z: Tensor,  # [B, 1 + S T, C]
        frames: int,
    ) -> tuple[Tensor, Tensor | None]:  # [B, 1 + K T, C], [B, T, K]
        batch = z.shape[0]
        # patches first: the sequences of a slot and those of a frame are then both plain strides
        x = z[:, 1:].unflatten(1, (-1, frames)).transpose(0, 1)  # [S, B, T, C]
        over_time = self.drop_path(self.temporal_attn(x.flatten(0, 1), self.temporal_norm1))
        x = x + fused_linear(over_time, self.temporal_fc.weight, self.temporal_fc.bias).view(x.shape)
        class_token = z[:, 0]
        rows = torch.cat([class_token[None, :, None].expand(1, -1, frames, -1), x])
        qkv = fused_linear(rows.flatten(1, 2), self.attn.qkv.weight, self.attn.qkv.bias, self.norm1).transpose(0, 1)  # [B T, 1 + S, 3 C]
        query, key, value = self.attn.heads(qkv)
        if self.keep_rate == 1.0:
            residual = self._residual(attend(query, key, value), batch)
            kept, x, class_token = None, x + residual[1:], class_token + residual[0].mean(1)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.fuse_token):
                score = glimpse(query[:, :, :1], key)
            kept = score.topk(math.ceil(self.keep_rate * x.shape[0]), dim=-1).indices  # [B T, K], best first
            if self.fuse_token:
                residual = self._residual(attend(query, key, value), batch)
                x = x + residual[1:]
                pruned = score.scatter(-1, kept, 0.0).unflatten(0, (batch, frames))
                x = torch.cat([take(x, kept), torch.einsum("bts, sbtc -> btc", pruned, x)[None]])
            else:
                # the others are never seen again, so their queries are not asked either
                residual = self._residual(attend(query, key, value, q_index=F.pad(kept + 1, (1, 0))), batch)
                x = take(x, kept) + residual[1:]
            # as published: what the class token was goes lost where patches are pruned
            class_token = residual[0].mean(1)
            kept = kept.unflatten(0, (batch, frames))
        z = torch.cat([class_token[:, None], x.transpose(0, 1).flatten(1, 2)], 1)
        return z + self.drop_path(fused_mlp(z, self.mlp, self.norm2)), kept

    def _residual(self, attended: Tensor, batch: int) -> Tensor:  # [B T, 1 + K, C] -> [1 + K, B, T, C]
        over_space = fused_linear(attended.transpose(0, 1), self.attn.proj.weight, self.attn.proj.bias)
        return self.drop_path(over_space.transpose(0, 1)).transpose(0, 1).unflatten(1, (batch, -1))


def glimpse(query: Tensor, key: Tensor) -> Tensor:  # [B, H, 1, D], [B, H, 1 + S, D] -> [B, S]
    """How much the class token attends to each patch, on average over the heads."""
    # head by head, for a product of all heads at once copies the keys
    logits = torch.stack([q @ k.mT for q, k in zip((query * query.shape[-1] ** -0.5).unbind(1), key.unbind(1), strict=True)], 1)
    return logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32)).mean(1)[:, 0, 1:]


def take(x: Tensor, kept: Tensor) -> Tensor:  # [S, B, T, C], [B T, K] -> [K, B, T, C]
    """In each frame the patches that are kept."""
    _, batch, frames, _ = x.shape
    row = kept.T * (batch * frames) + torch.arange(batch * frames, device=x.device)
    return pack_tokens(x.flatten(0, 2), row.reshape(1, -1), packed=True).tokens.view(-1, batch, frames, x.shape[3])


class Tokens(NamedTuple):
    """The clips between two joint layers."""

    z: Tensor  # [R + B, C] the tokens of all clips, one clip after the other, and a zero row for the halted ones of each
    cu_seqlens: Tensor  # [B + 1] int32, clip b owns rows cu_seqlens[b] : cu_seqlens[b + 1], its class token first
    clip: Tensor  # [R] int64, whose a row is
    token: Tensor  # [R] int64, where it stands among all B N tokens
    state: HaltState  # of R rows; its out is that of class tokens, [B, C]


def first_tokens(z: Tensor) -> Tokens:  # [B, N, C]
    batch, n, c = z.shape
    token = torch.arange(batch * n, device=z.device)
    zero = z.new_zeros(batch * n, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
    state = HaltState(zero, zero + 1.0, zero == 0.0, zero, zero + 1.0, zero.new_zeros(batch, c))
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=z.device) * n
    return Tokens(F.pad(z.flatten(0, 1), (0, 0, 0, batch)), bounds, token // n, token, state)


def joint_layer(block: Block, tokens: Tokens, n: int, last: bool) -> Tensor:
    """The block over the tokens that are left, out of n in each clip: [R, C], or in the last layer only class tokens, [B, C]."""
    z, bounds, clip = tokens.z, tokens.cu_seqlens, tokens.clip
    rows, batch = len(clip), len(bounds) - 1
    samples = torch.arange(batch + 1, device=z.device, dtype=torch.int32)
    # a zero row leaves norm1 as its bias, as a halted token does in the published code: the same key and value, and gradients
    weight, bias, heads, c = block.attn.qkv.weight, block.attn.qkv.bias, block.attn.num_heads, z.shape[1]
    if last:
        x, owner, bounds_q = class_rows(tokens, z), samples[:-1], samples
        query = fused_linear(x, weight[:c], bias[:c], block.norm1).unflatten(-1, (heads, -1))
        key, value = fused_linear(z, weight[c:], bias[c:], block.norm1).unflatten(-1, (2, heads, -1)).unbind(1)
    else:
        x, owner, bounds_q = z[:rows], clip, bounds
        query, key, value = fused_linear(z, weight, bias, block.norm1).unflatten(-1, (3, heads, -1)).unbind(1)
        query = query[:rows]
    # the keys of a clip: its rows, then its zero row, which counts as often as tokens have halted (log 0 hides it)
    key_index = None if batch == 1 else torch.cat([clip, samples[:-1]]).argsort(stable=True)
    halted = (n - bounds.diff()).to(tokens.state.cum.dtype)
    kv_bias = torch.cat([halted.new_zeros(rows), halted.log()])
    attended = sparse_attention_varlen(query, key, value, bounds_q, bounds + samples, kv_index=key_index, kv_bias=kv_bias)
    assert isinstance(attended, Tensor)
    residual = fused_linear(attended.flatten(1), block.attn.proj.weight, block.attn.proj.bias)
    x = x + block.drop_path(residual, owner, batch)
    return x + block.drop_path(fused_mlp(x, block.mlp, block.norm2), owner, batch)


def class_rows(tokens: Tokens, x: Tensor) -> Tensor:  # [R or more, ...] -> [B, ...]
    """Of each clip its class token; any row for a clip that has none left."""
    return x.index_select(0, tokens.cu_seqlens[:-1].clamp(max=len(tokens.clip) - 1))


def class_active(tokens: Tokens) -> Tensor:  # [B]
    return class_rows(tokens, tokens.state.active) & (tokens.cu_seqlens.diff() > 0)


def without_halted(tokens: Tokens, z: Tensor, state: HaltState, ponder: bool) -> tuple[Tokens, Tensor]:
    """What goes on after a layer gave z [R, C] and the new state, and which rows do [R].

    A clip is finished when its class token is: nothing else can reach its feature. Only the ponder cost also asks how long its other
    tokens would have gone on; then a halted class token stays, as a zero row, so that its clip still begins with it.
    """
    now = tokens._replace(state=state)
    if ponder:
        z = z * state.active[:, None]
        stays = state.active.index_fill(0, tokens.cu_seqlens[:-1].long(), True)
    else:
        stays = state.active & class_active(now)[tokens.clip]
    before = F.pad(stays.cumsum(0, dtype=torch.int32), (1, 0))
    bounds = before.index_select(0, tokens.cu_seqlens)
    # the one number a layer that the host waits for
    rows = int(before[-1])
    index = index_from_mask(stays, max_k=rows).index
    left = pack_tokens(z, index[None], packed=True, total=rows + len(bounds) - 1).tokens
    clip, token, *vectors = (t.index_select(0, index) for t in (tokens.clip, tokens.token, *state[:5]))
    return Tokens(left, bounds, clip, token, HaltState._make((*vectors, state.out))), stays
