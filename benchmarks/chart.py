"""One picture of a run: each case a line, each peer a mark at how many times slower it is, with the quartiles as a whisker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .record import Record, comparable

# colour-blind safe (Okabe and Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442")
MARKS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")


class Point(NamedTuple):
    """A model at one of its settings, beside its dense twin."""

    setting: str
    operations: float  # a share of the twin's
    time: float  # a share of the twin's
    difference: float  # of the output, relative


class ChartError(Exception):
    """A chart that cannot be drawn, with the reason."""


def draw(run: Record, path: Path) -> None:
    """Ratios of the run's first contender of ours; a panel for all cases that share peers."""
    plt = pyplot("--chart")
    lines = [(case, mine) for case in run["cases"] for mine in case["contenders"] if mine["ours"] and mine.get("faster_than")]
    if not lines:
        raise ChartError("no case has a ratio, so there is nothing to draw")
    name = lines[0][1]["name"]
    lines = [(case, mine) for case, mine in lines if mine["name"] == name]
    drawn = [case for case, _ in lines]
    groups = [[lines[drawn.index(case)] for case in group] for group in comparable(drawn)]

    figure, panels = plt.subplots(
        len(groups),
        squeeze=False,
        figsize=(9.6, 0.8 + sum(1.1 + 0.3 * len(some) for some in groups)),
        height_ratios=[2 + len(some) for some in groups],
        layout="constrained",
    )
    width = max(len(case["name"]) for case, _ in lines)
    for axes, some in zip(panels[:, 0], groups, strict=True):
        _draw_panel(axes, some, width)
    panels[-1, 0].set_xlabel(
        "ratio of medians; whiskers: quartiles of the ratios within a round; left of 1x the peer is faster", fontsize=8.5
    )
    env = run["environment"]
    place = env["cpu"] if env["device"] == "cpu" else env["device"]
    conditions = f"{place}, {env['threads']} threads, torch {env['torch']}, {env['date'][:10]}"
    figure.suptitle(f"{name}: times faster than ...  ({conditions})", fontsize=10)
    save(figure, path)


def draw_curves(curves: Mapping[str, Sequence[Point]], path: Path, title: str) -> None:
    """How far each model's output is from its dense twin's, against what it takes: multiply-adds, and time."""
    plt = pyplot("a picture")
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(10.4, 4.6), layout="constrained")
    for axes, field, heading in zip(panels, ("operations", "time"), ("multiply-adds", "time"), strict=True):
        for at, (name, points) in enumerate(curves.items()):
            points = sorted(points, key=lambda point: point.operations)
            x, y = ([getattr(point, part) for point in points] for part in (field, "difference"))
            axes.plot(x, y, marker=MARKS[at % len(MARKS)], color=COLOURS[at % len(COLOURS)], label=name, linewidth=1.2, markersize=5)
            for point in points:
                place = (getattr(point, field), point.difference)
                axes.annotate(point.setting, place, xytext=(4, 4), textcoords="offset points", fontsize=7, color="#444444")
        axes.axvline(1.0, color="#444444", linewidth=1)
        axes.set_xlim(left=0.0)
        axes.set_xlabel(f"{heading}, as a share of the dense twin's", fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.tick_params(labelsize=8)
    panels[0].set_ylim(bottom=0.0)
    panels[0].set_ylabel("relative difference of the output from the dense twin's", fontsize=9)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def pyplot(what: str) -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ChartError(f"{what} needs matplotlib; install it with: pip install 'tokenops[bench]'") from None
    return plt


def save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        # ValueError: a file ending that matplotlib does not know
        raise ChartError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        pyplot("a picture").close(figure)


def _draw_panel(axes: Any, lines: list[tuple[Record, Record]], width: int) -> None:
    """Cases that share peers; ``width`` characters for the name of each."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    peers = list(dict.fromkeys(peer for _, mine in lines for peer in mine["faster_than"]))
    style = {peer: (COLOURS[at % len(COLOURS)], MARKS[at % len(MARKS)]) for at, peer in enumerate(peers)}
    largest, smallest = 1.0, 1.0
    for row, (_, mine) in enumerate(lines):
        if row % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color="#f5f5f5", zorder=0)
        for peer, ratio in mine["faster_than"].items():
            colour, mark = style[peer]
            axes.plot([ratio["low"], ratio["high"]], [row, row], color=colour, linewidth=1.5, alpha=0.6, zorder=2)
            axes.plot(ratio["median"], row, mark, color=colour, markersize=6, markeredgecolor="white", markeredgewidth=0.6, zorder=3)
            largest, smallest = max(largest, ratio["median"], ratio["high"]), min(smallest, ratio["median"], ratio["low"])
    axes.axvline(1, color="#444444", linewidth=1, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.8, smallest / 1.1), max(2.2, largest * 1.1))
    ticks = [0.25, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12, 16, 32, 64]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    labels = [f"{case['name']:{width}}  {case['dtype']} {case['direction']:7}" for case, _ in lines]
    axes.set_yticks(range(len(lines)), labels, family="monospace")
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="both", length=0, labelsize=8)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    handles = [
        Line2D([], [], linestyle="", marker=mark, color=colour, markersize=6, markeredgecolor="white", label=peer)
        for peer, (colour, mark) in style.items()
    ]
    # above the panel, so that the axis below keeps its place
    axes.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.4, 1.0),
        ncols=min(5, len(peers)),
        frameon=False,
        fontsize=8.5,
        handletextpad=0.2,
    )
