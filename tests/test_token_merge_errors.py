"""Bad input: every mistake has an error that names the argument, what was expected and what came. Nothing crashes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from token_merge_oracle import random_plan
from torch import Tensor

import tokenops
from tokenops import Window, native
from tokenops.types import Role

METRIC = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(1))
PLAN = random_plan(2, 20, 7)
META = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU contents are read on request only."""
    monkeypatch.setenv("TOKENOPS_CHECK", "1")


Bad = dict[str, tuple[dict[str, Any], type[Exception], str]]


def but(x: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


def mistakes(bad: Bad) -> Any:
    return pytest.mark.parametrize("name", bad)


PAIRS: Bad = {
    "no tensor": ({"a": [1.0]}, TypeError, "a must be a Tensor, got list"),
    "wrong rank": ({"a": METRIC[0]}, ValueError, r"a must be \[B, Na, C\], got \[20, 8\]"),
    "wrong rank of b": ({"b": METRIC[None]}, ValueError, r"b must be \[B, Nb, C\], got \[1, 2, 20, 8\]"),
    "integers": ({"a": METRIC.long()}, TypeError, "a must be float32, bfloat16, float16 or float64, got torch.int64"),
    "two dtypes": ({"b": METRIC.double()}, TypeError, "b must have a's dtype torch.float32, got torch.float64"),
    "two devices": ({"b": METRIC.to("meta")}, ValueError, "b must be on a's device cpu, got meta"),
    "two batches": ({"b": METRIC[:1]}, ValueError, r"b must have a's batch size 2, got \[1, 20, 8\]"),
    "two widths": ({"b": METRIC[..., :4]}, ValueError, r"b must have a's C = 8, got \[2, 20, 4\]"),
    "no width": ({"a": METRIC[..., :0], "b": METRIC[..., :0]}, ValueError, r"a must have a width of at least 1, got \[2, 20, 0\]"),
    "mask of numbers": ({"a_mask": torch.ones(20)}, TypeError, r"a_mask must be bool \(True = takes part\), got torch.float32"),
    "mask of another length": (
        {"b_mask": torch.ones(19, dtype=torch.bool)},
        ValueError,
        r"b_mask must be \[20\] \| \[2, 20\], a number for each row of b, got \[19\]",
    ),
    "scale of another batch": ({"a_scale": torch.ones(3, 20)}, ValueError, r"a_scale must be .*, got \[3, 20\]"),
    "scale of another dtype": ({"a_scale": torch.ones(20).double()}, TypeError, "a_scale must be torch.float32 with torch.float32 a, got"),
    "window without places": ({"window": "frame"}, ValueError, "window, a_place and b_place must be given together"),
    "places without window": ({"a_place": torch.zeros(20, 3).int()}, ValueError, "window, a_place and b_place must be given together"),
    "unknown window": (
        {"window": "near", "a_place": torch.zeros(20, 3).int(), "b_place": torch.zeros(20, 3).int()},
        ValueError,
        "window must be 'frame', 'location', numbers or a Window, got 'near'",
    ),
    "places of another shape": (
        {"window": "frame", "a_place": torch.zeros(20, 2).int(), "b_place": torch.zeros(20, 3).int()},
        ValueError,
        r"a_place must be \[20, 3\] \| \[2, 20, 3\], \(t, y, x\) for each row of a, got \[1, 20, 2\]",
    ),
    "unknown backend": ({"backend": "metal"}, ValueError, "backend must be one of 'triton', 'cpu'.*, got 'metal'"),
}


@mistakes(PAIRS)
def test_pairwise_argmax_refuses(name: str) -> None:
    change, error, message = PAIRS[name]
    with pytest.raises(error, match=message):
        tokenops.pairwise_argmax(**{"a": METRIC, "b": METRIC, **change})


PAIR_CONTENTS: Bad = {
    "NaN in a": ({"a": but(METRIC, (1, 3, 2), torch.nan)}, ValueError, r"a must be finite, got nan in row \[1, 3\]"),
    "infinity in b": ({"b": but(METRIC, (0, 7, 0), -torch.inf)}, ValueError, r"b must be finite, got -inf in row \[0, 7\]"),
    "NaN scale": (
        {"b_scale": but(torch.ones(2, 20), (1, 4), torch.nan)},
        ValueError,
        r"b_scale must not be NaN, got it at position \[1, 4\]",
    ),
}


@mistakes(PAIR_CONTENTS)
def test_pairwise_argmax_refuses_contents(name: str, backend: str, device: str) -> None:
    change, error, message = PAIR_CONTENTS[name]
    call = {"a": METRIC, "b": METRIC, **change}
    with pytest.raises(error, match=message):
        tokenops.pairwise_argmax(**{key: x.to(device) for key, x in call.items()}, backend=backend)
    # a row that takes no part may hold anything
    masks = {f"{side}_mask": torch.zeros(2, 20, dtype=torch.bool, device=device) for side in "ab"}
    best, _ = tokenops.pairwise_argmax(**{key: x.to(device) for key, x in call.items()}, **masks, backend=backend)
    assert (best == -torch.inf).all()


MATCHES: Bad = {
    "wrong rank": ({"metric": METRIC[0]}, ValueError, r"metric must be \[B, N, C\], got \[20, 8\]"),
    "no tensor": ({"metric": None}, TypeError, "metric must be a Tensor, got NoneType"),
    "no amount": ({"r": None}, ValueError, "one of r or ratio or threshold must be given in scheme 'bipartite', got none"),
    "two amounts": ({"ratio": 0.5}, ValueError, "one of r or ratio or threshold must be given in scheme 'bipartite', got r, ratio"),
    "negative r": ({"r": -1}, ValueError, "r must not be negative, got -1"),
    "r that is no int": ({"r": 2.0}, TypeError, "r must be an int, got float"),
    "ratio of 0": ({"r": None, "ratio": 0.0}, ValueError, r"ratio must be in \(0, 1\], got 0.0"),
    "ratio over 1": ({"r": None, "ratio": 1.1}, ValueError, r"ratio must be in \(0, 1\], got 1.1"),
    "ratio NaN": ({"r": None, "ratio": float("nan")}, ValueError, r"ratio must be in \(0, 1\], got nan"),
    "threshold NaN": ({"r": None, "threshold": float("nan")}, ValueError, "threshold must be a number, got NaN"),
    "unknown scheme": ({"scheme": "tome"}, ValueError, "scheme must be a Tensor of roles or one of 'bipartite', 'kth'.*, got 'tome'"),
    "kth without k": ({"r": None, "scheme": "kth"}, ValueError, "k must be at least 1 in scheme 'kth', got None"),
    "kth with r": ({"scheme": "kth", "k": 2}, ValueError, "^none of r, ratio and threshold must be given in scheme 'kth', got r"),
    "kth with a class token": (
        {"r": None, "scheme": "kth", "k": 2, "class_token": True},
        ValueError,
        "class_token and distill_token must be",
    ),
    "k that is no int": ({"r": None, "scheme": "kth", "k": 2.0}, TypeError, "k must be an int, got float"),
    "roles without an amount": (
        {"ratio": 0.5, "scheme": torch.zeros(20).int()},
        ValueError,
        "^at most one of r or ratio or threshold must be given in a scheme of roles, got r, ratio",
    ),
    "schemes": ({"scheme": ["kth"]}, ValueError, r"scheme must be a Tensor of roles or one of .*, got \['kth'\]"),
    "cell of one number": ({"scheme": "grid", "grid": (4, 5), "cell": 2}, ValueError, r"cell must be \(sy, sx\), .* got 2"),
    "grid of one number": ({"scheme": "grid", "grid": 20, "cell": (2, 2)}, ValueError, r"grid must be \(height, width\) .* got 20"),
    "grid of floats": ({"locality": "frame", "grid": (4.0, 5.0)}, ValueError, r"grid must be \(height, width\) .* got \(4.0, 5.0\)"),
    "k elsewhere": ({"k": 2}, ValueError, "k must be left out unless scheme is 'kth', got 2"),
    "random by threshold": (
        {"r": None, "threshold": 0.5, "scheme": "random"},
        ValueError,
        "one of r or ratio must be given in scheme 'random'",
    ),
    "generator elsewhere": ({"generator": torch.Generator()}, ValueError, "generator must be left out unless scheme is 'random' or 'grid'"),
    "grid without cell": (
        {"scheme": "grid", "grid": (4, 5)},
        ValueError,
        r"cell must be \(sy, sx\), both at least 1, in scheme 'grid', got None",
    ),
    "grid without grid": (
        {"scheme": "grid", "cell": (2, 2)},
        ValueError,
        r"grid must be \(height, width\) or \(frames, height, width\), got None",
    ),
    "grid of another size": (
        {"scheme": "grid", "grid": (4, 6), "cell": (2, 2)},
        ValueError,
        r"grid must have as many places as metric has free tokens \(20 tokens\), got \(4, 6\)",
    ),
    "grid of another size beside a class token": (
        {"scheme": "grid", "grid": (4, 5), "cell": (2, 2), "class_token": True},
        ValueError,
        r"\(20 tokens less 1 protected\), got \(4, 5\)",
    ),
    "grid that nobody reads": ({"grid": (4, 5)}, ValueError, "grid and place must be left out where locality is None"),
    "grid and place": (
        {"grid": (4, 5), "place": torch.zeros(20, 3).int(), "locality": "frame"},
        ValueError,
        r"grid must be left out where place is given, got \(4, 5\)",
    ),
    "locality without grid": ({"locality": "frame"}, ValueError, r"grid must be \(height, width\) .* got None"),
    "frames before without a grid": ({"scheme": "previous_frame"}, ValueError, r"grid must be .* got None"),
    "unknown locality": (
        {"locality": "here", "grid": (4, 5)},
        ValueError,
        "locality must be 'frame', 'location', numbers or a Window, got 'here'",
    ),
    "locality of one number": ({"locality": (1,), "grid": (4, 5)}, ValueError, r"locality must be \(reach_y, reach_x\), .* got \(1,\)"),
    "locality that is no tuple": ({"locality": 1, "grid": (4, 5)}, TypeError, "locality must be 'frame', .* got 1"),
    "negative reach": ({"locality": (-1, 1), "grid": (4, 5)}, ValueError, "locality must leave a place to look at, got"),
    "empty window": ({"locality": Window(1, 0, 1, 1), "grid": (4, 5)}, ValueError, "locality must leave a place to look at, got"),
    "place of floats": ({"locality": "frame", "place": torch.zeros(20, 3)}, TypeError, "place must be int32 or int64, got torch.float32"),
    "distillation without class": (
        {"scheme": "random", "distill_token": True},
        ValueError,
        "distill_token must come with class_token in scheme 'random'",
    ),
    "roles of floats": ({"scheme": torch.zeros(20)}, TypeError, r"scheme must hold roles as integers \(tokenops.Role\), got torch.float32"),
    "roles of another length": (
        {"scheme": torch.zeros(19).int()},
        ValueError,
        r"scheme must hold a role per token, \[20\] \| \[2, 20\], got \[1, 19\]",
    ),
    "roles and a class token": ({"scheme": torch.zeros(20).int(), "class_token": True}, ValueError, "must be False beside roles"),
    "mask of another length": ({"source_mask": torch.ones(2, 19, dtype=torch.bool)}, ValueError, r"source_mask must be .* got \[2, 19\]"),
    "scale of a half type": (
        {"destination_scale": torch.ones(20).half()},
        TypeError,
        "destination_scale must be torch.float32 .* got torch.float16",
    ),
    "negative n_out": ({"n_out": -1}, ValueError, "n_out must not be negative, got -1"),
}


@mistakes(MATCHES)
def test_match_tokens_refuses(name: str) -> None:
    change, error, message = MATCHES[name]
    with pytest.raises(error, match=message):
        tokenops.match_tokens(**{"metric": METRIC, "r": 3, **change})


MATCH_CONTENTS: Bad = {
    "NaN": ({"metric": but(METRIC, (1, 3, 2), torch.nan)}, ValueError, r"metric must be finite, got nan in row \[1, 3\]"),
    "infinity": ({"metric": but(METRIC, (0, 4, 2), torch.inf)}, ValueError, r"metric must be finite, got inf in row \[0, 4\]"),
    "NaN scale": (
        {"source_scale": but(torch.ones(2, 20), (1, 4), torch.nan)},
        ValueError,
        r"source_scale must not be NaN, got it at position \[1, 4\]",
    ),
    "n_out too small": ({"n_out": 16}, ValueError, "n_out must be at least 17, the number of tokens that are left, got 16"),
    "a circle": (
        {"scheme": torch.full((20,), int(Role.BOTH)), "r": None, "destination_scale": -torch.ones(20)},
        ValueError,
        "scheme must not let tokens merge in a circle",
    ),
}


@mistakes(MATCH_CONTENTS)
def test_match_tokens_refuses_contents(name: str, backend: str, device: str) -> None:
    change, error, message = MATCH_CONTENTS[name]
    call = {"metric": METRIC, "r": 3, **change}
    with pytest.raises(error, match=message):
        tokenops.match_tokens(**{key: x.to(device) if isinstance(x, Tensor) else x for key, x in call.items()}, backend=backend)


@pytest.mark.parametrize("role", [-3, 5, 9, 300])
def test_a_role_must_exist(role: int, backend: str, device: str) -> None:
    roles = torch.full((20,), int(Role.STAY), device=device)
    roles[7] = role
    with pytest.raises(ValueError, match=r"scheme must hold roles in \[0, 4\], got -?\d at position \[0, 7\]"):
        tokenops.match_tokens(METRIC.to(device), scheme=roles, backend=backend)


def test_a_protected_token_may_hold_anything(backend: str, device: str) -> None:
    metric = but(METRIC, (0, 0, 0), torch.nan).to(device)
    plan = tokenops.match_tokens(metric, r=3, class_token=True, backend=backend)
    assert plan.n_out == 17


PLANS: Bad = {
    "parents of floats": ({"parent": X[..., 0]}, TypeError, "parent must be int32 or int64, got torch.float32"),
    "parents of one sample": ({"parent": torch.zeros(4).int()}, ValueError, r"parent must be \[B, N\], got \[4\]"),
    "negative n_out": ({"parent": torch.zeros(1, 4).int(), "n_out": -1}, ValueError, "n_out must not be negative, got -1"),
}


@mistakes(PLANS)
def test_plans_refuse(name: str) -> None:
    change, error, message = PLANS[name]
    with pytest.raises(error, match=message):
        tokenops.plan_from_parents(**change)


@pytest.mark.parametrize(
    ("parent", "n_out", "message"),
    [
        ([[0, 1, 3]], None, r"parent must hold token ids in \[0, 3\) or -1 to drop a token, got 3 at position \[0, 2\]"),
        ([[0, 1, 2], [0, -2, 2]], None, r"parent must hold .* got -2 at position \[1, 1\]"),
        ([[0, 2, 1]], None, r"parent must lead every token to one that stays, got a circle behind the token at position \[0, 1\]"),
        ([[0, 2, 3, 1, 3]], None, "parent must lead every token to one that stays"),
        ([[0, 1, 1]], 1, "n_out must be at least 2, the number of tokens that stay, got 1"),
        ([[0, 2**40, 1]], None, "parent must hold"),
    ],
    ids=["too large", "too small", "two in a circle", "behind a circle", "too few rows", "beyond int32"],
)
def test_plan_from_parents_refuses_contents(parent: Any, n_out: int | None, message: str, backend: str, device: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenops.plan_from_parents(torch.tensor(parent, device=device), n_out, backend=backend)


@pytest.mark.parametrize("slot", [4, -2])
def test_plan_from_slots_refuses_contents(slot: int, backend: str, device: str) -> None:
    with pytest.raises(ValueError, match=rf"slot must hold output rows in \[0, 4\) or -1 to drop a token, got {slot} at position \[0, 1\]"):
        tokenops.plan_from_slots(torch.tensor([[0, slot, 2]], device=device), 4, backend=backend)


def test_compose_refuses() -> None:
    with pytest.raises(TypeError, match="second must be a MergePlan, got Tensor"):
        tokenops.compose_plans(PLAN, PLAN.slot)
    with pytest.raises(ValueError, match="second must be a plan for first's 7 output rows, got one for 20 tokens"):
        tokenops.compose_plans(PLAN, PLAN)
    with pytest.raises(ValueError, match="second must be for first's 2 samples or for 1, got 3"):
        tokenops.compose_plans(PLAN, random_plan(3, 7, 4))
    with pytest.raises(ValueError, match=r"second\.slot must be on first.slot's device cpu, got meta"):
        tokenops.compose_plans(PLAN, random_plan(2, 7, 4, "meta"))


@pytest.mark.parametrize(
    ("r", "layers", "message"),
    [
        (3, -1, "layers must not be negative, got -1"),
        (-3, 2, r"r must not be negative in any layer, got \[-3, -3\]"),
        ([1, 2, 3], 2, "r must have at most 2 numbers, one for each layer, got 3"),
        ((4, 2.0), 3, r"r must be .* or \(r, inflection\) with an inflection in \[-1, 1\], got \(4, 2.0\)"),
        ((4, 1, 0), 3, r"r must be a number, a list of numbers or \(r, inflection\)"),
        ([4, -2], 3, r"r must not be negative in any layer, got \[4, -2, 0\]"),
    ],
    ids=str,
)
def test_schedules_refuse(r: Any, layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenops.merge_schedule(r, layers)


MERGES: Bad = {
    "no tensor": ({"x": 3}, TypeError, "x must be a Tensor, got int"),
    "wrong rank": ({"x": X[0, :, 0]}, ValueError, r"x must be \[B, N\] or \[B, N, ...\], got \[20\]"),
    "integers": ({"x": X.int()}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
    "no plan": ({"plan": PLAN.slot}, TypeError, "plan must be a MergePlan, got Tensor"),
    "plan for another N": ({"x": X[:, :19]}, ValueError, r"x must have the plan's 20 tokens, got \[2, 19, 6\]"),
    "plan for another batch": ({"x": X[:1].repeat(3, 1, 1)}, ValueError, "plan must be for the 3 samples of x or for 1, got 2"),
    "plan on another device": ({"x": X.to("meta")}, ValueError, "plan.slot must be on x's device meta, got cpu"),
    "plan on two devices": (
        {"plan": PLAN._replace(order=PLAN.order.to("meta"))},
        ValueError,
        "plan.order must be on x's device cpu, got meta",
    ),
    "plan of another n_out": (
        {"plan": PLAN._replace(n_out=6)},
        ValueError,
        r"plan.offsets must be \[2, 7\] as its slot and n_out say, got \[2, 8\]",
    ),
    "plan of another order": (
        {"plan": PLAN._replace(order=PLAN.order[:, :5])},
        ValueError,
        r"plan.order must be \[2, 20\] .*, got \[2, 5\]",
    ),
    "plan of one sample": ({"plan": PLAN._replace(slot=PLAN.slot[0])}, ValueError, r"plan.slot must be \[B, N\], got \[20\]"),
    "plan of int64": ({"plan": PLAN._replace(slot=PLAN.slot.long())}, TypeError, "plan.slot must be int32, got torch.int64"),
    "plan of lists": ({"plan": PLAN._replace(order=[0])}, TypeError, "plan.order must be a Tensor, got list"),
    "unknown mode": ({"mode": "max"}, ValueError, "mode must be one of 'mean', 'sum', 'amax', 'replace', 'drop', got 'max'"),
    "size of a sum": (
        {"mode": "sum", "size": torch.ones(20)},
        ValueError,
        "size must be left out unless mode is 'mean', got it with 'sum'",
    ),
    "size of another dtype": (
        {"size": torch.ones(20).int()},
        TypeError,
        "size must be torch.float32 with torch.float32 x, got torch.int32",
    ),
    "size of another length": ({"size": torch.ones(2, 19)}, ValueError, r"size must be \[20\] \| \[2, 20\], .* got \[2, 19\]"),
}


@mistakes(MERGES)
def test_merge_tokens_refuses(name: str) -> None:
    change, error, message = MERGES[name]
    with pytest.raises(error, match=message):
        tokenops.merge_tokens(**{"x": X, "plan": PLAN, **change})


@pytest.mark.parametrize("value", [-1.0, float("nan"), -float("inf")])
def test_sizes_must_not_be_negative(value: float, backend: str, device: str) -> None:
    plan = tokenops.plan_from_slots(torch.tensor([[0, 0, 1, -1]] * 2, device=device), 2)
    x = torch.ones(2, 4, 3, device=device)
    size = torch.ones(2, 4, device=device)
    size[1, 1] = value
    with pytest.raises(ValueError, match=rf"size must not be negative, got {value} at position \[1, 1\]"):
        tokenops.merge_tokens(x, plan, size=size, backend=backend)
    # a token that goes nowhere may have any
    size[1, 1], size[1, 3] = 1.0, value
    assert tokenops.merge_tokens(x, plan, size=size, backend=backend).isfinite().all()


BROKEN = {
    "slot too large": {"slot": (1, 3, 2)},
    "slot too small": {"slot": (1, 3, -2)},
    "slot of another row": {"slot": (1, 0, 1)},
    "token too large": {"order": (0, 1, 9)},
    "token too small": {"order": (0, 1, -1)},
    "token twice": {"order": (0, 1, 0)},
    "members in another order": {"order": (0, 1, 3), "order again": (0, 2, 1)},
    "rows that do not start": {"offsets": (0, 0, 1)},
    "rows that overlap": {"offsets": (0, 1, 4)},
    "rows that go on": {"offsets": (0, 2, 9)},
    "rows that are far away": {"offsets": (0, 1, -(2**31))},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_plan_must_not_contradict_itself(name: str, backend: str, device: str) -> None:
    """Hand-made or damaged plans are refused before a row is read."""
    plan = tokenops.plan_from_slots(torch.tensor([[0, 0, 1, 0], [0, 0, 1, 1]], device=device), 2, backend=backend)
    parts = {field: x.clone() for field, x in plan._asdict().items() if isinstance(x, Tensor)}
    for key, (sample, at, value) in BROKEN[name].items():
        parts[key.split()[0]][sample, at] = value
    broken = plan._replace(**parts)
    x = torch.ones(2, 4, 3, device=device, requires_grad=True)
    for run in (
        lambda: tokenops.merge_tokens(x, broken, backend=backend),
        lambda: tokenops.unmerge_tokens(x[:, :2], broken, backend=backend),
    ):
        with pytest.raises(ValueError, match="plan must be as a function of tokenops made it"):
            run()


def test_unmerge_tokens_refuses() -> None:
    y = torch.ones(2, 7, 3)
    with pytest.raises(ValueError, match="mode must be 'copy' or 'drop', got 'mean'"):
        tokenops.unmerge_tokens(y, PLAN, mode="mean")
    with pytest.raises(ValueError, match=r"y must have the plan's 7 output rows, got \[2, 6, 3\]"):
        tokenops.unmerge_tokens(y[:, :6], PLAN)
    with pytest.raises(TypeError, match="plan must be a MergePlan, got Tensor"):
        tokenops.unmerge_tokens(y, PLAN.slot)
    with pytest.raises(ValueError, match=r"must have the plan's 7 output rows"):
        tokenops.unmerge_tokens(y, [PLAN, PLAN])


SOFTS: Bad = {
    "no tensor": ({"meta": None}, TypeError, "meta must be a Tensor, got NoneType"),
    "wrong rank": ({"meta": META[0]}, ValueError, r"meta must be \[B, M, F\], got \[5, 8\]"),
    "two lengths": ({"metric": METRIC[:, :19]}, ValueError, r"metric must have x's N = 20, got \[2, 19, 8\]"),
    "two widths": ({"meta": META[..., :4]}, ValueError, r"meta must have metric's F = 8, got \[2, 5, 4\]"),
    "two dtypes": ({"meta": META.half()}, TypeError, "meta must have x's dtype torch.float32, got torch.float16"),
    "temperature of 0": ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    "temperature NaN": ({"temperature": float("nan")}, ValueError, "temperature must be positive, got nan"),
    "two temperatures": ({"temperature": torch.ones(2)}, ValueError, r"temperature must be one number, got \[2\]"),
    "temperature of another dtype": (
        {"temperature": torch.ones(()).double()},
        TypeError,
        "temperature must be torch.float32 .* got torch.float64",
    ),
    "mass of another length": ({"mass": torch.ones(19)}, ValueError, r"mass must be \[20\] \| \[2, 20\], .* got \[19\]"),
    "mass of a half type": ({"mass": torch.ones(20).half()}, TypeError, "mass must be torch.float32 .* got torch.float16"),
}


@mistakes(SOFTS)
def test_soft_merge_refuses(name: str) -> None:
    change, error, message = SOFTS[name]
    with pytest.raises(error, match=message):
        tokenops.soft_merge(**{"x": X, "metric": METRIC, "meta": META, "temperature": 0.5, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mass": but(torch.ones(2, 20), (1, 4), -0.5)}, r"mass must not be negative, got -0.5 at position \[1, 4\]"),
        ({"mass": but(torch.ones(2, 20), (0, 4), torch.nan)}, r"mass must not be negative, got nan at position \[0, 4\]"),
        ({"temperature": torch.tensor(-1.0)}, "temperature must be positive, got -1.0"),
        ({"metric": but(METRIC, (1, 3, 2), torch.nan)}, r"metric must be finite, got nan in row \[1, 3\]"),
        ({"meta": but(META, (0, 4, 2), torch.inf)}, r"meta must be finite, got inf in row \[0, 4\]"),
    ],
    ids=["negative mass", "NaN mass", "learned temperature", "NaN metric", "infinite meta"],
)
def test_soft_merge_refuses_contents(change: dict[str, Tensor], message: str, backend: str, device: str) -> None:
    call = {"x": X, "metric": METRIC, "meta": META, "temperature": torch.tensor(0.5), **change}
    with pytest.raises(ValueError, match=message):
        tokenops.soft_merge(**{key: x.to(device) for key, x in call.items()}, backend=backend)


def test_the_cpu_kernel_refuses_a_negative_r_by_itself() -> None:
    if native.CPU_ABSENT:
        pytest.skip(native.CPU_ABSENT)
    lists = [torch.empty(shape, dtype=torch.int32) for shape in ((2, 20), (2,), (2, 20), (2, 21))]
    rest = (None, False, False, None, 0, 0, 0, 0, None, None, -1, None, True, "")
    with pytest.raises(RuntimeError, match="r must not be negative, got -1"):
        torch.ops.tokenops.token_merge_cpu_match(*lists, METRIC, *rest)


def test_a_named_backend_says_why_it_cannot() -> None:
    with pytest.raises(NotImplementedError, match="float64 is served by the reference only"):
        tokenops.merge_tokens(X.double(), PLAN, backend="cpu")
    with pytest.raises(NotImplementedError, match=r"x must have a dense last dimension, got strides \(120, 1, 20\)"):
        tokenops.merge_tokens(X.mT.contiguous().mT, PLAN, backend="cpu")
    with pytest.raises(NotImplementedError, match="metric must have a width that is a multiple of 8, got 6"):
        tokenops.match_tokens(X, r=1, backend="cpu")
    # nobody asked for it: the reference serves
    assert tokenops.match_tokens(X, r=1).n_out == 19
