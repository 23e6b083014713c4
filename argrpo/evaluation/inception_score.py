"""The inception score: how sure a classifier is of each image, and how varied its answers are.

    exp(mean_x KL(p(y | x) || p(y)))      of each split; their mean

p(y) is the split's own mean, so the score depends on how many images a split has: published ones
are of 10 splits of 5,000. Images are shuffled first, because they often come sorted by class; the
shuffle is torch-fidelity's, so that both give the same number.

Source: Salimans et al., arXiv:1606.03498; toshas/torch-fidelity at 5e211a9, metric_isc.py.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NUM_SPLITS = 10
_SHUFFLE_SEED = 2020


class InceptionScore(NamedTuple):
    """Over the splits."""

    mean: float
    std: float


def inception_score(logits: Tensor, *, num_splits: int = NUM_SPLITS) -> InceptionScore:
    """Score of a set of images, from 1 to the number of classes.

    Args:
        logits: [N, K] finite; of TensorFlow's network without the bias, as published scores are.
        num_splits: at least 1 and at most N.

    Raises:
        ValueError: not as above.
    """
    if logits.ndim != 2 or not 1 <= num_splits <= len(logits):
        raise ValueError(
            f"logits: expected [N, K] with N at least {max(num_splits, 1)}, "
            f"got {list(logits.shape)}"
        )
    if not logits.isfinite().all():
        raise ValueError("logits: expected finite numbers, got NaN or infinity")
    order = np.random.RandomState(_SHUFFLE_SEED).permutation(len(logits))
    logprobs = logits.cpu()[torch.from_numpy(order)].double().log_softmax(dim=1)
    bounds = [place * len(logits) // num_splits for place in range(num_splits + 1)]
    scores = [_score(logprobs[first:last]) for first, last in pairwise(bounds)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _score(logprobs: Tensor) -> float:
    probs = logprobs.exp()
    marginal = probs.mean(dim=0).log()
    # A class whose probability underflowed everywhere adds nothing, and not 0 times infinity.
    gaps = torch.where(probs > 0, logprobs - marginal, 0.0)
    return (probs * gaps).sum(dim=1).mean().exp().item()
