"""Two runs side by side: did we get faster, and did the machine?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from .environment import CONDITIONS
from .record import Record
from .table import ratio_text

# the peers do not change from run to run, so more drift than this is the machine's doing
DRIFT = 0.1


class Difference(NamedTuple):
    """One contender of ours in one case of both runs."""

    room: str
    case: str
    contender: str
    before_ms: float
    after_ms: float
    drift: float | None  # how many times faster the same peers became, geometric mean; None: no peer in common

    @property
    def faster(self) -> float:
        return self.before_ms / self.after_ms


def differing_conditions(before: Record, after: Record) -> dict[str, tuple[Any, Any]]:
    """What was not alike in machine or settings."""
    a, b = before["environment"], after["environment"]
    return {name: (a.get(name), b.get(name)) for name in CONDITIONS if a.get(name) != b.get(name)}


def differences(before: Record, after: Record) -> Iterator[Difference]:
    """Every contender of ours that both runs timed."""
    earlier = {(case["room"], case["id"]): _times(case) for case in before["cases"]}
    for case in after["cases"]:
        old, new = earlier.get((case["room"], case["id"]), {}), _times(case)
        ratios = [old[name] / new[name] for name in new if name in old and not _is_ours(case, name)]
        drift = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
        for name in new:
            if name in old and _is_ours(case, name):
                yield Difference(case["room"], case["id"], name, old[name], new[name], drift)


def unmatched(before: Record, after: Record) -> list[str]:
    """Cases that only one of the runs has."""
    a, b = ({f"{case['room']} {case['id']}" for case in run["cases"]} for run in (before, after))
    return sorted(a ^ b)


def _times(case: Record) -> dict[str, float]:
    return {contender["name"]: contender["ms"]["median"] for contender in case["contenders"] if "ms" in contender}


def _is_ours(case: Record, name: str) -> bool:
    return any(contender["ours"] for contender in case["contenders"] if contender["name"] == name)


def difference_table(rows: list[Difference], before: str, after: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("case", no_wrap=True)
    table.add_column("contender", no_wrap=True)
    table.add_column(f"{before}, ms", justify="right")
    table.add_column(f"{after}, ms", justify="right")
    table.add_column("faster by", justify="right")
    table.add_column("its peers by", justify="right")
    for row in rows:
        drifted = row.drift is not None and abs(math.log(row.drift)) > DRIFT
        table.add_row(
            row.case,
            row.contender,
            f"{row.before_ms:.3g}",
            f"{row.after_ms:.3g}",
            ratio_text(row.faster),
            Text("-" if row.drift is None else f"{row.drift:.2f}x", style="yellow" if drifted else "dim"),
        )
    return table
