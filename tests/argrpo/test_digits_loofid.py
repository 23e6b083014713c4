"""The digits preset with a distribution reward and a controlled reward for entropy, whole."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from argrpo.config import TrainConfig
from argrpo.config_files import parse_config
from argrpo.digits.assets import RECIPE, DigitsRecipe, digits_assets
from argrpo.digits.training import FitConfig
from argrpo.trainer import Trainer


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds models of the real sizes, trained for a few steps, as the real ones."""
    folder = tmp_path_factory.mktemp("cache")
    short = FitConfig(steps=2, batch_size=4)
    recipe = DigitsRecipe(
        tokenizer=replace(RECIPE.tokenizer, fit=short),
        policy=replace(RECIPE.policy, fit=short, num_views=1),
        reward_judge=replace(RECIPE.reward_judge, fit=short),
        heldout_judge=replace(RECIPE.heldout_judge, fit=replace(short, seed=1)),
    )
    made = digits_assets(folder, recipe=recipe).policy_path.parent
    made.rename(folder / made.name.replace(recipe.key, RECIPE.key))
    return folder


def _trained(cache_dir: Path, folder: Path, *words: str) -> Trainer:
    small = ["--prompts_per_step", "2", "--images_per_prompt", "4", "--num_steps", "3"]
    places = ["--output_dir", str(folder), "--cache_dir", str(cache_dir)]
    config = parse_config(
        TrainConfig,
        ["--config", "digits_loofid.yaml", *places, *small, "--output.trackers", "[]", *words],
        command="argrpo train",
        lists={},
    )
    trainer = Trainer(config)
    trainer.train()
    return trainer


def _rows(cache_dir: Path, folder: Path, *words: str) -> list[dict[str, float]]:
    _trained(cache_dir, folder, *words)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def rows(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return _rows(cache_dir, tmp_path_factory.mktemp("run") / "run")


def test_every_step_says_how_far_the_images_are_from_the_reference(rows: list[dict]) -> None:
    distances = [row["rewards/loo_fid/distance"] for row in rows]
    assert len(rows) == 3
    assert all(math.isfinite(distance) and distance > 0 for distance in distances)
    assert len(set(distances)) == 3
    assert all(row["rewards/loo_fid/std"] > 0 for row in rows)
    assert all("rewards/digits_judge/mean" in row for row in rows)


def test_every_step_says_the_entropy_and_what_it_was_paid(rows: list[dict]) -> None:
    # An untrained policy chooses almost uniformly of 256 tokens: far above the target.
    assert all(row["entropy/policy"] > 0.9 * math.log(256) for row in rows)
    # Of 3 steps the first is where the warm-up begins, the others are on the plateau, corrected by
    # what was heard of the step before.
    assert rows[0]["entropy/coef"] == 7e-5
    for before, row in pairwise(rows):
        share = before["entropy/policy"] / math.log(256)
        wanted = 2.2e-3 * math.exp(3.0 * (0.52 - share))
        assert row["entropy/coef"] == pytest.approx(wanted, rel=1e-6)


def test_by_completion_a_step_is_paid_for_its_own_entropy(cache_dir: Path, tmp_path: Path) -> None:
    rows = _rows(cache_dir, tmp_path / "run", "--parity.entropy_by_completion", "true")
    for before, row in pairwise(rows):
        own, other = (
            2.2e-3 * math.exp(3.0 * (0.52 - measured["entropy/policy"] / math.log(256)))
            for measured in (row, before)
        )
        # The mean of four coefficients for that of their mean entropy: to second order the same.
        assert row["entropy/coef"] == pytest.approx(own, rel=1e-4)
        assert row["entropy/coef"] != pytest.approx(other, rel=1e-4)


def test_the_moments_move_once_a_step_however_many_updates_follow(
    cache_dir: Path, tmp_path: Path
) -> None:
    trainer = _trained(cache_dir, tmp_path / "run", "--inner_epochs", "2", "--minibatches", "2")
    assert trainer._judges.state_dict()["loo_fid/weight"] == 1 - 0.5**3


def test_the_full_form_and_the_plain_control_train_too(cache_dir: Path, tmp_path: Path) -> None:
    rewards = json.dumps(
        [
            {
                "name": "loo_fid",
                "options": {
                    "features": "digits_judge",
                    "features_path": "digits:reward_judge",
                    "reference": "dataset:digits/policy",
                    "form": "full",
                },
            }
        ]
    )
    words = ["--entropy.control", "target", "--entropy.rate", "0.01", "--rewards", rewards]
    rows = _rows(cache_dir, tmp_path / "run", *words)
    paid = [row["entropy/coef"] for row in rows]
    # above its target the policy is paid less at each step, down to the least
    assert paid[0] == 2.2e-3 and paid[1] == paid[2] == 7e-5
    assert all(math.isfinite(row["rewards/loo_fid/distance"]) for row in rows)
    assert rows[-1]["grad_norm"] > 0


def test_a_coefficient_set_twice_is_refused(cache_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"objective\.entropy_coef: expected 0 with entropy\.con"):
        _rows(cache_dir, tmp_path / "run", "--objective.entropy_coef", "0.01")


def test_a_target_that_no_policy_can_have_is_refused(cache_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^entropy\.target: expected a share of ln V in \(0, 1\)"):
        _rows(cache_dir, tmp_path / "run", "--entropy.target", "1.2")
