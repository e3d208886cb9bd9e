"""The CUDA C++ kernels of this room as a backend. What they write to on the way is allocated here."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenops.types import MatchProblem, MergePlan, PairProblem, SoftMergeGradients, Window

_library = torch.library.Library("tokenops", "FRAGMENT")
# implemented by csrc/cuda/token_merge.cu. Where there is no place, the window is not read; lists [2, B, N]: which rows of a and b take part
# soft: what is compared is described in scratch; learned: a temperature on the device, instead of the number
_PLAN = "Tensor(a!) slot, Tensor(b!) count, Tensor(c!) order, Tensor(d!) offsets, Tensor(e!) scratch"
_SOFT = "Tensor x, Tensor metric, Tensor meta, float temperature, Tensor? learned, Tensor? mass, bool normalize"
for _schema in (
    # how many blocks share the tiles of each of so many, on the tensor's device
    "splits(Tensor on, int blocks, int tiles) -> int",
    (
        "argmax(Tensor(a!) best, Tensor(b!) index, Tensor(c!) scratch, Tensor a, Tensor b, Tensor? a_mask, Tensor? b_mask, "
        "Tensor? a_scale, Tensor? b_scale, Tensor? a_place, Tensor? b_place, int t_low, int t_high, int reach_y, int reach_x, "
        "bool normalize, Tensor? lists, Tensor? listed, int splits, int first_id, int id_step) -> ()"
    ),
    "list(Tensor(a!) lists, Tensor(b!) listed, Tensor role) -> ()",
    f"match({_PLAN}, Tensor? role, Tensor score, Tensor partner, Tensor? lists, int first, int step, int most, float threshold) -> ()",
    f"plan({_PLAN}, Tensor target, bool is_slot) -> ()",
    "merge(Tensor(a!) out, Tensor x, Tensor slot, Tensor order, Tensor offsets, Tensor? size, str mode) -> ()",
    (
        "merge_backward(Tensor(a!)? grad_x, Tensor(b!)? grad_size, Tensor grad_out, Tensor? x, Tensor? out, Tensor slot, Tensor order, "
        "Tensor offsets, Tensor? size, str mode) -> ()"
    ),
    "unmerge(Tensor(a!) out, Tensor y, Tensor slot, Tensor order, Tensor offsets, str mode) -> ()",
    (
        "soft(Tensor(a!) out, Tensor(b!) mass_out, Tensor(c!) lse, Tensor(d!) scratch, Tensor(e!) terms, Tensor(f!) parts, "
        f"Tensor(g!) part_sums, {_SOFT}) -> ()"
    ),
    (
        "soft_backward(Tensor(a!)? grad_x, Tensor(b!)? grad_metric, Tensor(c!)? grad_meta, Tensor(d!)? grad_temperature, "
        "Tensor(e!) scratch, Tensor(f!) terms, Tensor(g!) of_metas, Tensor(h!)? parts, Tensor(i!)? part_sums, Tensor grad_out, "
        f"Tensor grad_mass, {_SOFT}, Tensor out, Tensor mass_out, Tensor lse) -> ()"
    ),
):
    _library.define(f"token_merge_cuda_{_schema}")
_cuda = torch.ops.tokenops

_NO_WINDOW = Window(0, 0, 0, 0)
# as in csrc/cuda: rows of a and of b in a block of the search, words of scratch memory
ROWS_A, ROWS_B = 128, 64
_EACH_SLOT, _EACH_BLOCK = 5, 7
_PLAN_SCRATCH = 6


class NativeCUDA:
    """The methods of NativeCPU."""

    def argmax(self, p: PairProblem, best: Tensor, index: Tensor) -> None:
        search(p, best, index)

    def match(self, p: MatchProblem, slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor) -> None:
        metric, role, place = p.metric, p.role, p.place
        batch, tokens, _ = metric.shape
        lists = listed = None
        # the default roles are known beforehand; others are listed on the device
        sources, destinations = slice(2 if p.class_token else 0, None, 2), slice(3 if p.distill_token else 1, None, 2)
        if role is not None:
            lists, listed = slot.new_empty((2, batch, tokens)), slot.new_empty((2, batch))
            _cuda.token_merge_cuda_list(lists, listed, role)
            sources = destinations = slice(0, None, 1)
        a, b = metric[:, sources], metric[:, destinations]
        score = torch.empty(a.shape[:2], dtype=torch.float32, device=metric.device)
        partner = slot.new_empty(score.shape)
        most = score.shape[1] if p.r is None else p.r
        if b.shape[1] == 0:
            most = 0
        if most > 0 and score.numel() > 0:

            def side(of_tokens: Tensor | None, ids: slice) -> Tensor | None:
                return None if of_tokens is None else of_tokens[:, ids]

            scales = side(p.source_scale, sources), side(p.destination_scale, destinations)
            places = side(place, sources), side(place, destinations)
            pairs = PairProblem(a, b, None, None, *scales, *places, p.window, p.normalize)
            search(pairs, score, partner, lists, listed, destinations)
        else:
            score.fill_(-torch.inf)
        threshold = -torch.inf if p.threshold is None else p.threshold
        _cuda.token_merge_cuda_match(
            *(slot, count, order, offsets, _plan_scratch(slot)), role, score, partner, lists, sources.start, sources.step, most, threshold
        )

    def plan(self, target: Tensor, is_slot: bool, slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor) -> None:
        _cuda.token_merge_cuda_plan(slot, count, order, offsets, _plan_scratch(slot), target, is_slot)

    def merge(self, x: Tensor, plan: MergePlan, size: Tensor | None, mode: str, out: Tensor) -> None:
        _cuda.token_merge_cuda_merge(out, x, plan.slot, plan.order, plan.offsets, size, mode)

    def merge_backward(
        self,
        grad_out: Tensor,
        x: Tensor | None,
        out: Tensor | None,
        plan: MergePlan,
        size: Tensor | None,
        mode: str,
        grad_x: Tensor | None,
        grad_size: Tensor | None,
    ) -> None:
        lists = plan.slot, plan.order, plan.offsets
        _cuda.token_merge_cuda_merge_backward(grad_x, grad_size, grad_out, x, out, *lists, size, mode)

    def unmerge(self, y: Tensor, plan: MergePlan, mode: str, out: Tensor) -> None:
        _cuda.token_merge_cuda_unmerge(out, y, plan.slot, plan.order, plan.offsets, mode)

    def soft_merge(
        self,
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
        terms, scratch = lse.new_empty((3, *lse.shape)), _description_scratch(metric, meta)
        parts, sums = _parts(x, out.shape[1], out.shape[2])
        problem = x, metric, meta, *_temperature(temperature), mass, normalize
        _cuda.token_merge_cuda_soft(out, mass_out, lse, scratch, terms, parts, sums, *problem)

    def soft_merge_backward(
        self,
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
        out, mass_out, lse, grad_mass = (part.contiguous() for part in (out, mass_out, lse, grad_mass))
        # it was rounded to x's type before it got here; products want both factors in one type
        grad_out = grad_out.to(x.dtype)
        terms, of_metas, scratch = lse.new_empty((3, *lse.shape)), lse.new_empty((3, *mass_out.shape)), _description_scratch(metric, meta)
        parts = sums = warmth = None
        if grads.meta is not None:
            parts, sums = _parts(x, *meta.shape[1:])
        if grads.temperature is not None:
            warmth = lse.new_empty((lse.shape[0], -(-lse.shape[1] // ROWS_A)))
        problem = x, metric, meta, *_temperature(temperature), mass, normalize
        _cuda.token_merge_cuda_soft_backward(
            *(grads.x, grads.metric, grads.meta, warmth, scratch, terms, of_metas, parts, sums, grad_out, grad_mass, *problem),
            *(out, mass_out, lse),
        )
        if grads.temperature is not None and warmth is not None:
            torch.sum(warmth, -1, out=grads.temperature)
        if grads.mass is not None:
            grads.mass.copy_(terms[2])


def search(
    p: PairProblem,
    best: Tensor,
    index: Tensor,
    lists: Tensor | None = None,
    listed: Tensor | None = None,
    ids: slice = slice(0, None, 1),
    splits: int | None = None,
) -> None:
    """Fills best and index [B, Na].

    Args:
        lists, listed: [2, B, N] and [2, B] int32, the rows of a and of b that take part, ascending, and how many they are; results go by
            places in the list.
        ids: row j of b is called ids.start + j ids.step.
        splits: how many blocks share the columns of a block of rows. None: as many as keep the device busy.
    """
    (batch, rows, _), columns = p.a.shape, p.b.shape[1]
    blocks_a, blocks_b = -(-rows // ROWS_A), -(-columns // ROWS_B)
    if splits is None:
        splits = _cuda.token_merge_cuda_splits(p.a, batch * blocks_a, blocks_b)
    scratch = _description_scratch(p.a, p.b, 2 * splits * rows if splits > 1 else 0)
    tensors = p[:8]
    window = p.window or _NO_WINDOW
    _cuda.token_merge_cuda_argmax(best, index, scratch, *tensors, *window, p.normalize, lists, listed, splits, ids.start, ids.step)


def _description_scratch(a: Tensor, b: Tensor, more: int = 0) -> Tensor:
    """int32, for what the kernels find out about the rows of both grids; ``more`` for each sample."""
    blocks_a, blocks_b = -(-a.shape[1] // ROWS_A), -(-b.shape[1] // ROWS_B)
    each = _EACH_SLOT * (blocks_a * ROWS_A + blocks_b * ROWS_B) + _EACH_BLOCK * (blocks_a + blocks_b) + more
    return torch.empty((a.shape[0] * each,), dtype=torch.int32, device=a.device)


def _plan_scratch(slot: Tensor) -> Tensor:
    return slot.new_empty((slot.shape[0], _PLAN_SCRATCH * slot.shape[1]))


def _parts(x: Tensor, metas: int, columns: int) -> tuple[Tensor, Tensor]:
    """Sums over shares of the tokens, [splits, B, M, columns], and of their weights, [2, splits, B, M]."""
    batch, tokens, _ = x.shape
    # two chunks of 128 bytes a block
    blocks = batch * -(-metas // ROWS_B) * -(-columns * x.element_size() // 256)
    splits = _cuda.token_merge_cuda_splits(x, blocks, -(-tokens // ROWS_A))
    parts = torch.empty((splits, batch, metas, columns), dtype=torch.float32, device=x.device)
    return parts, parts.new_empty((2, *parts.shape[:3]))


def _temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
