"""GRPO: draw images, let judges score them, compare within groups, move the policy.

    conditions -> engine.draw -> tokens -> tokenizer.decode -> images -> rewards
               -> advantages per group -> objective on log-probs -> optimizer -> next draw

The optimizer writes the very weights that the engine reads, so nothing is copied between a step
and the next draw.

Source: Shao et al., arXiv:2402.03300 (GRPO); the recipe of AR-GRPO, arXiv:2508.06924.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from argrpo.checkpoint_writer import CheckpointWriter
from argrpo.collection import Collection
from argrpo.config import TrainConfig
from argrpo.devices import DTYPES, choose_device
from argrpo.entropy_control import make_entropy_control
from argrpo.learner import Learner
from argrpo.model_paths import blamed_on
from argrpo.models.attention_backends import check_attention
from argrpo.policy_views import PolicyViews
from argrpo.profile_config import ProfileConfig
from argrpo.progress import Report, unreported
from argrpo.rank_checks import common_folder
from argrpo.ranks import is_first, meet, num_ranks
from argrpo.resuming import Start, find_start
from argrpo.rewards.failure_watch import JudgesUnavailableError
from argrpo.rewards.scoring import Judges
from argrpo.run_lock import RunLock
from argrpo.run_memory import RunMemory
from argrpo.run_models import load_models
from argrpo.run_state import RunState
from argrpo.step_clock import StepClock
from argrpo.step_profile import StepProfile
from argrpo.step_split import split_images
from argrpo.stop_signals import Preempted, StopSignals
from argrpo.token_scores import warn_of_mismatch
from argrpo.trackers import Tracker, append_extras, make_trackers
from argrpo.training_step import StepOutcome, TrainingStep
from argrpo.watchdog import Watchdog

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
        self._folder = common_folder(config.output_dir, may_hold_run=config.resume != "no")
        try:
            self._lock = RunLock(self._folder.path) if is_first() else None
            try:
                self._prepare(report)
            except BaseException:
                self._unlock()
                raise
        except BaseException:
            if is_first():
                self._folder.discard_if_empty()
            raise

    def _prepare(self, report: Report) -> None:
        config = self.config
        traced = config.profile if is_first() else ProfileConfig()
        self.profile = StepProfile(traced, self._device, self._folder)
        self._watchdog = Watchdog(config.fault.watchdog_s, self._folder.watchdog_path)
        self._signals = StopSignals()
        self._ranges = self._watchdog.watched(self.profile.ranges)
        self._clock = StepClock(self._device, self._ranges)
        start = find_start(config, self._folder)
        self._load(start, report)
        self._writer = CheckpointWriter(
            self._folder.checkpoints_path,
            keep_last=config.output.keep_last,
            keep_every=config.output.keep_every,
            reference=None if start is None else start.reference,
        )
        self._saved: Path | None = None  # the newest checkpoint
        if start is not None:
            with blamed_on("resume"):
                self._state.load(start.snapshot, start.path.resolve().parent)
            if start.path.resolve().parent == self._folder.checkpoints_path.resolve():
                self._saved = self._folder.checkpoints_path / start.path.name
            _LOG.warning(
                "resume: going on after step %d from %s", self._state.num_finished, start.path
            )

    def _load(self, start: Start | None, report: Report) -> None:
        config = self.config
        models = load_models(config, self._device, start, report)
        self.policy, tokenizer, prompts = models
        self._judges = Judges(config, self._device, self._ranges)
        self._judges.check_prompts(prompts.prompts)
        self._learner = Learner(self.policy, config, self._ranges, self._signals.breakable_alone)
        self._memory = RunMemory(config, models, self._device)
        self.engine = self._memory.make_engine(self.profile.engine_ranges)
        self._collection = Collection(
            config, prompts, self.engine, tokenizer, self._judges, self._clock
        )
        self._step = TrainingStep(
            config,
            prompts,
            self._collection,
            self._judges,
            self._learner,
            make_entropy_control(
                config.entropy,
                constant=config.objective.entropy_coef,
                num_steps=config.num_steps,
                vocab_size=self.policy.config.vocab_size,
            ),
            self._clock,
            self._folder,
            self._signals.breakable,
        )
        self._views = PolicyViews(
            config,
            models,
            self.engine,
            self._collection,
            self._learner,
            self._folder,
            self._ranges,
            self._signals,
        )
        self._state = RunState(
            config, self.policy, self._learner, self._step, self._views.evaluation, self._views.best
        )

    def describe_memory(self) -> list[str]:
        """What an optimizer step will hold and which micro-batch fits, in words.

        Rehearses small passes; leaves no trace in the weights or the random state.
        """
        return self._memory.describe()

    def train(self) -> TrainResult:
        """Run all steps that are left.

        Raises:
            NonFiniteError: a loss or gradient stopped being a number; see `FaultConfig`.
            JudgesUnavailableError: a judge failed for too long; a checkpoint was saved.
            PeerError: another rank failed.
            Preempted: a signal came; a checkpoint was saved.
            StorageError: a checkpoint could not be written.
        """
        warn_of_mismatch(self.config.rollout, self.config.objective.policy)
        metrics: dict[str, float] = {}
        try:
            with self._signals, self._watchdog:
                try:
                    metrics = self._run()
                except Preempted as stop:
                    raise Preempted(self._saved_after(stop)) from stop
                finally:
                    self._close()
        finally:
            self._unlock()
        best = None if self._views.best is None else self._views.best.path
        assert self._saved is not None
        return TrainResult(self._saved, metrics, best)

    def _run(self) -> dict[str, float]:
        state = self._state
        state.set_generators(self._device)
        logged = None
        if state.has_begun:
            logged = state.num_finished - (state.pending is not None)
        for tracker in self._trackers:
            tracker.start(self.config, self._folder, logged)
        if not state.has_begun:
            self._views.show(0, self._trackers)
            if base := self._views.evaluate(0):
                self._log(0, StepOutcome(base, {}))
            state.has_begun = True
        metrics = {} if state.pending is None else self._conclude(state.pending)
        while state.num_finished < self.config.num_steps:
            step = state.num_finished
            with self.profile.tracing(step):
                with self._ranges("step"):
                    outcome = self._step.run(step, is_monitored=self._views.is_monitored)
                    self._step.commit()
                state.pending, state.num_finished = outcome, step + 1
                metrics = self._conclude(outcome)
        self._save()
        self._writer.wait()
        meet("end of the run")
        return metrics

    def _conclude(self, outcome: StepOutcome) -> dict[str, float]:
        """Evaluate, show, log and save, after a step; may be done again from its beginning."""
        step, output = self._state.num_finished, self.config.output
        evaluated = self._views.evaluate(step)
        if self._views.is_shown(step):
            self._views.show(step, self._trackers)
        metrics = {**outcome.metrics, **evaluated}
        self._log(step, outcome._replace(metrics=metrics))
        self._state.pending = None
        self._writer.check()
        if output.save_every and step % output.save_every == 0:
            self._save()
        if self._step.problem is not None:
            self._save()
            self._writer.wait()
            raise JudgesUnavailableError(
                f"{self._step.problem}; the run ends here, saved in {self._saved}"
            )
        self._signals.check("step")
        return metrics

    def _log(self, step: int, outcome: StepOutcome) -> None:
        if is_first():
            append_extras(self._folder.reward_extras_path, step, outcome.extras)
        for tracker in self._trackers:
            tracker.log(step, outcome.metrics)

    def _save(self) -> None:
        """Begin to write the run as it is, unless that was done."""
        path = self._folder.checkpoints_path / self._state.position.name
        if path == self._saved:
            return
        with self._ranges("checkpoint"):
            self._writer.wait()
            # Asked now: the checkpoint before may just have written it.
            wants_reference = self._writer.reference is None
            # All ranks take part: each holds a part of the optimizer's state.
            self._state.write_parts(self._folder.checkpoints_path)
            snapshot = self._state.snapshot(with_reference=wants_reference)
            if is_first():
                self._writer.save(snapshot)
        self._saved = path

    def _saved_after(self, stop: Preempted) -> str:
        """Save after a signal, and say what to do next."""
        next_time = f"argrpo train --resume {self._folder.path}"
        if not self._state.has_begun:
            return f"stopped by {stop} before the first step; nothing was to be saved"
        self._save()
        with self._ranges("checkpoint"):
            self._writer.wait()
        return f"stopped by {stop}, saved in {self._saved}; {next_time} goes on"

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _close(self) -> None:
        # The lock is let go after this: nothing may write here any more.
        self._writer.finish()
        self._judges.close()
        for tracker in self._trackers:
            tracker.close()
