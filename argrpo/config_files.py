"""From flags and YAML files to a frozen config.

jsonargparse does the parsing; this file adds what it leaves to its callers: presets by name, one
clear line for what is wrong, and lists as people type them.
"""

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from argrpo.config_shapes import check_file, check_words

_CONFIG = "--config"

TEXTS = ""
"""Of `parse_config`'s lists: the words are texts, also those that look like a number or a list."""

# How jsonargparse says that it does not know a name; the groups are the name's parts.
_UNKNOWN = (
    r"unrecognized arguments: (.+)",
    r"Group '(.+?)' does not accept option '(.+?)'",
    r"Parser key \"(.+?)\":.*Option '(.+?)' is not accepted",
    r"Option '(.+?)' is not accepted",
)

_NO_NUMBERS = ("nan", "inf", "infinity", ".nan", ".inf")

Config = TypeVar("Config")


def parse_config(
    kind: type[Config], arguments: Sequence[str], *, command: str, lists: Mapping[str, str | None]
) -> Config:
    """A config from flags, and from the YAML file that --config names under them.

    Args:
        kind: a frozen dataclass; the docstrings under its fields are the help of the flags.
        arguments: the command line behind the command's name.
        command: how help calls the program, as `argrpo train`.
        lists: flags that take several values in a row, as --labels 207 360; where a value is a
            record, the key that a bare word stands for; `TEXTS` where each word is a text. A flag
            replaces the whole list of a file.

    Raises:
        ValueError: a flag, key or value that the config does not take; one line.
        FileNotFoundError: the config file is neither there nor a preset.
        SystemExit: --help or --print_config was asked for and printed.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=command,
        usage=f"{command} [--config FILE.yaml] [--setting value ...]",
        description=_description(kind),
        exit_on_error=False,
        # An abbreviation in a script means something else once a setting of that name is added.
        allow_abbrev=False,
    )
    parser.add_argument(
        _CONFIG,
        action="config",
        help="YAML file, or the name of a preset; flags behind it change single settings.",
    )
    parser.add_class_arguments(kind, None)
    words = _with_presets(_with_joined_lists(arguments, lists))
    for path in _config_paths(words):
        check_file(path, kind)
    check_words(words, kind)
    try:
        parsed = parser.parse_args(words)
    except ArgumentError as error:
        raise ValueError(_in_one_line(str(error), _flags(parser))) from error
    return _built(kind, parsed, "")


def preset_names() -> list[str]:
    """File names of the presets that come with the package."""
    return sorted(item.name for item in _presets().iterdir() if item.name.endswith(".yaml"))


def config_file(name: str) -> Path:
    """The file itself where it is there, else the preset of that name.

    Raises:
        FileNotFoundError: neither is there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    stem = name if name.endswith(".yaml") else f"{name}.yaml"
    if stem in preset_names():
        return Path(str(_presets() / stem))
    raise FileNotFoundError(
        f"config: expected a YAML file or one of the presets {', '.join(preset_names())}, "
        f"got {name}"
    )


def _presets() -> Traversable:
    return resources.files("argrpo") / "configs"


def _description(kind: type) -> str:
    return (kind.__doc__ or "").partition("\n\n")[0]


def _flags(parser: ArgumentParser) -> list[str]:
    names = [action.dest for action in parser._actions]
    return [name for name in names if not name.endswith("help")]


def _built(kind: type[Config], values: Namespace, prefix: str) -> Config:
    """A config from what was parsed. A record refuses its fields by their own names; here they get
    those that flags and files know, as rollout.top_p."""
    kinds: dict[str, Any] = get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        name, inside = field.name, kinds[field.name]
        value = values[name]
        item = get_args(inside)[0] if get_origin(inside) is list else None
        if isinstance(inside, type) and dataclasses.is_dataclass(inside):
            value = _built(inside, value, f"{prefix}{name}.")
        elif isinstance(item, type) and dataclasses.is_dataclass(item):
            value = [_built(item, record, f"{prefix}{name}.") for record in value]
        found[name] = value
    try:
        return kind(**found)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(prefix) else prefix + message) from error


