"""Which distribution the tokens of a rollout are scored under, and the states that its head needs.

    conditional   the condition alone, at the draw's temperature, over the whole codebook
    guided        exactly the distribution that drew: guidance, temperature, the stored kept sets

Shapes: N images of a step, m images of a micro-batch, T tokens, D width, V codebook.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.engine.conditions import Conditions, TextFeatures, select
from argrpo.engine.rollout import Rollout
from argrpo.engine.sampling_params import SamplingParams
from argrpo.kernels.token_logprobs import TokenLogprobs, token_logprobs
from argrpo.models.scoring import ScoringPolicy, drawn_hidden
from argrpo.objective_config import PolicyKind
from argrpo.ranks import num_ranks

_LOG = logging.getLogger(__name__)


class TokensToScore(NamedTuple):
    """A rollout's tokens and the distribution that they are scored under."""

    conditions: Conditions  # of N images
    token_ids: Tensor  # [N, T] int64
    params: SamplingParams
    support: Tensor | None  # [N, T, ceil(V / 8)] uint8

    def rows(self, rows: Tensor) -> "TokensToScore":
        """Those of some images."""
        support = None if self.support is None else self.support[rows]
        conditions = select(self.conditions, rows)
        return TokensToScore(conditions, self.token_ids[rows], self.params, support)


class HeadInputs(NamedTuple):
    """Final-norm hidden states of m * T tokens, and what their logits are asked."""

    hidden: Tensor  # [m * T, D], contiguous
    token_ids: Tensor  # [m * T] int64
    temperature: float
    support: Tensor | None  # [m * T, ceil(V / 8)] uint8


def warn_of_mismatch(params: SamplingParams, kind: PolicyKind) -> None:
    """Say so where tokens are scored under another distribution than drew them."""
    if kind == "conditional" and (params.is_guided or params.is_filtered):
        _LOG.warning(
            "tokens are drawn with guidance %g, top_k %d, top_p %g but scored by the conditional "
            "model alone, as the published recipe does; the gap is logged as "
            "sampling/sampling_logp_difference, and objective.policy guided has none",
            params.guidance_scale,
            params.top_k,
            params.top_p,
        )


def tokens_to_score(rollout: Rollout, kind: PolicyKind) -> TokensToScore:
    """The tokens of a rollout under the policy that the objective names.

    Raises:
        ValueError: the guided policy of a filtered draw without its kept sets.
    """
    if kind == "conditional":
        params = SamplingParams(temperature=rollout.params.temperature)
        return TokensToScore(rollout.conditions, rollout.token_ids, params, None)
    if rollout.params.is_filtered and rollout.support is None:
        raise ValueError(
            "rollout.support: expected the kept sets of a filtered draw, got None; draw with "
            "support=True"
        )
    return TokensToScore(rollout.conditions, rollout.token_ids, rollout.params, rollout.support)


def head_inputs(policy: ScoringPolicy, tokens: TokensToScore) -> HeadInputs:
    """Run the trunk over some images, twice where they are guided. Differentiable."""
    hidden = drawn_hidden(policy, tokens.conditions, tokens.token_ids, tokens.params)
    support = None if tokens.support is None else tokens.support.flatten(0, 1)
    chosen = tokens.token_ids.flatten()
    return HeadInputs(hidden.flatten(0, 1), chosen, tokens.params.temperature, support)


@torch.no_grad()
def scored(policy: ScoringPolicy, tokens: TokensToScore, micro_batch: int) -> TokenLogprobs:
    """[N, T] fp32 log-probs and entropies, a few images at a time, without gradient."""
    shape = tokens.token_ids.shape
    parts = []
    for rows in torch.arange(shape[0], device=tokens.token_ids.device).split(micro_batch):
        inputs = head_inputs(policy, tokens.rows(rows))
        parts.append(
            token_logprobs(
                inputs.hidden,
                policy.head_weight,
                inputs.token_ids,
                inputs.temperature,
                inputs.support,
            )
        )
    return TokenLogprobs(*(torch.cat(values).view(shape) for values in zip(*parts, strict=True)))


def with_null_labels(
    tokens: TokensToScore,
    policy: ScoringPolicy,
    share: float,
    generator: torch.Generator,
    image_ids: Tensor,
) -> TokensToScore:
    """The same tokens, some of their classes replaced by the null class.

    Args:
        tokens: of a class-conditional policy.
        policy: knows its null class.
        share: chance of each image.
        generator: on the CPU, in one state on all ranks.
        image_ids: [N] int64, the places of the images among those of all ranks.

    Raises:
        ValueError: the policy is conditioned on texts.
    """
    labels = tokens.conditions
    if isinstance(labels, TextFeatures):
        raise ValueError("parity.label_dropout: expected 0 for a text-conditional policy")
    chances = torch.rand(len(labels) * num_ranks(), generator=generator).to(labels.device)
    is_dropped = chances[image_ids] < share
    null = policy.null_conditions(labels)
    assert isinstance(null, Tensor)
    return tokens._replace(conditions=torch.where(is_dropped, null, labels))
