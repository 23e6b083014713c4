"""bench/timing.py with a clock that says what it is told."""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def timing() -> ModuleType:
    """The script's file as a module; bench/ is no package."""
    found = importlib.util.spec_from_file_location("bench_timing", ROOT / "bench" / "timing.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


class FakeClock:
    """Runs the work and returns the next of the seconds that it was given."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self._seconds: Iterator[float] = iter(seconds)

    def seconds(self, work: Callable[[], object]) -> float:
        work()
        return next(self._seconds)


def test_percentiles_are_of_the_counted_samples_alone(timing: ModuleType) -> None:
    clock = FakeClock([9.0, 9.0, 4e-6, 1e-6, 2e-6, 5e-6, 3e-6, 6e-6])
    got = timing.measure([lambda: None], clock, warmup=2, samples=6)
    assert (got.p20_us, got.p50_us, got.p80_us) == pytest.approx((2.0, 3.5, 5.0))
    assert got.samples == 6
    assert got.spread == pytest.approx(3 / 3.5)


def test_a_pass_takes_every_input_set_in_turn_and_its_time_is_shared(timing: ModuleType) -> None:
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) for i in range(4)]
    got = timing.measure(calls, FakeClock([1.0, 8e-6, 8e-6]), warmup=1, samples=2)
    assert seen == [0, 1, 2, 3] * 3
    assert got.p50_us == pytest.approx(2.0)


def test_nothing_to_time_is_refused(timing: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"calls, samples: expected at least 1, got 0, 30"):
        timing.measure([], FakeClock([]))


def test_the_floor_is_the_slower_of_moving_and_computing(timing: ModuleType) -> None:
    ceilings = timing.Ceilings(bytes_per_second=4e12, flops_per_second=8e14)
    taken = timing.Timing(9.0, 10.0, 12.0, samples=5)
    moving = timing.Work(num_bytes=20_000_000, flops=8_000_000)
    computing = timing.Work(num_bytes=4, flops=6_400_000_000)
    assert ceilings.floor_us(moving) == pytest.approx(5.0)
    assert ceilings.percent(taken, moving) == pytest.approx(50)
    assert ceilings.floor_us(computing) == pytest.approx(8.0)
    assert ceilings.percent(taken, computing) == pytest.approx(80)


def test_ceilings_come_from_a_copy_and_a_product_of_this_run(timing: ModuleType) -> None:
    clock = FakeClock([2e-3] * 13 + [1e-3] * 13)
    got = timing.measure_ceilings(
        torch.device("cpu"), clock, dtype=torch.float32, copy_bytes=4096, width=8
    )
    assert got.bytes_per_second == pytest.approx(2 * 4096 / 2e-3)
    assert got.flops_per_second == pytest.approx(2 * 8**3 / 1e-3)


@pytest.mark.parametrize(
    ("set_bytes", "number"), [(50 << 20, 3), (1 << 30, 2), (1 << 20, 101), (1, 128)]
)
def test_cold_calls_pass_through_twice_the_cache(
    timing: ModuleType, set_bytes: int, number: int
) -> None:
    made: list[int] = []

    def make_call() -> Callable[[], object]:
        made.append(len(made))
        return made.copy

    calls = timing.cold_calls(make_call, set_bytes, cache_bytes=50 << 20)
    assert len(calls) == len(made) == number


def test_hot_calls_use_one_set(timing: ModuleType) -> None:
    def call() -> None:
        return None

    assert timing.hot_calls(call, 3) == [call, call, call]


def test_threads_and_cores_are_given_back(timing: ModuleType) -> None:
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    with pytest.raises(RuntimeError, match="inside"), timing.pinned_threads(1):
        assert torch.get_num_threads() == 1
        assert len(os.sched_getaffinity(0)) == 1
        raise RuntimeError("inside")
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before
    with pytest.raises(ValueError, match=r"threads: expected 1 to \d+, got 0"):
        timing.pinned_threads(0).__enter__()


def test_the_wall_clock_runs_forward(timing: ModuleType) -> None:
    clock = timing.clock_of(torch.device("cpu"))
    assert isinstance(clock, timing.WallClock)
    assert 0 <= clock.seconds(lambda: sum(range(10_000))) < 10


def test_a_call_that_waits_for_the_device_is_found_before_it_is_captured(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waiting() -> None:
        assert modes[-1] == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    def broken() -> None:
        raise RuntimeError("out of memory")

    assert not timing.synchronises(lambda: None)
    assert timing.synchronises(waiting)
    with pytest.raises(RuntimeError, match="out of memory"):
        timing.synchronises(broken)
    assert modes == ["error", "default"] * 3


@pytest.mark.gpu
def test_reading_a_number_is_a_wait_and_adding_is_none(timing: ModuleType) -> None:
    values = torch.ones(8, device="cuda")
    assert timing.synchronises(lambda: values.sum().item())
    assert not timing.synchronises(lambda: values.add_(1))


@pytest.mark.gpu
def test_a_graph_of_copies_takes_what_its_bytes_take(timing: ModuleType) -> None:
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    ceilings = timing.measure_ceilings(source.device, timing.EventClock(), width=1024)
    got = timing.measure_graph(timing.hot_calls(lambda: target.copy_(source), 3), samples=5)
    # The same copy as the ceiling's: 10 % for clocks that move between the two.
    work = timing.Work(2 * source.numel() * 4, 0)
    assert 90 <= ceilings.percent(got, work) <= 110
    assert torch.equal(source, target)


def test_the_clock_of_the_process_counts_no_waiting(timing: ModuleType) -> None:
    cpu = torch.device("cpu")
    wall, process = (timing.clock_named(name, cpu, 1) for name in ("wall", "process"))
    assert wall.seconds(lambda: time.sleep(0.05)) >= 0.05
    assert process.seconds(lambda: time.sleep(0.05)) < 0.05
    assert process.seconds(lambda: sum(range(300_000))) > 0


def test_the_clock_of_the_process_is_for_one_thread_of_a_cpu(timing: ModuleType) -> None:
    for device, threads in (("cpu", 2), ("cuda", 1)):
        with pytest.raises(ValueError, match="process wants --device cpu --threads 1"):
            timing.clock_named("process", torch.device(device), threads)
