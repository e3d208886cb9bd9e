"""Subjects of the room ``models`` whose tokens merge: a plain vision transformer for video with ToMe or STTM attached, beside itself."""

from __future__ import annotations

from functools import partial, reduce
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tokenops
from tokenops.models import STTM, attach_sttm, attach_tome, sttm, tome, vidtr
from tokenops.models.blocks import Block, MultiplyAdds
from tokenops.types import MergePlan

from . import models_plain as plain
from .frames import Frames
from .harness import Request
from .models_subject import CLIPS, MODEL, OURS, PLAIN, PUBLISHED, SDPA, SHOWN, Layer, Subject, exactly, on_each, weights
from .picture import Panel, tinted
from .video import SIDE

TUBELET, PATCH = 2, 16
STRIDE = 4  # frames of the video from one frame of a clip to the next


class MergingConfig(NamedTuple):
    """A vision transformer for video, and how its tokens merge."""

    dim: int
    depth: int
    num_heads: int
    frames: int = 16
    r: int = 0  # by ToMe, in each block
    layer: int | None = None  # by STTM, before this one
    windows: int = 4
    meta_tokens: int = 98
    mode: str = "soft"

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.frames // TUBELET, SIDE // PATCH, SIDE // PATCH

    @property
    def tokens(self) -> int:
        return prod(self.grid)

    def dense(self) -> MergingConfig:
        return self._replace(r=0, layer=None)

    def flops(self) -> MultiplyAdds:
        patch = 3 * TUBELET * PATCH * PATCH
        if self.layer is None:
            return tome.flops(self.r, depth=self.depth, dim=self.dim, num_heads=self.num_heads, tokens=self.tokens, patch=patch)
        stage: dict[str, Any] = {"windows": (self.windows,), "meta_tokens": (self.meta_tokens,)}
        return sttm.flops((self.layer,), **stage, depth=self.depth, dim=self.dim, grid=self.grid, patch=patch)


class VideoViT(nn.Module):
    """Patches of two frames, joint attention over all of them in every block, and the mean of the tokens."""

    def __init__(self, config: MergingConfig) -> None:
        super().__init__()
        self.config = config
        self.merger: STTM | None = None
        self.patch_embed = nn.Conv3d(3, config.dim, (TUBELET, PATCH, PATCH), (TUBELET, PATCH, PATCH))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.dim))
        self.blocks = nn.ModuleList(Block(config.dim, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, 1e-6)
        self.register_buffer("places", sttm.token_places(config.grid), persistent=False)

    def embed(self, clip: Tensor) -> Tensor:  # [B, 3, T, H, W] -> [B, N, C]
        return self.patch_embed(clip).flatten(2).mT + self.pos_embed

    def forward(self, clip: Tensor) -> Tensor:  # -> [B, C]
        x = self.embed(clip)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)

    def again(self) -> VideoViT:
        """Another one of the same weights, for something to be attached to."""
        with torch.device("meta"):
            other = VideoViT(self.config)
        other.load_state_dict(self.state_dict(), assign=True)
        return other.eval()


class _Setting(NamedTuple):
    """What both ways of merging start from."""

    film: Tensor
    chosen: Tensor  # [CLIPS, T], of the film
    clips: list[Tensor]
    model: VideoViT


def _setting(config: MergingConfig, request: Request) -> _Setting:
    film = request.frames()
    chosen = vidtr.sample_frames(len(film), config.frames, STRIDE, clips=CLIPS)
    clips = [((film[at] / 255 - 0.45) / 0.225).permute(3, 0, 1, 2)[None].to(request.device) for at in chosen]
    with torch.random.fork_rng():
        model = VideoViT(config).eval()
    plain.liven(model, 1.0)
    return _Setting(film, chosen, clips, model.to(request.device))


def _clusters(setting: _Setting, member: Tensor) -> list[Panel]:  # of each token of the first clip
    panels, member = [], member.cpu().view(setting.model.config.grid)
    for t in torch.linspace(0, len(member) - 1, SHOWN).long().tolist():
        at = int(setting.chosen[0, TUBELET * t])
        title = f"frame {at}: {member[t].numel()} tokens in {member[t].unique().numel()} clusters"
        panels.append(tinted(setting.film[at] / 255, member[t], title))
    return panels


