"""Every setting says what it does: the docstring under a field is the help of its flag; settings
that contradict each other are refused."""

import ast
import dataclasses
import inspect
import math
import textwrap
from typing import Any, get_args, get_type_hints

import pytest

from argrpo.config import (
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    TokenizerConfig,
    TrainConfig,
)
from argrpo.demo import DemoConfig
from argrpo.engine.sampling_params import SamplingParams
from argrpo.learner_config import ParityConfig, ReferenceConfig
from argrpo.objective_config import ObjectiveConfig
from argrpo.sample_config import SampleConfig


def records_of(kind: type) -> set[type]:
    """A config and the configs inside it."""
    found = {kind}
    for hint in get_type_hints(kind).values():
        for inner in (hint, *get_args(hint)):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                found |= records_of(inner)
    return found


def undocumented(kind: type) -> list[str]:
    """Fields that no string follows."""
    (record,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(record, ast.ClassDef)
    return [
        ast.unparse(line.target)
        for line, following in zip(record.body, [*record.body[1:], None], strict=True)
        if isinstance(line, ast.AnnAssign)
        and not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant))
    ]


@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig, DemoConfig])
def test_every_setting_has_a_line_of_help(kind: type) -> None:
    assert {record.__name__: undocumented(record) for record in records_of(kind)} == {
        record.__name__: [] for record in records_of(kind)
    }


def test_the_settings_of_a_run_reach_into_every_record() -> None:
    names = {record.__name__ for record in records_of(TrainConfig)}
    assert names > {"RewardConfig", "LearningRateConfig", "SamplingParams", "ObjectiveConfig"}


def run(**settings: Any) -> TrainConfig:
    rewards = [RewardConfig(name="clip")]
    paths = {"policy": PolicyConfig(path="p"), "tokenizer": TokenizerConfig(path="t")}
    return TrainConfig(**{"output_dir": "runs/x", "rewards": rewards, **paths, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minibatches": 3}, "minibatches: expected a divisor of the 32 images of a step, got 3"),
        ({"weight_ema": 1.0}, r"weight_ema: expected None or a number in \(0, 1\), got 1.0"),
        (
            {
                "objective": ObjectiveConfig(importance_sampling_cap=2.0),
                "rollout": SamplingParams(guidance_scale=2.0),
            },
            "objective.policy: expected guided, .* got conditional",
        ),
        (
            {
                "objective": ObjectiveConfig(old_logprobs="draw"),
                "rollout": SamplingParams(top_k=100),
            },
            "objective.policy: expected guided, .* got conditional",
        ),
        (
            {"objective": ObjectiveConfig(clip_components=True)},
            "clip_components: expected rewards that are normalised apart, got .* sum_then",
        ),
        (
            {
                "objective": ObjectiveConfig(policy="guided"),
                "parity": ParityConfig(label_dropout=0.1),
            },
            "parity.label_dropout: expected 0 with objective.policy guided, got 0.1",
        ),
        (
            {
                "objective": ObjectiveConfig(policy="guided"),
                "parity": ParityConfig(first_token_mask=True),
            },
            "parity.first_token_mask: expected false with objective.policy guided",
        ),
        (
            {"parity": ParityConfig(bf16_masters=True)},
            "parity.bf16_masters: expected policy.dtype bfloat16 with it, got float32",
        ),
        (
            {"parity": ParityConfig(weights_before_normalization=True)},
            "parity.weights_before_normalization: expected false with advantage.aggregation sum_",
        ),
        (
            {
                "objective": ObjectiveConfig(importance_sampling_cap=2.0, old_logprobs="draw"),
                "inner_epochs": 2,
            },
            "importance_sampling_cap: expected none with objective.old_logprobs draw and several",
        ),
        (
            {
                "objective": ObjectiveConfig(importance_sampling_cap=2.0, old_logprobs="draw"),
                "draw_ahead": True,
            },
            "updates a rollout or draw_ahead, whose ratios compare with the draw already, got 2;",
        ),
        (
            {"rewards": [RewardConfig(name="clip", weight=0.0)]},
            "rewards: expected at least one judge of another weight than 0, got clip, which only",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(**settings)


def test_draws_without_guidance_and_filters_are_what_the_conditional_policy_scores() -> None:
    objective = ObjectiveConfig(importance_sampling_cap=2.0, old_logprobs="draw")
    assert run(objective=objective, rollout=SamplingParams(temperature=0.9)).updates_per_step == 1


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_an_impossible_label_dropout_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"parity.label_dropout: expected a number in \[0, 1\)"):
        ParityConfig(label_dropout=value)


def test_a_reference_is_not_synchronised_backwards() -> None:
    with pytest.raises(ValueError, match=r"reference.sync_every: expected at least 0, got -1"):
        ReferenceConfig(sync_every=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": -0.1}, r"weight_decay: expected a finite number of at least 0, got -0.1"),
        # Times a learning rate above 0, each would turn every weight into no number at once.
        ({"weight_decay": math.inf}, r"weight_decay: expected a finite number .*, got inf"),
        ({"weight_decay": math.nan}, r"weight_decay: expected a finite number .*, got nan"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two in \[0, 1\), got \[0\.9, 1\.0\]"),
        ({"betas": (math.nan, 0.95)}, r"betas: expected two in \[0, 1\), got \[nan"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm: expected a number above 0, got 0"),
    ],
)
def test_an_optimizer_that_would_ruin_weights_is_refused_by_name(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^optimizer\.{message}"):
        OptimizerConfig(**settings)
