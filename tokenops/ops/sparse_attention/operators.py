"""The operators of this room as torch sees them: schema, implementation, fake, gradient formula. Vmap and costs: transforms.py.

One implementation per operator chooses the backend at run time, so a traced graph carries none. Results are allocated here and filled by
the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenops.dispatch import choose
from tokenops.ops.arguments import check_overlap
from tokenops.ops.sparse_attention.backends import BACKENDS
from tokenops.ops.wings import reads_contents
from tokenops.reference import sparse_attention as reference
from tokenops.types import AttentionGradients, AttentionProblem

_OPTIONS = "float dropout_p, bool is_causal, float scale"
_DENSE = (
    "Tensor query, Tensor key, Tensor value, Tensor? q_index, Tensor? kv_index, Tensor? kv_bias, Tensor? attn_mask, "
    f"Tensor? rel_h, Tensor? rel_w, Tensor? dropout_seed, {_OPTIONS}"
)
_PACKED = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? q_index, Tensor? kv_index, Tensor? kv_bias, "
    f"Tensor? rel_h, Tensor? rel_w, Tensor? dropout_seed, int? max_seqlen_q, int? max_seqlen_k, {_OPTIONS}"
)
_RESULTS = "(Tensor out, Tensor lse, Tensor row_sq)"
_GRADIENTS = (
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, Tensor grad_mask, Tensor grad_rel_h, Tensor grad_rel_w)"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library("tokenops", "FRAGMENT")
for _name, _arguments in (("sparse_attention", _DENSE), ("sparse_attention_varlen", _PACKED)):
    _library.define(f"{_name}({_arguments}, bool row_sq, str? backend) -> {_RESULTS}", tags=_TAGS)
    # the rows listed in q_index are written into the grid ``out``, its other rows stay as they are
    _library.define(f"{_name}_(Tensor(a!) out, {_arguments}, bool row_sq, str? backend) -> (Tensor lse, Tensor row_sq)", tags=_TAGS)
    # a gradient that is not wanted comes back as an empty tensor
    _library.define(
        f"{_name}_backward(Tensor grad_out, Tensor out, Tensor lse, {_arguments}, bool[] wanted, str? backend) -> {_GRADIENTS}", tags=_TAGS
    )


def dense_problem(
    query: Tensor,  # [B, Hq, N, D]
    key: Tensor,  # [B, Hkv, M, D]
    value: Tensor,  # [B, Hkv, M, Dv]
    q_index: Tensor | None,
    kv_index: Tensor | None,
    kv_bias: Tensor | None,
    attn_mask: Tensor | None,
    rel_h: Tensor | None,  # [B, Hq, N, gh]
    rel_w: Tensor | None,  # [B, Hq, N, gw]
    dropout_seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> AttentionProblem:
    lists = (q_index, kv_index, kv_bias, attn_mask, rel_h, rel_w)
    return AttentionProblem(query, key, value, *lists, is_causal, scale, dropout_p, dropout_seed, None, None, None, None)


def packed_problem(
    query: Tensor,  # [Tq, Hq, D]
    key: Tensor,  # [Tk, Hkv, D]
    value: Tensor,  # [Tk, Hkv, Dv]
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_index: Tensor | None,  # [1, 1|Hq, K]
    kv_index: Tensor | None,
    kv_bias: Tensor | None,  # [1, 1|Hkv, Tk]
    rel_h: Tensor | None,  # [Tq, Hq, gh]
    rel_w: Tensor | None,  # [Tq, Hq, gw]
    dropout_seed: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> AttentionProblem:
    query, key, value = (_packed_to_grid(x) for x in (query, key, value))
    rel_h, rel_w = (None if x is None else _packed_to_grid(x) for x in (rel_h, rel_w))
    lists = (q_index, kv_index, kv_bias, None, rel_h, rel_w)
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return AttentionProblem(query, key, value, *lists, is_causal, scale, dropout_p, dropout_seed, *bounds)


class _Form(NamedTuple):
    """How the dense and the packed operators differ. All that follows is written once for both."""

    name: str
    differentiable: tuple[int | None, ...]  # of the fields of AttentionGradients: which argument it is
    problem: Callable[..., AttentionProblem]
    to_grid: Callable[[Tensor], Tensor]  # operator's shapes -> [B, H, N, C] or [B, H, N]
    from_grid: Callable[[Tensor], Tensor]


def _packed_to_grid(x: Tensor) -> Tensor:
    """[T, H, C] -> [1, H, T, C];  lse [H, T] -> [1, H, T]"""
    return x.transpose(0, 1).unsqueeze(0) if x.dim() == 3 else x.unsqueeze(0)


def _grid_to_packed(x: Tensor) -> Tensor:
    return x.squeeze(0).transpose(0, 1) if x.dim() == 4 else x.squeeze(0)


def _same(x: Tensor) -> Tensor:
    return x


DENSE = _Form("sparse_attention", (0, 1, 2, 5, 6, 7, 8), dense_problem, _same, _same)
PACKED = _Form("sparse_attention_varlen", (0, 1, 2, 7, None, 8, 9), packed_problem, _packed_to_grid, _grid_to_packed)


def _forward(form: _Form, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, row_sq, backend = arguments
    problem = form.problem(*given)
    out, lse, squares = _allocate(problem), _allocate_rows(problem), _allocate_rows(problem, row_sq)
    _serve(problem, out, lse, squares if row_sq else None, False, backend)
    return form.from_grid(out), form.from_grid(lse), form.from_grid(squares)


def _forward_fake(form: _Form, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, row_sq, _ = arguments
    problem = form.problem(*given)
    return form.from_grid(_allocate(problem)), form.from_grid(_allocate_rows(problem)), form.from_grid(_allocate_rows(problem, row_sq))


def _in_place(form: _Form, grid: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *given, row_sq, backend = arguments
    problem = form.problem(*given)
    check_overlap("out", grid, problem._asdict())
    lse, squares = _allocate_rows(problem), _allocate_rows(problem, row_sq)
    _serve(problem, form.to_grid(grid), lse, squares if row_sq else None, True, backend)
    return form.from_grid(lse), form.from_grid(squares)


def _in_place_fake(form: _Form, grid: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _forward_fake(form, *arguments)[1:]


def _backward(form: _Form, grad_out: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, wanted, backend = arguments
    problem = form.problem(*given)
    grads = _allocate_gradients(problem, wanted)
    if grad_out.stride(-1) != 1:
        # sum() and its like hand down one element expanded over the whole grid
        grad_out = grad_out.contiguous()
    _serve_backward(problem, form.to_grid(grad_out), form.to_grid(out), form.to_grid(lse), grads, backend)
    return _gradients(form, problem, grads)


def _backward_fake(form: _Form, grad_out: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, wanted, _ = arguments
    problem = form.problem(*given)
    return _gradients(form, problem, _allocate_gradients(problem, wanted))


def _serve(problem: AttentionProblem, out: Tensor, lse: Tensor, row_sq: Tensor | None, by_row: bool, backend: str | None) -> None:
    # in eager mode the wish for a mask gradient is known by now: better refused here than in the backward pass
    needs = ("attn_mask",) if problem.attn_mask is not None and problem.attn_mask.requires_grad else ()
    chosen = choose("sparse_attention", BACKENDS, backend, problem, needs=needs)
    if reads_contents(problem.query.device, chosen.name):
        reference.check_contents(problem, unique_queries=by_row)
    if lse.numel() > 0:
        chosen.run.forward(problem, out, lse, row_sq, by_row)


def _serve_backward(
    problem: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor, grads: AttentionGradients, backend: str | None
) -> None:
    needs = tuple(name for name, grad in zip(AttentionGradients._fields, grads, strict=True) if grad is not None)
    chosen = choose("sparse_attention_backward", BACKENDS, backend, problem, needs=needs)
    if reads_contents(problem.query.device, chosen.name):
        reference.check_contents(problem, unique_queries=True, unique_keys=True)
    if lse.numel() > 0 and problem.key.shape[2] > 0:
        chosen.run.backward(problem, grad_out, out, lse, grads)
        return
    for grad in grads:
        if grad is not None:
            grad.zero_()


def _allocate(problem: AttentionProblem) -> Tensor:
    """Uninitialised [B, Hq, K, Dv] in the query's memory layout."""
    batch, heads, slots, width = *problem.query.shape[:2], _slots(problem), problem.value.shape[3]
    if problem.query.stride(1) < problem.query.stride(2):
        # a view of [B, N, H, D]: merging the heads of such an output is free
        return problem.query.new_empty((batch, slots, heads, width)).transpose(1, 2)
    return problem.query.new_empty((batch, heads, slots, width))


