"""The operators of this room as torch sees them: schema, implementation, fake, gradient formula. Vmap and costs: transforms.py.

One implementation per operator chooses the backend at run time, so a traced graph carries none. Results are allocated here and filled by
the backend. A plan travels as its tensors; how many rows it makes is the length of ``offsets``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenops.dispatch import choose
from tokenops.ops.token_merge.backends import BACKENDS
from tokenops.ops.wings import reads_contents
from tokenops.reference import token_merge as reference
from tokenops.types import MatchProblem, MergePlan, PairProblem, SoftMergeGradients, SoftMergeProblem, Window

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
# where there is no place, the window is not read
_WINDOW = "int t_low, int t_high, int reach_y, int reach_x"
_LISTS = "Tensor slot, Tensor count, Tensor order, Tensor offsets"
_SOFT = "Tensor x, Tensor metric, Tensor meta, Tensor? temperature, float fixed_temperature, Tensor? mass, bool normalize"

_library = torch.library.Library("tokenops", "FRAGMENT")
for _schema in (
    (
        "pairwise_argmax(Tensor a, Tensor b, Tensor? a_mask, Tensor? b_mask, Tensor? a_scale, Tensor? b_scale, Tensor? a_place, "
        f"Tensor? b_place, {_WINDOW}, bool normalize, str? backend) -> (Tensor best, Tensor index)"
    ),
    (
        f"match_tokens(Tensor metric, Tensor? role, bool class_token, bool distill_token, Tensor? place, {_WINDOW}, Tensor? source_scale, "
        f"Tensor? destination_scale, SymInt? r, float? threshold, bool normalize, SymInt n_out, str? backend) -> ({_LISTS})"
    ),
    f"plan_tokens(Tensor target, bool is_slot, SymInt n_out, str? backend) -> ({_LISTS})",
    # the sizes of the output rows come along where they are wanted: one call costs as much as merging a small grid
    f"merge_tokens(Tensor x, {_LISTS}, Tensor? size, str mode, bool sizes, str? backend) -> (Tensor out, Tensor out_size)",
    # x and out are given where something depends on them; a gradient that is not wanted comes back as an empty tensor
    (
        f"merge_tokens_backward(Tensor grad_out, Tensor? x, Tensor? out, {_LISTS}, Tensor? size, str mode, bool[] wanted, str? backend) "
        "-> (Tensor grad_x, Tensor grad_size)"
    ),
    f"unmerge_tokens(Tensor y, {_LISTS}, str mode, str? backend) -> Tensor",
    f"soft_merge({_SOFT}, str? backend) -> (Tensor out, Tensor mass_out, Tensor lse)",
    (
        f"soft_merge_backward(Tensor grad_out, Tensor grad_mass, {_SOFT}, Tensor out, Tensor mass_out, Tensor lse, bool[] wanted, "
        "str? backend) -> (Tensor grad_x, Tensor grad_metric, Tensor grad_meta, Tensor grad_temperature, Tensor grad_mass_in)"
    ),
):
    _library.define(_schema, tags=_TAGS)


def statistic_dtype(x: Tensor) -> torch.dtype:
    """Of scores, sizes, masses: float32, with float64 tokens float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# matching


def _new_pairs(a: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:2], dtype=statistic_dtype(a)), a.new_empty(a.shape[:2], dtype=torch.int32)


def pair_problem(
    a: Tensor,
    b: Tensor,
    a_mask: Tensor | None,
    b_mask: Tensor | None,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    a_place: Tensor | None,
    b_place: Tensor | None,
    t_low: int,
    t_high: int,
    reach_y: int,
    reach_x: int,
    normalize: bool,
) -> PairProblem:
    window = None if a_place is None else Window(t_low, t_high, reach_y, reach_x)
    return PairProblem(a, b, a_mask, b_mask, a_scale, b_scale, a_place, b_place, window, normalize)


