"""ViTDet's backbone on video: an eventful vision transformer with windows, and the feature pyramid that a detector stands on.

Y. Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022. On video: "Eventful Transformers", section 5.
Letters: B batch, C channels, S side of the square that frames are filled up to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.models.blocks import MultiplyAdds, load_strictly, renamed
from tokenops.models.eventful import OFFICIAL_NAMES, BackboneConfig, EventfulBackbone, EventfulState, as_config
from tokenops.models.eventful_block import Policy

# scale of a level, and how many parts of its stage come before the 1 x 1 convolution
LEADING = {4.0: 4, 2.0: 1, 1.0: 0, 0.5: 1}
LEVELS = {"simfp_2": 4.0, "simfp_3": 2.0, "simfp_4": 1.0, "simfp_5": 0.5}


def _pyramid_names() -> list[tuple[str, str | None]]:
    """detectron2 keeps the norm inside the convolution before it; here each part has its own place."""
    names: list[tuple[str, str | None]] = []
    for stage, (level, scale) in enumerate(LEVELS.items()):
        first = LEADING[scale]
        for at, inside in ((first, 0), (first + 1, 1)):
            names.append((rf"backbone\.{level}\.{at}\.norm\.", f"pyramid.stages.{stage}.{at + inside + 1}."))
            names.append((rf"backbone\.{level}\.{at}\.weight$", f"pyramid.stages.{stage}.{at + inside}.weight"))
        names.append((rf"backbone\.{level}\.", f"pyramid.stages.{stage}."))
    return names


# the released names, detectron2's, and the parts of a detector, which are not ours
NAMES = (
    (r"embedding\.conv\.", "patch_embed.proj."),
    *OFFICIAL_NAMES,
    (r"backbone\.net\.patch_embed\.", "patch_embed."),
    (r"backbone\.net\.", "backbone."),
    *_pyramid_names(),
    (r"(proposal_generator|roi_heads)\.", None),
)


class ViTDetConfig(NamedTuple):
    """Under the released configurations' names."""

    input_shape: tuple[int, int, int]  # (3, S, S)
    backbone_config: Mapping[str, Any] | BackboneConfig
    normalize_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    normalize_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    patch_size: tuple[int, int] = (16, 16)
    output_channels: int = 256
    scale_factors: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    # of the detector behind, which is not here
    classes: int | None = None
    detectron2_config: str | None = None