def _with_presets(arguments: Sequence[str]) -> list[str]:
    """The arguments with the file behind each --config found."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] == _CONFIG:
            found.append(str(config_file(argument)))
        elif argument.startswith(f"{_CONFIG}="):
            found.append(f"{_CONFIG}={config_file(argument.partition('=')[2])}")
        else:
            found.append(argument)
    return found


def _config_paths(words: Sequence[str]) -> list[Path]:
    """The files that --config names, in order."""
    behind = [Path(after) for word, after in itertools.pairwise(words) if word == _CONFIG]
    return behind + [Path(w.partition("=")[2]) for w in words if w.startswith(f"{_CONFIG}=")]


def _with_joined_lists(arguments: Sequence[str], lists: Mapping[str, str | None]) -> list[str]:
    """`--labels 207 360` as `--labels [207, 360]`, which is what jsonargparse takes.

    Records are emptied first: jsonargparse would merge them one by one into those of the file, and
    a judge would get the options of another.
    """
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.partition("=")
        key = lists.get(name)
        if key:
            joined.append(f"{name}=[]")
        if equals and name in lists and (key == TEXTS or not value.startswith(("[", "{"))):
            rest.insert(0, value)
            flag = name
        joined.append(flag)
        if flag not in lists:
            continue
        words: list[str] = []
        while rest and not rest[0].startswith("--"):
            words.append(rest.pop(0))
        if key != TEXTS and words and words[0].startswith(("[", "{")):
            joined.extend(words)
        elif words:
            values = [_value_of(word, key) for word in words]
            joined.append(json.dumps(values, ensure_ascii=False))
    return joined


def _value_of(word: str, key: str | None) -> object:
    if key is None:
        return _scalar(word)
    return word if key == TEXTS else {key: word}


def _scalar(word: str) -> int | float | str:
    with suppress(ValueError):
        return int(word)
    # Not by float(), to which names like nan and infinity are numbers.
    return float(word) if re.fullmatch(r"[+-]?\d+\.\d+", word) else word


def _in_one_line(message: str, flags: list[str]) -> str:
    """jsonargparse's report as `name: expected this, got that`."""
    flat = " ".join(message.split())
    for pattern in _UNKNOWN:
        if match := re.search(pattern, flat):
            return _unknown(".".join(match.groups()), flags)
    if match := re.search(r"the following arguments are required: (.+)", flat):
        names = match[1]
        return f"{names}: expected a value, got none; give a flag or --config FILE.yaml"
    if match := re.search(r"argument (?:\w+/)?--([^\s+:/]+)\S*: expected one argument", flat):
        return f"{match[1]}: expected a value, got none"
    if match := re.search(r"Problems parsing config: (.+)", flat):
        return f"config: expected YAML, got something else: {match[1]}"
    if match := re.search(r'Parser key "(.+?)": (.*)', flat):
        return f"{match[1]}: {_value(match[2])}"
    return flat


def _unknown(name: str, flags: list[str]) -> str:
    bare = name.split()[0].removeprefix("--").partition("=")[0]
    close = difflib.get_close_matches(bare, flags, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; --help lists them"
    return f"{bare}: expected a known setting, got an unknown one{hint}"


def _value(text: str) -> str:
    """What jsonargparse says of a value, with types as YAML calls them."""
    if match := re.search(r"any of the Union subtypes Subtypes: \[(.+?)\] Errors: .*", text):
        value = text.rpartition("Given value: ")[2]
        return f"expected {_type_names(match[1]).replace(', ', ' or ')}, got {value}"
    if match := re.search(r"Expected an? (.+?)\. Got value: (.*?)(?= - Expected|$)", text):
        if "float" in match[1] and match[2].strip("+-").lower() in _NO_NUMBERS:
            return f"expected a finite number, got {match[2]}"
        return f"expected {_type_names(match[1])}, got {match[2]}"
    return text


def _type_names(text: str) -> str:
    if match := re.fullmatch(r"typing\.Literal\[(.+)\]", text):
        return f"one of {match[1]}".replace("'", "")
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("NoneType", "null")
