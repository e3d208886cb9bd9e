"""examples/train_motion.py: its data, that an interrupted run and a divided one end at the same weights, and what it counts and prints."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenops.benchmarks.allocator import MARKER

pytest.importorskip("click", reason="the benchmark's extra is not installed")
pytest.importorskip("matplotlib", reason="the benchmark's extra is not installed")

from click.testing import CliRunner

SCRIPT = Path(__file__).parent.parent / "examples" / "train_motion.py"
# as if it were run, its task is a module beside it
sys.path.insert(0, str(SCRIPT.parent))
task = importlib.import_module("motion")
train_motion = importlib.import_module("train_motion")
every_model = pytest.mark.parametrize("name", list(train_motion.RECIPES))


def scenes_of(count: int, seed: int = 0) -> Any:
    return task.draw(count, torch.Generator().manual_seed(seed))


def frames_of(clips: torch.Tensor) -> torch.Tensor:  # [B, 3, T, S, S] -> [B, F, S, S]
    return clips.transpose(1, 2).flatten(1, 2)


def options_of(**given: int) -> Any:
    return train_motion.Options(**{"steps": 5, "batch": 4, **given})


def test_clips_follow_from_the_seed_alone() -> None:
    assert torch.equal(task.render(scenes_of(6)), task.render(scenes_of(6)))
    assert not torch.equal(task.render(scenes_of(6)), task.render(scenes_of(6, seed=1)))


def test_a_part_of_a_batch_is_rendered_as_in_the_whole() -> None:
    scenes = scenes_of(6)
    assert torch.equal(task.render(scenes)[2:5], task.render(task.Scenes._make(part[2:5] for part in scenes)))


def test_clips_are_frames_of_visible_motion() -> None:
    scenes = scenes_of(64)
    clips = task.render(scenes)
    assert clips.shape == (64, 3, task.TRIPLES, task.SIDE, task.SIDE)
    assert clips.abs().max() <= 1
    frames = frames_of(clips)
    assert set(scenes.label.tolist()) == set(range(len(task.MOTIONS)))
    changed = (frames.diff(dim=1).abs() > 0.1).flatten(2).sum(2)  # [B, F - 1] pixels
    assert changed.min() >= 5, "a frame is as the one before it"
    # the ground and the other shapes lie still, which is what eventful gates live on
    assert (changed.float().mean() / task.SIDE**2) < 0.15


def test_only_the_shape_that_moves_moves_and_it_stays_inside() -> None:
    scenes = scenes_of(64)
    moving = frames_of(task.render(scenes))
    reach = 1.5 * scenes.radius[:, 0] + scenes.reach + 1
    pixel = torch.arange(task.SIDE) + 0.5
    far_x, far_y = ((pixel - scenes.centre[:, 0, axis, None]).abs() > reach[:, None] for axis in (0, 1))
    far = far_x[:, None, :] | far_y[:, :, None]
    assert ((moving - moving[:, :1]).abs().amax(1) * far).max() == 0
    # hidden beyond the edge, it would change fewer pixels than in the middle: its outermost places are inside
    along = torch.stack([(scenes.label // 2 == 0) | (scenes.label // 2 == 2), (scenes.label // 2 == 1) | (scenes.label // 2 == 2)], 1)
    room = scenes.reach[:, None] * along + 1.5 * scenes.radius[:, :1]
    assert (scenes.centre[:, 0] - room).min() >= -1e-4
    assert (scenes.centre[:, 0] + room).max() <= task.SIDE + 1e-4


def test_each_class_is_another_one_backwards() -> None:
    scenes = scenes_of(32)
    forwards, backwards = (frames_of(task.render(scenes._replace(label=label))) for label in (scenes.label, scenes.label ^ 1))
    torch.testing.assert_close(forwards.flip(1), backwards)
    assert not torch.allclose(forwards, backwards)


@every_model
def test_training_reaches_every_parameter(name: str, tmp_path: Path) -> None:
    options = options_of(steps=3)
    torch.manual_seed(options.seed)
    before = train_motion.build(name).state_dict()
    trained = train_motion.train(name, options, tmp_path / "checkpoint.pt")
    assert len(trained.losses) == 3
    assert all(0 < loss < 5 for loss in trained.losses)
    assert not trained.model.training
    stayed = [key for key, value in trained.model.state_dict().items() if torch.equal(value, before[key])]
    assert stayed == []


@every_model
def test_an_interrupted_run_ends_at_the_same_weights(name: str, tmp_path: Path) -> None:
    options = options_of()
    whole = train_motion.train(name, options, tmp_path / "whole.pt")

    def interrupt(step: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_motion.train(name, options, tmp_path / "parts.pt", save_every=2, on_step=interrupt)
    steps: list[int] = []
    parts = train_motion.train(name, options, tmp_path / "parts.pt", on_step=lambda step, loss: steps.append(step))
    # step 4 was interrupted before it was saved
    assert steps == [3, 4, 5]
    assert parts.losses == whole.losses
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[key]), key


def test_a_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    train_motion.train("vidtr", options_of(steps=1), tmp_path / "vidtr.pt")
    with pytest.raises(ValueError, match=r"must have been made with vidtr .*seed=1.*got .*'seed': 0"):
        train_motion.train("vidtr", options_of(steps=1, seed=1), tmp_path / "vidtr.pt")
    with pytest.raises(ValueError, match="must have been made with dense"):
        train_motion.train("dense", options_of(steps=1), tmp_path / "vidtr.pt")


def test_learning_rate_rises_and_falls() -> None:
    options = train_motion.Options(steps=1000, rate=1.0)
    rates = [train_motion.learning_rate(step, options) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[100] == 1.0
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] < 1e-5
    assert train_motion.learning_rate(0, train_motion.Options(steps=1, rate=1.0)) == 1.0


@pytest.mark.parametrize("name", ["dense", "sttm", "vidtr"])
def test_multiply_adds_are_those_of_the_operations(name: str) -> None:
    clips = task.render(scenes_of(2))
    for label, run in train_motion.RECIPES[name].runs(train_motion.build(name).eval()).items():
        # with gradients on, layers run as torch's own, which count
        with FlopCounterMode(display=False) as counter:
            _, cost = run(clips)
        assert cost() * 2 == pytest.approx(counter.get_total_flops(), rel=0.01), label


def test_reduced_models_need_few_enough_operations() -> None:
    """Before training, when no token halts."""
    clips = task.render(scenes_of(2))
    costs = {}
    with torch.no_grad():
        for name, recipe in train_motion.RECIPES.items():
            costs |= {label: run(clips)[1]() / 2 for label, run in recipe.runs(train_motion.build(name).eval()).items()}
    assert costs["dense"] == train_motion.dense_flops()
    over = [label for label, cost in costs.items() if cost > train_motion.SHARE * costs["dense"]]
    # the mildest setting of ToMe is there for the curve, and gates have to hold against the model without them
    assert over == ["dense", "ToMe, r 12", "eventful, all tokens"]
    gated = [label for label in costs if label.startswith("eventful") and label not in over]
    assert len(gated) == len(train_motion.CHOSEN)
    assert all(costs[label] <= train_motion.SHARE * costs["eventful, all tokens"] for label in gated)


def test_gates_that_let_all_through_change_nothing() -> None:
    torch.manual_seed(0)
    model, clips = train_motion.build("eventful").eval(), task.render(scenes_of(3))
    with torch.no_grad():
        dense = model(clips)
        torch.testing.assert_close(model(clips, k=37), dense, rtol=1e-4, atol=1e-5)
        gated = model(clips, k=6)
        assert not torch.allclose(gated, dense, rtol=1e-4, atol=1e-5)
        # as in training: some clips without gates, and the others with
        torch.testing.assert_close(model(clips, k=6, ungated=1), torch.cat([dense[:1], gated[1:]]), rtol=1e-4, atol=1e-5)


def test_comparison_counts_right_answers_and_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a model that is told the answers, and gives wrong ones for the first clip of each batch."""
    told: list[torch.Tensor] = []
    render = task.render

    def telling(scenes: Any) -> torch.Tensor:
        told.append(scenes.label)
        return render(scenes)

    def run(clips: torch.Tensor) -> tuple[torch.Tensor, Any]:
        wrong = torch.arange(len(clips)) == 0
        logits = torch.nn.functional.one_hot((told[-1] + wrong) % len(task.MOTIONS), len(task.MOTIONS))
        return logits, lambda: 10 * len(clips)

    monkeypatch.setattr(train_motion, "render", telling)
    monkeypatch.setitem(train_motion.RECIPES, "dense", train_motion.RECIPES["dense"]._replace(runs=lambda model: {"told": run}))
    told_one = {"dense": train_motion.Trained(torch.nn.Identity(), [], 90.0)}
    batches: list[int] = []
    [point] = train_motion.compare(told_one, clips=7, batch=4, on_batch=lambda: batches.append(len(told[-1])))
    assert batches == [4, 3]
    assert point[:3] == ("told", 5 / 7, 10)
    assert point.minutes == 1.5
    assert 0 < point.ms.low <= point.ms.median <= point.ms.high


