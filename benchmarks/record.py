"""One run as plain data: what ``--json`` writes, and what tables, charts and ``tokenops compare`` read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .harness import Case, Cost, Measurement, Outcome, Spread, Trial, case_id
from .roof import Roof

FORMAT = 1

Record = dict[str, Any]


class RecordError(Exception):
    """A file that is no result of this benchmark, with the reason."""


def case_record(room: str, case: Case, trial: Trial, measurement: Measurement, repro: str) -> Record:
    case_of_run: Record = {
        "room": room,
        "id": case_id(case),
        "name": case.name,
        "dtype": case.dtype,
        "direction": case.direction,
        "flops": trial.cost.flops,
        "bytes": trial.cost.bytes,
        "page_faults": measurement.page_faults,
        "remark": trial.remark() if callable(trial.remark) else trial.remark,
        "repro": repro,
        "contenders": [_contender(outcome, trial) for outcome in measurement.outcomes],
    }
    if trial.dense is not None:
        case_of_run["dense"] = trial.dense._asdict()
    return case_of_run


def _contender(outcome: Outcome, trial: Trial) -> Record:
    record: Record = {
        "name": outcome.name,
        "ours": outcome.ours,
        "status": outcome.status,
        "reasons": list(outcome.reasons),
        "note": outcome.note,
        "error": outcome.error,
    }
    if outcome.seconds is not None:
        record |= {
            "ms": _spread(Spread(*(1e3 * value for value in outcome.seconds))),
            "rounds": outcome.rounds,
            "gflops": trial.cost.flops / outcome.seconds.median * 1e-9,
            "gbs": trial.cost.bytes / outcome.seconds.median * 1e-9,
        }
    if outcome.memory is not None:
        record["memory"] = outcome.memory
    if outcome.faster_than is not None:
        record["faster_than"] = {peer: _spread(ratio) for peer, ratio in outcome.faster_than.items()}
        if trial.dense is not None:
            share, timed = trial.cost.flops / trial.dense.flops, [peer for peer in trial.dense.peers if peer in outcome.faster_than]
            record["merit"] = {peer: outcome.faster_than[peer].median * share for peer in timed}
    return record


def set_percentages(case: Record, roof: Roof) -> None:
    """How much of each roof every contender uses."""
    for contender in case["contenders"]:
        if "ms" in contender:
            contender["percent_of"] = roof.percent(Cost(case["flops"], case["bytes"]), case["dtype"], contender["ms"]["median"] * 1e-3)


def _spread(spread: Spread) -> Record:
    return {"median": spread.median, "low": spread.low, "high": spread.high}


def peers(case: Record) -> list[str]:
    """Who of the others took part in a case."""
    return [contender["name"] for contender in case["contenders"] if not contender["ours"] and contender["status"] != "not run"]


def comparable(cases: Sequence[Record]) -> list[list[Record]]:
    """The cases of each room that share peers, in groups: what one table or panel can show without empty columns for strangers."""
    groups: list[list[Record]] = []
    for case in cases:
        near = [
            group
            for group in groups
            if group[0]["room"] == case["room"] and set(peers(case)) & {p for other in group for p in peers(other)}
        ]
        joined = [*(other for group in near for other in group), case]
        at = groups.index(near[0]) if near else len(groups)
        groups = [group for group in groups if group not in near]
        groups.insert(at, joined)
    return groups


def run_record(environment: Record, conditions: Record, command: str) -> Record:
    return {"format": FORMAT, "command": command, "environment": environment, "conditions": conditions, "roof": {}, "cases": []}


def set_roof(run: Record, roof: Roof) -> None:
    """The roof that the whole run is measured against."""
    run["roof"] = {
        "copy_gbs": roof.copy * 1e-9,
        "gemm_gflops": {dtype: rate * 1e-9 for dtype, rate in roof.gemm.items()},
        "peak_gflops": {dtype: rate * 1e-9 for dtype, rate in roof.peak.items()},
    }
    for case in run["cases"]:
        set_percentages(case, roof)


def write(record: Record, path: Path) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


def read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise RecordError(f"{str(path)!r}: expected a result written by 'tokenops bench --json' (format {FORMAT}), got format {found!r}")
    return record
