"""The float-to-uint8 rules against the pixels that the published code makes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo.pixels import PIXEL_RULES, seen_by_judges, to_uint8

GOLDEN = Path(__file__).parents[1] / "golden" / "vq_tokenizer" / "expected.safetensors"


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.mark.parametrize(
    ("rule", "published"),
    [("llamagen", "llamagen"), ("truncate", "argrpo"), ("truncate", "arpolicytuning")],
)
def test_levels_match_the_published_rule(
    rule: str, published: str, expected: dict[str, Tensor]
) -> None:
    images = (0.5 * expected["small_image"] + 0.5).clamp(0, 1)
    levels = to_uint8(images, rule).permute(0, 2, 3, 1)
    difference = levels.int() - expected[f"small_uint8_{published}"].int()
    offset = 0.5 if rule == "llamagen" else 0.0
    exact = images.double().permute(0, 2, 3, 1) * 255 + offset
    # The published rules round the float a little differently, so a level may only differ at an
    # edge between two: within 1e-3 of it, by one.
    at_an_edge = (exact - exact.round()).abs() < 1e-3
    assert difference.abs().max() <= 1
    assert (difference[~at_an_edge] == 0).all()
    assert at_an_edge.float().mean() < 0.2, "most pixels are compared exactly"


def test_rules_differ_where_they_should() -> None:
    images = torch.tensor([0.0, 0.5, 1.5, 1.7, 2.5, 255.0]) / 255.0
    assert to_uint8(images, "llamagen").tolist() == [0, 1, 2, 2, 3, 255]
    assert to_uint8(images, "truncate").tolist() == [0, 0, 1, 1, 2, 255]
    assert to_uint8(images, "round").tolist() == [0, 0, 2, 2, 2, 255]


def test_eight_bit_levels_survive_every_rule() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    # Half a level off zero would truncate; an exact level times 255 may land just below it.
    images = (levels.float() + 0.25) / 255.0
    for rule in ("llamagen", "truncate", "round"):
        assert torch.equal(to_uint8(images.clamp(0, 1), rule), levels)


def test_rewards_see_the_levels_of_the_file() -> None:
    images = torch.rand((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    for rule in PIXEL_RULES[:-1]:
        assert torch.equal(seen_by_judges(images, rule), to_uint8(images, rule).float() / 255.0)
    assert torch.equal(seen_by_judges(images, "float"), images)


def test_unknown_rules_and_integers_are_refused_by_name() -> None:
    images = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"pixels: expected one of .*, got 'floor'"):
        seen_by_judges(images, "floor")
    with pytest.raises(ValueError, match="pixels: expected llamagen, truncate or round"):
        to_uint8(images, "float")
    with pytest.raises(ValueError, match="images: expected floating point"):
        to_uint8(images.to(torch.uint8))
