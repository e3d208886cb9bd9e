"""Small video transformers learn to tell motions apart on a CPU, and are compared by what their accuracy costs. Nothing is downloaded.

    python examples/train_motion.py                                    all models, one after the other
    python examples/train_motion.py --model halting --steps 300        one of them, for less long
    torchrun --nproc-per-node 2 examples/train_motion.py               each batch divided among two processes

The clips are those of motion.py. Reduced models come about in either of two ways: STTM, HaltingVT and C-VidTr are trained as they are, and
a ViViT with eventful gates in half of each batch; Token Merging is added to the trained dense baseline, as in its paper.

A run that was interrupted goes on where its last checkpoint was. A model that is trained already is only measured again, so a last call
with all models makes the table and the picture. Needs `pip install 'tokenops[bench]'`.

Letters: B clips, T triples of frames, N tokens, C channels; S pixels are the side of a frame.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from motion import MOTIONS, SIDE, TRIPLES, Scenes, draw, render
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenops.benchmarks.allocator import restart_environment
from tokenops.benchmarks.chart import COLOURS, MARKS
from tokenops.benchmarks.environment import environment
from tokenops.benchmarks.harness import Spread
from tokenops.models import (
    BackboneConfig,
    CompactVidTr,
    HaltingConfig,
    HaltingVT,
    TopKStd,
    VidTrConfig,
    ViViT,
    ViViTConfig,
    attach_sttm,
    attach_tome,
    sttm,
    tome,
)
from tokenops.models.blocks import Block
from tokenops.models.haltingvt_layers import PatchEmbed

PATCH = 8
GRID = SIDE // PATCH
DIM, HEADS, DEPTH = 64, 2, 5
PONDER = 2e-3  # weight of the ponder cost in HaltingVT's loss
CHOSEN = (14, 10, 6)  # how many of a step's 37 tokens the eventful gates let through, setting by setting; the first is trained with
MERGED = (12, 24, 32)  # tokens that ToMe merges in each block, of 145 at first, setting by setting
# STTM makes 4 times 12 tokens of 4 times 36, before the third block
STTM = {"layers": (2,), "windows": (4,), "meta_tokens": (12,)}

WARM_UP = 100  # steps in which the learning rate rises
TEST_SEED = 1_000_000_000  # of the clips that models are compared on
TEST_BATCH = 64
# what a reduced model is meant to keep, and to need at most
POINTS, SHARE = 0.02, 0.60


class Dense(nn.Module):
    """The baseline: a class token and all patches of all frames, every token attending to every token in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(PATCH, DIM)
        self.cls_token = nn.Parameter(torch.empty(1, 1, DIM).normal_(std=0.02))
        self.pos_embed = nn.Parameter(torch.empty(1, 1, GRID * GRID, DIM).normal_(std=0.02))
        self.time_embed = nn.Parameter(torch.empty(1, TRIPLES, 1, DIM).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(DIM, HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM, 1e-6)
        self.head = nn.Linear(DIM, len(MOTIONS))

    def forward(self, clips: Tensor) -> Tensor:  # [B, 3, T, S, S] -> [B, classes]
        x = self.patch_embed(clips).permute(0, 3, 1, 2, 4).flatten(2, 3)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), (x + self.pos_embed + self.time_embed).flatten(1, 2)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class WithSTTM(Dense):
    """The baseline with STTM in it, which is trained along with it."""

    def __init__(self) -> None:
        super().__init__()
        attach_sttm(self, grid=(TRIPLES, GRID, GRID), **STTM)


