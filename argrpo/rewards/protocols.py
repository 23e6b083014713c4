"""The two kinds of judges.

Both take the whole batch as one tensor and return raw scores, without weights: weights live in the
config. A judge that fails for an image returns NaN for it, never a made-up number.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor

from argrpo.data import Prompt


class Reward(Protocol):
    """Scores images one by one."""

    name: str

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32, NaN = not scored."""
        ...


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
        """What the next step's scores depend on."""
        ...


@runtime_checkable
class Measuring(Protocol):
    """A distribution reward that has more to say than its scores."""

    def metrics(self) -> dict[str, float]:
        """Numbers about the images scored last, logged as rewards/NAME/KEY."""
        ...


@runtime_checkable
class Restorable(Protocol):
    """A distribution reward that goes on where its `state_dict` was taken."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
