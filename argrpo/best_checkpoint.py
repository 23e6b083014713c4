"""The policy of the best evaluation of a run, kept under checkpoints/best."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Literal

from argrpo.models.image_policy import ImagePolicy
from argrpo.models.loading import save_policy
from argrpo.ranks import is_first
from argrpo.run_folder import RunFolder, point_to, write_atomically

_LOG = logging.getLogger(__name__)


class BestCheckpoint:
    """Remembers the best value of a metric and keeps the policy that had it.

    checkpoints/best is a link to a folder beside it, and changes from one whole policy to the next
    in a moment. Its best.json says the step and what was measured.
    """

    def __init__(self, folder: RunFolder, metric: str, mode: Literal["max", "min"]) -> None:
        self._folder = folder
        self._metric = metric
        self._mode = mode
        self._value: float | None = None

    @property
    def value(self) -> float | None:
        """The best so far."""
        return self._value

    def go_on(self, value: float | None) -> None:
        """Take up where `value` was read, as far as that policy is still kept here."""
        self._value = value if self._folder.best_path.exists() else None

    @property
    def path(self) -> Path | None:
        """The folder of the best policy; None while there is none."""
        return None if self._value is None else self._folder.best_path

    def improves(self, metrics: dict[str, float]) -> bool:
        """Whether metrics hold a better value than all before; the first finite one is."""
        value = metrics.get(self._metric)
        if value is None:
            return False
        if not math.isfinite(value):
            _LOG.warning(
                "%s: expected a finite number to choose the best policy by, got %s; the one that "
                "is kept stays",
                self._metric,
                value,
            )
            return False
        if self._value is None:
            return True
        return value > self._value if self._mode == "max" else value < self._value

    def save(self, policy: ImagePolicy, step: int, metrics: dict[str, float]) -> None:
        """Keep the policy in place of the one before; of several ranks the first writes it.

        Args:
            policy: with the weights that were measured.
            step: after which it stands; 0 is before training.
            metrics: of which eval/... and the metric's own value are written beside it.

        Raises:
            StorageError, OSError: the disk is full or refused; the policy before is still there.
        """
        if is_first():
            self._write(policy, step, metrics)
        self._value = metrics[self._metric]

    def _write(self, policy: ImagePolicy, step: int, metrics: dict[str, float]) -> None:
        kept = self._folder.best_of(step)
        # Left by a run in this folder that failed before its first step, or was killed meanwhile.
        for left in (kept, *kept.parent.glob(".best_step_*.part")):
            shutil.rmtree(left, ignore_errors=True)
        record = {
            "step": step,
            "metric": self._metric,
            "mode": self._mode,
            "value": metrics[self._metric],
            "metrics": {
                name: number if math.isfinite(number) else None
                for name, number in metrics.items()
                if name.startswith("eval/")
            },
        }
        text = json.dumps(record, indent=2) + "\n"
        save_policy(policy, kept)
        write_atomically(kept / "best.json", lambda part: part.write_text(text))
        point_to(self._folder.best_path, kept)
        for old in kept.parent.glob("best_step_*"):
            if old != kept:
                shutil.rmtree(old, ignore_errors=True)
