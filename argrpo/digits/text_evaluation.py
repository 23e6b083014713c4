"""How good pictures drawn for captions are: the digit by a judge that was never a reward, place and
tilt by their measures, variety against real digits that were moved and sheared alike."""

from dataclasses import dataclass

import torch
from torch import Tensor

from argrpo.digits.attribute_reward import wanted_attributes
from argrpo.digits.attributes import attributes
from argrpo.digits.captions import captioned, parse_caption
from argrpo.digits.dataset import DigitSet
from argrpo.digits.evaluation import DigitsScores, evaluate_digits
from argrpo.digits.judges import DigitJudge

_REFERENCE_SEED = 7


@dataclass(frozen=True, slots=True)
class CaptionScores(DigitsScores):
    """Pictures drawn for captions, measured."""

    place: float
    """Share of the pictures whose place is the caption's."""

    tilt: float
    """Share of the pictures whose tilt is the caption's."""

    all_true: float
    """Share of the pictures of which every word of the caption is true."""


def evaluate_captions(
    images: Tensor, captions: list[str], judge: DigitJudge, references: DigitSet
) -> CaptionScores:
    """Measure pictures drawn for captions.

    Args:
        images: [N, 3, 32, 32] floating point in [0, 1].
        captions: N of them.
        judge: the held-out judge.
        references: real digits, the evaluation split; they are moved and sheared here.

    Raises:
        ValueError: the counts differ or are too small, or a text is no caption.
    """
    labels = torch.tensor([parse_caption(caption).digit for caption in captions])
    generator = torch.Generator().manual_seed(_REFERENCE_SEED)
    real = captioned(references, generator)
    digits = evaluate_digits(images, labels, judge, DigitSet(real.images, real.labels))
    shown, wanted = attributes(images.cpu()), wanted_attributes(captions)
    has_place, has_tilt = shown.places == wanted.places, shown.tilts == wanted.tilts
    is_true = has_place & has_tilt & (judge.predict(images.cpu()) == labels)
    return CaptionScores(
        **{name: getattr(digits, name) for name in DigitsScores.__dataclass_fields__},
        place=has_place.double().mean().item(),
        tilt=has_tilt.double().mean().item(),
        all_true=is_true.double().mean().item(),
    )
