"""Prompts from files and data sets, one row a prompt.

    .json    a list of strings or of objects, AR-GRPO's conversations, or COCO's captions
    .jsonl   an object or a string a line
    .csv .tsv   with a header line, such as PartiPrompts; where the header has no comma, as in
                LlamaGen's caption file, commas belong to the text
    .txt     a line a prompt
    hub:NAME or a folder   a data set of the package datasets (extra `text`)

Beside the text, where there are such columns: class_id, an integer, and reference_image, the path
of a picture relative to the file, for judges that compare with one.

What happens to odd rows: text stays as it is, whatever its script; rows that are empty or white
are left out, and one warning counts them; a text that stands there twice is two prompts; a row
without a text, or a file that is not UTF-8, is refused by its number.

Sources: Kwai-Klear/AR-GRPO at 65947ad, lazy_dataset.py; the caption files of cocodataset.org.
"""

import csv
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_LOG = logging.getLogger(__name__)

_COLUMNS = ("prompt", "text", "caption")
_KEPT = (*_COLUMNS, "class_id", "reference_image")
_HUB = "hub:"
_MAX_FIELD = 131_072  # characters of a field that Python's csv takes
_QUOTED = re.compile(r'"(?:[^"]|"")*"')

Row = object
"""A string, or an object with the text in one of its columns."""


class PromptRow(NamedTuple):
    """A row of a source."""

    text: str
    class_id: int | None = None
    reference_image: Path | None = None  # a file that is there


def read_rows(source: str, *, column: str | None = None, split: str = "train") -> list[PromptRow]:
    """The prompts of a source, in their order.

    Args:
        source: a file, a folder of a saved data set, or hub:NAME.
        column: which one holds the text; None takes the first of prompt, text and caption that is
            there, in any case.
        split: of a data set.

    Raises:
        FileNotFoundError: there is no such file, or no such reference image.
        ValueError: another format, a row without text, or no prompt at all; the message names the
            row.
    """
    rows = list(_rows(source, split))
    folder = Path(source).parent if Path(source).is_file() else Path()
    found: list[PromptRow] = []
    for number, row in enumerate(rows):
        place = f"{source}: row {number}"
        text = _text(row, column, place)
        if text.strip():
            found.append(PromptRow(text, _class_id(row, place), _reference(row, folder, place)))
    if not found:
        raise ValueError(f"{source}: expected prompts, got {len(rows)} rows and no text in them")
    if len(found) < len(rows):
        _LOG.warning("%s: left out %d rows without text", source, len(rows) - len(found))
    return found


def _rows(source: str, split: str) -> Iterator[Row]:
    path = Path(source)
    if source.startswith(_HUB) or path.is_dir():
        return _data_set(source, split)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file, a folder or hub:NAME, got {source}")
    kinds = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".txt": _lines}
    if path.suffix.lower() not in kinds:
        raise ValueError(f"{source}: expected one of {', '.join(kinds)}, got {path.suffix!r}")
    return kinds[path.suffix.lower()](path)


def _read(path: Path) -> str:
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front, which is no part of a header.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8, got something else at byte {error.start}; save it again"
        ) from error


def _lines(path: Path) -> Iterator[Row]:
    # Not splitlines(), to which characters inside a prompt end a line, too.
    lines = _read(path).replace("\r\n", "\n").split("\n")
    # The end of the last line is no prompt.
    return iter(lines[:-1] if lines[-1] == "" else lines)


def _json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got something else: {error}") from error
    if isinstance(value, dict) and isinstance(value.get("annotations"), list):
        value = value["annotations"]  # COCO's, whose captions are the prompts
    if not isinstance(value, list):
        raise ValueError(
            f"{path}: expected a list, or COCO's object with annotations, got "
            f"{type(value).__name__}"
        )
    return iter(value)


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path)):
        assert isinstance(line, str)
        try:
            # A line without anything is a row without text.
            yield json.loads(line) if line.strip() else ""
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: row {number}: expected JSON, got {line[:80]!r}") from error


