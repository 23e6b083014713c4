"""Settings of the optimizer."""

import math
from dataclasses import dataclass, field

from argrpo.schedules import LearningRateConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW on fp32 masters."""

    learning_rate: LearningRateConfig = field(default_factory=LearningRateConfig)
    """The rate of each step."""

    betas: tuple[float, float] = (0.9, 0.999)
    """How slowly the averages of the gradient and of its square forget; each in [0, 1)."""

    weight_decay: float = 0.0
    """Share of a weight, times the learning rate, that each optimizer step takes off."""

    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""

    def __post_init__(self) -> None:
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"optimizer.max_grad_norm: expected a number above 0, got {self.max_grad_norm}"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                "optimizer.weight_decay: expected a finite number of at least 0, got "
                f"{self.weight_decay}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: expected two in [0, 1), got {list(self.betas)}")
