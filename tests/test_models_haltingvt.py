"""HaltingVT: the published numbers from the published weights' layout, though halted tokens are gone instead of multiplied by zero."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from haltingvt_oracle import Case, Published, noise, probed, published, shapes, weights
from oracle import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokenops.dispatch import choose
from tokenops.models import HaltingConfig, HaltingVT
from tokenops.models.blocks import DropPath
from tokenops.models.haltingvt import HaltingStats, frame_indices, halting_losses, preprocess, real_fake_pairs

GOLDEN: dict[str, Any] = torch.load(Path(__file__).parent / "data" / "haltingvt.pt")
SMALL = Case(5)

CASES = {
    "small": SMALL,
    "deeper": Case(5, depth=8, drift=0.2),
    "three clips": Case(5, depth=6, clip=(3, 3, 4, 64, 64)),
    "all clips finish": Case(6, depth=8, drift=0.2),
    "one clip goes to the end": Case(8, depth=6, clip=(3, 3, 4, 64, 64)),
    "finished after one layer": Case(6, depth=6, clip=(3, 3, 4, 64, 64)),
    "one joint layer": Case(5, depth=3),
    "no token halts": Case(5, depth=5, center=1e4),
    "no halting": Case(5, halting=False),
    "fused token": Case(5, fuse_token=True),
    "both blocks prune": Case(7, keep_rate=(0.7, 0.5)),
    "both blocks prune and fuse": Case(6, keep_rate=(0.7, 0.5), fuse_token=True),
    "no Glimpser prunes": Case(6, keep_rate=(1.0, 1.0), depth=5),
    "no Glimpser": Case(5, keep_rate=()),
    "6 frames into 4, 96 pixels into 64": Case(8, clip=(2, 3, 6, 96, 96)),
    "3 frames into 4, 48 x 32 pixels": Case(5, clip=(2, 3, 3, 48, 32)),
    "weights of 96 pixels": Case(6, side=6, clip=(2, 3, 4, 96, 96)),
    "DeiT-S": Case(7, heads=6, dim=384, depth=12, frames=2, clip=(2, 3, 2, 64, 64), drift=0.15),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def model_of(case: Case, state: Mapping[str, Tensor] | None = None) -> HaltingVT:
    return HaltingVT.from_official(
        weights(case) if state is None else state,
        num_heads=case.heads,
        keep_rate=case.keep_rate,
        halt_center=case.center,
        halting=case.halting,
        fuse_token=case.fuse_token,
    ).eval()


def clip_of(case: Case) -> Tensor:
    return noise(case.seed, "clip", case.clip)


def expected(case: Case) -> Published:
    """In float64, of weights and a clip of float32."""
    return published({key: value.double() for key, value in weights(case).items()}, clip_of(case).double(), case)


def official(key: str) -> str:
    """The released name of one of our parameters."""
    if "head." in key:
        return "cls_head." + key.replace("motion_head", "fc_motion").replace("head.", "fc_cls.", "motion" not in key)
    return f"backbone.model.{key}"


@pytest.fixture
def _on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def only(operation: str, backends: Any, name: str | None, *problem: Any, **request: Any) -> Any:
        return choose(operation, backends, "reference", *problem, **request)

    doors = [door for name, door in sys.modules.items() if name.startswith("tokenops.ops.") and getattr(door, "choose", None) is choose]
    assert doors
    for door in doors:
        monkeypatch.setattr(door, "choose", only)


def assert_golden(logits: Tensor, stats: HaltingStats) -> None:
    assert_close("logits", logits, GOLDEN["logits"], torch.float32)
    assert_close("feature", stats.feature, GOLDEN["feature"], torch.float32)
    assert_close("motion_logits", stats.motion_logits, GOLDEN["motion_logits"], torch.float32)
    assert torch.equal(stats.token_counts, GOLDEN["token_counts"].long())
    assert torch.equal(stats.kept[0].flatten(0, 1), GOLDEN["kept"].long())
    assert torch.equal(stats.layers, GOLDEN["counter"].int())


@torch.no_grad()
def test_published_outputs() -> None:
    model, clip = model_of(SMALL), clip_of(SMALL)
    assert_close("embedding", model.embed(clip)[:, ::8], GOLDEN["embed"], torch.float32)
    assert_golden(*model(clip, return_stats=True))
    logits, stats = model(clip, return_stats=True, ponder=True)
    assert_golden(logits, stats)
    assert_close("rho", stats.rho, GOLDEN["rho"], torch.float32)


@pytest.mark.usefixtures("_on_the_reference")
@torch.no_grad()
def test_published_outputs_by_the_reference() -> None:
    assert_golden(*model_of(SMALL)(clip_of(SMALL), return_stats=True))


def test_published_loss_and_gradients() -> None:
    real = clip_of(SMALL)[:1]
    clips, labels, motion_labels = real_fake_pairs(real, real[:, :, 1], torch.tensor([GOLDEN["labels"][0]]))
    assert labels.tolist() == GOLDEN["labels"]
    assert motion_labels.tolist() == GOLDEN["motion_labels"]
    model = model_of(SMALL)
    losses = halting_losses(*model(clips, return_stats=True, ponder=True), labels, motion_labels)
    for loss, name in ((losses.classification, "loss_cls"), (losses.ponder, "loss_ponder_token"), (losses.motion, "loss_motion")):
        assert_close(name, loss, torch.tensor(GOLDEN["parts"][name]), torch.float32)
    assert_close("total", losses.total, torch.tensor(GOLDEN["total"]), torch.float32)
    losses.total.backward()
    found = {official(key): parameter.grad for key, parameter in model.named_parameters()}
    assert found.keys() == GOLDEN["grads"].keys()
    for key, want in GOLDEN["grads"].items():
        grad = found[key]
        if key.endswith(("_embed", "_token")):
            grad = grad[0]
        elif grad.dim() > 1:
            grad = probed(grad)
        # gradients are small numbers: a plain relative bound, stricter than the rule of the operators
        assert (grad - want).norm() <= 1e-5 * want.norm() + 1e-8, key


@every_case
@torch.no_grad()
def test_removing_is_multiplying_by_zero(case: Case) -> None:
    want = expected(case)
    # otherwise rounding could decide
    assert want.margin > 2e-5
    logits, stats = model_of(case)(clip_of(case), return_stats=True)
    assert_close("logits", logits, want.logits, torch.float32)
    assert (logits - want.logits).abs().max() < 1e-4
    assert_close("feature", stats.feature, want.feature, torch.float32)
    assert torch.equal(stats.token_counts, want.token_counts)
    assert stats.rho is None
    for ours, theirs in zip(stats.kept, want.kept, strict=True):
        assert torch.equal(ours, theirs)
    # a finished clip's other tokens are not followed to their end
    alive = (want.token_counts > 0).sum(1, keepdim=True)
    assert torch.equal(stats.layers, want.layers.minimum(alive).int())


@pytest.mark.parametrize("name", ["small", "three clips", "fused token", "all clips finish", "both blocks prune", "no Glimpser"])
def test_gradients_are_those_of_multiplying_by_zero(name: str) -> None:
    """In float64, the ponder cost's included: also of clips whose class token has halted before others."""
    case = CASES[name]
    state = {key: value.double().requires_grad_() for key, value in weights(case).items()}
    clip = clip_of(case).double()
    labels = (torch.arange(len(clip)) % 3, torch.arange(len(clip)) % 2)
    want = published(state, clip, case)
    cross_entropy = torch.nn.functional.cross_entropy
    total = cross_entropy(want.logits, labels[0]) + 5e-4 * want.rho.mean() + cross_entropy(want.motion_logits, labels[1])
    model = model_of(case, {key: value.detach().float() for key, value in state.items()}).double()
    logits, stats = model(clip, return_stats=True, ponder=True)
    assert_close("rho", stats.rho, want.rho, torch.float64)
    # also where the class token has halted
    assert torch.equal(stats.layers, want.layers.int())
    losses = halting_losses(logits, stats, *labels)
    assert_close("loss", losses.total, total, torch.float64)
    losses.total.backward()
    grads = dict(zip(state, torch.autograd.grad(total, list(state.values()), allow_unused=True, materialize_grads=True), strict=True))
    for key, parameter in model.named_parameters():
        grad, wanted = parameter.grad, grads[official(key)]
        # a bias of keys has none but rounding
        assert (grad - wanted).norm() <= 1e-9 * wanted.norm() + 1e-15, key


