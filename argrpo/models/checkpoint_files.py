"""Weights on disk, read without running code from the file and written whole or not at all.

A checkpoint is a torch file (weights_only, with an allow-list), a safetensors file, or a folder
with config.json and safetensors, whole or in shards. Weights are mapped into memory where the
format allows it, so reading one does not yet cost its size.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from argrpo.models.inert_globals import LIGHTNING, first_global, stand_in

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"

# LlamaGen's training files carry their command line as a Namespace: a plain record.
_ALLOWED_GLOBALS = (argparse.Namespace,)

# Where a torch file may keep its weights, in LlamaGen's order; a dict of tensors is bare weights.
_WRAPPERS = ("model", "module", "state_dict")
# What torch.compile and DDP put before every key.
_KEY_PREFIXES = re.compile(r"^(?:_orig_mod\.|module\.)+")

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_PICKLE_MAGICS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_GIT_LFS_MAGIC = b"version https://git-lfs"
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, the format's own limit

_SAFER = (
    "ask its author for safetensors, or convert it once on a machine that you can afford to lose"
)

# A damaged pickle can fail in any of its opcodes and a damaged zip in any of its seeks; torch lets
# the error of each of them through.
_DAMAGE = (
    OSError,
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    OverflowError,
    struct.error,
    SafetensorError,
)


class Checkpoint(NamedTuple):
    """What a file or folder says."""

    path: Path
    weights: dict[str, Tensor]  # by key, without the prefixes of torch.compile and DDP
    config: dict[str, object] | None  # config.json of a folder
    training_image_size: object = None  # of the command line in a training file: a hint, no fact


def read_checkpoint(path: str | Path, *, inert: tuple[str, ...] = ()) -> Checkpoint:
    """Read a checkpoint in any of the formats above.

    Args:
        path: a file or a folder.
        inert: packages whose classes a torch file may name: empty stand-ins take their place.

    Raises:
        FileNotFoundError: nothing stands at the path, or a file of a folder is missing.
        ValueError: it is damaged, or no checkpoint, or would have to run code to be read.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a checkpoint file or folder, got nothing there")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(_ZIP_MAGIC) or head.startswith(_LEGACY_TORCH_MAGIC):
        return _read_torch(path, inert, can_map=head.startswith(_ZIP_MAGIC))
    if _is_safetensors(head):
        return Checkpoint(path, _without_prefixes(path, _read_safetensors(path)), None)
    if head.startswith(_GIT_LFS_MAGIC):
        raise ValueError(f"{path}: expected a checkpoint, got a Git LFS pointer; run git lfs pull")
    if head.startswith(_PICKLE_MAGICS):
        raise ValueError(_pickle_refused(path))
    found = "an empty file" if not head else f"a file that starts with {head[:16]!r}"
    raise ValueError(f"{path}: expected a torch or safetensors checkpoint, got {found}")


