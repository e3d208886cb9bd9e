"""Cases and peers of the room ``models``: whole models that leave tokens out, beside the dense ones that they save on, on real video.

The weights are random, so what is left out says nothing of accuracy; they are made so that tokens differ and about as much is left out as
published. A model and its dense twin compute different things: the difference of each from its own definition in float64, which for ours
are the published one and the choices made, is what must vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenops.models import (
    VITDET_B_1024,
    BackboneConfig,
    CompactVidTr,
    EventfulBackbone,
    HaltingConfig,
    HaltingVT,
    VidTr,
    VidTrConfig,
    ViTDetBackbone,
    ViTDetConfig,
    haltingvt,
    vidtr,
)
from tokenops.models.blocks import Block, MultiplyAdds
from tokenops.models.eventful import EventfulState
from tokenops.models.vidtr import TopKStd
from tokenops.models.vidtr_block import SeparableAttention

from . import models_plain as plain
from .frames import CHECKED, Frames, Stream, judged
from .harness import Contender, Cost, Dense, Request, Results, Trial
from .models_merging import MergingConfig, merging_by_sttm, merging_by_tome
from .models_subject import CLIPS, MODEL, OURS, PUBLISHED, SDPA, SHOWN, Layer, Subject, exactly, on_each, weights
from .picture import Panel, shaded

# no backends to choose among: the operators inside a model choose their own
BACKENDS = ()

HALTING_STRIDE = 16  # frames of the video between two of a clip; published are 32, and the excerpt is short
FILM_FRAMES = 5  # there and back again: 8 frames without end

TITLES = {
    "haltingvt": {
        "kept": "patches that the Glimpser keeps; the others are dimmed",
        "layers": "the brighter, the more layers a patch takes part in",
    },
    "eventful": {"updated": "tokens that the first gate lets through; the others are dimmed, and not computed"},
    "vidtr": {"kept": "the brighter, the more heads keep the frame at this location in the first pooling layer"},
    "sttm": {"clusters": "tokens of one colour are most like one meta token; those of a few frames in a row have merged"},
    "tome": {"clusters": "tokens of one colour have merged, whatever frames they are of"},
}


class Case(NamedTuple):
    name: str
    model: str  # a key of SUBJECTS
    config: Any
    dense: Any  # the configuration of its twin, where it has one
    k: int = 0  # tokens that each gate lets through
    mode: str = "exact"  # of attention on what changed
    start: float = 0.0  # of the halting channel in patches, the class token comes without
    drift: float = 0.0  # how much a joint layer adds to it
    small: bool = False  # a size for the demo: a model that learns nothing worth having, and shows everything
    dtype: str = "fp32"
    direction: str = "fwd"
    quick: bool = False


def _cases() -> Iterator[Case]:
    def halting(name: str, config: HaltingConfig, **options: Any) -> Case:
        # the features are compared, without heads on them
        config = config._replace(classes=0, motion=False)
        return Case(name, "haltingvt", config, config._replace(keep_rate=(), halting=False), **options)

    def eventful(name: str, config: ViTDetConfig, k: int, **options: Any) -> Case:
        backbone = config.backbone_config
        dense = config._replace(backbone_config=backbone._replace(block_class="Block", windowed_class="Block"))
        return Case(name, "eventful", config, dense, k=k, **options)

    def compact(name: str, config: VidTrConfig, dense: VidTrConfig, **options: Any) -> Case:
        return Case(name, "vidtr", config, dense, **options)

    def merging(name: str, model: str, config: MergingConfig, **options: Any) -> Case:
        return Case(name, model, config, config.dense(), **options)

    small = {"small": True, "quick": True}
    yield halting(
        "HaltingVT-small", HaltingConfig((1.0, 0.5), 20.0, frames=4, dim=192, num_heads=3, depth=8), start=3.0, drift=0.3, **small
    )
    grid = BackboneConfig(
        {"dim": 192, "heads": 3, "relative_embedding_size": (28, 28), "window_size": (7, 7)},
        depth=3,
        position_encoding_size=(14, 14),
        block_class="EventfulBlock",
        window_indices=(0, 1),
        windowed_class="EventfulTokenwiseBlock",
    )
    yield eventful("ViTDet-small-K128", ViTDetConfig((3, 224, 224), grid, patch_size=(8, 8), output_channels=32), 128, **small)
    sizes: dict[str, Any] = {"dim": 192, "depth": 8, "num_heads": 3, "mlp_dim": 768, "num_classes": 40}
    pools = {"pool_layers": (1, 3, 5), "pools": (TopKStd(2),) * 3}
    yield compact("C-VidTr-small", VidTrConfig(**sizes, **pools), VidTrConfig(**sizes), **small)

    width: dict[str, Any] = {"dim": 192, "depth": 8, "num_heads": 3, "frames": 8}
    yield merging("STTM-small", "sttm", MergingConfig(**width, layer=4, windows=2, mode="hard"), **small)
    yield merging("ToMe-small-r75", "tome", MergingConfig(**width, r=75), **small)

    yield halting("HaltingVT-S-G0.5", HaltingVT.PRESETS["minik_g05_beta20"], start=3.0, drift=0.15)
    # of 12 layers each third is global: three of them take a third of the time
    first = VITDET_B_1024._replace(backbone_config=VITDET_B_1024.backbone_config._replace(depth=3, window_indices=(0, 1)))
    for k in (768, 512):
        yield eventful(f"ViTDet-B-1024-three-blocks-K{k}", first, k)
    # where the published matrices stand: one of the global blocks alone
    alone = VITDET_B_1024._replace(backbone_config=VITDET_B_1024.backbone_config._replace(depth=1, window_indices=()))
    for k in (768, 512):
        yield eventful(f"ViTDet-B-1024-global-block-K{k}", alone, k)
        yield eventful(f"ViTDet-B-1024-global-block-paper-K{k}", alone, k, mode="paper")
    yield compact("C-VidTr-S", CompactVidTr.PRESETS["S"], VidTr.PRESETS["S"])
    # its first pooling layer, and what comes before
    first = VidTrConfig(depth=2, pool_layers=(1,), pools=(TopKStd(2),))
    yield Case("C-VidTr-S-attention", "separable", first, None)
    # the preset of attach_sttm
    for mode in ("soft", "hard"):
        yield merging(f"ViT-B-STTM-{mode}", "sttm", MergingConfig(768, 12, 12, layer=6, mode=mode))
    # all 24 layers: how many tokens one of them has left depends on all before
    yield merging("ViT-L-ToMe-r65", "tome", MergingConfig(1024, 24, 16, r=65))


CASES: tuple[Case, ...] = tuple(_cases())


def setting(case: Case) -> str:
    """In words, what says how much a model leaves out."""
    config = case.config
    words = {
        "haltingvt": lambda: f"keep {config.keep_rate[-1]:g}",
        "eventful": lambda: f"k {case.k}",
        "vidtr": lambda: f"drop {sum(pool.drop for pool in config.pools)}",
        "sttm": lambda: f"M {config.meta_tokens}",
        "tome": lambda: f"r {config.r}",
    }
    return words[case.model]()


def other_settings(case: Case) -> list[Case]:
    """The model leaving out less and more."""
    config = case.config
    if case.model == "haltingvt":
        first = config.keep_rate[:-1]
        return [case._replace(config=config._replace(keep_rate=(*first, rate))) for rate in (0.25, 0.75) if rate != config.keep_rate[-1]]
    if case.model == "eventful":
        return [case._replace(k=k) for k in (case.k // 4, case.k // 2, 2 * case.k)]
    if case.model == "vidtr":
        drops = [pool.drop for pool in config.pools]
        wanted = [[drop - 1 for drop in drops], [*drops[:-1], drops[-1] - 1], [*drops[:-1], drops[-1] + 1]]
        possible = [some for some in wanted if min(some) > 0 and sum(some) < config.frames]
        pools = [tuple(pool._replace(drop=drop) for pool, drop in zip(config.pools, some, strict=True)) for some in possible]
        return [case._replace(config=replace(config, pools=each)) for each in pools]
    if case.model == "sttm":
        return [case._replace(config=config._replace(meta_tokens=config.meta_tokens * n // 4)) for n in (1, 2, 8)]
    return [case._replace(config=config._replace(r=config.r * n // 3)) for n in (1, 2, 4)]


class Report(NamedTuple):
    """What the demo says of a model beside its times."""

    subject: Subject
    differences: list[float]  # of the first calls, relative to the dense twin; filled when the results are checked


def prepare(case: Case, request: Request) -> Trial:
    if case.dtype != "fp32":
        reason = "what halts or has changed is decided in float32: autocast would time something else"
        return Trial([Contender(MODEL, lambda: (), [reason], ours=True)], lambda: (), (), Cost(0, 0), {})
    return prepared(case, request)[0]


def prepared(case: Case, request: Request) -> tuple[Trial, Report]:
    subject = SUBJECTS[case.model](case, request)
    differences: list[float] = []
    has_twin = SDPA in subject.peers
    dense = subject.right[SDPA if has_twin else PUBLISHED]

    def judge(name: str, results: list[Results]) -> Results:
        """What the dense twin gives, if this is what its own definition says."""
        if name == MODEL:
            differences[:] = [((out - want).norm() / want.norm()).item() for [out], want in zip(results, dense(), strict=True)]
        return tuple(want + (out - mine) for [out], mine, want in zip(results, subject.right[name](), dense(), strict=True))

    contenders = [Contender(MODEL, subject.ours, ours=True, note="its operators choose their backends")]
    contenders += [Contender(name, stream) for name, stream in subject.peers.items()]

    def remark() -> str:
        left = ", ".join(f"{layer.name} {layer.left:.0f} of {layer.of} {layer.unit}" for layer in subject.layers)
        twin = "the dense twin" if has_twin else PUBLISHED
        return f"{left}; relative difference from {twin}: {', '.join(f'{error:.2g}' for error in differences)}"

    trial = Trial(
        contenders=[judged(contender, partial(judge, contender.name)) for contender in contenders],
        expected=lambda: tuple(dense()),
        names=[f"call {at + 1}" for at in range(CHECKED)],
        cost=Cost(2 * subject.cost.total, subject.weights + subject.frames.grids[0][0].nbytes),
        backends={},
        remark=remark,
        dense=Dense((SDPA, OURS), 2 * subject.dense.total) if has_twin else None,
    )
    return trial, Report(subject, differences)


def _mean(costs: Sequence[MultiplyAdds]) -> MultiplyAdds:
    return MultiplyAdds(*(sum(parts) // len(costs) for parts in zip(*costs, strict=True)))


def _pixels(film: Tensor, chosen: Tensor) -> Tensor:  # [T, SIDE, SIDE, 3] in 0 .. 1
    return film[chosen] / 255


# HaltingVT


@torch.no_grad()
def _halting(case: Case, request: Request) -> Subject:
    config: HaltingConfig = case.config
    film = request.frames()
    chosen = vidtr.sample_frames(len(film), config.frames, HALTING_STRIDE, clips=CLIPS)
    clips = [haltingvt.preprocess(film[at], config.image_size)[None].to(request.device) for at in chosen]
    model = HaltingVT(config).eval()
    plain.liven(model, 0.8)
    # without training nothing pushes the halting channel up, layer by layer and patches first; nor may a layer push all tokens at once
    model.patch_embed.proj.bias[0] += case.start
    for block in model.blocks[len(config.keep_rate) :]:
        block.mlp.fc2.bias[0] += case.drift
        for matrix in (block.attn.proj.weight, block.mlp.fc2.weight):
            matrix[0] *= 0.25
    model.to(request.device)
    stats = [model(clip, return_stats=True)[1] for clip in clips]
    counts = torch.cat([each.token_counts for each in stats]).cpu()
    side = config.image_size // config.patch_size
    tokens = 1 + stats[0].kept[-1].shape[2] * config.frames
    layers = [Layer("Glimpser", "patches of a frame", stats[0].kept[-1].shape[2], side * side)]
    first = len(config.keep_rate)
    layers += [Layer(f"block {first + at}", "tokens", left, tokens) for at, left in enumerate(counts.double().mean(0).tolist())]
    cost = config.flops(token_counts=counts)
    dense = case.dense.flops().published
    frames = Frames([(clip,) for clip in clips], [])
    masked, whole = exactly(plain.halting, model, clips), exactly(plain.joint_vit, model, clips)

    def panels() -> dict[str, list[Panel]]:
        kept = stats[0].kept[-1][0].cpu()  # [T, K]
        depth = stats[0].layers[0, 1:].view(-1, config.frames).T.cpu() / counts.shape[1]  # [T, K]
        on_grid = torch.zeros(2, config.frames, side * side)
        on_grid[0].scatter_(1, kept, 1.0)
        on_grid[1].scatter_(1, kept, depth)
        shares = on_grid.unflatten(2, (side, side))
        pixels = _pixels(film, chosen[0])
        some = torch.linspace(0, config.frames - 1, SHOWN).long().tolist()
        return {
            "kept": [shaded(pixels[t], shares[0, t], f"frame {chosen[0][t]}: {kept.shape[1]} of {side * side} patches") for t in some],
            "layers": [
                shaded(pixels[t], shares[1, t], f"frame {chosen[0][t]}: {depth[t].mean() * counts.shape[1]:.1f} layers on average")
                for t in some
            ],
        }

    return Subject(
        frames=frames,
        shown=config.frames,
        ours=on_each(frames, model),
        peers={
            SDPA: on_each(frames, partial(plain.joint_vit, model)),
            OURS: on_each(frames, partial(plain.joint_vit, model, block=Block.forward)),
            PUBLISHED: on_each(frames, partial(plain.halting, model)),
        },
        right={MODEL: masked, SDPA: whole, OURS: whole, PUBLISHED: masked},
        cost=MultiplyAdds(cost.total // CLIPS, cost.published // CLIPS),
        # a whole transformer in both conventions
        dense=MultiplyAdds(dense, dense),
        weights=weights(model),
        layers=layers,
        panels=panels,
    )


# Eventful Transformers


@torch.no_grad()
def _eventful(case: Case, request: Request) -> Subject:
    film = request.frames()
    first = (len(film) - FILM_FRAMES) // 2
    side = case.config.input_shape[1]
    pictures = F.interpolate(film[first : first + FILM_FRAMES].permute(0, 3, 1, 2) / 255, (side, side), mode="bilinear")
    whole = ViTDetBackbone(case.config, ("topk", {"k": case.k}), case.mode).eval()
    plain.liven(whole, 1.0)
    model, twin = whole.backbone, ViTDetBackbone(case.dense).backbone.eval()
    twin.load_state_dict(model.state_dict())
    once = whole.patch_embed.proj(whole.preprocess(pictures)).flatten(2).mT.to(request.device).unbind(0)
    model.to(request.device), twin.to(request.device)
    inputs = [x[None].contiguous() for x in (*once[1:], *once[-2::-1])]
    frames = Frames([(x,) for x in inputs], [])

    def start() -> EventfulState:
        return model(inputs[-1])[1]

    def step(state: EventfulState, at: int) -> tuple[Results, EventfulState]:
        out, state = model(inputs[at], state)
        return (out,), state

    # once around: what the gates choose, and what it costs
    state, costs, lists = start(), [], []
    for at in range(len(inputs)):
        state = step(state, at)[1]
        costs.append(model.flops(state))
        lists.append({name: index.clone() for name, index in state.indices().items()})

    def published_start() -> list[dict[str, Tensor]]:
        states: list[dict[str, Tensor]] = [{} for _ in model.blocks]
        plain.eventful(model, case.k, inputs[-1], states)
        return states

    def published_step(states: list[dict[str, Tensor]], at: int) -> tuple[Results, list[dict[str, Tensor]]]:
        return (plain.eventful(model, case.k, inputs[at], states),), states

    @torch.no_grad()
    def chosen_alike(mode: str, lists: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """The first frames in float64, every gate choosing what it chose."""
        exact = EventfulBackbone(model.config, ("topk", {"k": case.k}), mode).eval().to(inputs[0].device)
        exact.load_state_dict(model.state_dict())
        exact.double()
        outs, state = [], exact(inputs[-1].double())[1]
        for x, chosen in zip(inputs[:CHECKED], lists, strict=False):
            out, state = exact(x.double(), state, chosen)
            outs.append(out.clone())
        return outs

    @torch.no_grad()
    def published() -> list[Tensor]:
        states, made = published_start(), []
        for x in inputs[:CHECKED]:
            made.append({})
            plain.eventful(model, case.k, x, states, made[-1])
        return chosen_alike("paper", made)

    tokens = inputs[0].shape[1]
    layers = []
    for at, block in enumerate(model.blocks):
        layers.append(Layer(f"block {at}", "tokens at each gate", case.k, tokens))
        if block.window is not None:
            ids = [each[f"blocks.{at}.qkv_gate"] for each in lists]
            size = block.window[0] * block.window[1]
            touched = [block.touched(row[row >= 0]) // size for row in ids]
            layers.append(Layer(f"block {at}", "windows", sum(touched) / len(touched), block.padded[0] * block.padded[1] // size))

    def panels() -> dict[str, list[Panel]]:
        shown = []
        for at, chosen in enumerate(lists[:SHOWN], first + 1):
            share = torch.zeros(tokens)
            share[chosen["blocks.0.qkv_gate"][0].long().cpu()] = 1.0
            shown.append(shaded(film[at] / 255, share.view(model.grid), f"frame {at}: {case.k} of {tokens} tokens"))
        return {"updated": shown}

    dense = exactly(plain.vitdet, twin, inputs)
    return Subject(
        frames=frames,
        shown=1,
        ours=Stream(len(inputs), torch.no_grad()(start), torch.no_grad()(step)),
        peers={
            SDPA: on_each(frames, partial(plain.vitdet, twin)),
            OURS: on_each(frames, lambda x: twin(x)[0]),
            PUBLISHED: Stream(len(inputs), torch.no_grad()(published_start), torch.no_grad()(published_step)),
        },
        right={MODEL: cache(partial(chosen_alike, case.mode, lists)), SDPA: dense, OURS: dense, PUBLISHED: cache(published)},
        cost=_mean(costs),
        dense=twin.flops(),
        weights=weights(model),
        layers=layers,
        panels=panels,
    )


# VidTr


def _clips(config: VidTrConfig, request: Request) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The film, which of its frames make clips, and these."""
    assert config.frames is not None
    film = request.frames()
    chosen = vidtr.sample_frames(len(film), config.frames, config.stride, clips=CLIPS)
    return film, chosen, [clip[None].to(request.device) for clip in vidtr.preprocess(film, chosen, crops=1)]


