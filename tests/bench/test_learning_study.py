"""bench/learning_study.py: what its arms are, in which order they run, and how it goes on."""

import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from argrpo.digits.assets import RECIPE, DigitsAssets, DigitsRecipe, digits_assets
from argrpo.digits.training import FitConfig
from argrpo.models.loading import load_policy, load_tokenizer

arms = importlib.import_module("study_arms")
study = importlib.import_module("learning_study")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> DigitsAssets:
    """Models of the real sizes that hardly trained."""
    short = FitConfig(steps=2, batch_size=4)
    recipe = DigitsRecipe(
        tokenizer=replace(RECIPE.tokenizer, fit=short),
        policy=replace(RECIPE.policy, fit=short, num_views=1),
        reward_judge=replace(RECIPE.reward_judge, fit=short),
        heldout_judge=replace(RECIPE.heldout_judge, fit=replace(short, seed=1)),
    )
    return digits_assets(tmp_path_factory.mktemp("cache"), recipe=recipe)


def settings(arm: str, weight: float = 0.0) -> dict[str, Any]:
    """Leaves of an arm's config by dotted name."""
    job = arms.Job(arm=arm, seed=0, loo_fid_weight=weight)
    config = asdict(arms.train_config(job, DigitsAssets.within(Path("cache")), Path("run")))
    return dict(leaves("", config))


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(f"{name}.{key}" if name else key, item)
    else:
        yield name, value


def changed(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    return {key for key in first | second if first.get(key) != second.get(key)}


def measured(job: Any) -> dict[str, Any]:
    """A row, without a training."""
    scores = {"guidance_scale": 2.0, "accuracy": 0.9, "recall": 0.5, "frechet": 100.0}
    return {**asdict(job), "train_seconds": 1.0, "scores": [scores]}


def test_guided_differs_from_judge_in_the_policy_that_is_scored_alone() -> None:
    assert changed(settings("judge"), settings("guided")) == {"objective.policy"}


def test_judge_loofid_differs_from_judge_in_a_reward_and_the_control_of_entropy_alone() -> None:
    differing = changed(settings("judge"), settings("judge_loofid", 1.0))
    assert differing == {"rewards", "entropy.control", "entropy.target"}


def test_cfg_free_differs_from_judge_loofid_in_the_guidance_of_its_draws_alone() -> None:
    differing = changed(settings("judge_loofid", 1.0), settings("cfg_free", 1.0))
    assert differing == {"rollout.guidance_scale"}


@pytest.mark.parametrize("arm", ["judge", "judge_loofid", "guided", "cfg_free"])
def test_no_arm_optimises_the_heldout_judge(arm: str) -> None:
    rewards = settings(arm, 1.0 if arm in arms.WITH_LOOFID else 0.0)["rewards"]
    heldout = [reward for reward in rewards if "heldout" in json.dumps(reward["options"])]
    assert [reward["weight"] for reward in heldout] == [0.0]


def test_all_arms_that_draw_draw_as_many_images() -> None:
    configs = [settings(arm) for arm in ("judge", "judge_loofid", "guided", "cfg_free")]
    names = ("prompts_per_step", "images_per_prompt", "num_steps")
    assert len({tuple(config[name] for name in names) for config in configs}) == 1
    job = arms.Job(arm="judge", seed=0)
    assert job.images == math.prod(configs[0][name] for name in names)


def test_a_weight_for_an_arm_without_loofid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loo_fid_weight: expected 0 for judge, got 2"):
        arms.Job(arm="judge", seed=0, loo_fid_weight=2.0)


def test_an_arm_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="arm: expected one of base, judge"):
        arms.Job(arm="jugde", seed=0)


def test_the_weights_come_first_and_then_every_arm_of_one_seed_after_another() -> None:
    jobs = list(study.planned(study.Size(seeds=(0, 1), more_weights=(9.0,)), []))
    assert [(job.arm, job.loo_fid_weight) for job in jobs[:3]] == [
        ("judge", 0.0),
        ("judge_loofid", 0.5),
        ("judge_loofid", 2.0),
    ]
    assert [(job.seed, job.arm, job.steps) for job in jobs[3:-6]] == [
        (seed, arm, 56) for seed in (0, 1) for arm in arms.ARMS
    ]
    assert [(job.arm, job.seed, job.steps, job.beta) for job in jobs[-6:-2]] == [
        (arm, seed, 168, 0.03) for seed in (0, 1) for arm in ("judge", "judge_loofid")
    ]
    assert (jobs[-2].seed, jobs[-2].steps, jobs[-2].loo_fid_weight) == (0, 168, 2.0)
    assert jobs[-1].loo_fid_weight == 9.0


def test_the_smoke_form_runs_every_arm_once_and_briefly() -> None:
    jobs = set(study.planned(study.SIZES["smoke"], []))
    assert sorted(job.arm for job in jobs) == sorted(arms.ARMS)
    assert {job.steps for job in jobs} == {12}


def test_a_second_call_goes_on_where_the_first_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, path, ran = (
        study.Size(seeds=(0,), more_weights=(), long_steps=0),
        tmp_path / "rows.jsonl",
        [],
    )

    def run(job: Any, size: Any, assets: Any) -> dict[str, Any]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(job.arm)
        return measured(job)

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "digits_assets", lambda folder: None)
    with pytest.raises(KeyboardInterrupt):
        study.study(size, path, 60.0)
    first, ran[:] = list(ran), []
    monkeypatch.setattr(study, "run", lambda *a: ran.append(a[0].arm) or measured(a[0]))
    study.study(size, path, 60.0)
    assert first == ["judge", "judge_loofid"]
    # The other weight, and of the arms those that were no part of the frontier.
    assert ran == ["judge_loofid"] + [a for a in arms.ARMS if a not in first]


def test_nothing_begins_after_the_minutes_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "digits_assets", lambda folder: None)
    study.study(study.Size(), tmp_path / "rows.jsonl", -1.0)
    assert "out of time" in capsys.readouterr().out
    assert not (tmp_path / "rows.jsonl").exists()


def test_more_likelihood_goes_on_where_the_base_stopped(
    assets: DigitsAssets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "VIEWS", 1)  # of 700 digits; encoding eight takes seconds
    tokenizer = load_tokenizer(assets.tokenizer_path)
    first, again = (
        arms.more_likelihood(load_policy(assets.policy_path), tokenizer, images=64, seed=0)
        for _ in range(2)
    )
    base = load_policy(assets.policy_path)
    assert torch.equal(first.head_weight, again.head_weight)
    # Two steps of AdamW move a weight by at most two learning rates of 2e-3 and a little decay:
    # a policy trained from nothing would be elsewhere.
    moved = (first.head_weight - base.head_weight).abs().max().item()
    assert 0 < moved < 5e-3


@pytest.mark.parametrize("arm", arms.ARMS)
def test_a_job_gives_a_row_with_scores_at_every_scale(
    arm: str, assets: DigitsAssets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "VIEWS", 1)
    weight = 1.0 if arm in arms.WITH_LOOFID else 0.0
    job = arms.Job(arm=arm, seed=0, loo_fid_weight=weight, steps=1, group=2)
    size = study.Size(evaluation_images=20)
    found = json.loads(json.dumps(study.run(job, size, assets)))
    scales = study.BASE_SCALES if arm == "base" else study.SCALES
    assert [record["guidance_scale"] for record in found["scores"]] == list(scales)
    assert all(math.isfinite(value) for record in found["scores"] for value in record.values())
    assert study.is_done(job, [found])
    draws = arm not in ("base", "likelihood")
    assert set(found["curves"]) == (set(arms.CURVES) if draws else set())
