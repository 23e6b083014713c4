"""Ends a run that stands still, and says where it stood."""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from argrpo.engine.ranges import Ranges

_HUNG = 124  # the exit code, see argrpo/cli.py; that of coreutils' timeout
_STDERR = 2  # a progress bar may stand in for sys.stderr
_LOOKS = 10  # in the time that is allowed


class Watchdog:
    """A thread that looks whether ranges are still opened and closed.

    A phase that takes longer than allowed without either has its name and the stacks of all threads
    written to stderr and to a file, and the process ends with exit code 124. The time stands still
    while the machine sleeps.
    """

    def __init__(self, allowed_s: float, path: Path) -> None:
        """
        Args:
            allowed_s: seconds; 0 watches nothing.
            path: where the stacks go.
        """
        self._allowed_s = allowed_s
        self._path = path
        self._phases: list[str] = []
        self._moved = time.monotonic()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self._allowed_s > 0:
            self._is_over.clear()
            self._moved = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._thread is not None:
            self._is_over.set()
            self._thread.join()
            self._thread = None

    def watched(self, ranges: Ranges) -> Ranges:
        """The same ranges, each a sign of life when it opens and when it closes."""
        return lambda name: self._watched(name, ranges(name))

    @contextmanager
    def _watched(self, name: str, inside: AbstractContextManager[object]) -> Iterator[None]:
        self._phases.append(name)
        self._moved = time.monotonic()
        try:
            with inside:
                yield
        finally:
            self._phases.pop()
            self._moved = time.monotonic()

    def _watch(self) -> None:
        while not self._is_over.wait(self._allowed_s / _LOOKS):
            stood_s = time.monotonic() - self._moved
            if stood_s > self._allowed_s:
                self._end(stood_s)

    def _end(self, stood_s: float) -> None:
        where = " > ".join(self._phases) or "between steps"
        line = (
            f"argrpo: no progress for {stood_s:.0f} s in: {where}; allowed are "
            f"{self._allowed_s:g} s (fault.watchdog_s). The stacks are in {self._path}\n"
        )
        # The file may lie on the very disk that hangs: stderr comes first.
        os.write(_STDERR, line.encode())
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        threading.Timer(self._allowed_s / _LOOKS, os._exit, [_HUNG]).start()
        try:
            with self._path.open("w") as file:
                file.write(line)
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        finally:
            os._exit(_HUNG)
