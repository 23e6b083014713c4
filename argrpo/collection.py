"""From the prompts of a step to scored images: draw, decode, score.

With judging.overlap the three run side by side. Images are decoded as they finish, in the batches
in which all of them would be, and go to the judges at once (rewards/pool.py); on a GPU decoding and
judging have a stream beside the one that draws. Overlap changes no bit of tokens, images or scores.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.data import Prompt, PromptSet
from argrpo.engine.conditions import Conditions, moved_to
from argrpo.engine.rollout import Rollout, concatenate
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.image_statistics import image_statistics, statistics_metrics
from argrpo.models.vq import VQTokenizer
from argrpo.pixels import seen_by_judges
from argrpo.rewards.pool import Scoring
from argrpo.rewards.protocols import StepContext
from argrpo.rewards.scoring import Judges, Scores
from argrpo.side_stream import SideStream
from argrpo.step_clock import StepClock


class Collected(NamedTuple):
    """The images of a step: N, those of a prompt next to each other. Judges may still be busy."""

    rollout: Rollout
    scoring: Scoring  # for `Collection.scores`
    statistics: dict[str, float]  # of the images, as they are logged


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
        self._overlaps = config.judging.overlap
        self._aside = SideStream(tokenizer.device, is_used=self._overlaps)

    def collect(self, step: int, *, with_monitors: bool, support: bool) -> Collected:
        """Draw and decode the images of a step, and hand them to the judges.

        Args:
            step: 0-based; decides the prompts and the seed.
            with_monitors: ask the judges that only measure, too.
            support: remember which tokens the filters kept.
        """
        prompts = self._prompts.draw(self._config.prompts_per_step, self._config.seed, step)
        repeated = [p for p in prompts for _ in range(self._config.images_per_prompt)]
        context = StepContext(step + 1, self._config.num_steps)
        scoring = self._judges.begin(repeated, with_monitors=with_monitors, context=context)
        try:
            with self._aside.entered():
                found = self._collect(prompts, step, support, scoring)
            self._aside.lead_caller()
        except BaseException:
            scoring.cancel()
            raise
        return found

    def scores(self, collected: Collected) -> Scores:
        """What the judges said, once they are done."""
        with self._phase("reward"), self._aside.entered():
            return self._judges.finish(collected.scoring)

    def pixels(self, rollout: Rollout) -> Tensor:
        """[N, 3, H, W] fp32 in [0, 1]."""
        batch = self._config.tokenizer.decode_batch
        return self._tokenizer.decode(rollout.token_ids, decode_batch=batch)

    def _collect(
        self, prompts: list[Prompt], step: int, support: bool, scoring: Scoring
    ) -> Collected:
        conditions = self._prompts.conditions(prompts, self._config.images_per_prompt)
        batch = self._config.tokenizer.decode_batch
        parts: list[Rollout] = []
        statistics: list[Tensor] = []
        undecoded: Tensor | None = None
        num_left = len(prompts) * self._config.images_per_prompt
        for part in self._drawn(conditions, step, support):
            parts.append(part)
            num_left -= len(part)
            there = part.token_ids
            if undecoded is not None:
                there = torch.cat([undecoded, there])
            # A batch that is not whole yet waits for its images, or it would round another way.
            count = len(there) // batch * batch if num_left else len(there)
            for token_ids in there[:count].split(batch):
                statistics.append(self._hand_over(token_ids, scoring))
            undecoded = there[count:]
        rollout = concatenate(parts, moved_to(conditions, parts[0].token_ids.device))
        measured = statistics_metrics(torch.cat(statistics), rollout.token_ids)
        return Collected(rollout, scoring, measured)

    def _drawn(self, conditions: Conditions, step: int, support: bool) -> Iterator[Rollout]:
        """The images of a step as they finish; all at once where nothing overlaps."""
        params, seed = self._config.rollout, draw_seed(self._config.seed, step)
        with self._phase("rollout"):
            if not self._overlaps:
                parts = iter([self._engine.draw(conditions, params, seed=seed, support=support)])
            else:
                parts = self._engine.draw_iter(conditions, params, seed=seed, support=support)
            part = next(parts, None)
        while part is not None:
            yield part
            with self._phase("rollout"):
                part = next(parts, None)

    def _hand_over(self, token_ids: Tensor, scoring: Scoring) -> Tensor:
        """Decode a batch and let the judges have it; returns its statistics."""
        with self._phase("decode"):
            images = self._tokenizer.decode(token_ids, decode_batch=len(token_ids))
            seen = seen_by_judges(images, self._config.tokenizer.pixels)
        with self._phase("reward"):
            scoring.add(seen, token_ids)
            return image_statistics(seen, token_ids)

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self._clock.waiting(name) if self._overlaps else self._clock.phase(name)


def draw_seed(run_seed: int, step: int) -> int:
    """The seed of a step's draw: 64 bits hashed from the run's seed and the step."""
    digest = hashlib.blake2b(f"draw {run_seed} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
