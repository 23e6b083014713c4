"""How long an operation takes, how much of that its bytes and operations explain, and on what.

Time is taken over one pass through a list of calls, one call an input set, and divided by their
number. The list decides about the cache: `hot_calls` repeats one set, `cold_calls` passes through
as many sets as hold twice the L2, so that no call finds its inputs there. On a GPU a pass is one
replay of a captured graph between two events, and what a launch costs the host stays outside.

Ceilings are measured in the same run, on random data: a large copy, counting bytes read and bytes
written, and a large matrix product. Zeros would run faster than any real input.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Call = Callable[[], object]
MAX_INPUT_SETS = 128


class Clock(Protocol):
    """Seconds that a piece of work takes."""

    def seconds(self, work: Call) -> float: ...


class WallClock:
    """The host's clock, for work on a CPU."""

    def seconds(self, work: Call) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


class ProcessClock:
    """CPU seconds of this process, for one thread on a machine that others use.

    What the wall clock would show if nobody else worked, but for the caches that they fill.
    """

    def seconds(self, work: Call) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start


class EventClock:
    """The device's clock: two events around the work, in the stream that it is queued in."""

    def seconds(self, work: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock for work on this device."""
    return EventClock() if device.type == "cuda" else WallClock()


def clock_named(name: str, device: torch.device, threads: int) -> Clock:
    """The clock that `--clock` names: wall, or process for one thread of a CPU.

    Raises:
        ValueError: process on a GPU, or with several threads, whose seconds would add up.
    """
    if name == "wall":
        return clock_of(device)
    if device.type != "cpu" or threads != 1:
        raise ValueError(
            f"clock: expected wall on a {device.type} with {threads} thread(s), got {name}; "
            "process wants --device cpu --threads 1"
        )
    return ProcessClock()


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: percentiles over the samples."""

    p20_us: float
    p50_us: float
    p80_us: float
    samples: int

    @property
    def spread(self) -> float:
        """How far the middle 60 % of the samples lie apart, as a part of the median."""
        return (self.p80_us - self.p20_us) / self.p50_us

    def shared(self, calls: int) -> "Timing":
        """One call's part of the time of a pass through so many."""
        return Timing(self.p20_us / calls, self.p50_us / calls, self.p80_us / calls, self.samples)


@dataclass(frozen=True)
class Work:
    """The least that one call must move and compute."""

    num_bytes: int
    flops: int


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run."""

    bytes_per_second: float
    flops_per_second: float

    def floor_us(self, work: Work) -> float:
        """No call can take less than its bytes or its operations take."""
        moving = work.num_bytes / self.bytes_per_second
        computing = work.flops / self.flops_per_second
        return max(moving, computing) * 1e6

    def percent(self, timing: Timing, work: Work) -> float:
        """The floor over the median, in percent; 100 is the roofline."""
        return 100 * self.floor_us(work) / timing.p50_us


def measure(calls: Sequence[Call], clock: Clock, *, warmup: int = 3, samples: int = 30) -> Timing:
    """Time passes through the calls.

    Args:
        calls: one call an input set, see `hot_calls` and `cold_calls`.
        clock: `clock_of` the device.
        warmup: passes that are not counted: compilation, allocation, clocks that rise.
        samples: passes that are.

    Raises:
        ValueError: no calls or no samples.
    """
    if not calls or samples < 1:
        raise ValueError(f"calls, samples: expected at least 1, got {len(calls)}, {samples}")

    def one_pass() -> None:
        for call in calls:
            call()

    for _ in range(warmup):
        clock.seconds(one_pass)
    taken = sorted(clock.seconds(one_pass) for _ in range(samples))
    each = [seconds * 1e6 / len(calls) for seconds in taken]
    return Timing(_percentile(each, 20), _percentile(each, 50), _percentile(each, 80), samples)


def measure_graph(calls: Sequence[Call], *, samples: int = 30) -> Timing:
    """`measure` on a GPU, the pass captured once and replayed: no host time between the calls."""
    return measure([captured(calls).replay], EventClock(), samples=samples).shared(len(calls))


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of the calls in order. None of them may synchronise, see `synchronises`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture wants its kernels compiled and its memory warm
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own stream behind
    return graph


def synchronises(call: Call) -> bool:
    """Whether a call on a GPU waits for the device, and so cannot be captured.

    A capture that fails leaves the process's random state unusable; this asks before.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def hot_calls(call: Call, repeats: int = 20) -> list[Call]:
    """One input set again and again: it stays in the cache if it fits."""
    return [call] * repeats


def cold_calls(make_call: Callable[[], Call], set_bytes: int, cache_bytes: int) -> list[Call]:
    """One call for each of enough input sets that none is still in the cache at its turn.

    Args:
        make_call: makes an input set of fresh random data, and the call that uses it.
        set_bytes: bytes of one set, outputs included.
        cache_bytes: size of the last cache; `l2_bytes` of a GPU.
    """
    return [make_call() for _ in range(min(cold_sets(set_bytes, cache_bytes), MAX_INPUT_SETS))]


def cold_sets(set_bytes: int, cache_bytes: int) -> int:
    """How many input sets a pass needs so that each has left the cache when its turn comes."""
    return max(-(-2 * cache_bytes // max(set_bytes, 1)) + 1, 2)


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2, or a guess of 64 MiB for a CPU's last cache."""
    if device.type != "cuda":
        return 64 << 20
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def measure_ceilings(
    device: torch.device,
    clock: Clock,
    *,
    dtype: torch.dtype = torch.bfloat16,
    copy_bytes: int = 1 << 30,
    width: int = 8192,
) -> Ceilings:
    """Copy bandwidth and matrix rate, as the library reaches them.

    Args:
        device: where.
        clock: `clock_of(device)`.
        dtype: of the matrices.
        copy_bytes: of the tensor copied; several times the last cache.
        width: of the square matrices.
    """
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    copying = measure([lambda: target.copy_(source)], clock, samples=10)
    left, right = torch.randn(2, width, width, device=device).to(dtype)
    product: Tensor = torch.empty_like(left)
    multiplying = measure([lambda: torch.mm(left, right, out=product)], clock, samples=10)
    return Ceilings(
        2 * source.numel() * 4 / copying.p50_us * 1e6,
        2 * width**3 / multiplying.p50_us * 1e6,
    )


def ceilings_of(device: torch.device, dtype: torch.dtype, clock: Clock | None = None) -> Ceilings:
    """What a device reaches now, by its own clock unless another is given; by smaller work on a
    CPU, which is slower by a thousand."""
    clock = clock_of(device) if clock is None else clock
    if device.type == "cuda":
        return measure_ceilings(device, clock, dtype=dtype)
    return measure_ceilings(device, clock, dtype=dtype, copy_bytes=1 << 28, width=1024)


@contextmanager
def pinned_threads(count: int) -> Iterator[None]:
    """Run PyTorch on `count` threads that stay on as many cores; both as before at the end.

    Raises:
        ValueError: this process may not use so many cores.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(allowed):
        raise ValueError(f"threads: expected 1 to {len(allowed)}, got {count}")
    before = torch.get_num_threads()
    os.sched_setaffinity(0, allowed[:count])
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.sched_setaffinity(0, allowed)


def _percentile(ordered: Sequence[float], percent: float) -> float:
    """Between neighbours, linearly."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
