"""Precision, recall, density and coverage by nearest neighbours in a feature space.

Each set is taken as the union of balls around its features, a ball reaching to its centre's k-th
neighbour within the set.

    precision  share of generated features inside the references' balls: are the images real?
    recall     share of references inside the generated ones' balls: is all of the reality there?
    density    references' balls around a generated feature, over k: 1 where both sets are alike,
               more where images crowd in the reference's thick parts
    coverage   share of references in whose ball a generated feature lies; unlike recall it takes
               no balls around generated outliers

Source: Kynkaanniemi et al., arXiv:1904.06991, equations 1 and 2; Naeem et al., arXiv:2002.09797,
equations 4 and 5 (a feature on the border is inside here, as in the first).
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 1024  # distances are held for this many rows at a time: [_ROWS, reference count] fp64
# Squared distances below this share of the squared lengths are rounding: fp32 features so alike are
# copies of each other.
_COPY = 2.0**-40


class Neighbourhoods(NamedTuple):
    """What balls say of two sets; all in [0, 1] but density, which is at least 0."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(
    generated: Tensor, references: Tensor, *, k: int = 3, radii: Tensor | None = None
) -> Neighbourhoods:
    """Precision, recall, density and coverage of one set of features against another.

    Args:
        generated: [N, C] features of generated images, floating point, finite.
        references: [M, C] features of real images, the same C.
        k: which neighbour's distance is a ball's radius, the centre itself not counted.
        radii: [M] from `ball_radii` of the references, where they are asked about more than once.

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
    points, centres = generated.double(), references.double()
    reach = ball_radii(centres, k=k) if radii is None else radii
    counts, nearest = [], torch.full_like(reach, torch.inf)
    for rows in points.split(_ROWS):
        distances = _distances(rows, centres)
        counts.append((distances <= reach).sum(dim=1))
        nearest = torch.minimum(nearest, distances.amin(dim=0))
    balls = torch.cat(counts)
    return Neighbourhoods(
        precision=(balls > 0).double().mean().item(),
        recall=covered(references, generated, k=k).double().mean().item(),
        density=balls.double().mean().item() / k,
        coverage=(nearest <= reach).double().mean().item(),
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
    """[n, M] by a matrix product, 14 times as fast as difference by difference at C = 2048."""
    # About one of them: lengths of features far from 0 would hide what lies between them.
    origin = centres[0]
    rows, centres = rows - origin, centres - origin
    lengths = rows.square().sum(dim=1)[:, None] + centres.square().sum(dim=1)
    squared = torch.addmm(lengths, rows, centres.T, alpha=-2.0)
    # Cancellation would put a copy at a distance above 0, outside a ball of radius 0.
    return squared.masked_fill_(squared <= _COPY * lengths, 0.0).sqrt_()


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
