"""Step maps and AR-GRPO's eight rewards against golden numbers of its code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo.advantages import combine_rewards
from argrpo.data import Prompt
from argrpo.rewards.quantize import EqualSteps, QuantizedReward, StepMap

GOLDEN = Path(__file__).parents[2] / "golden/reward_maps"
CASE = json.loads((GOLDEN / "case.json").read_text())
_MAPS = {"clip_hps_map": "clip_hps_map", "clip_hps_map_fp32": "clip_hps_map", "fid_map": "fid_map"}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def _golden_map(name: str) -> StepMap:
    config = CASE["config"][name]
    return StepMap(config["values"], config["rewards"])


@pytest.mark.parametrize("case", _MAPS)
def test_a_step_map_is_the_golden_one_at_and_around_its_bounds(
    case: str, tensors: dict[str, Tensor]
) -> None:
    scores, wanted = tensors[f"{case}.value"], tensors[f"{case}.reward"].float()
    # The reference gives a NaN of a distance its last value; here what is not known is not scored.
    wanted = wanted.masked_fill(scores.isnan(), torch.nan)
    values = _golden_map(_MAPS[case])(scores)
    torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)


def test_equal_steps_are_the_golden_ones(tensors: dict[str, Tensor]) -> None:
    config = CASE["config"]["reward_quantize"]
    steps = EqualSteps(
        config["num_bins"], config["min_v"], config["max_v"], config["min_q"], config["max_q"]
    )
    values = steps(tensors["reward_quantize.value"])
    torch.testing.assert_close(values.double(), tensors["reward_quantize.reward"], rtol=0, atol=0)


class _Raw:
    """Says what the golden case's judge said."""

    def __init__(self, name: str, scores: Tensor) -> None:
        self.name = name
        self._scores = scores

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        return self._scores.float()


def test_the_eight_rewards_of_ar_grpo_and_their_sum(tensors: dict[str, Tensor]) -> None:
    raw = {name: tensors[f"raw.{name}"].clone() for name in ("clip", "hps", "maniqa")}
    judged = {name: tensors[f"raw.{name}"].clone() for name in ("qwen", "fake", "weird")}
    for scores in judged.values():
        scores[CASE["config"]["judge_that_always_fails_at_sample"]] = torch.nan
    steps = _golden_map("clip_hps_map")
    clip, hps = _Raw("clip", raw["clip"]), _Raw("hpsv2", raw["hps"])
    judges = [clip, QuantizedReward(clip, steps, "q"), hps, QuantizedReward(hps, steps, "q")]
    judges += [_Raw(name, scores) for name, scores in ({"maniqa": raw["maniqa"]} | judged).items()]
    images, prompts = torch.rand(16, 3, 1, 1), [Prompt("a")] * 16
    scores = torch.stack([judge(images, prompts) for judge in judges], dim=1)
    weights = torch.tensor([5.0, 1.0, 5.0, 1.0, 2.0, 0.25, 0.25, 0.25])
    tolerance = CASE["tolerance"]["rewards_per_function, total"]
    near = {"rtol": tolerance["rtol"], "atol": tolerance["atol"]}
    each = (scores * weights).nan_to_num(0.0)
    torch.testing.assert_close(each, tensors["rewards_per_function"], **near)
    total = combine_rewards(scores, weights, missing="zero")
    torch.testing.assert_close(total, tensors["total"], **near)


def test_nan_stays_nan() -> None:
    scores = torch.tensor([torch.nan, 0.5])
    assert StepMap([0.0], [1.0, 2.0])(scores).isnan().tolist() == [True, False]
    assert EqualSteps(10)(scores).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("thresholds", "values", "message"),
    [
        ([], [1.0], "thresholds: expected rising"),
        ([1.0, 1.0], [1.0, 2.0], "thresholds: expected rising"),
        ([0.0, 1.0], [1.0], "values: expected 3 for 2 thresholds"),
        ([0.0], [1.0, 2.0, 3.0], "values: expected 2 for 1 thresholds"),
    ],
)
def test_a_map_that_is_none_is_refused(thresholds, values, message) -> None:
    with pytest.raises(ValueError, match=message):
        StepMap(thresholds, values)
