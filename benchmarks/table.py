"""Results as text: a block of lines for each case while the run goes on, and one table of ratios at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .harness import UNSTEADY, Spread
from .record import Record, comparable, peers

# page faults of one call that are lost in its time
FEW_FAULTS = 16

# processes that wanted a core in the minute before the run, per core; above it others were at work too
BUSY = 0.5

# a ratio this near to 1 is called neither faster nor slower
EVEN = 0.03

ROOFS = ("peak", "gemm", "copy")


def ratio_text(ratio: float, low: float | None = None, high: float | None = None) -> Text:
    style = "green" if ratio > 1 + EVEN else "red" if ratio < 1 - EVEN else ""
    text = Text(f"{ratio:.2f}x", style=style)
    if low is not None and high is not None:
        text.append(f"  {low:.2f}-{high:.2f}", style="dim")
    return text


def case_block(case: Record) -> Table:
    """One line for each contender; fixed widths, so that the blocks of a run stand in columns."""
    ours = [contender for contender in case["contenders"] if contender["ours"]]
    table = Table(box=None, padding=(0, 1), header_style="dim", title=_title(case), title_justify="left", title_style="bold")
    table.add_column("", width=24, no_wrap=True)
    for heading, width in (("ms", 9), ("spread", 7), ("GFLOP/s", 8), ("GB/s", 7), *((f"of {roof}", 7) for roof in ROOFS)):
        table.add_column(heading, width=width, justify="right", no_wrap=True)
    weighed = any("memory" in contender for contender in case["contenders"])
    if weighed:
        table.add_column("adds MB", width=7, justify="right", no_wrap=True)
    for contender in ours:
        heading = f"{contender['name']} is faster"
        table.add_column(heading, min_width=18, no_wrap=True)
    for contender in case["contenders"]:
        if "ms" not in contender:
            continue
        ms = contender["ms"]
        percent = _percent(ms)
        ratios = [_ratio_cell(mine, contender) for mine in ours]
        table.add_row(
            Text("  " + contender["name"], style="bold" if contender["ours"] else ""),
            f"{ms['median']:.3g}" if ms["median"] < 100 else f"{ms['median']:.0f}",
            Text(f"± {min(percent, 999):.0f} %", style="yellow" if percent > UNSTEADY else ""),
            f"{contender['gflops']:.0f}" if contender["gflops"] >= 10 else f"{contender['gflops']:.1f}",
            f"{contender['gbs']:.1f}",
            *(_percent_cell(contender, roof) for roof in ROOFS),
            *([f"{contender['memory'] * 1e-6:.1f}"] if weighed else []),
            *ratios,
        )
    return table


def _percent(spread: Record) -> float:
    return Spread(**spread).percent


def _percent_cell(contender: Record, roof: str) -> str:
    percent = contender["percent_of"].get(roof)
    return "-" if percent is None else f"{percent:.0f} %"


def _title(case: Record) -> str:
    return f"{case['name']}  {case['dtype']} {case['direction']}"


def _ratio_cell(mine: Record, contender: Record) -> Text:
    ratio = mine.get("faster_than", {}).get(contender["name"])
    return ratio_text(ratio["median"], ratio["low"], ratio["high"]) if ratio else Text()


def case_remarks(case: Record) -> list[Text]:
    """What a block must say in words: who did not finish and why, and how to run it again."""
    remarks = [Text(f"  {case['remark']}")] if case["remark"] else []
    for contender in case["contenders"]:
        if contender.get("merit"):
            remarks.append(Text(f"  {contender['name']}: {_merit(contender, case)}"))
        if contender["status"] in ("wrong", "failed"):
            reasons = "; ".join(contender["reasons"])
            remarks.append(Text(f"  {contender['name']}: {contender['status']}, so no time and no ratio ({reasons})", style="bold red"))
        elif contender["status"] == "not run" and contender["ours"]:
            remarks.append(Text(f"  {contender['name']}: not run ({'; '.join(contender['reasons'])})", style="yellow"))
    if any(_percent(contender["ms"]) > UNSTEADY for contender in case["contenders"] if "ms" in contender):
        remarks.append(Text("  unsteady: something else ran on this machine, so do not trust these ratios", style="yellow"))
    if (case["page_faults"] or 0) > FEW_FAULTS:
        remarks.append(Text(f"  {case['page_faults']} page faults per call: the times include fetching memory", style="yellow"))
    remarks.append(Text(f"  again: {case['repro']}", style="dim"))
    return remarks


def _merit(contender: Record, case: Record) -> str:
    """How many times fewer operations, and how much of that the clock shows."""
    shares = [f"{share:.2f} of that in time against {peer}" for peer, share in contender["merit"].items()]
    return f"{case['dense']['flops'] / case['flops']:.2f}x fewer operations; {', '.join(shares)}"


def print_case(console: Console, case: Record) -> None:
    console.print()
    console.print(case_block(case))
    for remark in case_remarks(case):
        console.print(remark, soft_wrap=True)


def ratio_tables(cases: Sequence[Record]) -> Iterable[Table]:
    """How many times faster we are: a line for each case, a column for each peer; a table for each of our contenders and group of peers."""
    for group in comparable(cases):
        yield from _group_tables(group)


def _group_tables(cases: Sequence[Record]) -> Iterable[Table]:
    names = dict.fromkeys(contender["name"] for case in cases for contender in case["contenders"] if contender["ours"])
    columns = list(dict.fromkeys(peer for case in cases for peer in peers(case)))
    for name in names:
        title = f"{cases[0]['room']}, {name}: how many times faster than"
        table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("case", no_wrap=True)
        table.add_column("ms", justify="right", no_wrap=True)
        # the nearest compute roof that was measured
        roof = "peak" if any("peak" in c.get("percent_of", {}) for case in cases for c in case["contenders"]) else "gemm"
        table.add_column(f"of {roof}", justify="right", no_wrap=True)
        for peer in columns:
            table.add_column(peer, justify="right", min_width=7, max_width=13)
        for case in cases:
            mine = next((contender for contender in case["contenders"] if contender["name"] == name), None)
            if mine is not None:
                table.add_row(_title(case), *_ratio_cells(mine, case, columns, roof))
        yield table


def _ratio_cells(mine: Record, case: Record, columns: Sequence[str], roof: str) -> list[Text | str]:
    if "ms" not in mine:
        return [Text(mine["status"], style="dim" if mine["status"] == "not run" else "bold red"), *("" for _ in (roof, *columns))]
    ratios = mine["faster_than"]
    found = {contender["name"]: contender["status"] for contender in case["contenders"]}
    cells: list[Text | str] = [f"{mine['ms']['median']:.2f}", _percent_cell(mine, roof)]
    for peer in columns:
        if peer in ratios:
            cells.append(ratio_text(ratios[peer]["median"]))
        else:
            cells.append(Text("" if found.get(peer, "not run") == "not run" else found[peer], style="bold red"))
    return cells


def note_lines(cases: Sequence[Record]) -> list[str]:
    """What a reader must know of the contenders, and which peers did not run; each said once."""
    contenders = [contender for case in cases for contender in case["contenders"]]
    notes = dict.fromkeys(f"{c['name']}: {c['note']}" for c in contenders if c["note"] and c["status"] == "ok")
    absent = Counter(f"{c['name']}: {'; '.join(c['reasons'])}" for c in contenders if c["status"] == "not run" and not c["ours"])
    return [*notes, *(f"{reason} (not run in {count} case{'s' if count > 1 else ''})" for reason, count in absent.items())]


def conditions_lines(run: Record) -> list[str]:
    """Where and how the numbers were taken."""
    env, conditions = run["environment"], run["conditions"]
    load = f"; BUSY when the run began (load {env['load']:.1f})" if (env["load"] or 0) > BUSY * env["cores"] else ""
    where = f"{env['cpu']}, {env['cores']} cores; device {env['device']}; {env['threads']} threads; torch runs {env['torch_isa']}{load}"
    return [
        f"machine   {where}",
        f"versions  tokenops {env['tokenops']} (git {env['git'] or '-'}), torch {env['torch']}, Python {env['python']}; {env['date']}",
        f"clock     {conditions['clock']}; peers interleaved call by call; median, ± half the interquartile range",
        f"memory    {conditions['memory']}",
    ]


def roof_line(run: Record) -> str:
    """The best that was seen of the machine up to now."""
    roof = run["roof"]
    gemm, peak = (", ".join(f"{dtype} {rate:.0f}" for dtype, rate in roof[name].items()) for name in ("gemm_gflops", "peak_gflops"))
    rates = f"peak (multiply-adds in registers): {peak or 'not measured'} GFLOP/s; gemm (torch): {gemm} GFLOP/s"
    return f"roofs     {rates}; copy (torch): {roof['copy_gbs']:.1f} GB/s; measured in this run"