@torch.no_grad()
def _pairwise_argmax(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, backend = arguments
    problem = pair_problem(*given)
    a, b = problem.a, problem.b
    chosen = choose("pairwise_argmax", BACKENDS, backend, a, b, names="a b")
    if reads_contents(a.device, chosen.name):
        reference.check_pairs(problem)
    best, index = _new_pairs(a)
    if b.shape[1] == 0:
        best.fill_(-torch.inf)
        index.fill_(-1)
    elif best.numel() > 0:
        chosen.run.argmax(problem, best, index)
    return best, index


def _pairwise_argmax_fake(a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _new_pairs(a)


Lists = tuple[Tensor, Tensor, Tensor, Tensor]


def _new_lists(like: Tensor, batch: int, tokens: int, n_out: int) -> Lists:
    """Uninitialised slot, count, order, offsets."""
    slot = like.new_empty((batch, tokens), dtype=torch.int32)
    return slot, slot.new_empty((batch,)), slot.new_empty((batch, tokens)), slot.new_empty((batch, n_out + 1))


def match_problem(
    metric: Tensor,
    role: Tensor | None,
    class_token: bool,
    distill_token: bool,
    place: Tensor | None,
    t_low: int,
    t_high: int,
    reach_y: int,
    reach_x: int,
    source_scale: Tensor | None,
    destination_scale: Tensor | None,
    r: int | None,
    threshold: float | None,
    normalize: bool,
) -> MatchProblem:
    window = None if place is None else Window(t_low, t_high, reach_y, reach_x)
    return MatchProblem(metric, role, class_token, distill_token, place, window, source_scale, destination_scale, r, threshold, normalize)


@torch.no_grad()
def _match_tokens(*arguments: Any) -> Lists:
    *given, n_out, backend = arguments
    problem = match_problem(*given)
    metric = problem.metric
    chosen = choose("match_tokens", BACKENDS, backend, metric, names="metric")
    checks = reads_contents(metric.device, chosen.name)
    if checks:
        reference.check_metric(problem)
    lists = _new_lists(metric, metric.shape[0], metric.shape[1], n_out)
    _fill(lists, chosen.run.match, problem)
    if checks and not reference.fits(problem, lists[0]):
        reference.check_match(problem, n_out)
    return lists


def _fill(lists: Lists, run: Any, *problem: Any) -> None:
    if lists[0].numel() > 0:
        run(*problem, *lists)
        return
    for part in lists:
        part.zero_()


def _match_tokens_fake(metric: Tensor, *arguments: Any) -> Lists:
    return _new_lists(metric, metric.shape[0], metric.shape[1], arguments[-2])


def _plan_tokens(target: Tensor, is_slot: bool, n_out: int, backend: str | None) -> Lists:
    chosen = choose("plan_tokens", BACKENDS, backend, target, names="target")
    if reads_contents(target.device, chosen.name):
        reference.check_target(target, is_slot, n_out)
    lists = _new_lists(target, target.shape[0], target.shape[1], n_out)
    _fill(lists, chosen.run.plan, target, is_slot)
    return lists


def _plan_tokens_fake(target: Tensor, is_slot: bool, n_out: int, backend: str | None) -> Lists:
    return _new_lists(target, target.shape[0], target.shape[1], n_out)


# merging


def as_plan(slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor) -> MergePlan:
    return MergePlan(slot, count, offsets.shape[1] - 1, order, offsets)


def _new_merged(x: Tensor, n_out: int, sizes: bool) -> tuple[Tensor, Tensor]:
    out = x.new_empty((x.shape[0], n_out, x.shape[2]))
    return out, x.new_empty((x.shape[0], n_out if sizes else 0), dtype=statistic_dtype(x))


def _merge_tokens(
    x: Tensor, slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor, size: Tensor | None, mode: str, sizes: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    chosen = choose("merge_tokens", BACKENDS, backend, x, names="x")
    plan = as_plan(slot, count, order, offsets)
    if reads_contents(x.device, chosen.name):
        reference.check_merge(plan, size)
    out, out_size = _new_merged(x, plan.n_out, sizes)
    if out.numel() > 0:
        if x.shape[1] > 0:
            chosen.run.merge(x, plan, size, mode, out)
        else:
            out.zero_()
    if out_size.numel() > 0:
        if size is None or x.shape[1] == 0:
            out_size.copy_(offsets[:, 1:] - offsets[:, :-1])
        else:
            chosen.run.merge(size.expand(x.shape[0], -1).unsqueeze(2), plan, None, "sum", out_size.unsqueeze(2))
    return out, out_size


def _merge_tokens_fake(
    x: Tensor, slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor, size: Tensor | None, mode: str, sizes: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    return _new_merged(x, offsets.shape[1] - 1, sizes)


def _new_merge_gradients(grad_out: Tensor, slot: Tensor, size: Tensor | None, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    batch, tokens = grad_out.shape[0], slot.shape[1]
    grad_x = grad_out.new_empty((batch, tokens, grad_out.shape[2])) if wanted[0] else None
    grad_size = size.new_empty((batch, tokens)) if wanted[1] and size is not None else None
    return grad_x, grad_size


def _merge_gradients(grad_out: Tensor, size: Tensor | None, grad_x: Tensor | None, grad_size: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the operator returns: the size's gradient summed down to its own shape, an empty tensor for each one not wanted."""
    if grad_size is not None and size is not None:
        grad_size = grad_size.sum_to_size(size.shape)
    none = grad_out.new_empty((0,))
    return none if grad_x is None else grad_x, none.clone() if grad_size is None else grad_size


def _merge_tokens_backward(
    grad_out: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    slot: Tensor,
    count: Tensor,
    order: Tensor,
    offsets: Tensor,
    size: Tensor | None,
    mode: str,
    wanted: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    if grad_out.stride(-1) != 1:
        # sum() and its like hand down one element expanded over the whole grid
        grad_out = grad_out.contiguous()
    grids, names = ((grad_out,), "grad_out") if x is None else ((grad_out, x), "grad_out x")
    chosen = choose("merge_tokens_backward", BACKENDS, backend, *grids, names=names)
    plan = as_plan(slot, count, order, offsets)
    if reads_contents(grad_out.device, chosen.name):
        reference.check_merge(plan, size)
    grad_x, grad_size = _new_merge_gradients(grad_out, slot, size, wanted)
    if grad_out.numel() > 0 and slot.numel() > 0:
        chosen.run.merge_backward(grad_out, x, out, plan, size, mode, grad_x, grad_size)
    else:
        for grad in (grad_x, grad_size):
            if grad is not None:
                grad.zero_()
    return _merge_gradients(grad_out, size, grad_x, grad_size)


def _merge_tokens_backward_fake(
    grad_out: Tensor, x: Tensor | None, out: Tensor | None, slot: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    _, _, _, size, _, wanted, _ = arguments
    return _merge_gradients(grad_out, size, *_new_merge_gradients(grad_out, slot, size, wanted))


def _merge_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *lists, size, mode, sizes, backend = inputs
    out, out_size = output
    of_size = size is not None and size.requires_grad
    ctx.sizes = sizes and of_size
    if not ctx.sizes:
        ctx.mark_non_differentiable(out_size)
    # x is a whole grid: kept only where a gradient depends on it
    keeps = mode == "amax" or of_size
    ctx.save_for_backward(*lists, size, *((x, out) if keeps else (None, None)))
    ctx.mode, ctx.backend = mode, backend


def _merge_differentiate(ctx: Any, grad_out: Tensor, grad_out_size: Tensor) -> tuple[Tensor | None, ...]:
    *lists, size, x, out = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[5]]
    grad_x, grad_size = torch.ops.tokenops.merge_tokens_backward.default(grad_out, x, out, *lists, size, ctx.mode, wanted, ctx.backend)
    if ctx.sizes:
        spread = torch.ops.tokenops.unmerge_tokens.default(grad_out_size.unsqueeze(2).contiguous(), *lists, "copy", ctx.backend)
        grad_size = grad_size + spread.squeeze(2).sum_to_size(size.shape)
    return grad_x if wanted[0] else None, None, None, None, None, grad_size if wanted[1] else None, None, None, None


def _unmerge_tokens(y: Tensor, slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor, mode: str, backend: str | None) -> Tensor:
    chosen = choose("unmerge_tokens", BACKENDS, backend, y, names="y")
    plan = as_plan(slot, count, order, offsets)
    if reads_contents(y.device, chosen.name):
        reference.check_merge(plan)
    out = y.new_empty((y.shape[0], slot.shape[1], y.shape[2]))
    if out.numel() > 0:
        if y.shape[1] > 0:
            chosen.run.unmerge(y, plan, mode, out)
        else:
            out.zero_()
    return out


def _unmerge_tokens_fake(y: Tensor, slot: Tensor, *_: Any) -> Tensor:
    return y.new_empty((y.shape[0], slot.shape[1], y.shape[2]))


def _unmerge_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *lists, mode, backend = inputs
    ctx.save_for_backward(*lists)
    ctx.mode, ctx.backend = mode, backend


def _unmerge_differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    # one row to many, backward: many to one
    mode = "sum" if ctx.mode == "copy" else "drop"
    grad, _ = torch.ops.tokenops.merge_tokens.default(grad_out, *ctx.saved_tensors, None, mode, False, ctx.backend)
    return grad, None, None, None, None, None, None


# soft merging


def soft_problem(
    x: Tensor,
    metric: Tensor,
    meta: Tensor,
    temperature: Tensor | None,
    fixed_temperature: float,
    mass: Tensor | None,
    normalize: bool,
) -> SoftMergeProblem:
    return SoftMergeProblem(x, metric, meta, fixed_temperature if temperature is None else temperature, mass, normalize)


def _new_assigned(problem: SoftMergeProblem) -> tuple[Tensor, Tensor, Tensor]:
    x, meta = problem.x, problem.meta
    batch, rows = x.shape[0], meta.shape[1]
    mass_out = x.new_empty((batch, rows), dtype=statistic_dtype(x))
    # the results are not rounded to half types: the backward pass takes differences of them. The public function casts
    return mass_out.new_empty((batch, rows, x.shape[2])), mass_out, mass_out.new_empty((batch, x.shape[1]))


def _soft_merge(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, backend = arguments
    problem = soft_problem(*given)
    chosen = choose("soft_merge", BACKENDS, backend, *problem[:3], names="x metric meta")
    if reads_contents(problem.x.device, chosen.name):
        reference.check_soft(problem)
    out, mass_out, lse = _new_assigned(problem)
    if mass_out.numel() > 0 and problem.x.numel() > 0:
        chosen.run.soft_merge(*problem, out, mass_out, lse)
    else:
        out.zero_()
        mass_out.zero_()
        lse.fill_(-torch.inf)
    return out, mass_out, lse


def _soft_merge_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_assigned(soft_problem(*arguments[:-1]))


def _new_soft_gradients(problem: SoftMergeProblem, wanted: list[bool]) -> SoftMergeGradients:
    of_x, of_metric, of_meta, of_temperature, of_mass = wanted
    batch, tokens = problem.x.shape[:2]
    dtype = statistic_dtype(problem.x)
    return SoftMergeGradients(
        problem.x.new_empty(problem.x.shape) if of_x else None,
        problem.metric.new_empty(problem.metric.shape) if of_metric else None,
        problem.meta.new_empty(problem.meta.shape) if of_meta else None,
        problem.x.new_empty((batch,), dtype=dtype) if of_temperature else None,
        problem.x.new_empty((batch, tokens), dtype=dtype) if of_mass else None,
    )


def _soft_gradients(problem: SoftMergeProblem, grads: SoftMergeGradients) -> tuple[Tensor, ...]:
    """What the operator returns: parts summed down to the shape of their argument, an empty tensor for each one not wanted."""
    if grads.temperature is not None:
        grads = grads._replace(temperature=grads.temperature.sum())
    if grads.mass is not None and problem.mass is not None:
        grads = grads._replace(mass=grads.mass.sum_to_size(problem.mass.shape))
    return tuple(problem.x.new_empty((0,)) if grad is None else grad for grad in grads)


def _soft_merge_backward(grad_out: Tensor, grad_mass: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, out, mass_out, lse, wanted, backend = arguments
    problem = soft_problem(*given)
    grad_out, grad_mass = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (grad_out, grad_mass))
    chosen = choose("soft_merge_backward", BACKENDS, backend, *problem[:3], names="x metric meta")
    if reads_contents(problem.x.device, chosen.name):
        reference.check_soft(problem)
    grads = _new_soft_gradients(problem, wanted)
    if mass_out.numel() > 0 and problem.x.numel() > 0:
        chosen.run.soft_merge_backward(grad_out, grad_mass, *problem, out, mass_out, lse, grads)
    else:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    return _soft_gradients(problem, grads)


def _soft_merge_backward_fake(grad_out: Tensor, grad_mass: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, _, _, _, wanted, _ = arguments
    problem = soft_problem(*given)
    return _soft_gradients(problem, _new_soft_gradients(problem, wanted))


def _soft_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, metric, meta, temperature, ctx.fixed_temperature, mass, ctx.normalize, ctx.backend = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, metric, meta, temperature, mass, *output)


def _soft_differentiate(ctx: Any, grad_out: Tensor, grad_mass: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, metric, meta, temperature, mass, *results = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[at] for at in (0, 1, 2, 3, 5)]
    grads = torch.ops.tokenops.soft_merge_backward.default(
        grad_out, grad_mass, x, metric, meta, temperature, ctx.fixed_temperature, mass, ctx.normalize, *results, wanted, ctx.backend
    )
    of_x, of_metric, of_meta, of_temperature, of_mass = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return of_x, of_metric, of_meta, of_temperature, None, of_mass, None, None


def _refuse_double_backward(name: str, *_: Any) -> None:
    raise RuntimeError(f"{name} cannot be differentiated twice: its backward pass has no gradient formula")


for _name, _run, _fake in (
    ("pairwise_argmax", _pairwise_argmax, _pairwise_argmax_fake),
    ("match_tokens", _match_tokens, _match_tokens_fake),
    ("plan_tokens", _plan_tokens, _plan_tokens_fake),
    ("merge_tokens", _merge_tokens, _merge_tokens_fake),
    ("merge_tokens_backward", _merge_tokens_backward, _merge_tokens_backward_fake),
    ("unmerge_tokens", _unmerge_tokens, _unmerge_tokens_fake),
    ("soft_merge", _soft_merge, _soft_merge_fake),
    ("soft_merge_backward", _soft_merge_backward, _soft_merge_backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tokenops::{_name}", _fake, lib=_library)
for _name, _differentiate, _save in (
    ("merge_tokens", _merge_differentiate, _merge_save),
    ("unmerge_tokens", _unmerge_differentiate, _unmerge_save),
    ("soft_merge", _soft_differentiate, _soft_save),
    ("merge_tokens_backward", partial(_refuse_double_backward, "merge_tokens"), None),
    ("soft_merge_backward", partial(_refuse_double_backward, "soft_merge"), None),
):
    torch.library.register_autograd(f"tokenops::{_name}", _differentiate, setup_context=_save, lib=_library)
for _name in ("pairwise_argmax", "match_tokens", "plan_tokens"):
    # a choice has no gradient: autograd lets it pass, and the implementations record nothing
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")

pairwise_argmax, match_tokens, plan_tokens, merge_tokens, unmerge_tokens, soft_merge = (
    getattr(torch.ops.tokenops, _name).default
    for _name in ("pairwise_argmax", "match_tokens", "plan_tokens", "merge_tokens", "unmerge_tokens", "soft_merge")
)
