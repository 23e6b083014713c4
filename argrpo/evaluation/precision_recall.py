"""Precision and recall of generated images by nearest neighbours in a feature space.

Each set is taken as the union of balls around its features, a ball reaching to its centre's k-th
neighbour within the set. Precision is the share of generated features inside the references'
balls (are the images real?), recall the share of references inside the generated ones' (is all of
the reality covered?).

Source: Kynkaanniemi et al., arXiv:1904.06991, equations 1 and 2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 1024  # distances are held for this many rows at a time: [_ROWS, reference count] fp64


class PrecisionRecall(NamedTuple):
    """Both shares, in [0, 1]."""

    precision: float
    recall: float


def precision_recall(generated: Tensor, references: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Precision and recall of one set of features against another.

    Args:
        generated: [N, C] features of generated images, floating point, finite.
        references: [M, C] features of real images, the same C.
        k: which neighbour's distance is a ball's radius, the centre itself not counted.

    Raises:
        ValueError: a shape is not as above, a feature is not finite, or a set has fewer than
            k + 1 features.
    """
    _check_features("generated", generated, k)
    _check_features("references", references, k)
    if generated.shape[1] != references.shape[1]:
        raise ValueError(
            f"generated: expected {references.shape[1]} features a row as in references, "
            f"got {generated.shape[1]}"
        )
    return PrecisionRecall(
        precision=covered(generated, references, k=k).double().mean().item(),
        recall=covered(references, generated, k=k).double().mean().item(),
    )


def covered(points: Tensor, centres: Tensor, *, k: int = 3, radii: Tensor | None = None) -> Tensor:
    """Whether each point lies in at least one ball around the centres.

    Args:
        points: [N, C].
        centres: [M, C] with M > k; a ball reaches to its centre's k-th neighbour among them.
        k: which neighbour; not looked at where `radii` are given.
        radii: [M] from `ball_radii` of these centres, where they are asked about more than once.

    Returns:
        [N] bool.
    """
    points, centres = points.double(), centres.double()
    reach = ball_radii(centres, k=k) if radii is None else radii
    return torch.cat(
        [(_distances(rows, centres) <= reach).any(dim=1) for rows in points.split(_ROWS)]
    )


def ball_radii(centres: Tensor, *, k: int = 3) -> Tensor:
    """[M] fp64: how far each of the centres [M, C], M > k, is from its k-th neighbour among
    them."""
    centres = centres.double()
    # A centre is its own nearest neighbour, at distance 0, so the k-th other one is k + 1-th.
    return torch.cat(
        [_distances(rows, centres).kthvalue(k + 1, dim=1).values for rows in centres.split(_ROWS)]
    )


def _distances(rows: Tensor, centres: Tensor) -> Tensor:
    # Not by the matrix product: its cancellation puts equal points at a distance above 0.
    return torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist")


def _check_features(name: str, features: Tensor, k: int) -> None:
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"{name}: expected [N, C] floating point, got {list(features.shape)} {features.dtype}"
        )
    if len(features) <= k:
        raise ValueError(f"{name}: expected at least k + 1 = {k + 1} features, got {len(features)}")
    if not features.isfinite().all():
        raise ValueError(f"{name}: expected finite features, got NaN or infinity")
