"""Sparse token attention for PyTorch: operators with hand-written kernels, and a plain PyTorch reference for each."""

from tokenops.ops.sparse_attention import sparse_attention, sparse_attention_varlen
from tokenops.types import Aux, TokenIndex

__version__ = "0.1.0"

__all__ = [
    "Aux",
    "TokenIndex",
    "sparse_attention",
    "sparse_attention_varlen",
]
