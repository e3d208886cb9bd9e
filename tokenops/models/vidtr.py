"""VidTr and C-VidTr: attention over time, then over space, and frames that are dropped between layers.

Y. Zhang et al., "VidTr: Video Transformer Without Convolutions", ICCV 2021 (arXiv 2104.11746), as its authors released it (five
Kinetics-400 models, 2021). Section 3.2 is separable attention, 3.3 the pooling. The release differs from the paper's equations: the two
attentions of a layer share their projections, and pooling is done per head and location. Both are here.

A clip's tokens are a grid: one row for each frame (the full model has a row of class tokens before them), one column for each location (and
a column of class tokens before them), stored row by row. Layers are in vidtr_block.py, what makes clips of a video in vidtr_clips.py.

Letters: B batch, T frames, R rows of the grid, N columns, K rows kept, C channels, H heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from tokenops.models.blocks import MultiplyAdds, initialise, load_strictly, renamed
from tokenops.models.vidtr_block import EPS, JointAttention, SeparableAttention, VidTrBlock
from tokenops.models.vidtr_block import TopKStd as TopKStd
from tokenops.models.vidtr_clips import preprocess as preprocess
from tokenops.models.vidtr_clips import sample_frames as sample_frames

# the names of the release, behind the "module." that a distributed wrapper puts before them
OFFICIAL = (
    (r"encoder\.layers\.(\d+)\.self_attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.(\d+)\.linear([12])\.", r"blocks.\1.mlp.fc\2."),
    (r"encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"encoder\.norm\.", "norm."),
    (r"conv_stem\.", "patch_embed."),
    (r"pos_embedding$", "pos_embed"),
    (r"cls_s$", "cls_spatial"),
    (r"cls_t$", "cls_temporal"),
    (r"cls$", "cls_token"),
    (r"fc\.", "head."),
)
# an image model's
VIT = ((r"patch_embed\.proj\.", "patch_embed."), (r"(head|pre_logits)\.", None))


@dataclass(frozen=True)
class VidTrConfig:
    frames: int | None = 8  # T; None: not known, any that divides cells
    cells: int = 8 * 196  # patches of a clip, frames times locations. The position table has one entry for each
    stride: int = 8  # of the frames in the video, for preprocessing
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 400
    patch: int = 16
    mode: str = "shared_qk"  # the spatial step reuses query and key, as released; or "separate" projections, as in the paper
    merge_index: int | None = None  # full model: one class token, and joint attention in the layers after this one (MERGE_LATER)
    pool_layers: tuple[int, ...] = ()  # compact model: the layers that pool,
    pools: tuple[TopKStd, ...] = ()  # and how each of them does
    dropout: float = 0.1
    head_dropout: float = 0.5


def _compact(frames: int, stride: int, layers: tuple[int, ...], drop: tuple[int, ...]) -> VidTrConfig:
    return VidTrConfig(frames, frames * 196, stride, pool_layers=layers, pools=tuple(TopKStd(n) for n in drop))


_Model = TypeVar("_Model", bound="_Encoder")


class _Encoder(nn.Module):
    """What both models share: patches, positions, blocks, the class token's logits."""

    def __init__(self, config: VidTrConfig, separable: int, class_grid: bool) -> None:
        """``separable`` layers, joint ones after them; a class token for each row and column of the grid, or one alone."""
        super().__init__()
        self.config = config
        self.class_grid = class_grid
        dim, cells = config.dim, config.cells
        if config.frames is not None and cells % config.frames:
            raise ValueError(f"cells must be a multiple of the {config.frames} frames, got {cells}")
        if config.frames is None and class_grid:
            raise ValueError("frames must be known in a model with class tokens for each of them, got None")
        if len(config.pools) != len(config.pool_layers):
            raise ValueError(f"pools must be one for each of {len(config.pool_layers)} pool_layers, got {len(config.pools)}")
        if list(config.pool_layers) != sorted({i for i in config.pool_layers if 0 <= i < separable}):
            raise ValueError(f"pool_layers must ascend and be among the {separable} separable layers, got {config.pool_layers}")
        if any(pool.keep_class != class_grid for pool in config.pools):
            raise ValueError(f"pools must have keep_class = {class_grid}: the grid has {'a' if class_grid else 'no'} row of class tokens")
        self.patch_embed = nn.Conv3d(3, dim, (1, config.patch, config.patch), (1, config.patch, config.patch))
        if class_grid and config.frames:
            columns = cells // config.frames + 1
            self.cls_spatial = nn.Parameter(torch.empty(config.frames, 1, dim))
            self.cls_temporal = nn.Parameter(torch.empty(1, columns, dim))
            self.pos_embed = nn.Parameter(torch.empty(1, (config.frames + 1) * columns, dim))
        else:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
            self.pos_embed = nn.Parameter(torch.empty(1, cells + 1, dim))
        pools = dict(zip(config.pool_layers, config.pools, strict=True))
        self.blocks = nn.ModuleList()
        for i in range(config.depth):
            attn: JointAttention | SeparableAttention = JointAttention(dim, config.num_heads, config.dropout)
            if i < separable:
                attn = SeparableAttention(dim, config.num_heads, mode=config.mode, pool=pools.get(i), dropout=config.dropout)
            self.blocks.append(VidTrBlock(attn, dim, config.mlp_dim, config.dropout, not class_grid))
        self.norm = nn.LayerNorm(dim, EPS)
        self.head_drop = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(dim, config.num_classes)
        initialise(self)
        for name, parameter in self.named_parameters():
            if name.startswith(("cls", "pos")):
                nn.init.trunc_normal_(parameter, std=0.02)

    @classmethod
    def from_vit(cls: type[_Model], state_dict: Mapping[str, Tensor], config: VidTrConfig) -> _Model:
        """To train from an image model, "inflated" as the published ones: every frame has its positions and class token.

        Args:
            state_dict: of a ViT under timm's names (ImageNet-21k ViT-B/16 for the presets).
            config: the head, and the spatial projections of mode "separate", stay new.

        Raises:
            ValueError: as ``from_official``; or config does not say how many frames.
        """
        if config.frames is None:
            raise ValueError("config.frames must be known: positions are repeated for each, got None")
        model = cls(config)  # type: ignore[call-arg]  # both models are made of a config alone
        state = renamed(state_dict, VIT)
        positions, token = state.get("pos_embed"), state.pop("cls_token", None)
        if positions is not None:
            # a grid has a row of class tokens more, and a class token's position in every row
            first, rows = (0, config.frames + 1) if model.class_grid else (1, config.frames)
            state["pos_embed"] = torch.cat([positions[:, :first], positions[:, first:].repeat(1, rows, 1)], dim=1)
        if token is not None:
            own = model.state_dict()
            state |= {name: token.expand(own[name].shape) for name in ("cls_token", "cls_spatial", "cls_temporal") if name in own}
        if "patch_embed.weight" in state:
            state["patch_embed.weight"] = state["patch_embed.weight"].unsqueeze(2)
        new = {name: x for name, x in model.state_dict().items() if name.startswith("head.") or ".spatial." in name}
        load_strictly(model, {**new, **state}, f"{cls.__name__} from an image model")
        return model

    def position_everywhere(self, frames: int) -> bool:
        return False

    def forward(self, clip: Tensor, return_indices: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """
        Args:
            clip: [B, 3, T, H, W], normalised (see ``preprocess``). The position table fixes T H W.
            return_indices: also return which rows each pooling layer kept of those that came in: a list of [B, N, H, K] int32, ascending.

        Returns:
            logits [B, num_classes], or (logits, list).

        Raises:
            ValueError: the clip's shape is not what the position table was made for.
        """
        config, patch = self.config, self.config.patch
        if clip.dim() != 5 or clip.shape[1] != 3:
            raise ValueError(f"clip must be [B, 3, T, H, W], got {list(clip.shape)}")
        frames, height, width = clip.shape[2:]
        cells = frames * (height // patch) * (width // patch)
        if height % patch or width % patch or cells != config.cells or frames != (config.frames or frames):
            wanted = "T" if config.frames is None else config.frames
            raise ValueError(f"clip must be [B, 3, {wanted}, H, W] of {config.cells} patches of {patch} x {patch}, got {list(clip.shape)}")
        x = self._tokens(self.patch_embed(clip).flatten(3).permute(0, 2, 3, 1))
        rows = frames + int(self.class_grid)
        indices = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, rows, self.pos_embed if i == 0 or self.position_everywhere(frames) else None)
            if kept is not None:
                rows = kept.shape[3]
                indices.append(kept)
        logits = self.head(self.head_drop(self.norm(x[:, 0])))
        return (logits, indices) if return_indices else logits

    def _tokens(self, patches: Tensor) -> Tensor:  # [B, T, N, C] -> [B, all tokens, C]
        batch = patches.shape[0]
        if not self.class_grid:
            return torch.cat([self.cls_token.expand(batch, -1, -1), patches.flatten(1, 2)], dim=1)
        columns = torch.cat([self.cls_spatial.expand(batch, -1, -1, -1), patches], dim=2)
        return torch.cat([self.cls_temporal.expand(batch, -1, -1), columns.flatten(1, 2)], dim=1)

    def flops(self, frames: int | None = None) -> MultiplyAdds:
        """Of one clip. ``frames`` is needed where the config does not know it.

        published: what the printed GFLOPs (89, 179 and 39) follow from, a counter that sees the patch embedding, the MLPs and the head of
        a model with one class token, but neither projections nor attention. It does not explain the 351 of L (358.9) and 59 of C-M (46.3).
        """
        c = self.config
        rows = c.frames or frames
        if rows is None or c.cells % rows:
            raise ValueError(f"frames must be given, a divisor of the {c.cells} patches of a clip, got {frames}")
        locations, extra = c.cells // rows, int(self.class_grid)
        columns, alone = locations + extra, 1 - extra
        rows += extra
        total = published = c.cells * c.dim * 3 * c.patch**2 + c.dim * c.num_classes
        for block in self.blocks:
            attn = block.attn
            if isinstance(attn, SeparableAttention):
                total += attn.multiply_adds(rows, columns)
                rows = attn.kept_of(rows)
            else:
                tokens = rows * columns + alone
                total += 4 * c.dim**2 * tokens + 2 * c.dim * tokens**2
            total += 2 * c.dim * c.mlp_dim * (rows * columns + alone)
            published += 2 * c.dim * c.mlp_dim * ((rows - extra) * locations + 1)
        return MultiplyAdds(total, published)


class VidTr(_Encoder):
    """The full model: a class token for every frame and every location, separable attention throughout.

    With ``merge_index`` it has one class token, separable layers up to that one, and joint attention after it; -1 is the vanilla joint
    transformer that the paper compares with. With pools it is the compact model as the paper's text has it.
    """

    PRESETS: ClassVar[dict[str, VidTrConfig]] = {
        "S": VidTrConfig(8, 8 * 196, 8),
        "M": VidTrConfig(16, 16 * 196, 4),
        "L": VidTrConfig(32, 32 * 196, 2),
    }

    def __init__(self, config: VidTrConfig = PRESETS["S"]) -> None:
        merge = config.merge_index
        super().__init__(config, config.depth if merge is None else merge + 1, class_grid=merge is None)

    def position_everywhere(self, frames: int) -> bool:
        # as released: the position is added in layer 0, but in a full model of 16 frames in every layer
        return frames == 16

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], *, num_heads: int = 12, merge_index: int = 6) -> VidTr:
        """The model of a released state, in evaluation mode. Sizes, dtype and device are the state's.

        Args:
            state_dict: of the release, or a checkpoint that holds it under "model"; a "module." before every key is dropped.
            num_heads: H.
            merge_index: read only if the state has one class token (MERGE_LATER).

        Raises:
            ValueError: entries are missing, unexpected or of another shape: all of them in one message.
        """
        state, sizes = _read(state_dict)
        config = VidTrConfig(**sizes, num_heads=num_heads, merge_index=merge_index if "cls_token" in state else None)
        return _filled(cls, config, state)


