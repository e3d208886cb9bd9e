"""ViViT with a factorised encoder on eventful blocks: a transformer over each time step of a clip, and a small one over the steps.

A. Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021, model 2; eventful as in section 5 of "Eventful Transformers".
Letters: B batch, V views of a clip, T frames, J time steps (pairs of frames), N tokens of a step, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.models.blocks import MultiplyAdds, load_strictly, renamed
from tokenops.models.eventful import OFFICIAL_NAMES, BackboneConfig, EventfulBackbone, EventfulState, as_config
from tokenops.models.eventful_block import Policy

# the released names, and those of TAdaConv's ViViT, whose second head predicts nouns
_SPATIAL, _TEMPORAL = r"backbone\.layers\.(\d+)\.", r"backbone\.layers_temporal\.(\d+)\."
_BLOCK_PARTS = {
    r"norm\.": "norm1.",
    r"norm_ffn\.": "norm2.",
    r"attn\.to_qkv\.": "attn.qkv.",
    r"attn\.proj\.": "attn.proj.",
    r"ffn\.net\.0\.": "mlp.fc1.",
    r"ffn\.net\.3\.": "mlp.fc2.",
}
NAMES = (
    (r"embedding\.conv\.", "patch_embed.proj."),
    (r"(.*)class_token$", r"\1cls_token"),
    (r"((spatial|temporal)_model\.)?layer_norm\.", r"\1norm."),
    (r"classifier\.", "head."),
    *OFFICIAL_NAMES,
    (r"backbone\.stem\.conv1\.", "patch_embed.proj."),
    (r"backbone\.cls_token$", "spatial_model.cls_token"),
    (r"backbone\.pos_embd$", "spatial_model.backbone.pos_embed"),
    (r"backbone\.norm\.", "spatial_model.norm."),
    (r"backbone\.cls_token_out$", "temporal_model.cls_token"),
    (r"backbone\.temp_embd$", "temporal_model.backbone.pos_embed"),
    (r"backbone\.norm_out\.", "temporal_model.norm."),
    *((_SPATIAL + part, rf"spatial_model.backbone.blocks.\1.{own}") for part, own in _BLOCK_PARTS.items()),
    *((_TEMPORAL + part, rf"temporal_model.backbone.blocks.\1.{own}") for part, own in _BLOCK_PARTS.items()),
    (r"head\.linear1?\.", "head."),
    (r"head\.linear2\.", None),
)


class ViViTConfig(NamedTuple):
    """Under the released configurations' names."""

    classes: int
    input_shape: tuple[int, int, int, int]  # of a view, (T, 3, H, W)
    spatial_config: Mapping[str, Any] | BackboneConfig
    temporal_config: Mapping[str, Any] | BackboneConfig
    normalize_mean: float = 0.45
    normalize_std: float = 0.225
    spatial_views: int = 3
    temporal_views: int = 4
    temporal_stride: int = 2  # every so many-th frame of the video is in a view
    tubelet_shape: tuple[int, int, int] = (2, 16, 16)
    batch_views: bool = True  # views as one batch, or one after the other
    dropout_rate: float = 0.0


_SPATIAL_K400, _SPATIAL_EPIC100 = (EventfulBackbone.PRESETS[name] for name in ("vivit_b_k400", "vivit_b_epic100"))
_TEMPORAL_B = BackboneConfig(_SPATIAL_K400.block_config, depth=4, position_encoding_size=(16,))
VIVIT_B_K400 = ViViTConfig(400, (32, 3, 224, 224), _SPATIAL_K400, _TEMPORAL_B)
VIVIT_B_EPIC100 = ViViTConfig(97, (32, 3, 320, 320), _SPATIAL_EPIC100, _TEMPORAL_B, temporal_stride=1)


class SubModel(nn.Module):
    """A class token before the tokens, blocks, and the class token's normalised output."""

    def __init__(
        self,
        config: BackboneConfig | Mapping[str, Any],
        grid: tuple[int, ...],
        policy: Policy = ("topk", {"k": 48}),
        mode: str = "paper",
    ) -> None:
        super().__init__()
        config = as_config(BackboneConfig, config, "spatial_config or temporal_config")
        self.backbone = EventfulBackbone(config._replace(input_size=grid, has_class_token=True), policy, mode)
        width = self.backbone.pos_embed.shape[2]
        self.cls_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.norm = nn.LayerNorm(width, 1e-6)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        config: BackboneConfig | Mapping[str, Any],
        grid: tuple[int, ...],
        policy: Policy = ("topk", {"k": 48}),
        mode: str = "paper",
    ) -> SubModel:
        """With released weights: class_token, backbone.* and layer_norm.*. Raises as ``EventfulBackbone.from_official``."""
        model = cls(config, grid, policy, mode)
        load_strictly(model, renamed(state_dict, NAMES), "SubModel")
        return model.eval()

    def forward(
        self, x: Tensor, state: EventfulState | None = None, indices: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, EventfulState]:  # [B, N, C] -> [B, C]
        x, state = self.backbone(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1), state, indices)
        return self.norm(x[:, 0]), state


class TubeletEmbed(nn.Module):
    def __init__(self, tubelet: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, tubelet, tubelet)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 3, H, W] -> [B, J, N, C]
        return self.proj(x.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)


