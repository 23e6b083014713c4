"""Loss metrics: their names, what they count, and that merging equals one batch.

tests/argrpo/test_objectives.py ties the same numbers to the golden case.
"""

import pytest
import torch
from torch import Tensor

from argrpo.loss_metrics import LossMetrics, TokenTerms, measure

RATIO = torch.tensor([[0.5, 1.0, 1.0, 0.7], [1.0, 1.5, 1.3, 1.9], [1.0, 1.1, 1.0, 0.1]])
LOW = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]).float()
HIGH = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).float()


def metrics(rows: slice, mask: Tensor | None = None) -> LossMetrics:
    terms = TokenTerms(RATIO[rows], LOW[rows], HIGH[rows], kl=RATIO[rows] * 2, entropies=None)
    return measure(torch.tensor(0.25), terms, None if mask is None else mask[rows])


def test_shares_are_over_tokens_and_their_extremes_over_images() -> None:
    named = metrics(slice(0, 3)).named()
    assert named == pytest.approx(
        {
            "loss": 0.25,
            "ratio_mean": RATIO.mean().item(),
            "ratio_max_abs_dev": 0.9,
            "clip_ratio/low_mean": 3 / 12,
            "clip_ratio/low_min": 0.0,
            "clip_ratio/high_mean": 3 / 12,
            "clip_ratio/high_max": 3 / 4,
            "clip_ratio/region_mean": 6 / 12,
            "kl": 2 * RATIO.mean().item(),
        },
        rel=1e-6,  # the ratios are fp32
    )


def test_images_without_a_token_change_no_extreme() -> None:
    mask = torch.tensor([[True] * 4, [False] * 4, [True, True, True, False]])
    named = metrics(slice(0, 3), mask).named()
    assert named["clip_ratio/low_min"] == 0.0
    assert named["clip_ratio/high_max"] == 0.0
    assert named["clip_ratio/low_mean"] == pytest.approx(2 / 7)
    assert named["ratio_max_abs_dev"] == pytest.approx(0.5)
    assert metrics(slice(0, 2), mask).named()["clip_ratio/low_min"] == 0.5


def test_merged_micro_batches_are_the_whole_batch() -> None:
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    parts = [metrics(slice(i, i + 1), mask) for i in range(3)]
    merged = parts[0].merged(parts[1]).merged(parts[2]).named()
    assert merged.pop("loss") == 0.75, "losses of micro-batches add up"
    whole = metrics(slice(0, 3), mask).named()
    whole.pop("loss")
    assert merged == pytest.approx(whole, rel=1e-12)  # fp64 sums in another order


def test_a_batch_without_a_token_says_zero_and_never_nan() -> None:
    named = metrics(slice(0, 3), torch.zeros(3, 4).bool()).named()
    assert named.pop("loss") == 0.25
    assert set(named.values()) == {0.0}


def test_entropies_go_by_the_name_they_are_given() -> None:
    terms = TokenTerms(RATIO, LOW, HIGH, kl=None, entropies=torch.full_like(RATIO, 1.5))
    measured = measure(torch.tensor(0.0), terms, None)
    assert measured.named(entropy_name="entropy/tempered")["entropy/tempered"] == 1.5
    assert "kl" not in measured.named()
