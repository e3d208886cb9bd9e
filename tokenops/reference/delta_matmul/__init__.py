"""Work on what changed since the last frame: the executable specification, and a backend.

Each file holds one definition, differentiable and in float64 if asked, with its gradients: ``gate`` (what changed), ``linear`` (layers on
listed rows), ``attention`` (on buffers of which a few rows changed). ``rows`` is what they stand on, ``costs`` what they take. Here they
serve as a backend: results go where the caller says. Letters: B batch, N tokens of a frame, M key cells, K slots of a list, H heads, D head
width, C channels, O output channels.
"""

from __future__ import annotations

from torch import Tensor

from tokenops.reference.delta_matmul.attention import dense as dense
from tokenops.reference.delta_matmul.attention import exact as exact
from tokenops.reference.delta_matmul.attention import paper as paper
from tokenops.reference.delta_matmul.attention import pooled as pooled
from tokenops.reference.delta_matmul.attention import pooled_index as pooled_index
from tokenops.reference.delta_matmul.attention import rotation as rotation
from tokenops.reference.delta_matmul.costs import attention_bytes as attention_bytes
from tokenops.reference.delta_matmul.costs import attention_flops as attention_flops
from tokenops.reference.delta_matmul.costs import attention_flops_of as attention_flops_of
from tokenops.reference.delta_matmul.costs import example_inputs as example_inputs
from tokenops.reference.delta_matmul.costs import gate_bytes as gate_bytes
from tokenops.reference.delta_matmul.costs import linear_bytes as linear_bytes
from tokenops.reference.delta_matmul.costs import linear_flops as linear_flops
from tokenops.reference.delta_matmul.costs import linear_flops_of as linear_flops_of
from tokenops.reference.delta_matmul.costs import state_bytes as state_bytes
from tokenops.reference.delta_matmul.gate import check_gate as check_gate
from tokenops.reference.delta_matmul.gate import gate_gradients as gate_gradients
from tokenops.reference.delta_matmul.gate import gated as gated
from tokenops.reference.delta_matmul.linear import ACTIVATIONS as ACTIVATIONS
from tokenops.reference.delta_matmul.linear import activated as activated
from tokenops.reference.delta_matmul.linear import listed_gradients as listed_gradients
from tokenops.reference.delta_matmul.linear import projected as projected
from tokenops.reference.delta_matmul.linear import projected_gradients as projected_gradients
from tokenops.reference.delta_matmul.rows import listed as listed
from tokenops.reference.delta_matmul.rows import replaced as replaced
from tokenops.reference.delta_matmul.rows import row_ids as row_ids
from tokenops.reference.delta_matmul.rows import taken as taken
from tokenops.reference.token_select import check_lists
from tokenops.types import (
    DeltaAttentionProblem,
    DeltaGate,
    DeltaState,
    GateBackwardProblem,
    GateGradients,
    GateProblem,
    LinearGradients,
    LinearProblem,
)


def attention(problem: DeltaAttentionProblem, state: DeltaState, out: Tensor) -> None:
    """Fill out [B, H, N, Dv] and bring the state, of which nothing is known in a first frame, up to this frame."""
    old = None if problem.rows is None else state
    if state.probability is None:
        result, new = exact(problem, old)
    else:
        result, new = paper(problem, old, state.probability.dtype)
    out.copy_(result)
    for part, advanced in zip(state, new, strict=True):
        if part is not None and advanced is not None:
            part.copy_(advanced)


def gate(problem: GateProblem, new: DeltaGate) -> None:
    """Fill the result; its reference may be the problem's own. Without a skip, its total is not filled."""
    results = gated(problem, new.index.shape[1])
    for name, target, result in zip(DeltaGate._fields, new, results, strict=True):
        if name != "total" or problem.skip is not None:
            target.copy_(result)


def gate_backward(problem: GateBackwardProblem, grads: GateGradients) -> None:
    for wanted, result in zip(grads, gate_gradients(problem), strict=True):
        if wanted is not None and result is not None:
            wanted.copy_(result)


def linear(problem: LinearProblem, out: Tensor) -> None:
    """Fill out [B, K, O]."""
    out.copy_(projected(problem))


def linear_into(problem: LinearProblem, out: Tensor) -> None:
    """Write the listed rows of out [B, N, O] and leave the others."""
    ids = row_ids(problem.index, out.shape[0], out.shape[1])
    sample, slot = (ids >= 0).nonzero(as_tuple=True)
    out[sample, ids[sample, slot]] = projected(problem)[sample, slot]


def linear_backward(problem: LinearProblem, grad_out: Tensor, grads: LinearGradients) -> None:
    results = projected_gradients(problem, grad_out, [grad is not None for grad in grads])
    for wanted, result in zip(grads, results, strict=True):
        if wanted is not None and result is not None:
            wanted.copy_(result)


def update(buffer: Tensor, rows: Tensor, index: Tensor, out: Tensor) -> None:
    """Fill out [B, N, C], which may be the buffer: the listed rows from ``rows`` [B, K, C], the others as they are."""
    out.copy_(replaced(buffer, rows, row_ids(index, buffer.shape[0], buffer.shape[1])))


def update_backward(grad_out: Tensor, index: Tensor, grad_buffer: Tensor | None, grad_rows: Tensor | None) -> None:
    ids = row_ids(index, grad_out.shape[0], grad_out.shape[1])
    if grad_buffer is not None:
        grad_buffer.copy_(grad_out.masked_fill(listed(ids, grad_out.shape[1]).unsqueeze(-1), 0.0))
    if grad_rows is not None:
        grad_rows.copy_(taken(grad_out, ids))


def check_index(index: Tensor, rows: int) -> None:
    """
    Raises:
        ValueError: an id out of range, or repeated within a list.
    """
    check_lists(index, rows, shared=False)
