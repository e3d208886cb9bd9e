"""Clips of a decoded video as VidTr takes them: which frames, and views of these. The source is vidtr.py's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sample_frames(length: int, frames: int = 8, stride: int = 8, *, clips: int = 1, spread: bool = False) -> Tensor:
    """Which frames of a video make its clips: [clips, frames] int64, clips spread evenly over the video.

    Args:
        length: frames of the video. Where a clip is longer, its last frame repeats.
        frames, stride: of a clip, which is cut from a window of frames * stride.
        clips: how many; one is cut from the middle. The published results take 10.
        spread: over the whole window with both its ends, as in the release's training, so that the true step is larger than ``stride``;
            otherwise every ``stride``-th frame, as in its test.
    """
    for name, number in (("length", length), ("frames", frames), ("stride", stride), ("clips", clips)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    window = frames * stride
    room = max(length - window, 0)
    starts = torch.linspace(0, room, clips, dtype=torch.float64) if clips > 1 else torch.tensor([room / 2], dtype=torch.float64)
    within = torch.linspace(0, window - 1, frames, dtype=torch.float64) if spread else torch.arange(frames, dtype=torch.float64) * stride
    return (starts.floor()[:, None] + within.round()).long().clamp(max=length - 1)


def preprocess(video: Tensor, frames: Tensor, *, size: int = 224, short_side: int = 224, crops: int = 3) -> Tensor:
    """Clips for the model from a decoded video.

    Args:
        video: [L, H, W, 3] uint8, RGB.
        frames: [clips, T], see ``sample_frames``.
        size: side of the square crops.
        short_side: to which the video is scaled first, its shape kept. The release: 224 in test, 256 in validation.
        crops: along the longer side, evenly; one is the middle.

    Returns:
        [clips * crops, 3, T, size, size] float32, by ImageNet's mean and deviation. The release averages softmax(logits) over these views.

    Raises:
        ValueError, TypeError: shapes or dtype are not these, or size is more than short_side.
    """
    if video.dim() != 4 or video.shape[3] != 3:
        raise ValueError(f"video must be [L, H, W, 3], got {list(video.shape)}")
    if video.dtype != torch.uint8:
        raise TypeError(f"video must be uint8, got {video.dtype}")
    if frames.dim() != 2:
        raise ValueError(f"frames must be [clips, T], got {list(frames.shape)}")
    if not 0 < size <= short_side:
        raise ValueError(f"size must be in [1, {short_side}], the short side, got {size}")
    if crops < 1:
        raise ValueError(f"crops must be at least 1, got {crops}")
    height, width = (max(round(side * short_side / min(video.shape[1:3])), short_side) for side in video.shape[1:3])
    used, place = frames.unique(return_inverse=True)
    images = video[used].permute(0, 3, 1, 2).float() / 255.0
    images = F.interpolate(images, (height, width), mode="bilinear", antialias=True, align_corners=False)
    mean, deviation = (torch.tensor(x, device=video.device)[:, None, None] for x in (MEAN, STD))
    images = (images - mean) / deviation
    views = []
    for part in range(crops):
        share = part / (crops - 1) if crops > 1 else 0.5
        # only the longer side has room for several crops
        top, left = (round((side - size) * (share if side > short_side else 0.5)) for side in (height, width))
        views.append(images[:, :, top : top + size, left : left + size][place].transpose(1, 2))
    return torch.stack(views, dim=1).flatten(0, 1)
