"""Preprocessing on the device against golden pixels of HPSv2 and against the picture route."""

import json
from pathlib import Path
from typing import get_args

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as VF

from argrpo.rewards.image_transfer import pil_images
from argrpo.rewards.tower_pixels import (
    INTERPOLATIONS,
    ResizedAs,
    TowerPixels,
    preprocess,
    resized_in_passes,
)

GOLDEN = Path(__file__).parents[2] / "golden/hps_preprocess"
CASE = json.loads((GOLDEN / "case.json").read_text())


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "expected.safetensors")


@pytest.mark.parametrize("size", CASE["config"]["sizes"])
def test_pixels_are_those_of_hpsv2(size: int, tensors) -> None:
    images = tensors[f"image_{size}"].permute(2, 0, 1)[None].float() / 255
    pixels = preprocess(images, TowerPixels(224, resized_as="tensor"))[0]
    # From the golden case: two orders of magnitude below resizing as a picture.
    atol = CASE["tolerance"]["pixels"]["atol"]
    for part, ours in (
        ("every_4th", pixels[:, 1::4, 2::4]),
        ("first_rows", pixels[:, :2]),
        ("last_rows", pixels[:, -2:]),
        ("last_columns", pixels[:, :, -2:]),
    ):
        torch.testing.assert_close(ours, tensors[f"pixels_{size}_{part}"], atol=atol, rtol=0)


def test_token_ids_are_those_of_hpsv2(tensors) -> None:
    tokens = open_clip.get_tokenizer("ViT-H-14")(CASE["config"]["prompts"])
    assert torch.equal(tokens, tensors["prompt_token_ids"])


SHAPES = [  # height, width, pixels a side, and whether the whole image is squashed to them
    (256, 256, 224, False),
    (80, 61, 32, False),
    (41, 63, 32, False),
    (50, 97, 32, True),
    (20, 31, 48, False),
    (32, 32, 32, False),
]


def _levels_of_pictures(images: Tensor, pixels: TowerPixels) -> Tensor:
    """Levels by Pillow, picture by picture, as the libraries' own transforms go."""
    size = [pixels.size] * (2 if pixels.squash else 1)
    mode = VF.InterpolationMode(pixels.interpolation)
    resized = [VF.resize(picture, size, mode) for picture in pil_images(images)]
    cropped = [VF.center_crop(picture, [pixels.size] * 2) for picture in resized]
    return torch.stack([VF.pil_to_tensor(picture).float() for picture in cropped])


def _assert_same_levels(ours: Tensor, theirs: Tensor, *, share: float) -> None:
    """Whole numbers that are the same, but for a share where a sum ended near a half."""
    # Levels are a scale and a shift away from what a tower sees: fp32 rounding of 255.
    torch.testing.assert_close(ours, ours.round(), atol=1e-3, rtol=0)
    difference = (ours.round() - theirs).abs()
    # A level in each of two passes.
    assert difference.max() <= 2
    assert difference.count_nonzero() <= share * difference.numel()


def _levels(size: int, interpolation: str, squash: bool) -> TowerPixels:
    """Pixels that a tower would see as they are, 0 to 255."""
    return TowerPixels(size, (0.0,) * 3, (1.0 / 255.0,) * 3, interpolation, squash=squash)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("height", "width", "size", "squash"), SHAPES)
def test_a_picture_is_resized_as_pillow_does(
    height: int, width: int, size: int, squash: bool, interpolation: str
) -> None:
    # White noise: bicubic weights leave [0, 1] all over, and a picture clips there.
    images = torch.rand(5, 3, height, width)
    pixels = _levels(size, interpolation, squash)
    theirs = _levels_of_pictures(images, pixels)
    # 16-bit weights where Pillow has 22: 0.3 to 1.8 % of the values, as measured.
    _assert_same_levels(preprocess(images, pixels), theirs, share=0.03)
    nhwc = images.contiguous(memory_format=torch.channels_last)
    _assert_same_levels(preprocess(nhwc, pixels), theirs, share=0.03)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("height", "width", "size", "squash"), SHAPES[:5])
