"""Settings of profiling a run."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps of a run are traced, and by what."""

    steps: tuple[int, int] | None = None
    """First and last step to trace, counted from 1 as in metrics.jsonl; None traces none. Their
    times in the metrics include what tracing costs. Let a few steps pass first: the first ones
    compile, capture and allocate."""

    tool: Literal["torch", "nsys"] = "torch"
    """torch writes profile/steps_FIRST_LAST.json.gz into the run folder, read by
    profiles/summarize.py and ui.perfetto.dev. nsys opens NVTX ranges and a capture range for nsys,
    which the run must have been started under (profiles/nsys_step.sh), and needs a GPU."""

    with_stack: bool = False
    """Whether a torch trace holds the Python lines that called each operation; several times as
    large and slow."""

    with_shapes: bool = False
    """Whether a torch trace holds the shapes of each operation's inputs."""

    with_memory: bool = False
    """Whether a torch trace holds every allocation."""

    def __post_init__(self) -> None:
        if self.steps is not None and not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(
                "profile.steps: expected a first step of at least 1 and a last one not before it, "
                f"got {list(self.steps)}"
            )

    def check_within(self, num_steps: int) -> None:
        """ValueError where the run ends before the last step to trace."""
        if self.steps is not None and self.steps[1] > num_steps:
            raise ValueError(
                f"profile.steps: expected steps of 1 to num_steps {num_steps}, "
                f"got {list(self.steps)}"
            )
