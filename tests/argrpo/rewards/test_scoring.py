"""From the judges of a config to advantages: both kinds together."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from argrpo.advantages import group_advantages, normalise_then_sum
from argrpo.config import (
    AdvantageConfig,
    PolicyConfig,
    RewardConfig,
    TokenizerConfig,
    TrainConfig,
)
from argrpo.data import Prompt
from argrpo.learner_config import ParityConfig
from argrpo.rewards.scoring import Judges, Scores

_CPU = torch.device("cpu")
_PROMPTS = [Prompt("a")] * 8


def brightness(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def redness(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2))


class Rarity:
    """The least a distribution reward can be: how far from the mean of all, and of steps before."""

    name = "rarity"

    def __init__(self) -> None:
        self.past = torch.zeros(())
        self._last = torch.zeros(())
        self.calls = 0

    def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        self.calls += 1
        means = images.mean(dim=(1, 2, 3))
        self._last = means.mean()
        scores = (means - (self._last + self.past) / 2).abs()
        return scores.masked_fill(means < 0, torch.nan)

    def update(self) -> None:
        self.past = self._last

    def state_dict(self) -> dict[str, Tensor]:
        return {"past": self.past}


class MeasuredRarity(Rarity):
    name = "measured_rarity"

    def metrics(self) -> dict[str, float]:
        return {"distance": 7.0}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.past = state["past"]


def _judges(
    *names: str, weights: list[float] | None = None, aggregation: str = "sum_then_normalize",
    monitors: list[str] | None = None, missing: str = "drop", parity: ParityConfig | None = None,
) -> Judges:  # fmt: skip
    weights = weights or [1.0] * len(names)
    config = TrainConfig(
        output_dir="unused",
        policy=PolicyConfig(path="unused"),
        tokenizer=TokenizerConfig(path="unused"),
        rewards=[
            RewardConfig(name=f"{__name__}:{name}", weight=weight)
            for name, weight in zip(names, weights, strict=True)
        ],
        monitors=[RewardConfig(name=f"{__name__}:{name}") for name in monitors or []],
        advantage=AdvantageConfig(aggregation=aggregation, missing=missing),
        parity=parity or ParityConfig(),
    )
    return Judges(config, _CPU)


def _score(judges: Judges, images: Tensor) -> Scores:
    return judges.score(images, _PROMPTS, with_monitors=True)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, 4, 4)


def test_both_kinds_stand_beside_each_other(images: Tensor) -> None:
    scores = _score(_judges("brightness", "Rarity"), images)
    means = images.mean(dim=(1, 2, 3))
    assert torch.equal(scores.values[:, 0], means)
    torch.testing.assert_close(scores.values[:, 1], (means - means.mean() / 2).abs())
    assert scores.is_distribution.tolist() == [False, True]
    assert "rewards/rarity/mean" in scores.metrics()


def test_normalised_together_they_are_one_reward(images: Tensor) -> None:
    judges = _judges("brightness", "Rarity", weights=[1.0, 2.0])
    scores = _score(judges, images)
    wanted = group_advantages((scores.values[:, 0] + 2 * scores.values[:, 1]).view(2, 4))
    torch.testing.assert_close(scores.advantages(4).values, wanted.values)


def test_by_kind_single_image_judges_are_summed_first_and_the_distribution_is_weighed_last(
    images: Tensor,
) -> None:
    judges = _judges(
        "brightness", "Rarity", "redness",
        weights=[3.0, 2.0, 0.5], aggregation="normalize_kinds_then_sum",
    )  # fmt: skip
    scores = _score(judges, images)
    single = 3.0 * scores.values[:, 0] + 0.5 * scores.values[:, 2]
    columns = torch.stack([single, scores.values[:, 1]], dim=1).view(2, 4, 2)
    wanted = normalise_then_sum(columns, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(scores.advantages(4).values, wanted.values)
    # Each on its own scale: a unit of spread each, twice that for the distribution.
    other = _judges("brightness", "Rarity", "redness", aggregation="normalize_then_sum")
    apart = _score(other, images).advantages(4).values
    assert not torch.allclose(apart, wanted.values)


@pytest.mark.parametrize("names", [("Rarity",), ("Rarity", "brightness")])
def test_by_kind_a_kind_that_is_missing_or_weighs_nothing_is_left_out(
    images: Tensor, names: tuple[str, ...]
) -> None:
    judges = _judges(
        *names, weights=[2.0, 0.0][: len(names)], aggregation="normalize_kinds_then_sum"
    )
    scores = _score(judges, images)
    alone = group_advantages(scores.values[:, 0].view(2, 4))
    torch.testing.assert_close(scores.advantages(4).values, 2.0 * alone.values)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_kinds_then_sum"])
def test_an_image_that_one_kind_did_not_score_leaves_its_group(
    images: Tensor, aggregation: str
) -> None:
    images[5] = -1.0
    scores = _score(_judges("brightness", "Rarity", aggregation=aggregation), images)
    found = scores.advantages(4)
    assert not found.used[1, 1] and int(found.used.sum()) == 7
    assert found.values[1, 1] == 0 and found.values.isfinite().all()


def test_state_moves_at_update_and_not_with_the_score(images: Tensor) -> None:
    judges = _judges("brightness", "Rarity")
    first = _score(judges, images).values
    assert torch.equal(_score(judges, images).values, first)
    judges.update()
    assert not torch.equal(_score(judges, images).values[:, 1], first[:, 1])


def test_what_a_distribution_reward_measures_is_logged_under_its_name(images: Tensor) -> None:
    judges = _judges("MeasuredRarity", "brightness", monitors=["Rarity"])
    metrics = _score(judges, images).metrics()
    assert metrics["rewards/measured_rarity/distance"] == 7.0
    assert "monitors/rarity/mean" in metrics


def test_state_goes_into_a_dict_and_back_under_the_names_of_judges(images: Tensor) -> None:
    judges, other = _judges("MeasuredRarity"), _judges("MeasuredRarity")
    _score(judges, images)
    judges.update()
    state = judges.state_dict()
    assert list(state) == ["measured_rarity/past"]
    other.load_state_dict(state)
    assert torch.equal(_score(other, images).values, _score(judges, images).values)


def test_state_that_cannot_be_taken_up_is_named() -> None:
    with pytest.raises(ValueError, match=r"rewards\.measured_rarity: expected its state, got none"):
        _judges("MeasuredRarity").load_state_dict({})
    with pytest.raises(ValueError, match=r"rewards\.rarity: expected a method load_state_dict"):
        _judges("Rarity").load_state_dict({"rarity/past": torch.zeros(())})


@pytest.mark.parametrize("aggregation", ["normalize_then_sum", "normalize_kinds_then_sum"])
def test_a_released_weight_all_but_cancels(images: Tensor, aggregation: str) -> None:
    kept, cancelled, ones = (
        _score(
            _judges(
                "brightness", "Rarity", weights=weights, aggregation=aggregation,
                parity=ParityConfig(weights_before_normalization=is_released),
            ),
            images,
        ).advantages(4).components[..., 1]
        for weights, is_released in (([1.0, 25.0], False), ([1.0, 25.0], True), ([1.0, 1.0], False))
    )  # fmt: skip
    torch.testing.assert_close(kept, 25 * ones)
    # Up to the 1e-4 beside a spread of some hundredths.
    torch.testing.assert_close(cancelled, ones, rtol=2e-2, atol=1e-6)
    assert not torch.equal(cancelled, ones)


def test_a_missing_score_counts_as_zero_where_the_recipe_says_so(images: Tensor) -> None:
    images[3] = -1.0  # which Rarity does not score
    dropped, zero = (
        _score(_judges("brightness", "Rarity", missing=missing), images)
        for missing in ("drop", "zero")
    )
    assert dropped.advantages(4).used.flatten().tolist() == [True] * 3 + [False] + [True] * 4
    rewards = zero.values[:, 0] + zero.values[:, 1].nan_to_num(nan=0.0)
    wanted = group_advantages(rewards.view(2, 4))
    assert zero.advantages(4).used.all()
    torch.testing.assert_close(zero.advantages(4).values, wanted.values)


def test_a_missing_score_cannot_count_as_zero_where_it_would_be_normalised() -> None:
    with pytest.raises(ValueError, match=r"advantage\.missing: expected drop with aggregation nor"):
        AdvantageConfig(aggregation="normalize_kinds_then_sum", missing="zero")


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_the_judge_it_belongs_to(weight: float) -> None:
    with pytest.raises(ValueError, match=r"rewards\.clip\.weight: expected finite, got"):
        RewardConfig(name="clip", weight=weight)


def test_the_files_of_this_package_are_found_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rewards\.loo_fid\.options: expected reference, got"):
        Judges(
            TrainConfig(
                output_dir="unused",
                policy=PolicyConfig(path="unused"),
                tokenizer=TokenizerConfig(path="unused"),
                rewards=[RewardConfig(name="loo_fid", options={"features_path": str(tmp_path)})],
            ),
            _CPU,
        )
