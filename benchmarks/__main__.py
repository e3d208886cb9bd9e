"""The command line: ``tokenops bench``, ``tokenops demo``, ``tokenops info``, ``tokenops compare``, ``tokenops picture``."""

from __future__ import annotations

import fnmatch
import shlex
import sys
from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as error:
    sys.exit(f"tokenops: the command line needs click and rich ({error}); install them with: pip install 'tokenops[bench]'")

import torch

import tokenops

from . import allocator, chart, compare, environment, harness, picture, record, table, video
from .harness import Case, Request, case_id
from .record import Record
from .roof import measure_roof

ROOMS = ("sparse_attention", "token_select", "token_merge", "delta_matmul")
# whole models: they take minutes, and run only when they are named
MODELS = "models"

# seconds of timing for each case, all contenders together
BUDGET = {"quick": 1.0, "full": 6.0}

# for the first measurement of each roof
ROOF_SECONDS = 0.6

# what a table needs where the output is no terminal with a width of its own
PLAIN_WIDTH = 132

CHARTS = (".png", ".pdf", ".svg")


class Output(click.Path):
    """A file to write when the run is over: what would keep us from it must show before."""

    def __init__(self, endings: Sequence[str] = ()) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(super().convert(value, param, ctx))
        if not path.parent.is_dir():
            self.fail(f"there is no directory {str(path.parent)!r}", param, ctx)
        if self.endings and path.suffix.lower() not in self.endings:
            self.fail(f"{str(path)!r} must end in {', '.join(self.endings)}", param, ctx)
        return path


def console() -> Console:
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(tokenops.__version__, prog_name="tokenops")
def cli() -> None:
    """Sparse token attention for PyTorch: measure it on this machine, see what it runs on."""


@cli.command()
@click.argument("rooms", nargs=-1, metavar="[ROOM]...")
@click.option(
    "--preset", type=click.Choice(list(BUDGET)), default="quick", show_default=True, help="quick: two to three minutes; full: every case."
)
@click.option(
    "--case", "patterns", multiple=True, metavar="TEXT", help="Only cases whose id is, contains or matches (* ?) TEXT; repeatable."
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(harness.DTYPES)), help="Instead of the preset's; repeatable.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of every contender.  [default: torch's own]")
@click.option("--backend", "backends", multiple=True, metavar="NAME", help="Ours by this backend (see 'tokenops info'); repeatable.")
@click.option("--isa", type=click.Choice(list(allocator.ISA_VARIABLES)), help="Hold every contender to these CPU instructions, peers too.")
@click.option("--video", "video_path", type=click.Path(), help="For the video cases.  [default: an excerpt of Big Buck Bunny]")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Timing for each case.  [default: 1 quick, 6 full]")
@click.option("--json", "json_path", type=Output(), help="Write every number and the environment here.")
@click.option("--chart", "chart_path", type=Output(CHARTS), help="Draw the ratios here (PNG, PDF or SVG).")
@click.option("--dry-run", is_flag=True, help="List cases and who would take part, or why not; time nothing.")
def bench(
    rooms: tuple[str, ...],
    preset: str,
    patterns: tuple[str, ...],
    dtypes: tuple[str, ...],
    device: str,
    threads: int | None,
    backends: tuple[str, ...],
    isa: str | None,
    video_path: str | None,
    seconds: float | None,
    json_path: Path | None,
    chart_path: Path | None,
    dry_run: bool,
) -> None:
    """Time tokenops against its peers on this machine.

    Every contender of a case gets the same inputs in the same process; its result is checked against the float64 reference, and a wrong one
    gets no time and no ratio. Then all are called in turn until the time is up. ROOM is an operation family: sparse_attention,
    token_select, token_merge, delta_matmul. Without one, all of these are run. Only by its name: models, whole models beside dense ones.
    Exit status 1: a result of ours was wrong.

    \b
    tokenops bench                                       the quick preset
    tokenops bench --case video --video holiday.mp4      on your own film
    tokenops bench --preset full --json now.json --chart now.png
    """
    _check_device(device)
    allocator.restart(sys.argv[1:], isa)
    if threads is not None:
        harness.use_threads(threads)
    film = video_path or video.EXCERPT
    request = Request(device, backends, cache(partial(video.read_tokens, film)), preset == "full", cache(partial(video.read_frames, film)))
    modules = {room: _room(room) for room in rooms or ROOMS}
    _check_backends(backends, modules)
    chosen = [(room, case) for room, module in modules.items() for case in select_cases(module.CASES, preset, dtypes, patterns)]
    if not chosen:
        raise click.UsageError(f"no case of the {preset} preset matches {' '.join(patterns)!r}; --dry-run lists them")
    out = console()
    try:
        if dry_run:
            for room, case in chosen:
                _print_dry(out, room, case, modules[room].prepare(case, request))
            return
        repro = _repro(preset, threads, device, backends, isa, video_path)
        run = _run(out, modules, chosen, request, seconds or BUDGET[preset], repro, json_path)
    except video.VideoError as error:
        raise click.ClickException(str(error)) from error
    if json_path is not None:
        record.write(run, json_path)
        out.print(f"numbers   {json_path}")
    if chart_path is not None:
        try:
            chart.draw(run, chart_path)
        except chart.ChartError as error:
            raise click.ClickException(str(error)) from error
        out.print(f"chart     {chart_path}")
    if any(contender["ours"] and contender["status"] in ("wrong", "failed") for case in run["cases"] for contender in case["contenders"]):
        sys.exit(1)


