"""Step maps and AR-GRPO's eight rewards against golden numbers of its code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo.advantages import combine_rewards
from argrpo.data import Prompt
from argrpo.reward_config import RewardConfig
from argrpo.rewards.background_loop import BackgroundLoop
from argrpo.rewards.callables import function_reward
from argrpo.rewards.lanes import Judge, Outcome
from argrpo.rewards.pool import Asking, Scoring
from argrpo.rewards.protocols import Answer, Batched, ContextReward, StepContext
from argrpo.rewards.quantize import EqualSteps, QuantizedReward, StepMap, quantized
from argrpo.rewards.registry import make_reward

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


@pytest.mark.parametrize("steps", [StepMap([0.0], [1.0, 2.0]), EqualSteps(10)])
def test_an_infinite_score_is_a_failure_and_not_the_best_step(steps: Any) -> None:
    def overflown(images: Tensor, prompts: list[Prompt]) -> Tensor:
        return torch.tensor([torch.inf, 0.5, -torch.inf, 0.25])

    answer = _outcome(quantized(function_reward("overflown", overflown), steps, "q")).answer
    assert answer.scores.isnan().tolist() == [True, False, True, False]
    assert answer.num_failures == 2


def test_what_lies_below_the_lowest_bin_is_cut_off_towards_0() -> None:
    # Stretched to -0.7, -0.3 and 0.5, in bins of 1.
    assert EqualSteps(5)(torch.tensor([-0.14, -0.06, 0.1])).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 0}, "bins: expected at least 1, got 0"),
        ({"bins": 2, "low": 1.0}, "low: expected another number than high"),
        ({"bins": 2, "highest": 0.0}, "lowest: expected another number than highest"),
    ],
)
def test_bins_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EqualSteps(**options)


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


_STEPS = {"thresholds": [0.5], "values": [0.0, 1.0]}
_PROMPTS = [Prompt(f"prompt {i}") for i in range(4)]


def _stepped(name: str) -> Judge:
    config = RewardConfig(name=f"quantize({__name__}:{name})", options=_STEPS)
    return make_reward(config, torch.device("cpu"), None)


def _outcome(judge: Judge, sizes: tuple[int, ...] = (4,)) -> Outcome:
    """As a step asks."""
    loop = BackgroundLoop()
    context = StepContext(step=3, num_steps=9)
    try:
        scoring = Scoring([judge], _PROMPTS, Asking(loop, 30.0), context)
        for count in sizes:
            scoring.add(torch.zeros(count, 3, 4, 4), torch.full((count, 2), 7))
        return scoring.finish()[0]
    finally:
        loop.close()


def _say(prompts: list[str], completion_ids: Any, state: Any, log: Any, table: Any) -> list[Any]:
    log("steps", state.global_step)
    table("ids", completion_ids)
    return [0.75, 0.25, None, float("nan")][: len(prompts)]


def trl(prompts, completion_ids, trainer_state, log_metric, log_extra, **kwargs):
    return _say(prompts, completion_ids, trainer_state, log_metric, log_extra)


async def async_trl(prompts, completion_ids, trainer_state, log_metric, log_extra, **kwargs):
    return _say(prompts, completion_ids, trainer_state, log_metric, log_extra)


@pytest.mark.parametrize("name", ["trl", "async_trl"])
def test_a_function_of_trl_keeps_its_none_its_context_and_what_it_logs(name: str) -> None:
    judge = _stepped(name)
    for _ in range(2):  # another step is not mixed with the first
        outcome = _outcome(judge, (3, 1))
        answer = outcome.answer
        assert answer.scores[:2].tolist() == [1.0, 0.0] and answer.scores[2:].isnan().all()
        # The last one failed; the one before has None.
        assert answer.num_failures == 1 and answer.problem == "NaN for 1 of 4 images"
        assert outcome.name == f"{__name__}:{name}_quantized"
        assert outcome.metrics()["steps"] == 3.0
        assert answer.logged.extras == {"ids": [[7, 7]] * 4}


class _Plain:
    name = "plain"
    rested = 0

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        return torch.tensor([0.75, 0.25, 0.75, 0.25][: len(prompts)])

    def rest(self) -> None:
        self.rested += 1

    def metrics(self) -> dict[str, float]:
        return {"length": 12.0}


class _Answering(_Plain):
    reward_batch = 3

    def answer(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        scores = self(images, prompts)
        scores[0] = torch.nan  # does not apply
        return Answer(scores)


def test_a_judge_that_tells_what_does_not_apply_is_asked_for_it() -> None:
    judge = quantized(_Answering(), StepMap(**_STEPS), "q")
    answer = _outcome(judge).answer
    assert answer.scores.isnan().tolist() == [True, False, False, True]
    assert answer.num_failures == 0
    # A score that the map has no value for is one, and told from the others.
    answer = _outcome(quantized(_Answering(), StepMap([0.0, 0.5], [0.0, 1.0]), "q")).answer
    assert answer.scores.isnan().tolist() == [True, False, True, True]
    assert (answer.num_failures, answer.problem) == (1, "no step for 1 of 3 scores")


def test_a_judge_rests_and_measures_through_its_map() -> None:
    inner = _Plain()
    judge = quantized(inner, StepMap(**_STEPS), "q")
    assert _outcome(judge).answer.scores.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert inner.rested == 1
    assert judge.metrics() == {"length": 12.0}
    assert quantized(_Raw("raw", torch.ones(1)), StepMap(**_STEPS), "q").metrics() == {}


def test_a_judge_that_wants_no_context_is_not_given_any() -> None:
    # On a GPU token ids would be waited for.
    for judge in (_Plain(), _Answering()):
        assert not isinstance(quantized(judge, StepMap(**_STEPS), "q"), ContextReward)


def test_a_judge_sees_the_stretches_that_it_would_see_alone() -> None:
    judge = quantized(_Answering(), StepMap(**_STEPS), "q")
    assert isinstance(judge, Batched) and _outcome(judge, (1, 3)).batch == 3
    assert _outcome(quantized(_Plain(), StepMap(**_STEPS), "q"), (1, 3)).batch == 4


class _Running:
    """A distribution reward: the mean of all images so far."""

    name = "running"

    def __init__(self) -> None:
        self._seen, self._next = torch.zeros(1), torch.zeros(1)

    def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        self._next = self._seen + 1
        return torch.linspace(0, 1, len(images)) + self._seen

    def update(self) -> None:
        self._seen = self._next

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self._seen}


class _Restorable(_Running):
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._seen = state["seen"]


@pytest.mark.parametrize("kind", [_Running, _Restorable])
def test_a_distribution_reward_keeps_its_state_through_its_map(kind: Callable[[], Any]) -> None:
    judge = quantized(kind(), StepMap(**_STEPS), "q")
    assert _outcome(judge).answer.scores.tolist() == [0.0, 0.0, 1.0, 1.0]
    judge.update()
    assert judge.state_dict() == {"seen": torch.ones(1)}
    assert _outcome(judge).answer.scores.tolist() == [1.0] * 4
    again = quantized(kind(), StepMap(**_STEPS), "q")
    if kind is _Restorable:
        again.load_state_dict(judge.state_dict())
        assert _outcome(again).answer.scores.tolist() == [1.0] * 4
    else:
        with pytest.raises(ValueError, match=r"rewards\.q: expected a method load_state_dict"):
            again.load_state_dict(judge.state_dict())
