"""When judges fail for so long that going on would waste the run."""

from collections import defaultdict
from collections.abc import Mapping

from argrpo.judging_config import JudgingConfig
from argrpo.rewards.scoring import Scores


class JudgesUnavailableError(RuntimeError):
    """A judge that is optimised scored too few images for too long; the run was saved."""


class FailureWatch:
    """Counts, for each judge with a weight, the steps in a row in which it failed too often."""

    def __init__(self, config: JudgingConfig) -> None:
        self._config = config
        self._num_bad_steps: defaultdict[str, int] = defaultdict(int)

    def state(self) -> dict[str, int]:
        """Bad steps in a row, by judge."""
        return dict(self._num_bad_steps)

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken."""
        self._num_bad_steps.clear()
        self._num_bad_steps.update(state)

    def observe(self, scores: Scores) -> str | None:
        """What is wrong, in a line, once a judge has failed for `patience` steps in a row.

        A step is bad where more than `max_failure_rate` of its images have no score that they
        should have; where a judge does not apply, nothing failed.
        """
        weights = dict(zip(scores.names, scores.weights.tolist(), strict=True))
        for outcome in scores.outcomes:
            answer, name = outcome.answer, outcome.name
            if not weights.get(name):
                continue
            num_images = len(answer.scores)
            is_bad = answer.num_failures > self._config.max_failure_rate * num_images
            self._num_bad_steps[name] = self._num_bad_steps[name] + 1 if is_bad else 0
            if self._num_bad_steps[name] >= self._config.patience:
                return (
                    f"rewards.{name}: expected scores for at least "
                    f"{1 - self._config.max_failure_rate:.0%} of a step's images, got "
                    f"{num_images - answer.num_failures} of {num_images} in the last of "
                    f"{self._num_bad_steps[name]} such steps ({answer.problem})"
                )
        return None
