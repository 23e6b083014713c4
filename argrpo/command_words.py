"""argparse for the commands that have no config: what is wrong is one line, as everywhere."""

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn


class CommandWords(argparse.ArgumentParser):
    """A parser that raises where argparse would print its usage and end the process."""

    def error(self, message: str) -> NoReturn:
        """ValueError: `name: expected this, got that; remedy`."""
        raise ValueError(_in_one_line(message, self.prog, self._known()))

    def _known(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]


def _in_one_line(message: str, command: str, flags: Sequence[str]) -> str:
    """What argparse says, in our words."""
    if match := re.fullmatch(
        r"argument (\S+): invalid choice: '(.*)' \(choose from (.+)\)", message
    ):
        choices = match[3].replace("'", "").split(", ")
        return (
            f"{_name(match[1])}: expected one of {', '.join(choices)}, got {match[2]}"
            f"{_close(match[2], choices)}"
        )
    if match := re.fullmatch(r"argument (\S+): invalid (\w+) value: '(.*)'", message):
        return f"{_name(match[1])}: expected {match[2]}, got {match[3]}"
    if match := re.fullmatch(r"argument (\S+): expected one argument", message):
        return f"{_name(match[1])}: expected a value, got none"
    if match := re.fullmatch(r"the following arguments are required: (.+)", message):
        return f"{match[1].split(', ')[0]}: expected a value, got none; {command} --help lists all"
    if match := re.fullmatch(r"unrecognized arguments: (.+)", message):
        flag = match[1].split()[0].partition("=")[0]
        hint = _close(flag, flags) or f"; {command} --help lists them"
        return f"{_name(flag)}: expected a known setting, got an unknown one{hint}"
    return f"{command}: {message}"


def _name(argument: str) -> str:
    return argument.removeprefix("--")


def _close(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {_name(close[0])}?" if close else ""
