"""Where the work of a draw is queued: on a GPU a stream of its own, so that images of one wave are
decoded and judged while the next is drawn.

A step is captured as a CUDA graph and replayed. It takes nothing and returns nothing: it reads and
writes tensors that stay where they are, and does the same work on whatever they hold by then. On
any other device the queue is the caller's thread, and a replay is the step itself.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

Step: TypeAlias = Callable[[], None]

# Before a capture: kernels are compiled and loaded, and libraries take their workspaces.
_WARM_UPS = 2


@contextmanager
def plain_tensors(device: torch.device) -> Iterator[None]:
    """No gradients, and neither inference tensors nor autocast, whatever the caller is in.

    What is allocated for one draw is written by the next, which an inference tensor forbids;
    autocast would give the kernels other dtypes than the weights have.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        modes.enter_context(torch.autocast(device.type, enabled=False))
        yield


class DeviceQueue:
    """One queue of one engine."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    @property
    def runs_ahead(self) -> bool:
        """Whether what is queued is done later, while the caller goes on."""
        return self._stream is not None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is launched inside goes into the queue."""
        with plain_tensors(self.device):
            if self._stream is None:
                yield
            else:
                with torch.cuda.stream(self._stream):
                    yield

    def follow_caller(self) -> None:
        """What is queued from here on comes after all that the caller has launched."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def lead_caller(self) -> None:
        """What the caller launches from here on comes after all that is queued."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        """A point in the queue, for `hand_over`."""
        return None if self._stream is None else self._stream.record_event()

    def hand_over(self, mark: torch.cuda.Event | None, tensors: list[Tensor]) -> None:
        """Let the caller use tensors that were made in the queue before a mark, and no sooner."""
        if mark is None:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(stream)

    def captured(self, step: Step) -> Step:
        """What replays `step`. On a GPU it runs a few times first: call this while rows are idle.

        Args:
            step: one decode step, or several, without any wait for the device.
        """
        if self._stream is None:
            return step
        with torch.cuda.device(self.device), self.entered():
            for _ in range(_WARM_UPS):
                step()
            graph = torch.cuda.CUDAGraph()
            # One memory for all graphs: none runs beside another, and none keeps a result. Other
            # threads (data loaders, watchdogs) go on with their calls while this one captures.
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            ):
                step()
        return graph.replay