def test_a_gpus_passes_in_floats_are_those_of_pillow(
    height: int, width: int, size: int, squash: bool, interpolation: str
) -> None:
    images = torch.rand(5, 3, height, width)
    pixels = _levels(size, interpolation, squash)
    shape = (
        (size, size) if squash else tuple(size * x // min(height, width) for x in (height, width))
    )
    resized = resized_in_passes((images * 255).round(), shape, pixels)
    ours = VF.center_crop(resized, [size, size])
    # Bilinear weights of 256 to 224 are multiples of 1/8, so many sums are halves: 8 % measured.
    share = 0.12 if interpolation == "bilinear" else 0.002
    _assert_same_levels(ours, _levels_of_pictures(images, pixels), share=share)


def test_pixels_are_those_of_open_clips_own_transform() -> None:
    images = torch.rand(3, 3, 80, 60)
    ours = preprocess(images, TowerPixels(32))
    transform = open_clip.image_transform(32, is_train=False)
    theirs = torch.stack([transform(picture) for picture in pil_images(images)])
    # Two levels, over the smallest deviation of a channel; and nearly all are the same.
    assert (ours - theirs).abs().max() < 2.1 / 255 / 0.26
    assert (ours - theirs).abs().quantile(0.97) < 1e-5


def test_bfloat16_images_are_rounded_to_the_levels_of_their_values() -> None:
    images = torch.rand(5, 3, 48, 48, dtype=torch.bfloat16)
    seen = preprocess(images, TowerPixels(32))
    assert seen.dtype == torch.float32
    assert torch.equal(seen, preprocess(images.float(), TowerPixels(32)))


@pytest.mark.parametrize("resized_as", get_args(ResizedAs))
def test_an_image_that_is_no_number_is_no_black_picture(resized_as: ResizedAs) -> None:
    images, pixels = torch.rand(5, 3, 48, 40), TowerPixels(32, resized_as=resized_as)
    whole = preprocess(images, pixels)
    images[3, 1, 24, 20] = torch.nan
    seen = preprocess(images, pixels)
    assert seen[3].isnan().any()
    others = [0, 1, 2, 4]
    assert torch.equal(seen[others], whole[others])
    # A sum of white pixels that half precision cannot hold is no such image.
    assert not preprocess(torch.ones(1, 3, 160, 160).half(), pixels).isnan().any()


@pytest.mark.parametrize("resized_as", get_args(ResizedAs))
def test_an_image_does_not_depend_on_its_batch(resized_as: ResizedAs) -> None:
    images, pixels = torch.rand(7, 3, 48, 40), TowerPixels(32, resized_as=resized_as)
    together = preprocess(images, pixels)
    for row in range(7):
        assert torch.equal(together[row], preprocess(images[row : row + 1], pixels)[0])


def test_a_tensor_is_resized_and_normalised_as_torchvision_does() -> None:
    images, pixels = torch.rand(7, 3, 48, 40), TowerPixels(32, resized_as="tensor")
    resized = VF.resize(images, [32], VF.InterpolationMode.BICUBIC, antialias=True)
    wanted = VF.normalize(VF.center_crop(resized, [32, 32]), pixels.mean, pixels.std)
    assert torch.equal(preprocess(images, pixels), wanted)


def test_resizing_of_the_loo_fid_recipe_is_plain_bilinear() -> None:
    images = torch.rand(2, 3, 48, 48)
    pixels = TowerPixels(32, (0.0,) * 3, (1.0,) * 3, "bilinear", "tensor", antialias=False)
    wanted = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(preprocess(images, pixels), wanted)


def test_squashed_pixels_keep_the_whole_image() -> None:
    images = torch.rand(1, 3, 64, 32)
    pixels = TowerPixels(32, (0.0,) * 3, (1.0,) * 3, squash=True)
    seen = preprocess(images, pixels)
    assert seen.shape == (1, 3, 32, 32)
    # Bicubic weights add up to 1, so the whole image has the mean of its squashed form.
    torch.testing.assert_close(seen.mean(), images.mean(), atol=5e-3, rtol=0)
