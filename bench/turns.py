"""Measuring several contenders in one process, fairly: turns, peak memory, who else was working."""

import ctypes
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from timing import Call, Clock, Timing

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def measure_in_turns(
    calls: Mapping[str, Call], clock: Clock, *, warmup: int, samples: int
) -> dict[str, Timing]:
    """Time calls in turns, A B C A B C ..., so that all of them meet the machine in every mood.

    Args:
        calls: at least one, by name.
        clock: `clock_of` the device.
        warmup: turns that are not counted.
        samples: turns that are, at least 1.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + samples):
        for name, call in calls.items():
            seconds = clock.seconds(call)
            if turn >= warmup:
                taken[name].append(seconds * 1e6)
    return {name: timing_of(values) for name, values in taken.items()}


def timing_of(microseconds: list[float]) -> Timing:
    """Percentiles of at least one sample."""
    twice = microseconds if len(microseconds) > 1 else microseconds * 2
    fifths = statistics.quantiles(twice, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(twice), fifths[3], len(microseconds))


def sum_between(milliseconds: Mapping[int, float], positions: Iterable[int]) -> float:
    """The sum over positions of a time measured at some of them, linear between neighbours.

    Before the first and after the last position measured, the nearest one counts.
    """
    measured = sorted(milliseconds)
    total = 0.0
    for position in positions:
        low = max((p for p in measured if p <= position), default=measured[0])
        high = min((p for p in measured if p >= position), default=measured[-1])
        part = 0.0 if low == high else (position - low) / (high - low)
        total += milliseconds[low] + part * (milliseconds[high] - milliseconds[low])
    return total


@contextmanager
def kept_heap() -> Iterator[None]:
    """On a CPU, let freed memory stay with the process, for all contenders alike.

    The C library gives large temporaries back to the system and takes them again, page by page, at
    every step. How many pages depends on what ran before: a step of an eager loop took 153 ms
    without and 190 to 285 ms with them, on the same work.
    """
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:  # glibc's own values (mallopt(3))
        library.mallopt(_M_MMAP_MAX, 65536)
        library.mallopt(_M_TRIM_THRESHOLD, 128 << 10)
        library.malloc_trim(0)  # what was kept goes back


class PeakMemory:
    """The most bytes that a piece of work held beyond what was held before it."""

    def __init__(self, device: torch.device) -> None:
        """The work starts now."""
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        # What earlier work freed goes back to the system first, or it would be taken again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        # Puts this process's high-water mark back to what it holds now (proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before = _status_bytes("VmRSS")

    def taken(self) -> int:
        """Bytes until now."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _status_bytes("VmHWM") - self._before


class OtherWork:
    """How many cores worked for other processes: timings beside it are worth that much less."""

    def __init__(self) -> None:
        self._wall, self._ours, self._all = (
            time.perf_counter(),
            time.process_time(),
            _core_seconds(),
        )

    def busy_cores(self) -> float:
        """The average since the start."""
        wall = time.perf_counter() - self._wall
        theirs = _core_seconds() - self._all - (time.process_time() - self._ours)
        return max(theirs, 0.0) / wall


def _core_seconds() -> float:
    """Seconds that all cores together have worked since the machine started (proc_stat(5))."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in fields[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _status_bytes(field: str) -> int:
    """A size from this process's status, which counts in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