def test_halted_tokens_are_computed_no_more() -> None:
    case = CASES["one clip goes to the end"]
    model = model_of(case)
    rows: list[int] = []
    for block in model.blocks[2:]:
        # called with gradients only: without, it is part of the gathered layers
        block.norm2.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[0]))
    _, stats = model(clip_of(case), return_stats=True)
    counts = stats.token_counts.sum(0).tolist()
    # in the last layer, the class tokens only
    assert rows == [*counts[:-1], case.clip[0]]
    assert counts[1] < counts[0]
    assert counts[-1] < counts[1]


@torch.no_grad()
def test_nothing_is_computed_once_every_clip_is_finished() -> None:
    case = CASES["finished after one layer"]
    model = model_of(case)
    # the third clip is finished after one layer
    logits, stats = model(clip_of(case)[2:], return_stats=True)
    assert stats.token_counts.tolist() == [[33, 0, 0, 0]]
    for block in model.blocks[3:]:
        del block.attn
    assert torch.equal(model(clip_of(case)[2:]), logits)


@torch.no_grad()
def test_a_clip_does_not_see_its_neighbours() -> None:
    for case in (CASES["one clip goes to the end"], CASES["6 frames into 4, 96 pixels into 64"]):
        model, clips = model_of(case), clip_of(case)
        together, stats = model(clips, return_stats=True)
        for b in range(len(clips)):
            alone, own = model(clips[b : b + 1], return_stats=True)
            assert_close("logits", together[b : b + 1], alone, torch.float32)
            assert torch.equal(stats.token_counts[b : b + 1], own.token_counts)
            assert torch.equal(stats.layers[b : b + 1], own.layers)


