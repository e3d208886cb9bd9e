"""Sparse token attention for PyTorch: operators with hand-written kernels, and a plain PyTorch reference for each."""

from tokenops.ops.delta_matmul import (
    delta_attention,
    delta_attention_,
    delta_gate,
    delta_gate_,
    delta_window_attention,
    delta_window_attention_,
    gathered_linear,
    gathered_mlp,
    update_tokens,
    update_tokens_,
)
from tokenops.ops.sdpa import patch_sdpa
from tokenops.ops.sparse_attention import sparse_attention, sparse_attention_varlen
from tokenops.ops.token_merge import (
    compose_plans,
    match_tokens,
    merge_schedule,
    merge_tokens,
    pairwise_argmax,
    plan_from_parents,
    plan_from_slots,
    soft_merge,
    unmerge_tokens,
)
from tokenops.ops.token_select import (
    halt_tokens,
    halt_tokens_,
    index_from_mask,
    mask_from_index,
    pack_tokens,
    select_tokens,
    unpack_tokens,
)
from tokenops.types import Aux, DeltaGate, DeltaState, HaltState, MergePlan, PackedTokens, Role, TokenIndex, Window, WindowState

__version__ = "0.1.0"

__all__ = [
    "Aux",
    "DeltaGate",
    "DeltaState",
    "HaltState",
    "MergePlan",
    "PackedTokens",
    "Role",
    "TokenIndex",
    "Window",
    "WindowState",
    "compose_plans",
    "delta_attention",
    "delta_attention_",
    "delta_gate",
    "delta_gate_",
    "delta_window_attention",
    "delta_window_attention_",
    "gathered_linear",
    "gathered_mlp",
    "halt_tokens",
    "halt_tokens_",
    "index_from_mask",
    "mask_from_index",
    "match_tokens",
    "merge_schedule",
    "merge_tokens",
    "pack_tokens",
    "pairwise_argmax",
    "patch_sdpa",
    "plan_from_parents",
    "plan_from_slots",
    "select_tokens",
    "soft_merge",
    "sparse_attention",
    "sparse_attention_varlen",
    "unmerge_tokens",
    "unpack_tokens",
    "update_tokens",
    "update_tokens_",
]
