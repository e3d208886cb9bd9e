"""The benchmark: its cases and peers are right, its command line says what it should, and a wrong result never gets a ratio."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("click", reason="the benchmark's extra is not installed")
pytest.importorskip("av", reason="the benchmark's extra is not installed")

import av
from click.testing import CliRunner

import tokenops
from tokenops import native
from tokenops.benchmarks import __main__ as cli
from tokenops.benchmarks import (
    allocator,
    chart,
    compare,
    delta_matmul,
    frames,
    harness,
    picture,
    record,
    roof,
    sparse_attention,
    table,
    token_merge,
    token_select,
    video,
)
from tokenops.benchmarks.harness import Contender, Cost, Request, Trial

# of every room one of each kind; kept apart from the real cases only by their size
TINY = (
    sparse_attention.Case("tiny-shared", 2, 40, 17, heads=2, width=16),
    sparse_attention.Case("tiny-sample", 3, 40, 17, "sample", heads=2, width=16),
    sparse_attention.Case("tiny-bias", 2, 40, 17, "sample", heads=2, width=16, bias=True),
    sparse_attention.Case("tiny-ragged", 3, 40, (5, 30, 17), "sample", heads=2, width=16),
    sparse_attention.Case("tiny-short", 5, 8, None, "none", heads=2, width=16),
    sparse_attention.Case("tiny-positions", 2, 40, None, "none", heads=2, width=16, rel_grid=(5, 8)),
    sparse_attention.Case("tiny-one-head", 1, 40, 17, heads=1, width=16),
    sparse_attention.Case("tiny-video", 2, video.TOKENS, 60, "video", heads=1, width=8),
    sparse_attention.Case("tiny-video-ragged", 2, video.TOKENS, (), "video", heads=1, width=8),
)
SELECT = (
    token_select.Case("little-top-k", "top-k", 3, 100, 30),
    token_select.Case("little-top-k-video", "top-k", 2, video.TOKENS, 300, film=True),
    token_select.Case("little-threshold", "threshold", 3, 100),
    token_select.Case("little-halt", "halt", 3, 40, channels=16),
    token_select.Case("little-halt-class", "halt", 3, 40, channels=16, output="class"),
    token_select.Case("little-halt-packed", "halt", 3, 40, channels=16, packed=True),
    token_select.Case("little-halt-packed-class", "halt", 3, 40, channels=16, output="class", packed=True),
    token_select.Case("little-pack", "pack", 2, video.TOKENS, channels=8, film=True),
    token_select.Case("little-unpack", "unpack", 2, video.TOKENS, channels=8, film=True),
)
MERGE = (
    token_merge.Case("small-match", "match + merge", 41, 7, batch=2, channels=24, width=16),
    token_merge.Case("small-match-even", "match + merge", 40, 20, batch=2, channels=24, width=16, class_token=False, memory=True),
    token_merge.Case("small-over", "match + merge", 41, threshold=0.4, batch=2, channels=24, width=16),
    token_merge.Case("small-video", "match + merge", video.TOKENS, 300, batch=2, channels=24, width=16, film=True),
    token_merge.Case("small-merge", "merge", 41, 7, batch=2, channels=24, width=16),
    token_merge.Case("small-unmerge", "unmerge", 41, 7, batch=2, channels=24, width=16),
    token_merge.Case("small-into-meta", "soft merge", 41, meta=5, batch=2, channels=24, width=16),
)
DELTA = (
    delta_matmul.Case("scant-attention", "attention", 9, 40, 32, 2, published=True),
    delta_matmul.Case("scant-attention-functional", "attention", 9, 40, 32, 2, in_place=False),
    delta_matmul.Case("scant-attention-paper", "attention", 9, 40, 32, 2, mode="paper", published=True),
    delta_matmul.Case("scant-attention-film", "attention", tokens=video.TOKENS_PER_FRAME, channels=32, heads=2, film=True),
    delta_matmul.Case("scant-first-frame", "flush", 40, 40, 32, 2),
    delta_matmul.Case("scant-scene-cut", "attention", 40, 40, 32, 2),
    delta_matmul.Case("scant-windows", "windows", tokens=video.TOKENS_PER_FRAME, channels=32, heads=2, film=True),
    delta_matmul.Case("scant-block", "block", 9, 40, 32, 2),
    delta_matmul.Case("scant-block-film", "block", tokens=video.TOKENS_PER_FRAME, channels=32, heads=2, film=True),
    delta_matmul.Case("scant-gate", "gate", 9, 40, 32),
    delta_matmul.Case("scant-gate-functional", "gate", 9, 40, 32, in_place=False),
    delta_matmul.Case("scant-linear", "linear", 9, 40, 32, outputs=24),
    delta_matmul.Case("scant-mlp", "mlp", 9, 40, 32, outputs=64),
    delta_matmul.Case("scant-compact", "linear", 9, 40, 32, outputs=24, in_place=False),
)
ROOMS = {
    "sparse_attention": (sparse_attention, TINY),
    "token_select": (token_select, SELECT),
    "token_merge": (token_merge, MERGE),
    "delta_matmul": (delta_matmul, DELTA),
}
CASES = [(module, case) for module, cases in ROOMS.values() for case in cases]
FORWARD = ("top-k", "threshold", "match + merge")
BOTH_WAYS = [
    (m, case) for m, case in CASES if getattr(case, "operation", "") not in FORWARD and (m is not delta_matmul or case in DELTA[-1:])
]


def names(pair: tuple[object, harness.Case]) -> str:
    return pair[1].name


@pytest.fixture(scope="module")
def request_for_tiny() -> Request:
    tokens, film = video.read_tokens(video.EXCERPT, 2), video.read_frames(video.EXCERPT)
    return Request(video=lambda clips: tokens, film=lambda: film)


@pytest.fixture
def wish(room: ModuleType, request_for_tiny: Request) -> Request:
    """Also the peers that are slow where they are large; those of other rooms compile."""
    return request_for_tiny._replace(slow_peers=room is delta_matmul)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roofs and cases of a size for tests; no restart, which would replace pytest."""
    monkeypatch.setattr(roof, "GEMM", {"cpu": 64})
    monkeypatch.setattr(roof, "COPY", {"cpu": 1 << 16})
    monkeypatch.setattr(roof, "STEPS", 1000)
    monkeypatch.setattr(cli, "ROOF_SECONDS", 0)
    for module, cases in ROOMS.values():
        monkeypatch.setattr(module, "CASES", tuple(case._replace(quick=True) for case in cases))
    monkeypatch.setenv(allocator.MARKER, "1")
    monkeypatch.setattr(allocator, "touch_pool", lambda: 1 << 20)


