"""Routing ``scaled_dot_product_attention`` to ``sparse_attention`` in code that one does not want to edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokenops.ops.sparse_attention import BACKENDS, sparse_attention
from tokenops.ops.sparse_attention.arguments import as_problem


@contextmanager
def patch_sdpa() -> Iterator[None]:
    """Within this context (or a function decorated with it) SDPA calls run on our kernels, if one of them can serve the call.

    Calls that only the reference could serve (dropout, float64, odd head widths, a mask that needs a gradient) stay with torch. Holds for
    the current thread, and may be nested. Every torch function called inside costs about a microsecond more.

    >>> with tokenops.patch_sdpa():
    ...     logits = model(video)
    """
    with _RoutedSDPA():
        yield


class _RoutedSDPA(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and _has_kernel(*args, **kwargs):
            return sparse_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _has_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    given = [x for x in (query, key, value, attn_mask) if x is not None]
    if dropout_p > 0.0 or any(type(x) not in (Tensor, torch.nn.Parameter) for x in given):
        return False
    try:
        problem, _ = as_problem(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)
    except (TypeError, ValueError):
        # torch says what is wrong in its own words
        return False
    needs = ("attn_mask",) if attn_mask is not None and attn_mask.requires_grad else ()
    return any(not backend.objections(problem, needs=needs) for backend in BACKENDS if backend.name != "reference")
