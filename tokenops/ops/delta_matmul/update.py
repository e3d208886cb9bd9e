"""Buffers that keep results from frame to frame: the operators and their public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenops.dispatch import choose
from tokenops.ops.arguments import as_lists, check_in_place, check_overlap, dense, refuse_forward_mode
from tokenops.ops.delta_matmul.arguments import check_grid, check_like, plain_index
from tokenops.ops.delta_matmul.backends import BACKENDS
from tokenops.ops.wings import reads_contents
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaGate, TokenIndex

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library("tokenops", "FRAGMENT")
_library.define("update_tokens(Tensor buffer, Tensor rows, Tensor index, str? backend) -> Tensor", tags=_TAGS)
_library.define("update_tokens_(Tensor(a!) buffer, Tensor rows, Tensor index, str? backend) -> ()", tags=_TAGS)
# a gradient that is not wanted comes back as an empty tensor
_library.define(
    "update_tokens_backward(Tensor grad_out, Tensor index, bool[] wanted, str? backend) -> (Tensor grad_buffer, Tensor grad_rows)",
    tags=_TAGS,
)


def update_tokens(
    buffer: Tensor,  # [B, N, C]
    rows: Tensor,  # [B, K, C]
    *,
    index: Tensor | TokenIndex | DeltaGate,
    backend: str | None = None,
) -> Tensor:  # [B, N, C]
    """The buffer with the listed tokens replaced: buffer[index] = rows.

    Args:
        buffer: float32, bfloat16, float16 or float64.
        rows: of the buffer's dtype. What stands in empty slots is not read.
        index: [B, K] per sample or [K] for all, int32 (int64 accepted), TokenIndex or DeltaGate. -1 marks an empty slot, anywhere in the
            list. Ids in one list differ.
        backend: "triton", "cuda", "cpu", "cpu:avx2" and the like, or "reference". Default: the preferred one that can serve the call.

    Differentiable once in buffer and rows. Autocast changes nothing here.

    Raises:
        ValueError: sizes, ranks or devices disagree; an id is out of range or repeated (checked on the CPU; on a GPU if TOKENOPS_CHECK=1).
        TypeError: a dtype is wrong.
        NotImplementedError: the named backend cannot serve the call, with its reasons; a forward-mode derivative is asked for.
        RuntimeError: the result is differentiated twice.

    >>> tokenops.update_tokens(torch.zeros(1, 3, 1), torch.tensor([[[5.0], [6.0]]]), index=torch.tensor([2, -1]))
    tensor([[[0.],
             [0.],
             [5.]]])
    """
    lists = _checked(buffer, rows, index)
    refuse_forward_mode(buffer, rows)
    return torch.ops.tokenops.update_tokens.default(dense(buffer), dense(rows), lists, backend)


def update_tokens_(
    buffer: Tensor,  # [B, N, C]
    rows: Tensor,  # [B, K, C]
    *,
    index: Tensor | TokenIndex | DeltaGate,
    backend: str | None = None,
) -> Tensor:  # the buffer
    """``update_tokens`` in place: writes the rows into the buffer and returns it. Only where no gradient is needed.

    Raises:
        RuntimeError: a gradient is needed.
        ValueError: the buffer is expanded or shares memory with the rows; and as ``update_tokens``.
    """
    lists = _checked(buffer, rows, index)
    check_in_place("buffer", buffer, (rows,), "use update_tokens")
    torch.ops.tokenops.update_tokens_.default(buffer, dense(rows), lists, backend)
    return buffer


def _checked(buffer: Tensor, rows: Tensor, index: Tensor | TokenIndex | DeltaGate) -> Tensor:
    """The lists, [1|B, K]."""
    check_grid("buffer", buffer)
    lists = as_lists(plain_index(index), buffer.shape[0], "buffer", buffer)
    check_like("rows", rows, (buffer.shape[0], lists.shape[1], buffer.shape[2]), "[B, K, C]", "buffer", buffer)
    return lists


def _serve(buffer: Tensor, rows: Tensor, index: Tensor, backend: str | None, out: Tensor) -> None:
    chosen = choose("update_tokens", BACKENDS, backend, buffer)
    if reads_contents(buffer.device, chosen.name):
        reference.check_index(index, buffer.shape[1])
    if out.numel() > 0:
        chosen.run.update(buffer, rows, index, out)


def _forward(buffer: Tensor, rows: Tensor, index: Tensor, backend: str | None) -> Tensor:
    out = buffer.new_empty(buffer.shape)
    _serve(buffer, rows, index, backend, out)
    return out


def _in_place(buffer: Tensor, rows: Tensor, index: Tensor, backend: str | None) -> None:
    check_overlap("buffer", buffer, {"rows": rows})
    _serve(buffer, rows, index, backend, buffer)


def _backward(grad_out: Tensor, index: Tensor, wanted: list[bool], backend: str | None) -> tuple[Tensor, ...]:
    grads, grad_out = _allocate_gradients(grad_out, index, wanted), dense(grad_out)
    chosen = choose("update_tokens_backward", BACKENDS, backend, grad_out)
    if grad_out.numel() > 0:
        chosen.run.update_backward(grad_out, index, *(grad if want else None for grad, want in zip(grads, wanted, strict=True)))
    return grads


def _allocate_gradients(grad_out: Tensor, index: Tensor, wanted: list[bool], *_: Any) -> tuple[Tensor, ...]:
    batch, _tokens, width = grad_out.shape
    shapes = (grad_out.shape, (batch, index.shape[1], width))
    # zeros: an empty grid has nothing to fill a list's rows from
    return tuple(grad_out.new_zeros(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, index, ctx.backend = inputs
    ctx.save_for_backward(index)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    [index] = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    grads = torch.ops.tokenops.update_tokens_backward.default(grad_out, index, wanted, ctx.backend)
    return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None)


def _refuse_double_backward(*_: Any) -> None:
    raise RuntimeError("update_tokens cannot be differentiated twice: its backward pass has no gradient formula")


for _name, _run, _fake in (
    ("update_tokens", _forward, lambda buffer, *_: buffer.new_empty(buffer.shape)),
    ("update_tokens_", _in_place, lambda *arguments: None),
    ("update_tokens_backward", _backward, _allocate_gradients),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tokenops::{_name}", _fake, lib=_library)
torch.library.register_autograd("tokenops::update_tokens", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("tokenops::update_tokens_backward", _refuse_double_backward, lib=_library)
