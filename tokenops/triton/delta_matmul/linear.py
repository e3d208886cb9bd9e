"""Launchers of layers on listed rows. ``linear_kernels.py`` holds the device code."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenops.triton.delta_matmul.rows import Normalization, normalization, normalization_backward, slots_of, strides
from tokenops.triton.launch import dot_precision, interpreting, launch, power_of_two, processors, registers
from tokenops.types import LinearGradients, LinearProblem


class Blocks(NamedTuple):
    """How a kernel cuts its work."""

    slots: int
    outputs: int
    channels: int
    num_warps: int
    num_stages: int


class Choice(NamedTuple):
    """Blocks of a kernel, by problem."""

    large: Blocks
    small: Blocks  # for problems that have too few large ones to keep a GPU busy
    narrow: Blocks  # for rows that begin anywhere: they are read element by element, which takes more registers


# (kernel, bytes of an element): the largest blocks that spill no register on any architecture that ``make gpu-check`` compiles for. None
# was chosen by time. float32 products run on the ordinary cores unless TF32 is allowed, and those hold both operands in registers.
TABLE = {
    ("layer", 2): Choice(Blocks(128, 128, 64, 8, 3), Blocks(64, 64, 64, 4, 3), Blocks(64, 64, 16, 4, 2)),
    ("layer", 4): Choice(Blocks(64, 64, 16, 8, 2), Blocks(32, 32, 16, 4, 2), Blocks(32, 32, 16, 4, 2)),
    ("layer_parameters", 2): Choice(Blocks(32, 128, 128, 8, 3), Blocks(32, 64, 64, 4, 3), Blocks(16, 64, 64, 4, 2)),
    ("layer_parameters", 4): Choice(Blocks(16, 64, 64, 8, 2), Blocks(16, 32, 32, 4, 2), Blocks(16, 32, 32, 4, 2)),
}


def linear(problem: LinearProblem, out: Tensor) -> None:
    """Fills out [B, K, O]."""
    _forward(problem, out, scatter=False)


def linear_into(problem: LinearProblem, out: Tensor) -> None:
    """Writes the listed rows of out [B, N, O] and leaves the others."""
    _forward(problem, out, scatter=True)


def linear_backward(problem: LinearProblem, grad_out: Tensor, grads: LinearGradients) -> None:
    """Fills every wanted gradient from grad_out [B, K, O]. The layers are computed anew, as far as their activation needs them."""
    p, norm = problem, _norm_of(problem)
    grad = grad_out
    if p.weight_2 is not None:
        inner = _slots_by(p, p.weight.shape[0])
        _layer(p, p.x, p.weight, inner, bias=p.bias, norm=norm, gather=True)
        _parameters(p, grad, inner, grads.weight_2, grads.bias_2, activation=p.activation)
        grad = torch.empty_like(inner)
        _layer(p, grad_out, p.weight_2.T, grad, other=inner, form="inner", activation=p.activation)
    elif p.activation != "none":
        grad = _slots_by(p, p.weight.shape[0])
        _layer(p, p.x, p.weight, grad, bias=p.bias, norm=norm, other=grad_out, form="gradient", activation=p.activation, gather=True)
    _parameters(p, grad, p.x, grads.weight, grads.bias, norm=norm, gather=True)
    if grads.x is not None:
        # rows that no slot names
        grads.x.zero_()
    if norm is None:
        if grads.x is not None:
            _layer(p, grad, p.weight.T, grads.x, scatter=True)
    elif any(wanted is not None for wanted in (grads.x, grads.norm_weight, grads.norm_bias)):
        of_normalized = _slots_by(p, p.x.shape[2], torch.float32)
        _layer(p, grad, p.weight.T, of_normalized)
        normalization_backward(of_normalized, p.x, p.index, norm, None, grads.x, grads.norm_weight, grads.norm_bias)


def _forward(p: LinearProblem, out: Tensor, scatter: bool) -> None:
    norm = _norm_of(p)
    if p.weight_2 is None:
        _layer(p, p.x, p.weight, out, bias=p.bias, norm=norm, activation=p.activation, gather=True, scatter=scatter)
        return
    hidden = _slots_by(p, p.weight.shape[0])
    _layer(p, p.x, p.weight, hidden, bias=p.bias, norm=norm, activation=p.activation, gather=True)
    _layer(p, hidden, p.weight_2, out, bias=p.bias_2, scatter=scatter)


def _norm_of(p: LinearProblem) -> Normalization | None:
    if p.norm_weight is None or p.norm_bias is None:
        return None
    return normalization(p.x, p.index, p.norm_weight, p.norm_bias, p.norm_eps)


def _slots_by(p: LinearProblem, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Scratch, a row for every slot."""
    return p.x.new_empty((p.x.shape[0], p.index.shape[1], width), dtype=dtype)


