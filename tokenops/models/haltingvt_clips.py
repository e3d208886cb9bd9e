"""Clips of a decoded video as HaltingVT takes them, and the pairs that its motion loss is about. The source is haltingvt.py's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def real_fake_pairs(real: Tensor, fake: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of the motion loss: clips [2 B, 3, T, H, W] in the order real, fake, real, fake; their labels; and 1 or 0.

    Args:
        real: [B, 3, T, H, W].
        fake: [B, 3, T, H, W], or one frame of each video [B, 3, H, W] to be repeated (``frame_indices`` with ``frozen``).
        labels: [B, ...], which a fake shares.
    """
    if fake.dim() == 4:
        fake = fake[:, :, None].expand_as(real)
    clips = torch.stack([real, fake], 1).flatten(0, 1)
    return clips, labels.repeat_interleave(2, 0), torch.tensor([1, 0], device=real.device).repeat(len(real))


def frame_indices(length: int, frames: int, stride: int, *, generator: torch.Generator | None = None, frozen: bool = False) -> Tensor:
    """Which frames of a video make a clip [T]: from its middle, or with a generator from a random place. A short video starts again.

    With ``frozen`` (a fake clip, which needs a generator) one of them, T times.
    """
    spare = max(length - (frames - 1) * stride - 1, 0)
    start = spare // 2 if generator is None else int(torch.randint(spare + 1, (), generator=generator))
    index = (start + torch.arange(frames) * stride) % length
    if frozen and generator is None:
        raise ValueError("frozen needs a generator, got None")
    if frozen:
        index = index[torch.randint(frames, (), generator=generator)].expand(frames)
    return index


def preprocess(frames: Tensor, size: int = 224) -> Tensor:  # [T, H, W, 3] uint8 -> [3, T, size, size]
    """As in testing: the shorter side to 8 / 7 of the size, the centre of that, and 0 .. 255 to -1 .. 1."""
    short = min(frames.shape[1:3])
    height, width = (int(side * size * 8 / 7 / short + 0.5) for side in frames.shape[1:3])
    x = F.interpolate(frames.permute(0, 3, 1, 2).float(), (height, width), mode="bilinear")
    top, left = (height - size) // 2, (width - size) // 2
    return (x[:, :, top : top + size, left : left + size].transpose(0, 1) - 127.5) / 127.5
