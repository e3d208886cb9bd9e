"""STTM, our reconstruction: its formulas written out densely, its properties, and attached to vision transformers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close
from test_models_conversion import BLOCKS, Classifier
from torch import Tensor, nn

from tokenops.models import STTM, attach_sttm
from tokenops.models.blocks import Block
from tokenops.models.sttm import flops, token_places

GRID = (4, 2, 3)
PLACES = token_places(GRID)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def module(mode: str = "soft", windows: int = 2, meta_tokens: int = 5, frames: int = 4, **options: object) -> STTM:
    stage = STTM(16, frames, windows=windows, meta_tokens=meta_tokens, metric_dim=8, mode=mode, **options)  # type: ignore[arg-type]
    nn.init.normal_(stage.motion.weight)
    return stage


def by_hand(stage: STTM, x: Tensor, place: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 1 to 5 as they stand in the docstring, by sums over everything."""
    temperature = stage.log_temperature.exp()
    share = (stage.score(stage.norm(x)) + given.log()[..., None]).flatten(1, 2).softmax(1).unflatten(1, x.shape[1:3])
    z = torch.einsum("btnm,btnc->bmc", share, x)
    u, w = stage.metric(stage.norm(x)), stage.metric(stage.norm(z))
    cosine = torch.cosine_similarity(u[:, :, :, None], w[:, None, None], dim=-1)
    soft = (cosine / temperature).softmax(-1)
    assigned = soft
    if stage.mode == "hard":
        assigned = F.one_hot(cosine.argmax(-1), stage.meta_tokens).to(x) + soft - soft.detach()
    weight = assigned * given[..., None]
    mass = weight.sum(2)
    nobody = mass.detach() < 1e-9
    safe = torch.where(nobody, 1.0, mass)
    y = torch.einsum("btnm,btnc->btmc", weight, x) / safe[..., None]
    centre = torch.einsum("btnm,btnp->btmp", weight, place.to(x).expand(len(x), -1, -1, -1)) / safe[..., None]
    like = torch.cosine_similarity(stage.metric(y), w[:, None], dim=-1)
    v = mass * (like / temperature).exp()
    rows, centres, masses = [], [], []
    for frames in torch.arange(x.shape[1]).chunk(stage.windows):
        total, m = v[:, frames].sum(1), mass[:, frames].sum(1)
        fused = torch.einsum("btm,btmc->bmc", v[:, frames], y[:, frames]) / torch.where(total == 0.0, 1.0, total)[..., None]
        middle = torch.einsum("btm,btmp->bmp", mass[:, frames], centre[:, frames]) / torch.where(m == 0.0, 1.0, m)[..., None]
        path = [torch.where(nobody[:, t, :, None], middle, centre[:, t]) for t in frames]
        rows.append(fused + stage.motion(torch.cat([*path, path[-1] - path[0]], -1)))
        centres.append(middle)
        masses.append(m)
    return torch.stack(rows, 1), torch.stack(centres, 1), torch.stack(masses, 1)


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("windows", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_definition_and_its_gradients(dtype: torch.dtype, windows: int, mode: str) -> None:
    """Hard mode in training: forward with ones and zeros, backward straight through."""
    stage, x = module(mode, windows).to(dtype), torch.randn(2, 4, 6, 16, dtype=dtype, requires_grad=True)
    mass = (torch.rand(2, 4, 6, dtype=dtype) + 0.5).requires_grad_()
    got = stage(x, PLACES, mass)
    exact, leaves = copy.deepcopy(stage).double(), [x.detach().double().requires_grad_(), mass.detach().double().requires_grad_()]
    want = by_hand(exact, leaves[0], PLACES, leaves[1])
    grad_outs = [torch.randn(part.shape, dtype=torch.float64) for part in want]
    grads = torch.autograd.grad(
        got[:3], [x, mass, *stage.parameters()], [g.to(part.dtype) for g, part in zip(grad_outs, got, strict=False)]
    )
    for name, one, other in zip(("x", "place", "mass"), got, want, strict=False):
        assert_close(name, one, other, dtype)
    for one, other in zip(grads, torch.autograd.grad(want, [*leaves, *exact.parameters()], grad_outs), strict=True):
        assert_close("gradient", one, other, dtype)
    # in evaluation through the operators of hard merging
    for one, other in zip(stage.eval()(x, PLACES, mass)[:3], want, strict=True):
        assert_close("evaluated", one, other, dtype)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_mass_is_conserved_from_stage_to_stage(mode: str) -> None:
    first, second = module(mode), module(mode, windows=1, meta_tokens=3, frames=2)
    one = first(torch.randn(3, 4, 6, 16), PLACES)
    torch.testing.assert_close(one.mass.sum((1, 2)), torch.full((3,), 24.0))
    # every window has the mass of its frames
    torch.testing.assert_close(one.mass.sum(2), torch.full((3, 2), 12.0))
    two = second(one.x, one.place, one.mass)
    torch.testing.assert_close(two.mass.sum((1, 2)), torch.full((3,), 24.0))
    # and so the centre of mass of everything, the middle of the grid, stays where it was
    torch.testing.assert_close((two.place * two.mass[..., None]).sum((1, 2)) / 24.0, torch.zeros(3, 3), atol=1e-5, rtol=0.0)


def own_token_stage(mode: str, tokens: int) -> STTM:
    """A stage whose meta token m is a token of its own: those of ``permuted``, orthogonal ones."""
    stage = STTM(tokens, 1, windows=1, meta_tokens=tokens, metric_dim=tokens, mode=mode, temperature=1e-3).eval()
    stage.norm = nn.Identity()  # type: ignore[assignment]
    nn.init.eye_(stage.metric.weight)
    stage.score.weight.data = 1e4 * torch.eye(tokens)
    return stage


@torch.no_grad()
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_every_token_its_own_meta_token_is_a_permutation(mode: str) -> None:
    stage, order = own_token_stage(mode, 6), torch.tensor([3, 1, 5, 0, 2, 4])
    x = (torch.eye(6) * torch.arange(1.0, 7.0))[order].view(1, 1, 6, 6)
    merged = stage(x, token_places((1, 2, 3)))
    torch.testing.assert_close(merged.x[0, 0], x[0, 0, order.argsort()])
    torch.testing.assert_close(merged.mass, torch.ones(1, 1, 6))
    torch.testing.assert_close(merged.place[0, 0], token_places((1, 2, 3))[0, order.argsort()])
    torch.testing.assert_close(stage.unmerge(merged.x, merged), x)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_without_motion_it_only_merges(mode: str) -> None:
    """As it begins: means of tokens, so of equal tokens the token; and where tokens are does not matter."""
    stage, token = STTM(16, 4, windows=2, meta_tokens=5, mode=mode).eval(), torch.randn(16)
    merged = stage(token.expand(2, 4, 6, 16), PLACES)
    torch.testing.assert_close(merged.x[merged.mass > 0.0], token.expand(int((merged.mass > 0.0).sum()), 16))
    x = torch.randn(2, 4, 6, 16)
    torch.testing.assert_close(stage(x, PLACES).x, stage(x, PLACES.flip(1)).x)
    nn.init.normal_(stage.motion.weight)
    assert not torch.allclose(stage(x, PLACES).x, stage(x, PLACES.flip(1)).x)


@torch.no_grad()
def test_of_one_frame_it_merges_an_image() -> None:
    """One frame, one window: the fusion over time has nothing to do."""
    stage, x = STTM(16, 1, windows=1, meta_tokens=3), torch.randn(2, 1, 6, 16)
    merged = stage(x, token_places((1, 2, 3)))
    assigned = stage.assignment(merged.metric[:, 0], merged.meta)
    torch.testing.assert_close(merged.x[:, 0], assigned.mT @ x[:, 0] / assigned.sum(1)[..., None])
    assert (merged.place[..., 0] == 0.0).all()


@torch.no_grad()
def test_hard_is_soft_at_no_temperature() -> None:
    x = torch.randn(2, 4, 6, 16)
    stage = module(temperature=1e-5).eval()
    soft = stage(x, PLACES)
    stage.mode = "hard"
    hard = stage(x, PLACES)
    torch.testing.assert_close(soft.mass, hard.mass)
    there = hard.mass > 0.0
    torch.testing.assert_close(soft.x[there], hard.x[there], rtol=1e-4, atol=1e-4)


def test_what_is_compared_can_be_detached() -> None:
    """Then who gives what to whom does not depend on x, as far as gradients know."""
    for detached in (False, True):
        stage = STTM(16, 4, windows=4, meta_tokens=5, detach_metric=detached)
        x = torch.randn(2, 4, 6, 16, requires_grad=True)
        [grad] = torch.autograd.grad(stage(x, PLACES).mass.square().sum(), x)
        assert (grad == 0.0).all() == detached


class Video(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


def block_by_hand(block: Block, x: Tensor, mass: Tensor | None) -> Tensor:
    query, key, value = block.attn.heads(block.attn.qkv(block.norm1(x)))
    mask = None if mass is None else F.pad(mass.flatten(1).log(), (1, 0))[:, None, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    x = x + block.attn.proj(out.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("proportional", [True, False])
def test_attached(proportional: bool, mode: str) -> None:
    """Two stages in a model of four blocks, the class token set aside."""
    model, x = Video().eval(), torch.randn(2, 24, 16)
    dense, names = model(x), list(model.state_dict())
    handle = attach_sttm(model, (1, 3), grid=GRID, windows=(2, 1), meta_tokens=(5, 3), mode=mode, proportional=proportional)
    handle.stages.eval()
    got = model(x)
    first, second = handle.stages
    blocks, own = model.blocks, torch.cat([model.cls_token.expand(2, -1, -1), x], 1)
    own = block_by_hand(blocks[0], own, None)
    one = first(own[:, 1:].unflatten(1, (4, 6)), PLACES)
    weigh = (lambda mass: mass) if proportional else (lambda mass: (mass > 0.0).float())
    own = block_by_hand(blocks[1], torch.cat([own[:, :1], one.x.flatten(1, 2)], 1), weigh(one.mass))
    own = block_by_hand(blocks[2], own, weigh(one.mass))
    two = second(own[:, 1:].unflatten(1, (2, 5)), one.place, one.mass)
    own = block_by_hand(blocks[3], torch.cat([own[:, :1], two.x.flatten(1, 2)], 1), weigh(two.mass))
    assert_close("out", got, own, torch.float32)
    assert handle.last is not None
    assert_close("mass", handle.last.mass, two.mass, torch.float32)

    handle.unmerge = True
    rows = first.unmerge(second.unmerge(own[:, 1:].unflatten(1, (1, 3)), two), one).flatten(1, 2)
    assert_close("unmerged", model(x), torch.cat([own[:, :1], rows], 1), torch.float32)
    assert "blocks.1.sttm.score.weight" in model.state_dict()
    handle.detach()
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), dense)


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_it_learns_in_blocks_of_other_libraries(blocks: str, mode: str) -> None:
    model = Classifier(*(BLOCKS[blocks]() for _ in range(3)))
    with attach_sttm(model, (1,), grid=(2, 2, 3), windows=1, meta_tokens=4, mode=mode):
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(torch.randn(2, 12, 16)).square().sum().backward()
        optimizer.step()
        after = model.state_dict()
        assert all(x.isfinite().all() for x in after.values())
        learned = {name for name in after if not torch.equal(after[name], before[name])}
    parts = ("log_temperature", "norm.weight", "norm.bias", "score.weight", "metric.weight", "motion.weight")
    assert {f"blocks.1.sttm.{part}" for part in parts} <= learned
    assert any(name.startswith("blocks.0.") for name in learned)


@torch.no_grad()
def test_timm() -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    model, x = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval(), torch.randn(2, 3, 64, 64)
    with attach_sttm(model, (1,), grid=(1, 4, 4), windows=1, meta_tokens=5):
        assert model.forward_features(x).shape == (2, 1 + 5, 192)


@torch.no_grad()
def test_transformers() -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
    model = transformers.VideoMAEModel(transformers.VideoMAEConfig(**sizes, patch_size=8, num_frames=4)).eval()
    with attach_sttm(model, (1,), grid=(2, 4, 4), windows=2, meta_tokens=5):
        assert model(torch.randn(2, 4, 3, 32, 32)).last_hidden_state.shape == (2, 2 * 5, 32)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_a_sample_alone_and_compiled(mode: str) -> None:
    torch.compiler.reset()
    model, x = Video(2).eval(), torch.randn(2, 24, 16)
    with attach_sttm(model, (1,), grid=GRID, windows=2, meta_tokens=4, mode=mode) as handle:
        handle.stages.eval()
        want = model(x)
        torch.testing.assert_close(model(x[1:]), want[1:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_half_precision() -> None:
    stage, x = module().eval(), torch.randn(2, 4, 6, 16)
    want, half = stage(x, PLACES), copy.deepcopy(stage).bfloat16()(x.bfloat16(), PLACES)
    assert half.x.dtype == torch.bfloat16
    assert half.mass.dtype == half.place.dtype == torch.float32
    torch.testing.assert_close(half.mass.sum((1, 2)), torch.full((2,), 24.0))
    assert (half.x.float() - want.x).norm() < 0.1 * want.x.norm()


def test_costs() -> None:
    """The table that the preset was calibrated by: the dense model, then the saving in percent."""
    dense = flops(())
    assert round(dense.total / 1e9, 1) == 180.3
    assert dense.total == dense.published

    def saved(layers: tuple[int, ...], windows: tuple[int, ...], meta_tokens: tuple[int, ...]) -> float:
        return round(100.0 * (1.0 - flops(layers, windows=windows, meta_tokens=meta_tokens).published / dense.published), 1)

    assert saved((6,), (8,), (49,)) == 39.2
    assert saved((6,), (4,), (98,)) == 39.1
    assert saved((6,), (2,), (196,)) == 38.9
    assert saved((4,), (8,), (98,)) == 36.8
    assert saved((5,), (4,), (98,)) == 45.7
    assert saved((3, 6), (8, 4), (98, 98)) == 52.9
    assert flops().published < flops().total < 1.002 * flops().published


def test_refusals() -> None:
    model = Video()
    with pytest.raises(ValueError, match=r"layers must ascend and be of the model's 4 blocks, counted from 0, got \[4\]"):
        attach_sttm(model, (4,), grid=GRID)
    with pytest.raises(ValueError, match=r"layers must ascend .* got \[2, 1\]"):
        attach_sttm(model, (2, 1), grid=GRID)
    with pytest.raises(ValueError, match=r"windows must be a number or 2, one for each layer, got \[1\]"):
        attach_sttm(model, (1, 2), grid=GRID, windows=[1])
    with pytest.raises(ValueError, match="windows must divide the 2 frames, got 4"):
        attach_sttm(model, (1, 2), grid=GRID, windows=(2, 4))
    with pytest.raises(ValueError, match="mode must be one of 'soft', 'hard', got 'medium'"):
        attach_sttm(model, (1,), grid=GRID, mode="medium")
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        module(temperature=0.0)
    with pytest.raises(ValueError, match="meta_tokens must be at least 1, got 0"):
        module(meta_tokens=0)
    with pytest.raises(ValueError, match=r"x must be \[B, 4, N, C\], got \[1, 3, 6, 16\]"):
        module()(torch.zeros(1, 3, 6, 16), PLACES)
    with pytest.raises(ValueError, match=r"place must be \[4, 6, 3\] or \[1, 4, 6, 3\], got \[4, 5, 3\]"):
        module()(torch.zeros(1, 4, 6, 16), PLACES[:, :5])
    with pytest.raises(ValueError, match=r"mass must be \[1, 4, 6\], got \[4, 6\]"):
        module()(torch.zeros(1, 4, 6, 16), PLACES, torch.ones(4, 6))
    with (
        attach_sttm(model, (1,), grid=GRID),
        pytest.raises(ValueError, match=r"x must be \[B, 1 \+ 4 \* 6, C\] at a stage, got \[1, 21, 16\]"),
    ):
        model(torch.zeros(1, 20, 16))
