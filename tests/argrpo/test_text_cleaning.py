"""Captions are cleaned as LlamaGen cleaned those that its policies learned from."""

import json
import sys
import time
from pathlib import Path

import pytest

from argrpo.text_cleaning import MAX_CHARACTERS, clean


def test_captions_come_out_as_the_published_code_has_them(golden: Path) -> None:
    case = json.loads((golden / "text_cleaning" / "case.json").read_text(encoding="utf-8"))
    assert len(case["captions"]) > 40
    for caption, cleaned in case["captions"]:
        assert clean(caption, "llamagen") == cleaned, caption


def test_what_is_not_asked_for_is_not_done() -> None:
    assert clean("  A Dog #12 ", "lower") == "a dog #12"
    assert clean("  A Dog #12 ", "none") == "  A Dog #12 "


def test_a_huge_prompt_is_cut_before_it_takes_minutes() -> None:
    started = time.monotonic()
    # One word of a million characters: the pattern for file names looks at each pair of places.
    cleaned = clean("x" * 1_000_000, "llamagen")
    assert len(cleaned) <= MAX_CHARACTERS
    assert time.monotonic() - started < 20, "a second or two where nothing else runs"


def test_markup_without_its_parser_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bs4", None)
    assert clean("a dog", "llamagen") == "a dog"
    with pytest.raises(ValueError, match=r"beautifulsoup4 .* pip install 'argrpo\[text\]'"):
        clean("a <b>dog</b>", "llamagen")
