"""eventful(): trained vision transformers of other libraries on video, beside themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.models import EventfulState, eventful

EVERYTHING = ("fraction", {"fraction": 1.0})


# stand-ins with the parts of timm's and transformers' blocks, under their names


class TimmAttention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool = True, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(self.q_norm(query), key, value).transpose(1, 2).flatten(2))


class TimmMlp(nn.Module):
    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 3 * width), act, nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmBlock(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2, act: nn.Module | None = None, scale: bool = False, **options: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-5)
        self.attn, self.mlp = TimmAttention(width, heads, **options), TimmMlp(width, act or nn.GELU())
        self.ls1, self.ls2 = (Scale(width) if scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class SelfAttention(nn.Module):
    """VideoMAE's: queries and values have biases, beside their layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_attention_heads = 2
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        parts = (F.linear(x, self.query.weight, self.q_bias), self.key(x), F.linear(x, self.value.weight, self.v_bias))
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class VideoMAELayer(nn.Module):
    """Of transformers 4: its result is in a tuple."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = nn.Module(), nn.Module(), nn.Module()
        self.attention.attention, self.attention.output = SelfAttention(width), nn.Module()
        self.attention.output.dense = nn.Linear(width, width)
        self.intermediate.dense, self.output.dense = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.intermediate.intermediate_act_fn = nn.GELU("tanh")
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)

    def forward(self, x: Tensor, head_mask: Tensor | None = None, output_attentions: bool = False) -> tuple[Tensor]:
        x = x + self.attention.output.dense(self.attention.attention(self.layernorm_before(x)))
        hidden = self.intermediate.intermediate_act_fn(self.intermediate.dense(self.layernorm_after(x)))
        return (x + self.output.dense(hidden),)


class ViTLayer(nn.Module):
    """Of transformers 5."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)
        self.attention, self.mlp = nn.Module(), nn.Module()
        self.attention.num_attention_heads = 2
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self.attention, name, nn.Linear(width, width))
        self.mlp.fc1, self.mlp.activation_fn, self.mlp.fc2 = nn.Linear(width, 2 * width), F.gelu, nn.Linear(2 * width, width)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        normalized, own = self.layernorm_before(x), self.attention
        parts = (layer(normalized).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (own.q_proj, own.k_proj, own.v_proj))
        x = x + own.o_proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(self.mlp.activation_fn(self.mlp.fc1(self.layernorm_after(x))))


