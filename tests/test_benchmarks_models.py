"""The benchmark's whole models and the demo: both sides are right, what they are said to cost is what they cost, and pictures show it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("click", reason="the benchmark's extra is not installed")
pytest.importorskip("av", reason="the benchmark's extra is not installed")

from click.testing import CliRunner

from tokenops.benchmarks import __main__ as cli
from tokenops.benchmarks import allocator, chart, demo, harness, models, models_plain, models_subject, picture, video
from tokenops.benchmarks.models_merging import MergingConfig
from tokenops.models import BackboneConfig, HaltingConfig, VidTrConfig, ViTDetConfig
from tokenops.models.vidtr import TopKStd
from tokenops.models.vidtr_block import SeparableAttention

# as small as still shows everything: tokens that halt, windows that are filled up, frames that are dropped
HALTING = HaltingConfig((1.0, 0.5), 10.0, frames=3, dim=48, num_heads=3, depth=5, classes=0, motion=False, image_size=64)
BACKBONE = BackboneConfig(
    {"dim": 48, "heads": 3, "relative_embedding_size": (7, 7), "window_size": (3, 3)},
    depth=3,
    position_encoding_size=(4, 4),
    block_class="EventfulBlock",
    window_indices=(0, 2),
    windowed_class="EventfulTokenwiseBlock",
)
EVENTFUL = ViTDetConfig((3, 112, 112), BACKBONE, output_channels=8)
VIDTR: dict[str, Any] = {"frames": 4, "cells": 4 * 196, "dim": 48, "depth": 4, "num_heads": 3, "mlp_dim": 96, "num_classes": 10}
MERGING = MergingConfig(48, 3, 3, frames=4)
STTM = MERGING._replace(layer=1, windows=2, meta_tokens=20)
CASES = {
    "haltingvt": models.Case("mini-halting", "haltingvt", HALTING, HALTING._replace(keep_rate=(), halting=False), start=0.8, drift=0.4),
    "eventful": models.Case(
        "mini-eventful",
        "eventful",
        EVENTFUL,
        EVENTFUL._replace(backbone_config=BACKBONE._replace(block_class="Block", windowed_class="Block")),
        k=9,
    ),
    "vidtr": models.Case("mini-vidtr", "vidtr", VidTrConfig(**VIDTR, pool_layers=(0, 2), pools=(TopKStd(1),) * 2), VidTrConfig(**VIDTR)),
    "sttm": models.Case("mini-sttm", "sttm", STTM._replace(mode="hard"), MERGING),
    "tome": models.Case("mini-tome", "tome", MERGING._replace(r=60), MERGING),
}
# and what has no picture of its own
OTHERS = {"sttm, soft": models.Case("mini-sttm-soft", "sttm", STTM, MERGING)}
CONTENDERS = {
    "haltingvt": ["tokenops", models.SDPA, models.OURS, models.PUBLISHED],
    "eventful": ["tokenops", models.SDPA, models.OURS, models.PUBLISHED],
    "vidtr": ["tokenops", models.SDPA, models.OURS, models.PUBLISHED],
    "sttm": ["tokenops", models.SDPA, models.OURS, models_subject.PLAIN],
    "tome": ["tokenops", models.SDPA, models.OURS, models.PUBLISHED],
}
# no model of its own, so no dense twin and no demo
LAYER = models.Case("mini-separable", "separable", VidTrConfig(**{**VIDTR, "depth": 2}, pool_layers=(1,), pools=(TopKStd(1),)), None)
every_model = pytest.mark.parametrize("name", [*CASES, *OTHERS])


@pytest.fixture(scope="module")
def request_for_film() -> harness.Request:
    film = video.read_frames(video.EXCERPT)
    return harness.Request(film=lambda: film)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "CASES", tuple(case._replace(small=True, quick=True) for case in CASES.values()))
    monkeypatch.setenv(allocator.MARKER, "1")
    monkeypatch.setattr(allocator, "touch_pool", lambda: 1 << 20)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.cli, [str(argument) for argument in arguments], env={allocator.MARKER: "1"})


def measured(trial: harness.Trial) -> dict[str, harness.Outcome]:
    return {outcome.name: outcome for outcome in harness.measure(trial, "fp32", harness.CpuClock(), 0.001, 1).outcomes}


@every_model
def test_every_contender_is_what_it_says(name: str, request_for_film: harness.Request) -> None:
    trial, report = models.prepared((CASES | OTHERS)[name], request_for_film)
    outcomes = measured(trial)
    assert list(outcomes) == CONTENDERS[(CASES | OTHERS)[name].model]
    assert {outcome.status for outcome in outcomes.values()} == {"ok"}, outcomes
    # something is left out, and it shows
    assert 0 < trial.cost.flops < trial.dense.flops
    assert len(report.differences) == models.CHECKED
    assert all(difference > 1e-3 for difference in report.differences)
    assert "relative difference from the dense twin" in trial.remark()


def test_the_published_update_of_attention_by_us_and_in_plain_torch(request_for_film: harness.Request) -> None:
    """Three global blocks in mode "paper", whose state is the attention matrix as in the peer."""
    backbone = BACKBONE._replace(window_indices=())
    config = EVENTFUL._replace(backbone_config=backbone)
    dense = EVENTFUL._replace(backbone_config=backbone._replace(block_class="Block"))
    trial, report = models.prepared(CASES["eventful"]._replace(config=config, dense=dense, mode="paper"), request_for_film)
    outcomes = measured(trial)
    assert list(outcomes) == CONTENDERS["eventful"]
    assert {outcome.status for outcome in outcomes.values()} == {"ok"}, outcomes
    assert all(difference > 1e-3 for difference in report.differences)


@every_model
def test_a_wrong_result_is_wrong(name: str, request_for_film: harness.Request) -> None:
    trial, _ = models.prepared((CASES | OTHERS)[name], request_for_film)
    for contender in trial.contenders:
        right = contender.run.step

        def spoilt(state: Any, at: int, right: Any = right) -> Any:
            [out], state = right(state, at)
            return (out * 1.001 if at == 1 else out,), state

        contender.run.step = spoilt
    assert {outcome.status for outcome in measured(trial).values()} == {"wrong"}


def test_attention_alone_is_checked_too(request_for_film: harness.Request) -> None:
    trial, report = models.prepared(LAYER, request_for_film)
    outcomes = measured(trial)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {"tokenops": "ok", models.PUBLISHED: "ok"}
    assert report.differences == pytest.approx([0.0] * models.CHECKED, abs=1e-4)
    assert trial.remark().startswith("attention 3 of 4 frames; relative difference from published: ")
    with torch.device("meta"):
        dense = SeparableAttention(48, 3).multiply_adds(4, 196)
    assert 0.5 * dense < trial.cost.flops / 2 < dense == report.subject.dense.total
    for contender in trial.contenders:
        right = contender.run.step
        contender.run.step = lambda state, at, right=right: ((right(state, at)[0][0] * 1.001,), None)
    assert {outcome.status for outcome in measured(trial).values()} == {"wrong"}


def test_what_is_left_of_halting_is_what_the_model_says(request_for_film: harness.Request) -> None:
    subject = models._halting(CASES["haltingvt"], request_for_film)
    glimpser, *joint = subject.layers
    # half of 4 x 4 patches; then fewer from layer to layer
    assert (glimpser.left, glimpser.of) == (8, 16)
    assert [layer.of for layer in joint] == [1 + 3 * 8] * 3
    left = [layer.left for layer in joint]
    assert left[0] == 25
    assert left == sorted(left, reverse=True)
    assert left[-1] < 25


def test_pictures_show_what_was_computed(request_for_film: harness.Request) -> None:
    subjects = {name: models.SUBJECTS[case.model](case, request_for_film) for name, case in (CASES | OTHERS).items()}
    panels = {name: subject.panels() for name, subject in subjects.items()}
    assert {name: set(some) for name, some in panels.items() if name in CASES} == {name: set(some) for name, some in models.TITLES.items()}
    assert all(int(panel.member.sum()) == 9 for panel in panels["eventful"]["updated"])
    for kept, layers in zip(panels["haltingvt"]["kept"], panels["haltingvt"]["layers"], strict=True):
        assert int(kept.member.sum()) == 8
        assert bool((layers.member <= kept.member).all())
    for panel in panels["vidtr"]["kept"]:
        # of so many heads, and as bright as that
        assert torch.equal(panel.member * 3, (panel.member * 3).round())
        assert panel.image.shape == (video.SIDE, video.SIDE, 3)
    for name in ("sttm", "sttm, soft", "tome"):
        # 2 frames of 14 x 14 patches in so many clusters
        shown = [panel.member for panel in panels[name]["clusters"]]
        assert {member.shape for member in shown} == {(14, 14)}
        assert 2 * 14 * 14 - 3 * 60 >= len(torch.cat(shown).unique()) > 1
        assert name == "tome" or max(int(member.max()) for member in shown) < 20


def test_what_is_left_after_merging(request_for_film: harness.Request) -> None:
    left = {name: models.SUBJECTS[name](CASES[name], request_for_film).layers for name in ("sttm", "tome")}
    assert [(layer.name, layer.left) for layer in left["tome"]] == [("block 0", 392), ("block 1", 332), ("block 2", 272), ("the end", 212)]
    assert [layer.left for layer in left["sttm"] if layer.name != "STTM"] == [392, 40, 40]
    [stage] = [layer for layer in left["sttm"] if layer.name == "STTM"]
    assert 0 < stage.left <= stage.of == 40


def test_costs_of_merging_are_those_of_the_papers() -> None:
    """Multiply-adds in G: of ViT-L with r 65 and of ViT-B with the calibrated preset, each beside its dense twin."""
    merging = [case for case in models.CASES if isinstance(case.config, MergingConfig)]
    published = {case.name: (case.config.flops().published, case.dense.flops().published) for case in merging}
    assert [round(part * 1e-9, 1) for part in published["ViT-L-ToMe-r65"]] == [280.4, 596.8]
    own, dense = published["ViT-B-STTM-soft"]
    assert (round(dense * 1e-9, 1), round(100 * (1 - own / dense), 1)) == (180.3, 39.1)


def test_a_tinted_panel_has_one_hue_for_a_group() -> None:
    panel = picture.tinted(torch.full((4, 4, 3), 0.5), torch.tensor([[0, 1], [1, 2]]), "")
    assert torch.equal(panel.image[0, 2], panel.image[2, 0])
    assert len(panel.image.flatten(0, 1).unique(dim=0)) == 3
    red = torch.tensor([0.5 + 0.5 * picture.TINT, *[0.5 - 0.5 * picture.TINT] * 2])
    torch.testing.assert_close(panel.image[0, 0], red)


def test_a_panel_is_as_bright_as_its_share() -> None:
    panel = picture.shaded(torch.ones(4, 4, 3), torch.tensor([[0.0, 1.0], [0.5, 1.0]]), "")
    shade = picture.DIMMED
    want = torch.tensor([[shade, 1.0], [(1 + shade) / 2, 1.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(panel.image, want[..., None].expand(-1, -1, 3))


def test_settings_leave_out_less_and_more() -> None:
    for case in models.CASES:
        if case.small:
            words = [models.setting(each) for each in (case, *models.other_settings(case))]
            assert len(set(words)) == len(words) >= 3, words
            # nothing else changes
            assert {each.name for each in models.other_settings(case)} == {case.name}
    tome = next(models.other_settings(case) for case in models.CASES if case.name == "ToMe-small-r75")
    assert [each.config.flops().total for each in tome] == sorted((each.config.flops().total for each in tome), reverse=True)


def test_real_cases_cover_the_models_in_both_sizes() -> None:
    ids = [harness.case_id(case) for case in models.CASES]
    assert len(set(ids)) == len(ids)
    for small in (True, False):
        assert {case.model for case in models.CASES if case.small is small} - {LAYER.model} == set(CASES)


def test_half_precision_is_refused(request_for_film: harness.Request) -> None:
    trial = models.prepare(CASES["vidtr"]._replace(dtype="bf16"), request_for_film)
    [outcome] = harness.measure(trial, "bf16", harness.CpuClock(), 0.001, 1).outcomes
    assert outcome.status == "not run"
    assert "decided in float32" in outcome.reasons[0]


@pytest.mark.usefixtures("small_models")
def test_bench_of_models(tmp_path: Path) -> None:
    done = invoke("bench", "models", "--seconds", "0.01", "--case", "mini-eventful")
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert re.search(r"\d\.\d\dx fewer operations; \d\.\d\d of that in time against dense, SDPA", words)
    assert "block 0 9 of 49 tokens at each gate" in words
    done = invoke("bench", "models", "--backend", "cpu")
    assert done.exit_code == 2
    assert "--backend does not go with models" in " ".join(done.output.split())


@pytest.mark.usefixtures("small_models")
def test_demo_prints_tables_and_writes_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others, drawn = models.other_settings, []
    monkeypatch.setattr(models, "other_settings", lambda case: others(case)[:1])
    monkeypatch.setattr(demo, "draw_curves", lambda curves, *rest: (drawn.append(curves), chart.draw_curves(curves, *rest)))
    done = invoke("demo", "--seconds", "0.01", "--pictures", tmp_path)
    assert done.exit_code == 0, done.output
    for case in CASES.values():
        assert re.search(rf"^{case.name} ", done.output, re.MULTILINE)
    pictures = {f"{case.name}-{name}.png" for case in CASES.values() for name in models.TITLES[case.model]}
    assert {path.name for path in tmp_path.iterdir()} == {*pictures, demo.CURVES}
    assert list(drawn[0]) == [case.name for case in CASES.values()]
    for case, points in zip(CASES.values(), drawn[0].values(), strict=True):
        assert [point.setting for point in points] == [models.setting(case), models.setting(others(case)[0])]
        for point in points:
            assert 0.0 < point.operations < 1.0, point
            assert point.time > 0.0, point
            assert point.difference > 0.0, point
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    # ours, and how it stands to both dense twins
    rows = re.findall(
        r"^ ?dense, (?:SDPA|tokenops) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)x +([\d.]+)x +([\d.]+)", done.output, re.MULTILINE
    )
    assert len(rows) == 2 * len(CASES)
    for row in rows:
        fewer, faster, share = map(float, row[3:])
        assert share == pytest.approx(faster / fewer, abs=0.02)


@pytest.mark.usefixtures("small_models")
def test_demo_of_one_model_and_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke("demo", "--model", "vidtr", "--seconds", "0.01", "--pictures", tmp_path)
    assert done.exit_code == 0, done.output
    assert "mini-vidtr" in done.output
    assert "mini-halting" not in done.output
    for arguments, message in (
        (["--video", "absent.mp4", "--pictures", tmp_path], "cannot read 'absent.mp4' as a video"),
        (["--pictures", tmp_path / "absent"], "does not exist"),
        (["--model", "abacus"], "'abacus' is not one of"),
    ):
        done = invoke("demo", *arguments)
        assert done.exit_code != 0
        assert message in " ".join(done.output.split())
    wrong = models_plain.vidtr
    monkeypatch.setattr(models_plain, "vidtr", lambda *a, **k: wrong(*a, **k) * (1.0 if a[1].dtype == torch.float64 else 1.01))
    done = invoke("demo", "--model", "vidtr", "--seconds", "0.01", "--pictures", tmp_path)
    assert done.exit_code == 1
    assert "dense, SDPA: wrong" in done.output