def _kept_panels(film: Tensor, chosen: Tensor, kept: Tensor) -> dict[str, list[Panel]]:  # [N, H, K]
    heads = F.one_hot(kept.long().cpu(), len(chosen)).sum(2).float().mean(1)  # [N, T]
    side = round(len(heads) ** 0.5)
    pixels = _pixels(film, chosen)
    panels = []
    for t in torch.linspace(0, len(chosen) - 1, SHOWN).long().tolist():
        share = heads[:, t].view(side, side)
        panels.append(shaded(pixels[t], share, f"frame {int(chosen[t])}: {100 * share.mean().item():.0f} % keep it"))
    return {"kept": panels}


@torch.no_grad()
def _vidtr(case: Case, request: Request) -> Subject:
    config: VidTrConfig = case.config
    film, chosen, clips = _clips(config, request)
    model, twin = CompactVidTr(config).eval(), VidTr(case.dense).eval()
    for each in (model, twin):
        plain.liven(each, 1.0)
    # alike in everything but their class tokens and positions
    shared = {name: value for name, value in model.state_dict().items() if name in twin.state_dict() and "embed" not in name}
    twin.load_state_dict(shared, strict=False)
    model.to(request.device), twin.to(request.device)
    kept = [model(clip, return_indices=True)[1] for clip in clips]
    published: list[list[Tensor]] = [[] for _ in clips]
    for clip, rows in zip(clips, published, strict=True):
        plain.vidtr(model, clip, chosen=rows)
    left, layers = config.frames, []
    for at, pool in zip(config.pool_layers, config.pools, strict=True):
        layers.append(Layer(f"block {at}", "frames", left - pool.drop, left))
        left -= pool.drop

    frames = Frames([(clip,) for clip in clips], [])
    dense = exactly(plain.vidtr, twin, clips)
    return Subject(
        frames=frames,
        shown=config.frames,
        ours=on_each(frames, model),
        peers={
            SDPA: on_each(frames, partial(plain.vidtr, twin)),
            OURS: on_each(frames, twin),
            PUBLISHED: on_each(frames, partial(plain.vidtr, model)),
        },
        right={
            MODEL: exactly(plain.vidtr, model, clips, kept),
            SDPA: dense,
            OURS: dense,
            PUBLISHED: exactly(plain.vidtr, model, clips, published),
        },
        cost=model.flops(),
        dense=twin.flops(),
        weights=weights(model),
        layers=layers,
        panels=partial(_kept_panels, film, chosen[0], kept[0][0][0]),
    )


