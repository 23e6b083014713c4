"""Scores of generated digits, and the Frechet distance under them."""

import pytest
import torch

from argrpo.digits.dataset import DigitSet, load_split
from argrpo.digits.evaluation import evaluate_digits
from argrpo.digits.judges import DigitJudge, JudgeConfig, train_judge
from argrpo.digits.training import FitConfig
from argrpo.evaluation.frechet import frechet_distance


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return train_judge(JudgeConfig(split="heldout_judge", fit=FitConfig(steps=120, seed=2)))


@pytest.fixture(scope="module")
def references() -> DigitSet:
    return load_split("evaluation")


def test_real_digits_score_high_and_near(judge: DigitJudge, references: DigitSet) -> None:
    real = load_split("policy")
    scores = evaluate_digits(real.images, real.labels, judge, references)
    # Measured 0.96, 0.92 and 0.93 with a judge of a fifth of the recipe's steps.
    assert min(scores.accuracy, scores.precision, scores.recall) > 0.8
    assert len(scores.per_class_accuracy) == len(scores.per_class_recall) == 10
    noise = torch.rand(real.images.shape, generator=torch.Generator().manual_seed(0))
    worse = evaluate_digits(noise, real.labels, judge, references)
    assert worse.accuracy < 0.3
    assert worse.recall < 0.1
    assert worse.frechet > 10 * scores.frechet


def test_the_references_themselves_are_perfect(judge: DigitJudge, references: DigitSet) -> None:
    scores = evaluate_digits(references.images, references.labels, judge, references)
    assert scores.precision == scores.recall == 1.0
    # Differences of fp64 sums of some thousands; real distances are above 0.1.
    assert scores.frechet == pytest.approx(0.0, abs=1e-6)


def test_a_lost_class_shows_in_its_recall_alone(judge: DigitJudge, references: DigitSet) -> None:
    real = load_split("policy")
    kept = real.labels != 4
    scores = evaluate_digits(real.images[kept], real.labels[kept], judge, references)
    others = [recall for digit, recall in enumerate(scores.per_class_recall) if digit != 4]
    assert scores.per_class_recall[4] < 0.5 < min(others)
    assert torch.tensor(scores.per_class_accuracy).isnan().tolist() == [d == 4 for d in range(10)]


def test_one_picture_a_class_has_accuracy_without_recall(
    judge: DigitJudge, references: DigitSet
) -> None:
    first = [int((references.labels == digit).nonzero()[0]) for digit in range(10)]
    images = references.images[first].repeat(20, 1, 1, 1)
    labels = judge.predict(references.images[first]).repeat(20)
    scores = evaluate_digits(images, labels, judge, references)
    assert scores.accuracy == 1.0
    assert scores.recall < 0.1


def test_accuracy_is_the_mean_over_classes_asked_for(
    judge: DigitJudge, references: DigitSet
) -> None:
    labels = torch.zeros_like(references.labels)
    scores = evaluate_digits(references.images, labels, judge, references)
    assert scores.accuracy == scores.per_class_accuracy[0]
    assert scores.accuracy == pytest.approx(0.1, abs=0.03)  # a tenth are zeros


def test_wrong_counts_are_refused_by_name(judge: DigitJudge, references: DigitSet) -> None:
    with pytest.raises(ValueError, match=r"labels: expected \[377\], got \[376\]"):
        evaluate_digits(references.images, references.labels[:376], judge, references)


def test_frechet_of_normals_is_known_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((500, 6), generator=generator, dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 3.0], dtype=torch.float64)
    # A shift leaves the covariance: the distance is its squared length.
    assert frechet_distance(features + shift, features) == pytest.approx(shift.square().sum())
    # Twice the features about their mean: tr(4 C + C - 2 * 2 C) = tr(C).
    centred = features - features.mean(dim=0)
    assert frechet_distance(2 * centred, centred) == pytest.approx(centred.T.cov().trace().item())


def test_frechet_of_rotated_covariances_matches_the_matrix_square_root() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (
        torch.randn((80, 5), generator=generator, dtype=torch.float64)
        @ torch.randn((5, 5), generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    product = first.T.cov() @ second.T.cov()
    # The product of two covariances has positive eigenvalues, whose roots are its root's.
    overlap = torch.linalg.eigvals(product).real.clamp_min(0).sqrt().sum()
    gap = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    expected = gap + first.T.cov().trace() + second.T.cov().trace() - 2 * overlap
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_takes_fewer_images_than_features() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn((5, 40), generator=generator)
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(features + 1, features) == pytest.approx(40.0, rel=1e-6)


def test_wrong_features_are_refused_by_name() -> None:
    good = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"generated: expected \[N, C\] with N >= 2"):
        frechet_distance(good[:1], good)
    with pytest.raises(ValueError, match="references: expected finite features"):
        frechet_distance(good, good + torch.inf)
    with pytest.raises(ValueError, match="generated: expected 3 features a row"):
        frechet_distance(good[:, :2], good)
