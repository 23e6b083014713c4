"""GRPO: draw images, let judges score them, compare within groups, move the policy.

    conditions -> engine.draw -> tokens -> tokenizer.decode -> images -> rewards
               -> advantages per group -> objective on log-probs -> optimizer -> next draw

The optimizer writes the very weights that the engine reads, so nothing is copied between a step
and the next draw.

Source: Shao et al., arXiv:2402.03300 (GRPO); the recipe of AR-GRPO, arXiv:2508.06924.
"""

import logging
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from argrpo.best_checkpoint import BestCheckpoint
from argrpo.collection import Collection
from argrpo.config import TrainConfig
from argrpo.devices import DTYPES, choose_device
from argrpo.engine.conditions import moved_to
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.entropy_control import make_entropy_control
from argrpo.evaluation.during_training import Evaluation
from argrpo.image_files import save_grid
from argrpo.learner import Learner
from argrpo.memory_preflight import MemoryForecast, available_bytes, forecast_memory
from argrpo.model_paths import blamed_on, resolve_path
from argrpo.models.attention_backends import check_attention
from argrpo.models.loading import load_policy, load_tokenizer, save_policy
from argrpo.models.pairing import check_guidance, check_label_dropout, check_pair
from argrpo.models.text_layout import text_layout
from argrpo.profile_config import ProfileConfig
from argrpo.progress import Report, unreported
from argrpo.rank_checks import check_alike, common_folder
from argrpo.ranks import is_first, meet, node_leader_first, num_ranks
from argrpo.rewards.failure_watch import FailureWatch, JudgesUnavailableError
from argrpo.rewards.over_ranks import extras_over_ranks
from argrpo.rewards.scoring import Judges
from argrpo.run_prompts import load_run_prompts
from argrpo.step_clock import StepClock
from argrpo.step_profile import StepProfile
from argrpo.step_split import one_ranks_share, split_images
from argrpo.trackers import Tracker, append_extras, make_trackers

_LOG = logging.getLogger(__name__)


class TrainResult(NamedTuple):
    """What is left when a run ends."""

    policy_path: Path  # the folder of the tuned policy, for load_policy
    metrics: dict[str, float]  # of the last step
    best_path: Path | None = None  # the folder of the best policy, where one is kept