def invoke(*arguments: object):
    return CliRunner().invoke(cli.cli, [str(argument) for argument in arguments], env={allocator.MARKER: "1"})


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("room", "case"), CASES, ids=map(names, CASES))
def test_every_contender_computes_the_same(room: ModuleType, case: Any, dtype: str, wish: Request) -> None:
    check_contenders(room, case._replace(dtype=dtype), wish)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("room", "case"), BOTH_WAYS, ids=map(names, BOTH_WAYS))
def test_every_contender_computes_the_same_gradients(room: ModuleType, case: Any, dtype: str, request_for_tiny: Request) -> None:
    check_contenders(room, case._replace(dtype=dtype, direction="fwd+bwd"), request_for_tiny)


def check_contenders(room: ModuleType, case: Any, wish: Request) -> list[harness.Outcome]:
    trial = room.prepare(case, wish)
    measured = harness.measure(trial, case.dtype, harness.CpuClock(), 0.001, torch.get_num_threads())
    assert {outcome.status for outcome in measured.outcomes} <= {"ok", "not run"}, measured.outcomes
    ran = [outcome for outcome in measured.outcomes if outcome.status == "ok"]
    ours = [outcome for outcome in ran if outcome.ours]
    assert len(ours) == 1
    # every peer that ran is compared, and only peers are
    assert set(ours[0].faster_than) == {outcome.name for outcome in ran if not outcome.ours}
    assert len(ran) >= 2
    assert all(0 <= outcome.error <= 1 and outcome.rounds >= harness.FEWEST_ROUNDS and outcome.seconds.low > 0 for outcome in ran)
    return ran


def test_cost_counts_kept_tokens_only(request_for_tiny: Request) -> None:
    ragged = next(case for case in TINY if case.name == "tiny-ragged")
    pairs = 2 * (5**2 + 30**2 + 17**2)
    assert sparse_attention.prepare(ragged, request_for_tiny).cost.flops == 4 * 16 * pairs
    assert sparse_attention.prepare(ragged._replace(direction="fwd+bwd"), request_for_tiny).cost.flops == (4 + 10) * 16 * pairs


def test_video_layout_is_that_of_a_linear_layer(request_for_tiny: Request) -> None:
    case = next(case for case in TINY if case.name == "tiny-video")._replace(heads=2)
    query = sparse_attention.make_inputs(case, request_for_tiny).query
    assert query.shape == (2, 2, video.TOKENS, 8)
    assert query.transpose(1, 2).is_contiguous()
    assert not query.is_contiguous()


@pytest.mark.parametrize("room", ROOMS)
def test_real_cases_have_distinct_ids_and_cover_the_presets(room: str) -> None:
    cases = ROOMS[room][0].CASES
    ids = [harness.case_id(case) for case in cases]
    assert len(set(ids)) == len(ids)
    quick = [case for case in cases if case.quick]
    assert any(case.name.startswith("video") for case in quick)
    assert {case.direction for case in quick} == {"fwd", "fwd+bwd"}
    assert {case.dtype for case in cases} == {"fp32", "bf16"}
    assert len(quick) < len(ids)


@pytest.mark.parametrize(("room", "case"), CASES, ids=map(names, CASES))
def test_under_pytest_benchmark(room: ModuleType, case: Any, request: pytest.FixtureRequest, request_for_tiny: Request) -> None:
    _run_under_pytest_benchmark(room, case, request, request_for_tiny)


QUICK = [(module, case) for module, _ in ROOMS.values() for case in module.CASES if case.quick]


@pytest.mark.full
@pytest.mark.parametrize(("room", "case"), QUICK, ids=[harness.case_id(case) for _, case in QUICK])
def test_quick_preset_under_pytest_benchmark(room: ModuleType, case: Any, request: pytest.FixtureRequest) -> None:
    _run_under_pytest_benchmark(
        room, case, request, Request(video=partial(video.read_tokens, video.EXCERPT), film=partial(video.read_frames, video.EXCERPT))
    )


def _run_under_pytest_benchmark(room: ModuleType, case: Any, request: pytest.FixtureRequest, wish: Request) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    benchmark = request.getfixturevalue("benchmark")
    # a test run is no place to take times; --benchmark-only asks for them
    benchmark.disabled = not request.config.getoption("benchmark_only")
    trial = room.prepare(case, wish)
    ours = next(contender for contender in trial.contenders if contender.ours)
    # of the first call: a state that is updated in place goes on changing
    results = ours.canonical(ours.run())
    for result, right in zip(results, trial.expected(), strict=True):
        assert harness.error_fraction(result, right, case.dtype) <= 1
    benchmark(ours.run)


COMPILED = [pair for pair in CASES if names(pair) in ("small-match", "small-into-meta")]


@pytest.mark.full
@pytest.mark.parametrize(("room", "case"), COMPILED, ids=map(names, COMPILED))
def test_compiled_peers(room: ModuleType, case: Any, request_for_tiny: Request) -> None:
    ran = check_contenders(room, case, request_for_tiny._replace(slow_peers=True))
    assert "torch, compiled" in {outcome.name for outcome in ran}