def _allocate_rows(problem: AttentionProblem, wanted: bool = True) -> Tensor:
    """Uninitialised [B, Hq, K] float32, or an empty tensor in its place."""
    batch, heads = problem.query.shape[:2]
    return problem.query.new_empty((batch, heads, _slots(problem) if wanted else 0), dtype=torch.float32)


def _slots(problem: AttentionProblem) -> int:
    return problem.query.shape[2] if problem.q_index is None else problem.q_index.shape[2]


def _allocate_gradients(problem: AttentionProblem, wanted: list[bool]) -> AttentionGradients:
    of_query, of_key, of_value, of_bias, of_mask, of_rel_h, of_rel_w = wanted
    bias, mask, rel_h, rel_w = problem.kv_bias, problem.attn_mask, problem.rel_h, problem.rel_w
    return AttentionGradients(
        torch.empty_like(problem.query) if of_query else None,
        torch.empty_like(problem.key) if of_key else None,
        torch.empty_like(problem.value) if of_value else None,
        bias.new_empty(problem.key.shape[:3]) if of_bias and bias is not None else None,
        torch.empty_like(mask) if of_mask and mask is not None else None,
        torch.empty_like(rel_h) if of_rel_h and rel_h is not None else None,
        torch.empty_like(rel_w) if of_rel_w and rel_w is not None else None,
    )


