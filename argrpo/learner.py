"""From a rollout and its advantages to a better policy.

The log-probs of policy and reference are those of the conditional model at the draw's temperature,
over the whole codebook, whatever guidance and filters drew the tokens: AR-GRPO's recipe.

Shapes: N images of a step, m images of a micro-batch, T tokens of an image.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.advantages import Advantages
from argrpo.config import TrainConfig
from argrpo.engine.conditions import select
from argrpo.engine.rollout import Rollout
from argrpo.kernels.token_logprobs import TokenLogprobs, token_logprobs
from argrpo.loss_batch import LossBatch, LossScale
from argrpo.loss_metrics import LossMetrics
from argrpo.models.llamagen import LlamaGen
from argrpo.objectives import policy_loss
from argrpo.optimizer import MasterAdamW
from argrpo.schedules import learning_rate


class NonFiniteError(RuntimeError):
    """A gradient is not a finite number; the weights are those of the step before."""


@dataclass(frozen=True, slots=True, eq=False)
class Experience:
    """One step's images, ready to be learned from."""

    rollout: Rollout
    advantages: Tensor  # [N] fp32
    mask: Tensor | None  # [N, T] bool, the images that learn; None: all of them
    scale: LossScale
    old_logprobs: Tensor | None  # [N, T] fp32; None: those of the forward pass itself
    ref_logprobs: Tensor | None  # [N, T] fp32


class _MicroBatch(NamedTuple):
    logprobs: Tensor  # [m, T] fp32, detached
    metrics: LossMetrics


class Learner:
    """Holds what moves the policy: the objective, the frozen reference, the optimizer."""

    def __init__(self, policy: LlamaGen, config: TrainConfig) -> None:
        """The reference is the policy as it is now; without a KL there is none."""
        self._policy = policy
        self._config = config
        self._reference = _frozen_copy(policy) if config.objective.beta > 0 else None
        self._optimizer = MasterAdamW(
            policy.named_parameters(),
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            max_grad_norm=config.optimizer.max_grad_norm,
        )
        self._num_optimizer_steps = 0

    @torch.no_grad()
    def prepare(self, rollout: Rollout, advantages: Advantages) -> Experience:
        """Log-probs that stay fixed while the policy moves."""
        reference = old = None
        if self._reference is not None:
            reference = self._all_logprobs(self._reference, rollout)
        if self._config.inner_epochs > 1:
            old = self._all_logprobs(self._policy, rollout)
        device = rollout.token_ids.device
        # Without a score, or another to compare it with, an image does not even feel the KL.
        used = advantages.used.flatten().to(device)
        num_used = int(used.sum())
        mask = None if num_used == len(used) else used[:, None].expand_as(rollout.token_ids)
        num_tokens = rollout.token_ids.shape[1]
        scale = LossScale(max(num_used, 1), num_used * num_tokens, num_tokens)
        values = advantages.values.flatten().to(device)
        return Experience(rollout, values, mask, scale, old, reference)

    def learn(self, experience: Experience, step: int) -> dict[str, float]:
        """One optimizer step per inner epoch on the same images; metrics are those of the last.

        Args:
            experience: from `prepare`.
            step: 0-based, for the learning rate.

        Raises:
            NonFiniteError: the gradient is not finite; the weights are as before.
        """
        for epoch in range(self._config.inner_epochs):
            parts = [self._accumulate(experience, rows) for rows in self._micro_batches()]
            if epoch == 0:
                mismatch = _draw_mismatch(experience.rollout, parts)
            # Without a single score only old momentum would move the weights.
            grad_norm = self._step_optimizer(step) if experience.scale.num_tokens else 0.0
        metrics = parts[0].metrics
        for part in parts[1:]:
            metrics = metrics.merged(part.metrics)
        return {
            **metrics.named(entropy_name=self._entropy_name),
            **mismatch,
            "grad_norm": grad_norm,
            "learning_rate": self._learning_rate(step),
            "optimizer_step": float(self._num_optimizer_steps),
        }

    def _all_logprobs(self, policy: LlamaGen, rollout: Rollout) -> Tensor:
        temperature = rollout.params.temperature
        parts = [
            _scored_tokens(policy, rollout, rows, temperature).logprobs
            for rows in self._micro_batches()
        ]
        return torch.cat(parts).view(rollout.token_ids.shape)

    def _accumulate(self, experience: Experience, rows: Tensor) -> _MicroBatch:
        """Forward and backward of some images; their gradient adds to that of the step."""
        rollout, config = experience.rollout, self._config
        shape = (len(rows), rollout.token_ids.shape[1])
        scores = _scored_tokens(self._policy, rollout, rows, config.rollout.temperature)
        logprobs = scores.logprobs.view(shape)
        batch = LossBatch(
            experience.advantages[rows],
            experience.scale,
            mask=_rows(experience.mask, rows),
            old_logprobs=_rows(experience.old_logprobs, rows),
            ref_logprobs=_rows(experience.ref_logprobs, rows),
        )
        loss = policy_loss(logprobs, scores.entropies.view(shape), batch, config.objective)
        loss.loss.backward()
        self._optimizer.accumulate()
        return _MicroBatch(logprobs.detach(), loss.metrics)

    def _step_optimizer(self, step: int) -> float:
        grad_norm = float(self._optimizer.step(self._learning_rate(step)))
        if not math.isfinite(grad_norm):
            raise NonFiniteError(
                f"grad_norm: expected a finite number at step {step + 1}, got {grad_norm}; the "
                "weights were left as they were. Lower the learning rate, or look at the rewards "
                "in metrics.jsonl"
            )
        self._num_optimizer_steps += 1
        return grad_norm

    def _learning_rate(self, step: int) -> float:
        config = self._config.optimizer.learning_rate
        return learning_rate(step, config, num_steps=self._config.num_steps)

    @property
    def _entropy_name(self) -> str:
        # entropy/policy is at temperature 1 by definition; a tempered one goes by another name.
        return "entropy/policy" if self._config.rollout.temperature == 1 else "entropy/tempered"

    def _micro_batches(self) -> Iterator[Tensor]:
        rows = torch.arange(self._config.images_per_step, device=self._policy.head_weight.device)
        yield from rows.split(self._config.micro_batch)


def _draw_mismatch(rollout: Rollout, parts: list[_MicroBatch]) -> dict[str, float]:
    """How far the log-probs that were trained on lie from those of the draw."""
    trained = torch.cat([part.logprobs for part in parts])
    difference = (trained - rollout.logprobs).abs()
    mean, largest = torch.stack([difference.mean(), difference.max()]).tolist()
    return {
        "sampling/sampling_logp_difference/mean": mean,
        "sampling/sampling_logp_difference/max": largest,
    }


def _scored_tokens(
    policy: LlamaGen, rollout: Rollout, rows: Tensor, temperature: float
) -> TokenLogprobs:
    """[m * T] log-probs and entropies of some images under the conditional model.

    At the draw's temperature and over the whole codebook, without guidance.
    """
    token_ids = rollout.token_ids[rows]
    hidden = policy.hidden(select(rollout.conditions, rows), token_ids).flatten(0, 1)
    return token_logprobs(hidden, policy.head_weight, token_ids.flatten(), temperature)


def _rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]


def _frozen_copy(policy: LlamaGen) -> LlamaGen:
    """The policy as it is now, apart from it: a child module would be trained and saved too."""
    return copy.deepcopy(policy).requires_grad_(False)