def test_the_table_says_what_was_kept() -> None:
    time = train_motion.Spread(1.0, 1.0, 1.0)
    settings = {"good": (0.93, 50.0), "weak": (0.91, 50.0), "costly": (0.95, 70.0)}
    # good enough for the baseline, not for what it is without gates; cheap enough for the baseline alone
    settings |= {"gates, all tokens": (0.96, 80.0), "gates, 9": (0.945, 40.0), "gates, 6": (0.93, 30.0), "gates, 12": (0.95, 50.0)}
    points = [train_motion.Point("dense", 0.945, 100.0, time, 1.0)]
    points += [train_motion.Point(label, accuracy, macs, time, 1.0) for label, (accuracy, macs) in settings.items()]
    *_, verdict = train_motion.table_of(points).columns
    assert list(verdict.cells) == ["", "yes", "no", "no", "", "yes", "no", "no"]
    # without the baseline there is nothing to compare with
    assert set(list(train_motion.table_of(points[1:]).columns)[-1].cells) == {""}


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Under torchrun, with all that the command line does; then again in this process, which only measures."""
    arguments = ["--model", "halting", "--model", "vidtr", "--steps", "3", "--batch", "4", "--clips", "6", "--out", str(tmp_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # restarting for the sake of malloc would only take time here
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", MARKER: "1"}
    run = subprocess.run([*torchrun, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    for name in ("halting", "vidtr"):
        saved = torch.load(tmp_path / f"{name}.pt")
        torch.manual_seed(0)
        before = train_motion.build(name).state_dict()
        alone = train_motion.train(name, options_of(steps=3), tmp_path / f"{name}_alone.pt")
        assert saved["losses"] == pytest.approx(alone.losses, rel=1e-5)
        for key, value in alone.model.state_dict().items():
            # of what training changed: Adam divides each gradient by its size, and so makes a lot of the rounding of tiny ones
            assert (saved["model"][key] - value).norm() <= 0.01 * (value - before[key]).norm(), key

    again = CliRunner().invoke(train_motion.main, arguments)
    assert again.exit_code == 0, again.output
    for text in ("HaltingVT", "C-VidTr", "6 clips in batches", "3 steps of 4 clips, seed 0"):
        assert text in run.stdout
        assert text in again.output
    points = json.loads((tmp_path / "motion.json").read_text())["points"]
    assert [point["label"] for point in points] == ["HaltingVT", "C-VidTr"]
    assert (tmp_path / "motion.png").read_bytes().startswith(b"\x89PNG")

    refused = CliRunner().invoke(train_motion.main, [*arguments, "--seed", "1"])
    assert refused.exit_code == 1
    assert "move it away" in refused.output
