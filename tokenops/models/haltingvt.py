"""HaltingVT: a video transformer that prunes patches by a glimpse and then lets every token decide after how many layers it is done.

Q. Wu et al., "HaltingVT: Adaptive Token Halting Transformer for Efficient Video Recognition", 2024 (arXiv 2401.04975). Its halting is that
of H. Yin et al., "A-ViT", 2022, which is that of A. Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016.

The published code computes every token in every layer and multiplies those that have halted by zero. Here they are gone, and the outputs
are the same: a zeroed row still offers its key, the same one for all halted tokens of a layer, so a single zero row whose logit is raised
by the log of their number stands for them all. Between two joint layers the tokens of all clips lie one after the other in one [R, C].

Letters: B clips, T frames, S patches of a frame, K of them kept, N = 1 + K T tokens of a clip, R rows, C channels, H heads, D head width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.models.blocks import Attention, Block, MultiplyAdds, attend, fused_linear, fused_mlp, initialise, load_strictly, renamed
from tokenops.ops.sparse_attention import sparse_attention_varlen
from tokenops.ops.token_select import halt_tokens, index_from_mask, pack_tokens
from tokenops.types import HaltState


class HaltingConfig(NamedTuple):
    """The defaults are what all published configurations share: DeiT-S, with two Glimpser blocks in front."""

    keep_rate: tuple[float, ...]  # one Glimpser block each: the share of patches that it keeps; the other blocks are joint ones
    halt_center: float  # a token's halting score is sigmoid(halt_scale * channel 0 - halt_center)
    frames: int = 8
    stride: int = 32  # frames of the video between two of a clip
    classes: int = 200  # 0: no classifier, the logits are the feature
    halt_scale: float = 10.0
    eps: float = 0.01  # a token halts when its scores sum to more than 1 - eps
    halting: bool = True
    fuse_token: bool = False  # keep the pruned patches of a frame as one more, weighted by their scores
    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    image_size: int = 224
    patch_size: int = 16
    drop_path: float = 0.1  # of the last block, growing from 0 in the first
    motion: bool = True  # has the head of the motion loss

    def flops(self, *, frames: int | None = None, image_size: int | None = None, token_counts: Any = None) -> MultiplyAdds:
        """Of one clip where no token halts; or of the clips whose ``token_counts`` [J] or [B, J] (``HaltingStats``) are given.

        ``total`` counts what inference computes here: in a pruning block queries of what it keeps only, one more key for the halted tokens,
        in the last layer the class token only. ``published`` counts whole layers, and no heads.
        """
        frames = self.frames if frames is None else frames
        slots = ((self.image_size if image_size is None else image_size) // self.patch_size) ** 2
        c, mlp = self.dim, 2 * int(self.dim * self.mlp_ratio) * self.dim
        total = published = slots * frames * 3 * self.patch_size**2 * c
        for rate in self.keep_rate:
            kept = slots if rate == 1.0 else math.ceil(rate * slots)
            asked = slots if self.fuse_token else kept
            temporal = slots * frames * (5 * c * c + 2 * frames * c)
            # every frame has its copy of the class token
            total += temporal + frames * ((1 + slots) * 3 * c * c + (1 + asked) * (2 * (1 + slots) * c + c * c))
            published += temporal + frames * (1 + slots) * (4 * c * c + 2 * (1 + slots) * c)
            if rate < 1.0:
                total += frames * (1 + slots) * c + self.fuse_token * frames * slots * c
                kept += self.fuse_token
            slots = kept
            total += (1 + slots * frames) * mlp
            published += (1 + slots * frames) * mlp
        layers = self.depth - len(self.keep_rate)
        tokens = 1 + slots * frames
        counts = torch.as_tensor([tokens] * layers if token_counts is None else token_counts).reshape(-1, layers)
        total, published = len(counts) * (total + c * self.classes), len(counts) * published
        for clip in counts.tolist():
            published += sum(n * (4 * c * c + mlp) + 2 * n * n * c for n in clip)
            total += sum((n + 1) * 3 * c * c + 2 * n * (n + 1) * c + n * (c * c + mlp) for n in clip[:-1] if n)
            if clip[-1]:
                total += (clip[-1] + 1) * (2 * c * c + 2 * c) + 2 * c * c + mlp
        return MultiplyAdds(int(total), int(published))


class HaltingStats(NamedTuple):
    feature: Tensor  # [B, C] what the heads see
    token_counts: Tensor  # [B, J] int64, tokens of the clip entering each joint layer, class token included; 0 once that has halted
    layers: Tensor  # [B, N] int32, joint layers that each token was computed in
    kept: tuple[Tensor, ...]  # of each pruning block, [B, T, K] the patches kept, best first, as numbered by the block before
    motion_logits: Tensor | None  # [B, 2] fake, real; None without that head
    rho: Tensor | None  # [B, N] the ponder cost: layers taken part in, plus the remainder. None without halting, and where not asked for


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

    def __init__(self, config: HaltingConfig, keep_rate: float, drop_path: float) -> None:
        super().__init__(config.dim, config.num_heads, config.mlp_ratio, drop_path=drop_path)
        self.keep_rate, self.fuse_token = keep_rate, config.fuse_token
        self.temporal_norm1 = nn.LayerNorm(config.dim, 1e-6)
        self.temporal_attn = Attention(config.dim, config.num_heads)
        self.temporal_fc = nn.Linear(config.dim, config.dim)

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


class HaltingVT(nn.Module):
    """The whole model. Training and inference are one path; they differ in drop-path and in how far finished clips are followed.

    Keep the weights in float32 and use autocast for half precision: halting scores need the residual stream's full precision.

    >>> model = HaltingVT(HaltingVT.PRESETS["minik_g03_beta10"]).eval()
    >>> logits, stats = model(torch.randn(1, 3, 8, 224, 224), return_stats=True)
    """

    # Mini-Kinetics and ActivityNet, by the published names
    PRESETS: ClassVar[dict[str, HaltingConfig]] = {
        f"{data}_g0{g}_beta{beta}": HaltingConfig((1.0, g / 10), float(beta), frames=frames, stride=stride)
        for data, frames, stride, gates in (
            ("minik", 8, 32, ((3, 5), (3, 10), (5, 20), (7, 20))),
            ("anet", 10, 64, ((3, 10), (5, 10), (5, 20), (7, 20))),
        )
        for g, beta in gates
    }

    def __init__(self, config: HaltingConfig) -> None:
        super().__init__()
        if not len(config.keep_rate) < config.depth:
            raise ValueError(f"keep_rate must name fewer blocks than the depth {config.depth}, got {len(config.keep_rate)}")
        if any(not 0.0 < rate <= 1.0 for rate in config.keep_rate):
            raise ValueError(f"keep_rate must be in (0, 1], got {config.keep_rate}")
        self.config = config
        dim, side = config.dim, config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.time_embed = nn.Parameter(torch.zeros(1, config.frames, dim))
        drops = torch.linspace(0.0, config.drop_path, config.depth, device="cpu").tolist()
        glimpsers = [Glimpser(config, rate, drop) for rate, drop in zip(config.keep_rate, drops, strict=False)]
        joint = [Block(dim, config.num_heads, config.mlp_ratio, drop_path=drop) for drop in drops[len(glimpsers) :]]
        self.blocks = nn.ModuleList([*glimpsers, *joint])
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.head = nn.Linear(dim, config.classes) if config.classes else nn.Identity()
        self.motion_head = nn.Linear(dim, 2) if config.motion else None
        initialise(self)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        for block in glimpsers:
            nn.init.zeros_(block.temporal_fc.weight)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        num_heads: int,
        keep_rate: Sequence[float],
        halt_scale: float = 10.0,
        halt_center: float,
        eps: float = 0.01,
        halting: bool = True,
        fuse_token: bool = False,
        drop_path: float = 0.1,
    ) -> HaltingVT:
        """From the released weights (``read_checkpoint(path, "state_dict")``), or those of the backbone alone. Sizes are read off them.

        How tokens halt and how many patches are kept is not in the weights, and a wrong number changes everything and raises nothing:
        see PRESETS.

        Raises:
            ValueError: the state does not fit, with every missing, unexpected or mis-shaped entry.
        """
        state = renamed(
            state_dict,
            (
                (r"(module\.)?cls_head\.fc_cls\.", "head."),
                (r"(module\.)?cls_head\.fc_motion\.", "motion_head."),
                (r"(module\.)?(backbone\.)?(model\.)?", ""),
            ),
        )
        config = _sizes(state)._replace(
            classes=_size(state, "head.weight", 0, 0),
            motion="motion_head.weight" in state,
            num_heads=num_heads,
            keep_rate=tuple(keep_rate),
            halt_scale=halt_scale,
            halt_center=halt_center,
            eps=eps,
            halting=halting,
            fuse_token=fuse_token,
            drop_path=drop_path,
        )
        model = cls(config)
        load_strictly(model, state, "HaltingVT")
        return model

    @classmethod
    def from_deit(cls, state_dict: Mapping[str, Tensor], config: HaltingConfig) -> HaltingVT:
        """To train from an image model (``read_checkpoint(path, "model")``): attention over time starts as that over space, and closed.

        Raises:
            ValueError: as ``from_official``.
        """
        model = cls(config)
        state = renamed(state_dict, ((r"module\.", ""), (r"head\.", None)))
        for i in range(len(config.keep_rate)):
            for name in ("attn", "norm1"):
                found = {key: value for key, value in state.items() if key.startswith(f"blocks.{i}.{name}.")}
                state |= {key.replace(name, f"temporal_{name}"): value for key, value in found.items()}
        own = {key: value for key, value in model.state_dict().items() if "head." in key or "temporal_fc" in key or key == "time_embed"}
        load_strictly(model, {**own, **state}, "HaltingVT from an image model")
        return model

    def forward(
        self,
        clip: Tensor,  # [B, 3, T, H, W]
        *,
        return_stats: bool = False,
        ponder: bool | None = None,
    ) -> Tensor | tuple[Tensor, HaltingStats]:  # [B, classes]
        """
        Args:
            clip: pixels in -1 .. 1, as ``preprocess`` gives them. T, H and W may differ from the model's: its tables are then resized.
            return_stats: return (logits, HaltingStats).
            ponder: follow all tokens to their end for ``stats.rho``, also in clips that are finished. Default: in training.

        The logits are differentiable with or without. Halting decisions are constants.
        """
        ponder = self.config.halting and (self.training if ponder is None else ponder)
        z = self.embed(clip)
        kept: list[Tensor] = []
        blocks: list[Any] = list(self.blocks)
        for glimpser in blocks[: len(self.config.keep_rate)]:
            z, patches = glimpser(z, clip.shape[2])
            kept += [] if patches is None else [patches]
        joint = blocks[len(self.config.keep_rate) :]
        batch, n, _ = z.shape
        counts = torch.zeros(batch, len(joint), dtype=torch.int64, device=z.device)
        layers = torch.zeros(batch * n, dtype=torch.int32, device=z.device)
        gone: list[tuple[Tensor, Tensor]] = []
        tokens = first_tokens(z)
        for j, block in enumerate(joint):
            active, alive = tokens.state.active, class_active(tokens)
            counts[:, j] = F.pad(active.cumsum(0), (1, 0)).index_select(0, tokens.cu_seqlens).diff() * alive
            layers[tokens.token] += active
            last = block is joint[-1]
            z = joint_layer(block, tokens, n, last)
            if last:
                # all that are left halt here
                weight = class_rows(tokens, tokens.state.remain) * alive
                tokens = tokens._replace(state=tokens.state._replace(out=tokens.state.out + weight[:, None] * z))
                gone.append((tokens.token, tokens.state.rho + active * (1.0 + tokens.state.remain)))
            elif not self.config.halting:
                tokens = tokens._replace(z=F.pad(z, (0, 0, 0, batch)))
            else:
                state = halt_tokens(
                    z,
                    tokens.state,
                    scale=self.config.halt_scale,
                    center=self.config.halt_center,
                    eps=self.config.eps,
                    output="class",
                    cu_seqlens=tokens.cu_seqlens,
                )
                before = tokens
                tokens, stays = without_halted(before, z, state, ponder)
                if ponder:
                    gone.append((before.token[~stays], state.rho[~stays]))
                elif len(tokens.clip) == 0:
                    break
        feature = self.norm(tokens.state.out.to(self.norm.weight.dtype))
        logits = self.head(feature)
        if not return_stats:
            return logits
        rho = None
        if ponder:
            token, cost = (torch.cat(parts) for parts in zip(*gone, strict=True))
            rho = cost.index_select(0, token.argsort()).view(batch, n)
        motion = None if self.motion_head is None else self.motion_head(feature)
        return logits, HaltingStats(feature, counts, layers.view(batch, n), tuple(kept), motion, rho)

    def embed(self, clip: Tensor) -> Tensor:  # [B, 3, T, H, W] -> [B, 1 + S T, C], the frames of one patch together
        x = self.patch_embed(clip)
        height, width, frames = x.shape[1:4]
        pos, time = self.pos_embed[0, 1:], self.time_embed[0]
        side = math.isqrt(len(pos))
        if (height, width) != (side, side):
            pos = F.interpolate(pos.T.unflatten(1, (side, side))[None], (height, width), mode="nearest")[0].flatten(1).T
        if frames != len(time):
            time = F.interpolate(time.T[None], frames, mode="nearest")[0].T
        x = x.flatten(1, 2) + pos[:, None] + time
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([class_token, x.flatten(1, 2)], 1)

    def predict(self, views: Tensor) -> Tensor:  # [B, V, 3, T, H, W] -> [B, classes]
        """Probabilities, averaged over several views of a video."""
        logits = self(views.flatten(0, 1))
        return logits.softmax(-1).unflatten(0, views.shape[:2]).mean(1)

    def flops(self, **options: Any) -> MultiplyAdds:
        """As ``HaltingConfig.flops``."""
        return self.config.flops(**options)


class Losses(NamedTuple):
    total: Tensor
    classification: Tensor
    ponder: Tensor
    motion: Tensor


def halting_losses(
    logits: Tensor,
    stats: HaltingStats,
    labels: Tensor,  # [B] classes, or [B, classes] of 0 and 1
    motion_labels: Tensor,  # [B], 1 real, 0 fake
    *,
    ponder_weight: float = 5e-4,
    motion_weight: float = 1.0,
) -> Losses:
    """What is trained: the class of every clip, as few layers as possible, and to tell a moving clip from a frozen one.

    The published configurations name a weight of 0.001 for the motion loss, which the released code reads and does not apply.

    Raises:
        ValueError: a part that has a weight is missing from the stats, which are those of inference, say.
    """
    if ponder_weight and stats.rho is None:
        raise ValueError("stats.rho must be given, by model.train() or ponder=True, or ponder_weight be 0, got None")
    if motion_weight and stats.motion_logits is None:
        raise ValueError("stats.motion_logits must be given, by a model with that head, or motion_weight be 0, got None")
    if labels.dim() == 1:
        classification = F.cross_entropy(logits, labels)
    else:
        classification = -(labels * logits.log_softmax(-1)).sum(1).mean()
    nothing = classification.new_zeros(())
    ponder = nothing if stats.rho is None else ponder_weight * stats.rho.mean()
    motion = nothing if stats.motion_logits is None else motion_weight * F.cross_entropy(stats.motion_logits, motion_labels)
    return Losses(classification + ponder + motion, classification, ponder, motion)


def real_fake_pairs(real: Tensor, fake: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of the motion loss: clips [2 B, 3, T, H, W] in the order real, fake, real, fake; their labels; and 1 or 0.

    Args:
        real: [B, 3, T, H, W].
        fake: [B, 3, T, H, W], or one frame of each video [B, 3, H, W] to be repeated (``frame_indices`` with ``frozen``).
        labels: [B, ...], which a fake shares.
    """
    if fake.dim() == 4:
        fake = fake[:, :, None].expand_as(real)
    clips = torch.stack([real, fake], 1).flatten(0, 1)
    return clips, labels.repeat_interleave(2, 0), torch.tensor([1, 0], device=real.device).repeat(len(real))


