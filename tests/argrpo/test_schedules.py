"""The learning rate over a run: warm-up, constant, linear, cosine, refusals."""

import math
from typing import Any

import pytest

from argrpo.schedules import LearningRateConfig, learning_rate


def rates(config: LearningRateConfig, num_steps: int) -> list[float]:
    return [learning_rate(step, config, num_steps=num_steps) for step in range(num_steps)]


def test_the_default_is_one_constant_rate() -> None:
    assert rates(LearningRateConfig(), 5) == [1e-5] * 5


def test_warm_up_starts_above_0_and_ends_at_the_peak() -> None:
    config = LearningRateConfig(peak=4e-5, warmup_steps=4)
    assert rates(config, 6) == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5, 4e-5, 4e-5])


def test_cosine_falls_from_the_peak_towards_the_final_fraction() -> None:
    config = LearningRateConfig(peak=2.0, schedule="cosine", warmup_steps=2, final_fraction=0.1)
    got = rates(config, 10)
    want = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2) for i in range(8)]
    assert got[:2] == pytest.approx([1.0, 2.0])
    assert got[2:] == pytest.approx(want)
    assert got[2] == 2.0
    assert got[6] == pytest.approx(1.1), "half-way between peak and final rate at half of the fall"
    assert 0.2 < got[-1] < got[-2], "the last step still learns"


def test_a_line_falls_evenly_from_the_peak_towards_the_final_fraction() -> None:
    config = LearningRateConfig(peak=2.0, schedule="linear", warmup_steps=2, final_fraction=0.5)
    assert rates(config, 6) == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25])


def test_a_line_of_a_longer_run_is_one_that_keeps_more_of_the_peak() -> None:
    whole = LearningRateConfig(schedule="linear")
    part = LearningRateConfig(schedule="linear", final_fraction=0.75)
    assert rates(part, 10) == pytest.approx(rates(whole, 40)[:10])


def test_a_run_shorter_than_its_warm_up_never_leaves_it() -> None:
    config = LearningRateConfig(peak=1.0, schedule="cosine", warmup_steps=10)
    assert rates(config, 3) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peak", 0.0),
        ("peak", float("nan")),
        ("schedule", "step"),
        ("warmup_steps", -1),
        ("final_fraction", 1.5),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got '?{value}"):
        LearningRateConfig(**{field: value})


@pytest.mark.parametrize("step", [-1, 7])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"^step: expected 0 \.\. 6, got {step}"):
        learning_rate(step, LearningRateConfig(), num_steps=7)