class TestFrames:
    """What calls with a state are timed on, and what makes their results right."""

    def test_every_frame_changes_the_tokens_of_its_list_and_no_others(self) -> None:
        film = frames.rotating([(1, 2, 30, 4), (1, 30, 3)], 7)
        lists = [set(index[0].tolist()) for index in film.index]
        assert len(film.grids) == len(lists) == 4
        assert film.counts == [7] * 4
        assert all(now != before for now, before in zip(lists, lists[-1:] + lists[:-1], strict=True))
        for now, before, listed in zip(film.grids, film.grids[-1:] + film.grids[:-1], lists, strict=True):
            for grid, old in zip(now, before, strict=True):
                changed = (grid != old).flatten(0, -3).any(-1).any(0) if grid.dim() > 2 else None
                assert set(changed.nonzero().flatten().tolist()) == listed

    def test_a_film_goes_there_and_back_again(self) -> None:
        pictures = [(torch.full((1, 4, 1), 1.0).index_fill(1, torch.arange(at), 5.0 + at),) for at in range(4)]
        film = frames.from_film(pictures)
        assert [grids[0] is pictures[at][0] for grids, at in zip(film.grids, (0, 1, 2, 3, 2, 1), strict=True)] == [True] * 6
        assert [index[0].tolist() for index in film.index] == [[0, -1, -1], [0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 2], [0, 1, -1]]
        assert film.counts == [1, 1, 2, 3, 3, 2]

    def test_a_stream_starts_once_and_goes_around(self) -> None:
        calls: list[int] = []

        def step(state: list[int], at: int) -> tuple[harness.Results, list[int]]:
            calls.append(at)
            return (torch.tensor(len(state)),), [*state, at]

        stream = frames.Stream(3, lambda: [7], step)
        first = stream()
        assert [int(x) for [x] in stream.checked(first)] == [1, 2]
        assert [int(*stream()) for _ in range(3)] == [3, 4, 5]
        assert calls == [0, 1, 2, 0, 1]

    @pytest.mark.parametrize(
        "name", ["scant-attention", "scant-attention-paper", "scant-block", "scant-gate", "scant-linear", "scant-windows"]
    )
    @pytest.mark.parametrize("call", [1, 2])
    def test_a_wrong_frame_is_wrong(self, name: str, call: int, request_for_tiny: Request) -> None:
        """The first of those that are compared, or the last; and of every contender."""
        case = next(case for case in DELTA if case.name == name)
        trial = delta_matmul.prepare(case, request_for_tiny._replace(slow_peers=True))
        for contender in trial.contenders:
            stream = contender.run
            right = stream.step

            def spoilt(state: Any, at: int, right: Callable[..., Any] = right) -> Any:
                results, state = right(state, at)
                values = [x for x in results if x.is_floating_point()]
                # the last frame's grid may be the state: what is spoilt is a copy
                return tuple(x * 1.001 if x is values[0] and at == call - 1 else x for x in results), state

            stream.step = spoilt
        statuses = {o.name: o.status for o in harness.measure(trial, "fp32", harness.CpuClock(), 0.001, 1).outcomes}
        assert set(statuses.values()) == {"wrong"}, statuses

    def test_a_wrong_choice_is_wrong(self) -> None:
        change = torch.tensor([[[4.0], [3.0], [0.0], [2.0]]])
        assert delta_matmul.block.rightness(change, torch.tensor([[0, 1]]), 2).tolist() == [1.0] * 4
        assert delta_matmul.block.rightness(change, torch.tensor([[0, 3]]), 2).tolist() == [1.0, 1.0, 1.0, pytest.approx(2 / 3)]
        assert delta_matmul.block.rightness(change * 0, torch.tensor([[0, 3]]), 2).tolist() == [1.0] * 4


class TestMatching:
    """What makes somebody's plan right, whoever made it."""

    case = next(case for case in MERGE if case.name == "small-match")

    def status_of(self, spoil: Callable[[harness.Results], harness.Results]) -> harness.Outcome:
        trial = token_merge.prepare(self.case, Request())
        ours = next(contender for contender in trial.contenders if contender.ours)
        spoilt = ours._replace(run=lambda: spoil(ours.run()))
        [outcome] = harness.measure(trial._replace(contenders=[spoilt]), "fp32", harness.CpuClock(), 0.001, 1).outcomes
        return outcome

    def test_rows_may_stand_in_any_order(self) -> None:
        def reverse(results: harness.Results) -> harness.Results:
            rows, sizes, slot = results
            return rows.flip(1), sizes.flip(1), rows.shape[1] - 1 - slot

        assert self.status_of(reverse).status == "ok"

    def test_a_worse_partner_is_wrong(self) -> None:
        inputs = token_merge.make_inputs(self.case, Request())

        def swap_metric(results: harness.Results) -> harness.Results:
            # consistent in itself, but matched by something else
            plan = tokenops.match_tokens(inputs.tokens[..., :16].contiguous(), r=self.case.r, class_token=True)
            rows = tokenops.merge_tokens(inputs.tokens, plan, size=inputs.size)
            return rows, tokenops.merge_tokens(inputs.size, plan, mode="sum"), plan.slot

        outcome = self.status_of(swap_metric)
        assert outcome.status == "wrong"
        assert [reason.partition(":")[0] for reason in outcome.reasons] == ["similarities of merged pairs"]

    def test_destinations_that_merge_are_wrong(self) -> None:
        inputs = token_merge.make_inputs(self.case, Request())

        def merge_destinations(results: harness.Results) -> harness.Results:
            slot = results[2].clone()
            slot[slot == slot[:, 3:4]] = slot[0, 1]
            plan = tokenops.plan_from_slots(slot, results[0].shape[1])
            rows = tokenops.merge_tokens(inputs.tokens, plan, size=inputs.size)
            return rows, tokenops.merge_tokens(inputs.size, plan, mode="sum"), slot

        outcome = self.status_of(merge_destinations)
        assert "rows left" in [reason.partition(":")[0] for reason in outcome.reasons]

    def test_rows_that_are_no_means_are_wrong(self) -> None:
        outcome = self.status_of(lambda results: (results[0] * 1.001, *results[1:]))
        assert [reason.partition(":")[0] for reason in outcome.reasons] == ["rows"]

    def test_sizes_that_are_no_sums_are_wrong(self) -> None:
        outcome = self.status_of(lambda results: (results[0], results[1] + 1, results[2]))
        assert [reason.partition(":")[0] for reason in outcome.reasons] == ["sizes"]


def test_lists_are_right_by_the_scores_in_them() -> None:
    score = torch.tensor([[3.0, 1.0, 2.0, 1.0]])
    right = token_select._chosen(score, torch.tensor([[0, 1, 2]]))
    # the other of two equal scores is as good
    assert all(map(torch.equal, token_select._chosen(score, torch.tensor([[0, 2, 3]])), right))
    # neither another score, nor another order, nor a gap is
    for wrong in ([[0, 1, 3]], [[2, 1, 0]], [[0, -1, 2]]):
        assert not all(map(torch.equal, token_select._chosen(score, torch.tensor(wrong)), right))


