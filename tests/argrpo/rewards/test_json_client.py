"""How long a judge's server is waited for."""

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from argrpo.data import Prompt
from argrpo.rewards.background_loop import BackgroundLoop
from argrpo.rewards.delivery import Delivery
from argrpo.rewards.json_client import Connection, JsonClient, RequestError, retry_after
from argrpo.rewards.pool import Asking, Scoring
from argrpo.rewards.protocols import RemoteReward
from argrpo.rewards.quantize import QuantizedRemoteReward, StepMap
from argrpo.rewards.reward_server import ServerReward
from argrpo.rewards.vlm_server import VlmServerReward

Start = Callable[[Callable[[Any], None]], str]

_PROMPTS = [Prompt("a cat"), Prompt("a dog"), Prompt("a hat")]
_QUICK = {"timeout_s": 5.0, "max_retries": 2, "backoff_s": 0.01}


@pytest.mark.parametrize("kind", ["server", "vlm_server", "quantized"])
def test_a_server_that_asks_for_more_time_than_is_left_is_given_up_at_once(
    scripted_server: Start, kind: str
) -> None:
    url = scripted_server(lambda exchange: exchange.reply({}, 429, Retry_After="3600"))
    judge: RemoteReward = ServerReward(url, connection=_QUICK)
    if kind == "vlm_server":
        judge = VlmServerReward(url, "model", connection=_QUICK)
    if kind == "quantized":
        judge = QuantizedRemoteReward(judge, StepMap([0.5], [0, 1]), "steps")
    loop = BackgroundLoop()
    started = time.perf_counter()
    try:
        scoring = Scoring([judge], _PROMPTS, Asking(loop, deadline_s=60.0))
        scoring.add(torch.rand(3, 3, 4, 4))
        answer = scoring.finish()[0].answer
    finally:
        Asking(loop, 1.0).close([judge])
    # One request, far from the deadline even where the machine is busy.
    assert time.perf_counter() - started < 20
    assert answer.scores.isnan().all() and answer.num_failures == 3 and answer.num_retries == 0
    said = r"HTTP 429: \{\}; [0-9.]+ s are left, a retry is due in 3600\.0 s"
    assert re.search(said, str(answer.problem))


def test_time_is_left_from_the_last_image_on(scripted_server: Start) -> None:
    dues = []

    class Hurried(ServerReward):
        def within(self, delivery: Delivery) -> "Hurried":
            dues.append(delivery.due)
            return super().within(delivery)

    judge = Hurried(
        scripted_server(lambda exchange: exchange.reply({"scores": [0.25, 0.5, 0.75]})),
        connection=_QUICK,
        reward_batch=3,
    )
    loop = BackgroundLoop()
    try:
        scoring = Scoring([judge], _PROMPTS, Asking(loop, deadline_s=60.0))
        ends = []
        for image in torch.rand(3, 1, 3, 4, 4):
            scoring.add(image)
            ends.append(dues[0]())
        assert scoring.finish()[0].answer.num_failures == 0
    finally:
        Asking(loop, 1.0).close([judge])
    assert len(dues) == 1
    assert ends == sorted(set(ends))
    # A minute from an image that came just now.
    assert 30 < ends[-1] - time.perf_counter() < 60


def test_connections_are_kept_and_no_more_than_are_wanted(scripted_server: Start) -> None:
    ports: list[int] = []

    def answer(exchange: Any) -> None:
        ports.append(exchange.port)
        exchange.reply({})

    client = JsonClient(scripted_server(answer), Connection(max_connections=11), place="options")

    async def ask() -> int:
        for _ in range(3):
            await client.post({})
        one_by_one = len(set(ports))
        for _ in range(3):
            await asyncio.gather(*[client.post({}) for _ in range(40)])
        await client.close()
        return one_by_one

    assert asyncio.run(ask()) == 1
    # More than those of one client of httpx, see _CLIENT_CONNECTIONS.
    assert len(ports) == 123 and 4 < len(set(ports)) <= 11


def test_retry_after_is_read_as_seconds_and_as_a_date() -> None:
    assert retry_after("7", 0.0) == 7.0
    assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 45.0) == 15.0
    assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 90.0) == 0.0
    far = "Thu, 01 Jan 1970 00:01:00 +9999999999999"
    assert [retry_after(text, 0.0) for text in (None, "soon", "nan", "inf", far)] == [None] * 5


@pytest.mark.parametrize("charset", ["zlib", "hex", "idna", "undefined", "no-such-one"])
@pytest.mark.parametrize("code", [200, 404])
def test_an_answer_in_an_encoding_that_is_none_is_no_answer_and_no_crash(
    scripted_server: Start, charset: str, code: int
) -> None:
    kind = f"text/plain; charset={charset}"
    url = scripted_server(lambda exchange: exchange.reply(b"\xffno text", code, Content_Type=kind))
    client = JsonClient(url, Connection(**_QUICK), place="options")

    async def ask() -> None:
        try:
            await client.post({})
        finally:
            await client.close()

    with pytest.raises(RequestError, match="\N{REPLACEMENT CHARACTER}no text"):
        asyncio.run(ask())
