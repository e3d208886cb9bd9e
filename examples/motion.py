"""The task of train_motion.py: to tell motions apart. Clips are drawn as they are needed, never twice; nothing is downloaded.

A textured shape moves over a textured ground, among others that lie still and look like it. The class is how it moves, and each class is
another one played backwards: which frames a clip is made of says nothing, their order says it all.

Frames are grey. The three channels that a video model has for colour take three frames, one after the other, so that a token sees motion
where it happens, as with a tubelet embedding, and every model can be what it is.

Letters: B clips, T triples of frames, F = 3 T frames, O shapes; S pixels are the side of a frame.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# a class of an odd number is the one before it, played backwards
MOTIONS = ("right", "left", "down", "up", "clockwise", "anticlockwise", "growing", "shrinking")
TRIPLES, SIDE = 4, 48
SHAPES = 4  # the first one moves


class Scenes(NamedTuple):
    """What clips show, as numbers; far smaller than their pixels, so that every process can draw a whole batch and render its part."""

    label: Tensor  # [B] in MOTIONS
    centre: Tensor  # [B, O, 2] x to the right and y down, in pixels; of the middle of the motion
    radius: Tensor  # [B, O]
    outline: Tensor  # [B, O] 0 disc, 1 square, 2 diamond
    reach: Tensor  # [B] pixels that the motion goes from its middle
    phase: Tensor  # [B] where on its circle the middle is
    wave: Tensor  # [B, O + 1, 3] texture of the shapes and of the ground: frequency along x and y, phase
    tone: Tensor  # [B, O + 1, 2] that the texture goes between, in 0 .. 1


def draw(count: int, generator: torch.Generator) -> Scenes:
    """The next scenes; the generator's state is all that decides them."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    label = torch.randint(len(MOTIONS), (count,), generator=generator)
    outline = torch.randint(3, (count, SHAPES), generator=generator)
    radius, reach = uniform(4.0, 7.0, SHAPES), uniform(8.0, 13.0)
    # the moving shape stays inside, all the way and at its largest; the others may be cut off
    kind = label // 2
    along = torch.stack([(kind == 0) | (kind == 2), (kind == 1) | (kind == 2)], 1)
    margin = 1.5 * radius[:, :1] + reach[:, None] * along
    centre = uniform(0.0, SIDE, SHAPES, 2)
    centre[:, 0] = margin + centre[:, 0] * (1 - 2 * margin / SIDE)
    direction, frequency = uniform(0.0, 2 * math.pi, SHAPES + 1), uniform(0.4, 1.0, SHAPES + 1)
    wave = torch.stack([frequency * direction.cos(), frequency * direction.sin(), uniform(0.0, 2 * math.pi, SHAPES + 1)], 2)
    tone = uniform(0.5, 1.0, SHAPES + 1, 2)
    # the ground is darker than what lies on it
    tone[:, -1] = 0.6 * (tone[:, -1] - 0.5)
    # over the top, more or less: with any part of the circle, attention over all tokens is slow to tell its two directions apart
    phase = -0.5 * math.pi + uniform(-0.25 * math.pi, 0.25 * math.pi)
    return Scenes(label, centre, radius, outline, reach, phase, wave, tone)


def render(scenes: Scenes) -> Tensor:  # [B, 3, T, S, S] in -1 .. 1
    kind = scenes.label[:, None] // 2
    moment = torch.linspace(-1.0, 1.0, 3 * TRIPLES) * (1 - 2 * (scenes.label[:, None] % 2))  # [B, F], backwards for odd labels
    angle = scenes.phase[:, None] + 0.75 * math.pi * moment
    x = scenes.reach[:, None] * torch.where(kind == 0, moment, angle.cos() * (kind == 2))
    y = scenes.reach[:, None] * torch.where(kind == 1, moment, angle.sin() * (kind == 2))
    size = 1.0 + 0.5 * moment * (kind == 3)
    still = torch.zeros(len(kind), 1)
    frames = _texture(scenes, SHAPES, *_places(still, still))
    for shape in range(1, SHAPES):
        frames = _painted(frames, scenes, shape, still, still, still + 1.0)
    frames = 2.0 * _painted(frames, scenes, 0, x, y, size) - 1.0
    return frames.unflatten(1, (TRIPLES, 3)).transpose(1, 2)


def _places(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # [B, F] -> [B, F, 1, S], [B, F, S, 1]
    """Each pixel's distance from (x, y) along either axis."""
    pixel = torch.arange(SIDE) + 0.5
    return (pixel - x[..., None])[:, :, None], (pixel - y[..., None])[..., None]


def _texture(scenes: Scenes, at: int, dx: Tensor, dy: Tensor) -> Tensor:  # [B, F, S, S]
    along_x, along_y, phase = scenes.wave[:, at, :, None, None, None].unbind(1)
    first, second = scenes.tone[:, at, :, None, None, None].unbind(1)
    return first + (second - first) * (0.5 + 0.5 * torch.sin(along_x * dx + along_y * dy + phase))


def _painted(frames: Tensor, scenes: Scenes, at: int, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """The frames with a shape on them, x and y away from its centre and ``size`` times as large, [B, F] each."""
    dx, dy = _places(scenes.centre[:, at, :1] + x, scenes.centre[:, at, 1:] + y)
    outline = scenes.outline[:, at, None, None, None]
    distance = torch.where(outline == 0, torch.hypot(dx, dy), torch.maximum(dx.abs(), dy.abs()))
    distance = torch.where(outline == 2, dx.abs() + dy.abs(), distance)
    # an edge half covers its pixel
    cover = (scenes.radius[:, at, None, None, None] * size[..., None, None] - distance + 0.5).clamp(0.0, 1.0)
    return torch.lerp(frames, _texture(scenes, at, dx, dy), cover)
