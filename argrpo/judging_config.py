"""Settings of how judges are asked, whatever they say."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class JudgingConfig:
    """When judges work, how long they may take, and what happens where they fail."""

    overlap: bool = True
    """Decode images and let judges begin while others are still being drawn; changes the time of a
    step and not one bit of its scores."""

    deadline_s: float = 600.0
    """Seconds that a step waits for judges behind a server once they have its last image; images
    without a score by then are not scored."""

    max_failure_rate: float = 0.5
    """Share of a step's images, in [0, 1], that a judge with a weight may fail to score."""

    patience: int = 3
    """Steps in a row above max_failure_rate after which the run saves a checkpoint and ends, with
    exit code 69."""

    monitor_every: int | None = None
    """Steps between measurements by the judges under monitors; None: beside every sample grid."""

    def __post_init__(self) -> None:
        if not 0 < self.deadline_s < math.inf:
            raise ValueError(
                f"judging.deadline_s: expected a finite number above 0, got {self.deadline_s}"
            )
        if not 0 <= self.max_failure_rate <= 1:
            raise ValueError(
                "judging.max_failure_rate: expected a number in [0, 1], got "
                f"{self.max_failure_rate}"
            )
        if self.patience < 1:
            raise ValueError(f"judging.patience: expected at least 1, got {self.patience}")
        if self.monitor_every is not None and self.monitor_every < 1:
            raise ValueError(
                "judging.monitor_every: expected at least 1, or null for beside every grid, got "
                f"{self.monitor_every}"
            )
