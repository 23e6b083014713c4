"""What a set of images is beside references, measured again and again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from argrpo.digits.dataset import load_split
from argrpo.digits.evaluation import evaluate_digits
from argrpo.digits.judges import DigitJudge, load_judge, save_judge
from argrpo.evaluation.features import Views, load_extractor
from argrpo.evaluation.frechet import frechet_distance
from argrpo.evaluation.moment_files import save_moments
from argrpo.evaluation.moments import Moments, moments_of
from argrpo.evaluation.precision_recall import ball_radii, covered, neighbourhoods
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


def adm_file(path: Path, judge: Path, **changed: object) -> str:
    """Moments of all images of a split, and some of the images, as ADM's references."""
    images = load_split("evaluation").images
    features = load_judge(judge).features(images)
    moments = moments_of(features)
    levels = (255.0 * images[::3]).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    entries = {"mu": moments.mean.numpy(), "sigma": moments.cov.numpy(), "arr_0": levels}
    np.savez(path, **{**entries, **changed})
    return str(path)


def test_a_file_of_moments_and_images_gives_distance_by_the_one_and_recall_by_the_other(
    judge: Path, tmp_path: Path
) -> None:
    measures = measures_of(judge, adm_file(tmp_path / "adm.npz", judge))
    features = measures.features(load_split("policy").images[:60])
    found = measures.measure(features)
    whole = measures_of(judge, _SPLIT).measure(features)
    # sums in another order
    assert found["frechet"] == pytest.approx(whole["frechet"], rel=1e-6)
    levels = (255.0 * load_split("evaluation").images[::3]).round() / 255.0
    near = neighbourhoods(features, measures.features(levels))
    # references of one batch against batches of 64
    assert found["recall"] == pytest.approx(near.recall, abs=1e-9)
    assert found["coverage"] == pytest.approx(near.coverage, abs=1e-9)


def test_a_file_whose_moments_are_not_of_its_own_images_is_refused(
    judge: Path, tmp_path: Path
) -> None:
    mean = load_judge(judge).features(load_split("evaluation").images).double().mean(dim=0)
    other = adm_file(tmp_path / "adm.npz", judge, mu=(mean + 1.0).numpy())
    with pytest.raises(ValueError, match="made by another network or preprocessing"):
        measures_of(judge, other)


def test_statistics_that_say_they_are_inceptions_are_refused_for_another_network(
    judge: Path, tmp_path: Path
) -> None:
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    adm = adm_file(tmp_path / "adm.npz", judge, **spatial)
    with pytest.raises(
        ValueError, match=r"features by digits_judge-.*, got those of inception_fid"
    ):
        measures_of(judge, adm)


def test_sfid_is_a_distance_to_the_spatial_moments(judge: Path, tmp_path: Path) -> None:
    real, drawn = torch.randn(50, 3), torch.randn(40, 3) + 0.5
    moments = moments_of(real)
    spatial = {"mu_s": moments.mean.numpy(), "sigma_s": moments.cov.numpy()}
    adm = adm_file(tmp_path / "adm.npz", judge, **spatial)

    class NamedInception:
        """A judge under the network's name, because the network takes seconds an image."""

        name, dim = "inception_fid-0", 8

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return load_judge(judge).features(images)

        def views(self, images: torch.Tensor) -> Views:
            return Views(self(images))

    measures = SetMeasures(NamedInception(), adm, spatial=True, device=_CPU)
    wanted = frechet_distance(drawn, real)
    assert measures.spatial_frechet(drawn) == pytest.approx(wanted, rel=1e-9)
    assert measures_of(judge, _SPLIT).spatial_frechet(drawn) is None


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
