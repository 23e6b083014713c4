"""Features of prompts as a policy reads them: held without padding, padded when they are drawn.

30,000 captions of flan-t5-xl, some 13 tokens each, are 1.6 GB in bf16, and would be 15 GB padded.

Shapes: P prompts, N images, S positions of a text, L of a policy's prefix, C features.

Source: FoundationVision/LlamaGen at ce98ec4, autoregressive/sample/sample_t2i.py, which moves the
valid positions to the end and zeroes the rest; Kwai-Klear/AR-GRPO at 65947ad, language/t5.py, which
leaves them first and reads what the encoder says of the last padded position.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.engine.conditions import TextFeatures


class TextLayout(NamedTuple):
    """How a policy wants its texts."""

    prefix_len: int  # positions of a text, padding included
    width: int  # features of a position
    padding: str  # left or right: where the padding stands

    @property
    def reads_padded_end(self) -> bool:
        """Whether the last position may be a padded one; it predicts the first image token."""
        return self.padding == "right"


class EncodedText(NamedTuple):
    """What an encoder made of one text."""

    features: Tensor  # [S, C] of the valid positions
    end: Tensor  # [0 or 1, C]: the last of L positions, where padding stands there and is read
    is_cut: bool  # the text had more tokens than fit


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTexts:
    """The features of P prompts; prompts of one text share them."""

    texts: list[EncodedText]
    """One record a distinct text."""

    index: Tensor
    """[P] int64: the text of each prompt."""

    layout: TextLayout
    """The form that `conditions` gives them."""

    def conditions(self, rows: Tensor) -> TextFeatures:
        """Conditions of images.

        Args:
            rows: [N] int64 in 0 .. P - 1, the prompt of each image.

        Returns:
            Features of the distinct texts among them, and which image uses which.
        """
        used, index = self.index[rows].unique(return_inverse=True)
        padded = [_padded(self.texts[text], self.layout) for text in used.tolist()]
        features = torch.stack([features for features, _ in padded])
        return TextFeatures(features, torch.stack([mask for _, mask in padded]), index)

    def probe(self) -> TextFeatures:
        """The two longest prompts: padded here, so that all fit a policy if these do."""
        lengths = torch.tensor([len(text.features) for text in self.texts])
        return self.conditions(lengths[self.index].argsort(descending=True, stable=True)[:2])


def _padded(text: EncodedText, layout: TextLayout) -> tuple[Tensor, Tensor]:
    """Features [L, C] and mask [L] int64 of a text."""
    length = len(text.features)
    features = text.features.new_zeros(layout.prefix_len, layout.width)
    mask = torch.zeros(layout.prefix_len, dtype=torch.int64)
    valid = slice(layout.prefix_len - length, None) if layout.padding == "left" else slice(length)
    features[valid], mask[valid] = text.features, 1
    if len(text.end):
        features[-1] = text.end[0]
    return features, mask
