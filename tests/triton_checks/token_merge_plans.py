"""Matches and plans in the interpreter: ids are compared one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokenops
from tokenops.reference import token_merge as reference
from tokenops.triton.token_merge import plans as launchers
from tokenops.types import MatchProblem, MergePlan, Role, Window
from triton_checks import Checks
from triton_checks.token_merge_pairs import tensor, whole

CHECKS = Checks()


def _lists(batch: int, tokens: int, n_out: int) -> list[Tensor]:
    return [torch.full(shape, 7, dtype=torch.int32) for shape in ((batch, tokens), (batch,), (batch, tokens), (batch, n_out + 1))]


def _same(lists: list[Tensor], want: MergePlan) -> None:
    slot, count, order, offsets = lists
    for name, got in (("slot", slot), ("count", count), ("order", order), ("offsets", offsets)):
        assert torch.equal(got, getattr(want, name)), (name, got, getattr(want, name))


def _plans(target: Tensor, is_slot: bool, n_out: int) -> None:
    lists = _lists(*target.shape, n_out)
    launchers.plan(target, is_slot, *lists)
    _same(lists, reference.plan_of(target, is_slot, n_out))


def _anything(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Ids, among them -1, ids that do not exist, and circles."""
    return torch.randint(-2, tokens + 2, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@CHECKS.add
def parents() -> None:
    for tokens in (1, 2, 65, 150):
        anything = _anything(2, tokens, tokens)
        # chains: each token's parent before it, or behind it
        earlier = (anything.abs() % (torch.arange(tokens) + 1)).int()
        for target, n_out in ((anything, tokens), (anything.int(), tokens // 2), (earlier, tokens), (tokens - 1 - earlier.flip(-1), 1)):
            _plans(target, False, n_out)
    _plans(_anything(2, 5), False, 0)


@CHECKS.add
def slots() -> None:
    for tokens, n_out in ((1, 1), (5, 0), (5, 80), (65, 1), (150, 50)):
        _plans(_anything(2, tokens) % (n_out + 3) - 1, True, n_out)
        _plans(_anything(2, tokens).int(), True, n_out)


@CHECKS.add
def long_chains_and_circles() -> None:
    tokens = 300
    forward = (torch.arange(tokens) + 1).clamp(max=tokens - 1)[None]
    circle = (torch.arange(tokens) + 1)[None] % tokens
    # one of 256, which doubling steps goes round in whole turns
    even = torch.where(torch.arange(tokens) < 256, (torch.arange(tokens) + 1) % 256, torch.arange(tokens))[None]
    for target in (forward, tokens - 1 - forward.flip(-1), circle, even):
        _plans(target, False, 30)


@CHECKS.add
def more_tokens_than_a_block() -> None:
    tokens = 1100
    _plans(_anything(1, tokens), False, 300)
    _plans(_anything(1, tokens).abs() % 9, True, 9)


@CHECKS.add
def targets_are_read_in_place() -> None:
    target = _anything(40, 6).T
    assert not target.is_contiguous()
    for is_slot in (False, True):
        _plans(target, is_slot, 20)
        _plans(target[:1].expand(3, -1), is_slot, 20)
        _plans(target[:, ::2], is_slot, 20)


@CHECKS.add
def ids_far_outside_stay_inside() -> None:
    """Outside of a buffer the interpreter dies."""
    far = torch.tensor([[2**40, -(2**40), 2**31, -(2**31), 2**32, 5, 2**32 + 1, 6]])
    for target in (far, far.clamp(-(2**31), 2**31 - 1).int()):
        for is_slot in (False, True):
            _plans(target, is_slot, 8)


def _match(metric: Tensor, n_out: int | None = None, **options: Any) -> None:
    values: dict[str, Any] = dict.fromkeys(MatchProblem._fields) | {"class_token": False, "distill_token": False, "normalize": False}
    problem = MatchProblem(**values | {"metric": metric} | options)
    batch, tokens, _ = metric.shape
    n_out = tokens if n_out is None else n_out
    lists = _lists(batch, tokens, n_out)
    launchers.match(problem, *lists)
    _same(lists, reference.plan_of(reference.parents(problem), False, n_out))


@CHECKS.add
def default_roles() -> None:
    protections = [{"class_token": of_class, "distill_token": distill} for of_class in (False, True) for distill in (False, True)]
    for tokens in (1, 2, 3, 4):
        for protected in protections:
            _match(whole(1, tokens, 8), r=1, **protected)
    metric = whole(2, 75, 8)
    for protected, options in zip(protections, ({}, {"r": 9}, {"threshold": 1.0}, {"threshold": 1.0, "r": 9}), strict=True):
        _match(metric, **protected, **options)
    _match(metric, r=0)
    # more rows than there is room for
    _match(metric, r=5, n_out=40)


@CHECKS.add
def roles_of_ones_own() -> None:
    tokens = 70
    metric, generator = whole(2, tokens, 8), torch.Generator().manual_seed(2)
    amounts = ({}, {"r": 7}, {"threshold": 2.0}, {"threshold": -1.0, "r": 30})
    for roles in (list(Role), [Role.BOTH], [Role.SOURCE], [Role.DESTINATION, Role.DROPPED], [Role.SOURCE, Role.DESTINATION]):
        for at, amount in enumerate(amounts):
            # of each sample, or one for all
            role = torch.tensor(roles)[torch.randint(len(roles), (1 + at % 2, tokens), generator=generator)]
            _match(metric, role=role.to(torch.int8), **amount)


@CHECKS.add
def scales_places_and_windows() -> None:
    frames, height, width = 3, 4, 5
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([t, y, x], -1).view(1, -1, 3).int()
    metric = whole(2, 60, 16)
    both = torch.full((1, 60), int(Role.BOTH), dtype=torch.int8)
    scales = {"source_scale": whole(2, 60, seed=3) + 3.0, "destination_scale": whole(1, 60, seed=4) + 3.0}
    for role in (None, both):
        for window in (Window(-1, -1, 0, 0), Window(0, 0, 1, 1), Window(-2, 2, 1, 0)):
            _match(metric, role=role, place=place, window=window, **scales)
            _match(metric, role=role, place=place, window=window, r=9)
        _match(metric, role=role, r=20, **scales)


@CHECKS.add
def similarities_of_directions() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        metric = tensor(2, 50, 24, dtype=dtype)
        _match(metric, r=12, normalize=True, class_token=True)
        _match(
            metric, r=12, normalize=True, role=torch.tensor([int(Role.SOURCE), int(Role.DESTINATION)], dtype=torch.int8).repeat(25)[None]
        )


@CHECKS.add
def unknown_roles_stay_inside() -> None:
    """Checked mode refuses them; on a GPU only the kernels read them."""
    role = torch.randint(-128, 128, (2, 40), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    values: dict[str, Any] = dict.fromkeys(MatchProblem._fields) | {"class_token": False, "distill_token": False, "normalize": True}
    lists = _lists(2, 40, 40)
    launchers.match(MatchProblem(**values | {"metric": tensor(2, 40, 8), "role": role}), *lists)
    reference.check_merge(MergePlan(lists[0], lists[1], 40, lists[2], lists[3]))


@CHECKS.add
def matching_through_the_door() -> None:
    metric = tensor(2, 30, 16)
    for options in ({"scheme": "bipartite"}, {"scheme": "grid", "grid": (5, 6), "cell": (2, 2)}):
        plans = []
        for backend in ("triton", "reference"):
            generator = torch.Generator().manual_seed(0)
            more = {"generator": generator} if options["scheme"] == "grid" else {}
            plans.append(tokenops.match_tokens(metric, r=8, **options, **more, backend=backend))
        _same([plans[0].slot, plans[0].count, plans[0].order, plans[0].offsets], plans[1])
