"""A linear layer, or two with an activation between them, on listed rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenops.reference.delta_matmul.rows import normalized, normalized_gradients, replaced, row_ids, taken, wide
from tokenops.types import LinearGradients, LinearProblem

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")


def projected(problem: LinearProblem) -> Tensor:
    """[B, K, O]: activation(norm(x[index]) weight^T + bias), and then weight_2^T + bias_2 if there is a second layer; 0 in empty slots.

    Half types are computed in float32, float64 in float64; the result is rounded once.
    """
    p, dtype = problem, wide(problem.x)
    ids = row_ids(p.index, p.x.shape[0], p.x.shape[1])
    rows = taken(p.x, ids).to(dtype)
    if p.norm_weight is not None and p.norm_bias is not None:
        rows = normalized(rows, p.norm_weight, p.norm_bias, p.norm_eps)
    y = activated(_affine(rows, p.weight, p.bias), p.activation)
    if p.weight_2 is not None:
        y = _affine(y, p.weight_2, p.bias_2)
    return y.masked_fill((ids < 0).unsqueeze(-1), 0.0).to(p.x.dtype)


def projected_gradients(problem: LinearProblem, grad_out: Tensor, wanted: Sequence[bool] = (True,) * 7) -> LinearGradients:
    """Of everything that is wanted, for grad_out [B, K, O]."""
    p, grads = problem, listed_gradients(problem, grad_out, wanted)
    if grads.x is None:
        return grads
    ids = row_ids(p.index, p.x.shape[0], p.x.shape[1])
    return grads._replace(x=replaced(torch.zeros_like(p.x), grads.x, ids))


def listed_gradients(problem: LinearProblem, grad_out: Tensor, wanted: Sequence[bool] = (True,) * 7) -> LinearGradients:
    """The same, of the listed rows of x only: [B, K, C] in its dtype. Written out, because an operator runs below autograd. The first layer
    is computed anew where something depends on its result."""
    p, dtype, want = problem, wide(problem.x), LinearGradients._make(wanted)
    ids = row_ids(p.index, p.x.shape[0], p.x.shape[1])
    gathered = taken(p.x, ids).to(dtype)
    rows = gathered
    if p.norm_weight is not None and p.norm_bias is not None:
        rows = normalized(rows, p.norm_weight, p.norm_bias, p.norm_eps)
    # an empty slot gives nothing, also to the biases
    grad = grad_out.to(dtype).masked_fill((ids < 0).unsqueeze(-1), 0.0)
    x, weight, bias, norm_weight, norm_bias, weight_2, bias_2 = (None,) * 7
    bends = p.activation != "none"
    inner = _affine(rows, p.weight, p.bias) if bends or (want.weight_2 and p.weight_2 is not None) else None
    if p.weight_2 is not None:
        if want.weight_2 and inner is not None:
            weight_2 = _outer(grad, activated(inner, p.activation))
        if want.bias_2:
            bias_2 = grad.sum((0, 1))
        grad = grad @ p.weight_2.to(dtype)
    if bends and inner is not None:
        grad = grad * _slope(inner, p.activation)
    if want.weight:
        weight = _outer(grad, rows)
    if want.bias:
        bias = grad.sum((0, 1))
    if want.x or want.norm_weight or want.norm_bias:
        x = grad @ p.weight.to(dtype)
        if p.norm_weight is not None:
            x, norm_weight, norm_bias = normalized_gradients(x, gathered, p.norm_weight, p.norm_eps)
        x = x.to(p.x.dtype)
    return LinearGradients(x, weight, bias, norm_weight, norm_bias, weight_2, bias_2)


def _affine(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))


def _outer(grad: Tensor, rows: Tensor) -> Tensor:
    """[O, C]: gradient of a weight."""
    return grad.flatten(0, 1).T @ rows.flatten(0, 1)


def activated(h: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(h)
    if activation == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    if activation == "relu":
        return F.relu(h)
    return F.silu(h) if activation == "silu" else h


def _slope(h: Tensor, activation: str) -> Tensor:
    """Derivative of an activation."""
    if activation == "gelu":
        return torch.special.ndtr(h) + h * torch.exp(-0.5 * h.square()) / math.sqrt(2.0 * math.pi)
    if activation == "gelu_tanh":
        scale = math.sqrt(2.0 / math.pi)
        t = torch.tanh(scale * (h + 0.044715 * h**3))
        return 0.5 * (1.0 + t) + 0.5 * h * (1.0 - t.square()) * scale * (1.0 + 3.0 * 0.044715 * h.square())
    if activation == "relu":
        return (h > 0.0).to(h.dtype)
    s = torch.sigmoid(h)
    return s * (1.0 + h * (1.0 - s))
