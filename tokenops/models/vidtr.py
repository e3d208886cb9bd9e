"""VidTr and C-VidTr: attention over time, then over space, and frames that are dropped between layers.

Y. Zhang et al., "VidTr: Video Transformer Without Convolutions", ICCV 2021 (arXiv 2104.11746), as its authors released it (five
Kinetics-400 models, 2021). Section 3.2 is separable attention, 3.3 the pooling. The release differs from the paper's equations: the two
attentions of a layer share their projections, and pooling is done per head and location. Both are here.

A clip's tokens are a grid: one row for each frame (the full model has a row of class tokens before them), one column for each location (and
a column of class tokens before them), stored row by row. Attention over time is thousands of tiny problems, one for each column and head;
over space it is one for each row and head, of a few hundred keys. No step copies tokens from one order into the other: both are views.

Letters: B batch, T frames, R rows of the grid, N columns, K rows kept, C channels, H heads, D head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.models.blocks import Attention, Mlp, MultiplyAdds, attend, initialise, load_strictly, renamed
from tokenops.ops.sparse_attention import sparse_attention
from tokenops.ops.token_select import select_tokens
from tokenops.types import Aux

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 1e-5
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


class TopKStd(NamedTuple):
    """pool_topK_std: keep the frames whose rows of the temporal attention vary most. A flat row tells nothing, a peaked one does."""

    drop: int  # frames to leave out (the release's NUMBER_OF_KEYS)
    granularity: str = "head_location"  # each head of each location keeps its own frames; or each "location" (mean over heads), or "clip"
    resoftmax: bool = True  # the kept rows, probabilities already, go through softmax once more, as in the release
    keep_class: bool = False  # the first row holds class tokens: it stays, and is not counted


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


class JointAttention(Attention):
    """Every token attends to every token. Query, key and value are three tensors, so that any grouping of their rows is a view."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim, num_heads)
        self.dropout = dropout

    def project(self, x: Tensor, source: Tensor) -> list[Tensor]:  # three times [B, N, C]; values come from source
        parts = zip((x, x, source), self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        return [F.linear(part, weight, bias) for part, weight, bias in parts]

    def split(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, H, N, D]
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    # values may come from elsewhere, and whoever calls has normalised them
    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:  # type: ignore[override]  # [B, N, C]
        parts = self.project(x, x if source is None else source)
        return self.proj(attend(*map(self.split, parts), dropout_p=self.dropout if self.training else 0.0))


class SeparableAttention(JointAttention):
    """Attention over the rows of each column (time), then over the columns of each row (space): MSA(S) = MSA_s(MSA_t(S)).

    O_t = softmax_time(q k^T / sqrt(D)) v;  O = softmax_space(q k^T / sqrt(D)) O_t;  y = W_o O  (mode "shared_qk", the release).
    In mode "separate" (the paper) each of the two has projections of its own.

    With a pool the temporal step drops rows. Where heads and locations keep different frames, the spatial step mixes locations by rank:
    the first kept frame of each, the second of each, and so on.
    """

    def __init__(self, dim: int, num_heads: int, *, mode: str = "shared_qk", pool: TopKStd | None = None, dropout: float = 0.0) -> None:
        super().__init__(dim, num_heads, dropout)
        if mode not in ("shared_qk", "separate"):
            raise ValueError(f'mode must be "shared_qk" or "separate", got {mode!r}')
        if pool is not None and pool.granularity not in ("head_location", "location", "clip"):
            raise ValueError(f'pool.granularity must be "head_location", "location" or "clip", got {pool.granularity!r}')
        self.pool = pool
        self.spatial = JointAttention(dim, num_heads, dropout) if mode == "separate" else None

    def forward(self, x: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """
        Args:
            x: [B, R N, C], row by row.
            rows: R.

        Returns:
            [B, K N, C], and which rows were kept: [B, N H, K] int32, ascending in each list; None if there is no pool.
        """
        batch, _, channels = x.shape
        dropout_p = self.dropout if self.training else 0.0
        query, key, value = (part.view(batch, rows, -1, channels // self.num_heads) for part in self.project(x, x))  # [B, R, N H, D]
        kept = None
        if self.pool is None:
            out = over_rows(query, key, value, dropout_p=dropout_p)
        else:
            # as released, no dropout here
            probability, row_sq, unit = attention_matrix(query, key)
            kept = self.rank(probability, row_sq)
            if self.pool.resoftmax:
                # softmax(p) v is attention again: the row p is its own list of logits if the keys are unit vectors
                out = over_rows(gather_rows(probability, kept), unit, value, scale=1.0)
            else:
                out = over_rows(gather_rows(query, kept), key, value)
            if self.spatial is None:
                query, key = gather_rows(query, kept), gather_rows(key, kept)
        # each row a sample: [B K, N, C]
        query, key, out = (part.reshape(batch * part.shape[1], -1, channels) for part in (query, key, out))
        if self.spatial is None:
            out = self.proj(attend(*map(self.split, (query, key, out)), dropout_p=dropout_p))
        else:
            out = self.spatial(self.proj(out))
        return out.view(batch, -1, channels), kept

    def rank(self, probability: Tensor, row_sq: Tensor) -> Tensor:
        """The kept rows, [B, N H, K], of attention rows [B, R, N H, >= R]."""
        assert self.pool is not None
        drop, granularity, _, keep_class = self.pool
        places, rows = row_sq.shape[1:]
        if not 0 <= drop < rows - keep_class:
            raise ValueError(f"pool.drop must be in [0, {rows - keep_class}), the frames that come in, got {drop}")
        # A row sums to 1, so its mean is 1 / R, and its squared deviations sum to row_sq - 1 / R. But row_sq is float32, and rows that are
        # nearly flat, as in a still clip, differ behind its last digit: their order would not be the release's. Half types are the other
        # way round: their rounded probabilities say less than row_sq.
        if probability.dtype in (torch.float32, torch.float64):
            squares = (probability.detach()[..., :rows] - 1.0 / rows).square().sum(-1).transpose(1, 2)
        else:
            squares = (row_sq - 1.0 / rows).clamp(min=0.0)
        deviation = squares.sqrt()  # [B, N H, R], times the root of R - 1
        if granularity != "head_location":
            shared = {"location": self.num_heads, "clip": places}[granularity]
            deviation = deviation.unflatten(1, (-1, shared)).mean(2)
        kept = select_tokens(deviation, k=rows - drop, protect=int(keep_class)).index
        return kept.repeat_interleave(places // kept.shape[1], dim=1)


def over_rows(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention of each place on its own, thousands of tiny problems: [B, K, N H, D], [B, R, N H, D] twice -> [B, K, N H, D]."""
    out = sparse_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options)
    assert isinstance(out, Tensor)
    # the operator keeps the query's memory layout, so that this is the dense one
    return out.transpose(1, 2)


def attention_matrix(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) of [B, R, N H, D] as the attention of unit vectors: the kernel of tiny problems serves it, and its gradient.

    Returns:
        [B, R, N H, R'] with R' the multiple of 8 from R on that kernels take, zeros behind R; the sums of squares [B, N H, R]; the unit
        vectors [1, R, 1, R'].
    """
    rows = query.shape[1]
    unit = torch.eye(rows, -(-rows // 8) * 8, dtype=query.dtype, device=query.device)
    out, aux = sparse_attention(query.transpose(1, 2), key.transpose(1, 2), unit[None, None], return_aux=("row_sq",))
    assert isinstance(aux, Aux)
    assert isinstance(aux.row_sq, Tensor)
    return out.transpose(1, 2), aux.row_sq, unit[None, :, None]


def gather_rows(x: Tensor, kept: Tensor) -> Tensor:
    """Of [B, R, N H, D] the rows [B, N H, K], each place by its own list: [B, K, N H, D]."""
    batch, rows, places, width = x.shape
    first = torch.arange(batch, device=x.device, dtype=kept.dtype)[:, None, None] * rows
    ids = (first + kept.transpose(1, 2)) * places + torch.arange(places, device=x.device, dtype=kept.dtype)  # [B, K, N H]
    return x.reshape(-1, width).index_select(0, ids.flatten()).view(batch, -1, places, width)


class VidTrBlock(nn.Module):
    """x += attention(norm1(x) + position), x += mlp(norm2(x)), of a grid of tokens or of all of them jointly.

    A class token that stands alone takes no part in the attention of a grid: it passes by, and what is added to it there is its own input.
    """

    def __init__(self, config: VidTrConfig, attn: JointAttention, class_passes: bool) -> None:
        super().__init__()
        self.class_passes = class_passes
        self.norm1 = nn.LayerNorm(config.dim, EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(config.dim, EPS)
        self.mlp = Mlp(config.dim, config.mlp_dim, lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(config.dropout)))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rows: int, position: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, N, C], how many rows its grid has, [1, N, C] -> tokens and kept rows, see SeparableAttention."""
        source = self.norm1(x)
        h = source if position is None else source + position
        if isinstance(self.attn, SeparableAttention):
            alone = int(self.class_passes)
            y, kept = self.attn(h[:, alone:], rows)
            if alone:
                y = torch.cat([h[:, :1], y], dim=1)
            if kept is not None:
                # the residual stream is pooled alike
                grid = x[:, alone:].reshape(len(x), rows, kept.shape[1], -1)
                grid = gather_rows(grid, kept).view(len(x), -1, x.shape[2])
                x = torch.cat([x[:, :1], grid], dim=1) if alone else grid
        else:
            # as released, the values of joint attention lack the position
            y, kept = self.attn(h, source), None
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.norm2(x))), kept


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
        self.blocks = nn.ModuleList(
            VidTrBlock(config, self._attention(pools.get(i), i < separable), not class_grid) for i in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, EPS)
        self.head_drop = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(dim, config.num_classes)
        initialise(self)
        for name, parameter in self.named_parameters():
            if name.startswith(("cls", "pos")):
                nn.init.trunc_normal_(parameter, std=0.02)

    def _attention(self, pool: TopKStd | None, separable: bool) -> JointAttention:
        c = self.config
        if separable:
            return SeparableAttention(c.dim, c.num_heads, mode=c.mode, pool=pool, dropout=c.dropout)
        return JointAttention(c.dim, c.num_heads, c.dropout)

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
                rows = kept.shape[2]
                indices.append(kept.unflatten(1, (-1, config.num_heads)))
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
                kept = rows - (attn.pool.drop if attn.pool else 0)
                spatial = 1 if attn.spatial is None else 5  # projections of what was kept
                total += c.dim**2 * columns * (3 * rows + spatial * kept)
                total += c.dim * columns * (rows * rows + rows * kept + 2 * kept * columns)
                rows = kept
            else:
                tokens = rows * columns + alone
                total += 4 * c.dim**2 * tokens + 2 * c.dim * tokens**2
            total += 2 * c.dim * c.mlp_dim * (rows * columns + alone)
            published += 2 * c.dim * c.mlp_dim * ((rows - extra) * locations + 1)
        return MultiplyAdds(total, published)


_Model = TypeVar("_Model", bound=_Encoder)


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


def sample_frames(length: int, frames: int = 8, stride: int = 8, *, clips: int = 1, spread: bool = False) -> Tensor:
    """Which frames of a video make its clips: [clips, frames] int64, clips spread evenly over the video.

    Args:
        length: frames of the video. Where a clip is longer, its last frame repeats.
        frames, stride: of a clip, which is cut from a window of frames * stride.
        clips: how many; one is cut from the middle. The published results take 10.
        spread: over the whole window with both its ends, as in the release's training, so that the true step is larger than ``stride``;
            otherwise every ``stride``-th frame, as in its test.
    """
    for name, number in (("length", length), ("frames", frames), ("stride", stride), ("clips", clips)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    window = frames * stride
    room = max(length - window, 0)
    starts = torch.linspace(0, room, clips, dtype=torch.float64) if clips > 1 else torch.tensor([room / 2], dtype=torch.float64)
    within = torch.linspace(0, window - 1, frames, dtype=torch.float64) if spread else torch.arange(frames, dtype=torch.float64) * stride
    return (starts.floor()[:, None] + within.round()).long().clamp(max=length - 1)


def preprocess(video: Tensor, frames: Tensor, *, size: int = 224, short_side: int = 224, crops: int = 3) -> Tensor:
    """Clips for the model from a decoded video.

    Args:
        video: [L, H, W, 3] uint8, RGB.
        frames: [clips, T], see ``sample_frames``.
        size: side of the square crops.
        short_side: to which the video is scaled first, its shape kept. The release: 224 in test, 256 in validation.
        crops: along the longer side, evenly; one is the middle.

    Returns:
        [clips * crops, 3, T, size, size] float32, by ImageNet's mean and deviation. The release averages softmax(logits) over these views.

    Raises:
        ValueError, TypeError: shapes or dtype are not these, or size is more than short_side.
    """
    if video.dim() != 4 or video.shape[3] != 3:
        raise ValueError(f"video must be [L, H, W, 3], got {list(video.shape)}")
    if video.dtype != torch.uint8:
        raise TypeError(f"video must be uint8, got {video.dtype}")
    if frames.dim() != 2:
        raise ValueError(f"frames must be [clips, T], got {list(frames.shape)}")
    if not 0 < size <= short_side:
        raise ValueError(f"size must be in [1, {short_side}], the short side, got {size}")
    if crops < 1:
        raise ValueError(f"crops must be at least 1, got {crops}")
    height, width = (max(round(side * short_side / min(video.shape[1:3])), short_side) for side in video.shape[1:3])
    used, place = frames.unique(return_inverse=True)
    images = video[used].permute(0, 3, 1, 2).float() / 255.0
    images = F.interpolate(images, (height, width), mode="bilinear", antialias=True, align_corners=False)
    mean, deviation = (torch.tensor(x, device=video.device)[:, None, None] for x in (MEAN, STD))
    images = (images - mean) / deviation
    views = []
    for part in range(crops):
        share = part / (crops - 1) if crops > 1 else 0.5
        # only the longer side has room for several crops
        top, left = (round((side - size) * (share if side > short_side else 0.5)) for side in (height, width))
        views.append(images[:, :, top : top + size, left : left + size][place].transpose(1, 2))
    return torch.stack(views, dim=1).flatten(0, 1)
