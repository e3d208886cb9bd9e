"""Routing ``scaled_dot_product_attention`` to ``sparse_attention`` in code that one does not want to edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, local
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tokenops.ops.sparse_attention import BACKENDS, sparse_attention
from tokenops.ops.sparse_attention.arguments import as_problem

_torch_sdpa = functional.scaled_dot_product_attention
_lock, _users = Lock(), 0
# what stands in torch.nn.functional while nobody routes: torch's function, or another patch of it
_unrouted = _torch_sdpa


class _Here(local):
    """How many contexts the current thread is in. (Of a thread's own variables, torch.compile understands this kind.)"""

    depth = 0


_here = _Here()


@contextmanager
def patch_sdpa() -> Iterator[None]:
    """Within this context (or a function decorated with it) SDPA calls run on our kernels, if one of them can serve the call.

    Calls that only the reference could serve (dropout, float64, odd head widths, a mask that needs a gradient) stay with torch. Modules
    like ``torch.nn.MultiheadAttention`` are included. Holds for the current thread and may be nested. Every torch function called inside
    costs about a microsecond more. Enter it outside of functions that are compiled with ``fullgraph=True``: entering breaks the graph.

    >>> with tokenops.patch_sdpa():
    ...     logits = model(video)
    """
    _here.depth += 1
    _count_users(1)
    try:
        with _RoutedSDPA():
            yield
    finally:
        _count_users(-1)
        _here.depth -= 1


class _RoutedSDPA(TorchFunctionMode):
    """Sees calls of torch's function under whatever name they were imported, but not those that other torch functions make."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _torch_sdpa and _has_kernel(*args, **kwargs):
            return sparse_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _routed_sdpa(*args: Any, **kwargs: Any) -> Any:
    """Stands in torch.nn.functional as long as anybody routes: this is how multi_head_attention_forward finds it."""
    if _here.depth > 0 and _has_kernel(*args, **kwargs):
        return sparse_attention(*args, **kwargs)
    return _unrouted(*args, **kwargs)


def _count_users(change: int) -> None:
    global _users, _unrouted
    with _lock:
        if _users == 0:
            _unrouted = functional.scaled_dot_product_attention
        _users += change
        functional.scaled_dot_product_attention = _routed_sdpa if _users > 0 else _unrouted


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
    except (TypeError, ValueError, NotImplementedError):
        # torch says what is wrong in its own words
        return False
    needs = ("attn_mask",) if attn_mask is not None and attn_mask.requires_grad else ()
    return any(not backend.objections(problem, needs=needs) for backend in BACKENDS if backend.name != "reference")