def write_folder(
    folder: str | Path, weights: Mapping[str, Tensor], config: Mapping[str, object]
) -> None:
    """Write config.json and model.safetensors to a new folder, whole or not at all.

    They are written beside it under a hidden name, which is then renamed.

    Args:
        folder: does not exist yet, or is empty. Its parents are made.
        weights: by key, any device.
        config: what JSON can hold.

    Raises:
        ValueError: the folder holds something.
        OSError: it cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder, got one that holds something")
    part = folder.parent / f".{folder.name}.{os.getpid()}.part"
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{folder}: expected a place to write, got {error.strerror}") from error
    try:
        save_file(dict(weights), part / WEIGHTS_FILE, metadata={"format": "pt"})
        (part / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        part.rename(folder)
    except SafetensorError as error:  # its form of a full disk
        raise OSError(f"{folder}: could not be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def first_keys(keys: Iterable[str]) -> str:
    """Some keys for a message: the first three in order, and how many more there are."""
    ordered = sorted(keys)
    rest = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + rest


def _read_folder(path: Path) -> Checkpoint:
    config = _read_json(path / CONFIG_FILE)
    index_file = path / _INDEX_FILE
    if (path / WEIGHTS_FILE).exists() or not index_file.exists():
        weights = _read_safetensors(path / WEIGHTS_FILE)
    else:
        weights = _read_shards(path, _read_json(index_file))
    return Checkpoint(path, _without_prefixes(path, weights), config)


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected in a checkpoint folder, got nothing there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the decoder or of the parser
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def _read_shards(path: Path, index: dict[str, object]) -> dict[str, Tensor]:
    """The weights that an index names, from the shards it names."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / _INDEX_FILE}: expected a weight_map of keys to files, got none")
    weights: dict[str, Tensor] = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name:
            raise ValueError(f"{path / _INDEX_FILE}: expected shards beside it, got {name!r}")
        weights.update(_read_safetensors(path / name))
    missing = weight_map.keys() - weights.keys()
    if missing:
        raise ValueError(
            f"{path}: expected every key of {_INDEX_FILE} in a shard, got none of "
            f"{first_keys(missing)}"
        )
    return weights


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes of header length, then JSON."""
    if len(head) < 9:
        return False
    return head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_SAFETENSORS_HEADER


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected in a checkpoint folder, got nothing there")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except _DAMAGE as error:
        raise _damaged(path, "a whole safetensors file", error) from error


def _read_torch(path: Path, inert: tuple[str, ...], *, can_map: bool) -> Checkpoint:
    content = _load_torch(path, inert, can_map=can_map)
    weights = _unwrapped(path, content)
    image_size = getattr(content.get("args"), "image_size", None)
    return Checkpoint(path, _without_prefixes(path, weights), None, image_size)


def _load_torch(path: Path, inert: tuple[str, ...], *, can_map: bool) -> Any:
    """What a torch file holds, by PyTorch's reader that calls nothing but what is allowed."""
    stand_ins: dict[str, type] = {}
    while True:
        allowed: list[Any] = [
            *_ALLOWED_GLOBALS,
            *((kind, name) for name, kind in stand_ins.items()),
        ]
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
        except _DAMAGE as error:
            refused = re.search(r"GLOBAL ([\w.]+)", str(error))
            if refused is None:
                raise _damaged(path, "a whole torch checkpoint", error) from error
            # The reader names one class at a time.
            name = refused[1].rstrip(".")
            kind = stand_in(name, inert)
            if kind is None or name in stand_ins:
                raise ValueError(_code_refused(path, name)) from error
            stand_ins[name] = kind


def _code_refused(path: Path, name: str) -> str:
    is_lightning = name.partition(".")[0] in LIGHTNING
    remedy = (
        "if taming-transformers wrote it, argrpo convert taming reads it"
        if is_lightning
        else _SAFER
    )
    return (
        f"{path}: expected weights and plain values, got the pickled global {name}, which could "
        f"run code; {remedy}"
    )


def _pickle_refused(path: Path) -> str:
    name = first_global(path)
    which = f"with the global {name}" if name else "without a global near its start"
    return (
        f"{path}: expected a torch or safetensors checkpoint, got a plain pickle {which}, and "
        f"reading one can run code; {_SAFER}"
    )


def _damaged(path: Path, expected: str, error: Exception) -> ValueError:
    first_sentence = re.split(r"\. |\n", str(error).strip())[0] or type(error).__name__
    return ValueError(f"{path}: expected {expected}, got a damaged one ({first_sentence})")


def _unwrapped(path: Path, content: object) -> dict[str, Tensor]:
    """The weights inside what a torch file holds."""
    expected = f"weights, bare or under one of the keys {', '.join(_WRAPPERS)}"
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected {expected}, got a {type(content).__name__}")
    inside = next((content[key] for key in _WRAPPERS if key in content), content)
    if not isinstance(inside, Mapping) or not inside:
        raise ValueError(f"{path}: expected {expected}, got none")
    strange = [key for key, value in inside.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(
            f"{path}: expected {expected}, got other values under {first_keys(map(str, strange))}"
        )
    return {str(key): value for key, value in inside.items()}


def _without_prefixes(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stripped: dict[str, Tensor] = {}
    for key, weight in weights.items():
        short = _KEY_PREFIXES.sub("", key)
        if short in stripped:
            raise ValueError(f"{path}: expected every weight once, got two for {short}")
        stripped[short] = weight
    return stripped
