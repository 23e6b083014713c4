"""The loss algebra of GRPO, on log-probs and entropies of tokens alone.

    ratio     = exp(logprob - old_logprob)             of a token, or of a whole image (sequence)
    surrogate = min(min(ratio, delta) A, clamp(ratio, 1 - epsilon, 1 + epsilon_high) A)
    per token = -w sum_c surrogate(A_c) + beta k3(logprob, ref_logprob) - entropy_coef entropy
    w         = min(exp(old_logprob - draw_logprob), cap), or 1
    grpo          mean over images of the mean over an image's tokens
    bnpo, dapo    mean over all tokens
    dr_grpo       sum over all tokens / (images * max_tokens)

Several advantages A_c of one image share its ratio, so their losses are one forward and backward
pass: with ratios inside the clip the gradient is that of sum_c A_c.

With one update a rollout the ratio is 1, and what each token adds to the gradient is known before
the pass (`fixed_scales`). A ratio that moves takes the token's own log-prob (`token_scales`).

The divisors are those of a whole optimizer step, so the losses of its micro-batches (and of all
ranks) add up to the loss of the step; sum gradients, never average them. bnpo and dapo differ in
huggingface/trl only because bnpo takes its token count from the micro-batch; here they are one.
Where all images have the same number of tokens and none is masked, grpo is the same mean too.

Shapes: N images, T tokens of an image, C components of the reward.

Source: Shao et al., arXiv:2402.03300, equation 3; dapo: arXiv:2503.14476; dr_grpo:
arXiv:2503.20783; sequence-level ratio: arXiv:2507.18071; two-sided clip (delta): arXiv:2505.07291;
capped weights w: Yao et al., yaof20/Flash-RL; two advantages: LOO-FID, arXiv:2603.23086. Names of
the settings are those of huggingface/trl where it has them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from argrpo.kernels.kl import k3
from argrpo.kernels.logprob_gradients import LossScales
from argrpo.kernels.rows import FixedScales
from argrpo.loss_batch import LossBatch
from argrpo.loss_metrics import LossMetrics, TokenTerms, measure
from argrpo.objective_config import LossType, ObjectiveConfig


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class PolicyLoss:
    """The loss of a micro-batch and what it was made of."""

    loss: Tensor  # [] with gradient; the micro-batch's share of the step's loss
    metrics: LossMetrics


def policy_loss(
    logprobs: Tensor,
    entropies: Tensor | None,
    batch: LossBatch,
    config: ObjectiveConfig,
    *,
    reversed_clip: bool = False,
) -> PolicyLoss:
    """The loss of a micro-batch. Differentiable in `logprobs` and, if it counts, `entropies`.

    Args:
        logprobs: [N, T] fp32 (fp64 in checks) of the drawn tokens under the policy.
        entropies: [N, T] nats; needed where entropy counts, measured anyway.
        batch: the constants of the loss.
        config: the objective.
        reversed_clip: take the larger of the two surrogates, see `ParityConfig`.

    Raises:
        ValueError: a shape or dtype is not as above, or what the objective needs is missing.
    """
    batch.check(logprobs, entropies)
    _check_needs(config, entropies, batch)
    mask = batch.mask
    logprobs = _blanked(logprobs, mask)
    old = (logprobs if batch.old_logprobs is None else _blanked(batch.old_logprobs, mask)).detach()
    ratio = _ratio(logprobs, old, mask, config)
    low, high = config.ratio_bounds
    gain = _gain(batch)
    falling, rising = (gain > 0, gain < 0) if reversed_clip else (gain < 0, gain > 0)
    terms = TokenTerms(
        ratio=ratio,
        low=_share((ratio < low)[..., None] & falling),
        high=_share((ratio > high)[..., None] & rising),
        kl=_kl(logprobs, batch, config),
        entropies=None if entropies is None else _blanked(entropies, mask),
    )
    surrogate = _surrogate(ratio, gain, config, reversed_clip)
    if (cap := config.importance_sampling_cap) is not None:
        drawn = _blanked(_needed_draw(batch, config), mask)
        surrogate = surrogate * (old - drawn).exp().clamp(max=cap)
    per_token = _per_token(surrogate, terms, batch, config)
    loss = (per_token * _token_weights(per_token, batch, config.loss_type)).sum()
    return PolicyLoss(loss, measure(loss, terms, mask))


def has_fixed_scales(batch: LossBatch, config: ObjectiveConfig) -> bool:
    """Whether what a token adds to the gradient is known before the policy's log-probs are.

    So it is with a ratio of 1, no weights that compare it with the draw, and a KL token by token.
    """
    is_on_policy = batch.old_logprobs is None and config.importance_sampling_cap is None
    return is_on_policy and (config.beta == 0 or config.kl_level == "token")


def fixed_scales(batch: LossBatch, config: ObjectiveConfig, num_tokens: int) -> FixedScales:
    """d `policy_loss` / d (log-prob, k3, entropy) of each of N * T tokens, at a ratio of 1.

    At the sequence level too: the image's ratio moves by the mean of its tokens', and each token
    counts the same.

    Args:
        batch: for which `has_fixed_scales`; fp32.
        config: the objective.
        num_tokens: T.

    Raises:
        ValueError: what the objective needs is missing.
    """
    like = batch.advantages.new_empty(len(batch.advantages), num_tokens)
    weights = _token_weights(like, batch, config.loss_type)
    scales = FixedScales((-weights * _gain(batch).sum(dim=2)).flatten())
    if config.beta > 0:
        reference = _needed_reference(batch, config)
        if batch.mask is not None:
            # Its exponential is 0 there: no NaN or infinity meets the weight of 0.
            reference = reference.masked_fill(~batch.mask, -torch.inf)
        kl = (config.beta * weights).flatten()
        scales = scales._replace(kl=kl, ref_logprobs=reference.flatten())
    coefficient = _entropy_coefficient(batch, config)
    if coefficient is not None:
        scales = scales._replace(entropies=(-coefficient * weights).flatten())
    return scales


def has_token_scales(batch: LossBatch, config: ObjectiveConfig) -> bool:
    """Whether what a token adds to the gradient needs no other token's log-prob."""
    has_token_kl = config.beta == 0 or config.kl_level == "token"
    has_token_ratio = config.importance_sampling_level == "token"
    return has_fixed_scales(batch, config) or (has_token_ratio and has_token_kl)


