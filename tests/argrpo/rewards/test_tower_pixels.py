"""Preprocessing on the device against golden pixels of HPSv2 and against the picture route."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image

from argrpo.rewards.tower_pixels import TowerPixels, preprocess

GOLDEN = Path(__file__).parents[2] / "golden/hps_preprocess"
CASE = json.loads((GOLDEN / "case.json").read_text())


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "expected.safetensors")


@pytest.mark.parametrize("size", CASE["config"]["sizes"])
def test_pixels_are_those_of_hpsv2(size: int, tensors) -> None:
    images = tensors[f"image_{size}"].permute(2, 0, 1)[None].float() / 255
    pixels = preprocess(images, TowerPixels(224))[0]
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


def test_pixels_follow_the_picture_route_within_a_grey_level() -> None:
    # Middle greys: a picture clips what bicubic weights push beyond white and black, floats do not.
    image = torch.randint(96, 160, (3, 80, 60), dtype=torch.uint8)
    ours = preprocess(image[None].float() / 255, TowerPixels(32))[0]
    theirs = open_clip.image_transform(32, is_train=False)(to_pil_image(image))
    # The picture route rounds to 8 bits after each of two passes: a level, over the tower's std.
    assert (ours - theirs).abs().max() < 1.0 / 255 / 0.26


def test_an_image_does_not_depend_on_its_batch() -> None:
    images = torch.rand(3, 3, 48, 40)
    together = preprocess(images, TowerPixels(32))
    assert torch.equal(together[1], preprocess(images[1:2], TowerPixels(32))[0])


def test_resizing_of_the_loo_fid_recipe_is_plain_bilinear() -> None:
    images = torch.rand(2, 3, 48, 48)
    pixels = TowerPixels(32, (0.0,) * 3, (1.0,) * 3, "bilinear", antialias=False)
    wanted = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(preprocess(images, pixels), wanted)


def test_squashed_pixels_keep_the_whole_image() -> None:
    images = torch.rand(1, 3, 64, 32)
    pixels = TowerPixels(32, (0.0,) * 3, (1.0,) * 3, squash=True)
    seen = preprocess(images, pixels)
    assert seen.shape == (1, 3, 32, 32)
    # Bicubic weights add up to 1, so the whole image has the mean of its squashed form.
    torch.testing.assert_close(seen.mean(), images.mean(), atol=5e-3, rtol=0)
