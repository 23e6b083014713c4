"""Captions are true of their pictures, by measures that know a moved digit from a sheared one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo.data import Prompt
from argrpo.digits.attribute_reward import AttributeReward
from argrpo.digits.attributes import Attributes, agreement, attributes, moments
from argrpo.digits.captions import CAPTIONS, WORDS, Caption, captioned, parse_caption
from argrpo.digits.dataset import DigitSet, load_split


@pytest.fixture(scope="module")
def digits() -> DigitSet:
    return load_split("evaluation")


def moved(images: Tensor, pixels: int) -> Tensor:
    """Pictures moved to the right; black comes in."""
    return torch.roll(F.pad(images, (8, 8)), pixels, dims=3)[..., 8:-8]


def leaning(images: Tensor, shear: float) -> Tensor:
    """Pictures whose upper rows are moved to the left and lower ones to the right."""
    rows = []
    for row in range(32):
        by = round(shear * (row - 15.5))
        rows.append(moved(images[:, :, row : row + 1], by))
    return torch.cat(rows, dim=2)


def test_a_bar_has_the_moments_that_geometry_gives_it() -> None:
    picture = torch.zeros(2, 3, 32, 32)
    picture[0, :, :, 23:25] = 1  # upright, right of the middle
    for row in range(32):
        picture[1, :, row, row] = 1  # from the upper left to the lower right
    found = moments(picture)
    assert found.place.tolist() == pytest.approx([2 * 23.5 / 31 - 1, 0.0], abs=1e-5)
    assert found.slant.tolist() == pytest.approx([0.0, 1.0], abs=1e-5)
    assert moments(torch.zeros(1, 3, 32, 32)).slant.tolist() == [0.0]


def test_real_digits_are_told_apart_by_place_and_tilt(digits: DigitSet) -> None:
    as_scanned = attributes(digits.images)
    assert (as_scanned.places == 1).float().mean() > 0.85
    assert (as_scanned.tilts == 1).float().mean() > 0.85
    # Four pixels, and .4: further than captions ask for, where nine of ten pass the limits.
    assert (attributes(moved(digits.images, 4)).places == 2).float().mean() > 0.9
    assert (attributes(moved(digits.images, -4)).places == 0).float().mean() > 0.9
    assert (attributes(leaning(digits.images, 0.4)).tilts == 2).float().mean() > 0.9
    assert (attributes(leaning(digits.images, -0.4)).tilts == 0).float().mean() > 0.9


def test_every_picture_gets_the_caption_that_is_true_of_it(digits: DigitSet) -> None:
    made = captioned(digits, torch.Generator().manual_seed(0))
    shown = attributes(made.images)
    for row in range(len(made.images)):
        caption = CAPTIONS[made.captions[row]]
        expected = Caption(int(digits.labels[row]), int(shown.places[row]), int(shown.tilts[row]))
        assert caption == expected
    # All nine pairs of place and tilt are there, none as a rarity.
    pairs = torch.bincount(made.captions // 10, minlength=9)
    assert pairs.min() >= len(made.images) // 30


def test_there_are_ninety_captions_and_each_says_what_it_says() -> None:
    assert len({caption.text for caption in CAPTIONS}) == 90
    assert [parse_caption(caption.text) for caption in CAPTIONS] == list(CAPTIONS)
    assert CAPTIONS[7].text == "a handwritten seven"
    assert Caption(0, 0, 0).text == "a handwritten zero on the left, tilted right"
    assert [caption.digit for caption in CAPTIONS[:10]] == list(range(10))
    assert len(WORDS) == 18


@pytest.mark.parametrize(
    "text",
    ["a seven", "a handwritten eleven", "a handwritten two on the moon", "a handwritten two, bold"],
)
def test_another_text_is_no_caption(text: str) -> None:
    with pytest.raises(ValueError, match="caption: expected"):
        parse_caption(text)


def test_the_reward_rises_towards_what_was_asked_for(digits: DigitSet) -> None:
    image = digits.images[:1]
    places = torch.cat([moved(image, pixels) for pixels in range(7)])
    wanted = Attributes(torch.full((7,), 2), attributes(image).tilts.expand(7))
    scores = agreement(places, wanted)
    assert torch.equal(scores.argsort(), torch.arange(7)), "further to the right is better"
    assert scores.min() >= 0
    assert scores.max() <= 1


def test_the_reward_reads_the_prompts(digits: DigitSet) -> None:
    made = captioned(digits, torch.Generator().manual_seed(0))
    prompts = [Prompt(CAPTIONS[row].text) for row in made.captions.tolist()]
    reward = AttributeReward()
    true = reward(made.images, prompts)
    assert true.shape == (len(prompts),)
    others = reward(made.images, prompts[1:] + prompts[:1])
    assert true.mean() > others.mean() + 0.2
    with pytest.raises(ValueError, match="prompts: expected 377, one an image, got 1"):
        reward(made.images, prompts[:1])
    with pytest.raises(ValueError, match="caption: expected one as 'a handwritten nine"):
        reward(made.images[:1], [Prompt("a cat")])