def select_cases(cases: Sequence[Any], preset: str, dtypes: Sequence[str], patterns: Sequence[str]) -> list[Any]:
    """The preset's cases, in other dtypes if asked, that match any of the patterns."""
    chosen = [case for case in cases if case.quick or preset == "full"]
    if dtypes:
        chosen = [case._replace(dtype=dtype) for case in chosen for dtype in dtypes]
    # the same shape in two dtypes becomes one case if both are replaced by one
    by_id = {case_id(case): case for case in chosen}
    if not patterns:
        return list(by_id.values())

    def matches(name: str, pattern: str) -> bool:
        # a full id means that case alone, though others may contain it
        if pattern in by_id:
            return name == pattern
        return fnmatch.fnmatchcase(name, pattern) if set(pattern) & set("*?[") else pattern in name

    return [case for name, case in by_id.items() if any(matches(name, pattern) for pattern in patterns)]


def _room(name: str) -> ModuleType:
    if name not in (*ROOMS, MODELS):
        raise click.UsageError(f"ROOM must be one of {', '.join((*ROOMS, MODELS))}, got {name!r}")
    return import_module(f"{__package__}.{name}")


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise click.UsageError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise click.UsageError(f"--device {device}: torch {torch.__version__} finds no CUDA device here")


def _check_backends(backends: Sequence[str], modules: dict[str, ModuleType]) -> None:
    for room, module in modules.items():
        known = [backend.name for backend in module.BACKENDS]
        for name in backends:
            if not known:
                raise click.UsageError(f"--backend does not go with {room}, whose operators choose their own, got {name!r}")
            if name not in known:
                raise click.UsageError(f"--backend must be one of {', '.join(known)} for {room}, got {name!r}")


def _repro(preset: str, threads: int | None, device: str, backends: Sequence[str], isa: str | None, video_path: str | None) -> str:
    """The options that every case of this run shares."""
    words = ["--preset", preset] if preset != "quick" else []
    words += ["--device", device] if device != "cpu" else []
    words += ["--threads", str(threads)] if threads is not None else []
    words += [word for backend in backends for word in ("--backend", backend)]
    words += ["--isa", isa] if isa is not None else []
    words += ["--video", video_path] if video_path is not None else []
    return shlex.join(words)


def _case_repro(room: str, case: Case, shared: str) -> str:
    dtype = "" if case in _room(room).CASES else f" --dtype {case.dtype}"
    return f"tokenops bench {room} --case {shlex.quote(case_id(case))}{dtype} {shared}".strip()