class SmallViViT(ViViT):
    """Half of each batch trains it without gates, as if each step were a first frame, so that one set of weights serves both ways."""

    def __init__(self) -> None:
        block = {"dim": DIM, "heads": HEADS}
        spatial = BackboneConfig(block, DEPTH - 1, (GRID, GRID), block_class="EventfulBlock")
        temporal = BackboneConfig(block, 2, (TRIPLES,))
        shape = (TRIPLES, 3, SIDE, SIDE)
        config = ViViTConfig(len(MOTIONS), shape, spatial, temporal, spatial_views=1, temporal_views=1, tubelet_shape=(1, PATCH, PATCH))
        super().__init__(config, ("topk", {"k": CHOSEN[0]}), mode="exact")

    def forward(self, clips: Tensor, k: int | None = None, ungated: int = 0) -> Tensor:  # [B, 3, T, S, S] -> [B, classes]
        """With ``k`` the gates let so many tokens through, from a clip's second step on, except in the first ``ungated`` clips."""
        gated, features = clips[len(clips) if k is None else ungated :], []
        if len(gated) < len(clips):
            steps = self.patch_embed(clips[: len(clips) - len(gated)].transpose(1, 2))
            features.append(self.spatial_model(steps.flatten(0, 1))[0].unflatten(0, steps.shape[:2]))
        if len(gated):
            self.spatial_model.backbone.set_policy(("topk", {"k": k}))
            features.append(self.features(gated.transpose(1, 2)))
        return self.classify(torch.cat(features))


def small_halting() -> HaltingVT:
    return HaltingVT(
        HaltingConfig(
            keep_rate=(1.0, 0.5),
            # from random weights: with the published centres, made for pretrained ones, no token would ever come near halting
            halt_center=10.0,
            frames=TRIPLES,
            classes=len(MOTIONS),
            dim=DIM,
            depth=DEPTH,
            num_heads=HEADS,
            image_size=SIDE,
            patch_size=PATCH,
            drop_path=0.0,
            motion=False,
        )
    )


def small_vidtr() -> CompactVidTr:
    return CompactVidTr(
        VidTrConfig(
            frames=TRIPLES,
            cells=TRIPLES * GRID * GRID,
            dim=DIM,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_dim=4 * DIM,
            num_classes=len(MOTIONS),
            patch=PATCH,
            pool_layers=(1, 2),
            # without the release's second softmax, which levels rows that are probabilities already
            pools=(TopKStd(1, resoftmax=False),) * 2,
            # no clip comes twice, so there is nothing to regularise
            dropout=0.0,
            head_dropout=0.0,
        )
    )


# clips to logits, and to a function that says how many multiply-adds all of them took
Run = Callable[[Tensor], tuple[Tensor, Callable[[], int]]]


class Recipe(NamedTuple):
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]  # of the model or its data-parallel wrapper, clips and labels
    runs: Callable[[Any], dict[str, Run]]  # the trained model's settings to be compared


def plain_loss(model: nn.Module, clips: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(clips), labels)


