"""The folder of a run: what lies where, and writing a file whole or not at all.

config.yaml  metrics.jsonl  environment.json  samples/step_000100.png
checkpoints/step_000100/    checkpoints/best  evaluations.jsonl  evaluation.json  report.html
reward_extras.jsonl
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from argrpo.config import TrainConfig
from argrpo.ranks import own_rank

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNDER_A_FILE = (FileExistsError, NotADirectoryError)


class StorageError(RuntimeError):
    """The disk would not take a file: full, read-only or not permitted."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run. Making the record touches no disk; `create` does."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, *, may_hold_run: bool = False) -> "RunFolder":
        """A folder for a new run, made where it does not stand yet.

        Args:
            path: of the folder.
            may_hold_run: take one with a run too, which then goes on.

        Raises:
            ValueError: the folder holds another run, is a file, or cannot be written.
        """
        folder = cls(Path(path).expanduser())
        if folder.holds_run and not may_hold_run:
            raise ValueError(
                f"output_dir: expected a folder without a run, got {folder.path}, which holds one; "
                "resume it (--resume auto), choose another, or remove it"
            )
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            # Asked of the disk, because permission bits say nothing to root or on a read-only mount
            probe = folder.path / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except _UNDER_A_FILE as error:
            raise ValueError(
                f"output_dir: expected a folder, got {path}, which is or lies under a file; "
                "choose another"
            ) from error
        except OSError as error:
            raise ValueError(
                f"output_dir: expected a folder that can be written, got {path} "
                f"({_reason(error)}); choose another"
            ) from error
        return folder

    @classmethod
    def numbered(cls, path: str | Path) -> "RunFolder":
        """As `create`, but path-2, path-3, ... where a folder of that name is taken.

        Raises:
            ValueError: it cannot be written.
        """
        first = Path(path)
        wanted, number = first, 1
        while wanted.exists():
            number += 1
            wanted = first.with_name(f"{first.name}-{number}")
        return cls.create(wanted)

    @property
    def holds_run(self) -> bool:
        """Whether a run has finished a step here. One that failed before may be tried again."""
        if self.metrics_path.is_file() and self.metrics_path.stat().st_size > 0:
            return True
        checkpoints = self.path / "checkpoints"
        if not checkpoints.is_dir():
            return checkpoints.exists()
        # The policy before training may be the best so far, and is no step.
        base = (self.best_path, self.best_of(0))
        found = (path for path in checkpoints.iterdir() if not path.name.startswith("."))
        return any(path not in base for path in found)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def environment_path(self) -> Path:
        return self.path / "environment.json"

    @property
    def evaluation_path(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def evaluations_path(self) -> Path:
        """One object an evaluation while training, that of the policy before it included."""
        return self.path / "evaluations.jsonl"

    @property
    def reward_extras_path(self) -> Path:
        """What reward functions gave to log_extra: one object a step and function."""
        return self.path / "reward_extras.jsonl"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def samples_path(self) -> Path:
        """The folder of the grids."""
        return self.path / "samples"

    def samples(self, step: int) -> Path:
        """The grid drawn after a step; 0 is the policy before training."""
        return self.samples_path / f"step_{step:06d}.png"

    @property
    def checkpoints_path(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / "checkpoints"

    @property
    def watchdog_path(self) -> Path:
        """Where the stacks of a run that stood still are; each rank has its own."""
        rank = f"_rank_{own_rank()}" if own_rank() else ""
        return self.path / f"watchdog{rank}.txt"

    def checkpoint(self, step: int) -> Path:
        """The folder of the run after a step; the policy in it is for load_policy."""
        return self.checkpoints_path / f"step_{step:06d}"

    @property
    def best_path(self) -> Path:
        """The policy of the best evaluation: a link to a folder beside it."""
        return self.path / "checkpoints" / "best"

    def best_of(self, step: int) -> Path:
        """The folder that `best_path` leads to while the best evaluation is that of a step."""
        return self.path / "checkpoints" / f"best_step_{step:06d}"

    def discard_if_empty(self) -> None:
        """Remove the folder if nothing was left in it, as when a run was refused at its start."""
        with suppress(OSError):
            self.path.rmdir()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is there whole or not at all.

    Args:
        path: the file; its folder is made where needed, and a file that stands is replaced.
        write: writes the file that it is given, a hidden sibling of `path` with the same suffix.

    Raises:
        StorageError: the disk is full or refused; neither file is left behind.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        _flush_to_disk(part)
        os.replace(part, path)
        _flush_to_disk(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def point_to(link: Path, folder: Path) -> None:
    """Let a name lead to a folder beside it, from one moment to the next.

    Args:
        link: the name; where it leads somewhere already, it then leads here.
        folder: stands whole; its files are on the disk before the name leads to them.

    Raises:
        StorageError: the disk is full or refused; the name leads where it did.
    """
    part = link.with_name(f".{link.name}.{os.getpid()}.part")
    try:
        for path in [*folder.iterdir(), folder]:
            _flush_to_disk(path)
        part.symlink_to(folder.name, target_is_directory=True)
        os.replace(part, link)
        _flush_to_disk(link.parent)
    except OSError as error:
        raise storage_error(link, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def config_text(config: TrainConfig) -> str:
    """A config as YAML that --config reads back."""
    text: str = yaml.safe_dump(plain(asdict(config)), sort_keys=False, allow_unicode=True)
    return text


def storage_error(path: Path, error: OSError) -> StorageError:
    """One line about a file that could not be written, with what to do."""
    if error.errno in _FULL:
        return StorageError(
            f"{path}: expected room for a file, got a full disk ({_reason(error)}); nothing was "
            "left half-written. Free some space or choose another output_dir"
        )
    found = "a path under a file" if isinstance(error, _UNDER_A_FILE) else _reason(error)
    return StorageError(f"{path}: expected a file that can be written, got {found}")


def plain(value: Any) -> Any:
    """Tuples as lists: what JSON has, and YAML without tags."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
