"""Launchers of matching and of plans. ``plan_kernels.py`` holds the device code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenops.triton.launch import launch, power_of_two, row_strides
from tokenops.triton.token_merge.pairs import Side, launch_search
from tokenops.triton.token_select import select
from tokenops.types import MatchProblem


class Ids(NamedTuple):
    """Which tokens stand in the slots of a list: first, first + step, ...; or what rows says."""

    first: int
    step: int
    slots: int
    rows: Tensor | None = None  # [B, N] int32
    listed: Tensor | None = None  # [B] int32, how many are listed


def match(problem: MatchProblem, slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor) -> None:
    """Fills a plan: slot and order [B, N], count [B], offsets [B, n_out + 1]."""
    plan(_parents(problem), False, slot, count, order, offsets)


def plan(target: Tensor, is_slot: bool, slot: Tensor, count: Tensor, order: Tensor, offsets: Tensor) -> None:
    """The plan in which token i goes to output row target[i], or merges into token target[i]."""
    from tokenops.triton.token_merge import plan_kernels as kernels

    batch, tokens = target.shape
    n_out = offsets.shape[1] - 1
    key = torch.empty_like(slot)
    if is_slot:
        block = 256
        blocks = -(-tokens // block)
        launch(
            kernels.copy_slots,
            batch * blocks,
            target,
            target=target,
            slot=slot,
            key=key,
            target_strides=row_strides(target),
            N=tokens,
            n_out=n_out,
            blocks=blocks,
            BLOCK=block,
            num_warps=4,
        )
    else:
        block = _block(tokens)
        launch(
            kernels.number_rows,
            batch,
            target,
            parent=target,
            root=torch.empty_like(slot),
            number=torch.empty_like(slot),
            slot=slot,
            key=key,
            count=count,
            parent_strides=row_strides(target),
            N=tokens,
            n_out=n_out,
            rounds=tokens.bit_length(),
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
    block = 64
    blocks = -(-(tokens + n_out + 1) // block)
    launch(
        kernels.order_tokens,
        batch * blocks,
        target,
        key=key,
        order=order,
        offsets=offsets,
        N=tokens,
        n_out=n_out,
        blocks=blocks,
        BLOCK=block,
        BLOCK_N=64,
        num_warps=4,
    )
    if is_slot:
        launch(kernels.count_rows, batch, target, offsets=offsets, count=count, n_out=n_out, BLOCK=1024, num_warps=4)


def _parents(problem: MatchProblem) -> Tensor:
    """[B, N]: the token that each one merges into, itself if it stays, -1 if it is dropped."""
    from tokenops.triton.token_merge import plan_kernels as kernels

    batch, tokens, _ = problem.metric.shape
    sources, destinations = _sides(problem)
    score = torch.empty((batch, sources.slots), dtype=torch.float32, device=problem.metric.device)
    partner = torch.empty(score.shape, dtype=torch.int32, device=score.device)
    # a source without a candidate has the score -inf
    threshold = -torch.inf if problem.threshold is None else problem.threshold
    merging = sources.slots if problem.r is None else min(problem.r, sources.slots)
    if destinations.slots == 0:
        merging = 0
    chosen = None
    if merging > 0:
        source, destination = _side(problem, sources, problem.source_scale), _side(problem, destinations, problem.destination_scale)
        launch_search(source, destination, problem.window, problem.normalize, score, partner, destinations.first, destinations.step)
        if merging < sources.slots:
            chosen = torch.empty((batch, merging), dtype=torch.int32, device=score.device)
            select(score, threshold, 0, chosen, torch.empty_like(partner[:, 0]))
    parent = torch.empty((batch, tokens), dtype=torch.int32, device=score.device)
    block = _block(tokens)
    launch(
        kernels.choose_parents,
        batch,
        score,
        role=problem.role,
        chosen=chosen,
        score=score,
        partner=partner,
        sources=sources.rows,
        parent=parent,
        role_strides=row_strides(problem.role),
        N=tokens,
        S=sources.slots,
        K=merging,
        first=sources.first,
        step=sources.step,
        threshold=threshold,
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
    return parent


def _sides(problem: MatchProblem) -> tuple[Ids, Ids]:
    """Which tokens may leave and which may receive. The default roles are known beforehand; others are listed on the device."""
    from tokenops.triton.token_merge import plan_kernels as kernels

    batch, tokens, _ = problem.metric.shape
    role = problem.role
    if role is None:
        first_source, first_destination = (2 if problem.class_token else 0), (3 if problem.distill_token else 1)
        of_sources, of_destinations = (Ids(first, 2, len(range(first, tokens, 2))) for first in (first_source, first_destination))
        return of_sources, of_destinations
    lists = torch.empty((2, batch, tokens), dtype=torch.int32, device=role.device)
    counts = torch.empty((2, batch), dtype=torch.int32, device=role.device)
    block = _block(tokens)
    launch(
        kernels.list_roles,
        batch,
        role,
        role=role,
        sources=lists[0],
        destinations=lists[1],
        source_count=counts[0],
        destination_count=counts[1],
        role_strides=row_strides(role),
        N=tokens,
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
    return Ids(0, 1, tokens, lists[0], counts[0]), Ids(0, 1, tokens, lists[1], counts[1])


def _side(problem: MatchProblem, ids: Ids, scale: Tensor | None) -> Side:
    """One grid of the search, read in place."""

    def taken(tensor: Tensor) -> Tensor:
        return tensor if ids.rows is not None else tensor[:, ids.first :: ids.step]

    place = problem.place
    return Side(
        taken(problem.metric),
        None,
        None if scale is None else taken(scale),
        None if place is None else taken(place),
        ids.rows,
        ids.listed,
    )


def _block(tokens: int) -> int:
    return min(1024, max(128, power_of_two(tokens)))
