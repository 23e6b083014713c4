"""How far the optimizer steps of one step are, so that a run may stop between any two of them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from argrpo.loss_metrics import LossMetrics
from argrpo.non_finite import RefusedUpdate


@dataclass(slots=True, eq=False)  # eq would compare tensors
class StepProgress:
    """Of one step; written by `Learner.learn` as it goes."""

    num_updates: int = 0
    """Optimizer steps that are done or refused."""

    losses: LossMetrics | None = None
    """Of the pass over the images that is under way, merged."""

    grad_norms: list[float] = field(default_factory=list)
    """Of the same pass, one an optimizer step."""

    metrics: dict[str, float] = field(default_factory=dict)
    """What was measured once in the step."""

    refused: list[RefusedUpdate] = field(default_factory=list)

    is_finished: bool = False
    """Whether what moves once a step, reference and average, has moved."""

    def add(self, losses: LossMetrics, grad_norm: float, *, starts_pass: bool) -> None:
        """Count an optimizer step."""
        if starts_pass or self.losses is None:
            self.losses, self.grad_norms = losses, [grad_norm]
        else:
            self.losses = self.losses.merged(losses)
            self.grad_norms.append(grad_norm)
        self.num_updates += 1

    def state(self) -> dict[str, Any]:
        """What JSON can hold; floats come back bit for bit. What was refused is on disk already."""
        losses = {}
        if self.losses is not None:
            values = {f.name: getattr(self.losses, f.name) for f in dataclasses.fields(LossMetrics)}
            losses = {name: v.item() for name, v in values.items() if v is not None}
        return {
            "num_updates": self.num_updates,
            "losses": losses,
            "grad_norms": self.grad_norms,
            "metrics": self.metrics,
            "is_finished": self.is_finished,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> "StepProgress":
        """What `state` was taken of."""
        names = [f.name for f in dataclasses.fields(LossMetrics)]
        sums = {
            name: torch.tensor(state["losses"][name], dtype=torch.float64, device=device)
            if name in state["losses"]
            else None
            for name in names
        }
        return cls(
            num_updates=int(state["num_updates"]),
            losses=LossMetrics(**sums) if state["losses"] else None,  # type: ignore[arg-type]
            grad_norms=list(state["grad_norms"]),
            metrics=dict(state["metrics"]),
            is_finished=bool(state["is_finished"]),
        )
