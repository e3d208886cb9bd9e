"""attach_tome: vision transformers that merge tokens, beside the definition written out and beside themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close
from test_models_conversion import BLOCKS, Classifier, TimmAttention, TimmBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokenops
from tokenops.models import attach, attach_tome
from tokenops.models.attach import OpenBlock
from tokenops.models.blocks import Block, fused_mlp
from tokenops.models.tome import flops, match_keys, token_counts

GOLDEN: dict[str, Any] = torch.load(Path(__file__).parent / "data" / "tome.pt")


class ViT(nn.Module):
    """Blocks of ours over tokens that come from outside."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(32, 4) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def merged_by_hand(x: Tensor, size: Tensor, metric: Tensor, r: int, class_token: bool, distill_token: bool) -> tuple[Tensor, Tensor]:
    """One sample, [N, C], [N], [N, D]: row by row as the paper says, in the published order."""
    r = max(min(r, (len(x) - class_token - distill_token) // 2), 0)
    if r == 0:
        return x, size
    metric = (metric / metric.norm(dim=-1, keepdim=True)).detach()
    sources, destinations = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    candidates = [j for j in destinations if not (distill_token and j == 1)]
    best = {i: max((float(metric[i] @ metric[j]), -j) for j in candidates) for i in sources if candidates and not (class_token and i == 0)}
    ranked = sorted(best, key=lambda i: -best[i][0])
    staying = [*ranked[r:], *(i for i in sources if i not in best)]
    if class_token:
        staying.sort()
    order = [*staying, *destinations]
    if distill_token:
        order = [staying[0], destinations[0], *staying[1:], *destinations[1:]]
    members = {i: [i] for i in order}
    for i in ranked[:r]:
        members[-best[i][1]].append(i)
    sizes = torch.stack([size[members[i]].sum() for i in order])
    return torch.stack([(x[members[i]] * size[members[i], None]).sum(0) for i in order]) / sizes[:, None], sizes


def vit_by_hand(model: ViT, x: Tensor, numbers: list[int], class_token: bool, distill_token: bool, prop_attn: bool = True) -> Tensor:
    size = x.new_ones(x.shape[:2])
    for block, r in zip(model.blocks, numbers, strict=True):
        query, key, value = block.attn.heads(block.attn.qkv(block.norm1(x)))
        logits = query @ key.mT / key.shape[-1] ** 0.5
        if prop_attn:
            logits = logits + size.log()[:, None, None]
        x = x + block.attn.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
        rows = [merged_by_hand(*sample, r, class_token, distill_token) for sample in zip(x, size, key.mean(1), strict=True)]
        x, size = (torch.stack(part) for part in zip(*rows, strict=True))
        x = x + block.mlp(block.norm2(x))
    return x


@torch.no_grad()
@pytest.mark.parametrize("golden", GOLDEN["attention"], ids=lambda golden: f"{golden['heads']} heads")
def test_the_published_attention(golden: dict[str, Any]) -> None:
    block = TimmBlock(golden["x"].shape[-1], golden["heads"])
    block.norm1 = nn.Identity()  # type: ignore[assignment]
    block.attn.load_state_dict(golden["state"])
    out, key = OpenBlock(block).attention(golden["x"])
    assert_close("out", out - golden["x"], golden["out"], torch.float32)
    assert_close("metric", key.mean(1), golden["metric"], torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("protected", [(False, False), (True, False), (True, True)], ids=["no class", "class", "class, distillation"])
@pytest.mark.parametrize("r", [3, [0, 6, 0, 2], (4, -1.0), 50], ids=str)
@pytest.mark.parametrize("tokens", [23, 24])
def test_the_definition(tokens: int, r: Any, protected: tuple[bool, bool], prop_attn: bool) -> None:
    """Rows in the published order too: it decides who is a source in the next block."""
    model, x = ViT(), torch.randn(2, tokens, 32)
    want = vit_by_hand(copy.deepcopy(model).double(), x.double(), tokenops.merge_schedule(r, 4), *protected, prop_attn)
    with attach_tome(model, r, class_token=protected[0], distill_token=protected[1], prop_attn=prop_attn) as tome:
        got = model(x)
    assert_close("out", got, want, torch.float32)
    assert tome.last is not None
    assert torch.equal(tome.last.size.sum(1), torch.tensor([tokens, tokens], dtype=torch.float32))
    assert token_counts(r, depth=4, tokens=tokens, protected=sum(protected))[-1] == got.shape[1]


def test_gradients_are_the_definition_s() -> None:
    model, x = ViT().double(), torch.randn(2, 17, 32, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]
    grad_out = torch.randn(2, 17 - 9, 32, dtype=torch.float64)
    want = torch.autograd.grad(vit_by_hand(model, x, [3, 3, 3, 0], True, False), leaves, grad_out)
    with attach_tome(model, [3, 3, 3], class_token=True):
        got = torch.autograd.grad(model(x), leaves, grad_out)
    for one, other in zip(got, want, strict=True):
        assert_close("gradient", one, other, torch.float64)


@pytest.mark.parametrize("protected", [{}, {"class_token": True}, {"class_token": True, "distill_token": True}], ids=len)
def test_the_pairs_are_match_tokens_s(protected: dict[str, bool]) -> None:
    key = torch.randn(3, 2, 30, 16)
    own, plan = match_keys(key, 7, **protected), tokenops.match_tokens(key.mean(1), r=7, **protected)
    for a, b in zip(own.slot, plan.slot, strict=True):
        assert torch.equal(a[:, None] == a, b[:, None] == b)
    if protected.get("class_token"):
        assert (own.slot[:, 0] == 0).all()
    if protected.get("distill_token"):
        assert (own.slot[:, 1] == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("blocks", BLOCKS)
def test_merging_twins_changes_nothing(blocks: str) -> None:
    """Two equal tokens that became one, counted twice by attention: the class token cannot tell. In blocks of other libraries."""
    model = Classifier(*(BLOCKS[blocks]() for _ in range(3))).eval()
    x = torch.randn(2, 6, 16).repeat_interleave(2, 1)
    want, names = model(x), list(model.state_dict())
    tome = attach_tome(model, [6])
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert tome.last is not None
    assert torch.equal(tome.last.size, torch.tensor([[1.0, *[2.0] * 6]] * 2))
    # without the sizes it could
    tome.prop_attn = False
    assert not torch.allclose(model(x), want, rtol=1e-3, atol=1e-3)
    assert list(model.state_dict()) == names
    tome.detach()
    assert torch.equal(model(x), want)


@torch.no_grad()
def test_a_sample_alone_and_r_set_later() -> None:
    model, x = ViT(), torch.randn(3, 20, 32)
    with attach_tome(model, 2) as tome:
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-5, atol=1e-5)
        tome.r = (3, 0.0)
        assert tome.r == [3, 3, 3, 3]
        assert model(x).shape[1] == 8


@torch.no_grad()
def test_every_token_gets_its_row_back() -> None:
    model, x = ViT(), torch.randn(2, 20, 32)
    with attach_tome(model, 3) as tome:
        merged = model(x)
        assert tome.last is not None
        plans = [plan for plan in tome.last.plans if plan is not None]
        tome.unmerge = True
        whole = model(x)
    assert torch.equal(whole, tokenops.unmerge_tokens(merged, plans))
    # so that their mean is the mean weighted by size
    sizes = tome.last.size[..., None]
    torch.testing.assert_close(whole.mean(1), (merged * sizes).sum(1) / sizes.sum(1))


def test_a_copy_is_a_model_of_its_own() -> None:
    model, x = ViT(), torch.randn(1, 12, 32)
    tome = attach_tome(model, 2)
    model(x)
    other = copy.deepcopy(model)
    tome.detach()
    assert other(x).shape[1] == 4
    assert model(x).shape[1] == 12
    nn.init.zeros_(other.blocks[0].attn.proj.weight)
    assert model.blocks[0].attn.proj.weight.abs().sum() > 0


@torch.no_grad()
def test_compiled() -> None:
    torch.compiler.reset()
    model, x = ViT(2), torch.randn(2, 16, 32)
    with attach_tome(model, 3):
        want = model(x)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)


def test_published_costs() -> None:
    sizes = {
        "ViT-L, 16 frames": {"depth": 24, "dim": 1024, "num_heads": 16, "tokens": 1568, "patch": 1536},
        "ViT-B, 16 frames": {"depth": 12, "dim": 768, "num_heads": 12, "tokens": 1568, "patch": 1536},
        "ViT-L": {"depth": 24, "dim": 1024, "num_heads": 16, "tokens": 197, "patch": 768, "protected": 1},
        "ViT-B": {"depth": 12, "dim": 768, "num_heads": 12, "tokens": 197, "patch": 768, "protected": 1},
    }
    published = {
        "ViT-L, 16 frames": (65, 596.8, 280.4),
        "ViT-B, 16 frames": (65, 180.3, 128.9),
        "ViT-L": (8, 61.6, 31.0),
        "ViT-B": (16, 17.6, 8.8),
    }
    for name, (r, dense, merged) in published.items():
        assert [round(flops(n, **sizes[name]).published / 1e9, 1) for n in (0, r)] == [dense, merged]
    cost = flops(65, **sizes["ViT-L, 16 frames"])
    assert round((cost.total - cost.published) / 1e9, 2) == 0.34
    assert token_counts(65, depth=24, tokens=1568)[-1] == 37


def test_refusals() -> None:
    model, x = ViT(), torch.randn(1, 12, 32)
    with pytest.raises(ValueError, match="at most 4 numbers"):
        attach_tome(model, [1, 1, 1, 1, 1])
    tome = attach_tome(model, 2)
    with pytest.raises(ValueError, match="must not have anything attached yet"):
        attach_tome(model, 2)
    with pytest.raises(NotImplementedError, match="takes no mask"):
        model.blocks[0](x, torch.zeros(12, 12))
    with pytest.raises(RuntimeError, match="block 2 must run after block 1"):
        model.blocks[2](x)
    tome.detach()
    model.num_prefix_tokens = 5
    with pytest.raises(ValueError, match="no tokens before its patches but class and distillation tokens, got 5"):
        attach_tome(model)
    with pytest.raises(ValueError, match="distill_token must come with class_token"):
        attach_tome(model, distill_token=True)
    with pytest.raises(ValueError, match="must have blocks as of timm or transformers, got Linear with none"):
        attach_tome(nn.Linear(2, 2))

    class Parallel(TimmBlock):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))

    class OnAGrid(TimmBlock):
        def forward(self, x: Tensor, rows: int) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    with pytest.raises(ValueError, match="with its own weights it computes something else"):
        attach_tome(Classifier(Parallel()))
    with pytest.raises(ValueError, match="OnAGrid must be called with its tokens alone"):
        attach_tome(Classifier(OnAGrid()))


