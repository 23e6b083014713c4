"""A warning is written once, by us or by the library that has a way of its own."""

import logging

import pytest

from argrpo.warning_lines import WarningLines


def test_a_warning_is_one_line_unless_its_library_writes_it_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = WarningLines()
    theirs = logging.StreamHandler()
    logging.getLogger("own_way").addHandler(theirs)
    logging.getLogger("silent").addHandler(logging.NullHandler())
    try:
        for name in ("argrpo.data", "silent.part", "own_way.part"):
            handler.emit(logging.LogRecord(name, logging.WARNING, "", 0, "of %s", (name,), None))
    finally:
        logging.getLogger("own_way").removeHandler(theirs)
    assert capsys.readouterr().err == (
        "argrpo: warning: of argrpo.data\nargrpo: warning: of silent.part\n"
    )
