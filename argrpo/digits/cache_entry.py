"""Entries of the cache of embedded models: built once, whole or not at all.

An entry is written beside its place under a hidden name and moved there whole: an interrupted build
leaves no entry, and of two processes that ask at once one builds while the other waits.
"""

import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from argrpo.digits.training import Progress


def write_entry(entry: Path, fill: Callable[[Path], None]) -> None:
    """Fill a draft and move it to its place, where an entry that stands is replaced.

    Args:
        entry: its place; the lock of `building` is held.
        fill: writes into the folder that it is given.
    """
    prefix = f".{entry.name}."
    # The lock is held, so these are what killed builds left behind.
    for abandoned in entry.parent.glob(f"{prefix}*"):
        if abandoned.is_dir():
            shutil.rmtree(abandoned, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=prefix, dir=entry.parent))
    try:
        fill(draft)
        draft.chmod(0o755)  # mkdtemp makes folders that nobody else may read
        if entry.exists():
            shutil.rmtree(entry)
        draft.rename(entry)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


@contextmanager
def building(cache_dir: Path, name: str, progress: Progress) -> Iterator[None]:
    """Hold the lock of an entry, waiting for another process that builds it.

    Raises:
        OSError: the folder cannot be made or written.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = (cache_dir / f".{name}.lock").open("w")
    except OSError as error:
        raise OSError(
            f"cache_dir: expected a folder that can be written, got {cache_dir}: {error.strerror}"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process", 0, 1)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Closing the file lets go of the lock, also when the process is killed.
        yield
