"""A vision-language judge behind a server: what is asked, and the score that an answer gives."""

import asyncio
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from argrpo.data import Prompt
from argrpo.reward_config import RewardConfig
from argrpo.rewards.image_transfer import from_png_base64
from argrpo.rewards.protocols import Answer
from argrpo.rewards.registry import make_reward
from argrpo.rewards.vlm_server import QwenVlServer, UnifiedRewardServer, VlmServerReward

Start = Callable[[Callable[[Any], None]], str]

_QUICK = {"timeout_s": 5, "max_retries": 1, "backoff_s": 0.01}
_PROMPTS = [Prompt("a cat"), Prompt("a dog")]


def _completion(text: str, logprobs: Any = None, finish_reason: str = "stop") -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"choices": [{**choice, "logprobs": logprobs}]}


def _token(text: str, **odds: float) -> dict[str, Any]:
    """A token that was said, and the odds of digits in its place: d3=0.5."""
    top = [{"token": key[1:], "logprob": math.log(p)} for key, p in odds.items()]
    return {"token": text, "logprob": -0.5, "top_logprobs": top}


def _ask(judge: VlmServerReward, count: int = 2) -> Answer:
    async def asked() -> Answer:
        try:
            return await judge.ask(torch.rand(count, 3, 8, 8), _PROMPTS[:count])
        finally:
            await judge.close()

    return asyncio.run(asked())


def test_each_image_is_asked_about_with_its_own_prompt(scripted_server: Start) -> None:
    bodies = []

    def script(exchange: Any) -> None:
        assert exchange.path == "/v1/chat/completions"
        bodies.append(exchange.body)
        is_cat = "a cat" in exchange.body["messages"][0]["content"][1]["text"]
        exchange.reply(_completion('{"score": 4}' if is_cat else '{"score": 1}'))

    judge = VlmServerReward(
        scripted_server(script) + "/v1/", "qwen", connection=_QUICK, request={"top_k": 1}
    )
    answer = _ask(judge)
    assert answer.scores.tolist() == [4.0, 1.0] and answer.num_failures == 0
    body = bodies[0]
    assert (body["model"], body["temperature"], body["top_k"]) == ("qwen", 0, 1)
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["max_tokens"] == 32
    head, _, data = body["messages"][0]["content"][0]["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64" and from_png_base64(data).shape == (3, 8, 8)
    assert judge.name == "vlm_rubric" and judge.reward_batch == 1


def test_the_odds_of_digits_make_a_finer_score_than_the_digit(scripted_server: Start) -> None:
    said = [_token('{"'), _token("score"), _token('":'), _token(" "), _token("3", d3=0.5, d4=0.25)]
    logprobs = {"content": [*said, _token("}")]}
    url = scripted_server(lambda e: e.reply(_completion('{"score": 3}', logprobs)))
    answer = _ask(VlmServerReward(url, "qwen", connection=_QUICK), 1)
    # 3 with .5 and 4 with .25 of a mass of .75; the token itself was listed with other odds.
    assert answer.scores.item() == pytest.approx((3 * 0.5 + 4 * 0.25) / 0.75, abs=1e-6)


def test_unified_reward_reads_what_stands_behind_its_mark_and_sends_512_pixels(
    scripted_server: Start,
) -> None:
    bodies = []

    def script(exchange: Any) -> None:
        bodies.append(exchange.body)
        exchange.reply(_completion("A tidy cat.\nFinal Score: 3.5"))

    answer = _ask(UnifiedRewardServer(scripted_server(script), connection=_QUICK), 1)
    assert answer.scores.tolist() == [3.5]
    data = bodies[0]["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    assert from_png_base64(data).shape == (3, 512, 512)
    assert "logprobs" not in bodies[0], "a score with a fraction is not one digit"


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (_completion("I cannot judge this."), "no score in the answer 'I cannot judge this.'"),
        (_completion('{"score": 7}'), "no score in the answer"),
        (_completion("Five points: 5"), "no score in the answer"),
        (_completion('{"score": 3', finish_reason="length"), "no score in the answer"),
        ({"choices": []}, "expected a chat completion"),
        ({"error": "overloaded"}, "expected a chat completion"),
        ([], "expected a chat completion"),
        (_completion(None), "expected a chat completion"),  # type: ignore[arg-type]
        (_completion('{"score": 3}', {"content": [{"token": "3"}]}), "expected a chat completion"),
        *[
            (_completion('{"score": 3}', {"content": [token]}), "expected a chat completion")
            for token in (
                {"token": None, "logprob": 0.0},
                {"token": "3", "logprob": 1e4},
                {"token": "3", "logprob": 10**400},
                {"token": "3", "logprob": math.nan},
                {"token": "3", "logprob": 0.0, "top_logprobs": [{"token": 4, "logprob": 0.0}]},
            )
        ],
    ],
)
def test_an_answer_without_a_score_is_no_score(
    scripted_server: Start, reply: Any, problem: str
) -> None:
    url = scripted_server(lambda exchange: exchange.reply(reply))
    answer = _ask(VlmServerReward(url, "qwen", connection=_QUICK), 1)
    assert answer.scores.isnan().all() and answer.num_failures == 1
    assert problem in str(answer.problem)


