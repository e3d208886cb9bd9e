"""A transformer block on what changed, in place; the dense block that it is compared with; and what both mean, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenops
from tokenops.reference import delta_matmul as reference
from tokenops.types import DeltaAttentionProblem, DeltaState, GateProblem

from .frames import CHECKED, Frames
from .harness import Results

EPS = 1e-6
Layer = tuple[Tensor, Tensor]  # weight and bias


class Weights(NamedTuple):
    norm_1: Layer
    qkv: Layer
    projection: Layer
    norm_2: Layer
    mlp_1: Layer
    mlp_2: Layer

    def double(self) -> Weights:
        return self._make((weight.double(), bias.double()) for weight, bias in self)


class State(NamedTuple):
    """Of one block; every tensor is written over."""

    qkv_reference: Tensor  # [1, N, C]
    qkv: Tensor  # [1, N, 3C]
    attention: DeltaState
    projection_reference: Tensor  # [1, N, C]
    projection: Tensor  # [1, N, C]
    mlp_reference: Tensor  # [1, N, C]
    mlp: Tensor  # [1, N, C]


def draw_weights(channels: int, like: Tensor) -> Weights:
    generator = torch.Generator().manual_seed(1)

    def layer(rows: int, columns: int) -> Layer:
        weight, bias = torch.randn(rows, columns, generator=generator) * columns**-0.5, torch.randn(rows, generator=generator) * 0.05
        return weight.to(like), bias.to(like)

    def norm() -> Layer:
        return (1 + 0.1 * torch.randn(channels, generator=generator)).to(like), (0.05 * torch.randn(channels, generator=generator)).to(like)

    return Weights(
        norm(),
        layer(3 * channels, channels),
        layer(channels, channels),
        norm(),
        layer(4 * channels, channels),
        layer(channels, 4 * channels),
    )


def start(weights: Weights, heads: int, x: Tensor, backend: str | None) -> State:
    """After a frame in which every token is new."""
    normed = _norm(x, weights.norm_1)
    qkv = F.linear(normed, *weights.qkv)
    out, attention = tokenops.delta_attention(*_split(qkv, heads), backend=backend)
    attended = _merged(out)
    projection = F.linear(attended, *weights.projection)
    normed_2 = _norm(x + projection, weights.norm_2)
    return State(normed, qkv, attention, attended, projection, normed_2, _mlp(normed_2, weights))


def step(weights: Weights, heads: int, k: int, x: Tensor, s: State, backend: str | None) -> tuple[Results, State]:
    """The next frame: (out [1, N, C], the lists of the three gates)."""
    first = tokenops.delta_gate_(x, s.qkv_reference, k=k, norm=weights.norm_1, norm_eps=EPS, backend=backend)
    # the chosen rows of a reference are the chosen tokens as they are now
    tokenops.gathered_linear(s.qkv_reference, *weights.qkv, index=first, out=s.qkv, backend=backend)
    attended = _merged(tokenops.delta_attention_(*_split(s.qkv, heads), first, s.attention, backend=backend))
    second = tokenops.delta_gate_(attended, s.projection_reference, k=k, backend=backend)
    tokenops.gathered_linear(s.projection_reference, *weights.projection, index=second, out=s.projection, backend=backend)
    third = tokenops.delta_gate_(s.projection, s.mlp_reference, k=k, skip=x, norm=weights.norm_2, norm_eps=EPS, backend=backend)
    tokenops.gathered_mlp(s.mlp_reference, *weights.mlp_1, *weights.mlp_2, index=third, out=s.mlp, backend=backend)
    return (third.total.add_(s.mlp), first.index, second.index, third.index), s


def dense(weights: Weights, heads: int, x: Tensor) -> Tensor:
    attended = _merged(F.scaled_dot_product_attention(*_split(F.linear(_norm(x, weights.norm_1), *weights.qkv), heads)))
    x = x + F.linear(attended, *weights.projection)
    return x + _mlp(_norm(x, weights.norm_2), weights)


def exact_dense(weights: Weights, heads: int, frames: Frames) -> list[Tensor]:
    """The first frames in float64."""
    return [_exact_step(weights.double(), heads, x.double(), None, ())[0] for [x] in frames.grids[:CHECKED]]


class Replay(NamedTuple):
    outs: list[Tensor]  # of the first frames, float64
    choices: Tensor  # [CHECKED, 3, N]: 1 where a token is rightly chosen or left out, less the more its change says otherwise


def replay(weights: Weights, heads: int, k: int, frames: Frames, lists: Sequence[Sequence[Tensor]]) -> Replay:
    """What the block on what changed means, in float64, with the choices of somebody's gates."""
    exact = weights.double()
    _, kept, _ = _exact_step(exact, heads, frames.last[0].double(), None, ())
    outs, choices = [], []
    for [x], chosen in zip(frames.grids, lists, strict=False):
        out, kept, changes = _exact_step(exact, heads, x.double(), kept, chosen)
        outs.append(out)
        choices.append(torch.stack([rightness(change, ids, k) for change, ids in zip(changes, chosen, strict=True)]))
    return Replay(outs, torch.stack(choices))


