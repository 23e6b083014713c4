"""What judges behind servers share in a step: each picture is squeezed once."""

import base64
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from argrpo.data import Prompt
from argrpo.rewards import delivery
from argrpo.rewards.background_loop import BackgroundLoop
from argrpo.rewards.delivery import PngTexts
from argrpo.rewards.image_transfer import from_png_base64, pil_images
from argrpo.rewards.lanes import Judge, Outcome
from argrpo.rewards.pool import Asking, Scoring
from argrpo.rewards.reward_server import DeqaReward, ServerReward
from argrpo.rewards.vlm_server import VlmServerReward

Start = Callable[[Callable[[Any], None]], str]

_PROMPTS = [Prompt(f"prompt {i}") for i in range(6)]
# A test's server accepts few connections at a time, and resets the others.
_PATIENT = {"timeout_s": 30.0, "max_connections": 1}


@pytest.fixture
def squeezed(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """Pictures in the order in which they were squeezed."""
    pictures: list[Image.Image] = []
    squeeze = delivery.png_base64

    def watched(picture: Image.Image) -> str:
        pictures.append(picture)
        return squeeze(picture)

    monkeypatch.setattr(delivery, "png_base64", watched)
    return pictures


def _answer(exchange: Any) -> None:
    """As both kinds of servers do, 0.5 to everything."""
    if "images" in exchange.body:
        exchange.reply({"scores": [0.5] * len(exchange.body["images"])})
    else:
        exchange.reply({"choices": [{"message": {"content": '{"score": 5}'}}]})


def _outcomes(judges: list[Judge], images: torch.Tensor, sizes: tuple[int, ...]) -> list[Outcome]:
    loop = BackgroundLoop()
    asking = Asking(loop, 60.0)
    try:
        scoring = Scoring(judges, _PROMPTS, asking)
        for part in images.split(sizes):
            scoring.add(part)
        return scoring.finish()
    finally:
        asking.close(judges)


def test_judges_that_send_the_same_picture_squeeze_it_once(
    scripted_server: Start, squeezed: list[Image.Image]
) -> None:
    sent: list[str] = []

    def script(exchange: Any) -> None:
        sent.extend(exchange.body.get("images", []))
        _answer(exchange)

    url = scripted_server(script)
    judges: list[Judge] = [
        ServerReward(url, connection=_PATIENT, reward_batch=4),
        DeqaReward(url, connection=_PATIENT, reward_batch=2),
        VlmServerReward(url, "model", question="rubric", connection=_PATIENT),
    ]
    images = torch.randint(256, (6, 3, 24, 16)) / 255
    for outcome in _outcomes(judges, images, (1, 3, 2)):
        assert outcome.answer.num_failures == 0, outcome.answer.problem
    assert len(squeezed) == 6
    # Both servers of pictures got each of them, to the bit.
    assert len(sent) == 12 and len(set(sent)) == 6
    levels = {(from_png_base64(text) * 255).round().byte().numpy().tobytes() for text in sent}
    assert levels == {(image * 255).round().byte().numpy().tobytes() for image in images}


def test_another_size_is_another_picture(
    scripted_server: Start, squeezed: list[Image.Image]
) -> None:
    url = scripted_server(_answer)
    judges: list[Judge] = [
        VlmServerReward(url, "model", image_size=side, connection=_PATIENT, name=name)
        for name, side in (("plain", None), ("large", 32), ("again", 32))
    ]
    outcomes = _outcomes(judges, torch.rand(6, 3, 16, 16), (6,))
    assert [outcome.answer.problem for outcome in outcomes] == [None] * 3
    assert sorted(picture.size for picture in squeezed) == [(16, 16)] * 6 + [(32, 32)] * 6


def test_the_next_step_squeezes_its_own(
    scripted_server: Start, squeezed: list[Image.Image]
) -> None:
    judges: list[Judge] = [ServerReward(scripted_server(_answer), connection=_PATIENT)]
    for _ in range(2):
        _outcomes(judges, torch.rand(6, 3, 8, 8), (6,))
    assert len(squeezed) == 12


def _picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return pil_images(torch.rand(1, 3, 8, 8, generator=generator))[0]


def test_a_text_is_forgotten_when_all_have_it(squeezed: list[Image.Image]) -> None:
    texts = PngTexts(num_takers=2)
    first = texts.of(_picture(0))
    with Image.open(io.BytesIO(base64.b64decode(first))) as file:
        assert file.tobytes() == _picture(0).tobytes()
    assert texts.of(_picture(1)) != first
    assert texts.of(_picture(0)) == first
    assert len(squeezed) == 2 and len(texts._texts) == 1
    assert texts.of(_picture(0)) == first
    assert len(squeezed) == 3


def test_who_asks_while_a_picture_is_squeezed_waits_for_it(monkeypatch) -> None:
    begun, go_on, squeezed = threading.Event(), threading.Event(), []

    def slow(picture: Image.Image) -> str:
        squeezed.append(picture)
        begun.set()
        assert go_on.wait(30)
        return "text"

    monkeypatch.setattr(delivery, "png_base64", slow)
    texts, found = PngTexts(num_takers=3), []
    takers = [
        threading.Thread(target=lambda: found.append(texts.of(_picture(0)))) for _ in range(3)
    ]
    for taker in takers:
        taker.start()
    assert begun.wait(30)
    go_on.set()
    for taker in takers:
        taker.join(30)
    assert found == ["text"] * 3 and len(squeezed) == 1


def test_what_cannot_be_squeezed_fails_for_all_who_wait(monkeypatch) -> None:
    def broken(picture: Image.Image) -> str:
        raise OSError("no memory")

    monkeypatch.setattr(delivery, "png_base64", broken)
    texts = PngTexts(num_takers=3)
    for _ in range(2):
        with pytest.raises(OSError, match="no memory"):
            texts.of(_picture(0))
