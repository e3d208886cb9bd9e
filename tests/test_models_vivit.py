"""ViViT: views, names of released weights, the golden sub-model, published costs, and the whole against its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eventful_golden import GOLDEN, TOLERANCE, chosen, drawn
from test_models_eventful import golden_config, golden_indices
from test_models_vitdet import official_names, randomised
from torch import Tensor

from tokenops.models import VIVIT_B_EPIC100, VIVIT_B_K400, BackboneConfig, ViViT, ViViTConfig
from tokenops.models.vivit import SubModel

# views of 8 frames of 32 x 48: 4 steps of 2 x 3 tokens and a class token
SMALL = ViViTConfig(
    5,
    (8, 3, 32, 48),
    BackboneConfig({"dim": 16, "heads": 2, "mlp_ratio": 2}, 2, (2, 3), block_class="EventfulBlock"),
    BackboneConfig({"dim": 16, "heads": 2, "mlp_ratio": 2}, 2, (4,)),
    spatial_views=3,
    temporal_views=2,
    temporal_stride=2,
)


def clip_of(frames: int, height: int, width: int, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, frames, 3, height, width), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_golden_sub_model() -> None:
    """Class token, encoding, blocks and norm: the released spatial model over six steps."""
    case = GOLDEN["vivit_submodel"]
    weights = {(f"backbone.{name}" if name.startswith(("pos", "blocks")) else name): x for name, x in drawn(case).items()}
    model = SubModel.from_official(weights, golden_config(case), case["grid"], ("topk", case["choice"]))
    state = None
    for frame, tokens in enumerate(case["inputs"]):
        out, state = model(tokens[None], state)
        assert (out[0] - case["outputs"][frame]).abs().max() <= TOLERANCE
        for gate, ids in golden_indices(case, frame).items() if frame else ():
            assert chosen(state.indices()[gate]) == chosen(ids)


def vivit_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Eventful Transformers released them."""
    words = {"_model.cls_token": "_model.class_token", "_model.norm.": "_model.layer_norm.", "head.": "classifier."}
    result = {}
    for name, x in official_names(state).items():
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        result[name] = x
    return result


def tadaconv_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = {
        "spatial_model.cls_token": "backbone.cls_token",
        "spatial_model.backbone.pos_embed": "backbone.pos_embd",
        "temporal_model.cls_token": "backbone.cls_token_out",
        "temporal_model.backbone.pos_embed": "backbone.temp_embd",
    }
    words = {
        "patch_embed.proj.": "backbone.stem.conv1.",
        "spatial_model.norm.": "backbone.norm.",
        "temporal_model.norm.": "backbone.norm_out.",
        "spatial_model.backbone.blocks.": "backbone.layers.",
        "temporal_model.backbone.blocks.": "backbone.layers_temporal.",
        ".norm1.": ".norm.",
        ".norm2.": ".norm_ffn.",
        ".attn.qkv.": ".attn.to_qkv.",
        ".mlp.fc1.": ".ffn.net.0.",
        ".mlp.fc2.": ".ffn.net.3.",
        "head.": "head.linear1.",
    }
    result = {"head.linear2.weight": torch.zeros(3, 16), "head.linear2.bias": torch.zeros(3)}
    for name, x in state.items():
        own = whole.get(name)
        if own is None:
            own = name
            for ours, theirs in words.items():
                own = own.replace(ours, theirs)
        result[own] = x
    return result


