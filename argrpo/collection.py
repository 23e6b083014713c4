"""From the prompts of a step to scored images: draw, decode, score.

With judging.overlap the three run side by side. Images are decoded as they finish, in the batches
in which all of them would be, and go to the judges at once (rewards/pool.py); on a GPU decoding and
judging have a stream beside the one that draws. Overlap changes no bit of tokens, images or scores.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
from argrpo.ranks import gather_images, gather_rows, num_ranks, own_rank
from argrpo.rewards.over_ranks import scores_over_ranks
from argrpo.rewards.pool import Scoring
from argrpo.rewards.protocols import StepContext
from argrpo.rewards.scoring import Judges, Scores
from argrpo.side_stream import SideStream
from argrpo.step_clock import StepClock
from argrpo.step_split import split_images


class Collected(NamedTuple):
    """This rank's n images of a step, those of a prompt next to each other. Judges may still be
    busy."""

    rollout: Rollout
    scoring: Scoring  # for `Collection.scores`
    statistics: Tensor  # [n, 4] of the images, see image_statistics.py


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
        self.image_ids = split_images(config, own_rank(), num_ranks())
        """[n] int64 on the CPU: this rank's images of every step."""

    def collect(self, step: int, *, with_monitors: bool, support: bool) -> Collected:
        """Draw and decode this rank's images of a step, and hand them to the judges.

        Args:
            step: 0-based; decides the prompts and the seed.
            with_monitors: ask the judges that only measure, too.
            support: remember which tokens the filters kept.
        """
        with self._scoring(step, with_monitors) as scoring:
            return self._collect(step, support, scoring)

    def collect_again(self, rollout: Rollout, step: int, *, with_monitors: bool) -> Collected:
        """Hand the images of a rollout that `collect` drew to the judges once more, as it did."""
        with self._scoring(step, with_monitors) as scoring:
            parts = rollout.token_ids.split(self._config.tokenizer.decode_batch)
            statistics = [self._hand_over(part, scoring) for part in parts]
            return Collected(rollout, scoring, torch.cat(statistics))

    def prompts_of(self, step: int) -> list[Prompt]:
        """The prompt of each of this rank's images of a step."""
        drawn = self._prompts.draw(self._config.prompts_per_step, self._config.seed, step)
        groups = self.image_ids // self._config.images_per_prompt
        return [drawn[group] for group in groups.tolist()]

    def scores(self, collected: Collected) -> Scores:
        """What the judges said of all ranks' images, once they are done.

        Raises:
            PeerError: another rank failed.
        """
        with self._phase("reward"), self._aside.entered():
            scores = self._judges.finish(collected.scoring)
        return scores_over_ranks(scores, self.image_ids)

    def measured(self, collected: Collected) -> dict[str, float]:
        """Metrics of the images of all ranks, whatever judges say.

        Raises:
            PeerError: another rank failed.
        """
        tokens, _ = gather_rows(collected.rollout.token_ids.unique()[:, None])
        entropies = collected.rollout.entropies.double().mean(dim=1, keepdim=True)
        return {
            **statistics_metrics(gather_images(collected.statistics, self.image_ids), tokens),
            "entropy/draw": gather_images(entropies, self.image_ids).mean().item(),
        }

    def pixels(self, rollout: Rollout) -> Tensor:
        """[N, 3, H, W] fp32 in [0, 1]."""
        batch = self._config.tokenizer.decode_batch
        return self._tokenizer.decode(rollout.token_ids, decode_batch=batch)

    @contextmanager
    def _scoring(self, step: int, with_monitors: bool) -> Iterator[Scoring]:
        """All judges, ready for the images of a step; inside is beside the caller's stream."""
        context = StepContext(step + 1, self._config.num_steps)
        scoring = self._judges.begin(
            self.prompts_of(step), with_monitors=with_monitors, context=context
        )
        try:
            with self._aside.entered():
                yield scoring
            self._aside.lead_caller()
        except BaseException:
            scoring.cancel()
            raise

    def _collect(self, step: int, support: bool, scoring: Scoring) -> Collected:
        prompts = self.prompts_of(step)
        conditions = self._prompts.conditions(prompts, repeats=1)
        batch = self._config.tokenizer.decode_batch
        parts: list[Rollout] = []
        statistics: list[Tensor] = []
        undecoded: Tensor | None = None
        num_left = len(prompts)
        for part in self._drawn(conditions, step, support):
            parts.append(part)
            num_left -= len(part)
            there = part.token_ids
            if undecoded is not None:
                there = torch.cat([undecoded, there])
            # A batch that is not whole yet waits for its images, or it would round another way.
            count = len(there) // batch * batch if num_left else len(there)
            for first in range(0, count, batch):
                statistics.append(self._hand_over(there[first:count][:batch], scoring))
            undecoded = there[count:]
        rollout = concatenate(parts, moved_to(conditions, parts[0].token_ids.device))
        return Collected(rollout, scoring, torch.cat(statistics))

    def _drawn(self, conditions: Conditions, step: int, support: bool) -> Iterator[Rollout]:
        """The images of a step as they finish; all at once where nothing overlaps."""
        params, ids = self._config.rollout, self.image_ids
        seed = draw_seed(self._config.seed, step)
        with self._phase("rollout"):
            if not self._overlaps:
                whole = self._engine.draw(
                    conditions, params, seed=seed, image_ids=ids, support=support
                )
                parts = iter([whole])
            else:
                parts = self._engine.draw_iter(
                    conditions, params, seed=seed, image_ids=ids, support=support
                )
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
