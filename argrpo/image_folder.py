"""A folder of pictures and the prompts that they were made for."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.image_files import read_image

_LOG = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SHEET = "grid.png"  # what argrpo sample leaves beside its images


class Picture(NamedTuple):
    """One file."""

    path: Path
    prompt: Prompt


def list_images(folder: Path) -> list[Path]:
    """All pictures under a folder in the order of their paths, without the sheet of argrpo sample.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: no picture is in it.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"images: expected a folder, got {folder}")
    found = _pictures(folder)
    if not found:
        raise ValueError(f"images: expected pictures ({', '.join(SUFFIXES)}), got none in {folder}")
    return found


def with_prompts(paths: Sequence[Path], folder: Path, file: Path | None) -> list[Picture]:
    """Pictures and their prompts.

    Args:
        paths: of `list_images`.
        folder: to which the names in `file` are relative.
        file: .json, an object from file names to prompts; or text, a prompt a line in the order of
            the pictures, each for as many consecutive ones as come on a line; None: no texts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, lacks a picture, or has lines that do not divide the pictures.
    """
    texts = [""] * len(paths) if file is None else _texts(paths, folder, file)
    ids = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    return [
        Picture(path, Prompt(text, prompt_id=ids[text]))
        for path, text in zip(paths, texts, strict=True)
    ]


def with_references(pictures: Sequence[Picture], folder: Path, references: Path) -> list[Picture]:
    """Pictures that judges may compare with those of another folder.

    Args:
        pictures: some have a picture of the same name there, whatever their suffixes; one warning
            counts the others.
        folder: to which their names are relative.
        references: the other folder.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: it has none of these names.
    """
    if not references.is_dir():
        raise NotADirectoryError(f"references: expected a folder, got {references}")
    there = {path.relative_to(references): path for path in _pictures(references)}
    by_stem = {name.with_suffix(""): path for name, path in reversed(there.items())}
    names = [picture.path.relative_to(folder) for picture in pictures]
    # The very name goes before another suffix.
    found = [there.get(name, by_stem.get(name.with_suffix(""))) for name in names]
    if not any(found):
        raise ValueError(
            f"references: expected pictures of the same names, such as {names[0]}, got none in "
            f"{references}"
        )
    if missing := found.count(None):
        first = names[found.index(None)]
        _LOG.warning("references: %d of %d are missing, as of %s", missing, len(names), first)
    return [
        picture._replace(prompt=replace(picture.prompt, reference_path=path))
        for picture, path in zip(pictures, found, strict=True)
    ]


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.name != _SHEET and path.is_file()
    )


def _texts(paths: Sequence[Path], folder: Path, file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"prompts: expected a file, got {file}")
    text = file.read_text(encoding="utf-8")
    if file.suffix.lower() == ".json":
        return _named_texts(text, paths, folder, file)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or len(paths) % len(lines):
        raise ValueError(
            f"prompts: expected a line for each of {len(paths)} images, or for each so many of "
            f"them, got {len(lines)} in {file}"
        )
    repeats = len(paths) // len(lines)
    return [line for line in lines for _ in range(repeats)]


def read_batches(pictures: Sequence[Picture], batch: int) -> Iterator[tuple[int, Tensor]]:
    """Consecutive pictures of one size, at most `batch` at a time.

    Yields:
        The place of the first, and [n, 3, H, W] fp32 in [0, 1].

    Raises:
        UnreadableImageError: a file is no picture.
    """
    start, waiting = 0, list[Tensor]()
    for place, picture in enumerate(pictures):
        image = read_image(picture.path)
        if waiting and (len(waiting) == batch or image.shape != waiting[0].shape):
            yield start, torch.stack(waiting)
            start, waiting = place, []
        waiting.append(image)
    if waiting:
        yield start, torch.stack(waiting)


def _named_texts(text: str, paths: Sequence[Path], folder: Path, file: Path) -> list[str]:
    try:
        named = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"prompts: expected JSON in {file}, got something else: {error}"
        ) from error
    if not isinstance(named, dict):
        raise ValueError(
            f"prompts: expected an object from file names to prompts in {file}, got "
            f"{type(named).__name__}"
        )
    names = [path.relative_to(folder).as_posix() for path in paths]
    missing = [name for name in names if not isinstance(named.get(name), str)]
    if missing:
        raise ValueError(
            f"prompts: expected a text for each image in {file}, got none for {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return [named[name] for name in names]
