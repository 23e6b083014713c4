"""Settings of an evaluation that cannot be meant are refused by name."""

from typing import Any, get_args, get_type_hints

import pytest

from argrpo.config import PolicyConfig, RewardConfig, TokenizerConfig, TrainConfig, describe
from argrpo.config_files import parse_config
from argrpo.eval_config import EvalConfig
from argrpo.evaluation.features import FeatureKind

JUDGES = [RewardConfig(name="clip")]
SET = {"features_path": "network", "reference": "moments.npz"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "eval.every: expected at least 1, or null for no evaluation, got 0"),
        ({"every": -3}, "eval.every: expected at least 1, or null for no evaluation, got -3"),
        ({"num_images": 0}, "eval.num_images: expected at least 1, got 0"),
        ({**SET, "num_images": 3}, "eval.num_images: expected at least 4 to compare .*, got 3"),
        (
            {**SET, "num_images": 1, "neighbours": 0},
            "eval.num_images: expected at least 2 to compare their features, got 1",
        ),
        ({"features_path": "network"}, "eval.reference: expected moments or images .* got none"),
        ({"reference": "m.npz"}, "eval.features_path: expected weights of inception, .* got none"),
        ({"neighbours": -1}, "eval.neighbours: expected at least 0, got -1"),
        ({"image_size": 0}, "eval.image_size: expected at least 1, got 0"),
        ({"guidance_scales": [2.0, 0.5]}, "eval.guidance_scales: expected .* at least 1, got 0.5"),
        ({"guidance_scales": [float("nan")]}, "eval.guidance_scales: expected finite .* got nan"),
        ({"guidance_scales": [2.0, 2.0]}, "eval.guidance_scales: expected each once, got"),
        ({"best_metric": "eval/clip/mean"}, "eval.best_metric: expected eval.judges or .* neither"),
        (
            {**SET, "best_metric": "eval/frechet"},
            "eval.best_mode: expected min with eval/frechet, a distance, got max",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**settings)


def test_evaluations_stand_before_the_first_step_at_every_turn_and_after_the_last() -> None:
    config = EvalConfig(every=4, judges=JUDGES)
    assert [step for step in range(11) if config.is_due(step, 10)] == [0, 4, 8, 10]


@pytest.mark.parametrize("settings", [{"every": None, "judges": JUDGES}, {"every": 1}])
def test_no_turn_or_nothing_to_measure_is_no_evaluation(settings: dict[str, Any]) -> None:
    assert not any(EvalConfig(**settings).is_due(step, 3) for step in range(4))


def test_a_best_metric_may_stay_where_evaluation_is_switched_off() -> None:
    assert not EvalConfig(every=None, best_metric="eval/clip/mean").is_on


def test_the_networks_are_those_that_can_be_loaded() -> None:
    assert get_type_hints(EvalConfig)["features"] == FeatureKind
    assert len(get_args(FeatureKind)) == 4


def test_a_run_says_at_its_start_how_often_it_is_evaluated() -> None:
    config = TrainConfig(
        output_dir="runs/x",
        policy=PolicyConfig(path="p"),
        tokenizer=TokenizerConfig(path="t"),
        rewards=JUDGES,
        num_steps=10,
        eval=EvalConfig(every=4, judges=JUDGES, guidance_scales=[2.0, 1.0]),
    )
    assert describe(config)[-1] == (
        "4 evaluation(s) of 200 images at guidance 2, 1, one of them before the first step"
    )


def test_flags_and_files_reach_every_setting() -> None:
    words = ["--config", "digits.yaml", "--eval.every", "7", "--eval.guidance_scales", "[1.5,2]"]
    words += ["--eval.judges", '[{"name": "clip"}]', "--eval.best_metric", "eval/clip/mean"]
    config = parse_config(TrainConfig, words, command="argrpo train", lists={}).eval
    assert (config.every, config.guidance_scales, config.judges[0].name) == (7, [1.5, 2.0], "clip")
    typed = ["--config", "digits.yaml", "--eval.guidance_scales", "1.5", "2"]
    lists = {"--eval.guidance_scales": None}
    config = parse_config(TrainConfig, typed, command="argrpo train", lists=lists).eval
    assert config.guidance_scales == [1.5, 2.0]
    off = parse_config(TrainConfig, [*words, "--eval.every", "null"], command="x", lists={})
    assert not off.eval.is_on
    with pytest.raises(ValueError, match=r"^eval\.every: expected at least 1"):
        parse_config(TrainConfig, [*words, "--eval.every", "0"], command="x", lists={})
