"""Distances of parts of a batch, on a small judge's features."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.digits.dataset import load_split
from argrpo.digits.judges import DigitJudge, load_judge, save_judge
from argrpo.evaluation.frechet import frechet_distance
from argrpo.rewards.fid_group import FidGroupReward
from argrpo.rewards.protocols import DistributionReward, Measuring

_REFERENCE = "dataset:digits/policy"


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    save_judge(DigitJudge(width=4, feature_dim=12), folder)
    return str(folder)


def _reward(judge: str, **options: object) -> FidGroupReward:
    device = torch.device("cpu")
    return FidGroupReward(_REFERENCE, judge, features="digits_judge", device=device, **options)


def _score(reward: FidGroupReward, images: Tensor) -> Tensor:
    return reward.score(images, [Prompt("a digit")] * len(images))


def test_all_images_of_a_part_get_the_value_of_its_distance(judge: str) -> None:
    images = load_split("evaluation").images[:24]
    features = load_judge(judge).features(images)
    references = load_judge(judge).features(load_split("policy").images)
    distances = [frechet_distance(part, references) for part in features.split(12)]
    raw = _score(_reward(judge, thresholds=[], values=[]), images)
    # one distance by two fp64 algorithms, rounded to fp32
    torch.testing.assert_close(
        raw, torch.tensor(distances).repeat_interleave(12), rtol=1e-5, atol=1e-7
    )
    between = sum(distances) / 2
    stepped = _reward(judge, thresholds=[between], values=[1.0, -1.0])
    wanted = [1.0 if distance < between else -1.0 for distance in distances for _ in range(12)]
    assert _score(stepped, images).tolist() == wanted
    assert stepped.metrics()["distance"] == pytest.approx(between, rel=1e-6)


def test_the_map_of_ar_grpo_is_the_default(judge: str, golden: Path) -> None:
    case = json.loads((golden / "reward_maps/case.json").read_text())["config"]["fid_map"]
    defaults = inspect.signature(FidGroupReward).parameters
    assert list(defaults["thresholds"].default) == case["values"]
    assert list(defaults["values"].default) == case["rewards"]
    # Untrained features are small, and so is the distance: below 2, but above 0.
    assert _score(_reward(judge, groups=1), torch.rand(6, 3, 32, 32)).tolist() == [2.0] * 6


def test_it_is_a_distribution_reward_without_a_state(judge: str) -> None:
    reward = _reward(judge)
    assert isinstance(reward, DistributionReward)
    assert isinstance(reward, Measuring)
    assert reward.state_dict() == {}
    reward.update()


def test_images_that_cannot_be_judged_are_not_scored(judge: str) -> None:
    images = torch.rand(6, 3, 32, 32)
    images[0] = torch.nan
    images[3:5] = torch.nan
    scores = _score(_reward(judge), images)
    assert scores.isnan().tolist() == [True, False, False, True, True, True]
    known = _score(_reward(judge, groups=1), images[1:3])
    assert torch.equal(scores[1:3], known)


def test_parts_of_unequal_size_are_refused(judge: str) -> None:
    with pytest.raises(ValueError, match="groups: expected a divisor of the 5 images"):
        _score(_reward(judge), torch.rand(5, 3, 32, 32))
    with pytest.raises(ValueError, match="groups: expected at least 1, got 0"):
        _reward(judge, groups=0)
