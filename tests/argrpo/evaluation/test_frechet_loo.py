"""Leave-one-out Frechet distances, against brute force that decomposes each covariance anew."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo.evaluation.frechet import frechet_distance
from argrpo.evaluation.frechet_loo import (
    FrechetReference,
    LeaveOneOut,
    batch_leave_one_out,
    carried_leave_one_out,
)
from argrpo.evaluation.moments import Moments, RawMoments, moments_of

CARRIED = ["ema_b0.5", "ema_b0.9", "ema_b0.99", "ema_rank_deficient_b0.5"]


@pytest.fixture
def case(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "frechet_loo_exact" / "expected.safetensors")


@pytest.fixture
def tolerances(golden: Path) -> dict[str, dict[str, float]]:
    """The case's own, by whether the covariances have full rank."""
    record = json.loads((golden / "frechet_loo_exact" / "case.json").read_text())["tolerance"]
    full = record["full rank (plain_full_rank, ema_b*)"]
    return {"full": full, "deficient": {"rtol": 0.0, **record["rank deficient"]}}


def _reference(case: dict[str, Tensor], name: str) -> FrechetReference:
    mean, cov = case[f"{name}.reference_mean"], case[f"{name}.reference_cov"]
    return FrechetReference.of(Moments(mean, cov.diagonal().sqrt(), cov))


def _check(found: LeaveOneOut, case: dict[str, Tensor], name: str, tolerance: dict) -> None:
    torch.testing.assert_close(found.distance, case[f"{name}.distance"], **tolerance)
    torch.testing.assert_close(found.without, case[f"{name}.distance_without"], **tolerance)
    rewards = found.without - found.distance
    torch.testing.assert_close(rewards, case[f"{name}.reward"], **tolerance)


@pytest.mark.parametrize(("variant", "correction"), [("mle", 0), ("unbiased", 1)])
@pytest.mark.parametrize("name", ["plain_full_rank", "plain_rank_deficient"])
def test_a_batch_alone_agrees_with_the_golden_case(
    case, tolerances, name: str, variant: str, correction: int
) -> None:
    features = case[f"{name}.features"]
    found = batch_leave_one_out(features, _reference(case, name), correction=correction)
    tolerance = tolerances["deficient" if "deficient" in name else "full"]
    _check(found, case, f"{name}.{variant}", tolerance)


