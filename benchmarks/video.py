"""Real input: a video file becomes clips, patches, and the patches that changed, so that index lists look like those of video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tokenops import index_from_mask

EXCERPT = Path(__file__).parent / "data" / "bigbuckbunny_excerpt.mp4"

SIDE = 224  # pixels of a square frame, as video transformers are trained on
PATCH = 16
FRAMES = 8  # of a clip; 8 x 14 x 14 patches and one class token are 1569 tokens
STRIDE = 4  # frames of the file from one frame of a clip to the next, if the file is long enough
LONGEST = 512  # frames of the file that are looked at
CHANGE = 0.05  # of a pixel range of 2: a patch that changed less is dropped in the ragged cases

TOKENS_PER_FRAME = (SIDE // PATCH) ** 2
TOKENS = FRAMES * TOKENS_PER_FRAME + 1


class VideoError(Exception):
    """A video that cannot be used, with the reason."""


class VideoTokens(NamedTuple):
    """Clips of one video as a transformer sees them. Row 0 is the class token; then frames in order, each in raster order."""

    patches: Tensor  # [B, N - 1, C] float32, normalised pixels
    change: Tensor  # [B, N] float32, mean absolute difference to the same patch one frame before; inf: always kept


def read_frames(path: Path | str) -> Tensor:  # [F, SIDE, SIDE, 3] uint8
    """The centre square of every frame, scaled to SIDE."""
    try:
        import av
    except ImportError:
        raise VideoError("reading video needs PyAV; install it with: pip install 'tokenops[bench]'") from None
    frames = []
    try:
        with av.open(str(path)) as reader:
            for frame in reader.decode(video=0):
                scale = SIDE / min(frame.width, frame.height)
                width, height = round(frame.width * scale), round(frame.height * scale)
                picture = torch.from_numpy(frame.to_ndarray(width=width, height=height, format="rgb24", interpolation="AREA"))
                top, left = (height - SIDE) // 2, (width - SIDE) // 2
                frames.append(picture[top : top + SIDE, left : left + SIDE].clone())
                if len(frames) == LONGEST:
                    break
    except (av.FFmpegError, OSError, IndexError) as error:
        # IndexError: the file opens but holds no picture stream
        raise VideoError(f"cannot read {str(path)!r} as a video: {error}") from error
    if len(frames) < FRAMES:
        raise VideoError(f"{str(path)!r}: expected a video of at least {FRAMES} frames, got {len(frames)}")
    return torch.stack(frames)


def read_tokens(path: Path | str, clips: int) -> VideoTokens:
    """``clips`` clips, evenly spread over the video (they overlap where it is short)."""
    frames = read_frames(path)
    stride = min(STRIDE, (len(frames) - 1) // (FRAMES - 1))
    last_start = len(frames) - 1 - stride * (FRAMES - 1)
    # one clip alone is taken from the middle
    starts = torch.linspace(0, last_start, clips).round().long() if clips > 1 else torch.tensor([last_start // 2])
    chosen = starts[:, None] + stride * torch.arange(FRAMES)
    patches = patchify(frames[chosen])
    return VideoTokens(patches.flatten(1, 2), change_score(patches))


def patchify(clips: Tensor, patch: int = PATCH) -> Tensor:  # [B, T, SIDE, SIDE, 3] uint8 -> [B, T, P, C]
    """Square patches in raster order, pixels scaled to -1 .. 1."""
    side = SIDE // patch
    split = clips.unflatten(3, (side, patch)).unflatten(2, (side, patch))
    return split.permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(2, 3).float() / 127.5 - 1


def project(patches: Tensor, widths: Sequence[int], generator: torch.Generator) -> list[Tensor]:  # [B, N - 1, C] -> each [B, N, width]
    """What the linear maps of a first layer make of the tokens, with random weights. Row 0 is a class token, the same in all clips."""
    pixels = (patches - patches.mean()) / patches.std()
    channels = pixels.shape[2]
    class_token = torch.randn(1, 1, channels, generator=generator).expand(len(pixels), -1, -1)
    tokens = torch.cat([class_token, pixels], 1)
    return [tokens @ (torch.randn(channels, width, generator=generator) * channels**-0.5) for width in widths]


def change_score(patches: Tensor) -> Tensor:  # [B, T, P, C] -> [B, 1 + T P]
    """How much each token differs from the same place one frame earlier. The class token and the first frame have no earlier one."""
    change = (patches[:, 1:] - patches[:, :-1]).abs().mean(-1)
    always = change.new_full((len(patches), 1 + patches.shape[2]), float("inf"))
    return torch.cat([always, change.flatten(1)], 1)


def most_changed(change: Tensor, k: int) -> Tensor:  # [B, N] -> [B, k] int32 ascending
    """The same number of tokens from every clip."""
    return change.topk(k, 1).indices.sort(1).values.int()


def changed_more_than(change: Tensor, threshold: float) -> Tensor:  # [B, N] -> [B, K] int32 ascending, -1 padded
    """As many tokens as really changed: a different number from every clip."""
    keep = change > threshold
    return index_from_mask(keep, int(keep.sum(1).max())).index
