"""What the rooms do, to look at: the tokens of a frame after each round of merging in the mean colours of their clusters; and the tokens
of frames in a row that changed enough to be sent on.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenops
from tokenops.types import MergePlan

from . import chart, video
from .delta_matmul import NOTICED

PATCH = 8  # pixels: 28 x 28 tokens, small enough for clusters to have shapes
ROUNDS = 3  # of merging; each leaves half of the tokens
GRID = video.SIDE // PATCH

# how much the place of a token counts beside its pixels, and how little their direction does beside their difference
PLACE = 0.3
CONSTANT = 3.0

SHOWN = 4  # frames in a row
TINT = 0.4  # how much of a patch is the colour of its group
DIMMED = 0.3  # how bright tokens are that were not sent on


class Panel(NamedTuple):
    """A picture with lines between groups of patches."""

    image: Tensor  # [height, width, 3], float32 in 0 .. 1
    member: Tensor | None  # [rows, columns], the group of each patch
    title: str


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


def merged_panels(frame: Tensor, rounds: list[Clusters]) -> list[Panel]:
    first = Panel(frame / 255, None, f"{GRID * GRID} tokens of {PATCH} x {PATCH} pixels")
    return [first, *(Panel(clusters.colour, clusters.member, f"{clusters.count} after merging") for clusters in rounds)]


def sent_tokens(frames: Tensor, first: int, backend: str | None = None) -> list[Tensor]:  # each [GRID, GRID] bool
    """Which tokens of the SHOWN frames from ``first`` changed enough since they were last sent; all were in the frame before."""
    patches = video.patchify(frames[None, first - 1 : first + SHOWN], PATCH)[0]
    kept, sent = patches[:1], []
    for frame in patches[1:]:
        gate = tokenops.delta_gate(frame[None], kept, threshold=NOTICED * patches.shape[2] ** 0.5, backend=backend)
        kept = gate.reference
        sent.append(tokenops.mask_from_index(gate.index, GRID * GRID).view(GRID, GRID))
    return sent


def sent_panels(frames: Tensor, first: int, sent: list[Tensor]) -> list[Panel]:
    """Frames in which the tokens that were not sent are dimmed."""
    panels = []
    for at, mask in enumerate(sent, first):
        panels.append(shaded(frames[at] / 255, mask.float(), f"frame {at}: {int(mask.sum())} of {GRID * GRID} tokens"))
    return panels


def shaded(image: Tensor, share: Tensor, title: str) -> Panel:  # [height, width, 3], [rows, columns] in 0 .. 1
    """An image whose patches are the darker the less there is of them, with lines between those that differ."""
    bright = F.interpolate((DIMMED + (1.0 - DIMMED) * share)[None, None], image.shape[:2], mode="nearest")[0, 0]
    return Panel(image * bright[..., None], share, title)


def tinted(image: Tensor, member: Tensor, title: str) -> Panel:  # [height, width, 3], [rows, columns] int
    """An image whose patches have the colours of their groups, the same in every picture, with lines between groups."""
    # hues that follow each other by the golden ratio: neighbouring numbers are far apart, and no two alike
    hue = (member.double() * 0.618034).frac()[..., None] * 6.0
    colour = ((hue + torch.tensor([0.0, 4.0, 2.0])).remainder(6.0) - 3.0).abs().sub(1.0).clamp(0.0, 1.0).float()
    wide = F.interpolate(colour.permute(2, 0, 1)[None], image.shape[:2], mode="nearest")[0].permute(1, 2, 0)
    return Panel(image.mean(-1, keepdim=True) * (1.0 - TINT) + wide * TINT, member, title)


def draw(panels: list[Panel], path: Path, title: str) -> None:
    plt = chart.pyplot("a picture")
    from matplotlib.collections import LineCollection

    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.7), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        rows, columns = panel.image.shape[:2] if panel.member is None else panel.member.shape
        axis.imshow(panel.image.numpy(), extent=(0, columns, rows, 0))
        if panel.member is not None:
            axis.add_collection(LineCollection(borders(panel.member), colors="white", linewidths=0.6))
        axis.set_title(panel.title, fontsize=10)
        axis.set_axis_off()
    figure.suptitle(title, fontsize=10)
    chart.save(figure, path)


def borders(member: Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Lines ((x, y), (x, y)) between neighbouring patches of different clusters."""
    upright = (member[:, 1:] != member[:, :-1]).nonzero().tolist()
    level = (member[1:] != member[:-1]).nonzero().tolist()
    return [((x + 1, y), (x + 1, y + 1)) for y, x in upright] + [((x, y + 1), (x + 1, y + 1)) for y, x in level]
