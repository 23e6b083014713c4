"""What a run folder says about its run, read back. Tolerant: a run may have been cut short."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from argrpo.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as its files tell it."""

    folder: RunFolder
    rows: list[dict[str, float | None]]
    """metrics.jsonl, one object a step; None where a number was not finite."""
    config: dict[str, Any]
    config_text: str
    environment: dict[str, str]
    evaluation: dict[str, Any]
    """Of base and tuned policy, once a run was over; empty where that was not done."""
    evaluations: list[dict[str, float | None]]
    """evaluations.jsonl: those along the run, the one before training with step 0."""
    best: dict[str, Any]
    """What best.json says of the best policy; empty where none was kept."""
    samples: list[tuple[int, Path]]
    """The grids through time, by step."""

    def curve(self, name: str) -> tuple[list[float], list[float | None]]:
        """Steps and values of a metric, at the steps that have it."""
        found = [(row["step"] or 0.0, row[name]) for row in self.rows if name in row]
        return [step for step, _ in found], [value for _, value in found]

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """Metrics whose name begins and ends so, in order of appearance."""
        seen = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in seen if name.startswith(prefix) and name.endswith(suffix)]

    def finite(self, name: str) -> list[float]:
        """The numbers of a metric, without gaps."""
        values = [value for value in self.curve(name)[1] if value is not None]
        return [value for value in values if math.isfinite(value)]


def read_run(path: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no run is in it, or a file of it is damaged, named.
    """
    folder = RunFolder(path.expanduser())
    if not folder.path.is_dir():
        raise FileNotFoundError(f"run: expected the folder of a run, got {path}")
    if not folder.metrics_path.is_file():
        raise ValueError(f"run: expected a folder with metrics.jsonl, got {path} without one")
    text = _text(folder.config_path)
    return RunRecord(
        folder=folder,
        rows=_rows(folder.metrics_path),
        config=yaml.safe_load(text) or {},
        config_text=text,
        environment=_object(folder.environment_path),
        evaluation=_object(folder.evaluation_path),
        evaluations=_rows(folder.evaluations_path),
        best=_object(folder.best_path / "best.json"),
        samples=sorted(
            (int(file.stem.removeprefix("step_")), file)
            for file in folder.samples_path.glob("step_[0-9]*.png")
        ),
    )


def _rows(path: Path) -> list[dict[str, float | None]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A run that was killed may leave a last line without its end; what it says is not known.
    whole = [line for line in lines if line.endswith("\n") and line.strip()]
    rows = []
    for place, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected JSON in line {place}, got {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
            raise ValueError(f"{path}: expected an object with a step in line {place}")
        rows.append(row)
    return rows


def _object(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
