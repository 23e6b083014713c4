"""From the scores of judges to advantages within groups.

    advantage = (reward - mean) / (std + 1e-4)       mean and unbiased std over a group's images

NaN means that an image was not scored. It is never a number: such an image leaves its group, unless
AR-GRPO's rule (a missing score counts as 0) is asked for.

Arithmetic is fp64 whatever comes in. Dividing by std + 1e-4 multiplies rounding by up to 1e4, and
in fp32 the mean of equal numbers is not always that number: a group that agrees would push the
policy. Equal fp32 rewards give exactly 0 here.

Shapes: N images, P prompts, G images a group, R rewards; N = P * G, group by group.

Source: Shao et al., arXiv:2402.03300, section 4.1; the 1e-4 is that of huggingface/trl 0.19.0.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from argrpo.kernels._checks import expect

Scale = Literal["group", "none"]
Missing = Literal["drop", "zero"]

_STD_OFFSET = 1e-4
_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class Advantages:
    """How much better than its group each image is."""

    values: Tensor  # [P, G] in the dtype of the rewards; 0 where `used` is False
    components: Tensor  # [P, G, R'] of which `values` is the sum, weights included
    used: Tensor  # [P, G] bool: scored, in a group of at least two scores; the rest has no say
    group_std: Tensor  # [P, R'] in that dtype, R' columns normalised apart; 0 below two scores

    def of_images(self, image_ids: Tensor) -> "Advantages":
        """Those of some images, as found within their whole groups; each a group of its own.

        Args:
            image_ids: [n] int64, places in the step.
        """
        group = image_ids // self.values.shape[1]
        return Advantages(
            values=self.values.flatten()[image_ids, None],
            components=self.components.flatten(0, 1)[image_ids, None],
            used=self.used.flatten()[image_ids, None],
            group_std=self.group_std[group],
        )

    def metrics(self) -> dict[str, float]:
        """TRL's reward_std (mean over groups) and frac_reward_zero_std.

        A group teaches nothing, and counts as zero, if no column of it has two different rewards.
        """
        is_zero = torch.isclose(self.group_std, torch.zeros_like(self.group_std)).all(dim=1)
        # Once a step: the log needs numbers.
        std, zero = torch.stack([self.group_std.mean(), is_zero.to(self.group_std).mean()]).tolist()
        return {"reward_std": std, "frac_reward_zero_std": zero}


def combine_rewards(scores: Tensor, weights: Tensor, missing: Missing = "drop") -> Tensor:
    """Weighted sum of an image's raw scores.

    Args:
        scores: [N, R] fp32 or fp64, NaN = not scored.
        weights: [R] finite, not all 0. A reward of weight 0 is only measured: nobody misses it.
        missing: drop: an image without one of the weighted scores is not scored; zero: a missing
            score counts as 0, and an image without any gets the reward 0 (AR-GRPO).

    Returns:
        [N] in the dtype of `scores`, NaN = not scored.

    Raises:
        ValueError: a shape or dtype is not as above, or a score or weight is infinite.
    """
    expect("scores", scores, (None, None), _FLOATS, contiguous=False)
    _check_weights(weights, scores.shape[1])
    _check_no_infinity("scores", scores)
    if missing not in get_args(Missing):
        raise ValueError(f"missing: expected drop or zero, got {missing!r}")
    wide = weights.double()
    sums = (scores.double() * wide).nansum(dim=1)
    if missing == "drop":
        sums = sums.masked_fill((scores.isnan() & (wide != 0)).any(dim=1), torch.nan)
    return sums.to(scores.dtype)


def group_advantages(rewards: Tensor, scale: Scale = "group") -> Advantages:
    """Compare each image with the others of its prompt.

    Args:
        rewards: [P, G] fp32 or fp64, G at least 2, NaN = not scored.
        scale: group: divide by the group's std + 1e-4; none: only subtract its mean.

    Returns:
        `Advantages` with one column of `group_std`. A group with fewer than two scores gets zeros.

    Raises:
        ValueError: a shape, dtype or the scale is not as above, or a reward is infinite.
    """
    expect("rewards", rewards, (None, None), _FLOATS, contiguous=False)
    _check_no_infinity("rewards", rewards)
    return _advantages(rewards[..., None], torch.ones_like(rewards[0, :1]), scale)


def normalise_then_sum(
    scores: Tensor, weights: Tensor, scale: Scale = "group", *, weigh_first: bool = False
) -> Advantages:
    """Normalise each reward within its group, then take the weighted sum.

    A weight applied before would cancel in the division by the std, up to the 1e-4.

    Args:
        scores: [P, G, R] fp32 or fp64, G at least 2, NaN = not scored. An image without one of the
            weighted scores leaves its group for all of them.
        weights: [R] finite, not all 0; a reward of weight 0 is left out.
        scale: as in `group_advantages`.
        weigh_first: apply the weights before all the same, see `ParityConfig`.

    Returns:
        `Advantages` with one column of `group_std` for each weighted reward.

    Raises:
        ValueError: a shape, dtype or the scale is not as above, or a score or weight is infinite.
    """
    expect("scores", scores, (None, None, None), _FLOATS, contiguous=False)
    _check_weights(weights, scores.shape[2])
    _check_no_infinity("scores", scores)
    counts = weights != 0
    scores, weights = scores[..., counts], weights[counts]
    if weigh_first:
        scores, weights = scores * weights.to(scores.dtype), torch.ones_like(weights)
    return _advantages(scores, weights, scale)


def _advantages(scores: Tensor, weights: Tensor, scale: Scale) -> Advantages:
    """The formula, for scores [P, G, R'] of which an image has all or is left out."""
    if scores.shape[1] < 2:
        raise ValueError(f"group: expected at least 2 images to compare, got {scores.shape[1]}")
    if scale not in get_args(Scale):
        raise ValueError(f"scale: expected group or none, got {scale!r}")
    scored = ~scores.isnan().any(dim=2, keepdim=True)
    num_scored = scored.sum(dim=1, keepdim=True)
    wide = scores.double().masked_fill(~scored, 0.0)
    mean = wide.sum(dim=1, keepdim=True) / num_scored.clamp(min=1)
    used = scored & (num_scored >= 2)
    deviations = (wide - mean).masked_fill(~used, 0.0)
    squares = deviations.square().sum(dim=1, keepdim=True)
    std = (squares / (num_scored - 1).clamp(min=1)).sqrt()
    normalised = deviations / (std + _STD_OFFSET) if scale == "group" else deviations
    components = normalised * weights.double()
    return Advantages(
        values=components.sum(dim=2).to(scores.dtype),
        components=components.to(scores.dtype),
        used=used.squeeze(2),
        group_std=std.squeeze(1).to(scores.dtype),
    )


def _check_weights(weights: Tensor, num_rewards: int) -> None:
    expect("weights", weights, (num_rewards,), _FLOATS, contiguous=False)
    values = weights.tolist()
    if not weights.isfinite().all():
        raise ValueError(f"weights: expected finite numbers, got {values}")
    if not weights.any():
        raise ValueError(f"weights: expected at least one that is not 0, got {values}")


def _check_no_infinity(name: str, scores: Tensor) -> None:
    # A host sync once a step: an infinite score would turn its whole group into NaN.
    if scores.isinf().any():
        where = scores.isinf().nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected finite numbers, or NaN for not scored, got {scores[tuple(where)]} "
            f"at {where}"
        )
