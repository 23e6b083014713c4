"""Functions as judges: ours, and TRL's contract for reward functions."""

import asyncio
import inspect
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from argrpo.data import Prompt
from argrpo.rewards.callables import (
    AsyncFunctionReward,
    AsyncTrlReward,
    FunctionReward,
    TrlReward,
    function_reward,
)
from argrpo.rewards.lanes import Outcome
from argrpo.rewards.protocols import Answer, StepContext

_PROMPTS = [Prompt("a cat", class_id=3, prompt_id=7), Prompt("a dog")]
_IMAGES = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 4, 5)


def _seen(function: Any, context: StepContext | None = None) -> Tensor:
    judge = function_reward("judge", function)
    assert isinstance(judge, TrlReward)
    if context is not None:
        judge = judge.seeing(context)
    return judge(_IMAGES, _PROMPTS)


def test_a_reward_function_of_trl_gets_what_trl_gives_it() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, completion_ids: Any, **kwargs: Any) -> list[float]:
        seen.update(kwargs, prompts=prompts, completions=completions, ids=completion_ids)
        return [0.5] * len(prompts)

    context = StepContext(4, 10, torch.tensor([[1, 2], [3, 4]]))
    assert _seen(reward, context).tolist() == [0.5, 0.5]
    assert seen["prompts"] == ["a cat", "a dog"]
    assert [type(picture) for picture in seen["completions"]] == [Image.Image] * 2
    assert [picture.size for picture in seen["completions"]] == [(5, 4)] * 2
    assert [picture.getpixel((0, 0)) for picture in seen["completions"]] == [
        (0, 0, 0),
        (255, 255, 255),
    ]
    assert seen["ids"] == [[1, 2], [3, 4]]
    assert seen["trainer_state"].global_step == 4 and seen["trainer_state"].max_steps == 10
    assert seen["class_id"] == [3, None] and seen["prompt_id"] == [7, 0]
    assert callable(seen["log_extra"]) and callable(seen["log_metric"])
    assert "images" not in seen, "whoever wants the tensor names it"


@pytest.mark.parametrize("returned", [None, ["good", "bad"], object()])
def test_what_is_no_number_is_shown_with_the_name_of_the_judge(returned: object) -> None:
    def ours(images: Any, prompts: Any) -> Any:
        return returned

    async def waited(images: Any, prompts: Any) -> Any:
        return returned

    said = r"^rewards\.judge: expected a number for each image, got (None|\['good'|<object)"
    with pytest.raises(ValueError, match=said):
        function_reward("judge", ours)(_IMAGES, _PROMPTS)
    with pytest.raises(ValueError, match=said):
        asyncio.run(function_reward("judge", waited).ask(_IMAGES, _PROMPTS))
    with pytest.raises(ValueError, match=said):
        _seen(lambda completions: returned)


def test_none_does_not_apply_and_nan_is_a_failure() -> None:
    def reward(completions: Any, **kwargs: Any) -> list[float | None]:
        return [None, float("nan")]

    judge = function_reward("judge", reward)
    assert isinstance(judge, TrlReward)
    answer = judge.answer(_IMAGES, _PROMPTS)
    assert answer.scores.isnan().all()
    assert answer.num_failures == 1 and answer.problem == "NaN for 1 of 2 images"


def test_a_function_that_names_the_tensor_gets_it_as_it_is_and_no_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: Tensor) -> list[Image.Image]:
        raise AssertionError("pictures were made")

    monkeypatch.setattr("argrpo.rewards.callables.pil_images", refuse)

    def reward(images: Tensor, **kwargs: Any) -> Tensor:
        assert images is _IMAGES and "completions" not in kwargs
        return images.mean(dim=(1, 2, 3))

    assert _seen(reward).tolist() == [0.0, 1.0]


def test_a_function_gets_only_what_it_names() -> None:
    def reward(completions: Any, class_id: Any) -> list[float]:
        return [float(c or 0) for c in class_id]

    assert _seen(reward).tolist() == [3.0, 0.0]


def test_metrics_are_averaged_over_a_step_and_extras_kept_in_order() -> None:
    def reward(prompts: Any, log_metric: Any, log_extra: Any, **kwargs: Any) -> list[float]:
        log_metric("length", 2)
        log_metric("length", 4)
        log_extra("text", prompts)
        return [1.0, 1.0]

    judge = function_reward("judge", reward)
    assert isinstance(judge, TrlReward)
    first, second = judge.answer(_IMAGES, _PROMPTS), judge.answer(_IMAGES, _PROMPTS)
    assert first.logged.metrics == {"length": [2.0, 4.0]}
    assert first.logged.extras == {"text": ["a cat", "a dog"]}
    both = Answer.joined([first, second])
    assert both.logged.extras == {"text": ["a cat", "a dog", "a cat", "a dog"]}
    assert Outcome("judge", both, 0.0, 2).metrics()["length"] == 3.0


def test_coroutine_functions_of_both_kinds_are_awaited() -> None:
    async def ours(images: Tensor, prompts: list[Prompt]) -> Tensor:
        await asyncio.sleep(0)
        return images.mean(dim=(1, 2, 3))

    async def trls(completions: Any, **kwargs: Any) -> list[float | None]:
        await asyncio.sleep(0)
        return [float(completions[0].getpixel((0, 0))[0]), None]

    one, other = function_reward("ours", ours), function_reward("trls", trls)
    assert isinstance(one, AsyncFunctionReward) and isinstance(other, AsyncTrlReward)
    assert asyncio.run(one.ask(_IMAGES, _PROMPTS)).scores.tolist() == [0.0, 1.0]
    answer = asyncio.run(other.ask(_IMAGES, _PROMPTS))
    assert answer.scores[0] == 0.0 and answer.scores[1].isnan() and answer.num_failures == 0


@pytest.mark.parametrize(
    ("parameters", "kind"),
    [
        ("images, prompts", FunctionReward),
        ("pictures, texts", FunctionReward),
        ("prompts, completions", TrlReward),
        ("completion_ids, prompts", TrlReward),
        ("**kwargs", TrlReward),
        ("images, prompts, **kwargs", TrlReward),
    ],
)
def test_the_kind_of_a_function_is_read_from_its_parameters(parameters: str, kind: type) -> None:
    function = eval(f"lambda {parameters}: [0.0, 0.0]")
    judge = function_reward("judge", function)
    assert type(judge) is kind
    assert judge(_IMAGES, _PROMPTS).tolist() == [0.0, 0.0]


def test_every_keyword_that_trl_promises_is_there() -> None:
    promised = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra"}
    promised |= {"log_metric"}
    seen: set[str] = set()

    def reward(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0, 0.0]

    assert inspect.signature(reward)
    _seen(reward)
    assert promised <= seen