def test_one_image_that_fails_takes_no_other_with_it(scripted_server: Start) -> None:
    def script(exchange: Any) -> None:
        if "a cat" in exchange.body["messages"][0]["content"][1]["text"]:
            exchange.reply({"error": "too hot"}, 500)
        else:
            exchange.reply(_completion('{"score": 2}'))

    answer = _ask(VlmServerReward(scripted_server(script), "qwen", connection=_QUICK))
    assert answer.scores[0].isnan() and answer.scores[1] == 2
    assert (answer.num_failures, answer.num_retries) == (1, 1)


def test_options_that_cannot_be_are_named() -> None:
    url = "http://127.0.0.1:1/v1"
    with pytest.raises(ValueError, match=r"vlm_rubric\.options\.max_tokens: expected at least 1"):
        VlmServerReward(url, "qwen", max_tokens=0)
    with pytest.raises(ValueError, match=r"vlm_fake\.options\.image_size: expected at least 1"):
        VlmServerReward(url, "qwen", question="fake", image_size=0)
    with pytest.raises(FileNotFoundError, match=r"question: expected one of fake, rubric"):
        VlmServerReward(url, "qwen", question="none")


@pytest.mark.parametrize(("read", "asks_for_odds"), [("probabilities", True), ("answer", False)])
def test_qwen_vl_with_an_address_is_asked_there_under_the_same_name(
    scripted_server: Start, read: str, asks_for_odds: bool
) -> None:
    bodies = []

    def script(exchange: Any) -> None:
        bodies.append(exchange.body)
        exchange.reply(_completion('{"score": 1}'))

    options = {"url": scripted_server(script), "question": "fake", "read": read}
    config = RewardConfig(name="qwen_vl", options={**options, "connection": _QUICK})
    judge = make_reward(config, torch.device("cpu"), None)
    assert isinstance(judge, QwenVlServer) and judge.name == "qwen_vl_fake"
    assert _ask(judge).scores.tolist() == [1.0, 1.0]
    assert bodies[0]["model"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert ("logprobs" in bodies[0]) is asks_for_odds


def test_a_way_to_read_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"qwen_vl\.options\.read: expected probabilities or answ"):
        QwenVlServer("http://127.0.0.1:1", read="both")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("json_client", "vlm_server"):
        monkeypatch.delitem(sys.modules, f"argrpo.rewards.{module}")
    monkeypatch.setitem(sys.modules, "httpx", None)
    config = RewardConfig(name="vlm_server", options={"url": "http://x", "model": "y"})
    with pytest.raises(ValueError, match=r"cannot load 'vlm_server': .* 'argrpo\[judges\]'"):
        make_reward(config, torch.device("cpu"), None)
