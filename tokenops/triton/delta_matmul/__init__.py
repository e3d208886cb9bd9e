"""Work on what changed since the last frame, on a GPU: what changed (gate), layers on listed rows (linear), buffers (rows), attention.

Each has a file of launchers, and one of kernels, imported with Triton on the first launch: this package imports, and answers with its
objections, where Triton is missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenops.triton.delta_matmul.attention import attention as attention
from tokenops.triton.delta_matmul.attention import attention_objections
from tokenops.triton.delta_matmul.gate import gate as gate
from tokenops.triton.delta_matmul.gate import gate_backward as gate_backward
from tokenops.triton.delta_matmul.linear import linear as linear
from tokenops.triton.delta_matmul.linear import linear_backward as linear_backward
from tokenops.triton.delta_matmul.linear import linear_into as linear_into
from tokenops.triton.delta_matmul.rows import update as update
from tokenops.triton.delta_matmul.rows import update_backward as update_backward
from tokenops.triton.launch import device_objections
from tokenops.types import DeltaAttentionProblem

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def objections(problem: Any, **request: Any) -> list[str]:
    """Why these kernels, beyond what no compiled kernel of this room serves, cannot serve a call; empty if they can."""
    if isinstance(problem, DeltaAttentionProblem):
        return attention_objections(problem)
    name, first = ("the tensor", problem) if isinstance(problem, Tensor) else (problem._fields[0], problem[0])
    reasons = device_objections(name, first)
    if first.dtype not in FLOATS:
        reasons.append(f"computes with float32, bfloat16 and float16, got {first.dtype}")
    return reasons