def _layer(
    p: LinearProblem,
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Normalization | None = None,
    other: Tensor | None = None,
    form: str = "none",
    activation: str = "none",
    gather: bool = False,
    scatter: bool = False,
) -> None:
    """Rows through a layer. The arguments are the kernel's."""
    from tokenops.triton.delta_matmul import linear_kernels as kernels

    lists, (outputs, width) = slots_of(p.index, p.x), weight.shape
    cut = _cut("layer", p, (width, outputs), slots=lists["total"], outputs=outputs)
    if other is not None:
        # it stands beside the result in registers
        cut = cut._replace(outputs=min(cut.outputs, 64))
    launch(
        kernels.layer,
        _programs(cut, slots=lists["total"], outputs=outputs),
        p.x,
        a=a,
        **_normalization_arguments(norm),
        weight=weight,
        bias=bias,
        other=other,
        out=out,
        a_strides=strides(a),
        weight_strides=weight.stride(),
        other_strides=strides(other),
        out_strides=strides(out),
        **lists,
        blocks=-(-lists["total"] // cut.slots),
        C=width,
        outputs=outputs,
        GATHER=gather,
        SCATTER=scatter,
        ACTIVATION=activation,
        OTHER=form,
        **_options(p, cut, width),
    )


def _parameters(
    p: LinearProblem,
    grad: Tensor,
    a: Tensor,
    of_weight: Tensor | None,
    of_bias: Tensor | None,
    *,
    norm: Normalization | None = None,
    activation: str = "none",
    gather: bool = False,
) -> None:
    """Gradients of a layer's weight and bias, where wanted. The arguments are the kernel's."""
    from tokenops.triton.delta_matmul import linear_kernels as kernels

    if of_weight is None and of_bias is None:
        return
    lists, outputs, width = slots_of(p.index, p.x), grad.shape[2], a.shape[2]
    cut = _cut("layer_parameters", p, (width, outputs), outputs=outputs, channels=width)
    launch(
        kernels.layer_parameters,
        # the first block of columns has the bias
        _programs(cut, outputs=outputs, channels=1 if of_weight is None else max(width, 1)),
        p.x,
        grad=grad,
        a=a,
        **_normalization_arguments(norm),
        of_weight=of_weight,
        of_bias=of_bias,
        grad_strides=strides(grad),
        a_strides=strides(a),
        **lists,
        C=width,
        outputs=outputs,
        GATHER=gather,
        ACTIVATION=activation,
        **_options(p, cut, width),
    )


def _normalization_arguments(norm: Normalization | None) -> dict[str, Tensor | None]:
    given = (None,) * len(Normalization._fields) if norm is None else norm
    return dict(zip(("norm_weight", "norm_bias", "mean", "inverse"), given, strict=True))


def _cut(kernel: str, p: LinearProblem, widths: tuple[int, int], **result: int) -> Blocks:
    """How to cut a product of rows of these widths; ``result``: the sizes that the kernel's programs divide."""
    choice = TABLE[kernel, p.x.element_size()]
    if any(width % 16 for width in widths):
        return _fitted(choice.narrow, result)
    large = _fitted(choice.large, result)
    few = interpreting() or _programs(large, **result) < processors(p.x.get_device())
    return _fitted(choice.small, result) if few else large


def _fitted(cut: Blocks, result: dict[str, int]) -> Blocks:
    return cut._replace(**{name: min(getattr(cut, name), _pad(size)) for name, size in result.items()})


def _programs(cut: Blocks, **result: int) -> int:
    return math.prod(-(-size // getattr(cut, name)) for name, size in result.items())


def _options(p: LinearProblem, cut: Blocks, width: int) -> dict[str, Any]:
    return {
        "PRECISION": dot_precision(p.x.dtype),
        "BLOCK_N": cut.slots,
        "BLOCK_O": cut.outputs,
        "BLOCK_C": min(cut.channels, _pad(width)),
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
        # or the assembler spills a few to fit one more program beside the others
        **registers(255),
    }


def _pad(size: int) -> int:
    """Blocks are powers of two, of which tl.dot takes 16 or more."""
    return max(16, power_of_two(size))
