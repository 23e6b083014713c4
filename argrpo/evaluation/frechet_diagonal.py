"""The Frechet distance of features taken as independent, with each image of a batch left out.

    D(mu, sd) = |mu_r - mu|^2 + |sd_r - sd|^2          sd = sqrt(max(var, 0) + 1e-12)

var is the biased variance. No matrix, no root of one: O(N C) for all of N images.

Source: Baran et al., arXiv:2603.23086; bugrabaran/ar-policy-tuning at fac5b31.
"""

import torch
from torch import Tensor

from argrpo.evaluation.frechet_loo import LeaveOneOut
from argrpo.evaluation.moments import Moments, RawMoments

_OFFSET = 1e-12  # under the root, of generated images only; as released


def diagonal_leave_one_out(
    features: Tensor, state: RawMoments, reference: Moments, *, decay: float, debias: bool = True
) -> LeaveOneOut:
    """Distances of a batch mixed into carried moments: decay * state + (1 - decay) * batch.

    Leaving an image out, the others share the batch's part.

    Args:
        features: [N, C] finite, N at least 2.
        state: its `second` is [C].
        reference: of C features.
        decay: what the state counts, in [0, 1).
        debias: divide the mixture by the sum of its weights, which is below 1 while the state
            has seen little. Off as released: moments of a young state are then too small.

    Raises:
        ValueError: too few images.
    """
    num_images = len(features)
    if num_images < 2:
        raise ValueError(f"features: expected at least 2 images, got {num_images}")
    wide = features.double()
    weight = decay * state.weight + (1.0 - decay) if debias else 1.0
    squares = wide.square()
    sums, square_sums = wide.sum(dim=0), squares.sum(dim=0)
    others = (num_images - 1) / (1.0 - decay)
    without = _distance(
        (decay * state.first + (sums - wide) / others) / weight,
        (decay * state.second + (square_sums - squares) / others) / weight,
        reference,
    )
    images = num_images / (1.0 - decay)
    distance = _distance(
        (decay * state.first + sums / images) / weight,
        (decay * state.second + square_sums / images) / weight,
        reference,
    )
    return LeaveOneOut(distance, without)


def _distance(first: Tensor, second: Tensor, reference: Moments) -> Tensor:
    """Of raw moments [..., C] to the reference, [...]."""
    std = ((second - first.square()).clamp_min(0.0) + _OFFSET).sqrt()
    gaps = (reference.mean - first).square() + (reference.std - std).square()
    return torch.sum(gaps, dim=-1)
