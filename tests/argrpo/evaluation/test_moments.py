"""Means and covariances of features, and how they move."""

import numpy as np
import pytest
import torch

from argrpo.evaluation.moments import Moments, MomentSums, RawMoments, moments_of


def test_moments_are_those_of_numpy_also_far_from_zero() -> None:
    features = torch.randn(40, 5, dtype=torch.float64) + 1e4
    found = moments_of(features, "name")
    assert found.cov is not None
    # fp64 sums about the first image: nothing of the 1e4 is left in the squares
    np.testing.assert_allclose(found.mean.numpy(), features.numpy().mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(
        found.cov.numpy(), np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-10
    )
    torch.testing.assert_close(found.std.square(), found.cov.diagonal())
    assert (found.features, found.num_images, found.dim) == ("name", 40, 5)


def test_parts_add_up_to_the_whole() -> None:
    features = torch.randn(17, 3)
    sums = MomentSums(3)
    for part in (features[:1], features[1:1], features[1:9], features[9:]):
        sums.add(part)
    whole = moments_of(features)
    # the same fp64 sums in another order
    torch.testing.assert_close(sums.moments().cov, whole.cov, rtol=1e-12, atol=1e-14)
    assert sums.moments().num_images == 17


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(1, 3), "images: expected at least 2 for moments, got 1"),
        (torch.zeros(0, 3), "images: expected at least 2 for moments, got 0"),
        (torch.tensor([[1.0, torch.nan, 0.0]] * 3), "features: expected finite numbers"),
    ],
)
def test_what_has_no_moments_is_refused(features: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moments_of(features)


def test_features_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features: expected \[N, 3\], got \[2, 4\]"):
        MomentSums(3).add(torch.zeros(2, 4))


@pytest.mark.parametrize("full", [False, True])
def test_a_state_forgets_its_past_by_the_decay(full: bool) -> None:
    first, second = torch.randn(6, 4), torch.randn(9, 4)
    state = RawMoments.empty(4, full=full).updated(first, 0.5).updated(second, 0.5)
    mean = 0.25 * first.double().mean(dim=0) + 0.5 * second.double().mean(dim=0)
    torch.testing.assert_close(state.first, mean)
    assert state.weight == 0.75
    assert state.second.shape == ((4, 4) if full else (4,))


def test_a_state_begun_from_moments_has_their_mean_and_spread() -> None:
    moments = moments_of(torch.randn(30, 4))
    full = RawMoments.of(moments, full=True)
    torch.testing.assert_close(full.second - torch.outer(full.first, full.first), moments.cov)
    diagonal = RawMoments.of(moments, full=False, weight=0.5)
    torch.testing.assert_close(
        diagonal.second / 0.5 - (diagonal.first / 0.5).square(), moments.std.square()
    )
    assert diagonal.weight == 0.5


def test_a_full_state_needs_covariances() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="cov: expected a full covariance"):
        RawMoments.of(Moments(zeros, zeros, None), full=True)
