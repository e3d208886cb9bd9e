"""Launchers of soft merging. ``soft_kernels.py`` holds the device code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenops.triton.launch import dot_precision, launch, power_of_two, row_strides, tile_of
from tokenops.types import SoftMergeGradients

# elements of the tile of a program that multiplies nothing
TILE = 2048


class Blocks(NamedTuple):
    """How the kernels cut their work."""

    tokens: int
    metas: int
    steps: int  # of a product along rows
    columns: int  # of a result
    num_warps: int


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

    call = _Call(x, metric, meta, temperature, normalize)
    batch, tokens, channels = x.shape
    metas, cut = meta.shape[1], call.cut
    terms = {"origin": torch.empty_like(lse), "weight": torch.empty_like(lse)}
    call.launch(kernels.token_softmax, tokens, cut.tokens, **terms, mass=mass, mass_strides=row_strides(mass), lse=lse)
    columns = min(cut.columns, _pad(channels))
    call.launch(
        kernels.collect,
        metas,
        cut.metas,
        parts=-(-channels // columns),
        **terms,
        x=x,
        x_strides=row_strides(x),
        out=out,
        mass_out=mass_out,
        C=channels,
        BLOCK_C=columns,
    )


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

    call = _Call(x, metric, meta, temperature, normalize)
    (batch, tokens, channels), metas, width, cut = x.shape, meta.shape[1], metric.shape[2], call.cut
    # it was rounded to x's type before it got here; products want both factors in one type
    grad_out = grad_out.to(x.dtype)
    inverse_mass, shift = torch.empty((2, batch, metas), dtype=torch.float32, device=x.device)
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
        inverse_mass=inverse_mass,
        shift=shift,
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
    results = {"grad_out": grad_out, "grad_out_strides": row_strides(grad_out), "inverse_mass": inverse_mass, "C": channels}
    tokens_too = {"x": x, "x_strides": row_strides(x), "shift": shift, "BLOCK_C": min(cut.steps, _pad(channels))}
    terms = {"origin": origin, "weight": weight}
    call.launch(
        kernels.token_terms,
        tokens,
        cut.tokens,
        **results,
        **tokens_too,
        **terms,
        mass=mass,
        mass_strides=row_strides(mass),
        lse=lse,
        lse_strides=row_strides(lse),
        share=share,
    )
    if grads.mass is not None:
        grads.mass.copy_(share)
    if grads.x is not None:
        columns = min(cut.columns, _pad(channels))
        parts = -(-channels // columns)
        call.launch(kernels.backward_x, tokens, cut.tokens, parts=parts, **results, **terms, grad_x=grads.x, BLOCK_C=columns)
    terms["share"] = share
    columns = min(cut.columns, _pad(width))
    parts = -(-width // columns)
    if grads.metric is not None or grads.temperature is not None:
        temperatures = None
        if grads.temperature is not None:
            temperatures = torch.empty((batch, -(-tokens // cut.tokens)), dtype=torch.float32, device=x.device)
        if grads.metric is None:
            parts = 1
        call.launch(
            kernels.backward_metric,
            tokens,
            cut.tokens,
            parts=parts,
            **results,
            **tokens_too,
            **terms,
            powers=call.metric_powers,
            grad_metric=grads.metric,
            grad_temperature=temperatures,
            BLOCK_O=columns,
        )
        if grads.temperature is not None and temperatures is not None:
            torch.sum(temperatures, -1, out=grads.temperature)
    if grads.meta is not None:
        parts = -(-width // columns)
        call.launch(
            kernels.backward_meta,
            metas,
            cut.metas,
            parts=parts,
            **results,
            **tokens_too,
            **terms,
            powers=call.meta_powers,
            grad_meta=grads.meta,
            BLOCK_O=columns,
        )


class _Call:
    """What all kernels of a call read: the compared rows, and how long they are."""

    def __init__(self, x: Tensor, metric: Tensor, meta: Tensor, temperature: float | Tensor, normalize: bool) -> None:
        metric_inverse = meta_inverse = self.metric_powers = self.meta_powers = None
        if normalize:
            metric, metric_inverse, self.metric_powers = _unit_rows(metric)
            meta, meta_inverse, self.meta_powers = _unit_rows(meta)
        (self.batch, tokens, width), metas = metric.shape, meta.shape[1]
        learned = isinstance(temperature, Tensor)
        self.cut = _blocks(metas, x.element_size())
        self.inputs: dict[str, Any] = {
            "metric": metric,
            "meta": meta,
            "metric_inverse": metric_inverse,
            "meta_inverse": meta_inverse,
            "temperature": 1.0 if learned else temperature,
            "learned_temperature": temperature if learned else None,
            "metric_strides": row_strides(metric),
            "meta_strides": row_strides(meta),
            "N": tokens,
            "M": metas,
            "F": width,
            "WHOLE_F": width <= min(self.cut.steps, _pad(width)),
            "PRECISION": dot_precision(x.dtype),
            "BLOCK_N": self.cut.tokens,
            "BLOCK_M": self.cut.metas,
            "BLOCK_F": min(self.cut.steps, _pad(width)),
            "num_warps": self.cut.num_warps,
            "num_stages": 2,
        }

    def launch(self, kernel: Any, rows: int, block: int, parts: int | None = None, **arguments: Any) -> None:
        """For every sample, block of rows and, if the kernel has them, part of their columns."""
        blocks = -(-rows // block)
        if parts is not None:
            arguments["parts"] = parts
        launch(kernel, self.batch * blocks * (parts or 1), self.inputs["metric"], **self.inputs, **arguments, blocks=blocks)


def _unit_rows(source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of a usual magnitude, one over their lengths, the powers of two that they were multiplied with)"""
    from tokenops.triton.token_merge import soft_kernels as kernels

    batch, rows, width = source.shape
    scaled = torch.empty(source.shape, dtype=source.dtype, device=source.device)
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
        N=rows,
        blocks=blocks,
        F=width,
        BLOCK_N=tile.rows,
        BLOCK_F=tile.columns,
        num_warps=4,
    )
    return scaled, inverse, powers


def _blocks(metas: int, itemsize: int) -> Blocks:
    """The largest that spill no register on any architecture that ``make gpu-check`` compiles for; none was chosen by time."""
    # float32 products run on the ordinary cores unless TF32 is allowed, and those hold both operands in registers
    cut = Blocks(64, 64, 64, 128, 4) if itemsize == 2 else Blocks(32, 32, 32, 64, 4)
    return cut._replace(metas=min(cut.metas, _pad(metas)))


def _pad(size: int) -> int:
    """Blocks are powers of two, of which tl.dot takes 16 or more."""
    return max(16, power_of_two(size))
