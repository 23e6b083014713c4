"""How the learning rate moves over a run: a linear warm-up, then constant, linear or half a cosine.

A step is one rollout iteration; every optimizer step inside it uses the same rate.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """The learning rate of each step."""

    peak: float = 1e-5
    """The rate after warm-up, above 0."""

    schedule: Schedule = "constant"
    """constant: the peak to the end; linear, cosine: a line, or half a cosine, from the peak to the
    final rate."""

    warmup_steps: int = 0
    """Steps over which the rate rises linearly to the peak; the first step is not 0."""

    final_fraction: float = 0.0
    """Where line or cosine would end one step after the run, as a share of the peak in [0, 1]; of a
    line that was meant for a longer run, what is left of the peak after this one."""

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf:
            raise ValueError(f"peak: expected a finite number above 0, got {self.peak}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"schedule: expected constant, linear or cosine, got {self.schedule!r}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected at least 0, got {self.warmup_steps}")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(
                f"final_fraction: expected a number in [0, 1], got {self.final_fraction}"
            )


def learning_rate(step: int, config: LearningRateConfig, *, num_steps: int) -> float:
    """The learning rate of one step.

    Args:
        step: 0 .. num_steps - 1.
        config: peak, shape and warm-up.
        num_steps: steps of the whole run. A run shorter than its warm-up never leaves it.

    Raises:
        ValueError: the step lies outside the run.
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step: expected 0 .. {num_steps - 1}, got {step}")
    if step < config.warmup_steps:
        return config.peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.peak
    progress = (step - config.warmup_steps) / (num_steps - config.warmup_steps)
    is_line = config.schedule == "linear"
    falling = 1 - progress if is_line else (1 + math.cos(math.pi * progress)) / 2
    return config.peak * (config.final_fraction + (1 - config.final_fraction) * falling)