def test_training_follows_the_same_path() -> None:
    case = CASES["three clips"]
    model = model_of(case)
    with torch.no_grad():
        want, _ = model(clip_of(case), return_stats=True)
    model.train()
    for part in model.modules():
        if isinstance(part, DropPath):
            part.p = 0.0
    logits, stats = model(clip_of(case), return_stats=True)
    assert_close("logits", logits, want, torch.float32)
    assert stats.rho is not None


def test_drop_path_grows_with_depth_and_drops_whole_branches() -> None:
    model = model_of(CASES["deeper"])
    assert [round(block.drop_path.p, 4) for block in model.blocks] == [round(0.1 * i / 7, 4) for i in range(8)]
    drop = DropPath(0.5).train()
    torch.manual_seed(0)
    owner = torch.arange(64).repeat_interleave(5)
    y = drop(torch.ones(320, 3), owner, 64).view(64, 15)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y.amin(1), y.amax(1))
    # a Glimpser: its branch over time for a whole slot, that over space for a whole frame, as the published code does
    glimpser = model.blocks[0].train()
    glimpser.drop_path.p = 0.5
    seen: list[tuple[int, ...]] = []
    glimpser.drop_path.register_forward_hook(lambda _, given, __: seen.append(tuple(given[0].shape)))
    glimpser(torch.randn(2, 1 + 16 * 4, 96), 4)
    assert seen == [(16 * 2, 4, 96), (2 * 4, 17, 96), (2, 65, 96)]


def test_a_model_without_halting_trains_without_ponder_cost() -> None:
    case = CASES["no halting"]
    logits, stats = model_of(case).train()(clip_of(case), return_stats=True)
    assert stats.rho is None
    losses = halting_losses(logits, stats, torch.tensor([0, 1]), torch.tensor([1, 0]), ponder_weight=0.0)
    losses.total.backward()


def test_a_training_step() -> None:
    torch.manual_seed(0)
    config = HaltingConfig((1.0, 0.5), 5.0, frames=4, classes=3, dim=48, depth=4, num_heads=3, image_size=64, drop_path=0.3)
    model = HaltingVT(config).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    clips, labels, motion = real_fake_pairs(torch.randn(2, 3, 4, 64, 64), torch.randn(2, 3, 64, 64), torch.tensor([0, 2]))
    losses = []
    for _ in range(8):
        loss = halting_losses(*model(clips, return_stats=True), labels, motion)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[-1] < 0.8 * losses[0]


