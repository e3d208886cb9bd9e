"""What ``tokenops demo`` shows: models that leave tokens out of a video, beside their dense twins, in numbers and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import harness, models, picture, table
from .chart import ChartError, Point, draw_curves
from .harness import Outcome, Request

STEPS = 4  # of each case: making it ready, timing, pictures, other settings
OTHERS = 4  # times shorter than for the case itself are other settings timed
CURVES = "curves.png"


def run(out: Console, cases: Sequence[models.Case], request: Request, seconds: float, folder: Path, source: str) -> bool:
    """Whether all results were right. Models of the demo's size are run with other settings too, for curves."""
    clock, threads, right = harness.clock_for(request.device), torch.get_num_threads(), True
    out.print(f"video     {source}; random weights, so the pictures show how tokens are left out, not that these are the right ones")
    out.print(f"clock     {clock.conditions}; {threads} threads, float32; each result is checked against its definition in float64")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        bar = progress.add_task("", total=STEPS * len(cases))
        curves: dict[str, list[Point]] = {}
        for case in cases:
            progress.update(bar, description=f"{case.name}: weights and clips")
            trial, report = models.prepared(case, request)
            progress.update(bar, description=f"{case.name}: timing", advance=1)
            outcomes = harness.measure(trial, case.dtype, clock, seconds, threads).outcomes
            progress.update(bar, description=f"{case.name}: pictures", advance=1)
            out.print()
            for part in (times(case, report, outcomes), layers(report)):
                out.print(part)
            for line in remarks(report, outcomes):
                out.print(line, soft_wrap=True)
            for line in pictures(case, report, folder, source):
                out.print(line, soft_wrap=True)
            progress.advance(bar)
            right = right and all(outcome.status == "ok" for outcome in outcomes)
            if not (case.small and right):
                progress.advance(bar)
                continue
            curves[case.name] = [_point(case, report, outcomes)]
            others = models.other_settings(case)
            for other in others:
                progress.update(bar, description=f"{case.name}: {models.setting(other)}", advance=1 / len(others))
                trial, report = models.prepared(other, request)
                # the dense twin is the same, and timed again: the machine may have become slower
                two = trial._replace(
                    contenders=[contender for contender in trial.contenders if contender.name in (models.MODEL, models.SDPA)]
                )
                outcomes = harness.measure(two, other.dtype, clock, seconds / OTHERS, threads).outcomes
                if all(outcome.status == "ok" for outcome in outcomes):
                    curves[case.name].append(_point(other, report, outcomes))
                else:
                    right = False
    if curves:
        out.print()
        title = f"{source}: the same models leaving out more or less, beside {models.SDPA}; {threads} threads, random weights"
        out.print(_drawn(partial(draw_curves, curves, folder / CURVES, title), folder / CURVES), soft_wrap=True)
    return right


def _point(case: models.Case, report: models.Report, outcomes: Sequence[Outcome]) -> Point:
    [ours] = [outcome.faster_than for outcome in outcomes if outcome.ours]
    assert ours is not None
    operations = report.subject.cost.total / report.subject.dense.total
    return Point(models.setting(case), operations, 1.0 / ours[models.SDPA].median, sum(report.differences) / len(report.differences))


def _drawn(draw: Callable[[], None], path: Path) -> Text:
    try:
        draw()
    except ChartError as error:
        return Text(f"  no picture: {error}", style="yellow")
    return Text(f"  picture: {path}")


def times(case: models.Case, report: models.Report, outcomes: Sequence[Outcome]) -> Table:
    """A line for each contender: its time for a frame, its operations, and how much faster ours is."""
    subject = report.subject
    rows = Table(title=case.name, title_justify="left", title_style="bold", header_style="dim", box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("", width=18, no_wrap=True)
    for heading in ("ms a frame", "G multiply-adds", "as published", "fewer operations", "faster", "saving in time"):
        rows.add_column(heading, justify="right", no_wrap=True)
    [ours] = [outcome for outcome in outcomes if outcome.ours]
    for outcome in outcomes:
        if outcome.seconds is None:
            continue
        cells: list[Text | str] = [
            Text(outcome.name, style="bold" if outcome.ours else ""),
            f"{1e3 * outcome.seconds.median / subject.shown:.2f}",
        ]
        counted = {"tokenops": subject.cost, models.SDPA: subject.dense, models.OURS: subject.dense}.get(outcome.name)
        # what is published computes what it throws away, and is not counted anywhere
        cells += ["", ""] if counted is None else [f"{part / subject.shown * 1e-9:.2f}" for part in counted]
        ratio = (ours.faster_than or {}).get(outcome.name)
        if ratio is not None:
            fewer = None if counted is None else counted.total / subject.cost.total
            cells += [
                "" if fewer is None else f"{fewer:.2f}x",
                table.ratio_text(ratio.median),
                "" if fewer is None else f"{ratio.median / fewer:.2f}",
            ]
        rows.add_row(*cells)
    return rows


def layers(report: models.Report) -> Table:
    """What is left to each layer."""
    rows = Table(header_style="dim", box=None, padding=(0, 2))
    for heading in ("layer", "left", "of", "", ""):
        rows.add_column(heading, justify="right" if heading in ("left", "of") else "left", no_wrap=True)
    for layer in report.subject.layers:
        share = layer.left / layer.of
        rows.add_row(layer.name, f"{layer.left:.0f}", str(layer.of), layer.unit, f"{'█' * round(30 * share):30} {100 * share:.0f} %")
    return rows


def remarks(report: models.Report, outcomes: Sequence[Outcome]) -> Iterator[Text]:
    if report.differences:
        numbers = ", ".join(f"{difference:.2g}" for difference in report.differences)
        yield Text(f"  output: relative difference from the dense twin {numbers}")
    for outcome in outcomes:
        if outcome.status != "ok":
            yield Text(f"  {outcome.name}: {outcome.status} ({'; '.join(outcome.reasons)})", style="bold red")


def pictures(case: models.Case, report: models.Report, folder: Path, source: str) -> Iterator[Text]:
    for name, panels in report.subject.panels().items():
        path = folder / f"{case.name}-{name}.png"
        title = f"{case.name} on {source}: {models.TITLES[case.model][name]}"
        yield _drawn(partial(picture.draw, panels, path, title), path)