class Trainer:
    """One run. Building it checks everything that can be checked before the first step.

    On several ranks each holds one, inside `argrpo.process_group.process_group`. All of them do
    everything together, but only the first writes files and has trackers.
    """

    def __init__(
        self,
        config: TrainConfig,
        trackers: Sequence[Tracker] | None = None,
        report: Report = unreported,
    ) -> None:
        """Load the models and the judges.

        Args:
            config: the run.
            trackers: who is told about each step; None: those that the config names.
            report: told ("texts", encoded so far, in all) while prompts are encoded.

        Raises:
            ValueError: a file or a setting that does not fit the others, or an output folder that
                holds another run, named.
            FileNotFoundError: a path that is not there.
            PeerError: another rank failed.
        """
        self.config = config
        self._device = choose_device(config.device)
        check_attention(config.policy.attention, self._device, DTYPES[config.policy.dtype])
        split_images(config, 0, num_ranks())  # refused before anything is loaded
        if trackers is None:
            trackers = make_trackers(config, progress=False)
        self._trackers = trackers if is_first() else []
        # First, so that a taken folder is known before minutes go into loading models.
        self._folder = common_folder(config.output_dir)
        try:
            traced = config.profile if is_first() else ProfileConfig()
            self.profile = StepProfile(traced, self._device, self._folder)
            self._clock = StepClock(self._device, self.profile.ranges)
            self._load(report)
        except BaseException:
            if is_first():
                self._folder.discard_if_empty()
            raise

    def _load(self, report: Report) -> None:
        config = self.config
        policy_path = resolve_path(config.policy.path, config.cache_dir)
        with blamed_on("policy.path", sizes="policy."):
            layout = text_layout(policy_path, text_padding=config.policy.text_padding)
        # Before the policy, so that an encoder of texts is gone when the policy comes.
        with node_leader_first("texts"):
            self._prompts = load_run_prompts(
                config.data, layout, device=self._device, cache_dir=config.cache_dir, report=report
            )
        with blamed_on("policy.path", sizes="policy."):
            self.policy = load_policy(
                policy_path,
                image_size=config.policy.image_size,
                num_heads=config.policy.num_heads,
                downsample=config.policy.downsample,
                text_padding=config.policy.text_padding,
                device=self._device,
                dtype=DTYPES[config.policy.dtype],
            )
        with blamed_on("tokenizer.path"):
            self._tokenizer = load_tokenizer(
                resolve_path(config.tokenizer.path, config.cache_dir),
                device=self._device,
                dtype=DTYPES[config.tokenizer.dtype],
            )
        check_pair(self.policy, self._tokenizer)
        check_guidance(self.policy, "rollout.guidance_scale", config.rollout.guidance_scale)
        check_label_dropout(self.policy, config.parity.label_dropout)
        check_alike(config, self.policy)
        self.policy.check_conditions(self._prompts.probe())
        self._judges = Judges(config, self._device, self.profile.ranges)
        self._failures = FailureWatch(config.judging)
        self._problem: str | None = None  # of the judges, once the run has to end
        self._learner = Learner(self.policy, config, self.profile.ranges)
        self.engine = self._make_engine()
        self._collection = Collection(
            config, self._prompts, self.engine, self._tokenizer, self._judges, self._clock
        )
        self._entropy = make_entropy_control(
            config.entropy,
            constant=config.objective.entropy_coef,
            num_steps=config.num_steps,
            vocab_size=self.policy.config.vocab_size,
        )
        self._load_evaluation()

    def _load_evaluation(self) -> None:
        settings = self.config.eval
        self._evaluation: Evaluation | None = None
        self._best: BestCheckpoint | None = None
        if settings.is_on:
            check_guidance(self.policy, "eval.guidance_scales", *(settings.guidance_scales or []))
            self._evaluation = Evaluation(self.config, self._prompts, self._device)
            if settings.best_metric is not None:
                self._best = BestCheckpoint(self._folder, settings.best_metric, settings.best_mode)

    def describe_memory(self) -> list[str]:
        """What an optimizer step will hold and which micro-batch fits, in words.

        Rehearses small passes; leaves no trace in the weights or the random state.
        """
        return self._forecast.describe(self._share, self._bytes_for_a_step())

    @property
    def _share(self) -> TrainConfig:
        """What this rank does of the run."""
        return one_ranks_share(self.config, num_ranks())

    @cached_property
    def _forecast(self) -> MemoryForecast:
        conditions = moved_to(self._prompts.probe(), self._device)
        return forecast_memory(self.policy, self._share, conditions)

    def _bytes_for_a_step(self) -> int:
        # Judges, tokenizer and weights stand already; the weights are part of the forecast.
        return available_bytes(self._device) + self._forecast.weights

    def _make_engine(self) -> RolloutEngine:
        config = self.config
        own_images = config.images_per_step // num_ranks()
        slots = min(config.max_slots or own_images, own_images)
        kv_bytes = config.kv_bytes
        if kv_bytes is None and self._device.type == "cuda":
            # The cache stays while the optimizer steps.
            kv_bytes = self._forecast.left_for_cache(self._share, self._bytes_for_a_step())
        return RolloutEngine(
            self.policy,
            max_slots=slots,
            kv_bytes=kv_bytes,
            deterministic=config.deterministic,
            ranges=self.profile.engine_ranges,
        )

    def train(self) -> TrainResult:
        """Run all steps.

        Raises:
            NonFiniteError: a gradient stopped being a number.
            JudgesUnavailableError: a judge failed for too long; a checkpoint was saved.
            PeerError: another rank failed.
        """
        self._warn_of_mismatch()
        metrics: dict[str, float] = {}
        try:
            for tracker in self._trackers:
                tracker.start(self.config, self._folder)
            if is_first():
                self._show_samples(0)
            if base := self._evaluate(0):
                self._log(0, base)
            for step in range(self.config.num_steps):
                with self.profile.tracing(step):
                    with self.profile.ranges("step"):
                        metrics = self._train_step(step)
                    metrics = {**metrics, **self._evaluate(step + 1)}
                    self._log(step + 1, metrics)
                    self._leave_files(step + 1)
                    self._check_judges(step + 1)
            meet("end of the run")
        finally:
            self._judges.close()
            for tracker in self._trackers:
                tracker.close()
        best = None if self._best is None else self._best.path
        return TrainResult(self._folder.checkpoint(self.config.num_steps), metrics, best)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def _train_step(self, step: int) -> dict[str, float]:
        """One rollout iteration: the whole method in a few lines."""
        self._clock.start_step()
        collected = self._collection.collect(
            step,
            with_monitors=self._is_monitored(step + 1),
            support=self.config.rollout.is_filtered and self._learner.wants_support,
        )
        rollout = collected.rollout
        with self._clock.phase("logprob"):
            # Needs no score, so judges work meanwhile.
            fixed = self._learner.fixed_logprobs(rollout)
        scores = self._collection.scores(collected)
        self._keep_extras(step + 1)
        self._problem = self._failures.observe(scores)
        advantages = scores.advantages(self.config.images_per_prompt)
        own = advantages.of_images(self._collection.image_ids)
        experience = self._learner.prepare(rollout, own, fixed)
        entropy_coef = self._entropy.coefficient(step)
        with self._clock.phase("update"):
            by_completion = self.config.parity.entropy_by_completion
            rule = partial(self._entropy.coefficient_at, step) if by_completion else None
            learned = self._learner.learn(
                experience, step, entropy_coef=entropy_coef, entropy_rule=rule
            )
        self._judges.update()
        # A step without a single score measures no entropy.
        if advantages.used.any():
            self._entropy.observe(learned["entropy/policy"])
        return {
            **scores.metrics(),
            **self._collection.measured(collected),
            **advantages.metrics(),
            "entropy/coef": entropy_coef,
            **learned,
            **self._clock.finish_step(
                self.config.images_per_step, num_ranks() * rollout.token_ids.numel()
            ),
        }

    def _evaluate(self, step: int) -> dict[str, float]:
        """Measure the policy, where it is time, and keep it if it is the best so far."""
        if self._evaluation is None or not self.config.eval.is_due(step, self.config.num_steps):
            return {}
        with self._learner.averaged():
            with self.profile.ranges("evaluation"):
                metrics = self._evaluation.measure(self.engine, self._tokenizer)
            if self._best is not None and self._best.improves(metrics):
                self._best.save(self.policy, step, metrics)
        return metrics

    def _is_shown(self, step: int) -> bool:
        every = self.config.output.sample_every
        return step == self.config.num_steps or (every > 0 and step % every == 0)

    def _is_monitored(self, step: int) -> bool:
        every = self.config.judging.monitor_every
        last = step == self.config.num_steps
        return self._is_shown(step) if every is None else last or step % every == 0

    def _leave_files(self, step: int) -> None:
        last = step == self.config.num_steps
        every = self.config.output.save_every
        is_saved = last or bool(every and step % every == 0)
        if not is_first() or not (is_saved or self._is_shown(step)):
            return
        with self._learner.averaged():
            if self._is_shown(step):
                with self.profile.ranges("samples"):
                    self._show_samples(step)
            if is_saved:
                self._save(step)

    def _save(self, step: int) -> None:
        with self.profile.ranges("checkpoint"):
            save_policy(self.policy, self._folder.checkpoint(step))

    def _check_judges(self, step: int) -> None:
        if self._problem is None:
            return
        path = self._folder.checkpoint(step)
        if is_first() and not path.exists():
            with self._learner.averaged():
                self._save(step)
        raise JudgesUnavailableError(f"{self._problem}; the run ends here, saved in {path}")

    def _keep_extras(self, step: int) -> None:
        """What judges have to say of each image, in a file."""
        extras = extras_over_ranks(self._judges.extras())
        if is_first():
            append_extras(self._folder.reward_extras_path, step, extras)

    def _show_samples(self, step: int) -> None:
        """A grid of the same conditions and seeds every time."""
        count = self.config.output.sample_images
        cycle = [self._prompts.prompts[i % len(self._prompts)] for i in range(count)]
        rollout = self.engine.draw(
            self._prompts.conditions(cycle, 1), self.config.rollout, seed=self.config.seed
        )
        path = self._folder.samples(step)
        save_grid(self._collection.pixels(rollout), path)
        for tracker in self._trackers:
            tracker.image(step, "samples", path)

    def _warn_of_mismatch(self) -> None:
        params = self.config.rollout
        is_mixed = params.is_guided or params.is_filtered
        if is_mixed and self.config.objective.policy == "conditional":
            _LOG.warning(
                "tokens are drawn with guidance %g, top_k %d, top_p %g but scored by the "
                "conditional model alone, as the published recipe does; the gap is logged as "
                "sampling/sampling_logp_difference, and objective.policy guided has none",
                params.guidance_scale,
                params.top_k,
                params.top_p,
            )