def test_losses() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3]])
    motion = torch.tensor([[1.0, 2.0], [0.5, -0.5]])
    stats = HaltingStats(logits, logits, logits, (), motion, torch.tensor([[2.0, 3.0], [1.0, 4.0]]))
    labels, real = torch.tensor([0, 2]), torch.tensor([1, 0])
    plain = halting_losses(logits, stats, labels, real)
    assert plain.ponder.item() == pytest.approx(5e-4 * 2.5)
    # sets of classes, of one each
    assert_close("0/1 labels", halting_losses(logits, stats, torch.eye(3)[labels], real).total, plain.total, torch.float32)
    both = halting_losses(logits, stats, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), real)
    log_p = logits.log_softmax(-1)
    # not divided by the number of labels
    assert both.classification.item() == pytest.approx(-(log_p[0, 0] + log_p[0, 1] + log_p[1, 2]).item() / 2)
    weighted = halting_losses(logits, stats, labels, real, ponder_weight=0.0, motion_weight=0.001)
    assert weighted.total.item() == pytest.approx(plain.classification.item() + 0.001 * plain.motion.item())
    without = stats._replace(rho=None, motion_logits=None)
    assert_close(
        "classification only",
        halting_losses(logits, without, labels, real, ponder_weight=0, motion_weight=0).total,
        plain[1],
        torch.float32,
    )
    with pytest.raises(ValueError, match=r"stats\.rho must be given"):
        halting_losses(logits, without, labels, real)
    with pytest.raises(ValueError, match=r"stats\.motion_logits must be given"):
        halting_losses(logits, without._replace(rho=stats.rho), labels, real)


def test_real_fake_pairs() -> None:
    real = torch.arange(2.0 * 3 * 4).view(2, 3, 4, 1, 1)
    clips, labels, motion = real_fake_pairs(real, real[:, :, 2], torch.tensor([7, 9]))
    assert labels.tolist() == [7, 7, 9, 9]
    assert motion.tolist() == [1, 0, 1, 0]
    assert torch.equal(clips[0::2], real)
    assert torch.equal(clips[1::2], real[:, :, 2:3].expand_as(real))
    other = real + 100
    assert torch.equal(real_fake_pairs(real, other, torch.eye(2))[0][1::2], other)


def test_frame_indices() -> None:
    # a window of 7 x 32 + 1 = 225 in the middle
    assert frame_indices(325, 8, 32).tolist() == [50 + 32 * i for i in range(8)]
    # a short video starts again
    assert frame_indices(100, 8, 32).tolist() == [32 * i % 100 for i in range(8)]
    generator = torch.Generator().manual_seed(0)
    starts = {int(frame_indices(20, 4, 4, generator=generator)[0]) for _ in range(200)}
    assert starts == set(range(8))
    frozen = torch.stack([frame_indices(20, 4, 4, generator=generator, frozen=True) for _ in range(200)])
    assert (frozen == frozen[:, :1]).all()
    assert set(frozen[:, 0].tolist()) == set(range(20))
    with pytest.raises(ValueError, match="frozen"):
        frame_indices(20, 4, 4, frozen=True)


def test_preprocess() -> None:
    frames = torch.randint(0, 256, (2, 256, 340, 3), dtype=torch.uint8)
    clip = preprocess(frames)
    assert clip.shape == (3, 2, 224, 224)
    # the shorter side is 256 already
    assert torch.equal(clip, ((frames[:, 16:240, 58:282].float() - 127.5) / 127.5).permute(3, 0, 1, 2))
    assert preprocess(frames[:, :128], 112).shape == (3, 2, 112, 112)


@torch.no_grad()
def test_views_are_averaged() -> None:
    model = model_of(SMALL)
    views = torch.stack([clip_of(SMALL), clip_of(SMALL).flip(-1)], 1)
    want = (model(views[:, 0]).softmax(-1) + model(views[:, 1]).softmax(-1)) / 2
    assert_close("probabilities", model.predict(views), want, torch.float32)


