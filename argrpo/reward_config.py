"""Settings of judges, and of what their scores become."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One judge."""

    name: str
    """A name of argrpo/rewards/registry.py, or module:function for your own."""

    weight: float = 1.0
    """Applied to the raw score when rewards are summed, to the advantage when they are not; a
    finite number, and 0 only measures."""

    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the judge, e.g. the path of its weights."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"rewards.{self.name}.weight: expected finite, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How scores become advantages within a group."""

    aggregation: Literal["sum_then_normalize", "normalize_then_sum", "normalize_kinds_then_sum"] = (
        "sum_then_normalize"
    )
    """Sum the weighted scores and normalise once; or normalise each reward and weigh that; or sum
    and normalise the judges of single images, and normalise and weigh each distribution reward."""

    scale: Literal["group", "none"] = "group"
    """Divide by the group's standard deviation (+ 1e-4), or only subtract its mean."""

    missing: Literal["drop", "zero"] = "drop"
    """An image without a score leaves its group, or (AR-GRPO) the missing score counts as 0."""

    def __post_init__(self) -> None:
        if self.missing == "zero" and self.aggregation != "sum_then_normalize":
            raise ValueError(
                f"advantage.missing: expected drop with aggregation {self.aggregation}, got zero"
            )
