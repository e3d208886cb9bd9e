"""Work on what changed since the last frame, on a GPU: launchers, a file for each part, its device code beside it.

Triton itself is imported on the first launch, so that this package imports, and answers with its objections, where Triton is missing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenops.triton.delta_matmul.attention import attention as attention
from tokenops.triton.delta_matmul.attention import attention_objections
from tokenops.triton.launch import device_objections
from tokenops.types import DeltaAttentionProblem


def objections(problem: Any, *_: Any, **__: Any) -> list[str]:
    """Why these kernels, beyond what no compiled kernel of this room serves, cannot serve a call; empty if they can."""
    if isinstance(problem, DeltaAttentionProblem):
        return attention_objections(problem)
    return device_objections("x", problem) if isinstance(problem, Tensor) else ["delta_attention only so far"]