@pytest.mark.parametrize("name", CARRIED)
def test_a_batch_inside_moving_moments_agrees_with_the_golden_case(
    case, tolerances, name: str
) -> None:
    decay = float(name.rpartition("b")[2])
    state = RawMoments(case[f"{name}.m1"], case[f"{name}.m2"], 1.0)
    found = carried_leave_one_out(
        case[f"{name}.features"], state, _reference(case, name), decay=decay
    )
    _check(found, case, name, tolerances["deficient" if "deficient" in name else "full"])
    after = state.updated(case[f"{name}.features"], decay)
    # sums of 24 products of order 1 in fp64
    torch.testing.assert_close(after.first, case[f"{name}.m1_after"], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(after.second, case[f"{name}.m2_after"], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("num_images", "dim"), [(5, 3), (12, 12), (7, 20), (40, 8)])
def test_a_batch_alone_agrees_with_the_distance_of_the_other_images(
    num_images: int, dim: int
) -> None:
    references = torch.randn(60, dim, dtype=torch.float64)
    features = torch.randn(num_images, dim, dtype=torch.float64) * 1.5 + 0.5
    found = batch_leave_one_out(features, FrechetReference.of(moments_of(references)))
    others = [torch.cat([features[:i], features[i + 1 :]]) for i in range(num_images)]
    distances = [frechet_distance(rows, references) for rows in others]
    wanted = torch.tensor(distances, dtype=torch.float64)
    # frechet_distance forms covariances, whose null directions hold rounding: 1e-8 each
    torch.testing.assert_close(found.without, wanted, rtol=0, atol=1e-6)
    whole = frechet_distance(features, references)
    assert found.distance.item() == pytest.approx(whole, abs=1e-6)


def test_both_forms_of_a_batch_agree_where_both_apply() -> None:
    # Nine more features that are always 0 change no distance, but there are then more features
    # than images, which takes the Gram form.
    features = torch.randn(12, 11, dtype=torch.float64)
    references = torch.randn(90, 11, dtype=torch.float64)
    narrow = batch_leave_one_out(features, FrechetReference.of(moments_of(references)))
    padding = [torch.zeros(len(rows), 9, dtype=torch.float64) for rows in (features, references)]
    wide = batch_leave_one_out(
        torch.cat([features, padding[0]], dim=1),
        FrechetReference.of(moments_of(torch.cat([references, padding[1]], dim=1))),
    )
    # The 11 images left over span 10 of 11 dimensions: one rounded eigenvalue, 1e-8.
    torch.testing.assert_close(wide.without, narrow.without, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_moving_moments_agree_with_mixtures_built_one_by_one(decay: float) -> None:
    dim = 6
    reference = moments_of(torch.randn(50, dim, dtype=torch.float64))
    past = torch.randn(30, dim, dtype=torch.float64) * 0.7 - 1.0
    state = RawMoments.empty(dim, full=True).updated(past, 0.0)
    features = torch.randn(9, dim, dtype=torch.float64) + 2.0
    found = carried_leave_one_out(features, state, FrechetReference.of(reference), decay=decay)
    others = [torch.cat([features[:i], features[i + 1 :]]) for i in range(len(features))]
    wanted = [_distance_of(state.updated(rows, decay), reference) for rows in others]
    # all of full rank: rounding alone
    torch.testing.assert_close(found.without, torch.stack(wanted), rtol=1e-11, atol=1e-11)
    whole = _distance_of(state.updated(features, decay), reference)
    torch.testing.assert_close(found.distance, whole, rtol=1e-11, atol=1e-11)


def test_without_a_past_moving_moments_are_those_of_the_batch() -> None:
    reference = FrechetReference.of(moments_of(torch.randn(50, 5, dtype=torch.float64)))
    state = RawMoments.empty(5, full=True).updated(torch.randn(8, 5), 0.0)
    features = torch.randn(30, 5, dtype=torch.float64)
    carried = carried_leave_one_out(features, state, reference, decay=0.0)
    alone = batch_leave_one_out(features, reference, correction=0)
    torch.testing.assert_close(carried.without, alone.without, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(carried.distance, alone.distance, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dim", [4, 30])
def test_twins_are_worth_the_same_and_a_copy_of_the_mean_changes_only_the_count(dim: int) -> None:
    features = torch.randn(10, dim, dtype=torch.float64)
    features[4] = features[7]
    features[2] = features[[*range(2), *range(3, 10)]].mean(dim=0)
    reference = FrechetReference.of(moments_of(torch.randn(40, dim, dtype=torch.float64)))
    found = batch_leave_one_out(features, reference)
    assert found.without.isfinite().all()
    assert found.without[4].item() == pytest.approx(found.without[7].item(), abs=1e-7)
    others = torch.cat([features[:2], features[3:]])
    alone = batch_leave_one_out(others, reference).distance
    # features below the number of images: null directions of 1e-8
    assert found.without[2].item() == pytest.approx(alone.item(), abs=1e-7)


def test_equal_images_are_all_worth_nothing() -> None:
    features = torch.ones(6, 4, dtype=torch.float64)
    reference = FrechetReference.of(moments_of(torch.randn(40, 4, dtype=torch.float64)))
    found = batch_leave_one_out(features, reference)
    torch.testing.assert_close(
        found.without, found.distance.expand(6), rtol=1e-12, atol=1e-12
    )  # rounding alone: the covariance is 0 with or without one


def test_144_images_of_2048_features_take_well_under_a_second() -> None:
    dim = 2048
    cov = torch.eye(dim, dtype=torch.float64)
    reference = FrechetReference(torch.zeros(dim, dtype=torch.float64), cov, cov)
    features = torch.randn(144, dim)
    started = time.perf_counter()
    batch_leave_one_out(features, reference)
    # 0.04 s on one core of a 2 GHz server; the bound leaves room for a busy machine
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(("count", "correction"), [(1, 0), (2, 1)])
def test_too_few_images_are_refused(count: int, correction: int) -> None:
    reference = FrechetReference.of(moments_of(torch.randn(9, 3, dtype=torch.float64)))
    with pytest.raises(ValueError, match=f"features: expected at least {2 + correction} images"):
        batch_leave_one_out(torch.randn(count, 3), reference, correction=correction)


def test_moving_moments_need_two_images() -> None:
    reference = FrechetReference.of(moments_of(torch.randn(9, 3, dtype=torch.float64)))
    state = RawMoments.empty(3, full=True).updated(torch.randn(5, 3), 0.0)
    with pytest.raises(ValueError, match="features: expected at least 2 images, got 1"):
        carried_leave_one_out(torch.randn(1, 3), state, reference, decay=0.5)


def test_a_reference_without_covariances_is_refused() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="cov: expected a full covariance"):
        FrechetReference.of(Moments(zeros, zeros, None))


def _distance_of(raw: RawMoments, reference: Moments) -> Tensor:
    """Brute force, by the square root of the covariance's product with the reference's."""
    assert reference.cov is not None
    cov = raw.second - torch.outer(raw.first, raw.first)
    products = torch.linalg.eigvals(reference.cov @ cov).real.clamp_min(0.0)
    gap = (reference.mean - raw.first).square().sum()
    return gap + reference.cov.trace() + cov.trace() - 2.0 * products.sqrt().sum()