@torch.no_grad()
def _separable(case: Case, request: Request) -> Subject:
    """The last layer's attention alone, with its projections, on the normalised tokens that come to it."""
    config: VidTrConfig = case.config
    film, chosen, clips = _clips(config, request)
    model = CompactVidTr(config).eval()
    plain.liven(model, 1.0)
    model.to(request.device)
    inputs: list[Tensor] = []
    block, rows, columns = model.blocks[-1], clips[0].shape[2], config.cells // clips[0].shape[2]
    attn = block.attn
    listening = attn.register_forward_pre_hook(lambda _, given: inputs.append(block.norm1(given[0])))
    kept = [model(clip, return_indices=True)[1][0] for clip in clips]
    listening.remove()
    with torch.device("meta"):
        dense = SeparableAttention(config.dim, config.num_heads).multiply_adds(rows, columns)
    published = [plain.separable(attn, x, rows)[1] for x in inputs]

    def alone(attn: torch.nn.Module, x: Tensor, index: Tensor | None = None) -> Tensor:
        return plain.separable(attn, x, rows, index)[0]

    total = attn.multiply_adds(rows, columns)
    frames = Frames([(x,) for x in inputs], [])
    return Subject(
        frames=frames,
        shown=rows,
        ours=on_each(frames, lambda x: attn(x, rows)[0]),
        peers={PUBLISHED: on_each(frames, partial(alone, attn))},
        right={MODEL: exactly(alone, attn, inputs, kept), PUBLISHED: exactly(alone, attn, inputs, published)},
        cost=MultiplyAdds(total, total),
        dense=MultiplyAdds(dense, dense),
        weights=weights(attn),
        layers=[Layer("attention", "frames", attn.kept_of(rows), rows)],
        panels=partial(_kept_panels, film, chosen[0], kept[0][0]),
    )


SUBJECTS: dict[str, Callable[[Case, Request], Subject]] = {
    "haltingvt": _halting,
    "eventful": _eventful,
    "vidtr": _vidtr,
    "separable": _separable,
    "sttm": lambda case, request: merging_by_sttm(case.config, request),
    "tome": lambda case, request: merging_by_tome(case.config, request),
}
