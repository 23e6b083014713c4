"""What a set of images is beside references, measured again and again."""

from pathlib import Path

import pytest
import torch

from argrpo.digits.dataset import load_split
from argrpo.digits.evaluation import evaluate_digits
from argrpo.digits.judges import DigitJudge, load_judge, save_judge
from argrpo.evaluation.features import load_extractor
from argrpo.evaluation.moment_files import save_moments
from argrpo.evaluation.moments import Moments, moments_of
from argrpo.evaluation.precision_recall import ball_radii, covered
from argrpo.evaluation.set_measures import SetMeasures

_CPU = torch.device("cpu")
_SPLIT = "dataset:digits/evaluation"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    save_judge(DigitJudge(width=2, feature_dim=8), folder)
    return folder


def measures_of(judge: Path, reference: str, neighbours: int = 3) -> SetMeasures:
    extractor = load_extractor("digits_judge", judge, device=_CPU)
    return SetMeasures(extractor, reference, neighbours=neighbours, device=_CPU)


def test_digits_are_measured_as_the_demo_measures_them(judge: Path) -> None:
    measures = measures_of(judge, _SPLIT)
    images = load_split("policy").images[:50]
    found = measures.measure(measures.features(images))
    labels = load_split("policy").labels[:50]
    wanted = evaluate_digits(images, labels, load_judge(judge), load_split("evaluation"))
    assert list(found) == measures.names
    assert measures.names == ["frechet", "precision", "recall", "density", "coverage"]
    assert (found["precision"], found["recall"]) == (wanted.precision, wanted.recall)
    # moments summed in parts, and about the first image
    assert found["frechet"] == pytest.approx(wanted.frechet, rel=1e-6)


def test_moments_without_images_give_the_same_distance_and_nothing_else(
    judge: Path, tmp_path: Path
) -> None:
    whole = measures_of(judge, _SPLIT)
    save_moments(moments_of(whole.features(load_split("evaluation").images)), tmp_path / "m.npz")
    measures = measures_of(judge, str(tmp_path / "m.npz"))
    features = torch.rand(20, 8)
    assert measures.names == ["frechet"]
    found = measures.measure(features)
    # one sum over all images against one in parts
    assert found["frechet"] == pytest.approx(whole.measure(features)["frechet"], rel=1e-6)


def test_no_neighbours_measure_no_precision_and_recall(judge: Path) -> None:
    assert list(measures_of(judge, _SPLIT, 0).measure(torch.rand(9, 8))) == ["frechet"]


def test_an_image_without_finite_features_is_left_out_and_said(
    judge: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measures = measures_of(judge, _SPLIT)
    features = torch.rand(9, 8)
    spoilt = torch.cat([features, torch.full((2, 8), torch.nan)])
    assert measures.measure(spoilt) == measures.measure(features)
    assert "expected finite features, got others of 2 images" in caplog.text


def test_too_few_finite_features_measure_nothing(judge: Path) -> None:
    measures = measures_of(judge, _SPLIT)
    found = measures.measure(torch.cat([torch.rand(3, 8), torch.full((4, 8), torch.inf)]))
    assert list(found) == measures.names
    assert all(value != value for value in found.values())


def test_moments_of_another_dimension_are_refused(judge: Path, tmp_path: Path) -> None:
    save_moments(moments_of(torch.rand(9, 5)), tmp_path / "m.npz")
    with pytest.raises(ValueError, match=r"expected moments of 8 features .* got 5 in .*m\.npz"):
        measures_of(judge, str(tmp_path / "m.npz"))


def test_moments_without_covariances_are_refused(judge: Path, tmp_path: Path) -> None:
    save_moments(Moments(torch.zeros(8), torch.ones(8), None), tmp_path / "m.npz")
    with pytest.raises(ValueError, match="expected moments with all covariances, got"):
        measures_of(judge, str(tmp_path / "m.npz"))


def test_fewer_references_than_neighbours_are_refused(judge: Path) -> None:
    with pytest.raises(ValueError, match=r"expected more than 400 images, .* got 377 in dataset"):
        measures_of(judge, _SPLIT, 400)


def test_a_reference_that_is_not_there_is_named(judge: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected an npz file or a folder of images"):
        measures_of(judge, "nowhere.npz")


def test_radii_worked_out_before_change_nothing() -> None:
    points, centres = torch.randn(40, 3), torch.randn(30, 3)
    near = covered(points, centres, k=2, radii=ball_radii(centres, k=2))
    assert torch.equal(near, covered(points, centres, k=2))
    assert 0 < near.sum() < 40
