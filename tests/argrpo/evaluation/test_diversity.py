"""Distances between images of one prompt, by hand and one pair at a time."""

import itertools
import math

import torch

from argrpo.evaluation.diversity import distance_within, has_pairs, thumbnails


def test_it_is_the_mean_over_prompts_of_the_mean_over_pairs() -> None:
    features, groups = torch.randn(12, 5), torch.tensor([2, 0, 2, 1, 0, 2, 0, 2, 7, 0, 2, 1])
    means = []
    for prompt in (0, 1, 2):
        rows = features[groups == prompt].double()
        pairs = [math.dist(a, b) for a, b in itertools.combinations(rows, 2)]
        means.append(sum(pairs) / len(pairs))
    # sums in another order; prompt 7 has no pair
    assert math.isclose(distance_within(features, groups), sum(means) / 3, rel_tol=1e-12)


def test_one_picture_for_a_prompt_has_no_distance_whatever_the_others_are() -> None:
    features = torch.tensor([[0.0], [0.0], [9.0], [9.0]])
    assert distance_within(features, torch.tensor([0, 0, 1, 1])) == 0.0
    assert distance_within(features, torch.tensor([0, 1, 0, 1])) == 9.0


def test_without_a_pair_there_is_no_number() -> None:
    assert math.isnan(distance_within(torch.rand(3, 2), torch.tensor([0, 1, 2])))
    assert not has_pairs(torch.tensor([0, 1, 2]))
    assert has_pairs(torch.tensor([0, 1, 0]))


def test_rows_that_are_not_finite_are_left_out() -> None:
    features = torch.tensor([[0.0], [2.0], [torch.nan]])
    assert distance_within(features, torch.zeros(3, dtype=torch.int64)) == 2.0


def test_pixels_differ_by_their_root_mean_square() -> None:
    black, grey = torch.zeros(1, 3, 64, 48), torch.full((1, 3, 64, 48), 0.25)
    one, other = thumbnails(black), thumbnails(grey)
    assert one.shape == (1, 3 * 32 * 32)
    assert math.isclose((one - other).norm().item(), 0.25, rel_tol=1e-5)  # fp32 sums
    assert thumbnails(torch.rand(2, 3, 8, 8)).shape == (2, 192), "small images stay as they are"
