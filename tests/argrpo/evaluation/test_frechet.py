"""The Frechet distance to references of which only the moments are known."""

import pytest
import torch
from torch import Tensor

from argrpo.evaluation.frechet import frechet_distance, frechet_to
from argrpo.evaluation.frechet_loo import FrechetReference
from argrpo.evaluation.moments import moments_of


def by_the_book(generated: Tensor, references: Tensor) -> float:
    """The formula with eigenvalues of the product of covariances, which is not symmetric."""
    gap = (generated.mean(0) - references.mean(0)).square().sum()
    first, second = generated.T.cov(), references.T.cov()
    roots = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    return (gap + first.trace() + second.trace() - 2 * roots).item()


@pytest.mark.parametrize("count", [2, 5, 6, 7, 40])
def test_fewer_and_more_images_than_features_give_the_distance_by_the_book(count: int) -> None:
    references = torch.randn(30, 6, dtype=torch.float64) * torch.arange(1, 7)
    generated = torch.randn(count, 6, dtype=torch.float64) + 0.5
    reference = FrechetReference.of(moments_of(references))
    # Directions without spread hold rounding, whose root is 1e-8 times the largest deviation.
    assert frechet_to(generated, reference) == pytest.approx(
        by_the_book(generated, references), abs=1e-6
    )
    assert frechet_distance(generated, references) == pytest.approx(
        frechet_to(generated, reference), abs=1e-6
    )


def test_the_references_are_at_no_distance_from_themselves() -> None:
    features = torch.randn(50, 8) * 10
    reference = FrechetReference.of(moments_of(features))
    # fp64 sums of squares of 10: 50 * 100 * 1e-16, over roots of eigenvalues
    assert 0 <= frechet_to(features, reference) < 1e-6