VITDET_B_1024 = ViTDetConfig((3, 1024, 1024), EventfulBackbone.PRESETS["vitdet_b_1024"])
VITDET_B_672 = ViTDetConfig((3, 672, 672), EventfulBackbone.PRESETS["vitdet_b_672"])


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation of each pixel."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Pyramid(nn.Module):
    """Maps of one grid of tokens at other scales, and one more at half the last."""

    def __init__(self, width: int, channels: int, scales: tuple[float, ...]) -> None:
        super().__init__()
        stages: list[nn.Sequential] = []
        for scale in scales:
            if scale not in LEADING:
                raise ValueError(f"scale_factors must be of {', '.join(map(str, LEADING))}, got {scale}")
            parts: list[nn.Module] = []
            inner = width
            if scale > 1.0:
                parts.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
                inner = width // 2
            if scale == 4.0:
                parts += [ChannelNorm(width // 2, 1e-6), nn.GELU(), nn.ConvTranspose2d(width // 2, width // 4, 2, 2)]
                inner = width // 4
            if scale == 0.5:
                parts.append(nn.MaxPool2d(2))
            for kernel in (1, 3):
                parts += [nn.Conv2d(inner, channels, kernel, padding=kernel // 2, bias=False), ChannelNorm(channels, 1e-6)]
                inner = channels
            stages.append(nn.Sequential(*parts))
        self.stages = cast("list[nn.Sequential]", nn.ModuleList(stages))

    def forward(self, x: Tensor) -> list[Tensor]:  # [B, C, h, w]
        maps = [stage(x) for stage in self.stages]
        return [*maps, F.max_pool2d(maps[-1], 1, 2)]

    def multiply_adds(self, height: int, width: int) -> int:
        """Of the convolutions, for one grid."""
        done = 0
        for stage in self.stages:
            h, w = height, width
            for part in stage:
                if isinstance(part, nn.ConvTranspose2d):
                    # each output is of one input
                    h, w = 2 * h, 2 * w
                    done += h * w * part.in_channels * part.out_channels
                elif isinstance(part, nn.MaxPool2d):
                    h, w = h // 2, w // 2
                elif isinstance(part, nn.Conv2d):
                    done += h * w * part.weight.numel()
        return done


class PatchEmbed(nn.Module):
    def __init__(self, patch: tuple[int, int], width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)


class ViTDetBackbone(nn.Module):
    """Frames to the maps of a pyramid, "p2" to "p6"."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ViTDetConfig | Mapping[str, Any], policy: Policy = ("topk", {"k": 512}), mode: str = "paper") -> None:
        super().__init__()
        self.config = config = as_config(ViTDetConfig, config, "config")
        backbone = as_config(BackboneConfig, config.backbone_config, "backbone_config")
        self.grid = (config.input_shape[1] // config.patch_size[0], config.input_shape[2] // config.patch_size[1])
        self.backbone = EventfulBackbone(backbone._replace(input_size=self.grid), policy, mode)
        width = self.backbone.pos_embed.shape[2]
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.pyramid = Pyramid(width, config.output_channels, tuple(config.scale_factors))
        for name in ("mean", "std"):
            numbers = torch.tensor(getattr(config, f"normalize_{name}"), dtype=torch.float32)
            self.register_buffer(name, numbers.view(3, 1, 1), persistent=False)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        config: ViTDetConfig | Mapping[str, Any] = VITDET_B_1024,
        policy: Policy = ("topk", {"k": 512}),
        mode: str = "paper",
    ) -> ViTDetBackbone:
        """With released weights, of Eventful Transformers or of detectron2's ViTDet; what belongs to the detector behind is passed over.

        Raises:
            ValueError: as ``EventfulBackbone.from_official``.
        """
        model = cls(config, policy, mode)
        state = renamed(state_dict, NAMES)
        encoding, own = state.get("backbone.pos_embed"), model.backbone.pos_embed
        if encoding is not None and encoding.dim() == 3 and encoding.shape[1] == own.shape[1] + 1:
            # detectron2 carries the class token's row of pre-training along
            state["backbone.pos_embed"] = encoding[:, 1:]
        load_strictly(model, state, "ViTDetBackbone")
        return model.eval()

    def preprocess(self, frame: Tensor) -> Tensor:
        """[B, 3, S, S]: normalised, and filled up with zeros below and on the right.

        ``frame``: [B, 3, H, W] uint8, or floating in [0, 1]; H and W at most S. As published, the caller has resized it: its shorter side
        to 640 S / 1024, the longer to at most S.
        """
        _, height, width = self.config.input_shape
        if frame.dim() != 4 or frame.shape[1] != 3 or frame.shape[2] > height or frame.shape[3] > width:
            raise ValueError(f"frame must be [B, 3, H, W] with H <= {height} and W <= {width}, got {list(frame.shape)}")
        levels = frame.float() if frame.dtype == torch.uint8 else frame * 255.0
        return F.pad((levels - self.mean) / self.std, (0, width - frame.shape[3], 0, height - frame.shape[2]))

    def forward(
        self, frame: Tensor, state: EventfulState | None = None, indices: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], EventfulState]:
        """The next frame of each of B videos: frame as in ``preprocess``, state and indices as in ``EventfulBackbone``.

        Returns:
            {"p2": [B, 256, S/4, S/4], "p3": S/8, "p4": S/16, "p5": S/32, "p6": S/64}, and the state for the next frame.
        """
        tokens = self.patch_embed.proj(self.preprocess(frame)).flatten(2).mT
        tokens, state = self.backbone(tokens, state, indices)
        maps = self.pyramid(tokens.mT.unflatten(2, self.grid))
        return {f"p{at}": x for at, x in enumerate(maps, 2)}, state

    def flops(self, chosen: EventfulState | int | None = None, batch: int = 1) -> MultiplyAdds:
        """Of a frame; ``chosen`` as in ``EventfulBackbone.flops``. The published count is of the transformer alone."""
        transformer = self.backbone.flops(chosen, batch)
        batch = chosen.batch(batch) if isinstance(chosen, EventfulState) else batch
        embedding = torch.Size(self.grid).numel() * self.patch_embed.proj.weight.numel()
        return transformer._replace(total=transformer.total + batch * (embedding + self.pyramid.multiply_adds(*self.grid)))
