"""The kinds of judges.

All take a batch as one tensor and return raw scores, without weights: weights live in the config. A
judge that fails for an image returns NaN for it, never a made-up number.

A judge is a `Reward`, a `RemoteReward` or a `DistributionReward`. What else it can do it says by
the members of the smaller protocols, which are optional.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.rewards.delivery import Delivery


class Reward(Protocol):
    """Scores images one by one."""

    name: str

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32, NaN = not scored."""
        ...


@dataclass(frozen=True, slots=True)
class Logged:
    """What a judge has to say beside scores, of the same images."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Logged as rewards/NAME/KEY, the mean of a step's values."""

    extras: dict[str, list[Any]] = field(default_factory=dict)
    """Columns of JSON values, for a table."""

    @classmethod
    def joined(cls, parts: Iterable["Logged"]) -> "Logged":
        """One after the other."""
        whole = cls()
        for part in parts:
            for name, values in part.metrics.items():
                whole.metrics.setdefault(name, []).extend(values)
            for column, cells in part.extras.items():
                whole.extras.setdefault(column, []).extend(cells)
        return whole


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class Answer:
    """What a judge said of some images, and what it took."""

    scores: Tensor  # [n] fp32, NaN = not scored
    num_failures: int = 0  # images that it should have scored and did not
    num_retries: int = 0  # requests that were sent again
    problem: str | None = None  # of the last failure, in words
    logged: Logged = field(default_factory=Logged)

    @classmethod
    def none(cls, count: int, problem: str, num_retries: int = 0) -> "Answer":
        """Not one of `count` images is scored."""
        return cls(torch.full((count,), torch.nan), count, num_retries, problem)

    @classmethod
    def of(cls, scores: Tensor, applies: Tensor | None = None) -> "Answer":
        """Scores as they are; each NaN is a failure, but for images that the judge does not apply
        to. Waits for the device.

        Args:
            scores: [n], NaN = not scored.
            applies: [n] bool on the CPU; None: to all.
        """
        failed = scores.isnan().cpu()
        failures = int((failed if applies is None else failed & applies).sum())
        problem = f"NaN for {failures} of {len(scores)} images" if failures else None
        return cls(scores, failures, 0, problem)

    def without_infinity(self) -> "Answer":
        """Infinite scores are NaN and failures: one would make a whole group NaN. Waits for the
        device."""
        infinite = self.scores.isinf()
        count = int(infinite.sum())
        if not count:
            return self
        return replace(
            self,
            scores=self.scores.masked_fill(infinite, torch.nan),
            num_failures=self.num_failures + count,
            problem=f"infinity for {count} of {len(self.scores)} images",
        )

    @classmethod
    def joined(cls, parts: Sequence["Answer"]) -> "Answer":
        """Answers about consecutive images, as one."""
        problems = [part.problem for part in parts if part.problem is not None]
        return cls(
            torch.cat([part.scores.float() for part in parts]),
            sum(part.num_failures for part in parts),
            sum(part.num_retries for part in parts),
            problems[-1] if problems else None,
            Logged.joined(part.logged for part in parts),
        )


@runtime_checkable
class Answering(Protocol):
    """A `Reward` that tells what it failed to score from what it does not apply to."""

    def answer(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        """As a call."""
        ...


@runtime_checkable
class Applying(Protocol):
    """A `Reward` that does not apply to some prompts, as is known without their images."""

    def applies(self, prompts: list[Prompt]) -> list[bool]:
        """Whether it should score an image of each prompt."""
        ...


@runtime_checkable
class RemoteReward(Protocol):
    """Scores images one by one, somewhere else: it waits more than it works."""

    name: str

    async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        """[n, 3, H, W] on the CPU in [0, 1] and n prompts -> what was answered.

        Called from a thread of its own, and again before the last call has ended.
        """
        ...


@runtime_checkable
class Delivering(Protocol):
    """A `RemoteReward` that does not wait for what would come too late, and sends the pictures that
    others send, too."""

    def within(self, delivery: Delivery) -> RemoteReward:
        """This judge, for the questions of a step."""
        ...


@runtime_checkable
class Batched(Protocol):
    """A judge that looks at images in stretches, from the first one on.

    It may be called for one stretch after the other, as soon as its images are there, and then says
    the same to the bit. A judge without this is called once a step, for all images.
    """

    reward_batch: int
    """Images of a stretch."""


@runtime_checkable
class DistributionReward(Protocol):
    """Scores an image by what it does to the distribution of the whole batch.

    A class with these members is one; those of `Measuring` and `Restorable` are optional.
    """

    name: str

    def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """All images of a step, over all ranks, once a step -> [N] fp32, NaN = not scored."""
        ...

    def update(self) -> None:
        """Move the state, once a step, however many inner epochs follow."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What the next step's scores depend on. Asked between `score` and `update` too: what the
        update would bring is then part of it."""
        ...


@runtime_checkable
class Measuring(Protocol):
    """A judge that has more to say than its scores."""

    def metrics(self) -> dict[str, float]:
        """Numbers about the images scored last, logged as rewards/NAME/KEY.

        With draw_ahead a `RemoteReward` may be at the next step's images by then; what it has to
        say of some images it says with their `Answer`.
        """
        ...


@runtime_checkable
class Closing(Protocol):
    """A `RemoteReward` that holds connections."""

    async def close(self) -> None: ...


@runtime_checkable
class Resting(Protocol):
    """A judge whose weights may leave the device between steps."""

    def rest(self) -> None:
        """Called when a step's images are scored; the next call brings the weights back."""
        ...


@runtime_checkable
class Restorable(Protocol):
    """A distribution reward that goes on where its `state_dict` was taken."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class StepContext:
    """What is known of a step's images beside themselves."""

    step: int = 0  # 1-based, of the step that is under way
    num_steps: int = 1
    token_ids: Tensor | None = None  # [N, T] int64; None where images were not drawn here


@runtime_checkable
class ContextReward(Protocol):
    """A judge that wants to know more of a step than images and prompts."""

    def seeing(self, context: StepContext) -> Reward | RemoteReward:
        """This judge, for a call about the images of that step."""
        ...
