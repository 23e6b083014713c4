"""All judges of a run at once, and what their scores amount to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from argrpo.advantages import Advantages, combine_rewards, group_advantages, normalise_then_sum
from argrpo.config import AdvantageConfig, RewardConfig, TrainConfig
from argrpo.data import Prompt
from argrpo.rewards.protocols import Reward
from argrpo.rewards.registry import make_reward


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Raw scores of a step's images."""

    values: Tensor  # [N, R] fp32 on the CPU, NaN = not scored
    monitored: Tensor  # [N, M] fp32 of the judges that only measure; M = 0 when not asked
    names: list[str]
    monitor_names: list[str]
    weights: Tensor  # [R] fp32
    config: AdvantageConfig

    def advantages(self, group_size: int) -> Advantages:
        """Each image against the others of its prompt."""
        if self.config.aggregation == "normalize_then_sum":
            grouped = self.values.view(-1, group_size, len(self.names))
            return normalise_then_sum(grouped, self.weights, scale=self.config.scale)
        rewards = combine_rewards(self.values, self.weights, missing=self.config.missing)
        return group_advantages(rewards.view(-1, group_size), scale=self.config.scale)

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
        return metrics


class Judges:
    """The judges that a config names, loaded once."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._config = config
        self._rewards = [self._make(judge, device) for judge in config.rewards]
        self._monitors = [self._make(judge, device) for judge in config.monitors]
        self._weights = torch.tensor([judge.weight for judge in config.rewards])
        names = [judge.name for judge in [*self._rewards, *self._monitors]]
        if len(set(names)) < len(names):
            raise ValueError(
                "rewards: expected each judge to be logged under a name of its own, got "
                f"{', '.join(names)}; give one the option name, or take it out"
            )

    def score(self, images: Tensor, prompts: list[Prompt], *, with_monitors: bool) -> Scores:
        """Raw scores of N images.

        Raises:
            ValueError: a judge returned another shape than [N].
        """
        monitors = self._monitors if with_monitors else []
        return Scores(
            values=_scored(self._rewards, images, prompts),
            monitored=_scored(monitors, images, prompts),
            names=[judge.name for judge in self._rewards],
            monitor_names=[judge.name for judge in monitors],
            weights=self._weights,
            config=self._config.advantage,
        )

    def _make(self, judge: RewardConfig, device: torch.device) -> Reward:
        return make_reward(judge, device, self._config.cache_dir)


@torch.no_grad()
def _scored(judges: list[Reward], images: Tensor, prompts: list[Prompt]) -> Tensor:
    columns = []
    for judge in judges:
        scores = judge(images, prompts)
        if scores.shape != (len(prompts),):
            raise ValueError(
                f"rewards.{judge.name}: expected scores of shape [{len(prompts)}], "
                f"got {list(scores.shape)}"
            )
        columns.append(scores.float().cpu())
    return torch.stack(columns, dim=1) if columns else torch.empty(len(prompts), 0)
