"""Grids that begin, or whose rows begin, at no multiple of 16 bytes: kernels that copy pieces of 16 bytes copy these number by number."""

from __future__ import annotations

import pytest
import torch
from oracle import computed
from test_sparse_attention import DTYPES

import tokenops

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
def test_output(dtype: torch.dtype, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    aligned = [torch.randn(2, 3, rows, 24, generator=generator).to(device, dtype) for rows in (40, 70, 70)]
    want = tokenops.sparse_attention(*aligned, backend=backend)
    for shift, width in ((1, 32), (0, 25)):
        grids = [
            torch.full((*x.shape[:3], width), torch.nan, dtype=dtype, device=device)[..., shift : shift + 24].copy_(x) for x in aligned
        ]
        out = torch.zeros(2, 3, 40, width, dtype=dtype, device=device)[..., shift : shift + 24]
        assert torch.equal(tokenops.sparse_attention(*grids, backend=backend), want)
        assert torch.equal(tokenops.sparse_attention(*grids, out=out, backend=backend), want)


@every_dtype
def test_gradients(dtype: torch.dtype, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    *aligned, grad_out = (torch.randn(2, 3, rows, 24, generator=generator).to(device, dtype) for rows in (40, 70, 70, 40))
    call = dict(zip(("query", "key", "value"), aligned, strict=True))
    want = computed(call, grad_out, backend).grads
    for shift, width in ((1, 32), (0, 25)):
        grids = {
            name: torch.full((*x.shape[:3], width), torch.nan, dtype=dtype, device=device)[..., shift : shift + 24].copy_(x)
            for name, x in call.items()
        }
        grad = torch.full((*grad_out.shape[:3], width), torch.nan, dtype=dtype, device=device)[..., shift : shift + 24].copy_(grad_out)
        for name, got in computed(grids, grad, backend).grads.items():
            assert torch.equal(got, want[name]), name
