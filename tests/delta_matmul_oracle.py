"""What work on changed tokens is compared with: loops over samples and rows in float64, and lists to try them on."""

from __future__ import annotations

from typing import Any

import torch
from oracle import assert_close
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def lists(batch: int, rows: int, slots: int, *, empty: float = 0.3, seed: int = 0, device: str = "cpu") -> Tensor:
    """[B, K] int32: distinct ids in any order, some slots empty, another number in each list."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(batch, rows, generator=generator).argsort(-1)[:, :slots].to(torch.int32)
    chance = 2 * empty * torch.rand(batch, 1, generator=generator)
    return index.masked_fill(torch.rand(index.shape, generator=generator) < chance, -1).to(device)


def widened(values: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {name: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in values.items()}


def assert_gradients(got: Any, want: Any, call: dict[str, Any], wanted: list[str], seed: int = 1) -> tuple[Tensor, ...]:
    """Results and gradients of ``got`` on the call, which are those of ``want`` on the same numbers in float64."""
    leaves = {name: call[name].detach().requires_grad_() for name in wanted}
    exact = widened(call)
    exact_leaves = {name: exact[name].requires_grad_() for name in wanted}
    results, expected = got(**{**call, **leaves}), want(**{**exact, **exact_leaves})
    results, expected = ((part,) if isinstance(part, Tensor) else tuple(part) for part in (results, expected))
    dtype = results[0].dtype
    # what no result depends on has a gradient all the same: 0
    total, exact_total = (sum((0.0 * leaf.double().cpu()).sum() for leaf in each.values()) for each in (leaves, exact_leaves))
    for at, (result, expect) in enumerate(zip(results, expected, strict=True)):
        assert_close(f"result {at}", result, expect, dtype)
        # the gradient is rounded as the result is
        grad = normal(*expect.shape, dtype=dtype, seed=seed + at).double()
        total, exact_total = total + (result.cpu().double() * grad).sum(), exact_total + (expect.cpu() * grad).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    exact_grads = torch.autograd.grad(exact_total, list(exact_leaves.values()), allow_unused=True, materialize_grads=True)
    for name, grad, expect in zip(wanted, grads, exact_grads, strict=True):
        assert grad.dtype == call[name].dtype
        assert_close(f"gradient of {name}", grad, expect, dtype)
    return (*(result.detach() for result in results), *grads)
