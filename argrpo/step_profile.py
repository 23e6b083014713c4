"""Traces of single steps of a run.

    torch   torch.profiler, on any device; one trace file of the steps in the run folder
    nsys    NVTX ranges, and the capture range that `nsys --capture-range=cudaProfilerApi` waits for

Off, a run opens ranges that are one shared object doing nothing, and neither nvtx nor the profiler
is imported.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from argrpo.engine.ranges import Ranges, no_ranges
from argrpo.nvtx_ranges import ENGINE_DOMAIN, TRAINER_DOMAIN, nvtx_ranges
from argrpo.profile_config import ProfileConfig
from argrpo.run_folder import RunFolder, write_atomically

if TYPE_CHECKING:
    from torch.profiler import profile


class StepProfile:
    """Hands out ranges, and traces the steps that a config names."""

    def __init__(self, config: ProfileConfig, device: torch.device, folder: RunFolder) -> None:
        """
        Raises:
            ValueError: nsys is asked for without a GPU or without the package nvtx.
        """
        self._config, self._device = config, device
        self._profiler: profile | None = None
        self._is_tracing = False
        self.ranges: Ranges = no_ranges
        """Of the trainer."""
        self.engine_ranges: Ranges = no_ranges
        self.trace_path: Path | None = None
        """Where the trace will stand; None where nothing writes one."""
        if config.steps is None:
            return
        if config.tool == "nsys":
            if device.type != "cuda":
                raise ValueError(
                    f"profile.tool: expected torch on a {device.type}, got nsys, which traces a GPU"
                )
            self.ranges = self._while_tracing(nvtx_ranges(TRAINER_DOMAIN))
            self.engine_ranges = self._while_tracing(nvtx_ranges(ENGINE_DOMAIN))
        else:
            self.ranges = self.engine_ranges = self._while_tracing(torch.profiler.record_function)
            first, last = config.steps
            self.trace_path = folder.path / "profile" / f"steps_{first:06d}_{last:06d}.json.gz"

    def tracing(self, step: int) -> AbstractContextManager[object]:
        """Around all that happens in a step, 0-based; the trace is written after the last one.

        Raises:
            StorageError: the disk is full or refused.
        """
        steps = self._config.steps
        if steps is None or not steps[0] <= step + 1 <= steps[1]:
            return nullcontext()
        return self._traced(is_first=step + 1 == steps[0], is_last=step + 1 == steps[1])

    @contextmanager
    def _traced(self, *, is_first: bool, is_last: bool) -> Iterator[None]:
        if is_first:
            self._start()
        try:
            yield
        except BaseException:
            # A trace that lacks steps is not what was asked for.
            self._stop()
            raise
        if is_last:
            profiler = self._profiler
            self._stop()
            if profiler is not None and self.trace_path is not None:
                write_atomically(
                    self.trace_path, lambda part: profiler.export_chrome_trace(str(part))
                )

    def _start(self) -> None:
        self._wait()
        if self._config.tool == "nsys":
            torch.cuda.profiler.start()
        else:
            self._profiler = torch_profiler(self._config, self._device)
            self._profiler.start()
        self._is_tracing = True

    def _stop(self) -> None:
        self._is_tracing = False
        self._wait()
        if self._config.tool == "nsys":
            torch.cuda.profiler.stop()
        elif self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _while_tracing(self, ranges: Ranges) -> Ranges:
        return lambda name: ranges(name) if self._is_tracing else no_ranges(name)


def torch_profiler(config: ProfileConfig, device: torch.device) -> "profile":
    """A profiler of a device, which counts the host in."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(
        activities=activities,
        with_stack=config.with_stack,
        record_shapes=config.with_shapes,
        profile_memory=config.with_memory,
    )
