"""The released diagonal distance, against its golden case and plain loops."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo.evaluation.frechet_diagonal import diagonal_leave_one_out
from argrpo.evaluation.moments import Moments, RawMoments, moments_of

RUNS = [
    "ema_loo-beta0.5-debias_off-init_given",
    "ema_loo-beta0.5-debias_on-init_given",
    "ema_loo-beta0.5-debias_off-init_none",
    "ema_loo-beta0.5-debias_on-init_none",
    "ema_loo-beta0.99-debias_on-init_given",
]


@pytest.fixture
def case(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "loofid_recipe" / "ema_loo.safetensors")


@pytest.fixture
def tolerances(golden: Path) -> dict:
    return json.loads((golden / "loofid_recipe" / "case.json").read_text())["tolerance"]


def _moments(case: dict[str, Tensor], name: str) -> Moments:
    return Moments(case[f"{name}_mean"], case[f"{name}_variance"].sqrt(), None)


@pytest.mark.parametrize("run", RUNS)
def test_a_carried_state_agrees_with_the_released_code(case, tolerances, run: str) -> None:
    decay = float(run.split("beta")[1].split("-")[0])
    state = RawMoments.empty(64, full=False)
    if "init_given" in run:
        # As released: what it begins with counts as one batch.
        state = RawMoments.of(_moments(case, "initial"), full=False, weight=1.0 - decay)
    firsts, seconds = [state.first], [state.second]
    distances, rewards = [], []
    for features in case["features"].split(case["batch_sizes"].tolist()):
        found = diagonal_leave_one_out(
            features,
            state,
            _moments(case, "reference"),
            decay=decay,
            debias="debias_on" in run,
        )
        distances.append(found.distance)
        rewards.append((found.without - found.distance).float())
        state = state.updated(features, decay)
        firsts.append(state.first)
        seconds.append(state.second)
    exact = tolerances["moments, distances"]
    torch.testing.assert_close(torch.stack(firsts), case[f"{run}.m1"], **exact)
    torch.testing.assert_close(torch.stack(seconds), case[f"{run}.m2"], **exact)
    torch.testing.assert_close(torch.stack(distances), case[f"{run}.ema_distance"], **exact)
    torch.testing.assert_close(torch.cat(rewards), case[f"{run}.rewards"], **tolerances["rewards"])


def test_without_a_past_it_is_the_released_mode_of_the_batch_alone(case, tolerances) -> None:
    run = "loo_batch-beta0.5-debias_off-init_given"
    state = RawMoments.empty(64, full=False)
    rewards, distances = [], []
    for features in case["features"].split(case["batch_sizes"].tolist()):
        found = diagonal_leave_one_out(features, state, _moments(case, "reference"), decay=0.0)
        rewards.append((found.without - found.distance).float())
        distances.append(found.distance)
    torch.testing.assert_close(torch.cat(rewards), case[f"{run}.rewards"], **tolerances["rewards"])
    exact = tolerances["moments, distances"]
    torch.testing.assert_close(torch.stack(distances), case[f"{run}.batch_distance"], **exact)


def test_leaving_out_is_what_it_says() -> None:
    reference = moments_of(torch.randn(30, 5))
    state = RawMoments.of(moments_of(torch.randn(20, 5)), full=False)
    features = torch.randn(7, 5)
    found = diagonal_leave_one_out(features, state, reference, decay=0.8)
    for row in range(7):
        others = torch.cat([features[:row], features[row + 1 :]])
        alone = diagonal_leave_one_out(others, state, reference, decay=0.8)
        # fp64 sums in another order
        torch.testing.assert_close(found.without[row], alone.distance, rtol=1e-12, atol=1e-13)


def test_one_image_is_refused() -> None:
    reference = moments_of(torch.randn(30, 5))
    with pytest.raises(ValueError, match="features: expected at least 2 images, got 1"):
        diagonal_leave_one_out(
            torch.randn(1, 5), RawMoments.empty(5, full=False), reference, decay=0.5
        )
