"""How many images go through a pass together; half as many once they did not fit."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


class MicroBatch:
    """Images of a forward and backward pass."""

    def __init__(self, size: int, *, may_shrink: bool = True) -> None:
        """`may_shrink`: whether this process may take more passes than others do."""
        self.size = size
        self._asked = size
        self._may_shrink = may_shrink

    def fitted(self, work: Callable[[int], Result], undo: Callable[[], None]) -> Result:
        """Do work that takes so many images at a time; again with half of them if memory is short.

        Args:
            work: its result does not depend on the number it is given.
            undo: brings back what work found, before it is done again.

        Raises:
            torch.OutOfMemoryError: half did not fit either, or had been tried before; with numbers.
        """
        try:
            return work(self.size)
        except torch.OutOfMemoryError as error:
            if self.size < self._asked or self.size == 1 or not self._may_shrink:
                raise self._told() from error
        # Behind the except block, whose traceback holds the tensors that did not fit.
        undo()
        _free_cache()
        self.size = -(-self.size // 2)
        _LOG.warning(
            "micro_batch: %d images did not fit into memory%s; the pass is done again with %d, on "
            "the same draws, and so is the rest of the run",
            self._asked,
            _use(),
            self.size,
        )
        try:
            return work(self.size)
        except torch.OutOfMemoryError as error:
            raise self._told() from error

    def _told(self) -> torch.OutOfMemoryError:
        tried = f"{self._asked} and then {self.size}" if self.size < self._asked else f"{self.size}"
        return torch.OutOfMemoryError(
            f"micro_batch: expected {tried} images at a time to fit into memory, and they did "
            f"not{_use()}; lower micro_batch or kv_bytes, or set gradient_checkpointing"
        )


def _use() -> str:
    """Of the GPU's memory, in words; of a CPU's nothing is said."""
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    return (
        f" ({peak / 2**30:.1f} GiB of tensors at most, {free / 2**30:.1f} of "
        f"{total / 2**30:.1f} GiB free)"
    )


def _free_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