def frame_indices(length: int, frames: int, stride: int, *, generator: torch.Generator | None = None, frozen: bool = False) -> Tensor:
    """Which frames of a video make a clip [T]: from its middle, or with a generator from a random place. A short video starts again.

    With ``frozen`` (a fake clip, which needs a generator) one of them, T times.
    """
    spare = max(length - (frames - 1) * stride - 1, 0)
    start = spare // 2 if generator is None else int(torch.randint(spare + 1, (), generator=generator))
    index = (start + torch.arange(frames) * stride) % length
    if frozen and generator is None:
        raise ValueError("frozen needs a generator, got None")
    if frozen:
        index = index[torch.randint(frames, (), generator=generator)].expand(frames)
    return index


def preprocess(frames: Tensor, size: int = 224) -> Tensor:  # [T, H, W, 3] uint8 -> [3, T, size, size]
    """As in testing: the shorter side to 8 / 7 of the size, the centre of that, and 0 .. 255 to -1 .. 1."""
    short = min(frames.shape[1:3])
    height, width = (int(side * size * 8 / 7 / short + 0.5) for side in frames.shape[1:3])
    x = F.interpolate(frames.permute(0, 3, 1, 2).float(), (height, width), mode="bilinear")
    top, left = (height - size) // 2, (width - size) // 2
    return (x[:, :, top : top + size, left : left + size].transpose(0, 1) - 127.5) / 127.5


def _size(state: Mapping[str, Tensor], key: str, axis: int, default: int) -> int:
    shape = state[key].shape if key in state else ()
    return shape[axis] if axis < len(shape) else default


def _sizes(state: Mapping[str, Tensor]) -> HaltingConfig:
    """Of a model for these weights; where an entry is missing DeiT-S's, so that loading names it together with all other faults."""
    dim = _size(state, "cls_token", 2, 384)
    patch = _size(state, "patch_embed.proj.weight", 2, 16)
    found = (re.match(r"blocks\.(\d+)\.", key) for key in state)
    return HaltingConfig(
        keep_rate=(),
        halt_center=0.0,
        frames=_size(state, "time_embed", 1, 8),
        dim=dim,
        depth=1 + max((int(block[1]) for block in found if block), default=11),
        mlp_ratio=_size(state, "blocks.0.mlp.fc1.weight", 0, 4 * dim) / dim,
        image_size=math.isqrt(_size(state, "pos_embed", 1, 197) - 1) * patch,
        patch_size=patch,
    )
