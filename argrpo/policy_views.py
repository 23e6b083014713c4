"""What is looked at of a policy between steps: grids of fixed seeds, and evaluations."""

from collections.abc import Sequence

from argrpo.best_checkpoint import BestCheckpoint
from argrpo.collection import Collection
from argrpo.config import TrainConfig
from argrpo.engine.ranges import Ranges
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.evaluation.during_training import Evaluation
from argrpo.image_files import save_grid
from argrpo.learner import Learner
from argrpo.models.pairing import check_guidance
from argrpo.ranks import is_first
from argrpo.run_folder import RunFolder
from argrpo.run_models import RunModels
from argrpo.stop_signals import StopSignals
from argrpo.trackers import Tracker


class PolicyViews:
    """Shows and measures a policy with the average of its weights, where the run keeps one.

    What is drawn here has its own seeds and leaves no trace in the training, so all of it may be
    abandoned and done again.
    """

    def __init__(
        self,
        config: TrainConfig,
        models: RunModels,
        engine: RolloutEngine,
        collection: Collection,
        learner: Learner,
        folder: RunFolder,
        ranges: Ranges,
        signals: StopSignals,
    ) -> None:
        """
        Args:
            config: the run.
            models: its policy, prompts and tokenizer.
            engine: draws from the policy.
            collection: decodes as the run does.
            learner: knows the average of the weights.
            folder: of the run.
            ranges: told of samples and evaluation.
            signals: which may end what is done here.

        Raises:
            ValueError, FileNotFoundError: what the evaluation needs does not fit or is not there.
        """
        self._config = config
        self._policy, self._tokenizer, self._prompts = models
        self._engine = engine
        self._collection = collection
        self._learner = learner
        self._folder = folder
        self._ranges = ranges
        self._signals = signals
        self.evaluation: Evaluation | None = None
        self.best: BestCheckpoint | None = None
        settings = config.eval
        if settings.is_on:
            check_guidance(self._policy, "eval.guidance_scales", *(settings.guidance_scales or []))
            self.evaluation = Evaluation(config, self._prompts, learner.device)
            if settings.best_metric is not None:
                self.best = BestCheckpoint(folder, settings.best_metric, settings.best_mode)

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure the policy, where it is time, and keep it if it is the best so far.

        Args:
            step: after which it stands; 0 is before training.

        Raises:
            Preempted: a signal came; nothing was kept.
        """
        if self.evaluation is None or not self._config.eval.is_due(step, self._config.num_steps):
            return {}
        with self._learner.averaged():
            with self._ranges("evaluation"), self._signals.breakable("evaluation"):
                metrics = self.evaluation.measure(self._engine, self._tokenizer)
            if self.best is not None and self.best.improves(metrics):
                self.best.save(self._policy, step, metrics)
        return metrics

    def show(self, step: int, trackers: Sequence[Tracker]) -> None:
        """A grid of the same conditions and seeds every time; the first rank draws it.

        Args:
            step: after which the policy stands; 0 is before training.
            trackers: shown the grid.

        Raises:
            Preempted: a signal came.
        """
        if not is_first():
            return
        count = self._config.output.sample_images
        cycle = [self._prompts.prompts[i % len(self._prompts)] for i in range(count)]
        path = self._folder.samples(step)
        # The weights are put back outside what may be broken.
        shown, allowed = self._learner.averaged(), self._signals.breakable_alone("samples")
        with shown, self._ranges("samples"), allowed:
            conditions, seed = self._prompts.conditions(cycle, 1), self._config.seed
            rollout = self._engine.draw(conditions, self._config.rollout, seed=seed)
            pixels = self._collection.pixels(rollout)
        save_grid(pixels, path)
        for tracker in trackers:
            tracker.image(step, "samples", path)

    def is_shown(self, step: int) -> bool:
        """Whether a grid is drawn after a step."""
        every = self._config.output.sample_every
        return step == self._config.num_steps or (every > 0 and step % every == 0)

    def is_monitored(self, step: int) -> bool:
        """Whether the judges that only measure are asked in a step, counted from 1."""
        every = self._config.judging.monitor_every
        last = step == self._config.num_steps
        return self.is_shown(step) if every is None else last or step % every == 0
