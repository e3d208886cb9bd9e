"""One step of adaptive computation time: the operators and their public functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenops.dispatch import choose
from tokenops.ops.arguments import as_bounds, check_device, check_in_place, check_overlap, check_tensor, refuse_forward_mode
from tokenops.ops.token_select.backends import BACKENDS
from tokenops.ops.wings import reads_contents
from tokenops.reference import token_select as reference
from tokenops.types import HaltBackwardProblem, HaltProblem, HaltState

_OPTIONS = "Tensor? cu_seqlens, float scale, float center, float eps, bool last, bool class_only"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library("tokenops", "FRAGMENT")
# the old state is given whole or not at all
_library.define(
    "halt_tokens(Tensor x, Tensor? cum, Tensor? remain, Tensor? active, Tensor? rho, Tensor? counter, Tensor? out, "
    f"{_OPTIONS}, str? backend) -> (Tensor cum, Tensor remain, Tensor active, Tensor rho, Tensor counter, Tensor out)",
    tags=_TAGS,
)
_library.define(
    "halt_tokens_(Tensor x, Tensor(a!) cum, Tensor(b!) remain, Tensor(c!) active, Tensor(d!) rho, Tensor(e!) counter, Tensor(f!) out, "
    f"{_OPTIONS}, str? backend) -> ()",
    tags=_TAGS,
)
# a gradient that is not wanted comes back as an empty tensor
_library.define(
    "halt_tokens_backward(Tensor x, Tensor? grad_cum, Tensor? grad_remain, Tensor? grad_rho, Tensor? grad_out, Tensor? remain, "
    f"Tensor? active, Tensor cum, {_OPTIONS}, bool[] wanted, str? backend) -> (Tensor grad_x, Tensor new_grad_remain)",
    tags=_TAGS,
)


def halt_tokens(
    x: Tensor,  # [B, N, C] or [T, C]
    state: HaltState | None = None,
    *,
    scale: float,
    center: float,
    eps: float = 0.01,
    last: bool = False,
    output: str = "all",
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> HaltState:
    """One step of adaptive computation time, after a layer: which tokens go on, and what each adds to the output.

    h = sigmoid(scale x[..., 0] - center), but 1 where ``last``; cum += h; rho += active
    reached = (cum > 1 - eps) and active; going = cum < 1 - eps
    out += x * (remain where reached, h where going), on active rows; rho += remain where reached; counter += going
    remain -= h where going; active = going

    Channel 0 of a token is its halting score. Over the layers the weights of a token sum to 1. What stands in rows that have halted reaches
    ``cum`` (which grows and cannot wake them) and nothing else. A score of NaN reaches neither bound: the token goes out with what it has.

    Args:
        x: tokens after the layer, [B, N, C], or packed [T, C] with cu_seqlens. float32, bfloat16, float16 or float64.
        state: of the step before; None starts: cum 0, remain 1, active, rho 0, counter 1, out 0. A packed call's vectors are [T].
        scale, center: of the gate, dimensionless numbers.
        eps: slack of the halting bound, in [0, 1). 1 - eps is compared as float32 (float64 with float64 x).
        last: the last layer: every active token halts with what remains.
        output: "all": out [B, N, C] (or [T, C]), every token's output. "class": out [B, C], that of each sample's first token. Read at the
            start; a later step goes by the shape of state.out, and by ``output`` only in a packed call with T = B, where that says nothing.
        cu_seqlens: [B + 1] int32 (int64 accepted): sample b owns rows cu_seqlens[b] : cu_seqlens[b + 1] of x. Rows behind the last keep
            their state and become inactive. A sample without rows has no class token: its out stays.
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    Returns:
        The new HaltState; its vectors and out are float32 (float64 with float64 x).

    Differentiable once in x, cum, remain, rho and out; masks and counts are constants. Autocast changes nothing here.

    Source: A. Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016, section 2; H. Yin et al., "A-ViT", 2022, section 3;
    HaltingVT (arXiv 2401.04975) for the gate and its constants.

    Raises:
        ValueError: sizes or devices disagree, eps or output is out of range; cu_seqlens do not ascend from 0 to at most T (checked on the
            CPU; on a GPU if TOKENOPS_CHECK=1).
        TypeError: a dtype is wrong, state is no HaltState, scale or center is a Tensor.
        NotImplementedError: the named backend cannot serve the call, with its reasons; a forward-mode derivative is asked for.
        RuntimeError: the result is differentiated twice.

    >>> x = torch.zeros(2, 3, 4)
    >>> state = tokenops.halt_tokens(x, scale=10.0, center=0.0)
    >>> state = tokenops.halt_tokens(x, state, scale=10.0, center=0.0)
    >>> state.cum[0], state.active[0]
    (tensor([1., 1., 1.]), tensor([False, False, False]))
    """
    arguments = _arguments(x, state, scale, center, eps, last, output, cu_seqlens)
    refuse_forward_mode(*(t for t in arguments if isinstance(t, Tensor)))
    new = HaltState._make(torch.ops.tokenops.halt_tokens.default(*arguments, backend))
    if cu_seqlens is None:
        return new
    # out of class tokens has no dimension for the packed call's one grid
    return HaltState._make((*(t.squeeze(0) for t in new[:5]), new.out if arguments[-1] else new.out.squeeze(0)))


def halt_tokens_(
    x: Tensor,  # [B, N, C] or [T, C]
    state: HaltState,
    *,
    scale: float,
    center: float,
    eps: float = 0.01,
    last: bool = False,
    output: str = "all",
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> HaltState:
    """``halt_tokens`` in place: writes the new state over the old one and returns it. Only where no gradient is needed.

    Rows of ``out`` that take no part are neither read nor written.

    Raises:
        RuntimeError: a gradient is needed.
        ValueError: the state's tensors are expanded or share memory with x or with each other; and as ``halt_tokens``.
    """
    if state is None:
        raise TypeError("state must be a HaltState: halt_tokens(x) starts one")
    arguments = _arguments(x, state, scale, center, eps, last, output, cu_seqlens)
    for name, target in zip(HaltState._fields, state, strict=True):
        check_in_place(f"state.{name}", target, (x,), "use halt_tokens")
    torch.ops.tokenops.halt_tokens_.default(*arguments, backend)
    return state


def _arguments(
    x: Tensor, state: HaltState | None, scale: float, center: float, eps: float, last: bool, output: str, cu_seqlens: Tensor | None
) -> tuple[Any, ...]:
    """Of the operators: everything in the form of a padded call."""
    check_tensor("x", x)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    form = "[B, N, C]" if cu_seqlens is None else "[T, C] with cu_seqlens"
    if x.dim() != (3 if cu_seqlens is None else 2):
        raise ValueError(f"x must be {form}, got {list(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"x must have at least one channel, the halting score, got {list(x.shape)}")
    for name, value in (("scale", scale), ("center", center)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number, for which there is no gradient, got a Tensor")
    if state is not None and not isinstance(state, HaltState):
        raise TypeError(f"state must be a HaltState, got {type(state).__name__}")
    if not 0.0 <= eps < 1.0:
        raise ValueError(f"eps must be in [0, 1), got {eps}")
    if output not in ("all", "class"):
        raise ValueError(f"output must be 'all' or 'class', got {output!r}")
    if cu_seqlens is not None:
        cu_seqlens = as_bounds("cu_seqlens", cu_seqlens, "x", x)
    class_only = output == "class"
    grid = x if cu_seqlens is None else x.unsqueeze(0)
    fields: tuple[Tensor | None, ...] = (None,) * len(HaltState._fields)
    if state is not None:
        samples = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        class_only = _check_state(state, x, samples, class_only)
        fields = state if cu_seqlens is None else (*(t.unsqueeze(0) for t in state[:5]), _packed_out(state.out, class_only))
    if class_only and cu_seqlens is None and x.shape[1] == 0:
        raise ValueError(f"x must have a first token, the class token, got {list(x.shape)}")
    return (grid, *fields, cu_seqlens, scale, center, eps, last, class_only)


def _packed_out(out: Tensor, class_only: bool) -> Tensor:
    return out if class_only else out.unsqueeze(0)


def _check_state(state: HaltState, x: Tensor, samples: int, class_only: bool) -> bool:
    """Whether its output is that of class tokens."""
    dtype = _state_dtype(x)
    for name, t in zip(HaltState._fields, state, strict=True):
        check_tensor(f"state.{name}", t)
        check_device(f"state.{name}", t, "x", x)
        wanted = torch.bool if name == "active" else dtype
        if t.dtype != wanted:
            raise TypeError(f"state.{name} must be {wanted} with {x.dtype} x, got {t.dtype}")
        if name != "out" and t.shape != x.shape[:-1]:
            raise ValueError(f"state.{name} must be {list(x.shape[:-1])} as x, got {list(t.shape)}")
    every, first = x.shape, (samples, x.shape[-1])
    if state.out.shape not in (every, first):
        raise ValueError(f"state.out must be {list(every)} (all tokens) or {list(first)} (class tokens), got {list(state.out.shape)}")
    return class_only if every == first else state.out.shape == first


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, backend = arguments
    new = HaltState._make(_allocate(x, *arguments))
    _serve(_problem(x, *given), new, backend)
    return new


def _in_place(x: Tensor, *arguments: Any) -> None:
    *given, backend = arguments
    problem = _problem(x, *given)
    assert problem.state is not None
    state = {f"state.{name}": target for name, target in problem.state._asdict().items()}
    for at, (name, target) in enumerate(state.items()):
        check_overlap(name, target, {"x": x, **dict(list(state.items())[:at])})
    _serve(problem, problem.state, backend)


def _problem(x: Tensor, *given: Any) -> HaltProblem:
    *state, cu_seqlens, scale, center, eps, last, class_only = given
    return HaltProblem(x, None if state[0] is None else HaltState._make(state), cu_seqlens, scale, center, 1.0 - eps, last, class_only)


def _serve(problem: HaltProblem, new: HaltState, backend: str | None) -> None:
    chosen = choose("halt_tokens", BACKENDS, backend, problem)
    if reads_contents(problem.x.device, chosen.name):
        reference.check_halt(problem)
    if new.cum.numel() > 0:
        chosen.run.halt(problem, new)
    elif problem.state is not None and new is not problem.state:
        new.out.copy_(problem.state.out)
    elif problem.state is None:
        new.out.zero_()


def _allocate(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, cu_seqlens, _, _, _, _, class_only, _ = arguments
    samples = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = _state_dtype(x)
    cum, remain, rho, counter = (x.new_empty(x.shape[:2], dtype=dtype) for _ in range(4))
    out = x.new_empty((samples, x.shape[2]) if class_only else x.shape, dtype=dtype)
    return cum, remain, x.new_empty(x.shape[:2], dtype=torch.bool), rho, counter, out


def _backward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *given, eps, last, class_only, wanted, backend = arguments
    grads = _allocate_gradients(x, *arguments)
    problem = HaltBackwardProblem._make((x, *given, 1.0 - eps, last, class_only))
    if problem.grad_out is not None and problem.grad_out.stride(-1) != 1:
        # sum() and its like hand down one element expanded over the whole grid
        problem = problem._replace(grad_out=problem.grad_out.contiguous())
    chosen = choose("halt_tokens_backward", BACKENDS, backend, problem)
    if reads_contents(x.device, chosen.name):
        reference.check_halt(problem)
    if problem.cum.numel() > 0:
        chosen.run.halt_backward(problem, *(grad if want else None for grad, want in zip(grads, wanted, strict=True)))
    return grads


def _allocate_gradients(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    cum, wanted = arguments[6], arguments[-2]
    grad_x = torch.empty_like(x) if wanted[0] else x.new_empty((0,))
    return grad_x, torch.empty_like(cum) if wanted[1] else cum.new_empty((0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, remain, active, _, _, _, cu_seqlens, *ctx.options, ctx.backend = inputs
    cum, _, new_active, _, counter, _ = output
    ctx.mark_non_differentiable(new_active, counter)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, remain, active, cum, cu_seqlens)


def _differentiate(
    ctx: Any, grad_cum: Tensor | None, grad_remain: Tensor | None, _: Any, grad_rho: Tensor | None, __: Any, grad_out: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, remain, active, cum, cu_seqlens = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[2]]
    grads = (grad_cum, grad_remain, grad_rho, grad_out)
    grad_x, old_grad_remain = None, None
    if any(wanted) and any(grad is not None for grad in grads):
        results = torch.ops.tokenops.halt_tokens_backward.default(
            x, *grads, remain, active, cum, cu_seqlens, *ctx.options, wanted, ctx.backend
        )
        grad_x, old_grad_remain = (grad if want else None for grad, want in zip(results, wanted, strict=True))
    # what a step only adds to passes its gradient on
    results = (grad_x, grad_cum, old_grad_remain, None, grad_rho, None, grad_out, *(None,) * (len(needs) - 7))
    return tuple(grad if need else None for grad, need in zip(results, needs, strict=True))


def _folded(in_dims: tuple[int | None, ...], size: int, arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments with the mapped dimension folded into the batch."""

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    return [fold(x, dim) for x, dim in zip(arguments, in_dims, strict=True)]


