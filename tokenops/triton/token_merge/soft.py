"""Launchers of soft merging. ``soft_kernels.py`` holds the device code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenops.triton.launch import dot_precision, launch, power_of_two, registers, row_strides, tile_of
from tokenops.types import SoftMergeGradients

# elements of the tile of a program that multiplies nothing
TILE = 1024
# rows of a block, at most
FARTHEST = 256
# kernels whose results are rows of meta tokens
OF_METAS = ("collect", "backward_meta")


class Blocks(NamedTuple):
    """How a kernel cuts its work."""

    tokens: int
    metas: int
    metric: int  # elements of metric rows that a product takes at a time
    channels: int  # the same of tokens; 0 where they are not compared
    columns: int  # of a result; 0 where results are numbers
    num_warps: int


# (kernel, bytes of an element): the largest blocks that spill no register on any architecture that ``make gpu-check`` compiles for. None
# was chosen by time. The first two kernels multiply the same blocks: at low temperatures they must agree to the last bit of a score.
# float32 products run on the ordinary cores unless TF32 is allowed, and those hold both operands in registers.
TABLE = {
    ("token_softmax", 2): Blocks(64, 64, 64, 0, 0, 4),
    ("collect", 2): Blocks(64, 64, 64, 0, 128, 8),
    ("token_terms", 2): Blocks(64, 32, 64, 32, 0, 4),
    ("backward_x", 2): Blocks(64, 32, 64, 0, 128, 4),
    ("backward_metric", 2): Blocks(64, 32, 64, 32, 64, 8),
    ("backward_meta", 2): Blocks(64, 32, 64, 32, 64, 4),
    ("token_softmax", 4): Blocks(32, 32, 16, 0, 0, 4),
    ("collect", 4): Blocks(32, 32, 16, 0, 32, 4),
    ("token_terms", 4): Blocks(32, 16, 16, 16, 0, 4),
    ("backward_x", 4): Blocks(32, 32, 32, 0, 32, 4),
    ("backward_metric", 4): Blocks(32, 16, 16, 16, 32, 4),
    ("backward_meta", 4): Blocks(32, 16, 16, 16, 32, 4),
}


def soft_merge(
    x: Tensor,
    metric: Tensor,
    meta: Tensor,
    temperature: float | Tensor,
    mass: Tensor | None,
    normalize: bool,
    out: Tensor,
    mass_out: Tensor,
    lse: Tensor,
) -> None:
    """Fills out [B, M, C], mass_out [B, M] and lse [B, N]."""
    from tokenops.triton.token_merge import soft_kernels as kernels

    x, metric, meta = _near(x), _near(metric), _near(meta)
    call = _Call(x, metric, meta, temperature, normalize)
    channels = x.shape[2]
    terms: dict[str, Any] = {"origin": torch.empty_like(lse), "weight": torch.empty_like(lse)}
    call.launch(kernels.token_softmax, **terms, mass=mass, mass_strides=row_strides(mass), lse=lse)
    call.launch(kernels.collect, channels, **terms, x=x, x_strides=row_strides(x), out=out, mass_out=mass_out, C=channels)


def soft_merge_backward(
    grad_out: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    metric: Tensor,
    meta: Tensor,
    temperature: float | Tensor,
    mass: Tensor | None,
    normalize: bool,
    out: Tensor,
    mass_out: Tensor,
    lse: Tensor,
    grads: SoftMergeGradients,
) -> None:
    """Fills every wanted gradient from grad_out [B, M, C] and grad_mass [B, M]."""
    from tokenops.triton.token_merge import soft_kernels as kernels

    grad_out, x, metric, meta = _near(grad_out), _near(x), _near(metric), _near(meta)
    call = _Call(x, metric, meta, temperature, normalize)
    (batch, tokens, channels), metas, width = x.shape, meta.shape[1], metric.shape[2]
    # it was rounded to x's type before it got here; products want both factors in one type
    grad_out = grad_out.to(x.dtype)
    meta_mass, added = torch.empty((2, batch, metas), dtype=torch.float32, device=x.device)
    tile = tile_of(channels, TILE)
    blocks = -(-metas // tile.rows)
    launch(
        kernels.meta_terms,
        batch * blocks,
        x,
        grad_out=grad_out,
        out=out,
        grad_mass=grad_mass,
        mass_out=mass_out,
        meta_mass=meta_mass,
        added=added,
        grad_out_strides=row_strides(grad_out),
        out_strides=row_strides(out),
        grad_mass_strides=row_strides(grad_mass),
        mass_out_strides=row_strides(mass_out),
        M=metas,
        blocks=blocks,
        C=channels,
        BLOCK_M=tile.rows,
        BLOCK_C=tile.columns,
        num_warps=4,
    )
    origin, weight, share = torch.empty((3, batch, tokens), dtype=torch.float32, device=x.device)
    results = {"grad_out": grad_out, "grad_out_strides": row_strides(grad_out), "meta_mass": meta_mass, "C": channels}
    terms: dict[str, Any] = {"origin": origin, "weight": weight, "share": share}
    given = {**results, "x": x, "x_strides": row_strides(x), "added": added}
    masses: dict[str, Any] = {"mass": mass, "mass_strides": row_strides(mass), "lse": lse, "lse_strides": row_strides(lse)}
    call.launch(kernels.token_terms, **given, **terms, **masses)
    if grads.mass is not None:
        grads.mass.copy_(share)
    if grads.metric is not None or grads.temperature is not None:
        parts = share.new_empty((batch, call.blocks("backward_metric")))
        powers, columns = call.metric_powers, 1 if grads.metric is None else width
        of: dict[str, Any] = {"grad_metric": grads.metric, "grad_temperature": None if grads.temperature is None else parts}
        call.launch(kernels.backward_metric, columns, **given, **terms, **of, powers=powers)
        if grads.temperature is not None:
            torch.sum(parts, -1, out=grads.temperature)
    if grads.meta is not None:
        call.launch(kernels.backward_meta, width, **given, **terms, powers=call.meta_powers, grad_meta=grads.meta)
    if grads.x is not None:
        call.launch(kernels.backward_x, channels, **results, origin=origin, weight=weight, grad_x=grads.x)


class _Call:
    """What all kernels of a call read: the compared rows, and how long they are."""

    def __init__(self, x: Tensor, metric: Tensor, meta: Tensor, temperature: float | Tensor, normalize: bool) -> None:
        metric_inverse = meta_inverse = self.metric_powers = self.meta_powers = None
        if normalize:
            metric, metric_inverse, self.metric_powers = _unit_rows(metric)
            meta, meta_inverse, self.meta_powers = _unit_rows(meta)
        self.metric, self.meta = metric, meta
        learned = isinstance(temperature, Tensor)
        self.inputs: dict[str, Any] = {
            "metric": metric,
            "meta": meta,
            "metric_inverse": metric_inverse,
            "meta_inverse": meta_inverse,
            "temperature": 1.0 if learned else temperature,
            "learned_temperature": temperature if learned else None,
            "metric_strides": row_strides(metric),
            "meta_strides": row_strides(meta),
            "N": metric.shape[1],
            "M": meta.shape[1],
            "F": metric.shape[2],
            "PRECISION": dot_precision(metric.dtype),
            "num_stages": 2,
            # each kernel multiplies the scores anew; all must round them alike, so nothing may be fused with what follows in one of them
            "enable_fp_fusion": False,
        }

    def launch(self, kernel: Any, columns: int = 0, /, **arguments: Any) -> None:
        """A program for every block of tokens, or of meta tokens, and block of the columns of the result."""
        blocks, cut = self.blocks(kernel.__name__), self._cut(kernel.__name__)
        parts = 1
        if columns:
            # rows that begin anywhere are read element by element, which takes more registers
            block = min(cut.columns if columns % 8 == 0 else cut.columns // 2, _pad(columns))
            parts = -(-columns // block)
            arguments |= {"parts": parts, "BLOCK_O": block}
        if cut.channels:
            arguments["BLOCK_C"] = min(cut.channels, _pad(arguments["C"]))
        launch(
            kernel,
            self.metric.shape[0] * blocks * parts,
            self.metric,
            **self.inputs,
            **arguments,
            blocks=blocks,
            WHOLE_F=self.metric.shape[2] <= cut.metric,
            BLOCK_N=cut.tokens,
            BLOCK_M=min(cut.metas, _pad(self.meta.shape[1])),
            BLOCK_F=min(cut.metric, _pad(self.metric.shape[2])),
            num_warps=cut.num_warps,
            # or the assembler spills a few to fit one more program beside the others
            **registers(255),
        )

    def blocks(self, kernel: str) -> int:
        """Blocks of rows that a sample's result is cut into."""
        cut = self._cut(kernel)
        return -(-self.meta.shape[1] // cut.metas) if kernel in OF_METAS else -(-self.metric.shape[1] // cut.tokens)

    def _cut(self, kernel: str) -> Blocks:
        return TABLE[kernel, self.metric.element_size()]


def _unit_rows(source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of a usual magnitude, one over their lengths, the powers of two that they were multiplied with)"""
    from tokenops.triton.token_merge import soft_kernels as kernels

    batch, rows, width = source.shape
    # rows begin where the widest loads may
    scaled = torch.empty((batch, rows, -(-width // 16) * 16), dtype=source.dtype, device=source.device)[..., :width]
    inverse, powers = torch.empty((2, batch, rows), dtype=torch.float32, device=source.device)
    tile = tile_of(width, TILE)
    blocks = -(-rows // tile.rows)
    launch(
        kernels.unit_rows,
        batch * blocks,
        source,
        source=source,
        rows=scaled,
        inverse=inverse,
        powers=powers,
        source_strides=row_strides(source),
        rows_strides=row_strides(scaled),
        N=rows,
        blocks=blocks,
        F=width,
        BLOCK_N=tile.rows,
        BLOCK_F=tile.columns,
        num_warps=4,
    )
    return scaled, inverse, powers


def _near(grid: Tensor) -> Tensor:
    """Rows that the 32-bit offsets within a block reach; copies only rows that lie gigabytes apart."""
    return grid if grid.stride(1) * FARTHEST < 2**31 else grid.contiguous()


def _pad(size: int) -> int:
    """Blocks are powers of two, of which tl.dot takes 16 or more."""
    return max(16, power_of_two(size))
