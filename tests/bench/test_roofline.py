"""bench/roofline.py: the least time of a step, against figures worked out by hand."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MODELS = {"B": (768, 12, 2048), "XL": (1280, 36, 3584), "3B": (3200, 24, 8704)}


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The file as a module; bench/ is no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("roofline")
    for name in ("roofline", "timing"):
        sys.modules.pop(name, None)


# Images a second of one H200 at 4.3 TB/s and 790 TFLOP/s, bf16 weights and cache, by hand from the
# formula, to four figures.
@pytest.mark.parametrize(
    ("model", "num_tokens", "images", "num_branches", "images_per_s"),
    [
        ("B", 256, 128, 2, 1465.7),  # the products take longest
        ("B", 256, 8, 2, 496.2),  # the weights do
        ("XL", 256, 128, 2, 264.4),
        ("XL", 256, 128, 1, 473.9),
        ("XL", 576, 64, 2, 57.5),
        ("3B", 256, 64, 1, 124.9),
    ],
)
def test_the_limit_of_published_sizes(
    roofline: ModuleType,
    model: str,
    num_tokens: int,
    images: int,
    num_branches: int,
    images_per_s: float,
) -> None:
    dim, num_layers, ffn_dim = MODELS[model]
    sizes = roofline.StepSizes(
        *(dim, num_layers, ffn_dim, 16384, images, num_branches), itemsize=2, cache_itemsize=2
    )
    ceilings = roofline.Ceilings(bytes_per_second=4.3e12, flops_per_second=790e12)
    least = roofline.least_rollout_us(sizes, num_tokens, ceilings)
    # The last figure of the table is rounded.
    assert images / least * 1e6 == pytest.approx(images_per_s, rel=2e-3)


def test_a_longer_cache_costs_its_bytes(roofline: ModuleType) -> None:
    sizes = roofline.StepSizes(8, 2, 16, 32, 3, 2, itemsize=4, cache_itemsize=2)
    ceilings = roofline.Ceilings(bytes_per_second=1e6, flops_per_second=1e12)
    more = roofline.least_step_us(sizes, 20, ceilings) - roofline.least_step_us(sizes, 10, ceilings)
    # 6 sequences x 10 positions x keys and values x 2 layers x 8 values of 2 bytes, 1 us a byte.
    assert more == pytest.approx(6 * 10 * 2 * 2 * 8 * 2)
