"""Writes checkpoints while the run goes on."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from argrpo.checkpoint_names import prune
from argrpo.checkpoints import Snapshot, write_checkpoint
from argrpo.non_finite import NonFiniteError

_LOG = logging.getLogger(__name__)

_LIVE = "expected finite weights in a checkpoint, got others"


class CheckpointWriter:
    """One checkpoint at a time is written by a thread, from a copy in the host's memory.

    What went wrong there is raised by the next call of anything here.
    """

    def __init__(
        self, folder: Path, *, keep_last: int | None, keep_every: int | None, reference: str | None
    ) -> None:
        """
        Args:
            folder: of all checkpoints.
            keep_last, keep_every: see `OutputConfig`.
            reference: the name of the frozen reference's folder, where it stands already.
        """
        self._folder = folder
        self._keep = (keep_last, keep_every)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.reference = reference

    def save(self, snapshot: Snapshot) -> None:
        """Copy a snapshot and begin to write it; its tensors may change when this returns.

        Waits for the checkpoint before it first.

        Raises:
            StorageError, NonFiniteError: of the checkpoint before.
        """
        self.wait()
        copied = replace(
            snapshot,
            model=_copies(snapshot.model),
            tensors=_copies(snapshot.tensors),
            reference=None if snapshot.reference is None else _copies(snapshot.reference),
        )
        self._thread = threading.Thread(target=self._write, args=[copied], name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """
        Raises:
            StorageError, NonFiniteError: a checkpoint could not be written.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until all is on the disk; raises as `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def finish(self) -> None:
        """Wait where something else ends the run; what went wrong here is logged beside it."""
        try:
            self.wait()
        except Exception as error:
            _LOG.error("checkpoint: %s", error)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            # Here, where it costs the run no time. The guard of each step keeps weights finite as
            # long as sums do not overflow; whatever comes, no such checkpoint is ever written.
            for name, weight in snapshot.model.items():
                if not weight.isfinite().all():
                    raise NonFiniteError(f"{snapshot.position.name}: {name}: {_LIVE}")
            _, self.reference = write_checkpoint(self._folder, snapshot, self.reference)
            prune(self._folder, keep_last=self._keep[0], keep_every=self._keep[1])
        except Exception as error:
            self._error = error


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, and nobody else's; of a GPU's all are under way at once."""
    copies = {
        name: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        copies[name].copy_(tensor.detach(), non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies
