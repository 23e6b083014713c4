"""A judge behind HTTP: whatever its server does, there is a score that it gave, or none."""

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import PIL
import pytest
import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.rewards import serving
from argrpo.rewards.image_transfer import from_png_base64
from argrpo.rewards.json_client import Connection, JsonClient
from argrpo.rewards.protocols import Answer
from argrpo.rewards.reward_server import (
    DeqaReward,
    GenevalReward,
    ImageRewardServer,
    ServerReward,
)
from argrpo.rewards.serving import make_server, of_judge

Start = Callable[[Callable[[Any], None]], str]

_PROMPTS = [Prompt("a cat"), Prompt("a dog"), Prompt("a hat")]
_QUICK = {"timeout_s": 0.3, "max_retries": 2, "backoff_s": 0.01}
_SCORES = {"scores": [0.25, 0.5, 0.75]}


def _ask(url: str, **options: Any) -> Answer:
    options.setdefault("connection", _QUICK)
    judge = ServerReward(url, low=0, high=1, **options)

    async def asked() -> Answer:
        try:
            return await judge.ask(torch.rand(3, 3, 4, 4), _PROMPTS)
        finally:
            await judge.close()

    return asyncio.run(asked())


def _expect_none(answer: Answer, problem: str, *, retries: int) -> None:
    assert answer.scores.isnan().all() and answer.scores.shape == (3,)
    assert answer.num_failures == 3 and answer.num_retries == retries
    assert problem in str(answer.problem)


def test_scores_come_back_and_images_arrive_to_the_bit(scripted_server: Start) -> None:
    seen = []

    def script(exchange: Any) -> None:
        seen.append(exchange.body)
        exchange.reply(_SCORES)

    judge = DeqaReward(scripted_server(script), connection=_QUICK)
    images = torch.randint(0, 256, (3, 3, 5, 7)).float() / 255.0
    answer = asyncio.run(judge.ask(images, _PROMPTS))
    assert answer.scores.tolist() == [0.25, 0.5, 0.75]
    assert (answer.num_failures, answer.num_retries, answer.problem) == (0, 0, None)
    (body,) = seen
    assert body["prompts"] == ["a cat", "a dog", "a hat"] and "metadata" not in body
    assert torch.equal(torch.stack([from_png_base64(text) for text in body["images"]]), images)


def test_a_server_that_refuses_is_tried_again_and_then_given_up() -> None:
    # A port that was free a moment ago, and that nobody listens at.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _expect_none(_ask(f"http://127.0.0.1:{port}"), "ConnectError", retries=2)


def test_a_server_that_hangs_costs_no_more_than_the_limit_of_its_attempts(
    scripted_server: Start,
) -> None:
    url = scripted_server(lambda exchange: exchange.stopping.wait())
    started = time.perf_counter()
    _expect_none(_ask(url), "no answer within 0.3 s", retries=2)
    # Three attempts of 0.3 s and two waits of at most 0.02 s; the rest is a busy machine's.
    assert 0.9 <= time.perf_counter() - started < 5


def test_a_server_that_drips_cannot_stretch_an_attempt(scripted_server: Start) -> None:
    def script(exchange: Any) -> None:
        exchange.start(1000)
        while not exchange.stopping.wait(0.05):
            exchange.send(b" ")

    answer = _ask(scripted_server(script), connection={**_QUICK, "max_retries": 0})
    _expect_none(answer, "no answer within 0.3 s", retries=0)


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_what_may_pass_is_tried_again_until_it_has(scripted_server: Start, code: int) -> None:
    def script(exchange: Any) -> None:
        exchange.reply(_SCORES if exchange.number == 2 else {"error": "busy"}, 200 if
                       exchange.number == 2 else code)  # fmt: skip

    answer = _ask(scripted_server(script))
    assert answer.scores.tolist() == [0.25, 0.5, 0.75]
    assert answer.num_retries == 2 and answer.num_failures == 0


@pytest.mark.parametrize("code", [400, 401, 404, 422])
def test_what_will_not_pass_is_not_tried_again(scripted_server: Start, code: int) -> None:
    seen = []

    def script(exchange: Any) -> None:
        seen.append(exchange.number)
        exchange.reply({"error": "no such judge"}, code)

    _expect_none(_ask(scripted_server(script)), f"HTTP {code}: ", retries=0)
    assert seen == [0]


def test_a_server_that_asks_for_time_gets_it(scripted_server: Start) -> None:
    times = []

    def script(exchange: Any) -> None:
        times.append(time.perf_counter())
        if exchange.number:
            exchange.reply(_SCORES)
        else:
            exchange.reply({}, 429, Retry_After="0.25")

    # Attempts that a busy machine cannot make fail by themselves.
    patient = {**_QUICK, "timeout_s": 10.0}
    assert _ask(scripted_server(script), connection=patient).num_retries == 1
    # 0.01 s is what the client would have waited by itself.
    assert times[1] - times[0] >= 0.25


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"scores": [0.1, 0.2', "expected JSON"),
        (b"<html>", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b'{"scores": [0.1, 0.2]}', "expected 3 scores, got 2"),
        (b'{"scores": 0.5}', 'expected {"scores": [...]}'),
        (b"[0.1, 0.2, 0.3]", 'expected {"scores": [...]}'),
        (b"[" * 100_000, "expected JSON"),
    ],
)
def test_an_answer_that_is_none_is_told_and_not_asked_for_again(
    scripted_server: Start, content: bytes, problem: str
) -> None:
    _expect_none(_ask(scripted_server(lambda e: e.reply(content))), problem, retries=0)


def test_a_body_that_is_not_packed_as_it_says_is_no_answer(scripted_server: Start) -> None:
    url = scripted_server(lambda e: e.reply(b'{"scores": [0, 0, 0]}', Content_Encoding="gzip"))
    _expect_none(_ask(url), "DecodingError", retries=0)


@pytest.mark.parametrize("number", ["1e39", "-1e39", "1e300", "9" * 400])
def test_a_number_that_fp32_cannot_hold_is_no_score(scripted_server: Start, number: str) -> None:
    content = f'{{"scores": [0.25, {number}, -0.75]}}'.encode()
    judge = ImageRewardServer(scripted_server(lambda e: e.reply(content)), connection=_QUICK)
    answer = asyncio.run(judge.ask(torch.rand(3, 3, 4, 4), _PROMPTS))
    assert answer.scores[[0, 2]].tolist() == [0.25, -0.75] and answer.scores[1].isnan()
    assert answer.num_failures == 1


@pytest.mark.parametrize("wrong", ["1.5", "-0.1", "NaN", "Infinity", "null", '"0.5"', "true", "[]"])
def test_one_score_that_is_none_takes_no_other_with_it(scripted_server: Start, wrong: str) -> None:
    content = f'{{"scores": [0.25, {wrong}, 0.75]}}'.encode()
    answer = _ask(scripted_server(lambda exchange: exchange.reply(content)))
    assert answer.scores[[0, 2]].tolist() == [0.25, 0.75] and answer.scores[1].isnan()
    assert answer.num_failures == 1 and "no score in [0, 1] for 1 of 3" in str(answer.problem)


def test_a_server_that_dies_in_an_answer_and_comes_back_is_heard(scripted_server: Start) -> None:
    def script(exchange: Any) -> None:
        if exchange.number == 0:
            exchange.start(100)
            exchange.send(b'{"scores": [0.9')
            exchange.die()
        elif exchange.number == 1:
            exchange.die()
        else:
            exchange.reply(_SCORES)

    answer = _ask(scripted_server(script))
    assert answer.scores.tolist() == [0.25, 0.5, 0.75] and answer.num_retries == 2


def test_no_more_requests_are_under_way_than_allowed(scripted_server: Start) -> None:
    busy, most = [], []

    def script(exchange: Any) -> None:
        busy.append(exchange.number)
        most.append(len(busy))
        exchange.stopping.wait(0.03)
        busy.remove(exchange.number)
        exchange.reply({"scores": [1.0]})

    judge = ServerReward(
        scripted_server(script), connection={**_QUICK, "timeout_s": 10, "max_connections": 2}
    )

    async def ask_all() -> list[Answer]:
        images = torch.rand(6, 1, 3, 4, 4)
        return await asyncio.gather(*(judge.ask(image, _PROMPTS[:1]) for image in images))

    answers = asyncio.run(ask_all())
    assert all(answer.scores.tolist() == [1.0] for answer in answers)
    assert max(most) == 2


def test_what_a_detector_looks_for_goes_with_the_image(
    scripted_server: Start, tmp_path: Any
) -> None:
    file = tmp_path / "metadata.jsonl"
    file.write_text('{"prompt": "a cat", "include": [{"class": "cat", "count": 1}]}\n\n')
    seen = []

    def script(exchange: Any) -> None:
        seen.append(exchange.body["metadata"])
        exchange.reply({"scores": [1]})

    judge = GenevalReward(scripted_server(script), metadata=str(file), connection=_QUICK)

    async def ask(prompt: Prompt) -> Answer:
        return await judge.ask(torch.rand(1, 3, 4, 4), [prompt])

    async def both() -> tuple[Answer, Answer]:
        return await ask(_PROMPTS[0]), await ask(_PROMPTS[1])

    known, unknown = asyncio.run(both())
    assert known.scores.tolist() == [1.0]
    assert unknown.scores.isnan().all() and "no metadata for the prompt 'a dog'" in str(
        unknown.problem
    )
    assert seen == [[{"prompt": "a cat", "include": [{"class": "cat", "count": 1}]}]]


def test_a_key_is_read_from_a_file_and_sent(scripted_server: Start, tmp_path: Any) -> None:
    (tmp_path / "key").write_text("secret\n")
    heard = []

    def script(exchange: Any) -> None:
        heard.append(exchange.headers["Authorization"])
        exchange.reply(_SCORES)

    _ask(
        scripted_server(script),
        connection={**_QUICK, "api_key_file": str(tmp_path / "key")},
    )
    assert heard == ["Bearer secret"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"url": "127.0.0.1:80"},
            r"options\.url: expected http://HOST\.\.\. or https://HOST.*, got",
        ),
        ({"url": "http://"}, r"options\.url: expected http://HOST.*, got 'http://'"),
        ({"url": "http://[::1"}, r"options\.url: expected http://HOST"),
        ({"url": "http://127.0.0.1:99999"}, r"options\.url: expected http://HOST"),
        ({"reward_batch": 0}, r"options\.reward_batch: expected at least 1, got 0"),
        ({"connection": {"timeout_s": 0}}, r"connection\.timeout_s: expected a finite number ab"),
        ({"connection": {"max_retries": -1}}, r"connection\.max_retries: expected at least 0"),
        ({"connection": {"max_connections": 0}}, r"max_connections: expected at least 1, got 0"),
        ({"connection": {"backoff_s": -1}}, r"connection\.backoff_s: expected at least 0, got -1"),
        ({"connection": {"retries": 1}}, r"connection: expected some of .*, got retries"),
        ({"low": 1.0, "high": 1.0}, r"options\.low: expected less than high 1\.0, got 1\.0"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"rewards\.server\.(options\.)?.*{message}"):
        ServerReward(**{"url": "http://127.0.0.1:1", **options})


def test_files_that_are_not_there_or_no_metadata_are_named(tmp_path: Any) -> None:
    url = "http://127.0.0.1:1"
    with pytest.raises(FileNotFoundError, match=r"api_key_file: expected a file with the key"):
        ServerReward(url, connection={"api_key_file": str(tmp_path / "none")})
    with pytest.raises(FileNotFoundError, match=r"geneval\.options\.metadata: expected a file"):
        GenevalReward(url, metadata=str(tmp_path / "none"))
    (tmp_path / "bad").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"metadata: expected a JSON object .* on line 2 of"):
        GenevalReward(url, metadata=str(tmp_path / "bad"))


def test_waits_before_retries_double_and_never_fall_together() -> None:
    client = JsonClient("http://127.0.0.1:1", Connection(backoff_s=1.0), place="rewards.x")
    first = [client._backoff(0) for _ in range(200)]
    assert 0.5 <= min(first) < 0.6 and 0.9 < max(first) <= 1.0
    assert all(2.0 <= client._backoff(2) <= 4.0 for _ in range(50))
    assert client._backoff(60) <= 30.0


def _served(judge: Callable[[Tensor, list[Prompt]], Tensor]) -> Any:
    server = make_server(of_judge(judge), port=0)
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def test_a_judge_that_is_served_says_the_same_as_here() -> None:
    def redness(images: Tensor, prompts: list[Prompt]) -> Tensor:
        scores = images[:, 0].mean(dim=(1, 2)) + torch.tensor([len(p.text) for p in prompts])
        return scores.masked_fill(images[:, 0, 0, 0] == 1, torch.nan)

    images = torch.randint(0, 255, (3, 3, 6, 6)).float() / 255.0
    images[1, 0, 0, 0] = 1.0
    server = _served(redness)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    judge = ServerReward(url, connection={**_QUICK, "timeout_s": 10})
    try:
        answer = asyncio.run(judge.ask(images, _PROMPTS))
    finally:
        server.shutdown()
        server.server_close()
    torch.testing.assert_close(
        answer.scores, redness(images, _PROMPTS), equal_nan=True, atol=0, rtol=0
    )
    assert answer.num_failures == 1


def test_a_served_judge_that_raises_or_is_asked_nonsense_says_so() -> None:
    def broken(images: Tensor, prompts: list[Prompt]) -> Tensor:
        raise RuntimeError("no GPU left")

    server = _served(broken)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        answer = asyncio.run(
            ServerReward(url, connection={**_QUICK, "timeout_s": 10, "max_retries": 0}).ask(
                torch.rand(3, 3, 4, 4), _PROMPTS
            )
        )
        assert "no GPU left" in str(answer.problem)
        assert httpx.post(url, content=b"{}").status_code == 400
        assert httpx.post(url, json={"images": ["!"], "prompts": ["a"]}).status_code == 400
        assert httpx.post(url, content=b"").status_code == 411
    finally:
        server.shutdown()
        server.server_close()


def test_the_server_stands_alone_and_serves_a_function_of_a_file(tmp_path: Any) -> None:
    (tmp_path / "my_judge.py").write_text(
        "def score(images, prompts, metadata):\n"
        "    return [i.getpixel((0, 0))[0] / 255 if m['count'] else None\n"
        "            for i, m in zip(images, metadata)]\n"
    )
    (tmp_path / "metadata.jsonl").write_text(
        '{"prompt": "a cat", "count": 1}\n{"prompt": "a dog", "count": 0}\n'
    )
    alone = shutil.copy(Path(serving.__file__), tmp_path / "server_of_mine.py")
    # Without argrpo: -I leaves out what is installed here, and Pillow's folder comes back alone.
    code = (
        f"import sys; sys.path[:0] = [{str(Path(PIL.__file__).parents[1])!r}]; "
        "sys.modules['argrpo'] = sys.modules['torch'] = None; "
        f"sys.argv = ['x', 'my_judge:score', '--port', '0']; "
        f"exec(compile(open({str(alone)!r}).read(), 'server', 'exec'))"
    )
    command = [sys.executable, "-I", "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            assert "listening at http://127.0.0.1:" in line, line + process.stderr.read()
            judge = ServerReward(
                line.split("listening at ")[1].strip(),
                metadata=str(tmp_path / "metadata.jsonl"),
                connection={**_QUICK, "timeout_s": 10},
            )
            answer = asyncio.run(judge.ask(torch.ones(2, 3, 4, 4), _PROMPTS[:2]))
        finally:
            process.terminate()
    assert answer.scores[0] == 1.0 and answer.scores[1].isnan()
