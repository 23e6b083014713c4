"""How many bytes of tensors a stretch of code holds at most.

On a GPU the allocator knows. On a CPU every operation's results are followed from their making to
their freeing; what an operation holds only while it runs is not seen.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryUse(NamedTuple):
    """Bytes above what stood before."""

    peak: int
    kept: int  # at the end, by the result of what ran


def memory_use(run: Callable[[], object], device: torch.device) -> MemoryUse:
    """What `run` holds at most, and what its result holds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        kept = torch.cuda.memory_allocated(device) - before
        del result
        return MemoryUse(torch.cuda.max_memory_allocated(device) - before, kept)
    with _LiveTensors() as tensors:
        result = run()
        kept = tensors.now
        del result
    return MemoryUse(tensors.peak, kept)


class _LiveTensors(TorchDispatchMode):
    """Follows the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes: dict[int, int] = {}
        self.now = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _key(leaf) not in given:
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._bytes.pop(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
