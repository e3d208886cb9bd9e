"""VidTr and C-VidTr against the released modules' data and against the release's description in plain torch."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import vidtr_oracle as oracle
from oracle import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokenops.models import CompactVidTr, TopKStd, VidTr, VidTrConfig
from tokenops.models.blocks import load_strictly, read_checkpoint, renamed
from tokenops.models.vidtr import preprocess, sample_frames
from tokenops.models.vidtr_block import SeparableAttention, gather_rows

HEADS = 3
GOLDEN = torch.load(Path(__file__).parent / "data" / "vidtr.pt", weights_only=True)["attn"]
# the release names a module's parameters without a prefix
ATTENTION = ((r"in_proj_", "qkv."), (r"out_proj\.", "proj."))
POOLS = {1: oracle.Pool(2), 2: oracle.Pool(2)}


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def official_order(kept: Tensor) -> Tensor:
    """[B, N, H, K] -> [H, B, N, K], in which the release lists them."""
    return kept.permute(2, 0, 1, 3)


def attention(state: dict[str, Tensor], dim: int = 24, **options: Any) -> SeparableAttention:
    module = SeparableAttention(dim, HEADS, **options)
    module = module.double().eval()
    load_strictly(module, renamed(state, ATTENTION), "attention")
    return module


def compact(state: dict[str, Tensor], **options: Any) -> CompactVidTr:
    return CompactVidTr.from_official(state, **{"num_heads": HEADS, "pool_layers": (1, 2), "drop": (2, 2), **options})


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-6)])
@pytest.mark.parametrize("case", GOLDEN, ids=["full", "compact"])
def test_attention_of_the_release(case: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    pool = TopKStd(case["kw"]["k"]) if case["kw"] else None
    module = SeparableAttention(case["d"], case["heads"], pool=pool).eval()
    load_strictly(module, renamed(case["state"], ATTENTION), "attention")
    module, x = module.to(dtype), case["x"].transpose(0, 1).to(dtype)
    want = case["out"].transpose(0, 1).to(dtype)
    if pool is None:
        got, kept = module(x, case["T"] + 1)
        assert kept is None
    else:
        # the release's module hands its class token through
        got, kept = module(x[:, 1:], case["T"])
        got = torch.cat([x[:, :1], got], dim=1)
        kept = official_order(kept)
        assert torch.equal(kept.flatten(0, 2).long(), case["idx"])
    assert_near(got, want, tolerance)


@pytest.mark.parametrize("granularity", ["head_location", "location", "clip"])
@pytest.mark.parametrize("resoftmax", [True, False])
@pytest.mark.parametrize("keep_class", [True, False])
def test_pooled_attention_is_the_definition(granularity: str, resoftmax: bool, keep_class: bool) -> None:
    state = oracle.random_state("single", 5, 4, 1)
    at = "encoder.layers.0.self_attn."
    x = noise(2, 5 * 4, 24).requires_grad_()
    module = attention(
        renamed({k: v for k, v in state.items() if k.startswith(at)}, [(at, "")]), pool=TopKStd(2, granularity, resoftmax, keep_class)
    )
    got, kept = module(x, 5)
    want, chosen = oracle.separable(state, at, x.transpose(0, 1), 5, HEADS, oracle.Pool(2, keep_class, resoftmax, granularity))
    assert torch.equal(official_order(kept).long(), chosen)
    assert_near(got, want.transpose(0, 1))
    weight = noise(*got.shape, seed=6)
    assert_near(*(torch.autograd.grad(out, x, weight)[0] for out in (got, want.transpose(0, 1))))
    if granularity == "clip":
        assert (kept == kept[:, :1]).all()


@pytest.mark.parametrize("frames", [3, 16])
def test_full_model(frames: int) -> None:
    state, clip = oracle.random_state("full", frames, 4, 3), noise(2, 3, frames, 32, 32)
    model = VidTr.from_official(state, num_heads=HEADS)
    assert not model.training
    want, _ = oracle.full(state, clip, HEADS)
    assert_near(model(clip), want)
    assert_near(model.float()(clip.float()).double(), want, 2e-5)


def test_full_model_pools_as_the_paper_has_it() -> None:
    state, clip = oracle.random_state("full", 5, 4, 3), noise(2, 3, 5, 32, 32)
    pools = (TopKStd(1, keep_class=True), TopKStd(2, keep_class=True))
    config = VidTrConfig(5, 20, 1, 24, 3, HEADS, 48, 7, pool_layers=(0, 2), pools=pools)
    model = VidTr(config).double().eval()
    model.load_state_dict(VidTr.from_official(state, num_heads=HEADS).state_dict())
    got, kept = model(clip, return_indices=True)
    want, chosen = oracle.full(state, clip, HEADS, {0: oracle.Pool(1, True), 2: oracle.Pool(2, True)})
    assert_near(got, want)
    assert [official_order(x).tolist() for x in kept] == [x.tolist() for x in chosen]


@pytest.mark.parametrize(("frames", "drop"), [(6, (2, 2)), (16, (8, 5))])
def test_compact_model(frames: int, drop: tuple[int, int]) -> None:
    state, clip = oracle.random_state("single", frames, 6, 4), noise(2, 3, frames, 32, 48)
    model = compact(state, drop=drop)
    want, chosen = oracle.single(state, clip, HEADS, 2, {1: oracle.Pool(drop[0]), 2: oracle.Pool(drop[1])}, every_layer_at_16=False)
    got, kept = model(clip, return_indices=True)
    assert_near(got, want)
    assert [official_order(x).tolist() for x in kept] == [x.tolist() for x in chosen]
    assert torch.equal(model(clip), got)
    # 32-bit kernels choose the same frames here
    got, kept = model.float()(clip.float(), return_indices=True)
    assert_near(got.double(), want, 2e-5)
    assert [official_order(x).tolist() for x in kept] == [x.tolist() for x in chosen]


@pytest.mark.parametrize("frames", [3, 16])
@pytest.mark.parametrize("merge_index", [1, -1])
def test_full_model_that_merges_later(frames: int, merge_index: int) -> None:
    state, clip = oracle.random_state("single", frames, 4, 4), noise(2, 3, frames, 32, 32)
    model = VidTr.from_official(state, num_heads=HEADS, merge_index=merge_index)
    want, _ = oracle.single(state, clip, HEADS, merge_index, {}, every_layer_at_16=True)
    assert_near(model(clip), want)


def test_separate_projections_are_two_attentions() -> None:
    """The paper's form: MSA_s has projections of its own and takes the output of MSA_t."""
    state, at = oracle.random_state("single", 3, 4, 2), "encoder.layers.{}.self_attn."
    parts = [renamed({k: v for k, v in state.items() if k.startswith(at.format(i))}, [(at.format(i), "")]) for i in (0, 1)]
    own = renamed(parts[0], ATTENTION) | {f"spatial.{k}": v for k, v in renamed(parts[1], ATTENTION).items()}
    module = SeparableAttention(24, HEADS, mode="separate").double().eval()
    load_strictly(module, own, "attention")
    x = noise(3 * 4, 2, 24)
    columns = x.unflatten(0, (3, 4))
    over_time = torch.stack([oracle.joint(state, at.format(0), columns[:, n], columns[:, n], HEADS) for n in range(4)], dim=1)
    want = torch.cat([oracle.joint(state, at.format(1), row, row, HEADS) for row in over_time])
    got, _ = module(x.transpose(0, 1), 3)
    assert_near(got, want.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["full", "compact"])
