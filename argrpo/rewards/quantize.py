"""Steps instead of scores: another judge's through a map, as AR-GRPO rewards some judges twice.

    thresholds, values   values[0] below thresholds[0], values[i + 1] from thresholds[i] up to
                         thresholds[i + 1]: one value more than thresholds. With as many values as
                         thresholds nothing is said of a score from the last threshold on: NaN, not
                         scored.
    bins                 [low, high] (0 and 1) stretched to [lowest, highest] (0 and 5), rounded to
                         a multiple of (highest - lowest) / bins: half of one is added, and what is
                         left over cut off towards 0

NaN stays NaN, and so does infinity become, which is no score either; where a judge does not apply,
it still does not. Thresholds are compared in the precision of the scores.

The judge is not asked twice: what it shares with one of the same options, a tower or a network,
remembers the batch.

Source: Kwai-Klear/AR-GRPO at 65947ad, img_gen_grpo_rewards.py (discrete_reward_map and
reward_quantize).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.rewards.delivery import Delivery
from argrpo.rewards.lanes import Judge
from argrpo.rewards.protocols import (
    Answer,
    Answering,
    Applying,
    Closing,
    ContextReward,
    Delivering,
    DistributionReward,
    Measuring,
    RemoteReward,
    Resting,
    Restorable,
    Reward,
    StepContext,
)

STEP_OPTIONS = ("thresholds", "values", "bins", "low", "high", "lowest", "highest")
"""Of the map; all others are the judge's."""

_Kind = TypeVar("_Kind")

Steps = Callable[[Tensor], Tensor]
"""[N] fp32 scores -> [N] fp32 values."""


def quantized(judge: Judge, steps: Steps, name: str) -> Judge:
    """A judge through a map: of the same kind, with all that it can do beside scoring.

    Args:
        judge: of any kind.
        steps: the map.
        name: under which its scores are logged.
    """
    if isinstance(judge, DistributionReward):
        return QuantizedDistributionReward(judge, steps, name)
    if isinstance(judge, RemoteReward):
        if isinstance(judge, ContextReward):
            return QuantizedRemoteContextReward(judge, steps, name)
        return QuantizedRemoteReward(judge, steps, name)
    if isinstance(judge, ContextReward):
        return QuantizedContextReward(judge, steps, name)
    if isinstance(judge, Answering):
        return QuantizedAnsweringReward(judge, steps, name)
    if isinstance(judge, Applying):
        return QuantizedApplyingReward(judge, steps, name)
    return QuantizedReward(judge, steps, name)


class _Quantized(Generic[_Kind]):
    """What all kinds have in common."""

    def __init__(self, judge: _Kind, steps: Steps, name: str) -> None:
        self.name = name
        self.reward_batch: int = getattr(judge, "reward_batch", sys.maxsize)
        self._judge = judge
        self._steps = steps

    def rest(self) -> None:
        """Off the device until it is asked again, where the judge is to be offloaded."""
        if isinstance(self._judge, Resting):
            self._judge.rest()

    def metrics(self) -> dict[str, float]:
        """What the judge measured."""
        return self._judge.metrics() if isinstance(self._judge, Measuring) else {}

    def _of(self, judge: Any) -> Self:
        """The same map of another state of the judge."""
        bound = copy(self)
        bound._judge = judge
        return bound


