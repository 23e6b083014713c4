"""What checkpoints of a run are called, in which order they come, and which of them are kept."""

import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LATEST = "latest"
_NAME = re.compile(r"step_(\d{6,})(?:_update_(\d+))?")


class Position(NamedTuple):
    """Where in a run a checkpoint was taken; later positions compare as larger."""

    step: int  # finished steps
    num_updates: int | None = None  # optimizer steps into the next one; None: between two steps

    @property
    def name(self) -> str:
        within = "" if self.num_updates is None else f"_update_{self.num_updates:02d}"
        return f"step_{self.step:06d}{within}"

    @property
    def order(self) -> tuple[int, int]:
        """For sorting."""
        return self.step, -1 if self.num_updates is None else self.num_updates


def positions(folder: Path) -> list[tuple[Position, Path]]:
    """The checkpoints under a folder by their names, the newest first, whole or not."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            updates = None if match[2] is None else int(match[2])
            found.append((Position(int(match[1]), updates), path))
    return sorted(found, key=lambda pair: pair[0].order, reverse=True)


def prune(folder: Path, *, keep_last: int | None, keep_every: int | None) -> None:
    """Remove checkpoints that are not to be kept, and those inside steps that are finished.

    Args:
        folder: of all checkpoints.
        keep_last: as many of the newest stay; None keeps all.
        keep_every: those of steps that it divides stay beside them.
    """
    every = positions(folder)
    newest = every[0][1] if every else None
    between = [pair for pair in every if pair[0].num_updates is None]
    recent = {path for _, path in (between if keep_last is None else between[:keep_last])}
    for position, path in every:
        is_kept = path in recent or path == newest
        if keep_every is not None and position.num_updates is None:
            is_kept = is_kept or position.step % keep_every == 0
        if not is_kept:
            _remove(path)


def remove_parts(folder: Path) -> None:
    """Remove what processes that were killed left half-written, or half-removed.

    Not what belongs to the best policy: another thread may be writing it at this moment.
    """
    for pattern in (".step_*.part", ".step_*.old", ".reference.*.part", ".optimizer_*.part"):
        for part in folder.glob(pattern):
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)


def _remove(path: Path) -> None:
    """Under a hidden name first: with half its files gone it would look like a damaged one."""
    hidden = path.with_name(f".{path.name}.old")
    with suppress(OSError):
        path.rename(hidden)
        shutil.rmtree(hidden)
