"""Parity of this room's public functions with the published implementation of Eventful Transformers, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eventful_block import BlockState, Options, Weights, run_block
from eventful_golden import CASES, GOLDEN, TOLERANCE, chosen, drawn


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
