"""All judges of a run at once, and what their scores amount to."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from argrpo.advantages import Advantages, combine_rewards, group_advantages, normalise_then_sum
from argrpo.config import TrainConfig
from argrpo.data import Prompt
from argrpo.engine.ranges import Ranges, no_ranges
from argrpo.reward_config import AdvantageConfig, RewardConfig
from argrpo.rewards.background_loop import BackgroundLoop
from argrpo.rewards.lanes import Judge, Outcome
from argrpo.rewards.pool import Asking, Scoring
from argrpo.rewards.protocols import (
    Applying,
    DistributionReward,
    Measuring,
    Restorable,
    StepContext,
)
from argrpo.rewards.registry import make_reward
from argrpo.rewards.sharing import SharedNetworks


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Raw scores of a step's images."""

    values: Tensor  # [N, R] fp32 on the CPU, NaN = not scored
    monitored: Tensor  # [N, M] fp32 of the judges that only measure; M = 0 when not asked
    names: list[str]
    monitor_names: list[str]
    weights: Tensor  # [R] fp32
    is_distribution: Tensor  # [R] bool: scored as part of all images, not one by one
    measured: dict[str, float]  # what else judges say, and what they took, by log name
    extras: dict[str, dict[str, list[Any]]]  # of judges, for a table, by name and column
    outcomes: list[Outcome]  # of all judges that were asked
    config: AdvantageConfig
    weigh_first: bool  # see ParityConfig.weights_before_normalization

    def advantages(self, group_size: int) -> Advantages:
        """Each image against the others of its prompt."""
        if self.config.aggregation == "sum_then_normalize":
            rewards = combine_rewards(self.values, self.weights, missing=self.config.missing)
            return group_advantages(rewards.view(-1, group_size), scale=self.config.scale)
        apart = self.config.aggregation == "normalize_then_sum"
        values, weights = (self.values, self.weights) if apart else self._by_kind()
        grouped = values.view(-1, group_size, len(weights))
        return normalise_then_sum(
            grouped, weights, scale=self.config.scale, weigh_first=self.weigh_first
        )

    def metrics(self) -> dict[str, float]:
        """Mean and spread of each judge and of the weighted sum, over the images it scored."""
        total = combine_rewards(self.values, self.weights, missing=self.config.missing)
        metrics = {"reward": total.nanmean().item()}
        for prefix, names, values in (
            ("rewards", self.names, self.values),
            ("monitors", self.monitor_names, self.monitored),
        ):
            for name, column in zip(names, values.unbind(1), strict=False):
                scored = column[column.isfinite()]
                metrics[f"{prefix}/{name}/mean"] = scored.mean().item()
                metrics[f"{prefix}/{name}/std"] = scored.std().item() if len(scored) > 1 else 0.0
        return {**metrics, **self.measured}

    def _by_kind(self) -> tuple[Tensor, Tensor]:
        """Columns that are normalised apart, and their weights: the weighted sum of all judges of
        single images is one, each distribution reward another."""
        apart = self.is_distribution
        together = ~apart & (self.weights != 0)
        values, weights = self.values[:, apart], self.weights[apart]
        if not together.any():
            return values, weights
        first = combine_rewards(self.values[:, together], self.weights[together])
        return torch.cat([first[:, None], values], 1), torch.cat([weights.new_ones(1), weights])