def _print_dry(out: Console, room: str, case: Case, trial: harness.Trial) -> None:
    out.print(f"\n[bold]{case_id(case)}[/]  ({room}; {trial.cost.flops * 1e-9:.2f} GFLOP, {trial.cost.bytes * 1e-6:.1f} MB)")
    rows = [(contender.name, contender.objections, contender.note) for contender in trial.contenders]
    rows += [(f"backend {name}", objections, "") for name, objections in trial.backends.items()]
    chosen = next((f"backend {name}" for name, objections in trial.backends.items() if not objections), None)
    for name, objections, note in rows:
        note = "chosen where none is named" if name == chosen else note
        verdict = f"[yellow]no[/]   {'; '.join(objections)}" if objections else f"[green]yes[/]  {note}".rstrip()
        out.print(f"  {name:24}  {verdict}", soft_wrap=True)


def _run(
    out: Console,
    modules: dict[str, ModuleType],
    chosen: Sequence[tuple[str, Case]],
    request: Request,
    seconds: float,
    shared: str,
    json_path: Path | None,
) -> Record:
    clock = harness.clock_for(request.device)
    threads = torch.get_num_threads()
    touched = allocator.touch_pool()
    conditions = {"clock": clock.conditions, "seconds_per_case": seconds, "memory": _memory_words(touched)}
    run = record.run_record(environment.environment(request.device), conditions, shlex.join(["tokenops", *sys.argv[1:]]))
    roof = measure_roof(request.device, {case.dtype for _, case in chosen}, clock, ROOF_SECONDS)
    record.set_roof(run, roof)
    for line in (*table.conditions_lines(run), table.roof_line(run)):
        out.print(line, soft_wrap=True)
    # a bar that redraws itself is for eyes, not for log files
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        bar = progress.add_task("", total=len(chosen))
        for room, case in chosen:
            progress.update(bar, description=case_id(case))
            trial = modules[room].prepare(case, request)
            measured = harness.measure(trial, case.dtype, clock, seconds, threads)
            # one more try each time: a roof is the best of the whole run
            roof = roof.best(measure_roof(request.device, {case.dtype}, clock, 0))
            run["cases"].append(record.case_record(room, case, trial, measured, _case_repro(room, case, shared)))
            record.set_percentages(run["cases"][-1], roof)
            table.print_case(out, run["cases"][-1])
            if json_path is not None:
                # whatever stops the run, these numbers are there
                record.write(run, json_path)
            progress.advance(bar)
    record.set_roof(run, roof)
    _print_summary(out, run)
    return run


def _print_summary(out: Console, run: Record) -> None:
    out.print()
    out.print(table.roof_line(run), soft_wrap=True)
    for ratios in table.ratio_tables(run["cases"]):
        out.print()
        out.print(ratios)
    for line in table.note_lines(run["cases"]):
        out.print(f"  {line}", style="dim", soft_wrap=True)
    out.print()


def _memory_words(touched: int) -> str:
    if not touched:
        return "malloc as it is (no glibc, or not restarted): large blocks may pay page faults on every call"
    return f"restarted with raised malloc thresholds and {touched >> 20} MiB touched beforehand, so calls do not pay page faults"


