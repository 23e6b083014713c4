"""SIGTERM, SIGINT and SIGUSR1: one wish, to save what there is and stop.

A signal that comes while work is under way that may be abandoned, as drawing, judging or the passes
of a micro-batch, ends it there; anywhere else it waits for the next such place. So weights, moments
and counters are never caught between two states.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from argrpo.ranks import meet, num_ranks

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ABORTED = 130  # the exit code, see argrpo/cli.py
# torchrun passes Ctrl-C on to processes that the terminal has told already: no second wish.
_ECHO_S = 1.0


class Preempted(KeyboardInterrupt):
    """A signal asked the run to stop, and it was saved. A notebook shows it as an interrupt."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


class StopSignals:
    """Hears the signals while it is entered.

    A second one, a second or more after the first, ends the process at once: what is on the disk is
    whole at any instant. Heard in the main thread alone, as Python has it; elsewhere signals do
    what they did before.
    """

    def __init__(self) -> None:
        self._wished: str | None = None
        self._first = 0.0
        self._may_break = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    @contextmanager
    def breakable(self, place: str) -> Iterator[None]:
        """Around work that may be abandoned; all ranks enter it together.

        Of several ranks none may leave the others alone: the wish is looked at on the way in.

        Raises:
            Preempted: a signal came, before or inside.
        """
        self.check(place)
        with self.breakable_alone(place):
            yield

    @contextmanager
    def breakable_alone(self, place: str) -> Iterator[None]:
        """As `breakable`, where one rank is all there is; with several the work is carried out.

        Raises:
            Preempted: a signal came, before or inside.
        """
        self._may_break = num_ranks() == 1
        try:
            if self._may_break and self._wished is not None:
                raise Preempted(self._wished)
            yield
        finally:
            self._may_break = False

    def check(self, place: str) -> None:
        """
        Args:
            place: in the program, the same on all ranks.

        Raises:
            Preempted: a signal came, to this rank or another.
        """
        if meet(place, wish=self._wished is not None):
            raise Preempted(self._wished or "a signal to another rank")

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._wished is None:
            self._wished, self._first = signal.Signals(number).name, now
            if self._may_break:
                raise Preempted(self._wished)
        elif now - self._first >= _ECHO_S:
            os.write(2, b"argrpo: stopped at once by a second signal\n")
            os._exit(_ABORTED)
