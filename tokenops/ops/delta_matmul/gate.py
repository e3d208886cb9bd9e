"""Choosing what changed: the operators and their public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenops.dispatch import choose
from tokenops.ops.arguments import as_lists, check_in_place, check_overlap, dense, refuse_forward_mode
from tokenops.ops.delta_matmul.arguments import as_norm, check_grid, check_like, plain_index
from tokenops.ops.delta_matmul.backends import BACKENDS
from tokenops.ops.token_select.select import slots_of
from tokenops.ops.wings import reads_contents
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaGate, GateBackwardProblem, GateGradients, GateProblem, TokenIndex

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_NORM = "Tensor? norm_weight, Tensor? norm_bias, float norm_eps"
_CHOICE = "Tensor? index, float? threshold, float order, bool whole, SymInt slots, str? backend"

_library = torch.library.Library("tokenops", "FRAGMENT")
# without a skip, total comes back as an empty tensor: an operator may not return what it was given
_library.define(
    f"delta_gate(Tensor x, Tensor? skip, Tensor? reference, {_NORM}, {_CHOICE}) -> "
    "(Tensor values, Tensor delta, Tensor reference, Tensor total, Tensor index, Tensor count)",
    tags=_TAGS,
)
_library.define(
    f"delta_gate_(Tensor x, Tensor? skip, Tensor(a!) reference, {_NORM}, {_CHOICE}) -> "
    "(Tensor values, Tensor delta, Tensor total, Tensor index, Tensor count)",
    tags=_TAGS,
)
# a gradient that is not wanted comes back as an empty tensor
_library.define(
    f"delta_gate_backward(Tensor x, {_NORM}, Tensor index, bool whole, bool first, Tensor? grad_values, Tensor? grad_delta, "
    "Tensor? grad_reference, Tensor? grad_total, bool[] wanted, str? backend) -> "
    "(Tensor grad_x, Tensor grad_old_reference, Tensor grad_norm_weight, Tensor grad_norm_bias)",
    tags=_TAGS,
)


def delta_gate(
    x: Tensor,  # [B, N, C]
    reference: Tensor | None = None,  # [B, N, C]
    *,
    k: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    max_k: int | None = None,
    index: Tensor | TokenIndex | DeltaGate | None = None,
    order: float = 2.0,
    skip: Tensor | None = None,  # [B, N, C]
    norm: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-6,
    whole: bool = False,
    backend: str | None = None,
) -> DeltaGate:
    """The tokens of a frame that changed most since they were last sent on, and the reference for the next frame.

    current = norm(x + skip); the tokens with the greatest ||current - reference|| are chosen: their rows are ``values``, their change is
    ``delta``, and they replace their rows of the reference. A token that drifts slowly is chosen once its drift has added up.

    Args:
        x: float32, bfloat16, float16 or float64. Half types are computed in float32.
        reference: of the frame before, of x's dtype. None starts: every token is chosen, in order, delta is values, and k, fraction,
            threshold (if given, so that a loop over frames has one call) decide nothing.
        k: so many tokens of each sample, at most N. Of equal changes the lowest id is the greater one.
        fraction: in [0, 1]; k = floor(fraction * N).
        threshold: all whose norm is greater, strictly. The list has N slots, or max_k.
        max_k: with ``threshold``: slots of the list. If more pass, those that changed most are kept.
        index: the tokens themselves, whatever their change: [B, K] or [K], int32 (int64 accepted), TokenIndex or DeltaGate; -1 marks an
            empty slot. Exactly one of k, fraction, threshold and index is given, unless reference is None.
        order: of the vector norm over channels, not negative; 0 counts channels that changed, inf is the greatest change.
        skip: added to x first; the sum is the result's ``total``.
        norm: (weight, bias) of a layer normalisation of what is compared, float32 or of x's dtype.
        norm_eps: its epsilon.
        whole: the new reference is the whole frame: plain frame differences, with nothing adding up.
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    Differentiable once in x, skip, reference and norm, through values, delta, reference and total; the choice is constant. To cut the
    gradient between frames, pass ``reference.detach()``. Autocast changes nothing here.

    Source: M. Dutson et al., "Eventful Transformers", 2023, section 4; with ``whole`` the spatio-temporal gate it is compared with there.

    Raises:
        ValueError: sizes, ranks or devices disagree, not exactly one way of choosing, a number out of its range, k greater than N; NaN in a
            change that decides, an id out of range or repeated (checked on the CPU; on a GPU if TOKENOPS_CHECK=1).
        TypeError: a dtype is wrong.
        NotImplementedError: the named backend cannot serve the call, with its reasons; a forward-mode derivative is asked for.
        RuntimeError: the result is differentiated twice.

    >>> first = tokenops.delta_gate(torch.zeros(1, 4, 2))
    >>> frame = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [0.0, 2.0]]])
    >>> gate = tokenops.delta_gate(frame, first.reference, k=2)
    >>> gate.index, gate.reference[0, :, 1]
    (tensor([[1, 3]], dtype=torch.int32), tensor([0., 4., 0., 2.]))
    """
    arguments = _arguments(x, reference, k, fraction, threshold, max_k, index, order, skip, norm, norm_eps, whole)
    refuse_forward_mode(*(part for part in arguments if isinstance(part, Tensor)))
    values, delta, new, total, chosen, count = torch.ops.tokenops.delta_gate.default(*arguments, backend)
    return DeltaGate(chosen, count, values, delta, new, x if skip is None else total)


def delta_gate_(
    x: Tensor,  # [B, N, C]
    reference: Tensor,  # [B, N, C]
    *,
    k: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    max_k: int | None = None,
    index: Tensor | TokenIndex | DeltaGate | None = None,
    order: float = 2.0,
    skip: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-6,
    whole: bool = False,
    backend: str | None = None,
) -> DeltaGate:
    """``delta_gate`` in place: the new reference is written over the old one. Only where no gradient is needed.

    Raises:
        RuntimeError: a gradient is needed.
        ValueError: the reference is expanded or shares memory with x or skip; and as ``delta_gate``.
    """
    if reference is None:
        raise TypeError("reference must be a Tensor: delta_gate(x) makes the first")
    arguments = _arguments(x, reference, k, fraction, threshold, max_k, index, order, skip, norm, norm_eps, whole)
    check_in_place("reference", reference, arguments, "use delta_gate")
    given = (*arguments[:2], reference, *arguments[3:])
    values, delta, total, chosen, count = torch.ops.tokenops.delta_gate_.default(*given, backend)
    return DeltaGate(chosen, count, values, delta, reference, x if skip is None else total)


def _arguments(
    x: Tensor,
    reference: Tensor | None,
    k: int | None,
    fraction: float | None,
    threshold: float | None,
    max_k: int | None,
    index: Tensor | TokenIndex | DeltaGate | None,
    order: float,
    skip: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    norm_eps: float,
    whole: bool,
) -> tuple[Any, ...]:
    """Of the operators, up to the backend."""
    check_grid("x", x)
    for name, grid in (("reference", reference), ("skip", skip)):
        if grid is not None:
            check_like(name, grid, tuple(x.shape), "[B, N, C]", "x", x)
    # NaN is not either
    if not order >= 0.0:
        raise ValueError(f"order must not be negative, got {order}")
    if threshold is not None and not threshold >= 0.0:
        raise ValueError(f"threshold must not be negative (a norm never is), got {threshold}")
    given = [name for name, how in (("k", k), ("fraction", fraction), ("threshold", threshold), ("index", index)) if how is not None]
    if len(given) > 1 or (not given and reference is not None):
        raise ValueError(f"exactly one of k, fraction, threshold and index must be given, got {', '.join(given) or 'none'}")
    slots, lists = x.shape[1], None
    if index is not None:
        if reference is None:
            raise ValueError("index must not be given without a reference: in a first frame every token is new")
        lists = as_lists(plain_index(index), x.shape[0], "x", x)
        slots = lists.shape[1]
    elif given:
        slots = slots_of(x.shape[1], k, fraction, threshold, max_k, strict=True)
    if reference is None:
        slots, threshold = x.shape[1], None
    norm_weight, norm_bias = as_norm(norm, norm_eps, x)
    grids = (dense(x), None if skip is None else dense(skip), None if reference is None else dense(reference))
    return (*grids, norm_weight, norm_bias, norm_eps, lists, threshold, order, whole, slots)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *given, _, backend = arguments
    values, delta, new, total, index, count = results = _allocate(*arguments)
    _serve(GateProblem._make(given), DeltaGate(index, count, values, delta, new, total), backend)
    return results


def _in_place(*arguments: Any) -> tuple[Tensor, ...]:
    *given, _, backend = arguments
    problem = GateProblem._make(given)
    assert problem.reference is not None
    check_overlap("reference", problem.reference, {"x": problem.x, "skip": problem.skip})
    values, delta, total, index, count = results = _allocate_in_place(*arguments)
    _serve(problem, DeltaGate(index, count, values, delta, problem.reference, total), backend)
    return results


def _serve(problem: GateProblem, new: DeltaGate, backend: str | None) -> None:
    chosen = choose("delta_gate", BACKENDS, backend, problem)
    if reads_contents(problem.x.device, chosen.name):
        reference.check_gate(problem)
        if problem.index is not None:
            reference.check_index(problem.index, problem.x.shape[1])
    chosen.run.gate(problem, new)


def _allocate_in_place(x: Tensor, skip: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    slots = rest[-2]
    batch, _, width = x.shape
    index, count = x.new_empty((batch, slots), dtype=torch.int32), x.new_empty((batch,), dtype=torch.int32)
    values, delta = (x.new_empty((batch, slots, width)) for _ in range(2))
    return values, delta, x.new_empty((0,) if skip is None else x.shape), index, count


def _allocate(x: Tensor, skip: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    values, delta, *others = _allocate_in_place(x, skip, *rest)
    return (values, delta, x.new_empty(x.shape), *others)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *given, wanted, backend = arguments
    # the last four are gradients, or None
    problem = GateBackwardProblem._make((*given[:-4], *(grad if grad is None else dense(grad) for grad in given[-4:])))
    results = _allocate_gradients(*arguments)
    chosen = choose("delta_gate_backward", BACKENDS, backend, problem)
    chosen.run.gate_backward(problem, GateGradients._make(grad if want else None for grad, want in zip(results, wanted, strict=True)))
    return results


def _allocate_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    x, norm_weight, norm_bias, wanted = *arguments[:3], arguments[-2]
    shapes = (x, x, norm_weight, norm_bias)
    return tuple(like.new_empty(like.shape) if want else x.new_empty((0,)) for like, want in zip(shapes, wanted, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, skip, old, norm_weight, norm_bias, ctx.norm_eps, _, _, _, ctx.whole, _, ctx.backend = inputs
    *_, total, index, count = output
    ctx.mark_non_differentiable(index, count)
    ctx.set_materialize_grads(False)
    ctx.first, ctx.has_skip = old is None, skip is not None
    ctx.save_for_backward(x if skip is None else total, norm_weight, norm_bias, index)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, norm_weight, norm_bias, index = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0] or needs[1], needs[2], needs[3], needs[4]]
    results: list[Tensor | None] = [None] * len(needs)
    values, delta, new_reference, total, *_ = grads
    if not ctx.has_skip:
        total = None
    if any(grad is not None for grad in (values, delta, new_reference, total)):
        of_x, of_reference, of_weight, of_bias = torch.ops.tokenops.delta_gate_backward.default(
            x, norm_weight, norm_bias, ctx.norm_eps, index, ctx.whole, ctx.first, values, delta, new_reference, total, wanted, ctx.backend
        )
        for at, grad in enumerate((of_x, of_x, of_reference, of_weight, of_bias)):
            results[at] = grad if needs[at] else None
    return tuple(results)


def _refuse_double_backward(*_: Any) -> None:
    raise RuntimeError("delta_gate cannot be differentiated twice: its backward pass has no gradient formula")


for _name, _run, _fake in (
    ("delta_gate", _forward, _allocate),
    ("delta_gate_", _in_place, _allocate_in_place),
    ("delta_gate_backward", _backward, _allocate_gradients),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tokenops::{_name}", _fake, lib=_library)
torch.library.register_autograd("tokenops::delta_gate", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("tokenops::delta_gate_backward", _refuse_double_backward, lib=_library)
