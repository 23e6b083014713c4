"""The words of commands that have no config: what is wrong is one line, and no usage."""

from pathlib import Path

import pytest

from argrpo.cli import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "COMMAND: expected a value, got none; argrpo --help lists all"),
        ("sampel", "COMMAND: expected one of demo, train, sample"),
        ("sampel", "got sampel; did you mean sample?"),
        ("report", "run: expected a value, got none; argrpo report --help lists all"),
        ("doctor --cache_dr x", "cache_dr: expected a known setting, got an unknown one; did you"),
        ("doctor now", "now: expected a known setting, got an unknown one; argrpo doctor --help"),
        ("convert llamgen a b", "FORM: expected one of taming, folder"),
        ("convert llamgen a b", "got llamgen; did you mean llamagen?"),
        ("convert folder a b --image_size x", "image_size: expected int, got x"),
        ("convert folder a b --image_size", "image_size: expected a value, got none"),
        ("convert folder a b --dtype float16", "dtype: expected one of float32, bfloat16, got fl"),
    ],
)
def test_a_wrong_word_is_one_line(
    capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1
    assert not printed.out


def test_help_of_a_command_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    assert "taming_transformers" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_named(
    capsys: pytest.CaptureFixture[str], tiny_models: Path
) -> None:
    assert main(["convert", "folder", str(tiny_models / "policy"), "/proc/out"]) == 74
    assert capsys.readouterr().err.startswith("argrpo: /proc/out: expected a place to write, got ")