def rightness(change: Tensor, ids: Tensor, k: int) -> Tensor:
    """[N]: norms of change as a fraction of the k-th greatest for the chosen tokens, the inverse for the others; never above 1."""
    norms = change[0].norm(dim=-1)
    limit = norms.topk(k).values[-1]
    chosen = torch.zeros_like(norms, dtype=torch.bool)
    chosen[ids[0].long()] = True
    # 0 / 0: nothing changed, and any choice is right
    return torch.where(chosen, norms / limit, limit / norms).nan_to_num(nan=1.0).clamp(max=1.0)


def flops(problem: DeltaAttentionProblem, channels: int, k: int) -> int:
    return 2 * k * 12 * channels**2 + reference.attention_flops(problem, False)


def bytes(problem: DeltaAttentionProblem, weights: Weights, state: DeltaState, x: Tensor, k: int) -> int:
    """Least traffic with memory of a frame: weights, listed rows in and out of three segments, gates, attention."""
    layers = sum(part.nbytes for layer in weights for part in layer)
    rows = k * (1 + 3 + 1 + 1 + 1 + 1) * x.shape[2] * x.element_size()
    plain = GateProblem(x, None, x, None, None, EPS, None, None, 2.0, False)
    gates = sum(reference.gate_bytes(gate, k) for gate in (plain, plain, plain._replace(skip=x)))
    return layers + rows + gates + reference.attention_bytes(problem, state)


def state_bytes(attention: DeltaState, x: Tensor) -> int:
    """Three references, and buffers of four widths C and one of 3C beside the attention's."""
    return reference.state_bytes(attention) + 8 * x.nbytes


def _norm(x: Tensor, norm: Layer) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *norm, EPS)


def _mlp(x: Tensor, weights: Weights) -> Tensor:
    return F.linear(F.gelu(F.linear(x, *weights.mlp_1)), *weights.mlp_2)


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Three views [1, H, N, D]."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _merged(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In the dtype given, head by head to bound the memory."""
    heads = zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]) for q, k, v in heads], 1)


def _exact_step(
    weights: Weights, heads: int, x: Tensor, kept: tuple[Tensor, ...] | None, chosen: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    """out, the three references and three buffers, and the changes that the gates saw. Without ``kept`` a frame of its own."""
    changes: list[Tensor] = []

    def segment(at: int, current: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
        """The reference and the buffer of a segment after this frame."""

        def computed(rows: Tensor) -> Tensor:
            rows = F.linear(rows, *layers[0])
            return F.linear(F.gelu(rows), *layers[1]) if len(layers) == 2 else rows

        if kept is None:
            return current, computed(current)
        old, buffer = kept[2 * at : 2 * at + 2]
        changes.append(current - old)
        ids = chosen[at][0].long()
        return old.index_copy(1, ids, current[:, ids]), buffer.index_copy(1, ids, computed(current[:, ids]))

    first = segment(0, _norm(x, weights.norm_1), [weights.qkv])
    second = segment(1, _merged(exact_attention(*_split(first[1], heads))), [weights.projection])
    total = x + second[1]
    third = segment(2, _norm(total, weights.norm_2), [weights.mlp_1, weights.mlp_2])
    return total + third[1], (*first, *second, *third), changes