def test_near_duplicates_of_the_excerpt() -> None:
    """Real tokens repeat, so that a threshold has something to merge; the benchmark says how much."""
    film = next(case for case in token_merge.CASES if case.threshold is not None)._replace(channels=8)
    trial = token_merge.prepare(
        film, Request(video=partial(video.read_tokens, video.EXCERPT), film=partial(video.read_frames, video.EXCERPT))
    )
    found = re.match(r"(\d+) of 6276 tokens \((\d+) %\) are more similar than 0.9", trial.remark)
    assert found, trial.remark
    assert 15 < int(found[2]) < 45
    ours = next(contender for contender in trial.contenders if contender.ours)
    left = (ours.run()[1] > 0).sum(1)
    assert int(left.sum()) == 6276 - int(found[1])
    assert f"leaves {int(left.min())} to {int(left.max())} of 1569 in a clip" in trial.remark


def test_halting_steps_halt_about_half() -> None:
    for case in SELECT:
        if case.operation == "halt" and not case.packed:
            state = token_select._halting_step(case, Request()).state
            assert 0.3 < state.active.float().mean() < 0.7
            # no class token has halted, so that each has something to add
            assert state.active[:, 0].all()


def trial_of(*contenders: Contender) -> Trial:
    return Trial(contenders, lambda: (torch.ones(4, 4, dtype=torch.float64),), ("out",), Cost(1000, 100), {})


RIGHT = Contender("right", lambda: (torch.ones(4, 4),), ours=True)
PEER = Contender("peer", lambda: (torch.ones(4, 4),))


def outcomes_of(*contenders: Contender) -> dict[str, harness.Outcome]:
    measured = harness.measure(trial_of(*contenders), "fp32", harness.CpuClock(), 0.001, torch.get_num_threads())
    return {outcome.name: outcome for outcome in measured.outcomes}


def not_a_number() -> harness.Results:
    return (torch.full((4, 4), math.nan),)


def too_many_rows() -> harness.Results:
    return (torch.ones(5, 4),)


def off_by_a_little() -> harness.Results:
    return (torch.ones(4, 4) * 1.0001,)


def nothing() -> harness.Results:
    return ()


@pytest.mark.parametrize("result", [off_by_a_little, not_a_number, too_many_rows, nothing])
@pytest.mark.parametrize("ours", [True, False])
def test_a_wrong_result_gets_no_time_and_no_ratio(result, ours: bool) -> None:
    wrong = Contender("suspect", result, ours=ours)
    outcomes = outcomes_of(*((wrong, PEER) if ours else (RIGHT, wrong)))
    suspect = outcomes["suspect"]
    assert (suspect.status, suspect.seconds, suspect.faster_than, suspect.rounds) == ("wrong", None, None, 0)
    assert suspect.reasons
    if not ours:
        assert outcomes["right"].faster_than == {}


def test_a_contender_that_raises_does_not_end_the_run() -> None:
    def raises() -> harness.Results:
        raise RuntimeError("no such kernel")

    outcomes = outcomes_of(RIGHT, PEER, Contender("broken", raises))
    assert outcomes["broken"].status == "failed"
    assert outcomes["broken"].reasons == ("RuntimeError: no such kernel",)
    assert set(outcomes["right"].faster_than) == {"peer"}


def test_a_contender_with_objections_is_never_called() -> None:
    def must_not_run() -> harness.Results:
        raise AssertionError("was called")

    outcome = outcomes_of(RIGHT, Contender("elsewhere", must_not_run, objections=["needs another machine"]))["elsewhere"]
    assert (outcome.status, outcome.reasons) == ("not run", ("needs another machine",))


def test_contenders_take_turns() -> None:
    calls: list[str] = []

    def recorder(name: str) -> Contender:
        return Contender(name, lambda: (calls.append(name), torch.ones(4, 4))[1:], ours=name == "a")

    outcomes = outcomes_of(recorder("a"), recorder("b"))
    timed = calls[2 + 2 * harness.WARM_UP :]
    # every round has both, and the one that begins alternates
    rounds = [timed[at : at + 2] for at in range(0, len(timed), 2)]
    assert all(sorted(pair) == ["a", "b"] for pair in rounds)
    assert [pair[0] for pair in rounds[:4]] == ["a", "b", "a", "b"]
    assert outcomes["a"].rounds == outcomes["b"].rounds == len(rounds)


def test_threads_of_one_contender_do_not_leak() -> None:
    seen = {}

    def recorder(name: str, threads: int | None) -> Contender:
        return Contender(name, lambda: (seen.setdefault(name, torch.get_num_threads()), torch.ones(4, 4))[1:], threads=threads)

    before = torch.get_num_threads()
    try:
        harness.measure(trial_of(recorder("one", 1), recorder("two", None)), "fp32", harness.CpuClock(), 0.001, 2)
        assert seen == {"one": 1, "two": 2}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_spread_and_ratio() -> None:
    assert harness.Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert harness.Spread(3.0, 2.0, 4.0).percent == pytest.approx(100 / 3)
    # rounds in which the slow one sat out do not count
    ratio = harness._ratio([8.0, None, 6.0, 10.0], [2.0, 100.0, 2.0, 2.0])
    assert ratio == (4.0, 3.5, 4.5)


def test_error_is_the_projects_rule() -> None:
    expected = torch.full((100,), 2.0, dtype=torch.float64)
    allowed = harness.TOLERANCE["fp32"] * (20 + 0.01 * 10)
    result = expected.clone()
    result[0] += allowed
    assert harness.error_fraction(result, expected, "fp32") == pytest.approx(1)
    empty_row = torch.tensor([-math.inf, 1.0], dtype=torch.float64)
    assert harness.error_fraction(empty_row.float(), empty_row, "fp32") == 0
    assert harness.error_fraction(torch.tensor([-math.inf, math.nan]), empty_row, "fp32") == math.inf


@pytest.mark.skipif(bool(native.CPU_ABSENT), reason="the C++ library is not built")
@pytest.mark.parametrize("bf16", [False, True])
def test_multiply_add_counts_what_it_does(bf16: bool) -> None:
    run = torch.ops.tokenops.cpu_multiply_add
    for isa in native.cpu_isas():
        # in proportion to the steps, and some vector width times two operations
        once = run(1, bf16, isa)
        assert run(1000, bf16, isa) == 1000 * once
        assert once % (2 * 4 * torch.get_num_threads()) == 0


def test_excerpt_is_small_and_attributed() -> None:
    assert video.EXCERPT.stat().st_size <= 400 * 1024
    text = (video.EXCERPT.parent / "ATTRIBUTION.md").read_text()
    assert "Blender Foundation" in text
    assert "creativecommons.org/licenses/by/3.0" in text