def test_faults_of_a_checkpoint_come_together() -> None:
    state = weights(SMALL)
    del state["backbone.model.blocks.1.temporal_fc.bias"]
    state["backbone.model.blocks.0.mlp.fc2.weight"] = torch.zeros(96, 4)
    state["backbone.model.blocks.3.extra"] = torch.zeros(2)
    with pytest.raises(ValueError, match="does not fit") as error:
        model_of(SMALL, state)
    for text in (
        "missing blocks.1.temporal_fc.bias [96]",
        "unexpected blocks.3.extra [2]",
        "blocks.0.mlp.fc2.weight must be [96, 384], got [96, 4]",
    ):
        assert text in str(error.value)
    for absent in ("backbone.model.cls_token", "backbone.model.pos_embed", "backbone.model.time_embed", "cls_head.fc_cls.bias"):
        with pytest.raises(ValueError, match=f"missing {absent.replace('backbone.model.', '').replace('cls_head.fc_cls', 'head')}"):
            model_of(SMALL, {key: value for key, value in weights(SMALL).items() if key != absent})
    # two Glimpser blocks' weights for one Glimpser block
    with pytest.raises(ValueError, match=r"unexpected blocks\.1\.temporal_fc\.weight"):
        model_of(SMALL._replace(keep_rate=(1.0,)), weights(SMALL))


@torch.no_grad()
def test_prefixes_and_bare_backbones() -> None:
    state, clip = weights(SMALL), clip_of(SMALL)
    want, stats = model_of(SMALL)(clip, return_stats=True)
    assert torch.equal(model_of(SMALL, {f"module.{key}": value for key, value in state.items()})(clip), want)
    no_motion = model_of(SMALL, {key: value for key, value in state.items() if "fc_motion" not in key})
    logits, bare = no_motion(clip, return_stats=True)
    assert torch.equal(logits, want)
    assert bare.motion_logits is None
    backbone = {key: value for key, value in state.items() if key.startswith("backbone.")}
    for prefix in ("backbone.model.", "model.", ""):
        renamed = {prefix + key.removeprefix("backbone.model."): value for key, value in backbone.items()}
        assert torch.equal(model_of(SMALL, renamed)(clip), stats.feature)


@torch.no_grad()
def test_from_an_image_model() -> None:
    config = HaltingConfig((1.0, 0.5), 10.0, frames=4, classes=7, dim=96, depth=4, num_heads=3, image_size=64)
    image = {
        key.removeprefix("backbone.model."): value
        for key, value in weights(SMALL).items()
        if not any(word in key for word in ("temporal", "time_embed", "cls_head"))
    }
    model = HaltingVT.from_deit({**image, "head.weight": torch.zeros(1000, 96), "head.bias": torch.zeros(1000)}, config).eval()
    state = model.state_dict()
    for i in (0, 1):
        for key in ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias", "norm1.weight", "norm1.bias"):
            assert torch.equal(state[f"blocks.{i}.temporal_{key}"], image[f"blocks.{i}.{key}"])
        assert not state[f"blocks.{i}.temporal_fc.weight"].any()
        assert not state[f"blocks.{i}.temporal_fc.bias"].any()
    assert not state["time_embed"].any()
    assert torch.equal(state["blocks.3.mlp.fc1.weight"], image["blocks.3.mlp.fc1.weight"])
    assert model(clip_of(SMALL)).shape == (2, 7)
    # neither time branch nor time embedding yet: the order of frames cannot matter
    assert_close("logits", model(clip_of(SMALL).flip(2)), model(clip_of(SMALL)), torch.float32)
    del image["norm.bias"]
    with pytest.raises(ValueError, match=r"missing norm\.bias"):
        HaltingVT.from_deit(image, config)


def test_sizes_of_the_published_models() -> None:
    presets = HaltingVT.PRESETS
    table = {
        "minik_g03_beta5": (8, 32, 0.3, 5.0),
        "minik_g03_beta10": (8, 32, 0.3, 10.0),
        "minik_g05_beta20": (8, 32, 0.5, 20.0),
        "minik_g07_beta20": (8, 32, 0.7, 20.0),
        "anet_g03_beta10": (10, 64, 0.3, 10.0),
        "anet_g05_beta10": (10, 64, 0.5, 10.0),
        "anet_g05_beta20": (10, 64, 0.5, 20.0),
        "anet_g07_beta20": (10, 64, 0.7, 20.0),
    }
    assert {name: (c.frames, c.stride, c.keep_rate[1], c.halt_center) for name, c in presets.items()} == table
    assert all(c.keep_rate[0] == 1.0 and c.classes == 200 and c.halt_scale == 10.0 for c in presets.values())
    with torch.device("meta"):
        model = HaltingVT(presets["minik_g05_beta20"])
    entries = {official(key): tuple(value.shape) for key, value in model.state_dict().items()}
    assert entries == shapes(Case(0, dim=384, depth=12, frames=8, side=14, classes=200))
    assert len(entries) == 171
    assert sum(parameter.numel() for parameter in model.parameters()) == 23_226_442


