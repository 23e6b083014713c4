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

    def start(self, config: TrainConfig, folder: RunFolder) -> None: ...

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

    def start(self, config: TrainConfig, folder: RunFolder) -> None:
        machine = json.dumps(environment(), indent=2) + "\n"
        write_atomically(folder.environment_path, lambda part: part.write_text(machine))
        settings = config_text(config)
        write_atomically(folder.config_path, lambda part: part.write_text(settings))
        self._path = folder.metrics_path
        self._file = self._path.open("ab", buffering=0)
        self._evaluations_path = folder.evaluations_path
        # Of a run that failed in this folder before its first step.
        self._evaluations_path.unlink(missing_ok=True)

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


class TensorBoardTracker:
    """Event files in the run folder, for `tensorboard --logdir`.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self) -> None:
        _package("tensorboard", "tensorboard")
        self._writer: Any = None

    def start(self, config: TrainConfig, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.path))

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

    def start(self, config: TrainConfig, folder: RunFolder) -> None:
        settings = dataclasses.asdict(config)
        name = folder.path.name
        self._wandb.init(project=_PROJECT, name=name, config=settings, dir=str(folder.path))

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

    def start(self, config: TrainConfig, folder: RunFolder) -> None:
        settings = dataclasses.asdict(config)
        self._trackio.init(project=_PROJECT, name=folder.path.name, config=settings)

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
