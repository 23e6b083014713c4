"""The loss algebra of GRPO, on log-probs and entropies of tokens alone.

    ratio     = exp(logprob - old_logprob)             of a token, or of a whole image (sequence)
    per token = -min(min(ratio, delta) A, clamp(ratio, 1 - epsilon, 1 + epsilon_high) A)
                + beta k3(logprob, ref_logprob) - entropy_coef entropy
    grpo          mean over images of the mean over an image's tokens
    bnpo, dapo    mean over all tokens
    dr_grpo       sum over all tokens / (images * max_tokens)

The divisors are those of a whole optimizer step, so the losses of its micro-batches (and of all
ranks) add up to the loss of the step; sum gradients, never average them. bnpo and dapo differ in
huggingface/trl only because bnpo takes its token count from the micro-batch; here they are one.
Where all images have the same number of tokens and none is masked, grpo is the same mean too.

Shapes: N images, T tokens of an image.

Source: Shao et al., arXiv:2402.03300, equation 3; dapo: arXiv:2503.14476; dr_grpo:
arXiv:2503.20783; sequence-level ratio: arXiv:2507.18071; two-sided clip (delta): arXiv:2505.07291.
Names and defaults of the fields are those of huggingface/trl, except loss_type and beta, which are
those of AR-GRPO's class-conditional recipe (Kwai-Klear/AR-GRPO at 65947ad).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from argrpo.kernels._checks import expect
from argrpo.kernels.kl import k3
from argrpo.loss_metrics import LossMetrics, TokenTerms, measure

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
RatioLevel = Literal["token", "sequence"]

_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What an optimizer step minimises."""

    loss_type: LossType = "grpo"
    """How tokens are averaged; on images of one length grpo, bnpo and dapo are the same mean."""

    epsilon: float = 0.2
    """The ratio may fall to 1 - epsilon before it is clipped; in (0, 1)."""

    epsilon_high: float | None = None
    """The ratio may rise to 1 + epsilon_high before it is clipped; above 0. None takes epsilon."""

    delta: float | None = None
    """Cap of the ratio where the advantage is negative and the clip does not bind; above
    1 + epsilon_high. None sets no cap."""

    beta: float = 0.1
    """Weight of the KL to the reference model, at least 0. At 0 no reference is needed."""

    importance_sampling_level: RatioLevel = "token"
    """One ratio a token, or one an image: the exponential of its tokens' mean log-ratio."""

    entropy_coef: float = 0.0
    """Reward for entropy, per token and nat, at least 0."""

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(LossType):
            raise ValueError(
                f"loss_type: expected grpo, bnpo, dr_grpo or dapo, got {self.loss_type!r}"
            )
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon: expected a number in (0, 1), got {self.epsilon}")
        if self.epsilon_high is not None and not 0 < self.epsilon_high < math.inf:
            raise ValueError(
                f"epsilon_high: expected None or a number above 0, got {self.epsilon_high}"
            )
        if self.delta is not None and not self.ratio_bounds[1] < self.delta < math.inf:
            raise ValueError(
                "delta: expected None or a number above 1 + epsilon_high = "
                f"{self.ratio_bounds[1]:g}, got {self.delta}"
            )
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta: expected a finite number of at least 0, got {self.beta}")
        if self.importance_sampling_level not in get_args(RatioLevel):
            raise ValueError(
                "importance_sampling_level: expected token or sequence, "
                f"got {self.importance_sampling_level!r}"
            )
        if not 0 <= self.entropy_coef < math.inf:
            raise ValueError(
                f"entropy_coef: expected a finite number of at least 0, got {self.entropy_coef}"
            )

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Where the ratio is clipped, below and above."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1 - self.epsilon, 1 + high


