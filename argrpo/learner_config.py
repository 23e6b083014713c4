"""Settings of the learner beside its objective and optimizer."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The model that the KL is measured to: the policy as it was."""

    sync_every: int = 0
    """Steps after which the reference becomes the policy of that time; 0 keeps the first one."""

    device: Literal["policy", "cpu"] = "policy"
    """Where its weights are between the moments they are needed; cpu moves them for each step."""

    def __post_init__(self) -> None:
        if self.sync_every < 0:
            raise ValueError(f"reference.sync_every: expected at least 0, got {self.sync_every}")


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """Quirks of released codes, to reproduce their numbers; each off by default."""

    reversed_clip: bool = False
    """Take the larger of the clipped and the unclipped surrogate, so that the clip does not bind
    where it should (bugrabaran/ar-policy-tuning at fac5b31, grpo.py: min of negated terms)."""

    sum_over_group: bool = False
    """Sum the loss over the images of a prompt and average over prompts: images_per_prompt times
    the mean (bugrabaran/ar-policy-tuning at fac5b31, grpo.py)."""

    weights_before_normalization: bool = False
    """Where rewards are normalised apart, weigh a reward before it is divided by its spread, where
    a weight cancels up to the 1e-4 (bugrabaran/ar-policy-tuning at fac5b31, grpo.py)."""

    entropy_by_completion: bool = False
    """Give the images at each place of their groups, one of every prompt, a coefficient of their
    own that follows their own entropy, measured before each optimizer step; else one coefficient
    follows the mean of the step before. Costs a pass over the images an optimizer step. Needs
    entropy.control loofid (bugrabaran/ar-policy-tuning at fac5b31, grpo.py)."""

    bf16_masters: bool = False
    """Update bf16 weights themselves, with bf16 gradients and moments, which loses updates below
    half a unit in their last place (bugrabaran/ar-policy-tuning at fac5b31; Kwai-Klear/AR-GRPO at
    65947ad, force_model_bf16). Needs policy.dtype bfloat16."""

    label_dropout: float = 0.0
    """Chance in [0, 1) that a class is replaced by the null class when the policy scores an image,
    drawn anew for each pass; 0.1 where a model was left in training mode
    (bugrabaran/ar-policy-tuning at fac5b31, gpt.py: class_dropout_prob)."""

    first_token_mask: bool = False
    """When scoring, a padded last text position attends to the valid ones alone; when drawing, to
    itself too (Kwai-Klear/AR-GRPO at 65947ad: the mask of the training forward lacks the identity
    that the sampler's has). Changes the log-prob of the first image token only, and only for
    prompts shorter than the prefix. Needs policy.text_padding right."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout < 1:
            raise ValueError(
                f"parity.label_dropout: expected a number in [0, 1), got {self.label_dropout}"
            )