def test_a_block_is_not_computed_again() -> None:
    """Its state is gone by then: an error, and no wrong gradient."""
    model, x = ViT(2), torch.randn(1, 12, 32, requires_grad=True)
    with attach_tome(model, 2):
        out = x
        for block in model.blocks:
            out = checkpoint(block, out, use_reentrant=False)
        with pytest.raises(RuntimeError, match="once in a forward"):
            out.sum().backward()


class NormalisedAttention(TimmBlock):
    """Of queries, as TimmBlock's may be, and of keys."""

    def __init__(self) -> None:
        super().__init__(qk_norm=True)
        self.attn.k_norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        own = self.attn
        query, key, value = own.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(own.q_norm(query), own.k_norm(key), value)
        x = x + own.proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def test_queries_and_keys_may_be_normalised() -> None:
    model, x = Classifier(NormalisedAttention()), torch.randn(2, 12, 16)
    want = model(x)
    with attach_tome(model, 0):
        torch.testing.assert_close(model(x), want)


@torch.no_grad()
@pytest.mark.parametrize("blocks", ["timm", "transformers 5"])
def test_layers_run_as_one_unless_somebody_listens(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on a layer is called with what the layer gets, and may change what it gives."""
    calls = []
    monkeypatch.setattr(attach, "fused_mlp", lambda *a: calls.append(a) or fused_mlp(*a))
    model, x = Classifier(BLOCKS[blocks](), BLOCKS[blocks]()).eval(), torch.randn(2, 12, 16)
    with attach_tome(model, 2):
        calls.clear()
        want = model(x)
        assert len(calls) == 2
        heard = []
        hook = model.blocks[0].mlp.fc1.register_forward_hook(lambda layer, given, out: heard.append(given[0].shape))
        torch.testing.assert_close(model(x), want)
        assert heard == [(2, 11, 16)]
        assert len(calls) == 3
        hook.remove()
        with model.blocks[0].mlp.fc2.register_forward_hook(lambda layer, given, out: out + 1.0):
            assert not torch.allclose(model(x), want)
        attention = model.blocks[0].attn if blocks == "timm" else model.blocks[0].attention
        with (attention.qkv if blocks == "timm" else attention.k_proj).register_forward_hook(lambda layer, given, out: out * 2.0):
            assert not torch.allclose(model(x), want)
        with torch.enable_grad():
            torch.testing.assert_close(model(x), want)
        assert len(calls) == 5


def test_dropout_at_work_drops() -> None:
    block = TimmBlock()
    block.mlp.drop1 = nn.Dropout(0.5)
    model, x = Classifier(block), torch.randn(2, 12, 16)
    with torch.no_grad(), attach_tome(model, 2):
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


class BiasedAttention(TimmAttention):
    """BEiT's: a bias for each pair of tokens, of which there must be as many as it was made for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(13, 1)


def test_a_block_for_one_number_of_tokens_is_refused() -> None:
    block = TimmBlock()
    block.attn = BiasedAttention(16, 2)
    with pytest.raises(ValueError, match="TimmBlock must be a block of norm, attention, norm and MLP, for any number of tokens: The size"):
        attach_tome(Classifier(block), 2)


def test_timm() -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval()
    check_library(model, torch.randn(2, 3, 64, 64), model.forward_features)


@pytest.mark.parametrize("name", ["ViT", "VideoMAE"])
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    sizes = {"ViT": {"patch_size": 8}, "VideoMAE": {"patch_size": 8, "num_frames": 4}}
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**small, **sizes[name])).eval()
    x = torch.randn(2, 3, 32, 32) if name == "ViT" else torch.randn(2, 4, 3, 32, 32)
    check_library(model, x, lambda x: model(x).last_hidden_state)


@torch.no_grad()
def check_library(model: nn.Module, x: Tensor, run: Any) -> None:
    want = run(x)
    with attach_tome(model, 0) as tome:
        torch.testing.assert_close(run(x), want, rtol=1e-4, atol=1e-5)
        tome.r = [2, 3]
        assert run(x).shape[1] == want.shape[1] - 5
