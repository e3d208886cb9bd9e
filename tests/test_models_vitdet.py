"""ViTDetBackbone: names of released weights, the pyramid against its definition, published costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenops.models import VITDET_B_672, VITDET_B_1024, BackboneConfig, ViTDetBackbone, ViTDetConfig

# twelve blocks as in ViTDet-B, but narrow: 6 x 6 tokens in windows of 4 x 4, tables and encoding of other grids
SMALL = ViTDetConfig(
    (3, 96, 96),
    BackboneConfig(
        {"dim": 16, "heads": 2, "mlp_ratio": 2, "relative_embedding_size": (5, 5), "window_size": (4, 4)},
        depth=12,
        position_encoding_size=(3, 3),
        block_class="EventfulBlock",
        window_indices=(0, 1, 3, 4, 6, 7, 9, 10),
        windowed_class="EventfulTokenwiseBlock",
    ),
    output_channels=8,
)


def randomised(model: torch.nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for x in model.parameters():
        x.data = 0.2 * torch.randn(x.shape, generator=generator) + (x.data == 1.0)
    return model.eval()


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Eventful Transformers released them."""
    words = {
        "patch_embed.proj.": "embedding.conv.",
        "pos_embed": "position_encoding.encoding",
        ".norm1.": ".input_layer_norm.",
        ".norm2.": ".mlp_layer_norm.",
        ".attn.qkv.": ".qkv.",
        ".attn.proj.": ".projection.",
        ".attn.rel_pos_h": ".relative_position.y_embedding",
        ".attn.rel_pos_w": ".relative_position.x_embedding",
        ".mlp.fc1.": ".mlp_1.",
        ".mlp.fc2.": ".mlp_2.",
    }
    result = {}
    for name, x in state.items():
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        result[name] = x
    return result


def detectron2_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of its ViTDet: the norm of a convolution is inside it, and the encoding has a class token's row."""
    # by stage: level, then the name of each place
    stages = {
        "0": ("simfp_2", {"0": "0", "1": "1", "3": "3", "4": "4", "5": "4.norm", "6": "5", "7": "5.norm"}),
        "1": ("simfp_3", {"0": "0", "1": "1", "2": "1.norm", "3": "2", "4": "2.norm"}),
        "2": ("simfp_4", {"0": "0", "1": "0.norm", "2": "1", "3": "1.norm"}),
        "3": ("simfp_5", {"1": "1", "2": "1.norm", "3": "2", "4": "2.norm"}),
    }
    result = {}
    for name, x in state.items():
        if name.startswith("pyramid"):
            _, _, stage, place, part = name.split(".")
            level, places = stages[stage]
            result[f"backbone.{level}.{places[place]}.{part}"] = x
        elif name == "backbone.pos_embed":
            result["backbone.net.pos_embed"] = torch.cat([torch.full_like(x[:, :1], 7.0), x], 1)
        else:
            result[f"backbone.net.{name.removeprefix('backbone.')}"] = x
    return {**result, "proposal_generator.rpn_head.conv.weight": torch.zeros(3), "roi_heads.box_head.fc1.bias": torch.zeros(2)}


@torch.no_grad()
@pytest.mark.parametrize("released", [official_names, detectron2_names])
def test_released_names(released: Any) -> None:
    model = randomised(ViTDetBackbone(SMALL))
    again = ViTDetBackbone.from_official(released(model.state_dict()), SMALL, ("topk", {"k": 9}))
    for (name, x), y in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    weights = released(model.state_dict())
    lost = next(iter(weights))
    with pytest.raises(ValueError, match=r"missing .*\n  unexpected stray"):
        ViTDetBackbone.from_official({**{name: x for name, x in weights.items() if name != lost}, "stray": torch.zeros(1)}, SMALL)


def test_the_size_of_the_published_model() -> None:
    with torch.device("meta"):
        model = ViTDetBackbone(VITDET_B_1024)
    for part, tensors, parameters in ((model.backbone, 169, 85_297_664), (model.pyramid, 32, 5_560_000)):
        assert len(part.state_dict()) == tensors
        assert sum(x.numel() for x in part.parameters()) == parameters
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert shapes["backbone.blocks.0.attn.rel_pos_h"] == (27, 64)
    assert shapes["backbone.blocks.2.attn.rel_pos_w"] == (127, 64)
    assert shapes["backbone.pos_embed"] == (1, 196, 768)


# r, and the multiply-adds of a frame in 10 ** 9 as the paper's table has them: the mean over clips of about 276 frames, the first dense
PUBLISHED = {
    672: {None: 174.5, 1024: 115.1, 768: 87.9, 512: 60.7, 384: 47.1, 256: 33.5, 128: 19.9},
    1024: {None: 467.4, 2048: 294.9, 1536: 225.9, 1024: 156.8, 768: 122.3, 512: 87.8, 256: 53.3},
}