def _vmap(operator: str, bounds_at: int, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    if arguments[bounds_at] is not None:
        raise NotImplementedError(f"{operator}: no vmap over packed rows; they hold several samples already")
    results = getattr(torch.ops.tokenops, operator).default(*_folded(in_dims, info.batch_size, arguments))
    # an empty tensor stands for a gradient that is not wanted
    dims = tuple(0 if x.dim() > 1 else None for x in results)
    results = tuple(x if dim is None else x.unflatten(0, (info.batch_size, -1)) for x, dim in zip(results, dims, strict=True))
    return results, dims


def _refuse_double_backward(*_: Any) -> None:
    raise RuntimeError("halt_tokens cannot be differentiated twice: its backward pass has no gradient formula")


for _name, _run, _fake in (
    ("halt_tokens", _forward, _allocate),
    ("halt_tokens_", _in_place, lambda *arguments: None),
    ("halt_tokens_backward", _backward, _allocate_gradients),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tokenops::{_name}", _fake, lib=_library)
torch.library.register_autograd("tokenops::halt_tokens", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("tokenops::halt_tokens_backward", _refuse_double_backward, lib=_library)
torch.library.register_vmap("tokenops::halt_tokens", partial(_vmap, "halt_tokens", 7), lib=_library)
torch.library.register_vmap("tokenops::halt_tokens_backward", partial(_vmap, "halt_tokens_backward", 8), lib=_library)
