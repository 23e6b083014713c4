"""The inception score, and the Frechet distance beside it, against torch-fidelity."""

import math

import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from argrpo.evaluation.frechet import frechet_distance
from argrpo.evaluation.inception_score import inception_score


@pytest.mark.parametrize(("count", "splits"), [(1000, 10), (333, 7), (10, 10)])
def test_it_is_torch_fidelitys(count: int, splits: int) -> None:
    logits = 3.0 * torch.randn(count, 40)
    theirs = isc_features_to_metric(logits, splits=splits)
    ours = inception_score(logits, num_splits=splits)
    # both in fp64
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(("count", "dim"), [(500, 64), (300, 256), (90, 128)])
def test_the_frechet_distance_is_torch_fidelitys(count: int, dim: int) -> None:
    mix = torch.randn(dim, dim) / dim**0.5
    generated, real = torch.randn(count, dim) @ mix + 0.3, torch.randn(count + 70, dim)
    one, other = (fid_features_to_statistics(f.double()) for f in (generated, real))
    theirs = fid_statistics_to_metric(one, other, verbose=False)["frechet_inception_distance"]
    # theirs takes roots of eigenvalues of an unsymmetric product, in fp64
    assert frechet_distance(generated, real) == pytest.approx(theirs, rel=1e-5)


def test_sure_and_varied_answers_score_the_number_of_classes() -> None:
    logits = 200.0 * torch.eye(8).repeat(50, 1)
    assert inception_score(logits, num_splits=1).mean == pytest.approx(8.0, rel=1e-9)
    assert inception_score(torch.zeros(20, 8), num_splits=2).mean == pytest.approx(1.0, rel=1e-12)
    assert math.isclose(inception_score(logits[:1].expand(9, 8), num_splits=3).mean, 1.0)


def test_too_few_images_and_infinite_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits: expected \[N, K\] with N at least 10, got \[9"):
        inception_score(torch.zeros(9, 3))
    with pytest.raises(ValueError, match="logits: expected finite numbers"):
        inception_score(torch.full((9, 3), torch.nan), num_splits=1)
