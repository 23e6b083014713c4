"""bench/learning_study.py: what its arms are, how it goes on, and what it makes of its rows."""

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
told = importlib.import_module("study_claims")
plots = importlib.import_module("study_plots")


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


def row(arm: str, seed: int, *, weight: float = 0.0, **scores: float) -> dict[str, Any]:
    """A row whose scores are the same at every scale, unless a name ends in _free."""
    usual = {"accuracy": 0.7, "precision": 0.5, "recall": 0.8, "frechet": 100.0, "entropy": 2.9}
    records = []
    for scale in study.BASE_SCALES if arm == "base" else study.SCALES:
        own = {name: scores.get(name, value) for name, value in usual.items()}
        if scale == 1:
            own |= {n.removesuffix("_free"): v for n, v in scores.items() if n.endswith("_free")}
        records.append({"guidance_scale": scale, **own})
    job = arms.Job(arm=arm, seed=seed, loo_fid_weight=weight, steps=16)
    draws = arm not in ("base", "likelihood")
    return {
        **asdict(job),
        "device": "x86_64",
        "evaluation_images": 50,
        "images": job.images,
        "train_seconds": 10.0,
        "measure_seconds": 1.0,
        "scores": records,
        "curves": {name: [0.1 * s for s in range(16)] for name in arms.CURVES} if draws else {},
    }


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
    assert [(job.seed, job.arm) for job in jobs[3:-1]] == [
        (seed, arm) for seed in (0, 1) for arm in arms.ARMS
    ]
    assert jobs[-1].loo_fid_weight == 9.0


FRONTIER = (
    ("judge", 0.0, 0.9, 0.5),
    ("judge_loofid", 0.5, 0.89, 0.7),
    ("judge_loofid", 2.0, 0.885, 0.75),
    ("judge_loofid", 1.0, 0.9, 0.95),  # tried later, for the frontier: no arm takes it
)


def frontier(less_accuracy: float = 0.0) -> list[dict[str, Any]]:
    return [
        row(arm, 0, weight=w, accuracy=a - less_accuracy * (arm != "judge"), recall=r)
        for arm, w, a, r in FRONTIER
    ]


def test_the_arms_take_the_largest_recall_of_the_weights_that_keep_accuracy() -> None:
    jobs = list(study.planned(study.Size(), frontier()))
    assert {job.loo_fid_weight for job in jobs if job.arm == "cfg_free"} == {2.0}


def test_where_no_weight_keeps_accuracy_the_arms_take_the_one_that_keeps_most() -> None:
    assert told.chosen_weight(frontier(less_accuracy=0.1)) == 0.5


def test_of_the_weights_tried_only_the_chosen_one_is_an_arm() -> None:
    found = told.by_arm(frontier())["judge_loofid"]
    assert [own["loo_fid_weight"] for own in found.values()] == [2.0]


def test_a_second_call_goes_on_where_the_first_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, path, ran = study.Size(seeds=(0,), more_weights=()), tmp_path / "rows.jsonl", []

    def run(job: Any, size: Any, assets: Any) -> dict[str, Any]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(job.arm)
        return row(job.arm, job.seed) | asdict(job)

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "digits_assets", lambda folder: None)
    with pytest.raises(KeyboardInterrupt):
        study.study(size, path, 60.0)
    first, ran[:] = list(ran), []
    monkeypatch.setattr(
        study, "run", lambda *a: ran.append(a[0].arm) or row("base", 0) | asdict(a[0])
    )
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


def test_a_reward_is_reached_when_the_mean_of_a_window_is() -> None:
    rewards = [0.0] * 8 + [1.0] * 8
    # Four of the eight steps of a window are at 1 for the first time in the window's twelfth step.
    assert told.images_to_reach(rewards, 0.5, 80) == 12 * 80
    assert told.images_to_reach(rewards, 1.5, 80) == math.inf


def claim(rows: list[dict[str, Any]], letter: str) -> str:
    texts = told.claims(told.by_arm(rows))
    return "\n".join(text for text in texts if text.startswith(f"**({letter})**"))


def test_claim_a_needs_more_accuracy_and_less_recall_and_entropy() -> None:
    base = [row("base", seed) for seed in (0, 1)]
    good = [row("judge", seed, accuracy=0.9, recall=0.6, entropy=2.5) for seed in (0, 1)]
    assert "guidance 2 it holds (2 of 2 seeds)" in claim(base + good, "a")
    wider = [row("judge", seed, accuracy=0.9, recall=0.6, entropy=3.0) for seed in (0, 1)]
    assert "guidance 2 it does not hold (0 of 2 seeds)" in claim(base + wider, "a")


@pytest.mark.parametrize(
    ("accuracy", "recall", "verdict"),
    [(0.89, 0.71, "holds"), (0.87, 0.71, "does not hold"), (0.89, 0.69, "does not hold")],
)
def test_claim_b_needs_accuracy_within_2_points_and_half_of_the_recall(
    accuracy: float, recall: float, verdict: str
) -> None:
    rows = [
        row("base", 0),  # recall .8
        row("judge", 0, accuracy=0.9, recall=0.6),
        row("judge_loofid", 0, weight=2.0, accuracy=accuracy, recall=recall),
    ]
    assert f"at guidance 2 it {verdict} (" in claim(rows, "b")


def test_claim_b_does_not_hold_where_no_recall_was_lost() -> None:
    rows = [row("base", 0), row("judge", 0), row("judge_loofid", 0, weight=2.0)]
    assert "does not hold" in claim(rows, "b")
    assert "none was lost" in claim(rows, "b")


def test_claim_c_compares_without_guidance_with_the_best_of_the_base() -> None:
    base = row("base", 0)
    for record in base["scores"]:
        record["frechet"] = 90.0 if record["guidance_scale"] == 1.5 else 120.0
    worse = row("judge_loofid", 0, weight=2.0, frechet=10.0, frechet_free=91.0)
    better = row("cfg_free", 0, weight=2.0, frechet=500.0, frechet_free=89.0)
    text = claim([base, worse, better], "c")
    assert "judge_loofid does not hold" in text
    assert "cfg_free holds" in text
    assert "90.0 at its best guidance 1.5" in text
    assert "judge: not measured" in text


def test_claim_d_tells_the_images_of_both() -> None:
    slow, fast = row("judge", 0), row("guided", 0)
    fast["curves"]["reward"] = [2 * value for value in slow["curves"]["reward"]]
    never = row("guided", 1)
    never["curves"]["reward"] = [0.0] * 16
    text = claim([slow, fast, row("judge", 1), never], "d")
    assert "against never" not in text
    assert "never against" in text
    assert "1 of 2 seeds sooner" in text


def test_the_summary_has_all_arms_and_says_what_was_not_measured() -> None:
    rows = [row(arm, seed) for arm in ("base", "judge") for seed in (0, 1)]
    rows.append(row("judge_loofid", 0, weight=2.0))
    text = told.summary(rows)
    assert "| base | 2 | 0.700 ± 0.000 |" in text
    assert "judge, entropy, LOO-FID 2" in text
    assert "**(d)** not measured." in text


def test_the_plots_are_drawn_from_whatever_rows_there_are(tmp_path: Path) -> None:
    plots.draw_plots([row("base", 0), row("judge", 0)], tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"frontier.png", "curves.png", "guidance.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


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