def _subject(setting: _Setting, ours: nn.Module, layers: list[Layer], **parts: Any) -> Subject:
    """With the dense twins, which are the same for both."""
    model, clips = setting.model, setting.clips
    frames, dense = Frames([(clip,) for clip in clips], []), exactly(plain.video_vit, model, clips)
    config, peers = model.config, parts.pop("peers")
    twins = {SDPA: partial(plain.video_vit, model), OURS: partial(plain.video_vit, model, block=Block.forward)}
    return Subject(
        frames=frames,
        shown=config.frames,
        ours=on_each(frames, ours),
        peers={name: on_each(frames, call) for name, call in (twins | peers).items()},
        right={SDPA: dense, OURS: dense, **parts.pop("right")},
        cost=config.flops(),
        dense=config.dense().flops(),
        weights=weights(model),
        layers=layers,
        **parts,
    )


@torch.no_grad()
def merging_by_tome(config: MergingConfig, request: Request) -> Subject:
    setting = _setting(config, request)
    model, merging = setting.model, setting.model.again()
    attachment = attach_tome(merging, config.r, unmerge=True)
    plans: list[list[MergePlan]] = []
    published: list[list[Tensor]] = [[] for _ in setting.clips]
    for clip, rows in zip(setting.clips, published, strict=True):
        merging(clip)
        assert attachment.last is not None
        plans.append([plan for plan in attachment.last.plans if plan is not None])
        plain.tome(model, clip, chosen=rows)
    counts = tome.token_counts(config.r, depth=config.depth, tokens=config.tokens)
    names = [*(f"block {at}" for at in range(config.depth)), "the end"]
    return _subject(
        setting,
        merging,
        [Layer(name, "tokens", count, config.tokens) for name, count in zip(names, counts, strict=True)],
        peers={PUBLISHED: partial(plain.tome, model)},
        right={
            MODEL: exactly(plain.tome, model, setting.clips, [[plan.slot for plan in some] for some in plans]),
            PUBLISHED: exactly(plain.tome, model, setting.clips, published),
        },
        panels=lambda: {"clusters": _clusters(setting, reduce(tokenops.compose_plans, plans[0]).slot[0])},
    )


@torch.no_grad()
def merging_by_sttm(config: MergingConfig, request: Request) -> Subject:
    setting = _setting(config, request)
    assert config.layer is not None
    model, merging = setting.model, setting.model.again()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stage: dict[str, Any] = {"windows": config.windows, "meta_tokens": config.meta_tokens, "mode": config.mode}
        attachment = attach_sttm(merging, (config.layer,), grid=config.grid, **stage, unmerge=True)
        [merger] = attachment.stages.eval()
        assert isinstance(merger, STTM)
        # as it begins, motion adds nothing
        merger.motion.weight.normal_(std=0.02)
    model.merger = merger
    merged = []
    for clip in setting.clips:
        merging(clip)
        assert attachment.last is not None
        merged += attachment.last.merged
    # hard: the meta token of each token [B, T, N]; soft: nothing is chosen
    ours = [None if one.plan is None else one.plan.slot.view(one.metric.shape[:3]) for one in merged]
    chosen: list[Tensor] = []
    for clip in setting.clips:
        plain.sttm(model, clip, chosen=chosen)
    counts = [config.tokens if at < config.layer else config.windows * config.meta_tokens for at in range(config.depth)]
    layers = [Layer(f"block {at}", "tokens", count, config.tokens) for at, count in enumerate(counts)]
    used = sum(int((one.mass > 0.0).sum()) for one in merged) / CLIPS
    layers.insert(config.layer, Layer("STTM", "merged tokens that have members", used, counts[-1]))

    def panels() -> dict[str, list[Panel]]:
        first, slots = merged[0], ours[0]
        return {
            "clusters": _clusters(setting, merger.assignment(first.metric, first.meta[:, None]).argmax(-1) if slots is None else slots[:1])
        }

    return _subject(
        setting,
        merging,
        layers,
        peers={PLAIN: partial(plain.sttm, model)},
        right={
            MODEL: exactly(plain.sttm, model, setting.clips, ours),
            PLAIN: exactly(plain.sttm, model, setting.clips, chosen or [None] * CLIPS),
        },
        panels=panels,
    )
