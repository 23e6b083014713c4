"""The settings of the objective, refused at birth if a value is out of range."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
Level = Literal["token", "sequence"]
PolicyKind = Literal["conditional", "guided"]
OldLogprobs = Literal["recomputed", "draw"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What an optimizer step minimises."""

    policy: PolicyKind = "conditional"
    """conditional: score tokens without guidance and filters, at the draw's temperature, as the
    published recipes do; guided: score exactly the distribution that drew, at the cost of a second
    pass for the null condition."""

    loss_type: LossType = "grpo"
    """How tokens are averaged; on images of one length grpo, bnpo and dapo are the same mean."""

    epsilon: float = 0.2
    """The ratio may fall to 1 - epsilon before it is clipped; in (0, 1)."""

    epsilon_high: float | None = None
    """The ratio may rise to 1 + epsilon_high before it is clipped; above 0. None takes epsilon."""

    delta: float | None = None
    """Cap of the ratio where the advantage is negative and the clip does not bind; above
    1 + epsilon_high. None sets no cap."""

    clip_components: bool = False
    """Clip the surrogate of each component of the reward by its own advantage, as LOO-FID does,
    instead of that of their sum; needs rewards that are normalised apart."""

    beta: float = 0.1
    """Weight of the KL to the reference model, at least 0. At 0 no reference is needed."""

    kl_level: Level = "token"
    """One k3 a token, or one an image: that of its tokens' mean log-probs."""

    importance_sampling_level: Level = "token"
    """One ratio a token, or one an image: the exponential of its tokens' mean log-ratio."""

    importance_sampling_cap: float | None = None
    """Weigh each token by its probability before the step's first update over that of its draw,
    at most this: corrects draws in another precision. Above 0; None weighs none."""

    old_logprobs: OldLogprobs = "recomputed"
    """With several updates a rollout or with draw_ahead, what the ratio compares with: one more
    pass by the policy that drew, or the log-probs recorded at the draw, whose rounding then moves
    the ratio."""

    entropy_coef: float = 0.0
    """Reward for entropy, per token and nat, at least 0."""

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected {_listed(kind)}, got {getattr(self, name)!r}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon: expected a number in (0, 1), got {self.epsilon}")
        for name in ("epsilon_high", "importance_sampling_cap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected None or a number above 0, got {value}")
        if self.delta is not None and not self.ratio_bounds[1] < self.delta < math.inf:
            raise ValueError(
                "delta: expected None or a number above 1 + epsilon_high = "
                f"{self.ratio_bounds[1]:g}, got {self.delta}"
            )
        for name in ("beta", "entropy_coef"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Where the ratio is clipped, below and above."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1 - self.epsilon, 1 + high

    @property
    def needs_draw_logprobs(self) -> bool:
        """Whether the log-probs recorded at the draw enter the loss."""
        return self.importance_sampling_cap is not None or self.old_logprobs == "draw"


_CHOICES: dict[str, Any] = {
    "policy": PolicyKind,
    "loss_type": LossType,
    "kl_level": Level,
    "importance_sampling_level": Level,
    "old_logprobs": OldLogprobs,
}


def _listed(kind: Any) -> str:
    *most, last = get_args(kind)
    return f"{', '.join(most)} or {last}"