def test_frames_of_the_excerpt() -> None:
    frames = video.read_frames(video.EXCERPT)
    assert frames.shape == (132, 224, 224, 3)
    assert frames.dtype == torch.uint8
    # a picture, not noise or a blank
    assert 20 < frames.float().std() < 120


def test_patches_are_squares_in_raster_order() -> None:
    clips = torch.randint(0, 256, (2, 3, 224, 224, 3), dtype=torch.uint8)
    patches = video.patchify(clips)
    assert patches.shape == (2, 3, 196, 768)
    square = clips[1, 2, 16:32, 48:64].float() / 127.5 - 1
    assert torch.equal(patches[1, 2, 14 + 3], square.flatten())


def test_change_is_measured_against_the_frame_before() -> None:
    patches = torch.zeros(1, 3, 4, 5)
    patches[0, 1, 2] = 0.5
    change = video.change_score(patches)
    assert change.shape == (1, 13)
    # the class token and the first frame have nothing before them
    assert torch.isinf(change[0, :5]).all()
    # patch 2 appears in frame 1 and disappears in frame 2
    assert change[0, 5:].tolist() == [0, 0, 0.5, 0, 0, 0, 0.5, 0]
    assert video.most_changed(change, 7).tolist() == [[0, 1, 2, 3, 4, 7, 11]]
    assert video.changed_more_than(change, 0.1).tolist() == [[0, 1, 2, 3, 4, 7, 11]]


def test_index_lists_of_the_excerpt() -> None:
    tokens = video.read_tokens(video.EXCERPT, 8)
    assert tokens.patches.shape == (8, video.TOKENS - 1, 768)
    same = video.most_changed(tokens.change, 392)
    assert same.shape == (8, 392)
    assert same.dtype == torch.int32
    assert (same.diff(dim=1) > 0).all()
    # the class token and the whole first frame
    assert torch.equal(same[:, :197], torch.arange(197, dtype=torch.int32).expand(8, -1))
    ragged = video.changed_more_than(tokens.change, video.CHANGE)
    counts = (ragged >= 0).sum(1)
    assert counts.max() == ragged.shape[1]
    assert counts.min() < 0.5 * counts.max()
    for row, count in zip(ragged, counts, strict=True):
        assert (row[:count].diff() > 0).all()
        assert (row[count:] == -1).all()
    # motion is in one piece: kept tokens have kept neighbours far more often than by chance
    grid = torch.zeros(8, video.TOKENS)
    grid.scatter_(1, same.long(), 1)
    frames = grid[:, 197:].view(8, -1, 14, 14)
    together = (frames[..., 1:] * frames[..., :-1]).mean() / frames.mean() ** 2
    assert together > 1.5


def write_video(path: Path, frames: int) -> Path:
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for shade in range(frames):
            picture = torch.full((240, 320, 3), 20 * shade % 256, dtype=torch.uint8)
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        writer.mux(stream.encode())
    return path


def test_any_video_will_do(tmp_path: Path) -> None:
    tokens = video.read_tokens(write_video(tmp_path / "own.mp4", 12), 3)
    assert tokens.patches.shape == (3, video.TOKENS - 1, 768)
    # every frame differs from the one before
    assert (tokens.change > 0).all()


def test_videos_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(video.VideoError, match="at least 8 frames, got 5"):
        video.read_tokens(write_video(tmp_path / "short.mp4", 5), 1)
    (tmp_path / "text.mp4").write_text("no video")
    for path in (tmp_path / "text.mp4", tmp_path / "absent.mp4"):
        with pytest.raises(video.VideoError, match=re.escape(path.name)):
            video.read_frames(path)


def test_restart_raises_the_thresholds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
    environment = allocator.restart_environment({"HOME": "/root", "MALLOC_TOP_PAD_": "1"})
    # what the user set stays
    assert environment == {**allocator.THRESHOLDS, "HOME": "/root", "MALLOC_TOP_PAD_": "1", allocator.MARKER: "1"}
    assert allocator.restart_environment(environment) is None
    assert allocator.restart_environment({}, "avx2")["ATEN_CPU_CAPABILITY"] == "avx2"
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert allocator.restart_environment({}) is None
    assert allocator.restart_environment({}, "avx2") == {**allocator.ISA_VARIABLES["avx2"], allocator.MARKER: "1"}


