"""Parity with the published implementation of Eventful Transformers: its outputs and choices over six frames, kept in data/eventful.pt.

Each case is a stack of four blocks. Its weights were drawn from a seeded generator, and are drawn again here; a digest of each is kept, so
that a generator that changed is not taken for a difference of ours.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eventful_block import BlockState, Options, Weights, run_block
from torch import Tensor

GOLDEN: dict[str, Any] = torch.load(Path(__file__).parent / "data" / "eventful.pt")
CASES = [name for name, case in GOLDEN.items() if isinstance(case, dict)]
# the published model and ours sum in other orders; how far apart they may be after four blocks and six frames
TOLERANCE = 1e-4


def drawn(case: dict[str, Any]) -> Weights:
    """In the order of the published state, each times its scale."""
    generator = torch.Generator().manual_seed(case["seed"])
    weights = {}
    for name, shape in case["shapes"].items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            x = 1.0 + 0.1 * x
        elif name.endswith("weight"):
            x = x * ((1.4 if ".qkv." in name else 1.0) / math.sqrt(shape[1]))
        else:
            x = x * (0.05 if name.endswith("bias") else 0.2 if "relative" in name else 0.3)
        weights[name] = x
    return weights


def of_block(weights: Weights, at: int) -> Weights:
    return {name.removeprefix(f"blocks.{at}."): x for name, x in weights.items() if name.startswith(f"blocks.{at}.")}


def options_of(case: dict[str, Any], at: int) -> Options:
    window = case["window"] if at in case["window_blocks"] else None
    return Options(case["heads"], case["grid"], case["choice"], rel_pos=case["rel_pos"], window=window)


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_the_published_cases(name: str) -> None:
    case = GOLDEN[name]
    squares = torch.stack([x.double().square().sum() for x in drawn(case).values()])
    assert torch.allclose(squares, case["digest"], rtol=1e-5), "torch.randn draws other numbers than when the data were made"


@pytest.mark.parametrize("name", CASES)
def test_the_same_tokens_and_the_same_outputs(name: str, backend: str, device: str) -> None:
    case = GOLDEN[name]
    weights = {key: x.to(device) for key, x in drawn(case).items()}
    blocks = [of_block(weights, at) for at in range(case["depth"])]
    states: list[BlockState | None] = [None] * case["depth"]
    for frame, tokens in enumerate(case["inputs"]):
        x = tokens.to(device)[None]
        if case["class_token"]:
            x = torch.cat([weights["class_token"], x], 1)
        x = x + weights["position_encoding.encoding"]
        for at, block in enumerate(blocks):
            x, states[at], gates = run_block(x, block, states[at], options_of(case, at), backend=backend)
            for segment, gate in zip(("qkv", "projection", "mlp"), gates, strict=True):
                if frame > 0:
                    assert chosen(gate.index) == chosen(case["indices"][f"{at}.{segment}"][frame - 1]), (frame, at, segment)
        if case["class_token"]:
            x = F.layer_norm(x[:, 0], x.shape[-1:], weights["layer_norm.weight"], weights["layer_norm.bias"], 1e-6)
        error = (x[0].cpu() - case["outputs"][frame]).abs().max().item()
        assert error <= TOLERANCE, (frame, error)


def chosen(index: Tensor) -> set[int]:
    return set(index.flatten().tolist()) - {-1}
