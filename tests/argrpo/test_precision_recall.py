"""Precision, recall, density and coverage: by hand, against definitions, and at their borders."""

import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from argrpo.evaluation.precision_recall import covered, neighbourhoods


def blob(num: int, centre: float, seed: int, width: int = 5) -> Tensor:
    return torch.randn((num, width), generator=torch.Generator().manual_seed(seed)) + centre


def test_a_set_against_itself_is_perfect() -> None:
    features = blob(50, 0.0, 0)
    found = neighbourhoods(features, features)
    assert (found.precision, found.recall, found.coverage) == (1.0, 1.0, 1.0)
    # k others and the centre itself, seen from the ball's side
    assert found.density == pytest.approx(4 / 3, abs=1e-12)


def test_sets_far_apart_share_nothing() -> None:
    assert neighbourhoods(blob(50, 0.0, 0), blob(40, 100.0, 1)) == (0.0, 0.0, 0.0, 0.0)


def test_a_missing_mode_costs_recall_and_not_precision() -> None:
    references = torch.cat([blob(100, 0.0, 0), blob(100, 50.0, 1)])
    scores = neighbourhoods(references[:100] + 1e-9, references)
    assert (scores.precision, scores.recall, scores.coverage) == (1.0, 0.5, 0.5)


def test_an_invented_mode_costs_precision_and_not_recall() -> None:
    references = blob(100, 0.0, 0)
    scores = neighbourhoods(torch.cat([references, blob(300, 50.0, 1)]), references)
    assert (scores.precision, scores.recall, scores.coverage) == (0.25, 1.0, 1.0)


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

    scores = neighbourhoods(generated, references, k=k)
    assert scores.precision == share(generated, references)
    assert scores.recall == share(references, generated)
    assert 0.0 < scores.recall < 1.0, "the sets overlap in part, so the comparison says something"


@pytest.mark.parametrize("k", [1, 4])
def test_all_four_are_their_definitions_point_by_point(k: int) -> None:
    # Equations 1 and 2 of Kynkaanniemi et al., 4 and 5 of Naeem et al., one pair at a time.
    generated, references = blob(23, 0.8, 6).double(), blob(19, 0.0, 7).double()

    def radius(centres: Tensor, place: int) -> float:
        others = [math.dist(centres[place], centres[i]) for i in range(len(centres)) if i != place]
        return sorted(others)[k - 1]

    real = [radius(references, i) for i in range(len(references))]
    drawn = [radius(generated, j) for j in range(len(generated))]
    pairs = [[math.dist(r, g) for g in generated] for r in references]
    inside = [[pairs[i][j] <= real[i] for j in range(23)] for i in range(19)]
    found = neighbourhoods(generated, references, k=k)
    assert found.precision == sum(any(row[j] for row in inside) for j in range(23)) / 23
    recalled = [any(pairs[i][j] <= drawn[j] for j in range(23)) for i in range(19)]
    assert found.recall == sum(recalled) / 19
    # one division against another
    assert found.density == pytest.approx(sum(map(sum, inside)) / (23 * k), rel=1e-12)
    assert found.coverage == sum(any(row) for row in inside) / 19
    assert 0.0 < found.coverage < 1.0, "the sets overlap in part, so the comparison says something"


def test_copies_lie_in_balls_of_no_radius_far_from_the_origin() -> None:
    # Four copies of each feature: the third neighbour is at distance 0.
    references = (blob(30, 1000.0, 8, width=200)).repeat(4, 1)
    found = neighbourhoods(references[:30].clone(), references)
    assert (found.precision, found.coverage) == (1.0, 1.0)
    assert neighbourhoods(references + 1e-2, references).precision == 0.0


def test_more_rows_than_one_block_change_nothing() -> None:
    points, centres = blob(2500, 0.5, 4), blob(1100, 0.0, 5)
    pieces = torch.cat([covered(piece, centres) for piece in points.split(300)])
    assert torch.equal(covered(points, centres), pieces)


def test_wrong_features_are_refused_by_name() -> None:
    good = blob(10, 0.0, 0)
    with pytest.raises(ValueError, match=r"generated: expected at least k \+ 1 = 4 features"):
        neighbourhoods(good[:3], good)
    with pytest.raises(ValueError, match=r"references: expected \[N, C\] floating point"):
        neighbourhoods(good, good[0])
    with pytest.raises(ValueError, match="references: expected finite features"):
        neighbourhoods(good, good * torch.nan)
    with pytest.raises(ValueError, match="generated: expected 5 features a row"):
        neighbourhoods(good[:, :4], good)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        neighbourhoods(good, good, k=0)
