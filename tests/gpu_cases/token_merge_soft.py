"""Soft merging for gpu_check.py: problems on meta tensors, and what the compiled kernels have to keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from gpu_cases import Promise, dtype_name, meta
from tokenops.triton.token_merge import soft as launchers
from tokenops.types import SoftMergeGradients

KERNELS = "tokenops.triton.token_merge.soft_kernels"
# those that multiply tiles
PRODUCTS = ("token_softmax", "collect", "token_terms", "backward_x", "backward_metric", "backward_meta")


class Soft(NamedTuple):
    """Soft merging and all of its gradients."""

    dtype: torch.dtype = torch.bfloat16
    channels: int = 768
    width: int = 64
    metas: int = 32
    normalize: bool = True
    learned: bool = True  # temperature and mass
    tf32: bool = False

    def __str__(self) -> str:
        words = ["tf32" if self.tf32 else dtype_name(self.dtype), f"C{self.channels} F{self.width} M{self.metas}"]
        return " ".join(words + ["dot"] * (not self.normalize) + ["fixed"] * (not self.learned))

    def launch(self) -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self.tf32 else "ieee"
        try:
            self._launch()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def _launch(self) -> None:
        batch, tokens = 8, 1569
        shapes = ((tokens, self.channels), (tokens, self.width), (self.metas, self.width))
        x, metric, meta_tokens = (meta(batch, *shape, dtype=self.dtype) for shape in shapes)
        temperature, mass = (meta(), meta(batch, tokens)) if self.learned else (0.1, None)
        problem = (x, metric, meta_tokens, temperature, mass, self.normalize)
        out, mass_out, lse = meta(batch, self.metas, self.channels), meta(batch, self.metas), meta(batch, tokens)
        launchers.soft_merge(*problem, out, mass_out, lse)
        grads = (torch.empty_like(grid) for grid in problem[:3])
        of_mass = meta(batch, tokens) if self.learned else None
        gradients = SoftMergeGradients(*grads, meta(batch) if self.learned else None, of_mass)
        launchers.soft_merge_backward(out, mass_out, *problem, out, mass_out, lse, gradients)

    def promise(self, kernel: str, options: Mapping[str, Any]) -> Promise:
        return Promise(tensor_core=kernel in PRODUCTS and (self.tf32 or self.dtype != torch.float32))


_KINDS: tuple[dict[str, Any], ...] = ({}, {"dtype": torch.float32}, {"dtype": torch.float32, "tf32": True})
CASES = [
    # every size of block
    *(Soft(metas=metas, **kind) for kind in _KINDS for metas in (8, 32, 64)),
    # products in one step and in several, narrow and wide results
    *(Soft(channels=channels, width=width, **kind) for kind in _KINDS for channels, width in ((8, 8), (100, 24), (384, 384))),
    *(Soft(normalize=False, learned=False, **kind) for kind in _KINDS),
    Soft(dtype=torch.float16),
    Soft(dtype=torch.float16, metas=128, width=768),
]
QUICK = [Soft()]
