"""Attention on buffers of which a few rows changed: the operators and the public function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenops.dispatch import choose
from tokenops.ops.arguments import (
    as_lists,
    as_rel_pos,
    check_device,
    check_in_place,
    check_overlap,
    check_tensor,
    dense,
    refuse_forward_mode,
)
from tokenops.ops.delta_matmul.arguments import as_attention_grids, check_cells, plain_index
from tokenops.ops.delta_matmul.backends import BACKENDS
from tokenops.ops.wings import reads_contents
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaAttentionProblem, DeltaGate, DeltaState, TokenIndex

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
# in the order of DeltaAttentionProblem
_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? rows, Tensor? cells, Tensor? rel_h, Tensor? rel_w, float scale, float guard, "
    "int refresh, float crossover"
)

_library = torch.library.Library("tokenops", "FRAGMENT")
# a part of the state that the mode does not have goes in as None and comes back as an empty tensor
_library.define(
    f"delta_attention({_PROBLEM}, bool paper, ScalarType? cast, {', '.join(f'Tensor? old_{name}' for name in DeltaState._fields)}, "
    f"str? backend) -> (Tensor out, {', '.join(f'Tensor new_{name}' for name in DeltaState._fields)})",
    tags=_TAGS,
)
_library.define(
    f"delta_attention_({_PROBLEM}, "
    f"{', '.join(f'Tensor({chr(97 + at)}!)? state_{name}' for at, name in enumerate(DeltaState._fields))}, str? backend) -> Tensor out",
    tags=_TAGS,
)


def delta_attention(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    index: Tensor | TokenIndex | DeltaGate | None = None,
    state: DeltaState | None = None,
    *,
    mode: str = "exact",
    scale: float | None = None,
    rel_pos: tuple[Tensor, Tensor] | None = None,
    pool: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    guard: float = 0.1,
    refresh: int = 128,
    crossover: float = 0.5,
    cast: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, DeltaState]:  # out [B, H, N, Dv]
    """Attention of all tokens to all tokens of a frame, by what changed since the frame before.

    Mode "exact" is softmax attention on the buffers as they are. Each row carries the sums of its softmax; the terms of changed keys are
    subtracted and added anew, and rows whose query changed are computed afresh. Mode "paper" is the published update: column j of the
    attention matrix is that of the frame in which token j last changed, so rows of it need not sum to 1, and the matrix is the state.

    Args:
        query, key, value: the whole buffers, already updated. float32, bfloat16, float16 or float64; half types are computed in float32.
        index: the tokens whose rows of query, key or value changed since ``state``: [B, K] per sample or [K] for all, int32 (int64
            accepted), TokenIndex or DeltaGate. -1 marks an empty slot, anywhere in the list; ids in one list differ. All other rows must be
            as they were: nobody looks. None: a first frame or a scene cut. Everything is computed afresh and ``state`` is not read.
        state: what the call for the frame before returned.
        scale: of the logits, default D ** -0.5.
        rel_pos: (rel_h [B, H, N, gh], rel_w [B, H, N, gw]), of query's dtype or float32: rel_h[n, m // gw] + rel_w[n, m % gw] is added to
            the logit of cell m of the grid of keys, gh x gw. Rows of tokens that did not change must be as they were.
        pool: (ph, pw): keys and values are averages over cells of so many tokens of ``grid``. A changed token changes its cell.
        grid: (h, w) of the tokens in rows, N = h w. Given if and only if pool is.
        guard: exact: a row is computed afresh when its denominator falls under so much of the largest it has had since the last time:
            what cancellation may cost is the rounding of that largest one, divided by the guard.
        refresh: exact: each row is computed afresh at least every so many frames; 0: never for that reason.
        crossover: exact: a sample of which more than this part of the cells changed is computed afresh.
        cast: paper: the dtype in which attention matrix and values are stored and multiplied. Default: that of value.
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    Returns:
        out, and the state for the next frame. Sums and statistics of the state are float32 (float64 with float64 tokens).

    The gradient, in both modes, is that of dense attention on these buffers, in query, key, value and rel_pos, once; the state is constant,
    and what came before reaches the gradient through the buffers. Under autocast query, key and value are cast. The reference computes
    every row in every frame: it says what the numbers are and saves no work.

    Source: M. Dutson et al., "Eventful Transformers", 2023, sections 4.2 and 4.3, for mode "paper"; mode "exact" is our own.

    Raises:
        ValueError: sizes, ranks or devices disagree (those of the state too: another model, frame size or batch), an index without a state,
            a number out of its range; an id is out of range or repeated (checked on the CPU; on a GPU if TOKENOPS_CHECK=1).
        TypeError: a dtype is wrong.
        NotImplementedError: the named backend cannot serve the call, with its reasons; a forward-mode derivative is asked for.
        RuntimeError: the result is differentiated twice.

    >>> q, k, v = torch.randn(3, 1, 2, 16, 8)
    >>> out, state = tokenops.delta_attention(q, k, v)
    >>> k[:, :, 3] += 1.0
    >>> out, state = tokenops.delta_attention(q, k, v, torch.tensor([3]), state)
    >>> torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5)
    True
    """
    problem, parts = _arguments(query, key, value, index, state, mode, scale, rel_pos, pool, grid, guard, refresh, crossover, cast)
    out, *new = torch.ops.tokenops.delta_attention.default(*problem, mode == "paper", cast, *parts, backend)
    has = _parts(mode == "paper")
    return out, DeltaState._make(part if name in has else None for name, part in zip(DeltaState._fields, new, strict=True))


def delta_attention_(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    index: Tensor | TokenIndex | DeltaGate,
    state: DeltaState,
    *,
    scale: float | None = None,
    rel_pos: tuple[Tensor, Tensor] | None = None,
    pool: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    guard: float = 0.1,
    refresh: int = 128,
    crossover: float = 0.5,
    backend: str | None = None,
) -> Tensor:  # [B, H, N, Dv]
    """``delta_attention`` that writes the new state over the old one and returns the result alone. Only where no gradient is needed.

    The mode, and in mode "paper" the cast, are those of the state. Saves copying what did not change.

    Raises:
        RuntimeError: a gradient is needed.
        ValueError: a part of the state is not contiguous or shares memory with query, key or value; and as ``delta_attention``.
    """
    if not isinstance(state, DeltaState):
        raise TypeError(f"state must be a DeltaState, got {type(state).__name__}: delta_attention(query, key, value) makes the first")
    if index is None:
        raise TypeError("index must list the tokens that changed, got None: delta_attention(query, key, value) starts afresh")
    paper = state.probability is not None
    # checked against itself: what was stored is what will be
    cast = state.value.dtype if paper and isinstance(state.value, Tensor) and state.value.dtype != query.dtype else None
    mode = "paper" if paper else "exact"
    problem, parts = _arguments(query, key, value, index, state, mode, scale, rel_pos, pool, grid, guard, refresh, crossover, cast)
    for name, part in zip(DeltaState._fields, parts, strict=True):
        if part is not None:
            check_in_place(f"state.{name}", part, problem, "use delta_attention")
            if not part.is_contiguous():
                raise ValueError(f"state.{name} must be contiguous to be written over, got strides {part.stride()}")
    return torch.ops.tokenops.delta_attention_.default(*problem, *parts, backend)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | TokenIndex | DeltaGate | None,
    state: DeltaState | None,
    mode: str,
    scale: float | None,
    rel_pos: tuple[Tensor, Tensor] | None,
    pool: tuple[int, int] | None,
    grid: tuple[int, int] | None,
    guard: float,
    refresh: int,
    crossover: float,
    cast: torch.dtype | None,
) -> tuple[DeltaAttentionProblem, tuple[Tensor | None, ...]]:
    """The problem, and the parts of the state; none in a first frame."""
    if mode not in ("exact", "paper"):
        raise ValueError(f"mode must be 'exact' or 'paper', got {mode!r}")
    query, key, value = as_attention_grids(query, key, value)
    batch, _, tokens, width = query.shape
    _check_numbers(mode, guard, refresh, crossover, cast)
    if (pool is None) != (grid is None):
        raise ValueError(f"pool and grid go together, got pool={pool}, grid={grid}")
    if pool is not None and grid is not None:
        check_cells("pool", pool, grid, tokens)
    rows, cells = None, None
    if index is not None:
        if state is None:
            raise ValueError("index must not be given without a state: in a first frame every token is new (index=None)")
        rows = cells = as_lists(plain_index(index), batch, "query", query)
    refuse_forward_mode(query, key, value, *(rel_pos or ()))
    if pool is not None and grid is not None:
        key, value = (reference.pooled(x, grid, pool) for x in (key, value))
        cells = None if rows is None else reference.pooled_index(rows, grid, pool)
    rel_h, rel_w = as_rel_pos(rel_pos, (batch,), query, key.shape[2])
    parts: tuple[Tensor | None, ...] = (None,) * len(DeltaState._fields)
    if index is not None:
        parts = _checked_state(state, query, key, value, mode, cast)
    problem = DeltaAttentionProblem(
        dense(query),
        dense(key),
        dense(value),
        rows,
        cells,
        rel_h,
        rel_w,
        width**-0.5 if scale is None else float(scale),
        guard,
        refresh,
        crossover,
    )
    return problem, parts


def _parts(paper: bool) -> tuple[str, ...]:
    """What the state of a mode consists of."""
    return ("output", "value", "probability") if paper else ("output", "value", "key", "maximum", "total", "peak", "turn")


def _check_numbers(mode: str, guard: float, refresh: int, crossover: float, cast: torch.dtype | None) -> None:
    if not 0.0 <= guard < 1.0:
        raise ValueError(f"guard must be in [0, 1), got {guard}")
    if refresh < 0:
        raise ValueError(f"refresh must not be negative, got {refresh}")
    if not crossover >= 0.0:
        raise ValueError(f"crossover must not be negative, got {crossover}")
    if cast is not None and mode != "paper":
        raise ValueError(f"cast goes with mode 'paper', got mode {mode!r}")
    if cast not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"cast must be float32, bfloat16 or float16, got {cast}")


def _shapes(query: Tensor, key: Tensor, value: Tensor, paper: bool, cast: torch.dtype | None) -> dict[str, tuple[Any, torch.dtype]]:
    """Shape and dtype of each part of the state of a mode."""
    rows, cells = query.shape[:3], key.shape[2]
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    stored = value.dtype if not paper or cast is None else cast
    every = {
        "output": ((*rows, value.shape[3]), sums),
        "value": (value.shape, stored),
        "key": (key.shape, query.dtype),
        "maximum": (rows, sums),
        "total": (rows, sums),
        "peak": (rows, sums),
        "turn": ((), torch.int32),
        "probability": ((*rows[:2], cells, rows[2]), stored),
    }
    return {name: every[name] for name in _parts(paper)}


def _checked_state(
    state: DeltaState | None, query: Tensor, key: Tensor, value: Tensor, mode: str, cast: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    if not isinstance(state, DeltaState):
        raise TypeError(f"state must be a DeltaState, got {type(state).__name__}")
    parts: dict[str, Tensor | None] = dict.fromkeys(DeltaState._fields)
    for name, (shape, dtype) in _shapes(query, key, value, mode == "paper", cast).items():
        part = getattr(state, name)
        if part is None:
            raise ValueError(f"state must be of mode {mode!r}, got one without {name}")
        check_tensor(f"state.{name}", part)
        if part.dtype != dtype:
            raise TypeError(f"state.{name} must be {dtype} with {query.dtype} query, got {part.dtype}")
        if part.shape != shape:
            raise ValueError(f"state.{name} must be {list(shape)} as query and value are, got {list(part.shape)}")
        check_device(f"state.{name}", part, "query", query)
        parts[name] = part.detach()
    return tuple(parts.values())


_PARTS = len(DeltaState._fields)
_SIZE = len(DeltaAttentionProblem._fields)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, paper, backend = DeltaAttentionProblem._make(arguments[:_SIZE]), arguments[_SIZE], arguments[-1]
    out, *new = results = _allocate(*arguments)
    has = _parts(paper)
    state = DeltaState._make(part if name in has else None for name, part in zip(DeltaState._fields, new, strict=True))
    if problem.rows is not None:
        for part, old in zip(state, arguments[-1 - _PARTS : -1], strict=True):
            if part is not None:
                part.copy_(old)
    _serve(problem, state, out, backend)
    return results


def _in_place(*arguments: Any) -> Tensor:
    problem, state = DeltaAttentionProblem._make(arguments[:_SIZE]), DeltaState._make(arguments[_SIZE:-1])
    for name, part in zip(DeltaState._fields, state, strict=True):
        if part is not None:
            check_overlap(f"state.{name}", part, problem._asdict())
    out = problem.query.new_empty(_out_shape(problem))
    _serve(problem, state, out, arguments[-1])
    return out


def _serve(problem: DeltaAttentionProblem, state: DeltaState, out: Tensor, backend: str | None) -> None:
    chosen = choose("delta_attention", BACKENDS, backend, problem)
    if problem.rows is not None and reads_contents(problem.query.device, chosen.name):
        reference.check_index(problem.rows, problem.query.shape[2])
    if problem.query.numel() > 0:
        chosen.run.attention(problem, state, out)
    elif state.turn is not None:
        state.turn.zero_()


def _out_shape(problem: DeltaAttentionProblem) -> tuple[int, ...]:
    return (*problem.query.shape[:3], problem.value.shape[3])


def _allocate(*arguments: Any) -> tuple[Tensor, ...]:
    problem = DeltaAttentionProblem._make(arguments[:_SIZE])
    paper, cast = arguments[_SIZE : _SIZE + 2]
    query, shapes = problem.query, _shapes(*problem[:3], paper, cast)
    parts = (
        query.new_empty(shapes[name][0], dtype=shapes[name][1]) if name in shapes else query.new_empty((0,)) for name in DeltaState._fields
    )
    return query.new_empty(_out_shape(problem)), *parts


def _allocate_in_place(*arguments: Any) -> Tensor:
    problem = DeltaAttentionProblem._make(arguments[:_SIZE])
    return problem.query.new_empty(_out_shape(problem))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    problem, paper, ctx.backend = DeltaAttentionProblem._make(inputs[:_SIZE]), inputs[_SIZE], inputs[-1]
    out, *new = output
    ctx.mark_non_differentiable(*new)
    ctx.set_materialize_grads(False)
    ctx.scale = problem.scale
    state = DeltaState._make(new)
    # mode "exact" has dense attention's results; after the published update they are not that
    results = (None, None, None) if paper else (out, state.maximum, state.total)
    ctx.save_for_backward(problem.query, problem.key, problem.value, problem.rel_h, problem.rel_w, *results)


def _differentiate(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Dense attention's: neither the index nor the state has a part in it."""
    results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad_out is None:
        return tuple(results)
    query, key, value, rel_h, rel_w, out, maximum, total = ctx.saved_tensors
    call = (query, key, value, None, None, None, None, rel_h, rel_w, None, 0.0, False, ctx.scale)
    if out is None:
        out, lse, _ = torch.ops.tokenops.sparse_attention.default(*call, False, ctx.backend)
    else:
        lse = ((maximum + total.log2()) * math.log(2.0)).float()
    at = [DeltaAttentionProblem._fields.index(name) for name in ("query", "key", "value", "rel_h", "rel_w")]
    of_query, of_key, of_value, of_rel_h, of_rel_w = (ctx.needs_input_grad[i] for i in at)
    wanted = [of_query, of_key, of_value, False, False, of_rel_h, of_rel_w]
    grads = torch.ops.tokenops.sparse_attention_backward.default(grad_out, out, lse, *call, wanted, ctx.backend)
    for i, grad in zip(at, (*grads[:3], *grads[5:]), strict=True):
        results[i] = grad if ctx.needs_input_grad[i] else None
    return tuple(results)


for _name, _run, _fake in (
    ("delta_attention", _forward, _allocate),
    ("delta_attention_", _in_place, _allocate_in_place),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tokenops::{_name}", _fake, lib=_library)
torch.library.register_autograd("tokenops::delta_attention", _differentiate, setup_context=_save, lib=_library)
