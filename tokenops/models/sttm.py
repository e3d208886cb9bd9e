"""Merging the tokens of a video into those of its objects, over space and then over time: a plug-in for video transformers.

After Z. Feng, J. Xu, L. Ma, S. Zhang, "Efficient Video Transformers via Spatial-temporal Token Merging for Action Recognition", ACM TOMM,
2023 (doi 10.1145/3633781). THIS IS A RECONSTRUCTION. Nothing of that work is public but its abstract, which says: meta tokens are found
that stand for the video's important objects; tokens are scored by their resemblance to these; the scores steer a fusion over space and one
over time; the tokens' places are combined linearly into motion features. Every choice below that point is ours: how meta tokens are found,
what resemblance is, that assignment is soft or hard, how many windows there are, where it is inserted. So are the numbers of the preset,
calibrated to the saving that the abstract names (38 % of a ViT's multiply-adds). No published weights exist, and no published outputs.

Not the training-free STTM of J. Hyun et al. (ICCV 2025) for language models, a quadtree without meta tokens.

Letters: B batch, T frames, N tokens of a frame, G windows of frames, M meta tokens, C channels, F channels of what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenops.models.attach import Attachment, OpenBlock, find_blocks, leading_tokens
from tokenops.models.blocks import MultiplyAdds
from tokenops.ops.token_merge import merge_tokens, pairwise_argmax, plan_from_slots, soft_merge, unmerge_tokens
from tokenops.types import MergePlan

MODES = ("soft", "hard")


class Merged(NamedTuple):
    """What a stage makes of a video."""

    x: Tensor  # [B, G, M, C], appearance and motion
    place: Tensor  # [B, G, M, 3] float32, (t, y, x) of the centre of mass
    mass: Tensor  # [B, G, M] float32, how many of the first tokens each one stands for; sums to what went in
    metric: Tensor  # [B, T, N, F], by which tokens
    meta: Tensor  # [B, M, F], and meta tokens were compared
    plan: MergePlan | None  # hard: of each frame, for B T samples


class STTM(nn.Module):
    """One merger: T N tokens become G M. Our reconstruction, see the top of this file.

    With a[n] the mass that a token has to give, and u = norm(x) W_f, w = norm(z) W_f:

    1. Meta tokens: z[m] = sum over all tokens of softmax(norm(x) W_g + log a)[n, m] x[n].
    2. Assignment: A[n, m] = softmax over m of cos(u[n], w[m]) / temperature, in hard mode 1 for the largest cosine and 0 otherwise. Trained
       straight through: forward as hard, backward as soft.
    3. Space, in each frame t: mass[t, m] = sum_n A a; y[t, m] = sum_n A a x / mass; centre c[t, m] = sum_n A a place / mass.
    4. Time, in each window g: the mean of y[t, m] weighted by mass[t, m] exp(cos(y W_f, w[m]) / temperature); masses add up.
    5. Motion: W_m [c of each frame of the window; c of the last - c of the first], added. W_m begins at zero. Where nothing of m is in a
       frame, the centre of the window stands in.

    Args:
        dim: C.
        frames: T, a multiple of ``windows``.
        windows, meta_tokens: G, M.
        metric_dim: F, default C / 4.
        mode: "soft" or "hard"; may be set later, say to train soft and run hard.
        detach_metric: x gets no gradient through what is compared.
        temperature: at the beginning; it is learned.
    """

    def __init__(
        self,
        dim: int,
        frames: int,
        *,
        windows: int = 4,
        meta_tokens: int = 98,
        metric_dim: int | None = None,
        mode: str = "soft",
        detach_metric: bool = False,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if windows < 1 or frames % windows:
            raise ValueError(f"windows must divide the {frames} frames, got {windows}")
        if meta_tokens < 1:
            raise ValueError(f"meta_tokens must be at least 1, got {meta_tokens}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.frames, self.windows, self.meta_tokens, self.mode, self.detach_metric = frames, windows, meta_tokens, mode, detach_metric
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.score = nn.Linear(dim, meta_tokens, bias=False)
        self.metric = nn.Linear(dim, dim // 4 if metric_dim is None else metric_dim, bias=False)
        self.motion = nn.Linear(3 * (frames // windows) + 3, dim, bias=False)
        # its logarithm, so that no step of an optimizer makes it negative
        self.log_temperature = nn.Parameter(torch.tensor(log(temperature)))
        # wide logits: meta tokens that all begin as the mean of the video would be alike, and stay so
        nn.init.normal_(self.score.weight, std=3.0 * dim**-0.5)
        # angles between tokens survive
        nn.init.orthogonal_(self.metric.weight)
        nn.init.zeros_(self.motion.weight)

    @property
    def temperature(self) -> Tensor:  # [] float32, float64 in a float64 model
        return self.log_temperature.to(_statistic_dtype(self.log_temperature)).exp()

    def forward(self, x: Tensor, place: Tensor, mass: Tensor | None = None) -> Merged:
        """
        Args:
            x: [B, T, N, C].
            place: [T, N, 3] or [B, T, N, 3], (t, y, x) in [-1, 1]; ``token_places`` of a grid, or a former stage's.
            mass: [B, T, N], a former stage's; None: 1 each.

        Raises:
            ValueError: x is not of ``frames`` frames, or place or mass are not for its tokens.
        """
        if x.dim() != 4 or x.shape[1] != self.frames:
            raise ValueError(f"x must be [B, {self.frames}, N, C], got {list(x.shape)}")
        batch, frames, tokens, _ = x.shape
        if place.shape[-3:] != (frames, tokens, 3):
            raise ValueError(f"place must be [{frames}, {tokens}, 3] or [{batch}, {frames}, {tokens}, 3], got {list(place.shape)}")
        dtype = _statistic_dtype(x)
        place = place.to(dtype).expand(batch, -1, -1, -1)
        mass = x.new_ones(batch, frames, tokens, dtype=dtype) if mass is None else mass.to(dtype)
        if mass.shape != x.shape[:3]:
            raise ValueError(f"mass must be {list(x.shape[:3])}, got {list(mass.shape)}")

        normalized = self.norm(x.detach() if self.detach_metric else x)
        metric = self.metric(normalized)
        meta = self.metric(self.norm(self._meta_tokens(x, normalized, mass)))
        y, centre, received, plan = self._over_space(x, place, mass, metric, meta)
        return self._over_time(y, centre, received, metric, meta, plan)

    def _meta_tokens(self, x: Tensor, normalized: Tensor, mass: Tensor) -> Tensor:  # [B, M, C]
        share = (self.score(normalized).to(mass.dtype) + _safe_log(mass)[..., None]).flatten(1, 2).softmax(1)
        z = share.to(x.dtype).mT @ x.flatten(1, 2)
        return z.detach() if self.detach_metric else z

    def _over_space(
        self, x: Tensor, place: Tensor, mass: Tensor, metric: Tensor, meta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, MergePlan | None]:
        """In every frame: y [B, T, M, C], centres [B, T, M, 3], mass [B, T, M], and the plan of hard mode."""
        batch, frames, _, width = x.shape
        # places go along with the tokens: one assignment, read once
        rows = torch.cat([x, place.to(x.dtype)], -1).flatten(0, 1)
        given, metric, meta = mass.flatten(0, 1), metric.flatten(0, 1), _per_frame(meta, frames).to(metric.dtype)
        plan = None
        if self.mode == "soft":
            merged, received = soft_merge(rows, metric, meta, temperature=self.temperature, mass=given)
        else:
            plan = plan_from_slots(pairwise_argmax(metric, meta)[1], self.meta_tokens)
            if self.training and torch.is_grad_enabled():
                assigned = self._straight_through(metric, meta, plan) * given[..., None]
                received = assigned.sum(1)
                merged = assigned.mT.to(rows.dtype) @ rows / received.masked_fill(received == 0.0, 1.0)[..., None].to(rows.dtype)
            else:
                result = merge_tokens(rows, plan, size=given, return_size=True)
                assert isinstance(result, tuple)
                merged, received = result
        y, centre = merged.unflatten(0, (batch, frames)).split((width, 3), -1)
        return y, centre.to(mass.dtype), received.unflatten(0, (batch, frames)), plan

    def _over_time(self, y: Tensor, centre: Tensor, mass: Tensor, metric: Tensor, meta: Tensor, plan: MergePlan | None) -> Merged:
        windows = (self.windows, self.frames // self.windows)
        likeness = (F.normalize(self.metric(y), dim=-1) * F.normalize(meta, dim=-1)[:, None]).sum(-1).to(mass.dtype) / self.temperature
        # [B, G, frames of a window, M] from here
        y, centre, mass, likeness = (part.unflatten(1, windows) for part in (y, centre, mass, likeness))
        present = mass > 0.0
        # the largest that counts is taken off, so that one of the weights is its mass at any temperature; those of no mass stay finite
        largest = likeness.detach().masked_fill(~present, -torch.inf).amax(2, keepdim=True)
        weight = mass * (likeness - largest.masked_fill(largest.isinf(), 0.0)).clamp(max=60.0).exp()
        fused = (_share(weight, 2).to(y.dtype)[..., None] * y).sum(2)

        place = (_share(mass, 2)[..., None] * centre).sum(2)
        centre = torch.where(present[..., None], centre, place[:, :, None])
        path = torch.cat([centre.transpose(2, 3).flatten(3), centre[:, :, -1] - centre[:, :, 0]], -1)
        return Merged(fused + self.motion(path.to(self.motion.weight.dtype)).to(fused.dtype), place, mass.sum(2), metric, meta, plan)

    def assignment(self, metric: Tensor, meta: Tensor) -> Tensor:  # [S, N, F], [S, M, F] -> [S, N, M]
        """A of soft mode."""
        cosine = F.normalize(metric, dim=-1) @ F.normalize(meta, dim=-1).mT
        return (cosine.to(_statistic_dtype(cosine)) / self.temperature).softmax(-1)

    def _straight_through(self, metric: Tensor, meta: Tensor, plan: MergePlan) -> Tensor:
        soft = self.assignment(metric, meta)
        return F.one_hot(plan.slot.long(), self.meta_tokens).to(soft.dtype) + soft - soft.detach()

    def unmerge(self, y: Tensor, merged: Merged) -> Tensor:  # [B, G, M, C] -> [B, T, N, C]
        """Every token gets the mean of the merged tokens of its window, as it was assigned to them: for dense outputs."""
        batch, frames = merged.metric.shape[:2]
        rows = y.repeat_interleave(frames // self.windows, 1).flatten(0, 1)
        if merged.plan is not None and not self.training:
            return unmerge_tokens(rows, merged.plan).unflatten(0, (batch, frames))
        metric, meta = merged.metric.flatten(0, 1), _per_frame(merged.meta, frames)
        assigned = self.assignment(metric, meta) if merged.plan is None else self._straight_through(metric, meta, merged.plan)
        return (assigned.to(rows.dtype) @ rows).unflatten(0, (batch, frames))

    def flops(self, tokens: int) -> MultiplyAdds:
        """Of one video with so many tokens in each frame. What its authors count is not known: ``published`` leaves out comparing the fused
        tokens in step 4, and has six numbers for each frame in step 5; the preset was calibrated so.
        """
        dim, metric, m, every = self.score.in_features, self.metric.out_features, self.meta_tokens, self.frames * tokens
        shared = every * (3 * dim * m + dim * metric + metric * m + 3 * m) + m * dim * metric
        fusing = self.frames * m * dim
        comparing = self.frames * m * (dim * metric + metric)
        published = shared + fusing + self.windows * m * 6 * (self.frames // self.windows) * dim
        return MultiplyAdds(shared + fusing + comparing + self.windows * m * self.motion.in_features * dim, published)


class Tokens(NamedTuple):
    """What goes from stage to stage beside the tokens."""

    place: Tensor  # [T, N, 3] | [B, T, N, 3]
    mass: Tensor | None  # [B, T, N]; None: 1 each
    merged: tuple[Merged, ...]  # of the stages so far


class STTMAttachment(Attachment[Tokens]):
    """STTM in a model, until ``detach``; as a context manager, until its end. See ``attach_sttm``.

    ``stages``: the mergers, which also are part of the model, as ``sttm`` of their blocks. ``last.merged`` says what the latest forward
    merged.
    """

    def __init__(
        self, model: nn.Module, stages: dict[int, STTM], grid: tuple[int, int, int], *, protected: int, proportional: bool, unmerge: bool
    ) -> None:
        first = min(stages)
        super().__init__(model, first)
        self.stages, self._at = nn.ModuleList(stages.values()), {at - first: stage for at, stage in stages.items()}
        self.grid, self.protected, self.proportional, self.unmerge = grid, protected, proportional, unmerge
        for at, stage in self._at.items():
            block = self.blocks[at]
            block.block.add_module("sttm", stage.to(block.get["proj"].weight))

    def step(self, at: int, x: Tensor, state: Tokens | None) -> tuple[Tensor, Tokens]:
        if state is None:
            state = Tokens(token_places(self.grid, device=x.device), None, ())
        if at in self._at:
            x, state = self._merged(self._at[at], x, state)
        x, _ = self.blocks[at].attention(x, self._bias(state))
        return self.blocks[at].mlp(x), state

    def _merged(self, stage: STTM, x: Tensor, state: Tokens) -> tuple[Tensor, Tokens]:
        frames, tokens = state.place.shape[-3:-1]
        if x.shape[1] != self.protected + frames * tokens:
            raise ValueError(f"x must be [B, {self.protected} + {frames} * {tokens}, C] at a stage, got {list(x.shape)}")
        leading, rest = x.split((self.protected, frames * tokens), 1)
        merged = stage(rest.unflatten(1, (frames, tokens)), state.place, state.mass)
        return torch.cat([leading, merged.x.flatten(1, 2)], 1), Tokens(merged.place, merged.mass, (*state.merged, merged))

    def _bias(self, state: Tokens) -> Tensor | None:  # [B, tokens]
        """What is added to the logits of the keys: the logarithms of their masses. Merged tokens that are of nothing are not seen."""
        assert state.mass is not None
        mass = state.mass.flatten(1)
        if self.proportional:
            bias = _safe_log(mass)
        elif state.merged[-1].plan is not None:
            bias = torch.zeros_like(mass).masked_fill(mass == 0.0, -torch.inf)
        else:
            return None
        return F.pad(bias, (self.protected, 0))

    def finish(self, x: Tensor, state: Tokens) -> tuple[Tensor, Tokens]:
        if self.unmerge:
            leading, rest = x[:, : self.protected], x[:, self.protected :]
            for stage, merged in zip(reversed(self.stages), reversed(state.merged), strict=True):
                assert isinstance(stage, STTM)
                rest = stage.unmerge(rest.unflatten(1, merged.mass.shape[1:]), merged).flatten(1, 2)
            x = torch.cat([leading, rest], 1)
        # a report keeps no graph alive
        report = tuple(Merged._make(part.detach() if isinstance(part, Tensor) else part for part in one) for one in state.merged)
        return x, Tokens(report[-1].place, report[-1].mass, report)

    def detach(self) -> None:
        super().detach()
        for at in self._at:
            del self.blocks[at].block.sttm
        self._at = {}


def attach_sttm(
    model: nn.Module,
    layers: Sequence[int] = (6,),
    *,
    grid: tuple[int, int, int],
    windows: int | Sequence[int] = 4,
    meta_tokens: int | Sequence[int] = 98,
    mode: str = "soft",
    proportional: bool = True,
    metric_dim: int | None = None,
    detach_metric: bool = False,
    class_token: bool | None = None,
    distill_token: bool | None = None,
    unmerge: bool = False,
) -> STTMAttachment:
    """Put STTM before blocks of a video transformer. The defaults are the calibrated preset for ViT-B on 8 x 14 x 14 tokens.

    Args:
        model: as in ``attach_tome``, of joint attention over all tokens, frame by frame. It is changed in place: blocks that get a merger
            have it as ``sttm``, and its parameters with theirs. Train them: they begin at random.
        layers: before which blocks, ascending, the first being 0.
        grid: (frames, height, width) of the tokens; (1, height, width) for images.
        windows, meta_tokens: G and M, one for all stages or one for each. A stage makes G "frames" of M tokens of the ones before it.
        mode, metric_dim, detach_metric: as in ``STTM``. Each of ``stages`` has its own mode, which may be set later.
        proportional: add the logarithm of a token's mass to the logits of its key.
        class_token, distill_token: as in ``attach_tome``; they are set aside.
        unmerge: after the last block give every token a mean of the merged tokens, as it was assigned to them.

    Raises:
        ValueError: as ``attach_tome``; layers do not ascend or are not of the model, windows do not divide a stage's frames, or the numbers
            of layers, windows and meta tokens disagree.
    """
    has_class, has_distill = leading_tokens(model, class_token, distill_token)
    blocks = [block for _, _, block in find_blocks(model)]
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < len(blocks):
        raise ValueError(f"layers must ascend and be of the model's {len(blocks)} blocks, counted from 0, got {list(layers)}")
    numbers = {"windows": windows, "meta_tokens": meta_tokens}
    each = {name: [given] * len(layers) if isinstance(given, int) else list(given) for name, given in numbers.items()}
    for name, given in each.items():
        if len(given) != len(layers):
            raise ValueError(f"{name} must be a number or {len(layers)}, one for each layer, got {given}")
    dim, frames, stages = OpenBlock(blocks[layers[0]]).get["proj"].weight.shape[0], grid[0], {}
    for layer, g, m in zip(layers, each["windows"], each["meta_tokens"], strict=True):
        stages[layer] = STTM(dim, frames, windows=g, meta_tokens=m, metric_dim=metric_dim, mode=mode, detach_metric=detach_metric)
        frames = g
    protected = has_class + has_distill
    return STTMAttachment(model, stages, grid, protected=protected, proportional=proportional, unmerge=unmerge)


def token_places(grid: tuple[int, int, int], device: torch.device | str | None = None) -> Tensor:  # [T, N, 3]
    """(t, y, x) of each token of a grid (frames, height, width), each from -1 to 1; 0 where there is only one."""
    axes = (torch.linspace(-1.0, 1.0, n, device=device) if n > 1 else torch.zeros(n, device=device) for n in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(1, 2)


def flops(
    layers: Sequence[int] = (6,),
    *,
    windows: Sequence[int] = (4,),
    meta_tokens: Sequence[int] = (98,),
    depth: int = 12,
    dim: int = 768,
    grid: tuple[int, int, int] = (8, 14, 14),
    patch: int = 2 * 16 * 16 * 3,
    protected: int = 0,
) -> MultiplyAdds:
    """Multiply-adds of a model for one video: patch embedding, blocks and mergers (see ``STTM.flops`` for ``published``).

    Args:
        layers, windows, meta_tokens, grid: as in ``attach_sttm``; no layers is the model without STTM.
        patch: numbers in a patch.
        protected: tokens set aside.
    """
    frames, tokens = grid[0], grid[1] * grid[2]
    total = published = frames * tokens * patch * dim
    stages = {layer: (g, m) for layer, g, m in zip(layers, windows, meta_tokens, strict=True)} if layers else {}
    for layer in range(depth):
        if layer in stages:
            g, m = stages[layer]
            # only its sizes are asked for
            with torch.device("meta"):
                module = STTM(dim, frames, windows=g, meta_tokens=m).flops(tokens)
            total, published = total + module.total, published + module.published
            frames, tokens = g, m
        k = protected + frames * tokens
        block = 12 * k * dim**2 + 2 * k**2 * dim
        total, published = total + block, published + block
    return MultiplyAdds(total, published)


def _statistic_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _safe_log(x: Tensor) -> Tensor:
    """-inf at 0, and no gradient there."""
    return x.masked_fill(x == 0.0, 1.0).log().masked_fill(x == 0.0, -torch.inf)


def _share(x: Tensor, dim: int) -> Tensor:
    """Divided by its sum, 0 where that is 0."""
    total = x.sum(dim, keepdim=True)
    return x / total.masked_fill(total == 0.0, 1.0)


def _per_frame(meta: Tensor, frames: int) -> Tensor:  # [B, M, F] -> [B T, M, F]
    return meta.repeat_interleave(frames, 0)