class CompactVidTr(_Encoder):
    """C-VidTr: one class token, which passes by the attention of the separable layers, pooling in some of these, and joint attention after
    the last pooling layer."""

    PRESETS: ClassVar[dict[str, VidTrConfig]] = {
        "S": _compact(8, 8, (1, 3, 5), (2, 2, 2)),
        "M": _compact(16, 4, (1, 2, 4), (8, 4, 2)),
    }

    def __init__(self, config: VidTrConfig = PRESETS["S"]) -> None:
        if config.merge_index is not None:
            raise ValueError(f"merge_index must be None: a compact model merges after its last pooling layer, got {config.merge_index}")
        super().__init__(config, min(max(config.pool_layers, default=-1) + 1, config.depth), class_grid=False)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Any],
        *,
        num_heads: int = 12,
        pool_layers: Sequence[int],
        drop: Sequence[int],
        granularity: str = "head_location",
        resoftmax: bool = True,
    ) -> CompactVidTr:
        """The model of a released state, as ``VidTr.from_official``.

        Args:
            pool_layers: which layers drop frames, from 0.
            drop: how many frames each of them drops.
            granularity, resoftmax: see ``TopKStd``; the defaults are the release.
        """
        state, sizes = _read(state_dict)
        pools = tuple(TopKStd(n, granularity, resoftmax) for n in drop)
        return _filled(cls, VidTrConfig(**sizes, num_heads=num_heads, pool_layers=tuple(pool_layers), pools=pools), state)