class Judges:
    """The judges that a config names, loaded once."""

    def __init__(
        self, config: TrainConfig, device: torch.device, ranges: Ranges = no_ranges
    ) -> None:
        """`ranges` is told which judge is at work."""
        self._config = config
        self._shared = SharedNetworks()
        self._asking = Asking(
            BackgroundLoop(),
            config.judging.deadline_s,
            ranges,
            local_at_once=not config.draw_ahead,
        )
        self._rewards = [self._make(judge, device) for judge in config.rewards]
        self._monitors = [self._make(judge, device) for judge in config.monitors]
        self._weights = torch.tensor([judge.weight for judge in config.rewards])
        names = [judge.name for judge in self._all()]
        if len(set(names)) < len(names):
            raise ValueError(
                "rewards: expected each judge to be logged under a name of its own, got "
                f"{', '.join(names)}; give one the option name, or take it out"
            )

    def check_prompts(self, prompts: list[Prompt]) -> None:
        """Refuse a judge that would score no image of a run.

        Args:
            prompts: all of the run.

        Raises:
            ValueError: a judge with a weight applies to none of them.
        """
        for judge, config in zip(self._rewards, self._config.rewards, strict=True):
            if config.weight and isinstance(judge, Applying) and not any(judge.applies(prompts)):
                raise ValueError(
                    f"rewards.{judge.name}: expected prompts with a reference image, got none "
                    f"among {len(prompts)}; give data.prompts a column reference_image, or leave "
                    "the judge out"
                )

    def begin(
        self, prompts: list[Prompt], *, with_monitors: bool, context: StepContext | None = None
    ) -> Scoring:
        """All judges, ready for the images of N prompts. `finish` takes it back.

        Args:
            prompts: N, those of the images.
            with_monitors: ask the judges that only measure, too.
            context: of the step, for judges that ask.
        """
        judges = self._all() if with_monitors else self._rewards
        return Scoring(judges, prompts, self._asking, context)

    def finish(self, scoring: Scoring) -> Scores:
        """What the judges said of all images that were added.

        Raises:
            ValueError: a judge returned another shape than that of its images.
            torch.OutOfMemoryError: a local judge did not fit, named.
            Exception: whatever a judge of the caller's raises.
        """
        outcomes = scoring.finish()
        count = len(self._rewards)
        asked = outcomes[:count], outcomes[count:]
        monitors = self._monitors[: len(asked[1])]
        are_distribution = [isinstance(judge, DistributionReward) for judge in self._rewards]
        return Scores(
            values=_columns(asked[0], scoring.num_images),
            monitored=_columns(asked[1], scoring.num_images),
            names=[outcome.name for outcome in asked[0]],
            monitor_names=[outcome.name for outcome in asked[1]],
            weights=self._weights,
            is_distribution=torch.tensor(are_distribution),
            extras={o.name: o.answer.logged.extras for o in outcomes if o.answer.logged.extras},
            outcomes=outcomes,
            measured={
                **_measured("rewards", self._rewards, asked[0]),
                **_measured("monitors", monitors, asked[1]),
            },
            config=self._config.advantage,
            weigh_first=self._config.parity.weights_before_normalization,
        )

    def score(self, images: Tensor, prompts: list[Prompt], *, with_monitors: bool) -> Scores:
        """Raw scores of N images; raises as `finish`."""
        scoring = self.begin(prompts, with_monitors=with_monitors)
        scoring.add(images)
        return self.finish(scoring)

    def close(self) -> None:
        """Let go of servers. Judges can be asked again."""
        self._asking.close(self._all())

    def update(self) -> None:
        """Move the state of distribution rewards, once a step, after its images were learned."""
        for judge in self._distribution_rewards():
            judge.update()

    def state_dict(self) -> dict[str, Tensor]:
        """The state of all distribution rewards, as NAME/KEY."""
        return {
            f"{judge.name}/{key}": value
            for judge in self._distribution_rewards()
            for key, value in judge.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: a judge has no state there, or cannot take one.
        """
        for judge in self._distribution_rewards():
            prefix = f"{judge.name}/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if not own and judge.state_dict():
                raise ValueError(f"rewards.{judge.name}: expected its state, got none")
            if not own:
                continue
            if not isinstance(judge, Restorable):
                raise ValueError(
                    f"rewards.{judge.name}: expected a method load_state_dict, got none"
                )
            judge.load_state_dict(own)

    def _distribution_rewards(self) -> list[DistributionReward]:
        return [judge for judge in self._all() if isinstance(judge, DistributionReward)]

    def _all(self) -> list[Judge]:
        return [*self._rewards, *self._monitors]

    def _make(self, judge: RewardConfig, device: torch.device) -> Judge:
        return make_reward(judge, device, self._config.cache_dir, self._shared)


def _columns(outcomes: list[Outcome], num_images: int) -> Tensor:
    if not outcomes:
        return torch.empty(num_images, 0)
    return torch.stack([outcome.answer.scores for outcome in outcomes], dim=1)


def _measured(prefix: str, judges: list[Judge], outcomes: list[Outcome]) -> dict[str, float]:
    found: dict[str, float] = {}
    for judge, outcome in zip(judges, outcomes, strict=True):
        own = judge.metrics() if isinstance(judge, Measuring) else {}
        found |= {f"{prefix}/{judge.name}/{k}": v for k, v in (outcome.metrics() | own).items()}
    return found