@dataclass(frozen=True, slots=True)
class LossScale:
    """The size of a whole optimizer step, over all its micro-batches and ranks."""

    num_rows: int
    """Images, those without a counted token included."""

    num_tokens: int
    """Counted tokens of all images."""

    max_tokens: int
    """Tokens that an image may have; dr_grpo divides by it."""

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.max_tokens < 1 or self.num_tokens < 0:
            raise ValueError(f"scale: expected at least 1 row of at least 1 token, got {self}")


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class PolicyLoss:
    """The loss of a micro-batch and what it was made of."""

    loss: Tensor  # [] with gradient; the micro-batch's share of the step's loss
    metrics: LossMetrics


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    config: ObjectiveConfig,
    scale: LossScale,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    mask: Tensor | None = None,
) -> PolicyLoss:
    """The loss of a micro-batch. Differentiable in `logprobs` and, if it counts, `entropies`.

    Args:
        logprobs: [N, T] fp32 (fp64 in checks) of the drawn tokens under the policy.
        advantages: [N] in the dtype of `logprobs`, as are all that follow.
        config: the objective.
        scale: the size of the whole optimizer step.
        old_logprobs: [N, T] before the step's first update, a constant. None is strictly on-policy:
            these very `logprobs`, so the ratio is 1 and only its gradient counts.
        ref_logprobs: [N, T] under the reference, a constant; needed where beta is above 0, measured
            anyway.
        entropies: [N, T] nats; needed where entropy_coef is above 0, measured anyway.
        mask: [N, T] bool, the tokens that count; None counts all. What stands at the others may be
            anything, NaN included.

    Raises:
        ValueError: a shape or dtype is not as above, or what the objective needs is missing.
    """
    others = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "entropies": entropies}
    _check(logprobs, advantages, mask, others)
    _check_needs(config, ref_logprobs, entropies)
    logprobs = _blanked(logprobs, mask)
    old = logprobs if old_logprobs is None else _blanked(old_logprobs, mask)
    ratio = _ratio(logprobs, old.detach(), mask, config)
    low, high = config.ratio_bounds
    gain = advantages[:, None]
    terms = TokenTerms(
        ratio=ratio,
        is_low=(ratio < low) & (gain < 0),
        is_high=(ratio > high) & (gain > 0),
        kl=None if ref_logprobs is None else k3(logprobs, _blanked(ref_logprobs, mask).detach()),
        entropies=None if entropies is None else _blanked(entropies, mask),
    )
    per_token = _per_token(terms, gain, config)
    loss = (per_token * _token_weights(per_token, mask, scale, config.loss_type)).sum()
    return PolicyLoss(loss, measure(loss, terms, mask))


def _per_token(terms: TokenTerms, gain: Tensor, config: ObjectiveConfig) -> Tensor:
    """[N, T] the formula at the top of this file, before it is averaged; `gain` is [N, 1]."""
    clipped = terms.ratio.clamp(*config.ratio_bounds)
    loss = -torch.minimum(terms.ratio * gain, clipped * gain)
    if terms.kl is not None and config.beta > 0:
        loss = loss + config.beta * terms.kl
    if terms.entropies is not None and config.entropy_coef > 0:
        loss = loss - config.entropy_coef * terms.entropies
    return loss


def _ratio(logprobs: Tensor, old: Tensor, mask: Tensor | None, config: ObjectiveConfig) -> Tensor:
    """[N, T] new over old probability, capped at delta; both log-probs are 0 where masked."""
    log_ratio = logprobs - old
    if config.importance_sampling_level == "sequence":
        num_tokens = _row_tokens(logprobs, mask).clamp(min=1)
        log_ratio = (log_ratio.sum(dim=1, keepdim=True) / num_tokens).expand_as(logprobs)
    ratio = log_ratio.exp()
    return ratio if config.delta is None else ratio.clamp(max=config.delta)


def _token_weights(
    like: Tensor, mask: Tensor | None, scale: LossScale, loss_type: LossType
) -> Tensor:
    """[N, T] what each token counts in the step's loss; 0 where masked."""
    counted = torch.ones_like(like) if mask is None else mask.to(like.dtype)
    if loss_type == "grpo":
        return counted / (_row_tokens(like, mask).clamp(min=1) * scale.num_rows)
    if loss_type == "dr_grpo":
        return counted / (scale.num_rows * scale.max_tokens)
    return counted / max(scale.num_tokens, 1)


def _row_tokens(like: Tensor, mask: Tensor | None) -> Tensor:
    """[N, 1] counted tokens of each image."""
    if mask is None:
        return torch.full_like(like[:, :1], like.shape[1])
    return mask.sum(dim=1, keepdim=True).to(like.dtype)


def _blanked(values: Tensor, mask: Tensor | None) -> Tensor:
    # Before any algebra: 0 * NaN would bring a hidden NaN back, forward and backward.
    return values if mask is None else values.masked_fill(~mask, 0.0)


def _check(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    others: dict[str, Tensor | None],
) -> None:
    expect("logprobs", logprobs, (None, None), _FLOATS, contiguous=False)
    num_rows, num_tokens = logprobs.shape
    expect("advantages", advantages, (num_rows,), (logprobs.dtype,), contiguous=False)
    for name, values in others.items():
        if values is not None:
            expect(name, values, (num_rows, num_tokens), (logprobs.dtype,), contiguous=False)
    if mask is not None:
        expect("mask", mask, (num_rows, num_tokens), (torch.bool,), contiguous=False)


def _check_needs(
    config: ObjectiveConfig, ref_logprobs: Tensor | None, entropies: Tensor | None
) -> None:
    if config.beta > 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected [N, T] since beta is {config.beta}, got None")
    if config.entropy_coef > 0 and entropies is None:
        raise ValueError(
            f"entropies: expected [N, T] since entropy_coef is {config.entropy_coef}, got None"
        )