@pytest.mark.parametrize("released", [vivit_names, tadaconv_names])
def test_released_names(released: Any) -> None:
    model = randomised(ViViT(SMALL))
    again = ViViT.from_official(released(model.state_dict()), SMALL, ("topk", {"k": 3}))
    for (name, x), y in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_views_are_where_they_should_be() -> None:
    """Every pixel says where and when it was: resized by a whole number, so that this survives."""
    model = ViViT(SMALL._replace(normalize_mean=0.0, normalize_std=1.0))
    # 20 frames; 64 x 144 becomes 32 x 72: slack 4 in time, 24 across
    height, width = 64, 144
    frames = torch.arange(20.0).view(20, 1, 1).expand(20, height, width)
    across = (torch.arange(width) // 2).float().expand(20, height, width)
    down = (torch.arange(height) // 2).float().view(-1, 1).expand(20, height, width)
    clip = torch.stack([frames, across, down], 1)[None]
    views = model.views(clip)
    assert len(views) == 6
    for view, (x, start) in zip(views, [(x, start) for x in (0, 12, 24) for start in (0, 4)], strict=True):
        assert view.shape == (1, 8, 3, 32, 48)
        assert torch.allclose(view[0, :, 0], torch.arange(start, start + 16.0, 2.0).view(8, 1, 1).expand(8, 32, 48), atol=1e-4)
        # antialiasing mixes neighbours at the borders of the frame
        assert torch.allclose(view[0, 0, 1, 0, 2:-2], torch.arange(x + 2.0, x + 46.0), atol=0.3)
        assert torch.allclose(view[0, 0, 2, 2:-2, 0], torch.arange(2.0, 30.0), atol=0.3)


def test_short_clips_and_single_views() -> None:
    model = ViViT(SMALL._replace(spatial_views=1, temporal_views=1, normalize_mean=0.5, normalize_std=0.25))
    clip = clip_of(11, 32, 60)
    [view] = model.views(clip)
    want = torch.cat([clip[:, ::2], clip[:, -1:], clip[:, -1:]], 1)[..., 6:54]
    assert torch.allclose(view, (want / 255.0 - 0.5) / 0.25, atol=1e-5)
    # the middle of a long one
    [view] = model.views(clip_of(21, 32, 48))
    assert torch.allclose(view, (clip_of(21, 32, 48)[:, 2:18:2] / 255.0 - 0.5) / 0.25, atol=1e-5)


@torch.no_grad()
def test_the_whole_is_its_parts() -> None:
    """From uint8 to probabilities, with every token computed: dense blocks written out, views one after the other."""
    model = randomised(ViViT(SMALL, ("fraction", {"fraction": 1.0})))
    clip = clip_of(19, 40, 56)
    scale = max(32 / 40, 48 / 56)
    size = (round(40 * scale), round(56 * scale))

    def encoded(part: SubModel, x: Tensor) -> Tensor:
        x = torch.cat([part.cls_token.expand(len(x), -1, -1), x], 1) + part.backbone.pos_embed
        for block in part.backbone.blocks:
            qkv = F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias, 1e-6)
            qkv = F.linear(qkv, block.attn.qkv.weight, block.attn.qkv.bias)
            attended = F.scaled_dot_product_attention(*qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
            x = x + F.linear(attended, block.attn.proj.weight, block.attn.proj.bias)
            hidden = F.layer_norm(x, (16,), block.norm2.weight, block.norm2.bias, 1e-6)
            hidden = F.gelu(F.linear(hidden, block.mlp.fc1.weight, block.mlp.fc1.bias))
            x = x + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
        return F.layer_norm(x[:, 0], (16,), part.norm.weight, part.norm.bias, 1e-6)

    total = torch.zeros(2, 5)
    for at in range(3):
        for start in (0, 3):
            view = (clip[:, start : start + 16 : 2] / 255.0 - 0.45) / 0.225
            view = torch.stack([F.interpolate(frame, size, mode="bilinear", antialias=True) for frame in view.unbind(1)], 1)
            y, x = (int(at * slack / 2) for slack in (size[0] - 32, size[1] - 48))
            view = view[..., y : y + 32, x : x + 48].transpose(1, 2)
            tubelets = F.conv3d(view, model.patch_embed.proj.weight, model.patch_embed.proj.bias, (2, 16, 16))
            features = torch.stack([encoded(model.spatial_model, step.flatten(2).mT) for step in tubelets.unbind(2)], 1)
            total += F.linear(encoded(model.temporal_model, features), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(clip), (total / 6).softmax(-1), rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["paper", "exact"])
def test_views_in_a_batch_or_one_by_one(mode: str) -> None:
    together = randomised(ViViT(SMALL, ("topk", {"k": 3}), mode))
    apart = ViViT(SMALL._replace(batch_views=False), ("topk", {"k": 3}), mode).eval()
    apart.load_state_dict(together.state_dict())
    clip = clip_of(17, 32, 52)
    torch.testing.assert_close(together(clip), apart(clip), rtol=1e-4, atol=1e-6)


def test_what_the_paper_trains() -> None:
    """The temporal model, on features that are kept."""
    model = randomised(ViViT(SMALL, ("topk", {"k": 3}))).train()
    with torch.no_grad():
        features = model.features(model.views(clip_of(16, 32, 48))[0])
    F.cross_entropy(model.classify(features), torch.tensor([1, 4])).backward()
    assert all(x.grad is None for x in model.spatial_model.parameters())
    for name, x in [*model.temporal_model.named_parameters(), *model.head.named_parameters()]:
        assert x.grad is not None, name
        assert x.grad.isfinite().all(), name


# multiply-adds of a clip in 10 ** 12, dense and by r
PUBLISHED = {
    "K400": (VIVIT_B_K400, {None: "3.36", 24: "0.618", 48: "1.016", 96: "1.814"}),
    "EPIC": (VIVIT_B_EPIC100, {None: "7.12", 50: "1.36", 100: "2.26", 200: "4.05"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_multiply_adds(name: str) -> None:
    config, costs = PUBLISHED[name]
    with torch.device("meta"):
        model = ViViT(config)
    for k, published in costs.items():
        assert f"{model.flops(k).published / 1e12:.{len(published) - 2}f}" == published, k
    assert len(model.state_dict()) == 204
    if name == "K400":
        assert round(sum(x.numel() for x in model.parameters()) / 1e6, 1) == 115.1


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"input_shape must be \(T, 3, H, W\) in tubelets of \(2, 16, 16\), got \(7, 3, 32, 48\)"):
        ViViT(SMALL._replace(input_shape=(7, 3, 32, 48)))
    with pytest.raises(ValueError, match="temporal_config must have block_class Block"):
        ViViT(SMALL._replace(temporal_config=SMALL.temporal_config._replace(block_class="EventfulBlock")))
    with pytest.raises(ValueError, match=r"clip must be \[B, T, 3, H, W\] with T > 0, got \[1, 0, 3, 32, 48\]"):
        ViViT(SMALL)(torch.zeros(1, 0, 3, 32, 48))
