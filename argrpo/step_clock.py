"""Where the wall time of a step goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from argrpo.engine.ranges import Ranges, no_ranges

PHASES = ("rollout", "decode", "reward", "logprob", "update")


class StepClock:
    """Wall time of a step, split by phase. On a GPU a phase ends when its work is done.

    A phase is a range of the same name for whoever profiles the run.
    """

    def __init__(
        self,
        device: torch.device,
        ranges: Ranges = no_ranges,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`seconds` counts up; benches on a busy CPU take the time of the process alone."""
        self._device = device
        self._read = seconds
        self._ranges = ranges
        self._seconds: dict[str, float] = {}
        self._started = 0.0

    def start_step(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._started = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside to one of `PHASES`."""
        with self._ranges(name):
            started = self._now()
            try:
                yield
            finally:
                self._seconds[name] += self._now() - started

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """As `phase`, where phases overlap on a GPU: the time of the host alone, so that what is
        queued counts to the phase that waits for it."""
        with self._ranges(name):
            started = self._read()
            try:
                yield
            finally:
                self._seconds[name] += self._read() - started

    def finish_step(self, num_images: int, num_tokens: int) -> dict[str, float]:
        """step_time and time/<phase> in seconds, and what they amount to."""
        elapsed = self._now() - self._started
        return {
            "step_time": elapsed,
            **{f"time/{name}": seconds for name, seconds in self._seconds.items()},
            "images_per_second": num_images / elapsed,
            "num_tokens": float(num_tokens),
        }

    def _now(self) -> float:
        # The queue has to be empty, or a phase would be charged for the one before it.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._read()