def gated_loss(model: nn.Module, clips: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(clips, CHOSEN[0], len(clips) // 2), labels)


def halting_loss(model: nn.Module, clips: Tensor, labels: Tensor) -> Tensor:
    logits, stats = model(clips, return_stats=True)
    return F.cross_entropy(logits, labels) + PONDER * stats.rho.mean()


def halting_run(model: HaltingVT, clips: Tensor) -> tuple[Tensor, Callable[[], int]]:
    result = model(clips, return_stats=True)
    assert isinstance(result, tuple)
    logits, stats = result
    return logits, lambda: model.flops(token_counts=stats.token_counts).total


def fixed(call: Callable[[Tensor], Any], each: int) -> Run:
    """Where every clip takes as many multiply-adds."""
    return lambda clips: (call(clips), lambda: each * len(clips))


def dense_flops(r: int = 0) -> int:
    """Multiply-adds of a clip, with ToMe if r > 0."""
    tokens = {"tokens": 1 + TRIPLES * GRID * GRID, "protected": 1}
    return tome.flops(r, depth=DEPTH, dim=DIM, num_heads=HEADS, patch=3 * PATCH * PATCH, **tokens).total + DIM * len(MOTIONS)


def sttm_flops() -> int:
    tokens = {"grid": (TRIPLES, GRID, GRID), "protected": 1}
    return sttm.flops(**STTM, depth=DEPTH, dim=DIM, patch=3 * PATCH * PATCH, **tokens).total + DIM * len(MOTIONS)


def dense_runs(model: Dense) -> dict[str, Run]:
    """As it was trained, and with ToMe, which needs no training."""
    runs = {"dense": fixed(model, dense_flops())}
    for r in MERGED:
        merging = copy.deepcopy(model)
        attach_tome(merging, r)
        runs[f"ToMe, r {r}"] = fixed(merging, dense_flops(r))
    return runs


def eventful_runs(model: SmallViViT) -> dict[str, Run]:
    runs = {"eventful, all tokens": fixed(model, model.flops().total)}
    for k in CHOSEN:
        runs[f"eventful, {k} tokens"] = fixed(lambda clips, k=k: model(clips, k), model.flops(k).total)
    return runs


RECIPES = {
    "dense": Recipe(Dense, plain_loss, dense_runs),
    "sttm": Recipe(WithSTTM, plain_loss, lambda model: {"STTM": fixed(model, sttm_flops())}),
    "halting": Recipe(small_halting, halting_loss, lambda model: {"HaltingVT": lambda clips: halting_run(model, clips)}),
    "eventful": Recipe(SmallViViT, gated_loss, eventful_runs),
    "vidtr": Recipe(small_vidtr, plain_loss, lambda model: {"C-VidTr": fixed(model, model.flops().total)}),
}


def build(name: str) -> nn.Module:
    """A model of this name, with random weights that are large enough.

    Those that vision transformers usually begin with, of a deviation of 0.02, are made for widths like 768. At this width a layer would
    add next to nothing to its input, tokens would hardly know their places, and the loss would stay at chance for hundreds of steps.
    """
    model = RECIPES[name].build()
    for part in model.modules():
        # a layer of zeros is closed on purpose
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d)) and part.weight.any():
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
    for key, parameter in model.named_parameters():
        if key.endswith(("pos_embed", "time_embed")):
            nn.init.normal_(parameter, std=0.3)
    return model


class Options(NamedTuple):
    """What decides the weights of a trained model."""

    steps: int = 800
    batch: int = 32  # of all processes together
    seed: int = 0
    rate: float = 2e-3


class Trained(NamedTuple):
    model: nn.Module
    losses: list[float]  # step by step; of the whole batch
    seconds: float  # spent on training, in all of its sittings


def learning_rate(step: int, options: Options) -> float:
    """Rises in a straight line, and then falls along half a cosine."""
    warm_up = min(WARM_UP, options.steps // 10)
    if step < warm_up:
        return options.rate * (step + 1) / warm_up
    return options.rate * 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / (options.steps - warm_up)))