def _csv(path: Path) -> Iterator[Row]:
    lines = _read(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
    if path.suffix.lower() == ".csv" and "," in lines[0] and "\t" not in lines[0]:
        return _with_commas(path, lines)
    return _with_tabs(path, lines)


def _with_commas(path: Path, lines: list[str]) -> Iterator[Row]:
    reader = csv.DictReader((line + "\n" for line in lines), strict=True)
    try:
        for number, row in enumerate(reader):
            if None in row:
                raise ValueError(
                    f"{path}: row {number}: expected {len(row) - 1} fields, got more; put a text "
                    "with commas in quotes"
                )
            yield row
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {reader.line_num}: expected fields of up to {_MAX_FIELD} characters "
            f"with matching quotes, got {error}"
        ) from error


def _with_tabs(path: Path, lines: list[str]) -> Iterator[Row]:
    """A single quote of a text is part of it here: PartiPrompts has some at the start of a field,
    where csv would take it for the field's own."""
    header, *rest = [[_unquoted(field) for field in line.split("\t")] for line in lines]
    for number, fields in enumerate(rest):
        if len(fields) > len(header):
            raise ValueError(
                f"{path}: row {number}: expected {len(header)} fields, got {len(fields)}"
            )
        yield dict(zip(header, fields + [""] * (len(header) - len(fields)), strict=True))


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if _QUOTED.fullmatch(field) else field


def _data_set(source: str, split: str) -> Iterator[Row]:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(
            f"{source}: expected the package datasets for it, got none; pip install 'argrpo[text]'"
        ) from error
    if source == _HUB:
        raise ValueError("expected hub:NAME, as hub:me/prompts, got hub: without a name")
    try:
        if source.startswith(_HUB):
            found = datasets.load_dataset(source.removeprefix(_HUB), split=split)
        elif _is_saved(Path(source)):
            loaded = datasets.load_from_disk(source)
            found = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            found = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{source}: expected a data set with a split {split}, got {reason}"
        ) from error
    texts = [name for name in found.column_names if name.lower() in _KEPT]
    return iter(found.select_columns(texts) if texts else found)


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it; `load_dataset` reads every other folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _text(row: Row, column: str | None, place: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: expected a text or an object, got {type(row).__name__}")
    if column is None and "conversations" in row:
        return _first_turn(row["conversations"], place)
    wanted = _COLUMNS if column is None else (column,)
    names = {str(name).strip().lower(): name for name in reversed(list(row))}
    for name in wanted:
        if name.lower() in names:
            value = row[names[name.lower()]]
            # A field that is missing at the end of a line, or null, is a row without text.
            if value is None or isinstance(value, str):
                return value or ""
            raise ValueError(f"{place}: {name}: expected a text, got {value!r}")
    listed = ", ".join(map(str, row)) or "none"
    raise ValueError(
        f"{place}: expected a column {' or '.join(wanted)}, got {listed}; name it by prompt_column"
    )


def _first_turn(turns: object, place: str) -> str:
    """What a person says first: AR-GRPO's prompt."""
    if isinstance(turns, Sequence) and turns and isinstance(turns[0], Mapping):
        value = turns[0].get("value")
        if isinstance(value, str):
            return value
    raise ValueError(f"{place}: conversations: expected a first turn with a value, got {turns!r}")


def _class_id(row: Row, place: str) -> int | None:
    value = row.get("class_id") if isinstance(row, Mapping) else None
    if value is None or value == "":
        return None
    try:
        return int(str(value))
    except ValueError as error:
        raise ValueError(f"{place}: class_id: expected an integer, got {value!r}") from error


def _reference(row: Row, folder: Path, place: str) -> Path | None:
    value = row.get("reference_image") if isinstance(row, Mapping) else None
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: reference_image: expected the path of a picture, got {type(value).__name__}"
        )
    path = folder / Path(value).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{place}: reference_image: expected a picture, got {path}")
    return path
