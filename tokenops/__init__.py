"""Sparse token attention for PyTorch: operators with hand-written kernels, and a plain PyTorch reference for each."""

from tokenops.ops.sdpa import patch_sdpa
from tokenops.ops.sparse_attention import sparse_attention, sparse_attention_varlen
from tokenops.ops.token_index import index_from_mask, mask_from_index
from tokenops.types import Aux, TokenIndex

__version__ = "0.1.0"

__all__ = [
    "Aux",
    "TokenIndex",
    "index_from_mask",
    "mask_from_index",
    "patch_sdpa",
    "sparse_attention",
    "sparse_attention_varlen",
]