def train(
    name: str, options: Options, checkpoint: Path, *, save_every: int = 100, on_step: Callable[[int, float], None] = lambda step, loss: None
) -> Trained:
    """The model of this name after all steps: from the beginning, or from the checkpoint on if there is one.

    In a process group each process renders and computes its part of each batch, and the first one writes the checkpoints.

    Raises:
        ValueError: the batch cannot be divided among the processes, or the checkpoint was made with other options.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if options.batch % world:
        raise ValueError(f"batch must be a multiple of the {world} processes, got {options.batch}")
    torch.manual_seed(options.seed)
    model = build(name).train()
    # gradients that are zero but for rounding, as those of key biases, stay without effect by this eps; with the usual one a run would
    # depend on how many processes summed them
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.05, eps=1e-6)
    generator = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    seconds = 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["made_with"] != {"model": name, **options._asdict()}:
            raise ValueError(f"{checkpoint} must have been made with {name} and {options}, got {saved['made_with']}: move it away")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        losses, seconds = saved["losses"], saved["seconds"]
    parallel = DistributedDataParallel(model) if world > 1 else model
    mine = slice(rank * options.batch // world, (rank + 1) * options.batch // world)
    begin = time.perf_counter() - seconds
    for step in range(len(losses), options.steps):
        # all processes draw all scenes, so that their generators stay alike
        scenes = Scenes._make(part[mine] for part in draw(options.batch, generator))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        loss = RECIPES[name].loss(parallel, render(scenes), scenes.label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world)
        on_step(step + 1, losses[-1])
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == options.steps):
            seconds = time.perf_counter() - begin
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            progress = {"made_with": {"model": name, **options._asdict()}, "losses": losses, "seconds": seconds}
            # a checkpoint is never half of one
            unfinished = checkpoint.with_suffix(".unfinished")
            torch.save({**state, **progress}, unfinished)
            os.replace(unfinished, checkpoint)
    return Trained(model.eval(), losses, seconds)


class Point(NamedTuple):
    """A setting of a model."""

    label: str  # family, and what follows a comma says which member
    accuracy: float
    macs: float  # of a clip
    ms: Spread  # for a clip, in batches
    minutes: float  # that its model was trained, in all of its sittings

    @property
    def family(self) -> str:
        return self.label.partition(",")[0]


@torch.no_grad()
def compare(models: Mapping[str, Trained], clips: int, batch: int, on_batch: Callable[[], None] = lambda: None) -> list[Point]:
    """All settings of all models on the same clips, batch by batch in turn, so that drift of the machine falls on all alike."""
    runs = [(*part, trained) for name, trained in models.items() for part in RECIPES[name].runs(trained.model).items()]
    right, macs = [0] * len(runs), [0] * len(runs)
    times: list[list[float]] = [[] for _ in runs]
    generator = torch.Generator().manual_seed(TEST_SEED)
    for first in range(0, clips, batch):
        scenes = draw(min(batch, clips - first), generator)
        pixels = render(scenes)
        for at, (_, run, _) in enumerate(runs):
            if first == 0:
                run(pixels)
            begin = time.perf_counter()
            logits, cost = run(pixels)
            times[at].append((time.perf_counter() - begin) * 1e3 / len(pixels))
            right[at] += int((logits.argmax(1) == scenes.label).sum())
            macs[at] += cost()
        on_batch()
    return [
        Point(label, right[at] / clips, macs[at] / clips, Spread.of(times[at]), trained.seconds / 60)
        for at, (label, _, trained) in enumerate(runs)
    ]


def table_of(points: Sequence[Point]) -> Table:
    title = f"{len(MOTIONS)} motions, clips of {3 * TRIPLES} frames of {SIDE} x {SIDE} pixels; a MAC is a multiply-add"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("model", no_wrap=True)
    # every heading breaks into words short enough for a terminal of 80 columns
    goal = f"{POINTS * 100:.0f} points, {SHARE:.0%}"
    for heading in ("right", "M MACs", "of dense", "ms per clip", "of dense", "min to train", goal):
        table.add_column(heading, justify="right")
    dense = next((point for point in points if point.label == "dense"), None)
    for point in points:
        share = duration = verdict = ""
        if dense is not None and point is not dense:
            share, duration = f"{point.macs / dense.macs:.0%}", f"{point.ms.median / dense.ms.median:.0%}"
            # where gates are added to a model, it has to hold against that one too
            twins = [dense, *(other for other in points if other.label == f"{point.family}, all tokens")]
            if point not in twins:
                kept = all(point.accuracy >= twin.accuracy - POINTS and point.macs <= SHARE * twin.macs for twin in twins)
                verdict = "yes" if kept else "no"
        accuracy, macs, ms = f"{point.accuracy:.1%}", f"{point.macs / 1e6:.1f}", f"{point.ms.median:.2f}"
        table.add_row(point.label, accuracy, macs, share, ms, duration, f"{point.minutes:.1f}", verdict)
    return table


def draw_curves(points: Sequence[Point], conditions: str, path: Path) -> None:
    """Accuracy against multiply-adds, and against time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True, layout="constrained")
    for axes, title in zip(panels, ("million multiply-adds of a clip", "ms per clip, median; whiskers: quartiles"), strict=True):
        for at, family in enumerate(dict.fromkeys(point.family for point in points)):
            some = [point for point in points if point.family == family]
            colour, mark = COLOURS[at % len(COLOURS)], MARKS[at % len(MARKS)]
            places = [point.macs / 1e6 if axes is panels[0] else point.ms.median for point in some]
            heights = [100 * point.accuracy for point in some]
            axes.plot(places, heights, mark + "-", color=colour, markersize=6, markeredgecolor="white", linewidth=1, label=family)
            if axes is panels[1]:
                for point, height in zip(some, heights, strict=True):
                    axes.plot([point.ms.low, point.ms.high], [height, height], color=colour, linewidth=1.5, alpha=0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel(title, fontsize=8.5)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.tick_params(length=0, labelsize=8)
        for side in axes.spines.values():
            side.set_visible(False)
    panels[0].set_ylabel("accuracy in percent", fontsize=8.5)
    panels[0].legend(frameon=False, fontsize=8.5)
    figure.suptitle(conditions, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", "names", multiple=True, type=click.Choice(list(RECIPES)), help="Repeatable.  [default: all]", show_default=False)
@click.option("--steps", type=click.IntRange(min=1), default=Options().steps)
@click.option("--batch", type=click.IntRange(min=1), default=Options().batch, help="Clips in a step, of all processes together.")
@click.option("--seed", type=click.IntRange(0, TEST_SEED - 1), default=Options().seed)
@click.option("--clips", type=click.IntRange(min=1), default=2048, help="To compare on; the same ones whatever the seed.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("motion-out"), help="For checkpoints and results.")
def main(names: tuple[str, ...], steps: int, batch: int, seed: int, clips: int, out: Path) -> None:
    """Train small video transformers to recognise motion, then compare accuracy, multiply-adds and time."""
    options = Options(steps, batch, seed)
    out.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    first = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    models: dict[str, Trained] = {}
    with Progress(*columns, console=console) if first else nullcontext() as progress:
        for name in names or RECIPES:
            task = progress.add_task(name, total=steps) if progress else None

            def show(step: int, loss: float, name: str = name, task: Any = task) -> None:
                if progress:
                    progress.update(task, completed=step, description=f"{name}  loss {loss:.3f}")

            try:
                models[name] = train(name, options, out / f"{name}.pt", on_step=show)
            except ValueError as error:
                raise click.ClickException(str(error)) from error
            if progress:
                recent = models[name].losses[-100:]
                seconds = models[name].seconds
                done = f"{name}  loss {sum(recent) / len(recent):.3f}, {seconds / 60:.1f} min, {seconds / steps * 1e3:.0f} ms a step"
                progress.update(task, completed=steps, description=done)
        if dist.is_initialized():
            dist.destroy_process_group()
        if not progress:
            return
        task = progress.add_task("comparing", total=-(-clips // TEST_BATCH))
        points = compare(models, clips, TEST_BATCH, lambda: progress.advance(task))
    env = environment()
    machine = f"{env['cpu']}, {env['threads']} threads, torch {env['torch']}, {env['date'][:10]}"
    conditions = f"{machine}; {steps} steps of {batch} clips, seed {seed}"
    console.print(table_of(points))
    console.print(f"{clips} clips in batches of {TEST_BATCH}; {conditions}")
    numbers = [{**point._asdict(), "ms": point.ms._asdict()} for point in points]
    (out / "motion.json").write_text(json.dumps({"environment": env, "options": options._asdict(), "points": numbers}, indent=1) + "\n")
    draw_curves(points, conditions, out / "motion.png")
    console.print(f"numbers {out / 'motion.json'}, picture {out / 'motion.png'}")


if __name__ == "__main__":
    # a step frees and asks for large blocks again and again; by default glibc gives each back to the kernel, and page faults take over
    quieter = restart_environment(os.environ)
    if quieter is not None:
        os.execve(sys.executable, [sys.executable, *sys.argv], quieter)
    main()