def test_restart_runs_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(allocator.os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.delenv(allocator.MARKER, raising=False)
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
    allocator.restart(["bench", "--preset", "full"])
    [(program, arguments, environment)] = calls
    assert program == sys.executable
    assert arguments == [sys.executable, "-m", "tokenops.benchmarks", "bench", "--preset", "full"]
    assert environment[allocator.MARKER] == "1"


def test_the_command_as_users_run_it(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "tokenops.benchmarks",
        "bench",
        "--case",
        "short-B196-N8-fp32-fwd",
        "--seconds",
        "0.05",
        "--threads",
        "1",
    ]
    environment = {name: value for name, value in os.environ.items() if name != allocator.MARKER}
    done = subprocess.run([*command, "--threads", "1", "--json", str(out)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = record.read(out)
    assert run["environment"]["threads"] == 1
    assert [case["id"] for case in run["cases"]] == ["short-B196-N8-fp32-fwd"]
    if allocator.platform.libc_ver()[0] == "glibc":
        assert run["environment"]["restarted"]
        assert set(allocator.THRESHOLDS) <= set(run["environment"]["variables"])
        assert "restarted with raised malloc thresholds" in done.stdout


@pytest.mark.usefixtures("small_machine")
def test_bench_writes_table_json_and_chart(tmp_path: Path) -> None:
    numbers, drawing = tmp_path / "run.json", tmp_path / "run.png"
    done = invoke("bench", "--seconds", "0.01", "--json", numbers, "--chart", drawing, "--case", "tiny-s", "--case", "tiny-ragged")
    assert done.exit_code == 0, done.output
    run = json.loads(numbers.read_text())
    assert [case["name"] for case in run["cases"]] == ["tiny-shared", "tiny-sample", "tiny-ragged", "tiny-short"]
    assert run["environment"]["torch"] == torch.__version__
    assert run["roof"]["copy_gbs"] > 0
    assert run["roof"]["gemm_gflops"]["fp32"] > 0
    for case in run["cases"]:
        ours = [contender for contender in case["contenders"] if contender["ours"]]
        assert len(ours) == 1
        assert ours[0]["status"] == "ok"
        assert ours[0]["gflops"] == pytest.approx(case["flops"] / ours[0]["ms"]["median"] * 1e-6)
        assert ours[0]["percent_of"]["copy"] == pytest.approx(100 * ours[0]["gbs"] / run["roof"]["copy_gbs"])
        for peer, ratio in ours[0]["faster_than"].items():
            assert f"{ratio['median']:.2f}x" in done.output
            assert peer in done.output
        assert f"again: {case['repro']}" in done.output
    assert "roofs " in done.output
    assert "malloc" in done.output
    assert drawing.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_machine")
def test_numbers_outlive_a_run_that_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, measure = tmp_path / "run.json", harness.measure

    def stopped(trial: Trial, *rest: Any) -> harness.Measurement:
        if numbers.exists():
            raise KeyboardInterrupt
        return measure(trial, *rest)

    monkeypatch.setattr(harness, "measure", stopped)
    assert invoke("bench", "--seconds", "0.01", "--json", numbers, "--case", "tiny-s").exit_code != 0
    assert [case["name"] for case in record.read(numbers)["cases"]] == ["tiny-shared"]


@pytest.mark.usefixtures("small_machine")
def test_bench_of_several_rooms(tmp_path: Path) -> None:
    """Each room has a table and a panel of its own, because each has its own peers."""
    numbers, drawing = tmp_path / "run.json", tmp_path / "run.png"
    cases = [word for name in ("tiny-shared", "little-top-k", "small-match") for word in ("--case", f"{name}-fp32-fwd")]
    rooms = ("token_merge", "token_select", "sparse_attention")
    done = invoke("bench", *rooms, "--seconds", "0.01", "--json", numbers, "--chart", drawing, *cases)
    assert done.exit_code == 0, done.output
    assert re.findall(r"^(\w+), tokenops: how many times faster than", done.output, re.MULTILINE) == list(rooms)
    assert [case["room"] for case in record.read(numbers)["cases"]] == list(rooms)
    assert drawing.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_machine")
def test_bench_reports_memory_and_the_input(tmp_path: Path) -> None:
    numbers = tmp_path / "run.json"
    done = invoke("bench", "token_merge", "--seconds", "0.01", "--json", numbers, "--case", "small-match-even", "--case", "small-video")
    assert done.exit_code == 0, done.output
    even, film = record.read(numbers)["cases"]
    assert "adds MB" in done.output
    timed = [contender for contender in even["contenders"] if contender["status"] == "ok"]
    assert all(contender["memory"] >= 0 for contender in timed)
    assert not any("memory" in contender for contender in film["contenders"])
    assert even["remark"] == ""
    assert film["remark"] in " ".join(done.output.split())


@pytest.mark.usefixtures("small_machine")
def test_bench_says_how_much_of_the_saving_the_clock_shows(tmp_path: Path) -> None:
    numbers = tmp_path / "run.json"
    done = invoke("bench", "delta_matmul", "--seconds", "0.01", "--json", numbers, "--case", "scant-attention-fp32", "--case", "film-fp32")
    assert done.exit_code == 0, done.output
    attention, *films = record.read(numbers)["cases"]
    # 9 of 40 tokens: 3 J N - 2 J^2 of N^2 pairs
    assert attention["flops"] / attention["dense"]["flops"] == (3 * 9 * 40 - 2 * 81) / 1600
    ours = next(contender for contender in attention["contenders"] if contender["ours"])
    share = attention["flops"] / attention["dense"]["flops"]
    assert set(ours["merit"]) == {"SDPA", "tokenops, dense"}
    for peer, merit in ours["merit"].items():
        assert merit == pytest.approx(ours["faster_than"][peer]["median"] * share)
        assert f"{merit:.2f} of that in time against {peer}" in " ".join(done.output.split())
    words = " ".join(done.output.split())
    assert "1.74x fewer operations" in words
    assert "9 of 40 tokens change; the state holds" in words
    for film in films:
        assert re.search(r"^(\d+, )+\d+ .*tokens change", film["remark"])
    assert "relative difference from a dense block" in films[1]["remark"]


@pytest.mark.usefixtures("small_machine")
def test_bench_with_a_wrong_result_of_ours_fails_and_prints_no_ratio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = sparse_attention.tokenops.sparse_attention
    monkeypatch.setattr(sparse_attention.tokenops, "sparse_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    numbers = tmp_path / "run.json"
    done = invoke("bench", "--seconds", "0.01", "--case", "tiny-shared", "--json", numbers)
    assert done.exit_code == 1
    assert "tokenops: wrong, so no time and no ratio" in done.output
    assert not re.search(r"\d\.\d\dx", done.output)
    ours = next(contender for contender in record.read(numbers)["cases"][0]["contenders"] if contender["ours"])
    assert ours["status"] == "wrong"
    assert not {"ms", "faster_than", "gflops"} & set(ours)


@pytest.mark.usefixtures("small_machine")
def test_repro_command_runs_that_case_alone(tmp_path: Path) -> None:
    numbers = tmp_path / "run.json"
    options = ["--seconds", "0.01", "--threads", "1", "--backend", "reference", "--dtype", "fp16"]
    assert invoke("bench", "--case", "tiny-short", *options, "--json", numbers).exit_code == 0
    [case] = record.read(numbers)["cases"]
    assert case["repro"] == "tokenops bench sparse_attention --case tiny-short-fp16-fwd --dtype fp16 --threads 1 --backend reference"
    again = invoke(*case["repro"].split()[1:], "--dry-run")
    assert re.findall(r"^tiny\S*", again.output, re.MULTILINE) == ["tiny-short-fp16-fwd"]


def test_dry_run_lists_cases_and_objections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "measure", lambda *_: pytest.fail("timed something"))
    done = invoke("bench", "--dry-run", "--case", "B1-N1569-K784")
    assert done.exit_code == 0, done.output
    assert "B1-N1569-K784-fp32-fwd+bwd" in done.output
    assert re.search(r"FlexAttention +no +.*no backward pass on the CPU", done.output)
    assert re.search(r"backend reference +yes", done.output)
    assert re.search(r"backend triton +(no|yes)", done.output)
    assert "B8-" not in done.output


def test_select_cases() -> None:
    def ids(preset: str, dtypes: tuple[str, ...] = (), patterns: tuple[str, ...] = ()) -> list[str]:
        return [harness.case_id(case) for case in cli.select_cases(sparse_attention.CASES, preset, dtypes, patterns)]

    assert set(ids("quick")) < set(ids("full"))
    # a full id is that case alone, though longer ids contain it
    assert ids("full", patterns=("B8-N1569-K392-fp32-fwd",)) == ["B8-N1569-K392-fp32-fwd"]
    assert len(ids("full", patterns=("B8-N1569-K392",))) > 4
    assert all(name.endswith("fwd+bwd") for name in ids("full", patterns=("*bwd",)))
    # both dtypes of a shape become one
    fp16 = ids("quick", ("fp16",))
    assert len(set(fp16)) == len(fp16) < len(ids("quick"))
    assert all("-fp16-" in name for name in fp16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_room"], "ROOM must be one of sparse_attention, token_select, token_merge, delta_matmul, models, got 'no_such_room'"),
        (["--backend", "abacus"], "--backend must be one of triton, cpu, .* got 'abacus'"),
        (["--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
        (["--case", "no-such-case"], "no case of the quick preset matches 'no-such-case'"),
        (["--video", "absent.mp4", "--case", "video"], "cannot read 'absent.mp4' as a video"),
        (["--dtype", "fp12"], "'fp12' is not one of 'fp32', 'bf16', 'fp16'"),
        # known before the run, not when its numbers would be lost
        (["--json", "no-such-place/x.json"], "'--json': there is no directory 'no-such-place'"),
        (["--chart", "no-such-place/x.png"], "'--chart': there is no directory 'no-such-place'"),
        (["--chart", "chart.doc"], "'--chart': 'chart.doc' must end in .png, .pdf, .svg"),
    ],
)
def test_clear_errors(arguments: list[str], message: str) -> None:
    done = invoke("bench", "--dry-run", *arguments)
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit)
    assert re.search(message, " ".join(done.output.split()))


# in a process of its own: what other tests left to the allocator would count
ADDED_MEMORY = """
import torch
from tokenops.benchmarks import allocator

mega = 1 << 20

def block(megabytes):
    return torch.ones(megabytes * mega, dtype=torch.uint8)

def call():
    # 40 and 20 at once, then 20 and 30
    first, second = block(40), block(20)
    del first
    return torch.cat([second, block(10)])

# code that runs for the first time has pages too
call()
for _ in range(10):
    added = allocator.added_memory(call)
    assert 59 * mega < added < 62 * mega, added
assert allocator.added_memory(lambda: None) < mega
"""


@pytest.mark.skipif(allocator.platform.libc_ver()[0] != "glibc", reason="needs glibc and /proc")
def test_added_memory_is_the_peak_of_a_call() -> None:
    # every block gets pages of its own: one in a hole of the heap keeps its pages when it is freed, and the peak is then the heap's
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run([sys.executable, "-c", ADDED_MEMORY], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_picture_of_a_frame(tmp_path: Path) -> None:
    drawing = tmp_path / "frame.png"
    done = invoke("picture", drawing, "--frame", "7")
    assert done.exit_code == 0, done.output
    assert str(drawing) in done.output
    assert drawing.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("frame", [0, 50, 131])
def test_picture_of_what_changed(frame: int, tmp_path: Path) -> None:
    drawing = tmp_path / "frames.png"
    done = invoke("picture", drawing, "--room", "delta_matmul", "--frame", frame)
    assert done.exit_code == 0, done.output
    assert drawing.read_bytes().startswith(b"\x89PNG")


def test_a_picture_shows_the_tokens_that_changed() -> None:
    pictures, first = video.read_frames(video.EXCERPT), 50
    sent = picture.sent_tokens(pictures, first)
    panels = picture.sent_panels(pictures, first, sent)
    assert [panel.title for panel in panels] == [f"frame {first + at}: {int(mask.sum())} of 784 tokens" for at, mask in enumerate(sent)]
    last = pictures[first - 1]
    for frame, mask, panel in zip(pictures[first:], sent, panels, strict=False):
        for y, x in ((3, 4), (14, 14), (20, 9), (27, 0)):
            at = (slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8))
            change = (frame[at].float() - last[at].float()).div(127.5).square().mean().sqrt()
            assert bool(mask[y, x]) == bool(change > delta_matmul.NOTICED)
            torch.testing.assert_close(panel.image[at], frame[at] / 255 * (1.0 if mask[y, x] else picture.DIMMED))
        # a token that was not sent is compared with what was sent before
        last = torch.where(mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[..., None], frame, last)
    assert 0 < sum(int(mask.sum()) for mask in sent) < 4 * 784


def test_clusters_of_a_picture() -> None:
    frame = video.read_frames(video.EXCERPT)[66]
    small = frame.float().view(picture.GRID, picture.PATCH, picture.GRID, picture.PATCH, 3).mean((1, 3)) / 255
    before = torch.arange(picture.GRID**2)
    for at, clusters in enumerate(picture.merge_frame(frame)):
        member = clusters.member.flatten()
        assert clusters.count == len(member.unique()) == picture.GRID**2 >> (at + 1)
        # every patch has the mean colour of its cluster
        for cluster in member.unique()[:20]:
            mine = clusters.member == cluster
            torch.testing.assert_close(clusters.colour[mine], small[mine].mean(0).expand(int(mine.sum()), 3), rtol=0, atol=2e-6)
        # clusters only grow: who was together stays together
        assert len(torch.stack([before, member]).unique(dim=1).T) == len(before.unique())
        before = member


def test_borders_stand_between_clusters() -> None:
    member = torch.tensor([[0, 0], [1, 0]])
    assert picture.borders(member) == [((1, 1), (1, 2)), ((0, 1), (1, 1))]
    assert picture.borders(torch.zeros(3, 3)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frame.png", "--frame", "9999"], "--frame must be less than 132, the number of frames, got 9999"),
        (["frame.png", "--backend", "abacus"], "--backend must be one of .* for token_merge, got 'abacus'"),
        (["frame.png", "--video", "absent.mp4"], "cannot read 'absent.mp4' as a video"),
        (["frame.doc"], "'frame.doc' must end in .png, .pdf, .svg"),
    ],
)
def test_clear_errors_of_a_picture(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("picture", *arguments)
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit)
    assert re.search(message, " ".join(done.output.split()))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    done = invoke("bench", "--device", "cuda")
    assert done.exit_code == 2
    assert "finds no CUDA device here" in done.output


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    done = invoke("bench", "--dry-run", "--case", "video")
    assert done.exit_code == 1
    assert "pip install 'tokenops[bench]'" in done.output


def test_info() -> None:
    done = invoke("info")
    assert done.exit_code == 0, done.output
    for text in (torch.__version__, "_C_cpu", "_C_cuda", "tokenops runs", "sparse_attention on cpu"):
        assert text in done.output
    assert re.search(r"reference +on$", done.output, re.MULTILINE)


@pytest.mark.parametrize("command", [(), ("bench",), ("demo",), ("info",), ("compare",), ("picture",)])
def test_help(command: tuple[str, ...]) -> None:
    done = invoke(*command, "-h")
    assert done.exit_code == 0
    assert done.output.startswith("Usage: ")


def run_of(ours: float, peer: float, **environment: object) -> record.Record:
    contenders = [
        {"name": "tokenops", "ours": True, "ms": {"median": ours}},
        {"name": "SDPA", "ours": False, "ms": {"median": peer}},
        {"name": "wrong one", "ours": False},
    ]
    case = {"room": "sparse_attention", "id": "tiny", "contenders": contenders}
    return {"format": record.FORMAT, "environment": {"cpu": "A", "threads": 2, **environment}, "cases": [case]}


def test_compare(tmp_path: Path) -> None:
    record.write(run_of(4.0, 10.0), tmp_path / "before.json")
    record.write(run_of(2.0, 8.0, threads=4), tmp_path / "after.json")
    done = invoke("compare", tmp_path / "before.json", tmp_path / "after.json")
    assert done.exit_code == 0, done.output
    assert "not alike: threads: 2 before, 4 after" in done.output
    assert "cpu" not in done.output
    assert re.search(r"tiny +tokenops +4 +2 +2\.00x +1\.25x", done.output)


def test_compare_drift_is_the_geometric_mean_of_the_peers() -> None:
    [difference] = compare.differences(run_of(4.0, 10.0), run_of(2.0, 8.0))
    assert difference.faster == 2
    assert difference.drift == pytest.approx(1.25)


def test_compare_names_cases_of_one_file_only(tmp_path: Path) -> None:
    before, after = run_of(4.0, 10.0), run_of(2.0, 8.0)
    after["cases"].append({"room": "sparse_attention", "id": "new", "contenders": []})
    assert compare.unmatched(before, after) == ["sparse_attention new"]
    after["cases"].pop(0)
    record.write(before, tmp_path / "before.json")
    record.write(after, tmp_path / "after.json")
    done = invoke("compare", tmp_path / "before.json", tmp_path / "after.json")
    assert done.exit_code == 1
    assert "no case in common" in done.output


def test_compare_refuses_other_files(tmp_path: Path) -> None:
    record.write(run_of(4.0, 10.0), tmp_path / "run.json")
    for content, message in (("{}", "got format None"), ("[1]", "got format 'list'"), ("no json", "cannot read")):
        (tmp_path / "other.json").write_text(content)
        done = invoke("compare", tmp_path / "run.json", tmp_path / "other.json")
        assert done.exit_code == 1
        assert message in done.output
    done = invoke("compare", tmp_path / "run.json", tmp_path / "absent.json")
    assert done.exit_code == 1
    assert "cannot read" in done.output


def test_tables_hold_cases_that_share_peers() -> None:
    def case(room: str, name: str, *peers: str) -> record.Record:
        contenders = [{"name": peer, "ours": False, "status": "ok"} for peer in peers]
        absent = {"name": "absent", "ours": False, "status": "not run"}
        return {"room": room, "id": name, "contenders": [{"name": "tokenops", "ours": True, "status": "ok"}, *contenders, absent]}

    cases = [case("a", "1", "x"), case("a", "2", "y"), case("b", "3", "x"), case("a", "4", "z"), case("a", "5", "y", "x")]
    # the last one joins the first two; another room stays apart, and who did not run joins nobody
    assert [[case["id"] for case in group] for group in record.comparable(cases)] == [["1", "2", "5"], ["3"], ["4"]]


def test_chart_needs_a_ratio(tmp_path: Path) -> None:
    with pytest.raises(chart.ChartError, match="nothing to draw"):
        chart.draw({"cases": [], "environment": {}}, tmp_path / "empty.png")


def test_a_roof_is_the_best_of_all_tries() -> None:
    quiet = roof.Roof(2.0, {"fp32": 3.0}, {"fp32": 8.0})
    disturbed = roof.Roof(1.0, {"fp32": 4.0, "bf16": 5.0}, {"fp32": 1.0})
    assert quiet.best(disturbed) == roof.Roof(2.0, {"fp32": 4.0, "bf16": 5.0}, {"fp32": 8.0})
    assert quiet.percent(Cost(6, 1), "fp32", 1.0) == {"copy": 50.0, "gemm": 200.0, "peak": 75.0}
    # no peak is known on a GPU
    assert set(roof.Roof(1.0, {"fp32": 1.0}, {}).percent(Cost(6, 1), "fp32", 1.0)) == {"copy", "gemm"}


def test_table_says_when_not_to_trust_it() -> None:
    def contender(name: str, ours: bool, low: float, high: float) -> record.Record:
        return {
            "name": name,
            "ours": ours,
            "status": "ok",
            "reasons": [],
            "note": "",
            "ms": {"median": 1.0, "low": low, "high": high},
            "gflops": 1.0,
            "gbs": 1.0,
            "percent_of": {"gemm": 10.0, "copy": 1.0},
        }

    steady, shaky = contender("tokenops", True, 0.99, 1.01), contender("SDPA", False, 0.5, 1.5)
    absent = {"name": "Flex", "ours": False, "status": "not run", "reasons": ["no compiler"], "note": ""}
    case = {
        "name": "tiny",
        "dtype": "fp32",
        "direction": "fwd",
        "page_faults": 0,
        "remark": "",
        "repro": "tokenops bench",
        "contenders": [steady, absent],
    }
    assert [str(remark) for remark in table.case_remarks(case)] == ["  again: tokenops bench"]
    disturbed = {**case, "page_faults": 1000, "contenders": [steady, shaky, absent]}
    remarks = "\n".join(str(remark) for remark in table.case_remarks(disturbed))
    assert "unsteady" in remarks
    assert "1000 page faults" in remarks
    assert table.note_lines([case, disturbed]) == ["Flex: no compiler (not run in 2 cases)"]
