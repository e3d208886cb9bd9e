"""Outputs, choices and counters of the published implementation of Eventful Transformers over six frames, kept in data/eventful.pt.

Each case is a stack of four blocks. Its weights were drawn from a seeded generator, and are drawn again here; a digest of each is kept, so
that a generator that changed is not taken for a difference of ours.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN: dict[str, Any] = torch.load(Path(__file__).parent / "data" / "eventful.pt", weights_only=True)
CASES = [name for name, case in GOLDEN.items() if isinstance(case, dict)]
# the published model and ours sum in other orders; how far apart they may be after four blocks and six frames
TOLERANCE = 1e-4


def drawn(case: dict[str, Any]) -> dict[str, Tensor]:
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


def chosen(index: Tensor) -> set[int]:
    return set(index.flatten().tolist()) - {-1}
