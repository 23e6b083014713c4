"""How good generated digits are, by a judge that was never a reward and pictures never learned.

Accuracy says whether an image shows what was asked for, precision whether it looks like a real
one, recall whether the real ones' variety is still there. A policy that draws one perfect picture a
class has accuracy 1 and recall near 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from argrpo.digits.dataset import NUM_CLASSES, DigitSet
from argrpo.digits.judges import DigitJudge
from argrpo.evaluation.frechet import frechet_distance
from argrpo.evaluation.precision_recall import covered


@dataclass(frozen=True, slots=True)
class DigitsScores:
    """One set of generated digits, measured."""

    accuracy: float
    """Share of the images in which the judge sees the digit asked for."""

    precision: float
    """Share of the images among the references' neighbourhoods, in the judge's features."""

    recall: float
    """Share of the references among the images' neighbourhoods."""

    frechet: float
    """Frechet distance to the references in the judge's features; only compares like counts."""

    per_class_accuracy: tuple[float, ...]
    """Accuracy by the class asked for; NaN where none was."""

    per_class_recall: tuple[float, ...]
    """Recall of the references of each class, by neighbourhoods of all images."""


def evaluate_digits(
    images: Tensor, labels: Tensor, judge: DigitJudge, references: DigitSet, *, k: int = 3
) -> DigitsScores:
    """Measure generated digits.

    Args:
        images: [N, 3, 32, 32] floating point in [0, 1], N > k.
        labels: [N] int64, the class that each image was asked to show.
        judge: the held-out judge.
        references: real digits of all classes, the evaluation split.
        k: neighbours of precision and recall.

    Raises:
        ValueError: the counts differ or are too small.
    """
    if labels.shape != (len(images),):
        raise ValueError(f"labels: expected [{len(images)}], got {list(labels.shape)}")
    images, labels = images.cpu(), labels.cpu()
    correct = judge.predict(images) == labels
    generated, real = judge.features(images), judge.features(references.images)
    frechet = frechet_distance(generated, real)
    is_recalled = covered(real, generated, k=k)
    return DigitsScores(
        accuracy=correct.double().mean().item(),
        precision=covered(generated, real, k=k).double().mean().item(),
        recall=is_recalled.double().mean().item(),
        frechet=frechet,
        per_class_accuracy=_by_class(correct, labels),
        per_class_recall=_by_class(is_recalled, references.labels),
    )


def _by_class(hits: Tensor, labels: Tensor) -> tuple[float, ...]:
    shares = [hits[labels == digit].double().mean() for digit in range(NUM_CLASSES)]
    return tuple(torch.stack(shares).tolist())
