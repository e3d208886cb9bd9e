"""Sparse token attention for PyTorch: operators with hand-written kernels, and a plain PyTorch reference for each."""

from tokenops.ops.sdpa import patch_sdpa
from tokenops.ops.sparse_attention import sparse_attention, sparse_attention_varlen
from tokenops.ops.token_select import (
    halt_tokens,
    halt_tokens_,
    index_from_mask,
    mask_from_index,
    pack_tokens,
    select_tokens,
    unpack_tokens,
)
from tokenops.types import Aux, HaltState, PackedTokens, TokenIndex

__version__ = "0.1.0"

__all__ = [
    "Aux",
    "HaltState",
    "PackedTokens",
    "TokenIndex",
    "halt_tokens",
    "halt_tokens_",
    "index_from_mask",
    "mask_from_index",
    "pack_tokens",
    "patch_sdpa",
    "select_tokens",
    "sparse_attention",
    "sparse_attention_varlen",
    "unpack_tokens",
]
