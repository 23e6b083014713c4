"""Which of the rows in bench/results the README shows: those of the newest commit that has any.

Rows of one run follow each other in a file. Of the runs of a case that the last commit in the file
made, the one with the most contenders is taken, and the last of those: figures that stand beside
each other were then measured beside each other.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from result_rows import Row, rows_in

RESULTS = Path(__file__).parent / "results"
DEVICES = ("cpu", "gpu")


def rows_of(bench: str, device: str, results: Path = RESULTS) -> list[Row]:
    """All rows of a script on a kind of device, oldest first."""
    return rows_in(results / f"{bench}_{device}.jsonl")


def runs_by(rows: Sequence[Row], case_of: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """The run to show of each case, cases in the order of the file."""
    runs: dict[Any, list[list[Row]]] = {}
    for _, group in groupby(rows, key=lambda row: (case_of(row), _run_of(row))):
        found = list(group)
        runs.setdefault(case_of(found[0]), []).append(found)
    return {case: _best(of_case) for case, of_case in runs.items()}


def _run_of(row: Row) -> tuple[Any, ...]:
    peers = row.get("peers")
    return row["commit"], row["date"], None if peers is None else tuple(peers)


def _best(runs: Sequence[list[Row]]) -> list[Row]:
    newest = runs[-1][0]["commit"]
    of_commit = [run for run in runs if run[0]["commit"] == newest]
    return max(reversed(of_commit), key=len)


def by_contender(run: Sequence[Row]) -> dict[str, Row]:
    """The last row of each."""
    return {row["contender"]: row for row in run}


def source_of(row: Row) -> str:
    """Where and by what a row was measured, in words."""
    return sources_of({"": [row]})


def sources_of(runs: Mapping[str, Sequence[Row]]) -> str:
    """Where and by what runs were measured, in words, with their names where they differ."""
    by_place: dict[str, list[str]] = {}
    for name, run in runs.items():
        by_place.setdefault(_place_of(run[0]), []).append(name)
    said = []
    for place, names in by_place.items():
        rows = [row for name in names for row in runs[name]]
        whose = f" ({', '.join(names)})" if len(by_place) > 1 else ""
        said.append(f"{place}{_others(rows)}{whose}")
    return "; ".join(said)


def _place_of(row: Row) -> str:
    threads = f", {row['threads']} threads" if row.get("threads", 1) > 1 else ""
    if row.get("threads") == 1:
        threads = ", 1 thread"
    if row.get("clock") == "process":
        threads += ", CPU time of the process"
    return f"{row['device']}{threads}, {row['date']}, commit {row['commit']}"


def _others(rows: Sequence[Row]) -> str:
    """Cores that others kept busy, the least and the most."""
    busy = [row["others_busy_cores"] for row in rows if "others_busy_cores" in row]
    if not busy:
        return ""
    least, most = f"{min(busy):.2f}", f"{max(busy):.2f}"
    return f", others kept {least if least == most else f'{least} to {most}'} cores busy"
