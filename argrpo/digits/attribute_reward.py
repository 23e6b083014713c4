"""A judge of what a caption says beside the digit, by measures of the pixels."""

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.digits.attributes import Attributes, agreement
from argrpo.digits.captions import parse_caption


class AttributeReward:
    """How well the place and the tilt of a digit are those that its caption asks for."""

    def __init__(self, *, name: str = "digits_attributes") -> None:
        """
        Args:
            name: under which its scores are logged.
        """
        self.name = name

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """Scores of images.

        Args:
            images: [N, 3, 32, 32] floating point in [0, 1].
            prompts: N of them, each a caption of digits.

        Returns:
            [N] fp32 in [0, 1], on the device of `images`.

        Raises:
            ValueError: a prompt is no caption, or the counts differ.
        """
        if len(prompts) != len(images):
            raise ValueError(f"prompts: expected {len(images)}, one an image, got {len(prompts)}")
        return agreement(images, wanted_attributes([prompt.text for prompt in prompts]))


def wanted_attributes(captions: list[str]) -> Attributes:
    """What captions ask for.

    Raises:
        ValueError: one of them is no caption of digits.
    """
    parsed = [parse_caption(caption) for caption in captions]
    return Attributes(
        torch.tensor([caption.place for caption in parsed], dtype=torch.int64),
        torch.tensor([caption.tilt for caption in parsed], dtype=torch.int64),
    )