def token_scales(
    batch: LossBatch, config: ObjectiveConfig, num_tokens: int, *, reversed_clip: bool = False
) -> LossScales:
    """d `policy_loss` / d (log-prob, entropy) of any of N * T tokens, from their log-probs.

    In closed form: 8 launches a chunk, 12 with a KL, where `policy_loss` and its autograd take 80.
    A gain (A > 0) counts up to the upper bound, a loss from the lower bound to delta; a reversed
    clip exchanges the two.

    Args:
        batch: for which `has_token_scales`, with a ratio of tokens; fp32.
        config: the objective.
        num_tokens: T.
        reversed_clip: as in `policy_loss`.

    Raises:
        ValueError: what the objective needs is missing.
    """
    on_policy = fixed_scales(batch, config, num_tokens)
    like = batch.advantages.new_empty(len(batch.advantages), num_tokens)
    weights, gain = -_token_weights(like, batch, config.loss_type), _gain(batch)
    pushes = [(weights * part.sum(dim=2)).flatten() for part in (gain.clamp(0), gain.clamp(max=0))]
    rising, falling = reversed(pushes) if reversed_clip else pushes
    old = None if batch.old_logprobs is None else batch.old_logprobs.flatten()
    cap = config.importance_sampling_cap
    drawn = None if cap is None else _needed_draw(batch, config).flatten()
    hidden = None if batch.mask is None else ~batch.mask.flatten()

    def of_rows(rows: slice, logprobs: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None]:
        before = logprobs if old is None else old[rows]
        slope = _slope((logprobs - before).exp(), rising[rows], falling[rows], config)
        if drawn is not None:
            slope = slope * (before - drawn[rows]).exp().clamp(max=cap)
        scales = on_policy.part(rows)._replace(logprobs=slope)
        dlogprobs = scales.of_logprobs(logprobs)
        # What stands at a masked token may be NaN, which a weight of 0 does not hide.
        dlogprobs = dlogprobs if hidden is None else dlogprobs.masked_fill(hidden[rows], 0.0)
        return dlogprobs, scales.entropies

    return of_rows