def _read(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The released state under our names, and the sizes it tells. What is missing there takes the published size: loading will say so."""
    state = renamed(renamed(state_dict.get("model", state_dict), [(r"module\.", "")]), OFFICIAL)
    published = VidTrConfig()

    def size(key: str, at: int, default: int) -> int:
        return state[key].shape[at] if key in state and state[key].dim() > at else default

    dim = size("norm.weight", 0, published.dim)
    frames = size("cls_spatial", 0, 8) if "cls_token" not in state else None
    cells = size("pos_embed", 1, published.cells + 1) - 1 if frames is None else frames * (size("cls_temporal", 1, 197) - 1)
    layers = [int(found[1]) for found in (re.match(r"blocks\.(\d+)\.", key) for key in state) if found]
    sizes = {
        "frames": frames,
        "cells": cells,
        "dim": dim,
        "depth": max(layers, default=published.depth - 1) + 1,
        "mlp_dim": size("blocks.0.mlp.fc1.weight", 0, 4 * dim),
        "num_classes": size("head.weight", 0, published.num_classes),
        "patch": size("patch_embed.weight", 4, published.patch),
    }
    return state, sizes


def _filled(kind: Callable[[VidTrConfig], _Model], config: VidTrConfig, state: Mapping[str, Tensor]) -> _Model:
    # 90 million weights need not be drawn to be overwritten
    with torch.device("meta"):
        model = kind(config)
    sample = state.get("norm.weight", torch.empty(0))
    model = model.to(sample.dtype).to_empty(device=sample.device)
    load_strictly(model, state, type(model).__name__)
    return model.eval()
