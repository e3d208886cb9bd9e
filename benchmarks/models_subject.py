"""A model that leaves tokens out, on a video, ready to run: what every case of the room ``models`` is made into."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenops.models.blocks import MultiplyAdds

from .frames import CHECKED, Frames, Stream, stateless
from .harness import Results
from .picture import Panel

CLIPS = 2  # in turn
SHOWN = 4  # frames of a picture

MODEL, SDPA, OURS, PUBLISHED, PLAIN = "tokenops", "dense, SDPA", "dense, tokenops", "published", "in plain torch"


class Layer(NamedTuple):
    """What is left to a layer."""

    name: str
    unit: str
    left: float  # on average
    of: int


class Subject(NamedTuple):
    """A model that leaves tokens out, on a video, ready to run."""

    frames: Frames  # what each call is given, in turn
    shown: int  # frames of the video in each call
    ours: Stream
    peers: dict[str, Stream]
    right: dict[str, Callable[[], list[Tensor]]]  # what each contender must give for the first calls, in float64
    cost: MultiplyAdds  # of a call
    dense: MultiplyAdds
    weights: int  # bytes
    layers: list[Layer]
    panels: Callable[[], dict[str, list[Panel]]]


def on_each(frames: Frames, call: Callable[[Tensor], Tensor]) -> Stream:
    @torch.no_grad()
    def run(x: Tensor) -> Results:
        return (call(x),)

    return stateless(frames, run)


def exactly(call: Callable[..., Tensor], model: nn.Module, inputs: Sequence[Tensor], *extra: Sequence[Any]) -> Callable[[], list[Tensor]]:
    """The first calls in float64."""

    @torch.no_grad()
    def run() -> list[Tensor]:
        exact = copy.deepcopy(model).double()
        return [call(exact, x.double(), *more) for x, *more in zip(inputs[:CHECKED], *extra, strict=False)]

    return cache(run)


def weights(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
