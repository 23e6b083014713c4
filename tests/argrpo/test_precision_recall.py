"""Nearest-neighbour precision and recall: by hand, against scikit-learn, and at its borders."""

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from argrpo.evaluation.precision_recall import covered, precision_recall


def blob(num: int, centre: float, seed: int, width: int = 5) -> Tensor:
    return torch.randn((num, width), generator=torch.Generator().manual_seed(seed)) + centre


def test_a_set_against_itself_is_perfect() -> None:
    features = blob(50, 0.0, 0)
    assert precision_recall(features, features) == (1.0, 1.0)


def test_sets_far_apart_share_nothing() -> None:
    assert precision_recall(blob(50, 0.0, 0), blob(40, 100.0, 1)) == (0.0, 0.0)


def test_a_missing_mode_costs_recall_and_not_precision() -> None:
    references = torch.cat([blob(100, 0.0, 0), blob(100, 50.0, 1)])
    scores = precision_recall(references[:100] + 1e-9, references)
    assert scores == (1.0, 0.5)


def test_an_invented_mode_costs_precision_and_not_recall() -> None:
    references = blob(100, 0.0, 0)
    scores = precision_recall(torch.cat([references, blob(300, 50.0, 1)]), references)
    assert scores == (0.25, 1.0)


def test_balls_on_a_line_are_as_computed_by_hand() -> None:
    centres = torch.tensor([[0.0], [1.0], [3.0]])
    # Radii to the nearest other centre: 1, 1 and 2; the balls cover [-1, 2] and [1, 5].
    points = torch.tensor([[-1.1], [-1.0], [2.0], [5.0], [5.1]])
    assert covered(points, centres, k=1).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_it_agrees_with_scikit_learns_neighbours(k: int) -> None:
    generated, references = blob(90, 0.3, 2), blob(70, 0.0, 3)

    def share(points: Tensor, centres: Tensor) -> float:
        neighbours = NearestNeighbors(n_neighbors=k + 1).fit(centres.double().numpy())
        radii = neighbours.kneighbors()[0][:, k - 1]  # without arguments: itself is left out
        distances = torch.cdist(points.double(), centres.double())
        return (distances <= torch.from_numpy(radii)).any(dim=1).double().mean().item()

    scores = precision_recall(generated, references, k=k)
    assert scores.precision == share(generated, references)
    assert scores.recall == share(references, generated)
    assert 0.0 < scores.recall < 1.0, "the sets overlap in part, so the comparison says something"


def test_more_rows_than_one_block_change_nothing() -> None:
    points, centres = blob(2500, 0.5, 4), blob(1100, 0.0, 5)
    pieces = torch.cat([covered(piece, centres) for piece in points.split(300)])
    assert torch.equal(covered(points, centres), pieces)


def test_wrong_features_are_refused_by_name() -> None:
    good = blob(10, 0.0, 0)
    with pytest.raises(ValueError, match=r"generated: expected at least k \+ 1 = 4 features"):
        precision_recall(good[:3], good)
    with pytest.raises(ValueError, match=r"references: expected \[N, C\] floating point"):
        precision_recall(good, good[0])
    with pytest.raises(ValueError, match="references: expected finite features"):
        precision_recall(good, good * torch.nan)
    with pytest.raises(ValueError, match="generated: expected 5 features a row"):
        precision_recall(good[:, :4], good)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        precision_recall(good, good, k=0)
