"""A second queue of work on a GPU, beside the one that draws and learns."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """On a device without streams it is the caller's own thread of work."""

    def __init__(self, device: torch.device, *, is_used: bool = True) -> None:
        """Without `is_used` nothing leaves the caller's stream."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and is_used:
            self._stream = torch.cuda.Stream(device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is launched inside comes after all that the caller has launched so far, and beside
        what the caller launches after."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def lead_caller(self) -> None:
        """What the caller launches from here on comes after all that was launched inside."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