@pytest.mark.parametrize(("config", "size"), [(VITDET_B_672, 672), (VITDET_B_1024, 1024)], ids=["672", "1024"])
def test_published_multiply_adds(config: ViTDetConfig, size: int) -> None:
    with torch.device("meta"):
        model = ViTDetBackbone(config)
    dense = model.flops().published
    for r, published in PUBLISHED[size].items():
        mean = (dense + 275 * model.flops(r).published) / 276
        assert abs(mean / 1e9 - published) < 0.06, r
    # and in all: patches and pyramid too
    assert model.flops().total > model.backbone.flops().total + 10**9


@torch.no_grad()
def test_frames_to_maps() -> None:
    """Of two videos: sizes, filling up, the pyramid by its definition, and dense blocks where every token is computed."""
    model = randomised(ViTDetBackbone(SMALL, ("fraction", {"fraction": 1.0})))
    dense = ViTDetBackbone(SMALL._replace(backbone_config=SMALL.backbone_config._replace(block_class="Block", windowed_class="Block")))
    dense.load_state_dict(model.state_dict())
    frames = torch.randint(0, 256, (3, 2, 3, 50, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    state = None
    for frame in frames:
        maps, state = model(frame, state)
        want, _ = dense(frame)
        for name, side in (("p2", 24), ("p3", 12), ("p4", 6), ("p5", 3), ("p6", 2)):
            assert maps[name].shape == (2, 8, side, side)
            torch.testing.assert_close(maps[name], want[name], rtol=1e-3, atol=1e-4)

    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (SMALL.normalize_mean, SMALL.normalize_std))
    image = torch.zeros(2, 3, 96, 96)
    image[:, :, :50, :90] = (frame - mean) / std
    assert torch.allclose(model.preprocess(frame), image, atol=1e-5)
    assert torch.allclose(model.preprocess(frame / 255.0), image, atol=1e-5)
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    tokens, _ = model.backbone(F.conv2d(image, weight, bias, 16).flatten(2).mT)
    grid = tokens.mT.view(2, 16, 6, 6)

    def normalised(x: Tensor, place: str) -> Tensor:
        weight, bias = (weights[f"{place}.{part}"].view(-1, 1, 1) for part in ("weight", "bias"))
        centered = x - x.mean(1, keepdim=True)
        return centered / (centered.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight + bias

    def level(x: Tensor, stage: int, first: int) -> Tensor:
        x = normalised(F.conv2d(x, weights[f"{stage}.{first}.weight"]), f"{stage}.{first + 1}")
        return normalised(F.conv2d(x, weights[f"{stage}.{first + 2}.weight"], padding=1), f"{stage}.{first + 3}")

    weights = model.pyramid.stages.state_dict()
    x = F.conv_transpose2d(grid, weights["0.0.weight"], weights["0.0.bias"], 2)
    x = F.conv_transpose2d(F.gelu(normalised(x, "0.1")), weights["0.3.weight"], weights["0.3.bias"], 2)
    p5 = level(F.max_pool2d(grid, 2), 3, 1)
    want = [level(x, 0, 4), level(F.conv_transpose2d(grid, weights["1.0.weight"], weights["1.0.bias"], 2), 1, 1), level(grid, 2, 0)]
    for got, expect in zip(maps.values(), [*want, p5, p5[:, :, ::2, ::2]], strict=True):
        torch.testing.assert_close(got, expect, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_what_stands_still_stays() -> None:
    """The same frame again: nothing passes a threshold, and the maps are the same bits."""
    model = randomised(ViTDetBackbone(SMALL, ("threshold", {"threshold": 1e-3}), "exact"))
    frame = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    maps, state = model(frame)
    again, state = model(frame, state)
    assert all((index == -1).all() for index in state.indices().values())
    assert all(torch.equal(maps[name], again[name]) for name in maps)
    assert model.flops(state).total < 0.7 * model.flops().total


def test_refusals() -> None:
    model = ViTDetBackbone(SMALL)
    with pytest.raises(ValueError, match=r"frame must be \[B, 3, H, W\] with H <= 96 and W <= 96, got \[1, 3, 97, 20\]"):
        model(torch.zeros(1, 3, 97, 20))
    with pytest.raises(ValueError, match=r"scale_factors must be of 4.0, 2.0, 1.0, 0.5, got 3.0"):
        ViTDetBackbone(SMALL._replace(scale_factors=(3.0,)))