class QuantizedReward(_Quantized[Reward]):
    """A judge of single images."""

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32, NaN = not scored."""
        return self._steps(self._judge(images, prompts))


class QuantizedApplyingReward(QuantizedReward):
    """A judge that does not apply to some prompts."""

    def applies(self, prompts: list[Prompt]) -> list[bool]:
        """As the judge."""
        assert isinstance(self._judge, Applying)
        return self._judge.applies(prompts)


class QuantizedAnsweringReward(QuantizedReward):
    """A judge that tells what it failed to score from what it does not apply to."""

    def answer(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        """As the judge, with its scores mapped; one that the map has no value for is a failure."""
        if not isinstance(self._judge, Answering):
            return Answer.of(self(images, prompts))
        return _mapped(self._judge.answer(images, prompts), self._steps)


class QuantizedContextReward(QuantizedAnsweringReward):
    """A judge that wants to know more of a step, as one that is called as TRL calls it."""

    def seeing(self, context: StepContext) -> Self:
        """This judge, for a call about the images of that step."""
        assert isinstance(self._judge, ContextReward)
        return self._of(self._judge.seeing(context))


class QuantizedRemoteReward(_Quantized[RemoteReward]):
    """A judge behind a server."""

    async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        """As the judge, with its scores mapped; one that the map has no value for is a failure."""
        return _mapped(await self._judge.ask(images, prompts), self._steps)

    def within(self, delivery: Delivery) -> Self:
        """This judge, for the questions of a step, where the judge can be told of it."""
        if not isinstance(self._judge, Delivering):
            return self
        return self._of(self._judge.within(delivery))

    async def close(self) -> None:
        """Let go of open connections."""
        if isinstance(self._judge, Closing):
            await self._judge.close()


class QuantizedRemoteContextReward(QuantizedRemoteReward):
    """A coroutine function that is called as TRL calls it."""

    def seeing(self, context: StepContext) -> Self:
        """This judge, for a call about the images of that step."""
        assert isinstance(self._judge, ContextReward)
        return self._of(self._judge.seeing(context))


class QuantizedDistributionReward(_Quantized[DistributionReward]):
    """A judge of all images of a step; its state is saved as its own."""

    def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """All images of a step, over all ranks, once a step -> [N] fp32, NaN = not scored."""
        return self._steps(self._judge.score(images, prompts))

    def update(self) -> None:
        """Move the judge's state."""
        self._judge.update()

    def state_dict(self) -> dict[str, Tensor]:
        """The judge's state."""
        return self._judge.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: the judge cannot.
        """
        if not isinstance(self._judge, Restorable):
            raise ValueError(f"rewards.{self.name}: expected a method load_state_dict, got none")
        self._judge.load_state_dict(state)


def _mapped(answer: Answer, steps: Steps) -> Answer:
    scores = steps(answer.scores)
    lost = int((scores.isnan() & ~answer.scores.isnan()).sum())
    problem = f"no step for {lost} of {len(scores)} scores" if lost else answer.problem
    return replace(answer, scores=scores, num_failures=answer.num_failures + lost, problem=problem)


def make_steps(options: Mapping[str, Any]) -> Steps:
    """The map that options describe: thresholds and values, or bins.

    Raises:
        ValueError: they describe none, or both; by option.
    """
    if options.keys() == {"thresholds", "values"}:
        return StepMap(options["thresholds"], options["values"])
    if "bins" in options and options.keys() <= set(STEP_OPTIONS[2:]):
        return EqualSteps(**options)
    got = ", ".join(sorted(options)) or "none"
    raise ValueError(f"thresholds: expected thresholds and values, or bins, got {got}")


class StepMap:
    """Values by thresholds.

    Args:
        thresholds: rising.
        values: one more than thresholds, or as many.

    Raises:
        ValueError: the thresholds do not rise, or there is another number of values.
    """

    def __init__(self, thresholds: Sequence[float], values: Sequence[float]) -> None:
        if not thresholds or any(a >= b for a, b in pairwise(thresholds)):
            raise ValueError(f"thresholds: expected rising numbers, got {list(thresholds)}")
        if len(values) - len(thresholds) not in (0, 1):
            raise ValueError(
                f"values: expected {len(thresholds) + 1} for {len(thresholds)} thresholds, or one "
                f"less where nothing is beyond the last, got {len(values)}"
            )
        self._thresholds = torch.tensor(list(thresholds), dtype=torch.float64)
        above = [torch.nan] if len(values) == len(thresholds) else []
        # The last is for what is no score.
        self._values = torch.tensor([*values, *above, torch.nan], dtype=torch.float32)

    def __call__(self, scores: Tensor) -> Tensor:
        """[N] floating point -> [N] fp32."""
        steps = torch.bucketize(scores, self._thresholds.to(scores), right=True)
        steps = steps.masked_fill(~scores.isfinite(), len(self._values) - 1)
        return self._values.to(scores.device)[steps]


@dataclass(frozen=True, slots=True)
class EqualSteps:
    """Multiples of one width; see the top of this file.

    Raises:
        ValueError: no bin, or an interval of no length; one may run downwards.
    """

    bins: int
    low: float = 0.0
    high: float = 1.0
    lowest: float = 0.0
    highest: float = 5.0

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"bins: expected at least 1, got {self.bins}")
        for first, last in (("low", "high"), ("lowest", "highest")):
            if getattr(self, first) == getattr(self, last):
                raise ValueError(f"{first}: expected another number than {last}, got the same")

    def __call__(self, scores: Tensor) -> Tensor:
        """[N] floating point -> [N] fp32."""
        stretched = (scores.double() - self.low) / (self.high - self.low)
        stretched = stretched * (self.highest - self.lowest) + self.lowest
        width = (self.highest - self.lowest) / self.bins
        return ((stretched / width + 0.5).trunc() * width).float()
