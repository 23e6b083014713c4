"""From hidden states to the gradients of the loss, through the fused head.

Three ways to the same gradients; the objective decides:

- What a token adds is known before its log-prob is (`has_fixed_scales`: one update a rollout). The
  gradients of the head are made in its forward pass, three products instead of four.
- What it adds needs its own log-prob (`has_token_scales`: ratios that move, weights of the draw).
  Three products too, with the loss algebra between two launches of each chunk.
- Otherwise, with averages over an image: autograd, which makes the logits once more in the
  backward pass.

[m * T, V] is never held, and the gradient of the head's weight goes straight into the optimizer's
fp32 sum, never through the dtype of the weights.

Shapes: m images of a micro-batch, T tokens, D width, V codebook.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.kernels.logprob_gradients import fixed_scale_gradients, logprob_gradients
from argrpo.kernels.token_logprobs import token_logprobs
from argrpo.loss_batch import LossBatch
from argrpo.loss_metrics import LossMetrics
from argrpo.objective_config import ObjectiveConfig
from argrpo.objectives import (
    fixed_scales,
    has_fixed_scales,
    has_token_scales,
    policy_loss,
    token_scales,
)
from argrpo.token_scores import HeadInputs


class LearnedBatch(NamedTuple):
    """What a micro-batch left besides its gradients."""

    logprobs: Tensor  # [m, T] fp32, detached
    metrics: LossMetrics


def backward(
    inputs: HeadInputs,
    head_weight: Tensor,
    weight_grad: Tensor,
    batch: LossBatch,
    config: ObjectiveConfig,
    *,
    reversed_clip: bool = False,
) -> LearnedBatch:
    """Add the gradients of a micro-batch's loss to those of the weights.

    Args:
        inputs: hidden states with the graph of the trunk behind them, m * T rows.
        head_weight: [V, D].
        weight_grad: [V, D] fp32, to which the gradient of `head_weight` is added.
        batch: the constants of the loss, of m images.
        config: the objective.
        reversed_clip: see `ParityConfig`.
    """
    hidden, token_ids, temperature, support = inputs
    shape = (len(batch.advantages), len(token_ids) // len(batch.advantages))
    if not has_token_scales(batch, config):
        scores = token_logprobs(
            hidden, head_weight, token_ids, temperature, support, weight_grad=weight_grad
        )
        logprobs, entropies = scores.logprobs.view(shape), scores.entropies.view(shape)
        loss = policy_loss(logprobs, entropies, batch, config, reversed_clip=reversed_clip)
        loss.loss.backward()
        return LearnedBatch(logprobs.detach(), loss.metrics)

    scored, kept = (hidden.detach(), head_weight, token_ids), (temperature, support)
    if has_fixed_scales(batch, config):
        fixed = fixed_scales(batch, config, num_tokens=shape[1])
        done = fixed_scale_gradients(*scored, fixed, *kept, weight_grad=weight_grad)
    else:
        moving = token_scales(batch, config, num_tokens=shape[1], reversed_clip=reversed_clip)
        done = logprob_gradients(*scored, moving, *kept, weight_grad=weight_grad)
    hidden.backward(done.dhidden)
    logprobs, entropies = done.logprobs.view(shape), done.entropies.view(shape)
    with torch.no_grad():
        loss = policy_loss(logprobs, entropies, batch, config, reversed_clip=reversed_clip)
    return LearnedBatch(logprobs, loss.metrics)
