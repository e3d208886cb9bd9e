"""Launchers of what the other files of this room share: listed rows, and the layer normalisation of them. ``row_kernels.py`` holds the
device code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenops.triton.launch import launch, power_of_two, tile_of

# elements of the tile of a program that copies, 8 a thread of 4 warps
TILE = 1024
# elements of the tile of a program that computes with whole rows, and the longest row that one holds in registers
ROWS, LONGEST = 2048, 4096
# sums over all rows are cut into so many, at most
STRIPS = 64


class Normalization(NamedTuple):
    """A layer normalisation of listed rows, with what its backward pass reads."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    mean: Tensor  # [B, K] float32
    inverse: Tensor  # [B, K] float32, one over the standard deviation


def update(buffer: Tensor, rows: Tensor, index: Tensor, out: Tensor) -> None:
    """Fills out [B, N, C], which may be the buffer."""
    if out is not buffer:
        out.copy_(buffer)
    put(rows, index, out)


def update_backward(grad_out: Tensor, index: Tensor, grad_buffer: Tensor | None, grad_rows: Tensor | None) -> None:
    """Fills grad_buffer [B, N, C] and grad_rows [B, K, C], where wanted."""
    from tokenops.triton.delta_matmul import row_kernels as kernels

    if grad_buffer is not None:
        grad_buffer.copy_(grad_out)
        put(None, index, grad_buffer)
    if grad_rows is not None:
        slots = slots_of(index, grad_out)
        programs, blocks = by_parts(slots["total"], grad_out.shape[2])
        given = {"source": grad_out, "rows": grad_rows, "source_strides": strides(grad_out), "rows_strides": strides(grad_rows)}
        launch(kernels.take_rows, programs, grad_out, **given, **slots, **blocks)


def put(rows: Tensor | None, index: Tensor, out: Tensor) -> None:
    """Writes the listed rows of out [B, N, C]: from rows [B, K, C], or with zeros."""
    from tokenops.triton.delta_matmul import row_kernels as kernels

    slots = slots_of(index, out)
    programs, blocks = by_parts(slots["total"], out.shape[2])
    given = {"rows": rows, "out": out, "rows_strides": strides(rows), "out_strides": strides(out)}
    launch(kernels.put_rows, programs, out, **given, **slots, **blocks)


def normalization(x: Tensor, index: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Normalization:
    """Of the listed rows of x [B, N, C]; without a list, of all."""
    from tokenops.triton.delta_matmul import row_kernels as kernels

    slots = slots_of(index, x)
    mean, inverse = torch.empty((2, x.shape[0], slots["K"]), dtype=torch.float32, device=x.device)
    programs, blocks = by_rows(slots["total"], x.shape[2])
    given = {"x": x, "mean": mean, "inverse": inverse, "x_strides": strides(x), "eps": float(eps)}
    launch(kernels.normalize_statistics, programs, x, **given, **slots, **blocks)
    return Normalization(weight, bias, mean, inverse)


def normalization_backward(
    grad: Tensor,  # [B, K, C] float32
    x: Tensor,
    index: Tensor | None,
    norm: Normalization,
    added: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Fills the listed rows of grad_x [B, N, C], to which ``added`` [B, N, C] comes, and grad_weight and grad_bias [C], where wanted."""
    from tokenops.triton.delta_matmul import row_kernels as kernels

    slots, width = slots_of(index, x), x.shape[2]
    given: dict[str, Any] = {"grad": grad, "x": x, "mean": norm.mean, "inverse": norm.inverse, "x_strides": strides(x), **slots}
    if grad_x is not None:
        results = {"added": added, "grad_x": grad_x, "added_strides": strides(added), "grad_x_strides": strides(grad_x)}
        programs, blocks = by_rows(slots["total"], width)
        launch(kernels.normalize_backward, programs, x, **given, **results, weight=norm.weight, **blocks)
    if grad_weight is None and grad_bias is None:
        return
    _, blocks = by_parts(slots["total"], width)
    # the same strips on every device: sums are added up in one order everywhere
    strip = max(1, -(-slots["total"] // (STRIPS * blocks["BLOCK_N"]))) * blocks["BLOCK_N"]
    strips = -(-slots["total"] // strip)
    parts = torch.empty((2, strips, width), dtype=torch.float32, device=x.device)
    programs = strips * -(-width // blocks["BLOCK_C"])
    launch(kernels.normalize_parameters, programs, x, **given, of_weight=parts[0], of_bias=parts[1], strip=strip, **blocks)
    for wanted, part in zip((grad_weight, grad_bias), parts, strict=True):
        if wanted is not None:
            wanted.copy_(part.sum(0))


def slots_of(index: Tensor | None, grid: Tensor) -> dict[str, Any]:
    """What kernels take of lists of rows of a grid [B, N, C]; None names every row."""
    batch, tokens, _ = grid.shape
    slots = tokens if index is None else index.shape[1]
    stride = 0 if index is None or index.shape[0] == 1 else index.stride(0)
    return {"index": index, "index_stride": stride, "N": tokens, "K": slots, "total": batch * slots}


def strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """Of a grid [B, N, C]; one sample serves all."""
    if tensor is None:
        return (0, 0, 1)
    # what stands one after the other in memory shall look so, also where there is only one: kernels then load it at once
    last = 1 if tensor.shape[2] == 1 else tensor.stride(2)
    return (0 if tensor.shape[0] == 1 else tensor.stride(0), tensor.stride(1), last)


def by_parts(total: int, width: int) -> tuple[int, dict[str, int]]:
    """Programs for so many rows and their blocks, for kernels that take columns of a row one by one."""
    tile = tile_of(width, TILE)
    programs = -(-total // tile.rows) * -(-width // tile.columns)
    return programs, {"C": width, "BLOCK_N": tile.rows, "BLOCK_C": tile.columns, "num_warps": 4}


def by_rows(total: int, width: int) -> tuple[int, dict[str, int]]:
    """The same for kernels that compute with a row as a whole, which is in registers unless it is very long."""
    columns = min(power_of_two(width), LONGEST)
    rows = min(256, max(1, ROWS // columns))
    return -(-total // rows), {"C": width, "BLOCK_N": rows, "BLOCK_C": columns, "num_warps": 8 if columns == LONGEST else 4}