class ViViT(nn.Module):
    """Clips to class probabilities, as the mean over views."""

    def __init__(self, config: ViViTConfig | Mapping[str, Any], policy: Policy = ("topk", {"k": 48}), mode: str = "paper") -> None:
        super().__init__()
        self.config = config = as_config(ViViTConfig, config, "config")
        frames, channels, height, width = config.input_shape
        tubelet_t, tubelet_h, tubelet_w = config.tubelet_shape
        if channels != 3 or frames % tubelet_t or height % tubelet_h or width % tubelet_w:
            raise ValueError(f"input_shape must be (T, 3, H, W) in tubelets of {config.tubelet_shape}, got {config.input_shape}")
        self.steps, self.grid = frames // tubelet_t, (height // tubelet_h, width // tubelet_w)
        self.spatial_model = SubModel(config.spatial_config, self.grid, policy, mode)
        self.temporal_model = SubModel(config.temporal_config, (self.steps,), policy, mode)
        if any(block.kind != "Block" for block in self.temporal_model.backbone.blocks):
            raise ValueError("temporal_config must have block_class Block: its tokens are the steps, and there is one frame of them")
        channels = self.spatial_model.cls_token.shape[2]
        self.patch_embed = TubeletEmbed(config.tubelet_shape, channels)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.head = nn.Linear(channels, config.classes)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        config: ViViTConfig | Mapping[str, Any] = VIVIT_B_K400,
        policy: Policy = ("topk", {"k": 48}),
        mode: str = "paper",
    ) -> ViViT:
        """With released weights, of Eventful Transformers or of TAdaConv's ViViT.

        Raises:
            ValueError: as ``EventfulBackbone.from_official``.
        """
        model = cls(config, policy, mode)
        load_strictly(model, renamed(state_dict, NAMES), "ViViT")
        return model.eval()

    def views(self, clip: Tensor) -> list[Tensor]:
        """Normalised views [B, T, 3, H, W] of a clip [B, frames, 3, height, width], uint8 or floating in [0, 1]: for each place all times.

        A clip that is too short is filled up with its last frame. Frames are made as small as covers a view.
        """
        c = self.config
        frames, _, height, width = c.input_shape
        if clip.dim() != 5 or clip.shape[2] != 3 or clip.shape[1] == 0:
            raise ValueError(f"clip must be [B, T, 3, H, W] with T > 0, got {list(clip.shape)}")
        reach = frames * c.temporal_stride
        if clip.shape[1] < reach:
            clip = torch.cat([clip, clip[:, -1:].expand(-1, reach - clip.shape[1], -1, -1, -1)], 1)
        scale = max(height / clip.shape[3], width / clip.shape[4])
        size = (round(scale * clip.shape[3]), round(scale * clip.shape[4]))
        made = []
        for start in _starts(clip.shape[1] - reach, c.temporal_views):
            part = clip[:, start : start + reach : c.temporal_stride]
            part = ((part.float() / 255.0 if part.dtype == torch.uint8 else part) - c.normalize_mean) / c.normalize_std
            if scale != 1.0:
                part = F.interpolate(part.flatten(0, 1), size, mode="bilinear", antialias=True).unflatten(0, part.shape[:2])
            made.append(part)
        # slack is along one side only, the other fits
        slack_y, slack_x = size[0] - height, size[1] - width
        corners = zip(_starts(slack_y, c.spatial_views), _starts(slack_x, c.spatial_views), strict=True)
        return [part[..., y : y + height, x : x + width] for y, x in corners for part in made]

    def features(self, view: Tensor) -> Tensor:
        """[B, J, C] of normalised views [B, T, 3, H, W]: the spatial model's output for each step, from a first frame on."""
        state, features = None, []
        for tokens in self.patch_embed(view).unbind(1):
            feature, state = self.spatial_model(tokens, state)
            features.append(feature)
        return torch.stack(features, 1)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, classes] of features [B, J, C]. What the paper trains: the spatial model's features are kept, and stay as they are."""
        return self.head(self.dropout(self.temporal_model(features)[0]))

    def logits(self, clip: Tensor) -> Tensor:
        """[B, classes], the mean over views."""
        views = self.views(clip)
        if self.config.batch_views:
            return self.classify(self.features(torch.cat(views))).unflatten(0, (len(views), -1)).mean(0)
        return torch.stack([self.classify(self.features(view)) for view in views]).mean(0)

    def forward(self, clip: Tensor) -> Tensor:
        """Probabilities [B, classes] of clips [B, frames, 3, height, width], uint8 or floating in [0, 1]."""
        return self.logits(clip).softmax(-1)

    def flops(self, k: int | None = None) -> MultiplyAdds:
        """Of one clip with all its views, where every gate lets ``k`` tokens through after each first step; None: dense throughout."""
        spatial, temporal = self.spatial_model.backbone, self.temporal_model.backbone
        parts = [spatial.flops(None if step == 0 else k) for step in range(self.steps)] + [temporal.flops()]
        views = self.config.spatial_views * self.config.temporal_views
        embedding = self.steps * torch.Size(self.grid).numel() * self.patch_embed.proj.weight.numel()
        published = sum(part.published for part in parts) + self.head.weight.numel() + self.head.out_features
        return MultiplyAdds(views * (sum(part.total for part in parts) + embedding + self.head.weight.numel()), views * published)


def _starts(slack: int, views: int) -> list[int]:
    """Evenly from 0 to slack; a single view is in the middle."""
    return [slack // 2] if views == 1 else [int(at * slack / (views - 1)) for at in range(views)]
