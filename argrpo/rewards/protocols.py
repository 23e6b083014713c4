"""The two kinds of judges.

Both take the whole batch as one tensor and return raw scores, without weights: weights live in the
config. A judge that fails for an image returns NaN for it, never a made-up number.
"""

from typing import Protocol

from torch import Tensor

from argrpo.data import Prompt


class Reward(Protocol):
    """Scores images one by one."""

    name: str

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32, NaN = not scored."""
        ...


class DistributionReward(Protocol):
    """Scores an image by what it does to the distribution of the whole batch."""

    name: str

    def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """All images of a step, over all ranks, once a step -> [N] fp32."""
        ...

    def update(self) -> None:
        """Move the state, once a step, however many inner epochs follow."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...