def _slope(ratio: Tensor, rising: Tensor, falling: Tensor, config: ObjectiveConfig) -> Tensor:
    """[M] d / d log-prob of what the clip leaves of rising and falling tokens' ratios."""
    low, high = config.ratio_bounds
    is_falling = ratio >= low
    if config.delta is not None:
        is_falling &= ratio <= config.delta
    return ratio * (rising * (ratio <= high) + falling * is_falling)


def _gain(batch: LossBatch) -> Tensor:
    """[N, 1, C] advantages of each token, by component."""
    advantages = batch.advantages
    return advantages[:, None, None] if advantages.dim() == 1 else advantages[:, None]


def _surrogate(ratio: Tensor, gain: Tensor, config: ObjectiveConfig, reversed_clip: bool) -> Tensor:
    """[N, T] what is maximised, summed over components."""
    bound = torch.maximum if reversed_clip else torch.minimum
    clipped = ratio.clamp(*config.ratio_bounds)
    return bound(ratio[..., None] * gain, clipped[..., None] * gain).sum(dim=2)


def _per_token(
    surrogate: Tensor, terms: TokenTerms, batch: LossBatch, config: ObjectiveConfig
) -> Tensor:
    """[N, T] the formula at the top of this file, before it is averaged."""
    loss = -surrogate
    if terms.kl is not None and config.beta > 0:
        loss = loss + config.beta * terms.kl
    coefficient = _entropy_coefficient(batch, config)
    if terms.entropies is not None and coefficient is not None:
        loss = loss - coefficient * terms.entropies
    return loss


def _entropy_coefficient(batch: LossBatch, config: ObjectiveConfig) -> Tensor | float | None:
    """[N, 1] or one for all; None where entropy does not count."""
    if isinstance(batch.entropy_coef, Tensor):
        return batch.entropy_coef[:, None]
    one = config.entropy_coef if batch.entropy_coef is None else batch.entropy_coef
    return one if one > 0 else None


def _ratio(logprobs: Tensor, old: Tensor, mask: Tensor | None, config: ObjectiveConfig) -> Tensor:
    """[N, T] new over old probability, capped at delta; both log-probs are 0 where masked."""
    log_ratio = logprobs - old
    if config.importance_sampling_level == "sequence":
        log_ratio = _image_mean(log_ratio, mask)
    ratio = log_ratio.exp()
    return ratio if config.delta is None else ratio.clamp(max=config.delta)


def _kl(logprobs: Tensor, batch: LossBatch, config: ObjectiveConfig) -> Tensor | None:
    """[N, T] k3, or None without a reference."""
    if batch.ref_logprobs is None:
        return None
    reference = _blanked(batch.ref_logprobs, batch.mask).detach()
    if config.kl_level == "token":
        return k3(logprobs, reference)
    return k3(_image_mean(logprobs, batch.mask), _image_mean(reference, batch.mask))


def _image_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """[N, T] an image's mean over counted tokens, at each token; values are 0 where masked."""
    num_tokens = _row_tokens(values, mask).clamp(min=1)
    return (values.sum(dim=1, keepdim=True) / num_tokens).expand_as(values)


def _token_weights(like: Tensor, batch: LossBatch, loss_type: LossType) -> Tensor:
    """[N, T] what each token counts in the step's loss; 0 where masked."""
    mask, scale = batch.mask, batch.scale
    counted = torch.ones_like(like) if mask is None else mask.to(like.dtype)
    counted = counted * scale.summed
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


def _share(is_clipped: Tensor) -> Tensor:
    """[N, T] share of the components [N, T, C] that the clip binds for."""
    return is_clipped.float().mean(dim=2)


def _needed_reference(batch: LossBatch, config: ObjectiveConfig) -> Tensor:
    if batch.ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected [N, T] since beta is {config.beta}, got None")
    return batch.ref_logprobs


def _needed_draw(batch: LossBatch, config: ObjectiveConfig) -> Tensor:
    if batch.draw_logprobs is None:
        raise ValueError(
            "draw_logprobs: expected [N, T] since importance_sampling_cap is "
            f"{config.importance_sampling_cap}, got None"
        )
    return batch.draw_logprobs


def _check_needs(config: ObjectiveConfig, entropies: Tensor | None, batch: LossBatch) -> None:
    if config.beta > 0:
        _needed_reference(batch, config)
    if entropies is None and _entropy_coefficient(batch, config) is not None:
        raise ValueError("entropies: expected [N, T] since entropy counts, got None")
