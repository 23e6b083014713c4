"""From a rollout and its advantages to a better policy.

    prepare    log-probs that stay fixed while the policy moves: of the reference, and of the policy
               itself where a rollout has several optimizer steps
    learn      inner_epochs passes over the images, minibatches optimizer steps each

Which distribution the tokens are scored under is `objective.policy`, see argrpo/token_scores.py.

Shapes: N images of a step, m images of a micro-batch, T tokens of an image.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from argrpo.advantages import Advantages
from argrpo.config import TrainConfig
from argrpo.draw_gap import draw_difference, draw_ratio
from argrpo.engine.ranges import Ranges, no_ranges
from argrpo.engine.rollout import Rollout
from argrpo.engine.sampling_params import SamplingParams
from argrpo.experience import Experience, FixedLogprobs
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.loading import published_weights
from argrpo.non_finite import RefusedUpdate
from argrpo.policy_update import PolicyUpdate
from argrpo.ranks import gather_rows
from argrpo.reference import Reference
from argrpo.state_names import part_of, with_prefixes
from argrpo.step_progress import StepProgress
from argrpo.token_scores import TokensToScore, tokens_to_score
from argrpo.weight_average import WeightAverage

_CONDITIONAL = SamplingParams()


class Learner:
    """Holds what moves the policy: the objective, the reference, the optimizer."""

    def __init__(
        self,
        policy: ImagePolicy,
        config: TrainConfig,
        ranges: Ranges = no_ranges,
        breakable: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """The reference is the policy as it is now; without a KL there is none.

        Args:
            policy: read by the engine, moved here.
            config: the run.
            ranges: told of reference, forward, backward and optimizer.
            breakable: entered around passes, which may be abandoned.
        """
        self._policy = policy
        self._ranges = ranges
        self._breakable = breakable
        self._config = config
        policy.checkpoints_layers = config.gradient_checkpointing
        policy.attention = config.policy.attention
        policy.end_sees_itself = not config.parity.first_token_mask
        has_kl = config.objective.beta > 0
        self._reference = Reference(policy, config.reference) if has_kl else None
        decay = config.weight_ema
        self._average = None if decay is None else WeightAverage(policy, decay)
        self._update = PolicyUpdate(policy, config, ranges)

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self._policy.head_weight.device

    @property
    def wants_support(self) -> bool:
        """Whether a filtered draw must remember its kept sets."""
        return self._config.objective.policy == "guided"

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the policy's weights are their moving average, where the run keeps one."""
        return nullcontext() if self._average is None else self._average.applied()

    def shown_weights(self) -> dict[str, Tensor]:
        """The policy's weights as they are shown and saved, under published names. Copies where
        they are the average, else not."""
        if self._average is None:
            return published_weights(self._policy)
        with self._average.applied():
            weights = published_weights(self._policy)
            return {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def fixed_logprobs(self, rollout: Rollout) -> FixedLogprobs:
        """Log-probs that stay fixed while the policy moves, before any image is scored."""
        tokens = tokens_to_score(rollout, self._config.objective.policy)
        reference = None
        if self._reference is not None:
            with self._ranges("reference"), self._reference.on_device() as model:
                reference = self._update.scored(model, tokens).logprobs
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
        progress: StepProgress | None = None,
    ) -> dict[str, float]:
        """All optimizer steps on the same images.

        Args:
            experience: from `prepare`.
            step: 0-based, for the learning rate.
            entropy_coef: the reward for entropy in place of the objective's; a tensor [N] has one
                for each image.
            entropy_rule: mean token entropy in nats -> the coefficient, for the images at each
                place of their groups, in place of `entropy_coef`; see `ParityConfig`.
            progress: of the same step, to go on from; tells how far it is while it goes.

        Returns:
            Metrics of the last pass over the images, except how far the draw's log-probs lie from
            the policy's, which is of the first optimizer step.

        Raises:
            NonFiniteError: a gradient is not finite; the weights are as before.
        """
        done = progress or StepProgress()
        if done.num_updates == 0:
            done.metrics |= self._policy_entropy(experience.tokens)
        minibatches = self._minibatches(len(experience))
        for number in range(done.num_updates, self._config.updates_per_step):
            rows = minibatches[number % len(minibatches)]
            if entropy_rule is not None:
                entropy_coef = self._by_completion(experience.tokens, rows, entropy_rule)
                done.metrics["entropy/coef"] = entropy_coef[rows].mean().item()
            self._move(experience, rows, step, entropy_coef, done)
        self._finish_step(step, done)
        return {
            **self._measured(done, experience.tokens),
            **done.metrics,
            "learning_rate": self._update.learning_rate(step),
            "optimizer_step": float(self._update.num_optimizer_steps),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the policy's own weights and a frozen reference.

        update.*, average.* and reference.* (of one that follows the policy); not copies.
        """
        parts: dict[str, dict[str, Tensor]] = {"update": self._update.state_dict()}
        if self._average is not None:
            parts["average"] = self._average.state_dict()
        if self._reference is not None and not self._reference.is_frozen:
            parts["reference"] = self._reference.state_dict()
        return with_prefixes(parts)

    def own_rows(self) -> dict[str, Tensor]:
        """See `PolicyUpdate.own_rows`; update.own_rows.* in `load_state_dict`."""
        return self._update.own_rows()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up where `state_dict` was read; the policy has its weights already.

        Raises:
            ValueError: something is missing, unknown, or of another shape.
        """
        self._update.load_state_dict(part_of(state, "update"))
        if self._average is not None:
            self._average.load_state_dict(part_of(state, "average"))
        if self._reference is not None and not self._reference.is_frozen:
            self._reference.load_state_dict(part_of(state, "reference"))

    @property
    def frozen_reference(self) -> Reference | None:
        """The reference, where it stays what it was at the start of the run."""
        reference = self._reference
        return reference if reference is not None and reference.is_frozen else None

    def undone_if_broken(self) -> AbstractContextManager[None]:
        """Passes inside that end in an exception leave neither gradients nor drawn numbers."""
        return self._update.undone_if_broken()

    def _before_updates(self, rollout: Rollout, tokens: TokensToScore) -> Tensor | None:
        """[N, T] log-probs that ratios compare with; None: each pass is its own."""
        config = self._config
        if not config.keeps_old_logprobs:
            return None
        if config.objective.old_logprobs == "draw":
            return rollout.logprobs
        return self._update.scored(
            self._policy, self._update.trained(tokens, rollout.image_ids)
        ).logprobs

    def _by_completion(
        self, tokens: TokensToScore, rows: Tensor, rule: Callable[[float], float]
    ) -> Tensor:
        """[N] coefficients of the images of an optimizer step, by their places in their groups."""
        group = self._config.images_per_prompt
        entropies = self._update.scored(self._policy, tokens.rows(rows)).entropies
        own = entropies.mean(dim=1).view(-1, group).mean(dim=0)
        of_places = gather_rows(own[None])[0].mean(dim=0).tolist()
        coefficients = entropies.new_zeros(len(tokens.token_ids))
        coefficients[rows] = entropies.new_tensor([rule(h) for h in of_places]).repeat(
            len(rows) // group
        )
        return coefficients

    def _move(
        self,
        experience: Experience,
        rows: Tensor,
        step: int,
        entropy_coef: Tensor | float | None,
        done: StepProgress,
    ) -> None:
        """One optimizer step on some images."""
        with self.undone_if_broken(), self._breakable("passes"):
            passed = self._update.passes(experience, rows, entropy_coef)
        if done.num_updates == 0:
            done.metrics |= self._draw_gap(experience.rollout, rows, passed.logprobs)
        norm = self._update.step(passed, step)
        is_first = done.num_updates % self._config.minibatches == 0
        done.add(passed.losses, norm, starts_pass=is_first)
        if not math.isfinite(norm):
            refused = RefusedUpdate(rows, norm)
            done.refused.append(refused)
            self._update.go_on_or_stop(refused, step)

    def _finish_step(self, step: int, done: StepProgress) -> None:
        """Move what moves once a step."""
        if done.is_finished:
            return
        if self._reference is not None:
            self._reference.after_step(step + 1, self._policy)
        if self._average is not None:
            self._average.update()
        done.is_finished = True

    def _measured(self, done: StepProgress, tokens: TokensToScore) -> dict[str, float]:
        """Metrics of the last pass over the images."""
        assert done.losses is not None
        is_policy = tokens.params == _CONDITIONAL
        named = done.losses.named(entropy_name="entropy/policy" if is_policy else "entropy/scored")
        named["loss"] /= len(done.grad_norms)
        return {**named, "grad_norm": sum(done.grad_norms) / len(done.grad_norms)}

    def _draw_gap(self, rollout: Rollout, rows: Tensor, logprobs: Tensor) -> dict[str, float]:
        gap = draw_difference(rollout, rows, logprobs)
        if self._config.objective.policy == "guided" and not self._config.keeps_old_logprobs:
            # The ratio to its own pass would be 1; that to the draw says whether they agree.
            gap["ratio_max_abs_dev"] = draw_ratio(rollout, rows, logprobs)
        return gap

    def _policy_entropy(self, tokens: TokensToScore) -> dict[str, float]:
        """entropy/policy over each rank's first micro-batch, where the loss measures another."""
        if tokens.params == _CONDITIONAL:
            return {}
        count = self._config.micro_batch
        first = tokens.rows(torch.arange(len(tokens.token_ids))[:count].to(tokens.token_ids.device))
        conditional = first._replace(params=_CONDITIONAL, support=None)
        entropies = self._update.scored(self._policy, conditional).entropies
        means, _ = gather_rows(entropies.mean().view(1, 1))
        return {"entropy/policy": means.mean().item()}

    def _minibatches(self, num_images: int) -> tuple[Tensor, ...]:
        rows = torch.arange(num_images, device=self._policy.head_weight.device)
        return rows.split(num_images // self._config.minibatches)
