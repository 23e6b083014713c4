"""What a YAML file holds, against what a config has: settings of their own are mappings.

Looked at before jsonargparse reads the file, because it takes a word in the place of a mapping for
the name of another file, and then speaks of that.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

_SHOWN = 60  # characters of a value in a message
_MAPPINGS = (".yaml", ".yml", ".json")


def check_file(path: Path, kind: type) -> None:
    """Refuse a file that cannot be a config of this kind, whatever its values are.

    Args:
        path: a YAML file that is there.
        kind: a frozen dataclass.

    Raises:
        ValueError: it is not UTF-8, or no mapping of settings, or another value stands where
            settings have settings of their own; the place is named. What is no YAML is left to
            the parser.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"config: expected YAML in UTF-8, got something else at byte {error.start} of {path}"
        ) from error
    except yaml.YAMLError:
        return
    if not isinstance(content, dict):
        found = "an empty file" if content is None else _shown(content)
        raise ValueError(f"config: expected a mapping of settings in {path}, got {found}")
    _check_mapping(content, kind, "")


def check_words(words: Sequence[str], kind: type) -> None:
    """Refuse a word, which is no YAML file, behind a flag that has settings of its own.

    Raises:
        ValueError: as `--policy small.pt`; the setting that was wanted is named.
    """
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        nested = _record_at(flag.removeprefix("--").split("."), kind)
        if nested is None or not flag.startswith("--"):
            continue
        if not equals:
            value = words[place + 1] if place + 1 < len(words) else "--"
        if not value.startswith(("--", "{")) and not value.endswith(_MAPPINGS):
            name, first = flag.removeprefix("--"), dataclasses.fields(nested)[0].name
            raise ValueError(
                f"{name}: expected a YAML file of its settings, or one of them by its name, as "
                f"--{name}.{first}, got {_shown(value)}"
            )


def _check_mapping(content: dict[Any, Any], kind: type, prefix: str) -> None:
    kinds: dict[str, Any] = get_type_hints(kind)
    for name, value in content.items():
        inside = kinds.get(name)
        item = get_args(inside)[0] if get_origin(inside) is list else None
        if _is_record(inside) and value is not None:
            _check_record(value, inside, f"{prefix}{name}")
        elif _is_record(item) and isinstance(value, list):
            for row in value:
                _check_record(row, item, f"{prefix}{name}")


def _check_record(value: object, kind: Any, name: str) -> None:
    if isinstance(value, str) and value.endswith(_MAPPINGS):
        return  # a file of its settings, which jsonargparse reads
    if not isinstance(value, dict):
        first = dataclasses.fields(kind)[0].name
        raise ValueError(f"{name}: expected its settings, as {{{first}: ...}}, got {_shown(value)}")
    _check_mapping(value, kind, f"{name}.")


def _record_at(names: Sequence[str], kind: Any) -> Any:
    """The record that a dotted name stands for; None for any other setting."""
    for name in names:
        kind = get_type_hints(kind).get(name) if _is_record(kind) else None
    return kind if _is_record(kind) else None


def _is_record(kind: object) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
