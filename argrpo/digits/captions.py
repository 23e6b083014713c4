"""Captions of digits that are true of their pictures, and pictures for every caption.

    a handwritten seven     a handwritten two, tilted right     a handwritten zero on the left

The words are read off a picture by `argrpo.digits.attributes`: what is written is what is measured.
Real digits are moved and sheared so that all 90 captions have pictures.
"""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo.class_names import DIGIT_NAMES
from argrpo.digits.attributes import PLACES, TILTS, attributes
from argrpo.digits.dataset import DigitSet, shift_and_rotate

# Enough for most to pass the limits, and so little that the judges still read the digits.
_SHEAR, _SHIFT = 0.32, 0.19  # of half a width: 3 pixels
_CAPTION = re.compile(r"a handwritten (?P<digit>\w+)(?: (?P<place>on [^,]+))?(?:, (?P<tilt>.+))?")


class Caption(NamedTuple):
    """A digit, and the indices of its words in `PLACES` and `TILTS`."""

    digit: int
    place: int
    tilt: int

    @property
    def text(self) -> str:
        words = ["a handwritten", DIGIT_NAMES[self.digit], PLACES[self.place]]
        sentence = " ".join(word for word in words if word)
        return f"{sentence}, {TILTS[self.tilt]}" if TILTS[self.tilt] else sentence


def _all_captions() -> tuple[Caption, ...]:
    # The plain ones first; the digit changes fastest, so that ten in a row show each once.
    order = (1, 0, 2)
    return tuple(
        Caption(digit, place, tilt) for place in order for tilt in order for digit in range(10)
    )


CAPTIONS = _all_captions()
"""All 90: ten digits, three places, three tilts."""

WORDS = tuple(
    dict.fromkeys(word for caption in CAPTIONS for word in re.findall(r"\w+|,", caption.text))
)
"""The vocabulary of the captions."""


def parse_caption(text: str) -> Caption:
    """What a caption asks for.

    Raises:
        ValueError: the text is none of the captions.
    """
    found = _CAPTION.fullmatch(text.strip().lower())
    words = {} if found is None else found.groupdict(default="")
    if not words or words["digit"] not in DIGIT_NAMES or words["tilt"] not in TILTS:
        raise ValueError(f"caption: expected one as {CAPTIONS[-1].text!r}, got {text!r}")
    if words["place"] not in PLACES:
        raise ValueError(
            f"caption: expected {' or '.join(filter(None, PLACES))}, got {words['place']!r}"
        )
    return Caption(
        DIGIT_NAMES.index(words["digit"]),
        PLACES.index(words["place"]),
        TILTS.index(words["tilt"]),
    )


class CaptionedDigits(NamedTuple):
    """Pictures, and the caption that is true of each."""

    images: Tensor  # [N, 3, 32, 32] in [0, 1]
    labels: Tensor  # [N] int64, the digit
    captions: Tensor  # [N] int64 into `CAPTIONS`


def captioned(digits: DigitSet, generator: torch.Generator) -> CaptionedDigits:
    """Each digit at a place and with a tilt at random, and the caption of what came of it.

    Args:
        digits: real ones.
        generator: a CPU generator; moved on.
    """
    count = len(digits)
    sides = torch.randint(-1, 2, (2, count), generator=generator).float()
    images = _moved(digits.images, place=sides[0] * _SHIFT, shear=sides[1] * _SHEAR)
    images = shift_and_rotate(images, generator, max_shift=1.0, max_degrees=3.0).clamp_(0.0, 1.0)
    shown = attributes(images)
    rows = {caption: row for row, caption in enumerate(CAPTIONS)}
    triples = zip(digits.labels.tolist(), shown.places.tolist(), shown.tilts.tolist(), strict=True)
    captions = torch.tensor([rows[Caption(*triple)] for triple in triples])
    return CaptionedDigits(images, digits.labels, captions)


def _moved(images: Tensor, *, place: Tensor, shear: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] moved by `place` [N] half widths and sheared by `shear` [N], their
    lower strokes to the right where both are positive."""
    matrix = torch.eye(2, 3).repeat(len(images), 1, 1)
    # The grid says where a pixel comes from, hence the signs.
    matrix[:, 0, 1], matrix[:, 0, 2] = -shear, -place
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
