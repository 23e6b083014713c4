"""From the prompts of a step to scored images: draw, decode, score."""

import hashlib
from typing import NamedTuple

from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.data import Prompt, PromptSet
from argrpo.engine.rollout import Rollout
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.models.vq import VQTokenizer
from argrpo.pixels import seen_by_judges
from argrpo.rewards.scoring import Judges, Scores
from argrpo.step_clock import StepClock


class Collected(NamedTuple):
    """What a step learns from: N images, those of a prompt next to each other."""

    rollout: Rollout
    scores: Scores


class Collection:
    """Draws, decodes and scores the images of a step."""

    def __init__(
        self,
        config: TrainConfig,
        prompts: PromptSet,
        engine: RolloutEngine,
        tokenizer: VQTokenizer,
        judges: Judges,
        clock: StepClock,
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._engine = engine
        self._tokenizer = tokenizer
        self._judges = judges
        self._clock = clock

    def collect(self, step: int, *, with_monitors: bool, support: bool) -> Collected:
        """The images of a step and what judges say of them.

        Args:
            step: 0-based; decides the prompts and the seed.
            with_monitors: ask the judges that only measure, too.
            support: remember which tokens the filters kept.
        """
        prompts = self._prompts.draw(self._config.prompts_per_step, self._config.seed, step)
        rollout = self._draw(prompts, step, support)
        with self._clock.phase("decode"):
            images = self.pixels(rollout)
        return Collected(rollout, self._score(images, prompts, with_monitors))

    def pixels(self, rollout: Rollout) -> Tensor:
        """[N, 3, H, W] fp32 in [0, 1]."""
        batch = self._config.tokenizer.decode_batch
        return self._tokenizer.decode(rollout.token_ids, decode_batch=batch)

    def _draw(self, prompts: list[Prompt], step: int, support: bool) -> Rollout:
        with self._clock.phase("rollout"):
            conditions = self._prompts.conditions(prompts, self._config.images_per_prompt)
            seed = draw_seed(self._config.seed, step)
            return self._engine.draw(conditions, self._config.rollout, seed=seed, support=support)

    def _score(self, images: Tensor, prompts: list[Prompt], with_monitors: bool) -> Scores:
        with self._clock.phase("reward"):
            repeated = [p for p in prompts for _ in range(self._config.images_per_prompt)]
            seen = seen_by_judges(images, self._config.tokenizer.pixels)
            return self._judges.score(seen, repeated, with_monitors=with_monitors)


def draw_seed(run_seed: int, step: int) -> int:
    """The seed of a step's draw: 64 bits hashed from the run's seed and the step."""
    digest = hashlib.blake2b(f"draw {run_seed} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