def test_gradients_are_the_definition_s(form: str, dtype: torch.dtype) -> None:
    clip = noise(2, 3, 4, 32, 32)
    state = {name: x.requires_grad_() for name, x in oracle.random_state("full" if form == "full" else "single", 4, 4, 3).items()}
    if form == "full":
        read, options = VidTr.from_official, {"num_heads": HEADS}
        want, _ = oracle.full(state, clip, HEADS)
    else:
        read, options = compact, {"drop": (1, 1)}
        want, _ = oracle.single(state, clip, HEADS, 2, {1: oracle.Pool(1), 2: oracle.Pool(1)}, False)
    model = read(state, **options).to(dtype)
    weight = noise(2, 7, seed=6)
    (model(clip.to(dtype)) * weight).sum().backward()
    (want * weight).sum().backward()
    # the gradients, read as a state, come under our names
    grads = dict(read({name: x.grad for name, x in state.items()}, **options).named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, grads[name], dtype)


def test_a_batch_is_its_clips() -> None:
    model = compact(oracle.random_state("single", 6, 4, 4))
    clips = noise(3, 3, 6, 32, 32)
    got, kept = model(clips, return_indices=True)
    for i in range(3):
        alone, its = model(clips[i : i + 1], return_indices=True)
        assert_near(alone[0], got[i])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(its, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_nearly_still_clip_keeps_the_right_frames(dtype: torch.dtype) -> None:
    """Its attention is nearly uniform: rows differ behind the last digit of a float32 sum of squares."""
    state, at = oracle.random_state("single", 8, 16, 1), "encoder.layers.0.self_attn."
    x = (noise(2, 1, 16, 24) + 0.003 * noise(2, 8, 16, 24, seed=6)).flatten(1, 2)
    _, chosen = oracle.separable(state, at, x.transpose(0, 1), 8, HEADS, oracle.Pool(2))
    module = attention(renamed({k: v for k, v in state.items() if k.startswith(at)}, [(at, "")]), pool=TopKStd(2))
    _, kept = module.to(dtype)(x.to(dtype), 8)
    assert torch.equal(official_order(kept).long(), chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_choose_and_compute_alike(dtype: torch.dtype) -> None:
    state = oracle.random_state("single", 8, 4, 4)
    model = compact(state)
    clip = noise(2, 3, 8, 32, 32)
    want, _ = model(clip, return_indices=True)
    model = model.float()
    with torch.autocast("cpu", dtype):
        got, kept = model(clip.float(), return_indices=True)
    assert got.isfinite().all()
    assert [x.shape[-1] for x in kept] == [6, 4]
    assert (got.double() - want).norm() <= 0.1 * want.norm()


def test_training_drops_and_learns() -> None:
    torch.manual_seed(0)
    config = VidTrConfig(4, 16, 1, 24, 2, HEADS, 48, 5, pool_layers=(0,), pools=(TopKStd(1),), head_dropout=0.1)
    model = CompactVidTr(config).train()
    clip, label = noise(8, 3, 4, 32, 32).float(), torch.arange(8) % 5
    assert not torch.equal(model(clip), model(clip))
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(clip), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    model.eval()
    assert (model(clip).argmax(-1) == label).all(), losses


def test_a_pooling_layer_drops_none_of_its_temporal_map() -> None:
    """One column: the spatial map is 1 or, where it is dropped, 0 and 2, so that a kept token shows the temporal result."""
    state, at = oracle.random_state("single", 5, 1, 1), "encoder.layers.0.self_attn."
    own = renamed({k: v for k, v in state.items() if k.startswith(at)}, [(at, "")])
    own["out_proj.weight"], own["out_proj.bias"] = torch.eye(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    x = noise(64, 5, 24)
    for pool, drops in ((None, True), (TopKStd(2), False)):
        module = attention(own, pool=pool, dropout=0.5)
        want, got = (module.train(training)(x, 5)[0].unflatten(-1, (HEADS, -1)) for training in (False, True))
        spatial_kept = (got != 0).any(-1)
        assert 0.3 < spatial_kept.double().mean() < 0.6
        assert torch.allclose(got[spatial_kept], 2 * want[spatial_kept]) != drops


@pytest.mark.parametrize("model", ["full", "compact"])
def test_compiles_whole(model: str) -> None:
    if model == "full":
        module = VidTr.from_official(oracle.random_state("full", 3, 4, 1), num_heads=HEADS).float()
    else:
        module = compact(oracle.random_state("single", 3, 4, 2), pool_layers=(0,), drop=(1,)).float()
    clip = noise(1, 3, 3, 32, 32).float()
    with torch.no_grad():
        assert_near(torch.compile(module, fullgraph=True, backend="aot_eager")(clip), module(clip), 1e-5)


def giga(count: int) -> float:
    return round(count / 1e9, 1)


@pytest.mark.parametrize(
    ("name", "options", "total", "published"),
    [
        ("S", {}, 158.2, 89.8),
        ("M", {}, 299.5, 179.5),
        ("L", {}, 583.4, 358.9),
        ("S", {"mode": "separate"}, 208.4, 89.8),
        ("M", {"mode": "separate"}, 394.3, 179.5),
        ("L", {"mode": "separate"}, 767.5, 358.9),
        ("S", {"merge_index": 6}, 156.5, 89.8),
        ("M", {"merge_index": 6}, 351.0, 179.5),
        ("L", {"merge_index": 6}, 854.1, 358.9),
        ("S", {"merge_index": -1}, 179.6, 89.8),
        ("M", {"merge_index": -1}, 449.7, 179.5),
        ("L", {"merge_index": -1}, 1261.8, 358.9),
        ("C-S", {}, 64.6, 39.8),
        ("C-M", {}, 77.2, 46.3),
    ],
)
def test_multiply_adds(name: str, options: dict[str, Any], total: float, published: float) -> None:
    kind = CompactVidTr if name.startswith("C-") else VidTr
    config = kind.PRESETS[name.removeprefix("C-")]
    with torch.device("meta"):
        model = kind(VidTrConfig(**{**vars(config), **options}))
    count = model.flops()
    assert (giga(count.total), giga(count.published)) == (total, published)
    if config.frames == 8 and kind is VidTr:
        # torch's counter, which knows nothing of the formula, sees the same operations
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.empty(1, 3, 8, 224, 224, device="meta"))
        assert counter.get_total_flops() == 2 * count.total


@pytest.mark.parametrize(
    ("name", "entries", "millions"), [("S", 153, 87.47), ("M", 153, 88.69), ("L", 153, 91.12), ("C-S", 152, 87.16), ("C-M", 152, 88.36)]
)
def test_presets_have_the_published_sizes(name: str, entries: int, millions: float) -> None:
    kind = CompactVidTr if name.startswith("C-") else VidTr
    with torch.device("meta"):
        state = kind(kind.PRESETS[name.removeprefix("C-")]).state_dict()
    assert len(state) == entries
    assert round(sum(x.numel() for x in state.values()) / 1e6, 2) == millions


def test_reads_a_checkpoint_file(tmp_path: Path) -> None:
    state, clip = oracle.random_state("single", 6, 4, 4), noise(1, 3, 6, 32, 32)
    torch.save({"model": {f"module.{key}": x for key, x in state.items()}, "epoch": 50}, tmp_path / "best.pth")
    want = compact(state)(clip)
    assert torch.equal(compact(read_checkpoint(tmp_path / "best.pth", "model"))(clip), want)
    assert torch.equal(compact(torch.load(tmp_path / "best.pth", weights_only=True))(clip), want)


@torch.no_grad()
@pytest.mark.parametrize("kind", [VidTr, CompactVidTr])
def test_from_an_image_model(kind: type[VidTr] | type[CompactVidTr]) -> None:
    pooling: dict[str, Any] = {} if kind is VidTr else {"pool_layers": (0,), "pools": (TopKStd(1),)}
    config = VidTrConfig(3, 12, 1, 24, 2, HEADS, 48, 7, **pooling)
    made = kind(config).state_dict()
    image = {name.replace("patch_embed.", "patch_embed.proj."): x for name, x in made.items() if not name.startswith("cls")}
    image |= {"pos_embed": noise(1, 5, 24).float(), "cls_token": noise(1, 1, 24, seed=6).float()}
    image |= {"patch_embed.proj.weight": made["patch_embed.weight"][:, :, 0], "head.weight": torch.zeros(21843, 24)}
    del image["head.bias"]
    model = kind.from_vit(image, config)
    assert model.training
    assert torch.equal(model.blocks[1].mlp.fc1.weight, image["blocks.1.mlp.fc1.weight"])
    assert model.head.weight.shape == (7, 24)
    assert model.head.weight.any()
    # a still picture: every row of the grid is what the image model has
    picture = noise(1, 3, 32, 32).float()
    x = model._tokens(model.patch_embed(picture[:, :, None].expand(-1, -1, 3, -1, -1)).flatten(3).permute(0, 2, 3, 1)) + model.pos_embed
    patches = torch.nn.functional.conv2d(picture, image["patch_embed.proj.weight"], image["patch_embed.proj.bias"], 16).flatten(2).mT
    row = torch.cat([image["cls_token"], patches], 1) + image["pos_embed"]
    if kind is VidTr:
        assert_near(x[:, 5:], row.repeat(1, 3, 1), 1e-6)
        assert_near(x[:, :5], image["cls_token"] + image["pos_embed"], 1e-6)
    else:
        assert_near(x, torch.cat([row[:, :1], row[:, 1:].repeat(1, 3, 1)], 1), 1e-6)
    with pytest.raises(ValueError, match=r"from an image model: .*(\n.*)*missing norm.bias"):
        kind.from_vit({name: x for name, x in image.items() if name != "norm.bias"}, config)
    with pytest.raises(ValueError, match=r"frames must be known"):
        kind.from_vit(image, VidTrConfig(**{**vars(config), "frames": None}))


def test_a_state_that_does_not_fit_says_all_of_it_at_once() -> None:
    state = oracle.random_state("full", 3, 4, 2)
    del state["encoder.layers.1.linear1.bias"], state["cls_t"]
    state["fc.bias"] = torch.zeros(8)
    state["extra"] = torch.zeros(2)
    with pytest.raises(ValueError, match="does not fit") as error:
        VidTr.from_official(state, num_heads=HEADS)
    for fault in ("missing blocks.1.mlp.fc1.bias", "missing cls_temporal", "head.bias must be [7], got [8]", "unexpected extra"):
        assert fault in str(error.value)
    with pytest.raises(ValueError, match=r"missing patch_embed\.weight"):
        VidTr.from_official({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_layers": (2, 1)}, "pool_layers must ascend"),
        ({"pool_layers": (1, 9)}, "pool_layers must ascend"),
        ({"drop": (2,)}, "pools must be one for each of 2"),
        ({"granularity": "frame"}, "pool.granularity must be"),
        ({"num_heads": 5}, "num_heads must divide the width 24"),
    ],
)
def test_wrong_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compact(oracle.random_state("single", 6, 4, 4), **change)


def test_wrong_configs_and_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="mode must be"):
        SeparableAttention(24, HEADS, mode="both")
    with pytest.raises(ValueError, match="keep_class = False"):
        CompactVidTr(VidTrConfig(6, 24, 1, 24, 3, HEADS, 48, 7, pool_layers=(0,), pools=(TopKStd(1, keep_class=True),)))
    with pytest.raises(ValueError, match="merge_index must be None"):
        CompactVidTr(VidTrConfig(6, 24, 1, 24, 3, HEADS, 48, 7, merge_index=1))
    with pytest.raises(ValueError, match="frames must be known"):
        VidTr(VidTrConfig(None, 24, 1, 24, 3, HEADS, 48, 7))
    with pytest.raises(ValueError, match="multiple of the 5 frames"):
        VidTr(VidTrConfig(5, 24, 1, 24, 3, HEADS, 48, 7))
    model = compact(oracle.random_state("single", 6, 4, 4))
    with pytest.raises(ValueError, match=r"clip must be \[B, 3, T, H, W\], got"):
        model(noise(3, 6, 32, 32))
    with pytest.raises(ValueError, match=r"clip must be .* of 24 patches"):
        model(noise(1, 3, 6, 32, 48))
    with pytest.raises(ValueError, match="frames must be given"):
        model.flops()
    assert model.flops(6).total > 0
    # the position table allows this clip, but it has too few frames to drop four
    with pytest.raises(ValueError, match=r"pool.drop must be in \[0, 2\)"):
        model(noise(1, 3, 4, 32, 48))
    with pytest.raises(ValueError, match=r"clip must be .*3, 3, H"):
        VidTr.from_official(oracle.random_state("full", 3, 4, 2), num_heads=HEADS)(noise(1, 3, 4, 16, 48))


def test_gathered_rows_are_each_place_s_own() -> None:
    x = noise(2, 3, 2, 2, 4)  # [B, R, N, H, D]
    kept = torch.tensor([[[[0, 2], [1, 2]], [[0, 1], [0, 2]]], [[[1, 2]] * 2] * 2], dtype=torch.int32)
    # also where columns are a view, as behind a class token
    for grid in (x, x.repeat(1, 1, 2, 1, 1)[:, :, 1:3]):
        got = gather_rows(grid, kept)
        assert got.shape == (2, 2, 2, 2, 4)
        for b, n, h in product(range(2), repeat=3):
            assert torch.equal(got[b, :, n, h], grid[b, kept[b, n, h].long(), n, h])


def test_frames_of_clips() -> None:
    assert sample_frames(64, 8, 8).tolist() == [[0, 8, 16, 24, 32, 40, 48, 56]]
    # both ends of the window: a true step of 9
    assert sample_frames(64, 8, 8, spread=True).tolist() == [[0, 9, 18, 27, 36, 45, 54, 63]]
    clips = sample_frames(300, 8, 8, clips=10)
    assert clips.shape == (10, 8)
    assert clips[0, 0] == 0
    assert clips[-1, -1] == 300 - 8
    assert (clips.diff(dim=1) == 8).all()
    assert sample_frames(20, 8, 8).max() == 19
    with pytest.raises(ValueError, match="stride must be at least 1"):
        sample_frames(64, 8, 0)


def test_views_of_a_video() -> None:
    video = torch.randint(0, 256, (20, 48, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames = sample_frames(20, 4, 2, clips=2)
    views = preprocess(video, frames, size=48, short_side=48)
    assert views.shape == (6, 3, 4, 48, 48)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = ((video.float() / 255 - mean) / deviation).permute(3, 0, 1, 2)
    for clip in range(2):
        for crop, left in enumerate((0, 16, 32)):
            torch.testing.assert_close(views[3 * clip + crop], want[:, frames[clip], :, left : left + 48], rtol=0, atol=1e-5)
    tall = preprocess(video.transpose(1, 2), frames, size=32, short_side=40, crops=1)
    assert tall.shape == (2, 3, 4, 32, 32)
    with pytest.raises(TypeError, match="uint8"):
        preprocess(video.float(), frames)
    with pytest.raises(ValueError, match=r"video must be \[L, H, W, 3\]"):
        preprocess(video.permute(0, 3, 1, 2), frames)
    with pytest.raises(ValueError, match=r"size must be in \[1, 224\]"):
        preprocess(video, frames, size=256)
