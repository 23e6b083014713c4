"""One optimizer step of the policy on some images, whole or not at all.

Forward and backward of a micro-batch add to one gradient; where memory is short the micro-batches
are made smaller and begun again. A step whose loss or gradient is no finite number is refused:
weights and moments stay as they were.

Shapes: N images of a step, n of an optimizer step, m of a micro-batch, T tokens of an image.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.engine.ranges import Ranges
from argrpo.experience import Experience
from argrpo.head_gradients import LearnedBatch, backward
from argrpo.kernels.token_logprobs import TokenLogprobs
from argrpo.loss_batch import LossBatch
from argrpo.loss_metrics import LossMetrics
from argrpo.micro_batch import MicroBatch
from argrpo.models.image_policy import ImagePolicy
from argrpo.non_finite import NonFiniteError, RefusedUpdate
from argrpo.rank_optimizer import make_trained
from argrpo.schedules import learning_rate
from argrpo.state_names import named, part_of, whole_number, with_prefixes
from argrpo.token_scores import TokensToScore, head_inputs, scored, with_null_labels

_LOG = logging.getLogger(__name__)


class Passed(NamedTuple):
    """What the passes of an optimizer step left besides its gradient."""

    logprobs: Tensor  # [n, T] fp32, before it
    losses: LossMetrics  # of all ranks
    num_tokens: int  # that count, of all ranks


class PolicyUpdate:
    """Holds the optimizer, and what it counts and draws."""

    def __init__(
        self,
        policy: ImagePolicy,
        config: TrainConfig,
        ranges: Ranges,
    ) -> None:
        """Masters start as the policy's weights; see `Learner`."""
        self._policy = policy
        self._config = config
        self._ranges = ranges
        self._trained = make_trained(policy, config)
        self._optimizer = self._trained.optimizer
        self._micro_batch = MicroBatch(config.micro_batch, may_shrink=not self._trained.is_joint)
        self._head_name = next(
            name for name, weight in policy.named_parameters() if weight is policy.head_weight
        )
        self._dropout = torch.Generator().manual_seed(config.seed)
        self._num_skipped = 0
        self.num_optimizer_steps = 0

    def passes(
        self, experience: Experience, rows: Tensor, entropy_coef: Tensor | float | None
    ) -> Passed:
        """Forward and backward of some images, a micro-batch at a time.

        Args:
            experience: all images of a step.
            rows: [n] int64, which of them.
            entropy_coef: the reward for entropy; as a tensor [N].

        Raises:
            torch.OutOfMemoryError: half a micro-batch did not fit either.
            PeerError: another rank failed.
        """
        config = self._config
        group = config.images_per_prompt if config.parity.sum_over_group else 1
        scale = experience.scale(rows, summed=group)
        undo = self._undo()

        def work(micro_batch: int) -> Passed:
            tokens = self.trained(experience.tokens, experience.rollout.image_ids)
            parts = [
                self._accumulate(tokens.rows(part), experience.batch(part, scale, entropy_coef))
                for part in rows.split(micro_batch)
            ]
            losses = reduce(LossMetrics.merged, (part.metrics for part in parts))
            logprobs = torch.cat([part.logprobs for part in parts])
            return Passed(logprobs, losses, scale.num_tokens)

        passed = self._micro_batch.fitted(work, undo)
        return passed._replace(losses=passed.losses.over_ranks())

    def step(self, passed: Passed, step: int) -> float:
        """Move the weights along the gradient that `passes` left.

        Returns:
            The norm of the gradient; where it is not finite, nothing has moved.
        """
        if not passed.num_tokens:
            return 0.0  # without a single score only old momentum would move the weights
        # NaN where the loss is no number, else 0: the norm, which the optimizer reads anyway, then
        # guards against both, on all ranks.
        self._optimizer.main_grad(self._head_name)[0, 0].add_(passed.losses.loss * 0)
        self._optimizer.accumulate()
        with self._ranges("optimizer"):
            grad_norm = float(self._optimizer.step(self.learning_rate(step)))
            self._trained.publish()
        if math.isfinite(grad_norm):
            self.num_optimizer_steps += 1
        return grad_norm

    def go_on_or_stop(self, refused: RefusedUpdate, step: int) -> None:
        """Count an optimizer step that was refused.

        Raises:
            NonFiniteError: the config wants the run to stop, or there were too many of them.
        """
        fault = self._config.fault
        self._num_skipped += 1
        if fault.on_non_finite == "stop" or self._num_skipped > fault.max_skipped:
            raise NonFiniteError(
                f"grad_norm: expected a finite number at step {step + 1}, got "
                f"{refused.grad_norm}; the weights were left as they were, and the images stand in "
                "non_finite/. Lower the learning rate, or look at the rewards in metrics.jsonl"
            )
        _LOG.warning(
            "grad_norm: expected a finite number at step %d, got %s; this optimizer step is "
            "skipped, as %d of at most %d",
            step + 1,
            refused.grad_norm,
            self._num_skipped,
            fault.max_skipped,
        )

    def scored(self, model: ImagePolicy, tokens: TokensToScore) -> TokenLogprobs:
        """Log-probs and entropies of all tokens, without gradients."""
        return self._micro_batch.fitted(lambda size: scored(model, tokens, size), undo=_nothing)

    def trained(self, tokens: TokensToScore, image_ids: Tensor) -> TokensToScore:
        """What the policy scores, in each pass."""
        share = self._config.parity.label_dropout
        if share == 0:
            return tokens
        return with_null_labels(tokens, self._policy, share, self._dropout, image_ids)

    def learning_rate(self, step: int) -> float:
        config = self._config.optimizer.learning_rate
        return learning_rate(step, config, num_steps=self._config.num_steps)

    @contextmanager
    def undone_if_broken(self) -> Iterator[None]:
        """See `Learner`."""
        undo = self._undo()
        try:
            yield
        except BaseException:
            undo()
            raise

    def _undo(self) -> Callable[[], None]:
        """Forgets the gradients since the last optimizer step, and what is drawn from now on."""
        dropout = self._dropout.get_state()

        def undo() -> None:
            self._optimizer.discard()
            self._dropout.set_state(dropout)

        return undo

    def state_dict(self) -> dict[str, Tensor]:
        """optimizer.*, the generator of label dropout, and counters; tensors are not copies.

        Without optimizer.* where the optimizer is saved in parts, see `own_rows`.
        """
        in_parts = self._config.distributed.save == "parts"
        return {
            **with_prefixes({"optimizer": {} if in_parts else self._optimizer.state_dict()}),
            "dropout": self._dropout.get_state(),
            "num_optimizer_steps": torch.tensor(self.num_optimizer_steps),
            "num_skipped": torch.tensor(self._num_skipped),
        }

    def own_rows(self) -> dict[str, Tensor]:
        """The optimizer's state as far as it is on this rank; `load_state_dict` takes it, dealt out
        to any number of ranks, as own_rows.* in place of optimizer.*."""
        return self._optimizer.own_state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up where `state_dict` was read; the policy has its weights already.

        Raises:
            ValueError: something is missing, unknown, or of another shape.
        """
        self._trained.take_up()
        if own := part_of(state, "own_rows"):
            self._optimizer.load_own_state(own)
        else:
            self._optimizer.load_state_dict(part_of(state, "optimizer"))
        self._trained.publish()
        self._dropout.set_state(named(state, "dropout"))
        self.num_optimizer_steps = whole_number(state, "num_optimizer_steps")
        self._num_skipped = whole_number(state, "num_skipped")

    def _accumulate(self, tokens: TokensToScore, batch: LossBatch) -> LearnedBatch:
        """Forward and backward of a micro-batch; its gradient adds to that of the step."""
        with self._ranges("forward"):
            inputs = head_inputs(self._trained.policy, tokens)
        # The head's forward pass is in here: it makes gradients where it can.
        with self._ranges("backward"):
            done = backward(
                inputs,
                self._trained.policy.head_weight,
                self._optimizer.main_grad(self._head_name),
                batch,
                self._config.objective,
                reversed_clip=self._config.parity.reversed_clip,
            )
            self._optimizer.accumulate()
        return done


def _nothing() -> None:
    """Scoring leaves nothing to undo."""
