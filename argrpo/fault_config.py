"""Settings for when something goes wrong in a run."""

from dataclasses import dataclass
from typing import Literal

from argrpo.setting_checks import at_least


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """What a run does about numbers that are none, and about standing still."""

    on_non_finite: Literal["stop", "skip"] = "stop"
    """An optimizer step whose loss or gradient is not finite never happens; its images are written
    to non_finite/ in the run folder. stop ends the run there (exit code 70), skip goes on."""

    max_skipped: int = 5
    """Optimizer steps of a run that skip passes over; one more ends it."""

    watchdog_s: float = 3600.0
    """Seconds that a phase may take without beginning or ending anything inside it; then the stacks
    of all threads go to stderr and watchdog.txt, and the run ends (exit code 124). 0 waits for
    ever."""

    def __post_init__(self) -> None:
        at_least("fault.max_skipped", self.max_skipped, 0)
        if not self.watchdog_s >= 0:
            raise ValueError(
                f"fault.watchdog_s: expected a number of at least 0, got {self.watchdog_s}"
            )
