"""The Frechet distance between two sets of features, each taken as a normal distribution.

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)

with means mu and covariances C (unbiased). All in fp64; the square roots are of symmetric
matrices, so rank-deficient covariances do no harm.

Source: Dowson and Landau, J. Multivariate Analysis 12 (1982); Heusel et al., arXiv:1706.08500.
"""

import math

import torch
from torch import Tensor

from argrpo.evaluation.frechet_loo import FrechetReference, symmetric_root


def frechet_distance(generated: Tensor, references: Tensor) -> float:
    """Frechet distance, at least 0.

    Args:
        generated: [N, C] features, N at least 2, floating point, finite.
        references: [M, C] features, M at least 2.

    Raises:
        ValueError: a shape is not as above, or a feature is not finite.
    """
    for name, features in (("generated", generated), ("references", references)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name}: expected [N, C] with N >= 2, got {list(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"{name}: expected finite features, got NaN or infinity")
    if generated.shape[1] != references.shape[1]:
        raise ValueError(
            f"generated: expected {references.shape[1]} features a row as in references, "
            f"got {generated.shape[1]}"
        )
    mean, cov = references.double().mean(dim=0), _covariance(references.double())
    return frechet_to(generated, FrechetReference(mean, cov, symmetric_root(cov)))


def frechet_to(generated: Tensor, reference: FrechetReference) -> float:
    """Frechet distance to references of which only the moments are known, at least 0.

    Args:
        generated: [N, C] finite features, N at least 2, on the reference's device.
        reference: of C features.
    """
    wide = generated.double()
    mean = wide.mean(dim=0)
    # Rows whose products with each other are as those of the root of the overlap; of the two Gram
    # matrices, which share their eigenvalues above 0, the smaller one.
    rows = (wide - mean) @ reference.root / math.sqrt(len(wide) - 1)
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    # The trace of a root is the sum of the roots of the eigenvalues; rounding puts some below 0.
    overlap = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().sum()
    gap = (mean - reference.mean).square().sum()
    spread = (wide - mean).square().sum() / (len(wide) - 1)
    distance = gap + spread + reference.cov.trace() - 2.0 * overlap
    return max(distance.item(), 0.0)


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(dim=0)
    return centred.T @ centred / (len(features) - 1)
