"""Published names without a network: a hub that does not answer is asked once, and never again."""

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import CLIPImageProcessor

from argrpo import hub_reach
from argrpo.data import Prompt
from argrpo.hub_reach import HubOutOfReachError, hub_within_reach
from argrpo.rewards.clip import ClipReward

_CPU = torch.device("cpu")
_COMMIT = "0" * 40


class _Session:
    """The hub's client, as far as it is asked here."""

    def __init__(self, *, answers: bool = False) -> None:
        self._answers = answers
        self.asked: list[str] = []

    def head(self, url: str, timeout: float) -> str:
        self.asked.append(url)
        if not self._answers:
            raise ConnectionError("no route to host")
        return "here"


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[_Session]:
    """No network, and nothing in the cache."""
    session = _Session()
    monkeypatch.setattr(hub_reach, "get_session", lambda: session)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield session
    assert constants.HF_HUB_OFFLINE is False
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"pretrained: expected the tag openai in the cache or fetched, .* not answer; "
            r"fetch timm/vit_base_patch32_clip_224\.openai elsewhere, and give the path of its",
        ),
        (
            {"model": "owner/clip"},
            r"model: expected owner/clip in the cache .* and give the path of its folder",
        ),
        (
            {"model": "hf-hub:owner/clip"},
            r"model: expected hf-hub:owner/clip .* fetch owner/clip elsewhere, and give local-dir:",
        ),
    ],
)
def test_what_cannot_be_fetched_is_missed_at_once_in_one_line(
    session: _Session, options: dict[str, Any], message: str, capfd, caplog
) -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match=rf"rewards\.clip\.options\.{message}") as refused:
        ClipReward(**options, device=_CPU)
    # Retries would take 30 s and more; a busy machine takes a few to import what reads the files.
    assert time.perf_counter() - started < 15
    assert "\n" not in str(refused.value)
    assert session.asked == [constants.ENDPOINT]
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_cannot_be_fetched_is_named_beside_a_folder_that_is_there(
    session: _Session, clip_folder, tmp_path: Path
) -> None:
    clip_folder[1].save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"tokenizer: expected owner/words in the cache"):
        ClipReward(str(tmp_path / "clip"), tokenizer="owner/words", device=_CPU)


def test_what_is_cached_is_read_without_the_hub(session: _Session, clip_folder) -> None:
    folder, _ = clip_folder
    cached = Path(constants.HF_HUB_CACHE) / "models--owner--clip"
    shutil.copytree(folder, cached / "snapshots" / _COMMIT)
    side = {"height": 32, "width": 32}
    CLIPImageProcessor(size=side, crop_size=side).save_pretrained(cached / "snapshots" / _COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(_COMMIT)
    images, prompts = torch.rand(2, 3, 32, 32), [Prompt("a cat"), Prompt("a dog")]
    scores = ClipReward("owner/clip", device=_CPU)(images, prompts)
    assert session.asked == [constants.ENDPOINT]
    wanted = ClipReward(str(folder), device=_CPU)(images, prompts)
    # A library's product may sum in another order where weights lie at other addresses.
    torch.testing.assert_close(scores, wanted, atol=1e-6, rtol=0)


def test_local_files_ask_for_no_hub(session: _Session, clip_folder, tower_files) -> None:
    ClipReward(str(clip_folder[0]), device=_CPU)
    ClipReward("argrpo-tiny", tower_files[0], device=_CPU)
    assert session.asked == []


def test_a_hub_that_hangs_is_not_waited_for(session: _Session, monkeypatch) -> None:
    stopping = threading.Event()
    monkeypatch.setattr(hub_reach, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(session, "head", lambda url, timeout: stopping.wait(60))
    started = time.perf_counter()
    with hub_within_reach():
        assert constants.is_offline_mode()
    stopping.set()
    assert time.perf_counter() - started < 30


def test_a_hub_that_answers_is_left_to_its_library(session: _Session, monkeypatch) -> None:
    monkeypatch.setattr(hub_reach, "get_session", lambda: _Session(answers=True))
    with pytest.raises(LocalEntryNotFoundError), hub_within_reach():
        assert not constants.is_offline_mode()
        raise LocalEntryNotFoundError("gone")


def test_other_failures_are_not_blamed_on_the_hub(session: _Session) -> None:
    with pytest.raises(ValueError, match="damaged"), hub_within_reach():
        raise ValueError("damaged")
    with pytest.raises(HubOutOfReachError), hub_within_reach():
        try:
            raise LocalEntryNotFoundError("gone")
        except LocalEntryNotFoundError:
            raise FileNotFoundError("in a library's own words")  # noqa: B904
