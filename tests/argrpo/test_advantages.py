"""Advantages: golden numbers of both recipes, missing scores, groups that teach nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo.advantages import combine_rewards, group_advantages, normalise_then_sum

GOLDEN = Path(__file__).parents[1] / "golden/advantages"
CASE = json.loads((GOLDEN / "case.json").read_text())
# From the golden case. fp32: dividing by std + 1e-4 multiplies the reference's fp32 rounding of the
# mean; where the std is near 0 that is up to 1e4 times.
TOLERANCES = CASE["tolerance"]
NEAR_ZERO_STD: dict[str, Any] = {
    "rtol": 0.0,
    "atol": TOLERANCES["zero_std prompts in fp32"]["atol"],
}
NAN = float("nan")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def tolerance(name: str) -> dict[str, Any]:
    return {"rtol": TOLERANCES[name]["rtol"], "atol": TOLERANCES[name]["atol"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", ["plain", "with_nan", "zero_std"])
def test_summed_rewards_and_their_advantages_are_the_golden_ones(
    case: str, dtype: torch.dtype, tensors: dict[str, Tensor]
) -> None:
    scores = tensors[f"{case}.rewards_per_function"].to(dtype)
    num_prompts, group_size, _ = scores.shape
    summed = combine_rewards(scores.flatten(0, 1), tensors["weights"], missing="zero")
    rewards = summed.view(num_prompts, group_size)
    torch.testing.assert_close(
        rewards.float(), tensors[f"{case}.summed_rewards"], **tolerance("fp32")
    )
    wide = dtype == torch.float64
    suffix = "_fp64" if wide else ""
    scaled = NEAR_ZERO_STD if case == "zero_std" else tolerance("fp32")
    torch.testing.assert_close(
        group_advantages(rewards).values,
        tensors[f"{case}.advantages{suffix}"],
        **tolerance("fp64") if wide else scaled,
    )
    torch.testing.assert_close(
        group_advantages(rewards, scale="none").values,
        tensors[f"{case}.advantages_unscaled{suffix}"],
        **tolerance("fp64" if wide else "fp32"),
    )
    is_zero = tensors[f"{case}.group_std_is_zero"].double().mean().item()
    assert group_advantages(rewards).metrics()["frac_reward_zero_std"] == pytest.approx(is_zero)


@pytest.mark.parametrize("weight", [1, 25])
def test_a_component_normalised_on_its_own_is_the_golden_one(
    weight: int, tensors: dict[str, Tensor]
) -> None:
    reward = tensors["separate.reward_fid"].double()
    torch.testing.assert_close(
        group_advantages(weight * reward).values,
        tensors[f"separate.adv_fid_w{weight}_fp64"],
        **tolerance("fp64"),
    )


def test_a_released_weight_before_normalisation_all_but_cancels(
    tensors: dict[str, Tensor],
) -> None:
    scores = torch.stack([tensors[f"separate.reward_{n}"] for n in ("comp", "fid")], dim=2).double()
    got = normalise_then_sum(scores, torch.tensor([1.0, 25.0]), weigh_first=True)
    comp, fid = (tensors[f"separate.adv_{n}_fp64"] for n in ("comp", "fid_w25"))
    torch.testing.assert_close(got.values, comp + fid, **tolerance("fp64"))
    torch.testing.assert_close(got.components[..., 1], fid, **tolerance("fp64"))


def test_weights_apply_after_each_reward_is_normalised(tensors: dict[str, Tensor]) -> None:
    scores = torch.stack([tensors[f"separate.reward_{n}"] for n in ("comp", "fid")], dim=2).double()
    got = normalise_then_sum(scores, torch.tensor([1.0, 25.0]))
    comp, fid = (tensors[f"separate.adv_{n}_fp64"] for n in ("comp", "fid_w1"))
    torch.testing.assert_close(got.values, comp + 25 * fid, rtol=1e-10, atol=25e-10)
    assert got.group_std.shape == (len(scores), 2)


def test_an_image_without_a_weighted_score_is_not_scored() -> None:
    scores = torch.tensor([[1.0, 2.0], [NAN, 2.0], [1.0, NAN], [NAN, NAN]])
    weights = torch.tensor([1.0, 0.5])
    torch.testing.assert_close(
        combine_rewards(scores, weights), torch.tensor([2.0, NAN, NAN, NAN]), equal_nan=True
    )
    assert combine_rewards(scores, weights, missing="zero").tolist() == [2.0, 1.0, 1.0, 0.0]


def test_nobody_misses_a_judge_of_weight_0() -> None:
    scores = torch.tensor([[1.0, NAN], [3.0, 5.0]])
    weights = torch.tensor([2.0, 0.0])
    assert combine_rewards(scores, weights).tolist() == [2.0, 6.0]
    alone = normalise_then_sum(scores[None], weights)
    assert alone.used.all()
    assert torch.equal(alone.values, 2 * group_advantages(scores[None, :, 0]).values)


def test_an_image_that_is_not_scored_leaves_its_group() -> None:
    rewards = torch.tensor([[1.0, NAN, 2.0, 6.0], [NAN, 3.0, 4.0, 8.0]])
    got = group_advantages(rewards)
    assert got.used.tolist() == [[True, False, True, True], [False, True, True, True]]
    assert torch.equal(got.values[~got.used], torch.zeros(2))
    for row, kept in zip(range(2), got.used, strict=True):
        alone = group_advantages(rewards[row : row + 1, kept])
        assert torch.equal(got.values[row, kept], alone.values[0])
        assert torch.equal(got.group_std[row], alone.group_std[0])


def test_rewards_that_are_normalised_apart_lose_an_image_together() -> None:
    scores = torch.randn(2, 5, 3)
    scores[1, 2, 1] = NAN
    got = normalise_then_sum(scores, torch.tensor([1.0, 2.0, 3.0]))
    kept = torch.tensor([True, True, False, True, True])
    want = normalise_then_sum(scores[1:, kept], torch.tensor([1.0, 2.0, 3.0]))
    assert got.used.tolist() == [[True] * 5, kept.tolist()]
    assert torch.equal(got.values[1, kept], want.values[0])
    assert got.values[1, 2] == 0


@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_group_with_fewer_than_two_scores_has_no_say(scale: Any) -> None:
    rewards = torch.tensor([[NAN, 5.0, NAN], [NAN, NAN, NAN], [1.0, NAN, 3.0]])
    got = group_advantages(rewards, scale=scale)
    assert torch.equal(got.values[:2], torch.zeros(2, 3))
    assert not got.used[:2].any()
    assert got.values[2, 2] > 0 > got.values[2, 0]
    assert got.group_std.flatten().tolist() == pytest.approx([0, 0, 2**0.5])


@pytest.mark.parametrize("group_size", [2, 3, 7, 24])
def test_equal_rewards_give_exactly_zero(group_size: int) -> None:
    # In fp32 the mean of seven 0.1 is not 0.1.
    rewards = torch.tensor([0.1, 1 / 3, -7.7, 1e6])[:, None].expand(-1, group_size)
    got = group_advantages(rewards)
    assert torch.equal(got.values, torch.zeros(4, group_size))
    assert got.metrics() == {"reward_std": 0.0, "frac_reward_zero_std": 1.0}
    assert got.used.all()


def test_metrics_are_means_over_groups() -> None:
    rewards = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 4.0], [NAN, 1.0]])
    metrics = group_advantages(rewards).metrics()
    assert metrics["reward_std"] == pytest.approx((2**0.5 + 8**0.5) / 4)
    assert metrics["frac_reward_zero_std"] == 0.5
    # Apart: a group teaches something as soon as one of its rewards does.
    scores = torch.stack([rewards, torch.ones(4, 2)], dim=2)
    apart = normalise_then_sum(scores, torch.ones(2))
    assert apart.metrics()["frac_reward_zero_std"] == 0.5


@pytest.mark.parametrize("infinity", [float("inf"), -float("inf")])
def test_an_infinite_reward_is_refused_by_name_and_place(infinity: float) -> None:
    scores = torch.zeros(4, 2)
    scores[2, 1] = infinity
    weights = torch.ones(2)
    message = rf"scores: expected finite numbers, or NaN .*, got {infinity} at \[2, 1\]"
    with pytest.raises(ValueError, match=message):
        combine_rewards(scores, weights)
    with pytest.raises(ValueError, match=rf"scores: .*, got {infinity} at \[0, 2, 1\]"):
        normalise_then_sum(scores[None], weights)
    with pytest.raises(ValueError, match=rf"rewards: .*, got {infinity} at \[2, 1\]"):
        group_advantages(scores)


def test_wrong_inputs_are_refused_by_name() -> None:
    scores, weights = torch.zeros(4, 2), torch.ones(2)
    with pytest.raises(ValueError, match=r"scores: expected shape \[\*, \*\], got \[4\]"):
        combine_rewards(scores[:, 0], weights)
    with pytest.raises(ValueError, match="scores: expected float32 or float64, got int64"):
        combine_rewards(scores.long(), weights)
    with pytest.raises(ValueError, match=r"weights: expected shape \[2\], got \[3\]"):
        combine_rewards(scores, torch.ones(3))
    with pytest.raises(ValueError, match=r"weights: expected finite numbers, got \[1.0, nan\]"):
        combine_rewards(scores, torch.tensor([1.0, NAN]))
    with pytest.raises(ValueError, match="weights: expected at least one that is not 0"):
        normalise_then_sum(scores[None], torch.zeros(2))
    with pytest.raises(ValueError, match="missing: expected drop or zero, got 'skip'"):
        combine_rewards(scores, weights, missing="skip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale: expected group or none, got 'batch'"):
        group_advantages(scores, scale="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group: expected at least 2 images to compare, got 1"):
        group_advantages(scores[:, :1])
