"""Linear layers on listed rows: the operators and their public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenops.dispatch import choose
from tokenops.ops.arguments import as_lists, check_in_place, check_overlap, dense, refuse_forward_mode, under_autocast
from tokenops.ops.delta_matmul.arguments import as_norm, check_grid, check_like, plain_index
from tokenops.ops.delta_matmul.backends import BACKENDS
from tokenops.ops.wings import reads_contents
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaGate, LinearGradients, LinearProblem, TokenIndex

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
# in the order of LinearProblem
_PROBLEM = (
    "Tensor x, Tensor index, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, str activation, "
    "Tensor? weight_2, Tensor? bias_2"
)
_DIFFERENTIABLE = ("x", "weight", "bias", "norm_weight", "norm_bias", "weight_2", "bias_2")

_library = torch.library.Library("tokenops", "FRAGMENT")
_library.define(f"gathered_linear({_PROBLEM}, str? backend) -> Tensor", tags=_TAGS)
_library.define(f"gathered_linear_(Tensor(a!) out, {_PROBLEM}, str? backend) -> ()", tags=_TAGS)
# a gradient that is not wanted comes back as an empty tensor
_library.define(
    f"gathered_linear_backward(Tensor grad_out, {_PROBLEM}, bool[] wanted, str? backend) -> "
    f"({', '.join(f'Tensor grad_{name}' for name in _DIFFERENTIABLE)})",
    tags=_TAGS,
)


def gathered_linear(
    x: Tensor,  # [B, N, C]
    weight: Tensor,  # [O, C]
    bias: Tensor | None = None,  # [O]
    *,
    index: Tensor | TokenIndex | DeltaGate,
    out: Tensor | None = None,  # [B, N, O]
    activation: str | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:  # [B, K, O], or out
    """A linear layer on the listed rows only: activation(norm(x[index]) weight^T + bias).

    Args:
        x: float32, bfloat16, float16 or float64. Half types are computed in float32.
        weight, bias: as in ``torch.nn.functional.linear``, of x's dtype.
        index: [B, K] per sample or [K] for all, int32 (int64 accepted), TokenIndex or DeltaGate. -1 marks an empty slot, anywhere in the
            list; its row of the result is 0. Ids in one list differ.
        out: a grid of x's dtype. The listed rows are written there, the others stay, and it is returned. Only where no gradient is needed:
            ``update_tokens`` is the form with a gradient.
        activation: None, "gelu", "gelu_tanh", "relu" or "silu".
        norm: (weight, bias) of a layer normalisation of the rows before the layer, float32 or of x's dtype.
        norm_eps: its epsilon.
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    Differentiable once in x, weight, bias and norm; the backward pass computes the layer anew and, on the CPU, leaves its matrix products
    to torch. Under autocast x, weight and bias are cast. Where the processor multiplies half types itself, as every GPU does, normalised
    and hidden rows and their gradients are rounded between the steps; next to the corner of relu that may decide on the slope.

    Raises:
        ValueError: sizes, ranks or devices disagree, the activation is unknown, out shares memory with an input; an id is out of range or
            repeated (checked on the CPU; on a GPU if TOKENOPS_CHECK=1).
        TypeError: a dtype is wrong.
        NotImplementedError: the named backend cannot serve the call, with its reasons; a forward-mode derivative is asked for.
        RuntimeError: the result is differentiated twice; out is given where a gradient is needed.

    >>> x = torch.arange(8.0).view(1, 4, 2)
    >>> tokenops.gathered_linear(x, torch.ones(1, 2), index=torch.tensor([3, -1, 0]))
    tensor([[[13.],
             [ 0.],
             [ 1.]]])
    """
    return _linear(x, (weight, bias), None, index, out, activation, norm, norm_eps, backend)


def gathered_mlp(
    x: Tensor,  # [B, N, C]
    weight_1: Tensor,  # [F, C]
    bias_1: Tensor | None,  # [F]
    weight_2: Tensor,  # [O, F]
    bias_2: Tensor | None = None,  # [O]
    *,
    index: Tensor | TokenIndex | DeltaGate,
    out: Tensor | None = None,  # [B, N, O]
    activation: str | None = "gelu",
    norm: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:  # [B, K, O], or out
    """The two layers of a transformer's MLP on the listed rows only: activation(norm(x[index]) weight_1^T + bias_1) weight_2^T + bias_2.

    The hidden rows stay compact. Everything else is as in ``gathered_linear``; all weights and biases have gradients.

    >>> x = torch.randn(2, 196, 64)
    >>> tokenops.gathered_mlp(x, torch.randn(256, 64), None, torch.randn(64, 256), index=torch.tensor([3, 77])).shape
    torch.Size([2, 2, 64])
    """
    return _linear(x, (weight_1, bias_1), (weight_2, bias_2), index, out, activation, norm, norm_eps, backend)


_Layer = tuple[Tensor, "Tensor | None"]


def _linear(
    x: Tensor,
    first: _Layer,
    second: _Layer | None,
    index: Tensor | TokenIndex | DeltaGate,
    out: Tensor | None,
    activation: str | None,
    norm: tuple[Tensor, Tensor] | None,
    norm_eps: float,
    backend: str | None,
) -> Tensor:
    check_grid("x", x)
    x = under_autocast(x)
    suffix = "" if second is None else "_1"
    weight, bias = _as_layer(*first, suffix, x, x.shape[2], "C")
    weight_2, bias_2 = (None, None) if second is None else _as_layer(*second, "_2", x, weight.shape[0], "F")
    if activation is not None and (activation not in reference.ACTIVATIONS or activation == "none"):
        raise ValueError(f"activation must be None or one of {', '.join(map(repr, reference.ACTIVATIONS[1:]))}, got {activation!r}")
    norm_weight, norm_bias = as_norm(norm, norm_eps, x)
    lists = as_lists(plain_index(index), x.shape[0], "x", x)
    problem = LinearProblem(dense(x), lists, weight, bias, norm_weight, norm_bias, norm_eps, activation or "none", weight_2, bias_2)
    refuse_forward_mode(*(part for part in problem if isinstance(part, Tensor)))
    if out is None:
        return torch.ops.tokenops.gathered_linear.default(*problem, backend)
    check_like("out", out, (*x.shape[:2], _outputs(problem)), "[B, N, O]", "x", x)
    check_in_place("out", out, problem, "use tokenops.update_tokens")
    torch.ops.tokenops.gathered_linear_.default(out, *problem, backend)
    return out


def _as_layer(weight: Tensor, bias: Tensor | None, suffix: str, x: Tensor, width: int, letter: str) -> _Layer:
    check_grid(f"weight{suffix}", weight, f"[O, {letter}]")
    weight = under_autocast(weight)
    check_like(f"weight{suffix}", weight, (weight.shape[0], width), f"[O, {letter}]", "x", x)
    if bias is not None:
        check_grid(f"bias{suffix}", bias, "[O]")
        bias = dense(under_autocast(bias))
        check_like(f"bias{suffix}", bias, (weight.shape[0],), "[O]", "x", x)
    return dense(weight), bias


def _outputs(problem: LinearProblem) -> int:
    return (problem.weight if problem.weight_2 is None else problem.weight_2).shape[0]


def _forward(*arguments: Any) -> Tensor:
    *given, backend = arguments
    problem = LinearProblem._make(given)
    out = _allocate(*arguments)
    chosen = choose("gathered_linear", BACKENDS, backend, problem)
    if reads_contents(problem.x.device, chosen.name):
        reference.check_index(problem.index, problem.x.shape[1])
    if out.numel() > 0:
        chosen.run.linear(problem, out)
    return out


def _allocate(*arguments: Any) -> Tensor:
    problem = LinearProblem._make(arguments[:-1])
    return problem.x.new_empty((problem.x.shape[0], problem.index.shape[1], _outputs(problem)))


def _in_place(out: Tensor, *arguments: Any) -> None:
    *given, backend = arguments
    problem = LinearProblem._make(given)
    check_overlap("out", out, problem._asdict())
    chosen = choose("gathered_linear", BACKENDS, backend, problem, out=out)
    if reads_contents(problem.x.device, chosen.name):
        reference.check_index(problem.index, problem.x.shape[1])
    if out.numel() > 0:
        chosen.run.linear_into(problem, out)


def _backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, _, backend = arguments
    problem = LinearProblem._make(given)
    results = _allocate_gradients(grad_out, *arguments)
    chosen = choose("gathered_linear_backward", BACKENDS, backend, problem)
    if reads_contents(problem.x.device, chosen.name):
        reference.check_index(problem.index, problem.x.shape[1])
    wanted = arguments[-2]
    grads = LinearGradients._make(grad if want else None for grad, want in zip(results, wanted, strict=True))
    chosen.run.linear_backward(problem, dense(grad_out), grads)
    return results


def _allocate_gradients(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, wanted, _ = arguments
    problem = LinearProblem._make(given)._asdict()
    return tuple(
        problem[name].new_empty(problem[name].shape if want else (0,)) if problem[name] is not None else grad_out.new_empty((0,))
        for name, want in zip(_DIFFERENTIABLE, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *given, ctx.backend = inputs
    problem = LinearProblem._make(given)
    ctx.norm_eps, ctx.activation = problem.norm_eps, problem.activation
    ctx.save_for_backward(*(part for name, part in problem._asdict().items() if name not in ("norm_eps", "activation")))


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    problem = LinearProblem._make((*tensors[:6], ctx.norm_eps, ctx.activation, *tensors[6:]))
    at = [LinearProblem._fields.index(name) for name in _DIFFERENTIABLE]
    wanted = [ctx.needs_input_grad[i] for i in at]
    grads = torch.ops.tokenops.gathered_linear_backward.default(grad_out, *problem, wanted, ctx.backend)
    results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, want, grad in zip(at, wanted, grads, strict=True):
        results[i] = grad if want else None
    return tuple(results)


def _refuse_double_backward(*_: Any) -> None:
    raise RuntimeError("gathered_linear cannot be differentiated twice: its backward pass has no gradient formula")


for _name, _run, _fake in (
    ("gathered_linear", _forward, _allocate),
    ("gathered_linear_", _in_place, lambda *arguments: None),
    ("gathered_linear_backward", _backward, _allocate_gradients),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tokenops::{_name}", _fake, lib=_library)
torch.library.register_autograd("tokenops::gathered_linear", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("tokenops::gathered_linear_backward", _refuse_double_backward, lib=_library)
