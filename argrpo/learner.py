"""From a rollout and its advantages to a better policy.

    prepare    log-probs that stay fixed while the policy moves: of the reference, and of the policy
               itself where a rollout has several optimizer steps
    learn      inner_epochs passes over the images, minibatches optimizer steps each

Which distribution the tokens are scored under is `objective.policy`, see argrpo/token_scores.py.

Shapes: N images of a step, m images of a micro-batch, T tokens of an image.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.advantages import Advantages
from argrpo.config import TrainConfig
from argrpo.engine.ranges import Ranges, no_ranges
from argrpo.engine.rollout import Rollout
from argrpo.engine.sampling_params import SamplingParams
from argrpo.experience import Experience, FixedLogprobs
from argrpo.head_gradients import LearnedBatch, backward
from argrpo.loss_batch import LossBatch
from argrpo.loss_metrics import LossMetrics
from argrpo.models.image_policy import ImagePolicy
from argrpo.optimizer import MasterAdamW
from argrpo.reference import Reference
from argrpo.schedules import learning_rate
from argrpo.token_scores import (
    TokensToScore,
    head_inputs,
    scored,
    tokens_to_score,
    with_null_labels,
)
from argrpo.weight_average import WeightAverage

_CONDITIONAL = SamplingParams()


class NonFiniteError(RuntimeError):
    """A gradient is not a finite number; the weights are those of the step before."""


class _Update(NamedTuple):
    """One optimizer step."""

    rows: Tensor  # [n] its images
    logprobs: Tensor  # [n, T] fp32, before it
    metrics: LossMetrics
    grad_norm: float


class Learner:
    """Holds what moves the policy: the objective, the reference, the optimizer."""

    def __init__(
        self, policy: ImagePolicy, config: TrainConfig, ranges: Ranges = no_ranges
    ) -> None:
        """The reference is the policy as it is now; without a KL there is none.

        `ranges` is told of reference, forward, backward and optimizer.
        """
        self._policy = policy
        self._ranges = ranges
        self._config = config
        policy.checkpoints_layers = config.gradient_checkpointing
        policy.attention = config.policy.attention
        policy.end_sees_itself = _end_sees_itself(policy, config)
        has_kl = config.objective.beta > 0
        self._reference = Reference(policy, config.reference) if has_kl else None
        self._optimizer = MasterAdamW(
            policy.named_parameters(),
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            max_grad_norm=config.optimizer.max_grad_norm,
            fp32_masters=not config.parity.bf16_masters,
        )
        self._head_name = next(
            name for name, weight in policy.named_parameters() if weight is policy.head_weight
        )
        decay = config.weight_ema
        self._average = None if decay is None else WeightAverage(policy, decay)
        self._dropout = torch.Generator().manual_seed(config.seed)
        self._num_optimizer_steps = 0

    @property
    def wants_support(self) -> bool:
        """Whether a filtered draw must remember its kept sets."""
        return self._config.objective.policy == "guided"

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the policy's weights are their moving average, where the run keeps one."""
        return nullcontext() if self._average is None else self._average.applied()

    @torch.no_grad()
    def fixed_logprobs(self, rollout: Rollout) -> FixedLogprobs:
        """Log-probs that stay fixed while the policy moves, before any image is scored."""
        tokens = tokens_to_score(rollout, self._config.objective.policy)
        reference = None
        if self._reference is not None:
            with self._ranges("reference"), self._reference.on_device() as model:
                reference = scored(model, tokens, self._config.micro_batch).logprobs
        return FixedLogprobs(tokens, self._before_updates(rollout, tokens), reference)

    @torch.no_grad()
    def prepare(
        self, rollout: Rollout, advantages: Advantages, fixed: FixedLogprobs | None = None
    ) -> Experience:
        """What is learned from: images, advantages and `fixed_logprobs`, made here if not given."""
        fixed = fixed or self.fixed_logprobs(rollout)
        objective, device = self._config.objective, rollout.token_ids.device
        used = advantages.used.flatten()
        values = advantages.components.flatten(0, 1)
        if not objective.clip_components:
            values = advantages.values.flatten()
        return Experience(
            rollout=rollout,
            tokens=fixed.tokens,
            advantages=values.to(device),
            used=used.to(device),
            all_used=bool(used.all()),
            old_logprobs=fixed.old,
            ref_logprobs=fixed.reference,
            draw_logprobs=rollout.logprobs if objective.needs_draw_logprobs else None,
        )

    def learn(
        self,
        experience: Experience,
        step: int,
        *,
        entropy_coef: float | Tensor | None = None,
        entropy_rule: Callable[[float], float] | None = None,
    ) -> dict[str, float]:
        """All optimizer steps on the same images.

        Args:
            experience: from `prepare`.
            step: 0-based, for the learning rate.
            entropy_coef: the reward for entropy in place of the objective's; a tensor [N] has one
                for each image.
            entropy_rule: mean token entropy in nats -> the coefficient, for the images at each
                place of their groups, in place of `entropy_coef`; see `ParityConfig`.

        Returns:
            Metrics of the last pass over the images, except how far the draw's log-probs lie from
            the policy's, which is of the first optimizer step.

        Raises:
            NonFiniteError: a gradient is not finite; the weights are as before.
        """
        metrics = self._policy_entropy(experience.tokens)
        for epoch in range(self._config.inner_epochs):
            updates = []
            for rows in self._minibatches(len(experience)):
                if entropy_rule is not None:
                    entropy_coef = self._by_completion(experience.tokens, rows, entropy_rule)
                    metrics["entropy/coef"] = entropy_coef[rows].mean().item()
                updates.append(self._update(experience, rows, step, entropy_coef))
            if epoch == 0:
                metrics |= _draw_mismatch(experience.rollout, updates[0])
        if self._reference is not None:
            self._reference.after_step(step + 1, self._policy)
        if self._average is not None:
            self._average.update()
        return {
            **self._measured(updates, experience),
            **metrics,
            "learning_rate": self._learning_rate(step),
            "optimizer_step": float(self._num_optimizer_steps),
        }

    def _before_updates(self, rollout: Rollout, tokens: TokensToScore) -> Tensor | None:
        """[N, T] log-probs that ratios compare with; None: each pass is its own."""
        config = self._config
        if config.updates_per_step == 1:
            return None
        if config.objective.old_logprobs == "draw":
            return rollout.logprobs
        return scored(self._policy, self._trained(tokens), config.micro_batch).logprobs

    def _by_completion(
        self, tokens: TokensToScore, rows: Tensor, rule: Callable[[float], float]
    ) -> Tensor:
        """[N] coefficients of the images of an optimizer step, by their places in their groups."""
        group = self._config.images_per_prompt
        entropies = scored(self._policy, tokens.rows(rows), self._config.micro_batch).entropies
        of_places = entropies.mean(dim=1).view(-1, group).mean(dim=0).tolist()
        coefficients = entropies.new_zeros(len(tokens.token_ids))
        coefficients[rows] = entropies.new_tensor([rule(h) for h in of_places]).repeat(
            len(rows) // group
        )
        return coefficients

    def _update(
        self, experience: Experience, rows: Tensor, step: int, entropy_coef: Tensor | float | None
    ) -> _Update:
        """One optimizer step on some images."""
        config = self._config
        group = config.images_per_prompt if config.parity.sum_over_group else 1
        scale = experience.scale(rows, summed=group)
        tokens = self._trained(experience.tokens)
        parts = [
            self._accumulate(tokens.rows(part), experience.batch(part, scale, entropy_coef))
            for part in rows.split(config.micro_batch)
        ]
        metrics = parts[0].metrics
        for part in parts[1:]:
            metrics = metrics.merged(part.metrics)
        # Without a single score only old momentum would move the weights.
        grad_norm = self._step_optimizer(step) if scale.num_tokens else 0.0
        return _Update(rows, torch.cat([part.logprobs for part in parts]), metrics, grad_norm)

    def _accumulate(self, tokens: TokensToScore, batch: LossBatch) -> LearnedBatch:
        """Forward and backward of a micro-batch; its gradient adds to that of the step."""
        with self._ranges("forward"):
            inputs = head_inputs(self._policy, tokens)
        # The head's forward pass is in here: it makes gradients where it can.
        with self._ranges("backward"):
            done = backward(
                inputs,
                self._policy.head_weight,
                self._optimizer.main_grad(self._head_name),
                batch,
                self._config.objective,
                reversed_clip=self._config.parity.reversed_clip,
            )
            self._optimizer.accumulate()
        return done

    def _step_optimizer(self, step: int) -> float:
        with self._ranges("optimizer"):
            grad_norm = float(self._optimizer.step(self._learning_rate(step)))
        if not math.isfinite(grad_norm):
            raise NonFiniteError(
                f"grad_norm: expected a finite number at step {step + 1}, got {grad_norm}; the "
                "weights were left as they were. Lower the learning rate, or look at the rewards "
                "in metrics.jsonl"
            )
        self._num_optimizer_steps += 1
        return grad_norm

    def _trained(self, tokens: TokensToScore) -> TokensToScore:
        """What the policy scores, in each pass."""
        share = self._config.parity.label_dropout
        return with_null_labels(tokens, self._policy, share, self._dropout) if share else tokens

    def _learning_rate(self, step: int) -> float:
        config = self._config.optimizer.learning_rate
        return learning_rate(step, config, num_steps=self._config.num_steps)

    def _measured(self, updates: list[_Update], experience: Experience) -> dict[str, float]:
        """Metrics of one pass over the images."""
        merged = updates[0].metrics
        for update in updates[1:]:
            merged = merged.merged(update.metrics)
        is_policy = experience.tokens.params == _CONDITIONAL
        named = merged.named(entropy_name="entropy/policy" if is_policy else "entropy/scored")
        named["loss"] /= len(updates)
        if self._config.objective.policy == "guided" and self._config.updates_per_step == 1:
            # The ratio to its own pass would be 1; that to the draw says whether they agree.
            named["ratio_max_abs_dev"] = _draw_ratio(experience.rollout, updates[0])
        grad_norm = sum(update.grad_norm for update in updates) / len(updates)
        return {**named, "grad_norm": grad_norm}

    def _policy_entropy(self, tokens: TokensToScore) -> dict[str, float]:
        """entropy/policy over the first micro-batch, where the loss measures another entropy."""
        if tokens.params == _CONDITIONAL:
            return {}
        count = self._config.micro_batch
        first = tokens.rows(torch.arange(len(tokens.token_ids))[:count].to(tokens.token_ids.device))
        conditional = first._replace(params=_CONDITIONAL, support=None)
        entropies = scored(self._policy, conditional, count).entropies
        return {"entropy/policy": entropies.mean().item()}

    def _minibatches(self, num_images: int) -> tuple[Tensor, ...]:
        rows = torch.arange(num_images, device=self._policy.head_weight.device)
        return rows.split(num_images // self._config.minibatches)


def _end_sees_itself(policy: ImagePolicy, config: TrainConfig) -> bool:
    """Whether a padded last text position is scored as it was drawn."""
    if config.parity.first_token_mask and policy.config.text_padding != "right":
        raise ValueError(
            "parity.first_token_mask: expected policy.text_padding right with it, got "
            f"{policy.config.text_padding}"
        )
    return not config.parity.first_token_mask


def _draw_mismatch(rollout: Rollout, update: _Update) -> dict[str, float]:
    """How far the log-probs that were trained on lie from those of the draw."""
    difference = (update.logprobs - rollout.logprobs[update.rows]).abs().flatten().sort().values
    last = len(difference) - 1
    chosen = difference[[last // 2, last * 99 // 100, last]]
    values = torch.cat([difference.mean()[None], chosen]).tolist()
    names = ("mean", "p50", "p99", "max")
    return {
        f"sampling/sampling_logp_difference/{name}": value
        for name, value in zip(names, values, strict=True)
    }


def _draw_ratio(rollout: Rollout, update: _Update) -> float:
    """Largest abs(ratio - 1) of the policy that trains to the one that drew."""
    return (update.logprobs - rollout.logprobs[update.rows]).expm1().abs().max().item()