def _gradients(form: _Form, problem: AttentionProblem, grads: AttentionGradients) -> tuple[Tensor, ...]:
    """What the operator returns: the bias's gradient summed down to its own shape, an empty tensor for each one not wanted."""
    if grads.kv_bias is not None and problem.kv_bias is not None:
        grads = grads._replace(kv_bias=grads.kv_bias.sum_to_size(problem.kv_bias.shape))
    grids = [form.from_grid(grad) if grad is not None else None for grad in (*grads[:3], *grads[5:])]
    return tuple(problem.query.new_empty((0,)) if grad is None else grad for grad in (*grids[:3], *grads[3:5], *grids[3:]))


def _save(form: _Form, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, _, backend = inputs
    out, lse, row_sq = output
    ctx.mark_non_differentiable(lse, row_sq)
    ctx.set_materialize_grads(False)
    ctx.tensors = [isinstance(x, Tensor) for x in given]
    ctx.save_for_backward(out, lse, *(x for x in given if isinstance(x, Tensor)))
    ctx.options, ctx.backend = [x for x in given if not isinstance(x, Tensor)], backend


def _differentiate(form: _Form, ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad_out is None:
        return tuple(results)
    out, lse, *saved = ctx.saved_tensors
    tensors, options = iter(saved), iter(ctx.options)
    given = [next(tensors) if is_tensor else next(options) for is_tensor in ctx.tensors]
    wanted = [at is not None and ctx.needs_input_grad[at] for at in form.differentiable]
    operator = getattr(torch.ops.tokenops, f"{form.name}_backward").default
    grads = operator(grad_out, out, lse, *given, wanted, ctx.backend)
    for at, want, grad in zip(form.differentiable, wanted, grads, strict=True):
        if at is not None and want:
            results[at] = grad
    return tuple(results)


def _refuse_double_backward(form: _Form, *_: Any) -> None:
    raise RuntimeError(f"{form.name} cannot be differentiated twice: its backward pass has no gradient formula")


for _form in (DENSE, PACKED):
    for _suffix, _run, _fake in (("", _forward, _forward_fake), ("_", _in_place, _in_place_fake), ("_backward", _backward, _backward_fake)):
        _library.impl(f"{_form.name}{_suffix}", partial(_run, _form), "CompositeExplicitAutograd")
        torch.library.register_fake(f"tokenops::{_form.name}{_suffix}", partial(_fake, _form), lib=_library)
    torch.library.register_autograd(
        f"tokenops::{_form.name}", partial(_differentiate, _form), setup_context=partial(_save, _form), lib=_library
    )
    torch.library.register_autograd(f"tokenops::{_form.name}_backward", partial(_refuse_double_backward, _form), lib=_library)