class Classifier(nn.Module):
    """A class token before 12 tokens, blocks, and a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.cls_token, self.blocks, self.head = nn.Parameter(torch.randn(1, 1, 16)), nn.ModuleList(blocks), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, 12, 16]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x[:, 0])


BLOCKS = {
    "timm": TimmBlock,
    "timm with layer scale, without biases of qkv": lambda: TimmBlock(scale=True, qkv_bias=False),
    "timm, another activation": lambda: TimmBlock(act=nn.SiLU()),
    "transformers 4": VideoMAELayer,
    "transformers 5": ViTLayer,
}


def film(frames: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 12, 16, generator=generator)
    moves = torch.rand(frames, batch, 12, 1, generator=generator) < 0.3
    return [x + move * 2.0 * torch.randn(x.shape, generator=generator) for move in moves]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["paper", "exact"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_with_every_token_it_is_the_model_itself(blocks: str, mode: str) -> None:
    model = Classifier(*(BLOCKS[blocks]() for _ in range(3))).eval()
    video, state = eventful(model, EVERYTHING, mode), None
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for x in film(3):
        out, state = video(x, state=state)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
    # the model is as it was
    assert isinstance(model.blocks[0], (TimmBlock, VideoMAELayer, ViTLayer))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@torch.no_grad()
def test_of_tokens_that_stay_nothing_is_computed() -> None:
    """A film in which a few tokens jump and the others stand still: the gates of the first block choose just those."""
    model = Classifier(*(TimmBlock() for _ in range(3))).eval()
    video = eventful(model, ("threshold", {"threshold": 1e-3}), "exact")
    first, *_ = film(1)
    _, state = video(first, state=None)
    dense = video.flops(state)
    second = first.clone()
    second[0, [3, 7]] *= -1.0
    out, state = video(second, state=state)
    assert state.indices()["blocks.0.qkv_gate"][0].unique().tolist() == [-1, 4, 8]
    assert (state.indices()["blocks.0.qkv_gate"][1] == -1).all()
    torch.testing.assert_close(out, model(second), rtol=1e-2, atol=1e-2)
    assert video.flops(state).total < dense.total


@torch.no_grad()
def test_forced_choices_and_another_policy() -> None:
    model = Classifier(*(TimmBlock() for _ in range(2))).eval()
    video = eventful(model, ("topk", {"k": 4}))
    first, second, *_ = film(2)
    _, state = video(first, state=None)
    spare = EventfulState(None, tuple(block._replace() for block in video(first, state=None)[1].blocks))
    out, state = video(second, state=state)
    chosen = state.indices()
    assert {tuple(index.shape) for index in chosen.values()} == {(2, 4)}
    video.set_policy(("topk", {"k": 9}))
    again, state = video(second, state=spare, indices=chosen)
    assert torch.equal(again, out)
    assert {tuple(index.shape) for index in video(first, state=state)[1].indices().values()} == {(2, 9)}


def test_gradients() -> None:
    """Through frames, to the frames and the head."""
    model = Classifier(*(TimmBlock() for _ in range(2)))
    video = eventful(model, ("topk", {"k": 12}), "exact")
    first, second = (x.requires_grad_() for x in film(2))
    _, state = video(first, state=None)
    video(second, state=state)[0].square().sum().backward()
    for x in (first, second, video.model.head.weight):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad != 0).any()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must have blocks as of timm or transformers, got Linear with none"):
        eventful(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="with its own weights it computes something else"):
        eventful(Classifier(TimmBlock(qk_norm=True)))
    with pytest.raises(ValueError, match="the activation of TimmBlock must be one of gelu, gelu_tanh, relu, silu, got Sigmoid"):
        eventful(Classifier(TimmBlock(act=nn.Sigmoid())))
    with pytest.raises(ValueError, match="block_class must be one of EventfulTokenwiseBlock"):
        eventful(Classifier(TimmBlock()), block_class="Block")
    video, (x, *_) = eventful(Classifier(TimmBlock()), ("topk", {"k": 4})), film(1)
    with pytest.raises(ValueError, match="state must be of 1 blocks, got 0"):
        video(x, state=EventfulState(None, ()))
    with pytest.raises(ValueError, match="indices must not be given without a state"):
        video(x, indices={})
    with pytest.raises(NotImplementedError, match="takes no mask"):
        video.model.blocks[0](x, torch.zeros(13, 13))


# the libraries themselves, where they are installed


def check_library(model: nn.Module, x: Tensor, result: Any) -> None:
    model.eval()
    with torch.no_grad():
        video, state = eventful(model, EVERYTHING), None
        for _ in range(2):
            x = x + 0.1 * torch.randn(x.shape)
            out, state = video(x, state=state)
            torch.testing.assert_close(result(out), result(model(x)), rtol=1e-4, atol=1e-5)


def test_timm() -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    for options in ({}, {"init_values": 0.3}):
        check_library(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, **options), torch.randn(2, 3, 64, 64), lambda y: y)


@pytest.mark.parametrize("name", ["ViT", "VideoMAE", "Vivit"])
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    sizes = {
        "ViT": {"patch_size": 8},
        "VideoMAE": {"patch_size": 8, "num_frames": 4},
        "Vivit": {"tubelet_size": [2, 8, 8], "num_frames": 4},
    }
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
    config = getattr(transformers, f"{name}Config")(**small, **sizes[name])
    x = torch.randn(2, 3, 32, 32) if name == "ViT" else torch.randn(2, 4, 3, 32, 32)
    check_library(getattr(transformers, f"{name}Model")(config), x, lambda y: y.last_hidden_state)
