"""Who is told about a run as it goes: files, dashboards, the terminal. All behind one protocol."""

import dataclasses
import importlib
import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from argrpo.config import TrainConfig
from argrpo.environment import environment
from argrpo.progress import ProgressTracker
from argrpo.run_folder import RunFolder, config_text, storage_error, write_atomically

_PROJECT = "argrpo"


class Tracker(Protocol):
    """Told about a run. A step is one rollout iteration, counted from 1; 0 is before training."""

    def start(self, config: TrainConfig, folder: RunFolder, logged: int | None = None) -> None:
        """A run begins; or goes on after step `logged`, and what was logged of later ones goes."""
        ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None:
        """A PNG file that was written after a step."""
        ...

    def close(self) -> None:
        """The run is over, finished or not. Called once."""
        ...


def make_trackers(config: TrainConfig, *, progress: bool) -> list[Tracker]:
    """The trackers that a config asks for; the one of files always comes first.

    Args:
        config: the run.
        progress: also show how far it is, on the terminal.

    Raises:
        ValueError: a tracker's package is not installed.
    """
    trackers: list[Tracker] = [JsonLinesTracker()]
    for name in config.output.trackers:
        match name:
            case "tensorboard":
                trackers.append(TensorBoardTracker())
            case "wandb":
                trackers.append(WandbTracker())
            case "trackio":
                trackers.append(TrackioTracker())
    return [*trackers, ProgressTracker()] if progress else trackers


class JsonLinesTracker:
    """What a run folder always has: config.yaml, environment.json, and metrics.jsonl with one
    object a step. Evaluations also stand in evaluations.jsonl, the one before training only there.

    A value that is not finite becomes null, which every reader of JSON understands.
    """

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._path = Path()
        self._evaluations_path = Path()

    def start(self, config: TrainConfig, folder: RunFolder, logged: int | None = None) -> None:
        machine = json.dumps(environment(), indent=2) + "\n"
        write_atomically(folder.environment_path, lambda part: part.write_text(machine))
        settings = config_text(config)
        write_atomically(folder.config_path, lambda part: part.write_text(settings))
        self._path = folder.metrics_path
        self._evaluations_path = folder.evaluations_path
        # What a run that failed in this folder, or is resumed from before, left behind.
        last = -1 if logged is None else logged
        for path in (self._path, self._evaluations_path, folder.reward_extras_path):
            cut_rows(path, last)
        self._file = self._path.open("ab", buffering=0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._file is None:
            raise RuntimeError("metrics.jsonl: expected start() before log()")
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        evaluated = {k: value for k, value in values.items() if k.startswith("eval/")}
        if evaluated:
            with self._evaluations_path.open("ab", buffering=0) as file:
                _append_line(file, self._evaluations_path, {"step": step, **evaluated})
        if step > 0:
            _append_line(self._file, self._path, {"step": step, **values})

    def image(self, step: int, name: str, path: Path) -> None:
        """The file lies in the run folder already."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def append_extras(path: Path, step: int, extras: dict[str, dict[str, list[Any]]]) -> None:
    """What reward functions gave to log_extra in a step, one line a judge.

    Args:
        path: the file.
        step: 1-based.
        extras: columns of each judge, by its name.

    Raises:
        StorageError: the disk is full or refused.
    """
    for judge, columns in extras.items():
        with path.open("ab", buffering=0) as file:
            _append_line(file, path, {"step": step, "judge": judge, "columns": columns})


def cut_rows(path: Path, last: int) -> None:
    """Remove the rows of steps after the last one from a file of JSON lines, and half a row.

    Raises:
        ValueError: a row is no object with a step.
        StorageError: the disk is full or refused; the file is as it was.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    try:
        kept = [line for line in whole if json.loads(line)["step"] <= last]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a JSON object with a step in each line") from error
    if len(kept) < len(lines):
        write_atomically(path, lambda part: part.write_bytes(b"".join(kept)))


class TensorBoardTracker:
    """Event files in the run folder, for `tensorboard --logdir`.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self) -> None:
        _package("tensorboard", "tensorboard")
        self._writer: Any = None

    def start(self, config: TrainConfig, folder: RunFolder, logged: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers then pass over what older files say of these steps and later ones.
        purged = 0 if logged is None else logged + 1
        self._writer = SummaryWriter(str(folder.path), purge_step=purged)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbTracker:
    """A run on Weights & Biases, or offline where wandb is set so.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self) -> None:
        self._wandb = _package("wandb", "argrpo[track]")

    def start(self, config: TrainConfig, folder: RunFolder, logged: int | None = None) -> None:
        # wandb takes no row of a step that it has, so a run that goes on adds none twice.
        known = folder.path / "wandb_run.txt"
        run_id = known.read_text().strip() if logged is not None and known.exists() else None
        run = self._wandb.init(
            project=_PROJECT,
            name=folder.path.name,
            config=dataclasses.asdict(config),
            dir=str(folder.path),
            id=run_id,
            resume=None if run_id is None else "allow",
        )
        write_atomically(known, lambda part: part.write_text(f"{run.id}\n"))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._wandb.log(metrics, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._wandb.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._wandb.finish()


class TrackioTracker:
    """A run in trackio's local data base.

    Raises:
        ValueError: trackio is not installed.
    """

    def __init__(self) -> None:
        self._trackio = _package("trackio", "argrpo[track]")

    def start(self, config: TrainConfig, folder: RunFolder, logged: int | None = None) -> None:
        self._trackio.init(
            project=_PROJECT,
            name=folder.path.name,
            config=dataclasses.asdict(config),
            resume="never" if logged is None else "allow",
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._trackio.log(metrics, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._trackio.log({name: self._trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        self._trackio.finish()


def _package(name: str, requirement: str) -> Any:
    """A module that only this tracker needs; Any, because it need not be installed to type-check.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"output.trackers: expected {name} to be installed, got no module {error.name}; "
            f"pip install '{requirement}', or leave it out"
        ) from error


def _append_line(file: FileIO, path: Path, values: dict[str, Any]) -> None:
    before = os.fstat(file.fileno()).st_size
    try:
        _write_all(file, (json.dumps(values) + "\n").encode())
    except OSError as error:
        # A reader of the file must never meet half a line.
        file.truncate(before)
        raise storage_error(path, error) from error


def _write_all(file: FileIO, data: bytes) -> None:
    # An unbuffered write may take a part only, as on a disk that fills up.
    while data:
        data = data[file.write(data) :]