@pytest.mark.parametrize(
    ("rate", "frames", "front", "layer", "whole"),
    [
        (0.3, 8, 7.54, 1.01, 17.6),
        (0.3, 10, 9.43, 1.31, 22.6),
        (0.5, 8, 7.91, 1.86, 26.5),
        (0.5, 10, 9.89, 2.48, 34.6),
        (0.7, 8, 8.28, 2.89, 37.2),
        (0.7, 10, 10.36, 3.91, 49.4),
    ],
)
def test_multiply_adds_are_the_published_ones(rate: float, frames: int, front: float, layer: float, whole: float) -> None:
    config = HaltingConfig((1.0, rate), 10.0, frames=frames)
    finished = config.flops(token_counts=[0] * 10).published
    tokens = 1 + frames * -int(-rate * 196 // 1)
    one = config.flops(token_counts=[tokens] + [0] * 9).published - finished
    # the table's last digit, one of its numbers rounded twice
    assert finished / 1e9 == pytest.approx(front, abs=0.0051)
    assert one / 1e9 == pytest.approx(layer, abs=0.0051)
    assert config.flops().published / 1e9 == pytest.approx(whole, abs=0.051)
    assert config.flops(token_counts=[tokens] * 10) == config.flops()
    # of two clips
    assert config.flops(token_counts=torch.full((2, 10), tokens)).published == 2 * config.flops().published


@pytest.mark.parametrize("name", ["deeper", "both blocks prune and fuse", "no halting", "finished after one layer", "no Glimpser prunes"])
def test_multiply_adds_are_those_that_run(name: str) -> None:
    model, clip = model_of(CASES[name]), clip_of(CASES[name])[:1]
    # it counts two for each multiply-add, of the operators' products as well as of torch's
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, stats = model(clip, return_stats=True)
    without_motion_head = counter.get_total_flops() // 2 - 2 * CASES[name].dim
    assert without_motion_head == model.flops(token_counts=stats.token_counts).total


def test_autocast_keeps_scores_in_full_precision() -> None:
    case = CASES["three clips"]
    model, clip = model_of(case), clip_of(case)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            logits, stats = model(clip, return_stats=True)
        assert (logits - expected(case).logits).norm() < 0.1 * logits.norm()
        assert (stats.token_counts - expected(case).token_counts).abs().max() <= 3


@torch.no_grad()
def test_the_front_compiles_into_one_graph() -> None:
    """The joint layers cannot: how many tokens are left is known only there."""
    model = model_of(SMALL)
    z = model.embed(clip_of(SMALL))
    want, kept = model.blocks[1](z, 4)
    got, compiled = torch.compile(model.blocks[1], backend="aot_eager", fullgraph=True)(z, 4)
    assert torch.equal(kept, compiled)
    assert_close("tokens", got, want, torch.float32)


def test_errors_name_the_argument() -> None:
    model = model_of(SMALL)
    for shape in ((3, 4, 64, 64), (1, 1, 4, 64, 64), (1, 3, 4, 60, 64), (1, 3, 4, 64, 40), (0, 3, 4, 64, 64)):
        with pytest.raises(ValueError, match="clip must be"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="keep_rate must be in"):
        HaltingVT(HaltingConfig((1.0, 1.5), 10.0))
    with pytest.raises(ValueError, match="keep_rate must name fewer blocks"):
        HaltingVT(HaltingConfig((1.0, 0.5), 10.0, depth=2))
    with pytest.raises(ValueError, match="num_heads must divide"):
        HaltingVT(HaltingConfig((1.0, 0.5), 10.0, num_heads=5))