@cli.command(short_help="Models that leave tokens out of a video, beside their dense twins.")
@click.option("--video", "video_path", type=click.Path(), help="Any film.  [default: an excerpt of Big Buck Bunny]")
@click.option("--model", type=click.Choice(["all", "haltingvt", "eventful", "vidtr", "sttm", "tome"]), default="all", show_default=True)
@click.option(
    "--size",
    type=click.Choice(["small", "published"]),
    default="small",
    show_default=True,
    help="small: some minutes in all, and curves over settings; published: the papers' sizes, many minutes (of ViTDet a few blocks).",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of every contender.  [default: torch's own]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=2.0, show_default=True, help="Timing for each model.")
@click.option(
    "--pictures",
    "folder",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    default=".",
    show_default=True,
    help="Write them here.",
)
def demo(video_path: str | None, model: str, size: str, threads: int | None, device: str, seconds: float, folder: Path) -> None:
    """Run HaltingVT, an Eventful Transformer, C-VidTr, STTM and ToMe on a video, beside the dense transformers that they save on.

    
    fewer operations   how many times fewer multiply-adds than the dense twin
    faster             how many times less time
    saving in time     the second as a share of the first: 1 says that time follows operations

    Weights are random. Exit status 1: a result was wrong.
    """
    from . import demo as show
    from . import models

    _check_device(device)
    allocator.restart(sys.argv[1:])
    if threads is not None:
        harness.use_threads(threads)
    allocator.touch_pool()
    film = video_path or video.EXCERPT
    request = Request(device, film=cache(partial(video.read_frames, film)))
    cases = [case for case in models.CASES if model in ("all", case.model) and case.small == (size == "small")]
    try:
        right = show.run(console(), cases, request, seconds, folder, Path(film).name)
    except video.VideoError as error:
        raise click.ClickException(str(error)) from error
    if not right:
        sys.exit(1)


@cli.command(short_help="Versions, op libraries, and why each backend is on or off.")
def info() -> None:
    """Versions, which op libraries were built and for what, and why each backend is on or off."""
    from .info import print_info

    print_info(console(), [_room(room) for room in ROOMS])


@cli.command("compare")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def compare_command(before: Path, after: Path) -> None:
    """Compare two results written by 'tokenops bench --json'.

    The last column says how many times faster the same peers ran in AFTER: they did not change, so this is the drift of the machine, and a
    change of ours smaller than that says nothing.
    """
    out = console()
    try:
        runs = record.read(before), record.read(after)
    except record.RecordError as error:
        raise click.ClickException(str(error)) from error
    for name, (old, new) in compare.differing_conditions(*runs).items():
        out.print(f"not alike: {name}: {old} before, {new} after", style="yellow", soft_wrap=True)
    rows = list(compare.differences(*runs))
    if not rows:
        raise click.ClickException(f"{before} and {after} have no case in common that both timed")
    out.print(compare.difference_table(rows, before.stem, after.stem))
    only_one = compare.unmatched(*runs)
    if only_one:
        out.print(f"in only one of them: {', '.join(only_one)}", style="dim", soft_wrap=True)


@cli.command("picture")
@click.argument("path", type=Output(CHARTS), metavar="FILE")
@click.option("--room", type=click.Choice(["token_merge", "delta_matmul"]), default="token_merge", show_default=True)
@click.option("--video", "video_path", type=click.Path(), help="A frame of this film.  [default: an excerpt of Big Buck Bunny]")
@click.option("--frame", type=click.IntRange(min=0), help="Which one, from 0.  [default: the middle one]")
@click.option("--backend", metavar="NAME", help="Merge or compare by this backend (see 'tokenops info').")
def picture_command(path: Path, room: str, video_path: str | None, frame: int | None, backend: str | None) -> None:
    """Draw what a room does to a video (PNG, PDF or SVG).

    token_merge: a frame, and the clusters its tokens form, round after round. delta_matmul: frames in a row, with the tokens that changed
    enough to be computed again.
    """
    if backend is not None:
        _check_backends([backend], {room: _room(room)})
    source = Path(video_path or video.EXCERPT)
    try:
        frames = video.read_frames(source)
        at = len(frames) // 2 if frame is None else frame
        if at >= len(frames):
            raise click.UsageError(f"--frame must be less than {len(frames)}, the number of frames, got {at}")
        if room == "token_merge":
            panels = picture.merged_panels(frames[at], picture.merge_frame(frames[at], backend))
            title = f"{source.name}, frame {at}: tokens merged with their likes, each cluster in its mean colour"
        else:
            # the gate needs a frame before, and there must be as many as are shown
            first = min(max(at, 1), len(frames) - picture.SHOWN)
            panels = picture.sent_panels(frames, first, picture.sent_tokens(frames, first, backend))
            title = f"{source.name}: tokens that changed enough since they were last sent; the others are dimmed, and not computed"
        picture.draw(panels, path, title)
    except (video.VideoError, chart.ChartError, NotImplementedError) as error:
        raise click.ClickException(str(error)) from error
    console().print(f"picture   {path}")


def main() -> None:
    cli(prog_name="tokenops")


if __name__ == "__main__":
    main()
