"""SamplingParams: refused by name, and what they say of a draw."""

import math
from dataclasses import FrozenInstanceError

import pytest

from argrpo.engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("guidance_scale", [0.999, 0.0, -1.0, math.nan, math.inf]),
        ("guidance_interval", [-1]),
        ("temperature", [-1e-9, -1.0, math.nan, math.inf]),
        ("top_k", [-1, 1.5]),
        ("top_p", [0.0, -0.1, 1.5, math.nan]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{field}: expected .*, got {value}$"):
            SamplingParams(**{field: value})


def test_the_edges_of_the_ranges_are_allowed() -> None:
    SamplingParams(guidance_scale=1, guidance_interval=0, temperature=0, top_k=0, top_p=1)
    SamplingParams(top_k=1, top_p=1e-6, temperature=1e-6)


def test_params_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]


def test_a_scale_of_one_guides_nothing_and_an_interval_guides_one_more_than_it_says() -> None:
    assert SamplingParams(guidance_scale=1.0).num_guided(16) == 0
    assert SamplingParams(guidance_scale=1.0, guidance_interval=3).num_guided(16) == 0
    assert SamplingParams(guidance_scale=2.0).num_guided(16) == 16
    assert SamplingParams(guidance_scale=2.0, guidance_interval=0).num_guided(16) == 2
    assert SamplingParams(guidance_scale=2.0, guidance_interval=3).num_guided(16) == 5
    assert SamplingParams(guidance_scale=2.0, guidance_interval=30).num_guided(16) == 16


def test_a_greedy_draw_needs_no_filter() -> None:
    assert not SamplingParams(temperature=0.0, top_k=5, top_p=0.5).is_filtered
    assert SamplingParams(top_k=5).is_filtered
    assert SamplingParams(top_p=0.5).is_filtered
    assert not SamplingParams().is_filtered
