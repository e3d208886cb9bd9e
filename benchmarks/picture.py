"""What merging does, to look at: a frame of a video, and its tokens after each round in the mean colours of their clusters."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import tokenops
from tokenops.types import MergePlan

from . import video
from .chart import ChartError

PATCH = 8  # pixels: 28 x 28 tokens, small enough for clusters to have shapes
ROUNDS = 3  # of merging; each leaves half of the tokens
GRID = video.SIDE // PATCH

# how much the place of a token counts beside its pixels, and how little their direction does beside their difference
PLACE = 0.3
CONSTANT = 3.0


class Clusters(NamedTuple):
    """The tokens of a frame after a round of merging."""

    member: Tensor  # [GRID, GRID] int32, the cluster of each patch
    colour: Tensor  # [GRID, GRID, 3] float32 in 0 .. 1, the mean colour of that cluster
    count: int


def merge_frame(frame: Tensor, backend: str | None = None) -> list[Clusters]:  # [SIDE, SIDE, 3] uint8 -> one for each round
    """Halves the tokens again and again, as a model does from layer to layer."""
    patches = video.patchify(frame[None, None], PATCH)[0]
    metric, colour = _features(patches), patches.unflatten(2, (-1, 3)).mean(2)
    size = metric.new_ones(metric.shape[:2])
    whole: MergePlan | None = None
    rounds = []
    for _ in range(ROUNDS):
        plan = tokenops.match_tokens(metric, ratio=0.5, backend=backend)
        metric = tokenops.merge_tokens(metric, plan, size=size, backend=backend)
        size = tokenops.merge_tokens(size, plan, mode="sum", backend=backend)
        whole = plan if whole is None else tokenops.compose_plans(whole, plan)
        mean = tokenops.unmerge_tokens(tokenops.merge_tokens(colour, whole, backend=backend), whole, backend=backend)
        rounds.append(Clusters(whole.slot.view(GRID, GRID), (mean.view(GRID, GRID, 3) + 1) / 2, plan.n_out))
    return rounds


def _features(patches: Tensor) -> Tensor:  # [1, N, C] -> [1, N, C + 8]
    """What is compared, in place of a model's keys: pixels and place. Beside a large constant their differences decide the cosine, where
    alone any two grey patches would point the same way.
    """
    pixels = (patches - patches.mean()) / patches.std() * patches.shape[2] ** -0.5
    line = torch.linspace(-1, 1, GRID)
    place = PLACE * torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(1, -1, 2)
    # spread over several columns, so that their number suits the kernels
    constant = torch.full((1, GRID * GRID, 6), CONSTANT * 6**-0.5)
    return torch.cat([pixels, place, constant], -1)


def draw(frame: Tensor, rounds: list[Clusters], path: Path, title: str) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.collections import LineCollection
    except ImportError:
        raise ChartError("a picture needs matplotlib; install it with: pip install 'tokenops[bench]'") from None
    figure, axes = plt.subplots(1, 1 + len(rounds), figsize=(3.2 * (1 + len(rounds)), 3.7), layout="constrained")
    axes[0].imshow(frame.numpy(), extent=(0, GRID, GRID, 0))
    axes[0].set_title(f"{GRID * GRID} tokens of {PATCH} x {PATCH} pixels", fontsize=10)
    for panel, clusters in zip(axes[1:], rounds, strict=True):
        panel.imshow(clusters.colour.numpy(), extent=(0, GRID, GRID, 0))
        panel.add_collection(LineCollection(borders(clusters.member), colors="white", linewidths=0.6))
        panel.set_title(f"{clusters.count} after merging", fontsize=10)
    for panel in axes:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ChartError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        plt.close(figure)


def borders(member: Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Lines ((x, y), (x, y)) between neighbouring patches of different clusters."""
    upright = (member[:, 1:] != member[:, :-1]).nonzero().tolist()
    level = (member[1:] != member[:-1]).nonzero().tolist()
    return [((x + 1, y), (x + 1, y + 1)) for y, x in upright] + [((x, y + 1), (x + 1, y + 1)) for y, x in level]
