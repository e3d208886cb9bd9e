"""HaltingVT: a video transformer that prunes patches by a glimpse and then lets every token decide after how many layers it is done.

Q. Wu et al., "HaltingVT: Adaptive Token Halting Transformer for Efficient Video Recognition", 2024 (arXiv 2401.04975). Its halting is that
of H. Yin et al., "A-ViT", 2022, which is that of A. Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016.

The published code computes every token in every layer and multiplies those that have halted by zero. Here they are gone, and the outputs
are the same: a zeroed row still offers its key, the same one for all halted tokens of a layer, so a single zero row whose logit is raised
by the log of their number stands for them all. Layers are in haltingvt_layers.py, what makes clips of a video in haltingvt_clips.py.

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

from tokenops.models.blocks import Block, MultiplyAdds, initialise, load_strictly, renamed
from tokenops.models.haltingvt_clips import frame_indices as frame_indices
from tokenops.models.haltingvt_clips import preprocess as preprocess
from tokenops.models.haltingvt_clips import real_fake_pairs as real_fake_pairs
from tokenops.models.haltingvt_layers import Glimpser, PatchEmbed, class_active, class_rows, first_tokens, joint_layer, without_halted
from tokenops.ops.token_select import halt_tokens


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
        sizes = dim, config.num_heads, config.mlp_ratio
        rates = zip(config.keep_rate, drops, strict=False)
        glimpsers = [Glimpser(*sizes, rate, fuse_token=config.fuse_token, drop_path=drop) for rate, drop in rates]
        joint = [Block(*sizes, drop_path=drop) for drop in drops[len(glimpsers) :]]
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
