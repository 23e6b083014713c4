"""Conditions: text features are checked at birth, shared by index, and each computed once."""

import pytest
import torch

from argrpo.engine.conditions import TextFeatures, distinct, num_images, select

FEATURES = torch.arange(3.0 * 4 * 2).view(3, 4, 2)
MASK = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("features", "mask", "index", "message"),
    [
        (FEATURES[0], MASK, None, r"features: expected a floating \[P, L, C\] tensor, got .* \[4"),
        (FEATURES.long(), MASK, None, "features: expected a floating .* got torch.int64"),
        (FEATURES, MASK[:, :3], None, r"mask: expected shape \[3, 4\], got \[3, 3\]"),
        (FEATURES, MASK * 0, None, "mask: expected at least one valid position"),
        (FEATURES, MASK, torch.zeros(2), r"index: expected an int64 \[N\] tensor, got torch.float"),
        (FEATURES, MASK, torch.zeros(2, 1, dtype=torch.int64), r"index: expected .* \[2, 1\]"),
        (FEATURES, MASK, torch.tensor([0, 3]), r"index: expected 0 to 2, got 3"),
        (FEATURES, MASK, torch.tensor([-1]), r"index: expected 0 to 2, got -1"),
    ],
)
def test_wrong_text_features_are_refused_by_name(
    features: torch.Tensor, mask: torch.Tensor, index: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TextFeatures(features, mask, index)


def test_prompts_are_shared_by_index() -> None:
    shared = TextFeatures(FEATURES, MASK, torch.tensor([2, 0, 2, 2]))
    assert num_images(shared) == 4
    assert num_images(TextFeatures(FEATURES, MASK)) == 3
    some = select(shared, torch.tensor([3, 1]))
    assert isinstance(some, TextFeatures)
    assert some.features is shared.features, "selecting rows copies no features"
    assert some.rows.tolist() == [2, 0]


def test_each_condition_is_kept_once() -> None:
    labels = distinct(torch.tensor([7, 3, 7, 7]))
    assert isinstance(labels.conditions, torch.Tensor)
    assert labels.conditions[labels.index].tolist() == [7, 3, 7, 7]
    assert len(labels.conditions) == 2
    text = distinct(TextFeatures(FEATURES, MASK, torch.tensor([2, 0, 2, 2])))
    assert isinstance(text.conditions, TextFeatures)
    assert torch.equal(text.conditions.features[text.index], FEATURES[[2, 0, 2, 2]])
    assert torch.equal(text.conditions.mask[text.index], MASK[[2, 0, 2, 2]])
    assert num_images(text.conditions) == 2
