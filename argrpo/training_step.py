"""One rollout iteration, which may stop in its middle and go on from there.

    draw, decode, judge        nothing has moved: a step that stops here is begun again, and draws
                               the same images, since a draw depends on (weights, seed, step) alone
    optimizer steps            a step that stops between two of them is saved with its rollout, its
                               advantages and how far it is, because the weights have moved
    commit                     what moves once a step: distribution rewards, entropy control

A process that is killed saves nothing; it goes on from its last checkpoint and replays the rest.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from argrpo.collection import Collection, draw_seed
from argrpo.config import TrainConfig
from argrpo.data import PromptSet
from argrpo.engine.conditions import moved_to
from argrpo.engine.rollout import Rollout
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
from argrpo.step_progress import StepProgress
from argrpo.token_scores import tokens_to_score


class StepOutcome(NamedTuple):
    """What a step has to tell, until it is told; JSON holds all of it."""

    metrics: dict[str, float]
    extras: dict[str, dict[str, list[Any]]]  # of judges, for a table, by name and column


Breakable = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class StepInFlight:
    """A step whose images are drawn and judged."""

    step: int  # 0-based
    experience: Experience
    progress: StepProgress
    measured: dict[str, float]  # of images, scores and advantages, as they are logged
    extras: dict[str, dict[str, list[Any]]]  # see StepOutcome
    is_scored: bool  # whether any image of any rank learns
    score_names: list[str]
    scores: Tensor  # [N, R] fp32 on the CPU, of all ranks; for whoever asks what went wrong

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, not copies; conditions and texts follow from the step."""
        rollout, experience = self.experience.rollout, self.experience
        found = {
            "rollout.token_ids": rollout.token_ids,
            "rollout.logprobs": rollout.logprobs,
            "rollout.cond_logprobs": rollout.cond_logprobs,
            "rollout.entropies": rollout.entropies,
            "rollout.support": rollout.support,
            "rollout.image_ids": rollout.image_ids,
            "advantages": experience.advantages,
            "used": experience.used,
            "old_logprobs": experience.old_logprobs,
            "ref_logprobs": experience.ref_logprobs,
            "scores": self.scores,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def state(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        return {
            "progress": self.progress.state(),
            "measured": self.measured,
            "extras": self.extras,
            "is_scored": self.is_scored,
            "score_names": self.score_names,
        }


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
        self._device = learner.device
        self._random: dict[str, Tensor] | None = None  # of when it is to go on; None: now
        self._observed: float | None = None  # entropy of the step, until it is committed
        self.in_flight: StepInFlight | None = None
        self.problem: str | None = None
        """Of the judges, once the run has to end."""

    def run(self, step: int, *, with_monitors: bool) -> StepOutcome:
        """All of a step but `commit`.

        Raises:
            NonFiniteError: an optimizer step was refused; its images are in the run folder.
            Preempted: a signal came; `in_flight` is what is to be saved, if anything.
        """
        self._clock.start_step()
        if self.in_flight is None:
            self.in_flight = self._begun(step, with_monitors)
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
        """What a checkpoint holds of this and its parts; not copies."""
        parts = {
            "learner": self._learner.state_dict(),
            "judges": self._judges.state_dict(),
            "entropy": self._entropy.state_dict(),
            "random": self._random or random_state(self._device),
            "in_flight": {} if self.in_flight is None else self.in_flight.tensors(),
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

    def _begun(self, step: int, with_monitors: bool) -> StepInFlight:
        """Draw, decode and judge, and score what stays fixed while the policy moves."""
        self._random = random_state(self._device)
        with self._learner.undone_if_broken(), self._breakable("draw"):
            collected = self._collection.collect(
                step,
                with_monitors=with_monitors,
                support=self._config.rollout.is_filtered and self._learner.wants_support,
            )
            with self._clock.phase("logprob"):
                # Needs no score, so judges work meanwhile.
                fixed = self._learner.fixed_logprobs(collected.rollout)
            scores = self._collection.scores(collected)
        self.problem = self._failures.observe(scores)
        advantages = scores.advantages(self._config.images_per_prompt)
        own = advantages.of_images(self._collection.image_ids)
        return StepInFlight(
            step,
            self._learner.prepare(collected.rollout, own, fixed),
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
        config, here = self._config, self._own(tensors)
        conditions = self._prompts.conditions(self._collection.prompts_of(step), repeats=1)
        rollout = Rollout(
            token_ids=here["rollout.token_ids"],
            logprobs=here["rollout.logprobs"],
            cond_logprobs=here.get("rollout.cond_logprobs"),
            entropies=here["rollout.entropies"],
            support=here.get("rollout.support"),
            conditions=moved_to(conditions, self._device),
            params=config.rollout,
            seed=draw_seed(config.seed, step),
            image_ids=here["rollout.image_ids"],
        )
        used = here["used"]
        experience = Experience(
            rollout=rollout,
            tokens=tokens_to_score(rollout, config.objective.policy),
            advantages=here["advantages"],
            used=used,
            all_used=bool(used.all()),
            old_logprobs=here.get("old_logprobs"),
            ref_logprobs=here.get("ref_logprobs"),
            draw_logprobs=rollout.logprobs if config.objective.needs_draw_logprobs else None,
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
