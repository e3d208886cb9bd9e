"""Frames in a row for calls with a state: every call is the next frame, and every frame changes other tokens than the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenops import index_from_mask

from .harness import Contender, Results

SETS = 2  # of tokens, that change in turn; each has two values in turn, so that no frame writes what is there already
CHECKED = 2  # frames of each contender that are compared with the right result


class Frames(NamedTuple):
    """A film without end: the first frame follows the last."""

    grids: list[tuple[Tensor, ...]]  # of each frame, [..., N, width]
    index: list[Tensor]  # of each frame [1, K] int32 ascending, -1 padded: the tokens in which it differs from the frame before

    def to(self, device: str, dtype: torch.dtype) -> Frames:
        return Frames([tuple(x.to(device, dtype) for x in grids) for grids in self.grids], [index.to(device) for index in self.index])

    @property
    def last(self) -> tuple[Tensor, ...]:
        """What stands before the first frame."""
        return self.grids[-1]

    @property
    def counts(self) -> list[int]:
        """Tokens that change in each frame."""
        return [int((index >= 0).sum()) for index in self.index]


def rotating(shapes: Sequence[tuple[int, ...]], k: int) -> Frames:
    """Random grids [..., N, width], in which k tokens of each frame are others."""
    generator = torch.Generator().manual_seed(0)
    tokens = shapes[0][-2]
    lists = [torch.randperm(tokens, generator=generator)[:k].sort().values for _ in range(SETS)]
    rows = [[torch.randn(*shape[:-2], k, shape[-1], generator=generator) for shape in shapes] for _ in range(2 * SETS)]
    now = [torch.randn(shape, generator=generator) for shape in shapes]
    grids = []
    # after one time around, what stands before the first frame is what the last one leaves
    for at in (*range(2 * SETS), *range(2 * SETS)):
        for grid, new in zip(now, rows[at], strict=True):
            grid[..., lists[at % SETS], :] = new
        grids.append(tuple(grid.clone() for grid in now))
    return Frames(grids[2 * SETS :], [lists[at % SETS][None].int() for at in range(2 * SETS)])


def from_film(frames: Sequence[tuple[Tensor, ...]]) -> Frames:
    """Grids [1, N, width] as they come, there and back again; the tokens in which they differ are found here."""
    around = [*frames, *frames[-2:0:-1]]
    changed = []
    for now, before in zip(around, around[-1:] + around[:-1], strict=True):
        changed.append(torch.stack([(a != b).any(-1) for a, b in zip(now, before, strict=True)]).any(0))
    width = max(int(mask.sum()) for mask in changed)
    return Frames(list(around), [index_from_mask(mask, width).index for mask in changed])


class Stream:
    """The timed call of a contender: each time the next frame. Its state before the first frame is made in the first call."""

    def __init__(self, frames: int, start: Callable[[], Any], step: Callable[[Any, int], tuple[Results, Any]]) -> None:
        self.frames, self.start, self.step = frames, start, step
        self.calls = 0
        self.state: Any = None

    def __call__(self) -> Results:
        if self.calls == 0:
            self.state = self.start()
        results, self.state = self.step(self.state, self.calls % self.frames)
        self.calls += 1
        return results

    def checked(self, first: Results) -> list[Results]:
        """The results of the first frames, of which the first are there already; a later frame may write over them."""
        frames = [tuple(x.clone() for x in first)]
        while len(frames) < CHECKED:
            frames.append(tuple(x.clone() for x in self()))
        return frames


def stateless(frames: Frames, call: Callable[..., Results]) -> Stream:
    """The stream of a contender that computes every frame anew."""
    return Stream(len(frames.grids), lambda: None, lambda state, at: (call(*frames.grids[at]), state))


def judged(contender: Contender, judge: Callable[[list[Results]], Results]) -> Contender:
    """The contender, with what is compared made of the results of its first frames."""
    stream = contender.run
    assert isinstance(stream, Stream)
    return contender._replace(canonical=lambda first: judge(stream.checked(first)))


def outputs(frames: list[Results]) -> Results:
    """One result for each frame: nothing to judge."""
    return tuple(out for [out] in frames)
