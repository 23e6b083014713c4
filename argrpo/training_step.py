"""One rollout iteration, which may stop in its middle and go on from there.

    draw, decode, judge        nothing has moved: a step that stops here is begun again, and draws
                               the same images, since a draw depends on (weights, seed, step) alone
    optimizer steps            a step that stops between two of them is saved with its rollout, its
                               advantages and how far it is, because the weights have moved
    commit                     what moves once a step: distribution rewards, entropy control

With draw_ahead the images of the next step are drawn, decoded and handed to the judges before this
one's scores are waited for. They come from weights that are gone when their turn comes, so that
their rollout is saved too.

A process that is killed saves nothing; it goes on from its last checkpoint and replays the rest.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from argrpo.collection import Collection
from argrpo.config import TrainConfig
from argrpo.data import PromptSet
from argrpo.drawn_step import DrawnStep, restored_draw
from argrpo.engine.conditions import moved_to
from argrpo.entropy_control import EntropyControl
from argrpo.experience import Experience
from argrpo.learner import Learner
from argrpo.non_finite import dump_refused
from argrpo.random_state import random_state
from argrpo.ranks import num_ranks
from argrpo.rewards.failure_watch import FailureWatch
from argrpo.rewards.over_ranks import extras_over_ranks
from argrpo.rewards.scoring import Judges
from argrpo.run_folder import RunFolder
from argrpo.state_names import part_of, with_prefixes
from argrpo.step_clock import StepClock
from argrpo.step_in_flight import StepInFlight
from argrpo.step_progress import StepProgress


class StepOutcome(NamedTuple):
    """What a step has to tell, until it is told; JSON holds all of it."""

    metrics: dict[str, float]
    extras: dict[str, dict[str, list[Any]]]  # of judges, for a table, by name and column


Breakable = Callable[[str], AbstractContextManager[object]]


class TrainingStep:
    """Draws, judges and learns; holds the step that is under way."""

    def __init__(
        self,
        config: TrainConfig,
        prompts: PromptSet,
        collection: Collection,
        judges: Judges,
        learner: Learner,
        entropy: EntropyControl,
        clock: StepClock,
        folder: RunFolder,
        breakable: Breakable,
    ) -> None:
        """One argument for each part that a step uses, so more than is usual here.

        `breakable` is entered around work that may be abandoned.
        """
        self._config = config
        self._prompts = prompts
        self._collection = collection
        self._judges = judges
        self._learner = learner
        self._entropy = entropy
        self._clock = clock
        self._folder = folder
        self._breakable = breakable
        self._failures = FailureWatch(config.judging)
        self._ahead: DrawnStep | None = None  # the step that is begun next
        self._device = learner.device
        self._random: dict[str, Tensor] | None = None  # of when it is to go on; None: now
        self._observed: float | None = None  # entropy of the step, until it is committed
        self.in_flight: StepInFlight | None = None
        self.problem: str | None = None
        """Of the judges, once the run has to end."""

    def run(self, step: int, *, is_monitored: Callable[[int], bool]) -> StepOutcome:
        """All of a step but `commit`.

        Args:
            step: 0-based.
            is_monitored: whether the judges that only measure are asked in a step, counted from 1.

        Raises:
            NonFiniteError: an optimizer step was refused; its images are in the run folder.
            Preempted: a signal came; `in_flight` is what is to be saved, if anything.
        """
        self._clock.start_step()
        if self.in_flight is None:
            self.in_flight = self._begun(step, is_monitored)
            self._random = random_state(self._device)
        now = self.in_flight
        entropy_coef = self._entropy.coefficient(step)
        by_completion = self._config.parity.entropy_by_completion
        rule = partial(self._entropy.coefficient_at, step) if by_completion else None
        try:
            with self._clock.phase("update"):
                learned = self._learner.learn(
                    now.experience,
                    step,
                    entropy_coef=entropy_coef,
                    entropy_rule=rule,
                    progress=now.progress,
                )
        finally:
            self._dump_refused(now)
        # A step without a single score measures no entropy, nor does one that was refused.
        is_measured = now.is_scored and not now.progress.refused
        self._observed = learned["entropy/policy"] if is_measured else None
        num_tokens = num_ranks() * now.experience.rollout.token_ids.numel()
        metrics = {
            **now.measured,
            "entropy/coef": entropy_coef,
            **learned,
            **self._clock.finish_step(self._config.images_per_step, num_tokens),
        }
        return StepOutcome(metrics, now.extras)

    def commit(self) -> None:
        """Move what moves once a step; the step is over."""
        self._judges.update()
        if self._observed is not None:
            self._entropy.observe(self._observed)
        self._observed = self._random = self.in_flight = None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this and its parts; not copies, except what is drawn ahead.

        All ranks call it together.
        """
        image_ids = self._collection.image_ids
        parts = {
            "learner": self._learner.state_dict(),
            "judges": self._judges.state_dict(),
            "entropy": self._entropy.state_dict(),
            "random": self._random or random_state(self._device),
            "in_flight": {} if self.in_flight is None else self.in_flight.tensors(),
            "ahead": {} if self._ahead is None else self._ahead.tensors(image_ids),
        }
        return with_prefixes(parts)

    def state(self) -> dict[str, Any]:
        """What JSON can hold of the same."""
        in_flight = None if self.in_flight is None else self.in_flight.state()
        return {"failures": self._failures.state(), "in_flight": in_flight}

    def load(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on where `tensors` and `state` were taken; the global generators are not touched.

        Args:
            step: finished steps.
            tensors: of the checkpoint.
            state: of the checkpoint.

        Raises:
            ValueError, KeyError, TypeError: something is missing, or of another shape.
        """
        self._learner.load_state_dict(part_of(tensors, "learner"))
        self._judges.load_state_dict(part_of(tensors, "judges"))
        self._entropy.load_state_dict(part_of(tensors, "entropy"))
        self._failures.load_state(state["failures"])
        if state["in_flight"] is not None:
            self.in_flight = self._restored(step, part_of(tensors, "in_flight"), state["in_flight"])
        if ahead := part_of(tensors, "ahead"):
            self._ahead = self._restored_draw(step + (self.in_flight is not None), ahead)

    def _begun(self, step: int, is_monitored: Callable[[int], bool]) -> StepInFlight:
        """Draw, decode and judge, and score what stays fixed while the policy moves."""
        self._random = random_state(self._device)
        with self._learner.undone_if_broken(), self._breakable("draw"):
            now = self._ahead
            if now is None:
                now = self._drawn(step, is_monitored(step + 1))
            collected = now.collected or self._collection.collect_again(
                now.rollout, step, with_monitors=is_monitored(step + 1)
            )
            ahead = None
            if self._config.draw_ahead and step + 1 < self._config.num_steps:
                ahead = self._drawn(step + 1, is_monitored(step + 2))
            scores = self._collection.scores(collected)
        self._ahead = ahead
        self.problem = self._failures.observe(scores)
        advantages = scores.advantages(self._config.images_per_prompt)
        own = advantages.of_images(self._collection.image_ids)
        return StepInFlight(
            step,
            self._learner.prepare(now.rollout, own, now.fixed),
            StepProgress(),
            {
                **scores.metrics(),
                **self._collection.measured(collected),
                **advantages.metrics(),
            },
            extras_over_ranks(scores.extras),
            bool(advantages.used.any()),
            scores.names,
            scores.values,
        )

    def _restored(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> StepInFlight:
        drawn, here = self._restored_draw(step, tensors), self._own(tensors)
        rollout, used = drawn.rollout, here["used"]
        needs_draw = self._config.objective.needs_draw_logprobs
        experience = Experience(
            rollout=rollout,
            tokens=drawn.fixed.tokens,
            advantages=here["advantages"],
            used=used,
            all_used=bool(used.all()),
            old_logprobs=drawn.fixed.old,
            ref_logprobs=drawn.fixed.reference,
            draw_logprobs=rollout.logprobs if needs_draw else None,
        )
        progress = StepProgress.of(state["progress"], self._device)
        return StepInFlight(
            step,
            experience,
            progress,
            dict(state["measured"]),
            dict(state["extras"]),
            bool(state["is_scored"]),
            list(state["score_names"]),
            tensors["scores"],
        )

    def _restored_draw(self, step: int, tensors: dict[str, Tensor]) -> DrawnStep:
        conditions = self._prompts.conditions(self._collection.prompts_of(step), repeats=1)
        here = moved_to(conditions, self._device)
        return restored_draw(self._own(tensors), here, step, self._config)

    def _drawn(self, step: int, with_monitors: bool) -> DrawnStep:
        collected = self._collection.collect(
            step,
            with_monitors=with_monitors,
            support=self._config.rollout.is_filtered and self._learner.wants_support,
        )
        with self._clock.phase("logprob"):
            # Needs no score, so judges work meanwhile.
            fixed = self._learner.fixed_logprobs(collected.rollout)
        return DrawnStep(collected.rollout, fixed, collected)

    def _own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of this rank's images, where one process saved those of all."""
        saved = tensors["rollout.image_ids"].tolist()
        rows = torch.tensor([saved.index(image) for image in self._collection.image_ids.tolist()])
        whole = {name: tensor for name, tensor in tensors.items() if name != "scores"}
        return {name: tensor[rows].to(self._device) for name, tensor in whole.items()}

    def _dump_refused(self, now: StepInFlight) -> None:
        if not now.progress.refused:
            return
        scores = dict(zip(now.score_names, now.scores.unbind(1), strict=True))
        refused, rollout = now.progress.refused, now.experience.rollout
        prompts = self._collection.prompts_of(now.step)
        dump_refused(self._folder, now.step + 1, refused, rollout, scores, prompts)
