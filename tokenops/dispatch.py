"""Choosing a backend: each one answers with its objections, and an empty list means yes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Backend(NamedTuple):
    """One way to run an operation."""

    name: str
    run: Any  # the room's module in that wing, e.g. tokenops.reference.sparse_attention
    objections: Callable[..., list[str]]  # called with the problem; why this backend cannot serve it
    leads: Callable[..., bool] | None = None  # called with the problem; whether it goes before all others


def ranked(backends: Sequence[Backend], *problem: Any) -> Sequence[Backend]:
    """In order of preference for this problem."""
    for backend in backends:
        if backend.leads is not None and backend.leads(*problem):
            return [backend, *(other for other in backends if other is not backend)]
    return backends


def choose(operation: str, backends: Sequence[Backend], name: str | None, *problem: Any, **request: Any) -> Backend:
    """The first backend without objections; or, if ``name`` is given, that one and no other.

    Raises:
        ValueError: no backend has that name.
        NotImplementedError: the named backend objects, or all of them do; every objection is listed.
    """
    if name is not None:
        candidates = [backend for backend in backends if backend.name == name]
        if not candidates:
            raise ValueError(f"{operation}: backend must be one of {', '.join(repr(b.name) for b in backends)}, got {name!r}")
    else:
        candidates = list(ranked(backends, *problem))
    refusals = []
    for backend in candidates:
        reasons = backend.objections(*problem, **request)
        if not reasons:
            return backend
        refusals.append(f"  {backend.name}: {'; '.join(reasons)}")
    raise NotImplementedError(f"{operation}: no backend can serve this call\n" + "\n".join(refusals))
