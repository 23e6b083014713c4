"""What is watched of images: known values on images whose values are known."""

import math

import pytest
import torch
from torch import Tensor

from argrpo.image_statistics import STATISTICS, image_statistics, statistics_metrics

_IDS = torch.zeros(1, 4, dtype=torch.int64)


def _of(image: Tensor) -> dict[str, float]:
    return dict(zip(STATISTICS, image_statistics(image[None], _IDS)[0].tolist(), strict=True))


def _flat(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue])[:, None, None].expand(3, 16, 16)


@pytest.mark.parametrize(
    ("color", "saturation"),
    [
        ((0.5, 0.5, 0.5), 0.0),
        ((0.0, 0.0, 0.0), 0.0),
        ((1.0, 0.0, 0.0), 1.0),
        ((0.8, 0.4, 0.4), 0.5),
    ],
)
def test_a_flat_image_has_its_saturation_and_neither_edges_nor_colours(
    color: tuple[float, float, float], saturation: float
) -> None:
    found = _of(_flat(*color))
    assert found["saturation"] == pytest.approx(saturation, abs=1e-6)
    assert found["edge_density"] == 0.0 and found["colour_entropy"] == 0.0


def test_edges_are_counted_where_brightness_jumps() -> None:
    halves = _flat(0.0, 0.0, 0.0).clone()
    halves[:, :, 8:] = 1.0
    # The two columns beside the jump, of 16.
    assert _of(halves)["edge_density"] == 2 / 16
    slow = torch.linspace(0, 1, 64)[None, None, :].expand(3, 16, 64)
    assert _of(slow)["edge_density"] == 0.0, "a slope of a 63rd a pixel is no edge"


def test_colour_entropy_is_in_bits() -> None:
    image = torch.zeros(3, 16, 16)
    image[0, :, 8:] = 1.0
    assert _of(image)["colour_entropy"] == pytest.approx(1.0)
    levels = (torch.arange(512)[:, None] // torch.tensor([64, 8, 1]) % 8 + 0.5) / 8
    every = levels.T.reshape(3, 16, 32)
    assert _of(every)["colour_entropy"] == pytest.approx(9.0, abs=1e-5)


def test_tokens_are_counted_once_each_of_an_image_and_of_a_step() -> None:
    ids = torch.tensor([[5, 5, 5, 5], [1, 2, 3, 5]])
    values = image_statistics(torch.rand(2, 3, 8, 8), ids)
    assert values[:, 3].tolist() == [1.0, 4.0]
    metrics = statistics_metrics(values, ids)
    assert metrics["images/distinct_tokens"] == 2.5
    assert metrics["images/distinct_tokens_of_step"] == 4.0
    assert set(metrics) == {f"images/{name}" for name in (*STATISTICS, "distinct_tokens_of_step")}


def test_an_image_does_not_depend_on_those_beside_it() -> None:
    images, ids = torch.rand(5, 3, 12, 12), torch.randint(0, 9, (5, 4))
    alone = torch.cat([image_statistics(images[i : i + 1], ids[i : i + 1]) for i in range(5)])
    # Sums of one image in one order; a library product of another batch may round otherwise.
    torch.testing.assert_close(image_statistics(images, ids), alone, atol=1e-6, rtol=0)
    assert math.isfinite(float(alone.sum()))
