"""Which of the two GPU backends serves a call on a CUDA device that names none: a small table, by room and by what decides there.

The first rule that holds for a call counts. A backend that objects to the call leaves it to the next one, as always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokenops.types import AttentionProblem

# of every rule below, until the benchmark has run on a GPU (`make gpu-bench`)
ORIGIN = "estimated, not measured"


class Rule(NamedTuple):
    calls: str  # which, in words
    backend: str  # "cuda" | "triton"
    holds: Callable[[tuple[int, int], tuple[Any, ...]], bool] = lambda capability, problem: True


def _is_blackwell(capability: tuple[int, int], problem: tuple[Any, ...]) -> bool:
    return capability[0] >= 10


def _is_short(capability: tuple[int, int], problem: tuple[Any, ...]) -> bool:
    attention = problem[0]
    if not isinstance(attention, AttentionProblem) or attention.q_index is not None or attention.kv_index is not None:
        return False
    if attention.cu_seqlens_q is not None:
        return False
    return max(attention.query.shape[2], attention.key.shape[2]) <= 32


def _is_wide(capability: tuple[int, int], problem: tuple[Any, ...]) -> bool:
    attention = problem[0]
    return isinstance(attention, AttentionProblem) and max(attention.query.shape[3], attention.value.shape[3]) > 64


def _is_half(capability: tuple[int, int], problem: tuple[Any, ...]) -> bool:
    first = problem[0]
    return (first if isinstance(first, torch.Tensor) else first[0]).dtype in (torch.bfloat16, torch.float16)


# Triton compiles to the warp group and tensor memory instructions of sm_90 and sm_100, which our C++ leaves alone: it has the large
# products. Where a launch is short, its Python side weighs more, and C++ has less of that.
RULES: dict[str, tuple[Rule, ...]] = {
    "sparse_attention": (
        Rule("at most 32 queries and keys, no lists", "cuda", _is_short),
        Rule("compute capability 10 and later", "triton", _is_blackwell),
        Rule("heads wider than 64", "triton", _is_wide),
        Rule("half types", "cuda", _is_half),
        Rule("all others", "triton"),
    ),
    "token_select": (Rule("all", "cuda"),),
    "token_merge": (Rule("all", "cuda"),),
    "delta_matmul": (Rule("all", "triton"),),
}


def rule_for(room: str, capability: tuple[int, int], problem: tuple[Any, ...]) -> Rule:
    """The rule that counts for a call on a device of this compute capability."""
    return next(rule for rule in RULES[room] if rule.holds(capability, problem))
