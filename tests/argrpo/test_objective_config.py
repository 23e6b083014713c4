"""The objective's settings: what is refused, by name."""

from typing import Any

import pytest

from argrpo.objective_config import ObjectiveConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss_type", "ppo"),
        ("epsilon", 0.0),
        ("epsilon", 1.0),
        ("epsilon_high", 0.0),
        ("delta", 1.2),
        ("delta", float("nan")),
        ("beta", -0.1),
        ("importance_sampling_level", "image"),
        ("kl_level", "image"),
        ("policy", "uncond"),
        ("old_logprobs", "none"),
        ("importance_sampling_cap", 0.0),
        ("entropy_coef", -1e-3),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got '?{value}"):
        ObjectiveConfig(**{field: value})


def test_a_delta_below_the_clip_is_refused() -> None:
    assert ObjectiveConfig(epsilon_high=0.28, delta=1.3).ratio_bounds == (0.8, 1.28)
    with pytest.raises(ValueError, match=r"^delta: .* above 1 \+ epsilon_high = 1.28, got 1.25"):
        ObjectiveConfig(epsilon_high=0.28, delta=1.25)


def test_the_draws_logprobs_are_needed_by_whoever_compares_with_them() -> None:
    assert not ObjectiveConfig().needs_draw_logprobs
    assert ObjectiveConfig(importance_sampling_cap=2.0).needs_draw_logprobs
    assert ObjectiveConfig(old_logprobs="draw").needs_draw_logprobs
