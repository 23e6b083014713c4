"""bench/study_claims.py, its tables and its plots, on rows that this file makes up."""

import importlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

arms = importlib.import_module("study_arms")
measures = importlib.import_module("study_measures")
told = importlib.import_module("study_claims")
plots = importlib.import_module("study_plots")
tables = importlib.import_module("study_tables")

SEEDS = (0, 1, 2)


def row(arm: str, seed: int, *, weight: float = 0.0, **scores: float) -> dict[str, Any]:
    """A row whose scores are the same at every scale, unless a name ends in _free."""
    usual = {"accuracy": 0.7, "precision": 0.5, "recall": 0.8, "frechet": 100.0, "entropy": 2.9}
    records = []
    for scale in measures.BASE_SCALES if arm == "base" else measures.SCALES:
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
    assert told.chosen_weight(frontier()) == 2.0


def test_where_no_weight_keeps_accuracy_the_arms_take_the_one_that_keeps_most() -> None:
    assert told.chosen_weight(frontier(less_accuracy=0.1)) == 0.5


def test_of_the_weights_tried_only_the_chosen_one_is_an_arm() -> None:
    found = told.by_arm(frontier())["judge_loofid"]
    assert [own["loo_fid_weight"] for own in found.values()] == [2.0]


def test_a_reward_is_reached_when_the_mean_of_a_window_is() -> None:
    rewards = [0.0] * 8 + [1.0] * 8
    # Four of the eight steps of a window are at 1 for the first time in the window's twelfth step.
    assert told.images_to_reach(rewards, 0.5, 80) == 12 * 80
    assert told.images_to_reach(rewards, 1.5, 80) == math.inf


def claim(rows: list[dict[str, Any]], letter: str) -> str:
    texts = told.claims(told.by_arm(rows))
    return "\n".join(text for text in texts if text.startswith(f"**({letter})**"))


def test_claim_a_needs_more_accuracy_and_less_recall_and_entropy() -> None:
    base = [row("base", seed) for seed in SEEDS]
    good = [row("judge", seed, accuracy=0.9, recall=0.6, entropy=2.5) for seed in SEEDS]
    assert "guidance 2 it holds (3 of 3 seeds)" in claim(base + good, "a")
    wider = [row("judge", seed, accuracy=0.9, recall=0.6, entropy=3.0) for seed in SEEDS]
    assert "guidance 2 it does not hold (0 of 3 seeds)" in claim(base + wider, "a")


def test_a_claim_that_only_the_mean_supports_is_not_shown() -> None:
    base = [row("base", seed) for seed in SEEDS]
    recalls = (0.4, 0.7, 0.9)
    one = [row("judge", s, accuracy=0.9, entropy=2.5, recall=recalls[s]) for s in SEEDS]
    assert "guidance 2 it is not shown (2 of 3 seeds)" in claim(base + one, "a")


def test_two_seeds_are_too_few_for_a_claim_to_hold() -> None:
    rows = [row("base", seed) for seed in (0, 1)]
    rows += [row("judge", seed, accuracy=0.9, recall=0.6, entropy=2.5) for seed in (0, 1)]
    assert "guidance 2 it points that way (2 of 2 seeds)" in claim(rows, "a")


@pytest.mark.parametrize(
    ("accuracy", "recall", "verdict"),
    [(0.89, 0.71, "holds"), (0.87, 0.71, "does not hold"), (0.89, 0.69, "does not hold")],
)
def test_claim_b_needs_accuracy_within_2_points_and_half_of_the_recall(
    accuracy: float, recall: float, verdict: str
) -> None:
    rows = [row("base", seed) for seed in SEEDS]  # recall .8
    rows += [row("judge", seed, accuracy=0.9, recall=0.6) for seed in SEEDS]
    both = {"accuracy": accuracy, "recall": recall}
    rows += [row("judge_loofid", seed, weight=2.0, **both) for seed in SEEDS]
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
    assert "cfg_free points that way" in text
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
    assert "for 90% of the way it does not hold (1 of 2 seeds)" in text


def test_the_summary_has_all_arms_and_says_what_was_not_measured() -> None:
    rows = [row(arm, seed) for arm in ("base", "judge") for seed in (0, 1)]
    rows.append(row("judge_loofid", 0, weight=2.0))
    text = tables.summary(rows)
    assert "| base | 2 | 0.700 ± 0.000 |" in text
    assert "judge, entropy, LOO-FID 2" in text
    assert "**(d)** not measured." in text


def test_long_runs_have_a_section_of_their_own_and_are_no_arm() -> None:
    usual = [row("base", 0), row("judge", 0)]
    longer = [row("judge", 0, accuracy=0.95, recall=0.4) | {"steps": 48, "images": 3840}]
    assert told.by_arm(usual + longer) == told.by_arm(usual)
    page = tables.summary(usual + longer)
    assert "## Further on: 3,840 images, weight of the KL 0.1" in page
    assert "| judge | 2 | 0.950" in page.partition("## Further on")[2]
    assert "0.950" not in page.partition("## Further on")[0]


def test_long_runs_stand_beside_the_base_of_every_seed_and_other_weights_apart() -> None:
    long = {"steps": 48, "images": 3 * row("judge", 0)["images"]}
    rows = [*frontier(), *(row("base", seed) for seed in SEEDS)]
    for seed in SEEDS:
        rows += [row("judge", seed) | long, row("judge_loofid", seed, weight=2.0) | long]
    rows.append(row("judge_loofid", 0, weight=0.5, recall=0.123) | long)
    (sections,) = told.longer_runs(rows).values()
    assert {arm: sorted(seeds) for arm, seeds in sections.items()} == {
        arm: [0, 1, 2] for arm in ("base", "judge", "judge_loofid")
    }
    assert {r["loo_fid_weight"] for r in sections["judge_loofid"].values()} == {2.0}
    page = tables.summary(rows)
    assert "| judge, entropy, LOO-FID 0.5 | 0.700 | 0.500 | 0.123 |" in page.split("Further on")[1]


def test_the_plots_are_drawn_from_whatever_rows_there_are(tmp_path: Path) -> None:
    plots.draw_plots([row("base", 0), row("judge", 0)], tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"frontier.png", "curves.png", "guidance.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
