"""The digits: fixed and disjoint splits, and what upsampling and augmentation do to a picture."""

import pytest
import torch
from sklearn.datasets import load_digits

from argrpo.digits.dataset import IMAGE_SIZE, SPLIT_SIZES, load_split, shift_and_rotate


def test_splits_hold_every_scan_once() -> None:
    scans, classes = load_digits(return_X_y=True)
    pixels = torch.cat([load_split(name).images[:, 0] for name in SPLIT_SIZES])
    # The average over a scan's pixels and its class are left alone by the upsampling well enough
    # to tell nearly all scans apart; what counts is that none is missing or twice.
    means = pixels.mean(dim=(1, 2)).sort().values
    wanted = torch.from_numpy(scans).float().mean(dim=1).div(16).sort().values
    assert len(means) == len(wanted) == 1797
    # Clamping at sharp edges moves a mean by a little.
    torch.testing.assert_close(means, wanted, atol=0.02, rtol=0)
    labels = torch.cat([load_split(name).labels for name in SPLIT_SIZES])
    assert torch.equal(labels.bincount(), torch.from_numpy(classes).bincount())


def test_no_picture_is_in_two_splits() -> None:
    seen: set[bytes] = set()
    for name in SPLIT_SIZES:
        pictures = {image.numpy().tobytes() for image in load_split(name).images}
        assert not pictures & seen
        seen |= pictures


@pytest.mark.parametrize("name", SPLIT_SIZES)
def test_a_split_has_its_size_and_every_class_in_proportion(name: str) -> None:
    digits = load_split(name)
    assert len(digits) == SPLIT_SIZES[name] == len(digits.images)
    counts = digits.labels.bincount(minlength=10)
    # Classes have 174 to 183 scans, so a class's share of a split is a tenth but for 3 %, and its
    # place among the others rounds by one or two.
    assert (counts - len(digits) / 10).abs().max() <= 0.03 * len(digits) / 10 + 2


def test_a_split_is_the_same_every_time() -> None:
    first, second = load_split("policy"), load_split("policy")
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)


def test_pictures_are_grey_and_in_range() -> None:
    images = load_split("evaluation").images
    assert images.shape == (377, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert images.dtype == torch.float32
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    assert images.min() == 0.0
    assert images.max() == 1.0


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"split: expected one of policy, .*, got 'train'"):
        load_split("train")


def test_no_movement_leaves_pictures_alone() -> None:
    images = load_split("evaluation").images[:4]
    still = shift_and_rotate(images, torch.Generator(), max_shift=0.0, max_degrees=0.0)
    # Bilinear samples at pixel centres, whose coordinates are rounded.
    torch.testing.assert_close(still, images, atol=1e-4, rtol=0)


def test_a_shift_moves_by_pixels_at_most_as_told() -> None:
    spot = torch.zeros(200, 1, 16, 16)
    spot[:, :, 8, 8] = 1.0
    generator = torch.Generator().manual_seed(0)
    moved = shift_and_rotate(spot, generator, max_shift=2.0, max_degrees=0.0)
    mass = moved.sum(dim=(1, 2, 3))
    # Bilinear weights sum to one wherever the spot lands.
    torch.testing.assert_close(mass, torch.ones(200), atol=1e-4, rtol=0)
    axis = torch.arange(16.0)
    for distance in (
        (moved.sum(dim=(1, 2)) * axis).sum(dim=1) - 8,
        (moved.sum(dim=(1, 3)) * axis).sum(dim=1) - 8,
    ):
        assert distance.abs().max() <= 2.0 + 1e-3
        assert distance.abs().max() > 1.8, "200 draws come near the bound"


def test_a_turn_keeps_the_centre_and_moves_the_rim() -> None:
    image = torch.zeros(100, 1, 17, 17)
    image[:, :, 8, 8] = 1.0
    image[:, :, 8, 16] = 1.0
    generator = torch.Generator().manual_seed(0)
    turned = shift_and_rotate(image, generator, max_shift=0.0, max_degrees=30.0)
    torch.testing.assert_close(turned[:, 0, 8, 8], torch.ones(100), atol=1e-4, rtol=0)
    assert (turned[:, 0, 8, 16] < 0.5).float().mean() > 0.5


def test_augmentation_depends_on_its_generator_alone() -> None:
    images = load_split("evaluation").images[:8]

    def once(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return shift_and_rotate(images, generator, max_shift=2.0, max_degrees=10.0)

    torch.rand(7)
    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))
