"""A step between its scores and its last optimizer step."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from argrpo.drawn_step import draw_tensors
from argrpo.experience import Experience
from argrpo.step_progress import StepProgress


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class StepInFlight:
    """A step whose images are drawn and judged."""

    step: int  # 0-based
    experience: Experience
    progress: StepProgress
    measured: dict[str, float]  # of images, scores and advantages, as they are logged
    extras: dict[str, dict[str, list[Any]]]  # see training_step.StepOutcome
    is_scored: bool  # whether any image of any rank learns
    score_names: list[str]
    scores: Tensor  # [N, R] fp32 on the CPU, of all ranks; for whoever asks what went wrong

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, not copies."""
        now = self.experience
        return {
            **draw_tensors(now.rollout, now.old_logprobs, now.ref_logprobs),
            "advantages": now.advantages,
            "used": now.used,
            "scores": self.scores,
        }

    def state(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        return {
            "progress": self.progress.state(),
            "measured": self.measured,
            "extras": self.extras,
            "is_scored": self.is_scored,
            "score_names": self.score_names,
        }
