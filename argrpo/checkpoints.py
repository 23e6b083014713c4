"""Checkpoints of a run on disk: whole or not there, checked by hash, the newest valid one found.

    checkpoints/step_000100/            after 100 steps
        config.json, model.safetensors  the policy as it is shown, for load_policy
        training.safetensors            what else a resumed run needs: weights where they are not
                                        those shown, masters, moments, averages, generators, judges
        training.json                   counters, settings, position in the run
        manifest.json                   size and SHA-256 of each file; written last
    checkpoints/step_000100_update_02/  2 optimizer steps into step 101, with its rollout
    checkpoints/reference_<hash>/       the frozen reference, once a run, named by its weights
    checkpoints/latest                  a link to the newest

A folder is written under a hidden name and renamed when every byte is on the disk, so a process may
be killed at any instant. What it left under the hidden name is removed by the next save.
"""

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from argrpo.checkpoint_names import LATEST, Position, remove_parts
from argrpo.models.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE
from argrpo.run_folder import point_to, storage_error
from argrpo.tensor_file import FileRecord, record_of, write_bytes, write_tensors

FORMAT = "argrpo-checkpoint"
VERSION = 1
_MANIFEST = "manifest.json"
_TENSORS = "training.safetensors"
_STATE = "training.json"
_FILES = {CONFIG_FILE, WEIGHTS_FILE, _TENSORS, _STATE}
_REFERENCE = re.compile(r"reference_[0-9a-f]+")
_HASH_LEN = 16


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class Snapshot:
    """What a checkpoint holds."""

    position: Position
    model: dict[str, Tensor]  # the policy as it is shown, under published names
    model_config: dict[str, Any]
    tensors: dict[str, Tensor]
    state: dict[str, Any]  # what JSON can hold
    reference: dict[str, Tensor] | None = None  # frozen; None: there is none, or it stands already


class InvalidCheckpoint(ValueError):
    """A folder that is no whole checkpoint; says why."""


def write_checkpoint(
    folder: Path, snapshot: Snapshot, reference: str | None
) -> tuple[Path, str | None]:
    """Write a checkpoint beside the others, and let `latest` lead to it.

    Args:
        folder: of all checkpoints; made where it does not stand.
        snapshot: its tensors are on the CPU, and nothing else writes them.
        reference: the name of the frozen reference's folder, where it stands already.

    Returns:
        The folder, and the name of that of the reference.

    Raises:
        StorageError: the disk is full or refused; all that stood before still stands.
    """
    target = folder / snapshot.position.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_parts(folder)
        if snapshot.reference is not None:
            reference = reference or _write_reference(folder, snapshot.reference)
        part = folder / f".{target.name}.{os.getpid()}.part"
        part.mkdir()
        _write_files(part, snapshot, reference)
        if target.exists():
            shutil.rmtree(target)  # it was not whole, or the run would not come here again
        part.rename(target)
        _flush(folder)
        point_to(folder / LATEST, target)
    except OSError as error:
        with suppress(OSError):
            remove_parts(folder)
        raise storage_error(target, error) from error
    return target, reference


def read_checkpoint(path: Path) -> Snapshot:
    """A checkpoint, every byte of it checked, with its frozen reference if it has one.

    Raises:
        InvalidCheckpoint: it is not whole; the message says what is wrong.
    """
    manifest = _manifest(path)
    _check_files(path, manifest["files"], _FILES)
    state = _json(path / _STATE)
    _check_parts(path.resolve().parent, state.get("optimizer_parts"))
    reference = reference_name(path)
    match state.get("step"), state.get("num_updates"):
        case int(step), int() | None as num_updates:
            position = Position(step, num_updates)
        case other:
            raise InvalidCheckpoint(f"{_STATE}: expected a step, got {other}")
    return Snapshot(
        position,
        _tensors(path / WEIGHTS_FILE),
        _json(path / CONFIG_FILE),
        _tensors(path / _TENSORS),
        state,
        None if reference is None else _read_reference(path.resolve().parent / reference),
    )


def reference_name(path: Path) -> str | None:
    """The name of the folder of a checkpoint's frozen reference, which lies beside it.

    Raises:
        InvalidCheckpoint: there is no manifest.
    """
    name = _manifest(path)["reference"]
    if name is not None and not (isinstance(name, str) and _REFERENCE.fullmatch(name)):
        raise InvalidCheckpoint(f"{_MANIFEST}: expected the name of a reference, got {name!r}")
    return name


def _write_files(part: Path, snapshot: Snapshot, reference: str | None) -> None:
    position = {"step": snapshot.position.step, "num_updates": snapshot.position.num_updates}
    state = {**snapshot.state, **position}
    records = {
        WEIGHTS_FILE: write_tensors(part / WEIGHTS_FILE, snapshot.model),
        CONFIG_FILE: _write_json(part / CONFIG_FILE, snapshot.model_config),
        _TENSORS: write_tensors(part / _TENSORS, snapshot.tensors),
        _STATE: _write_json(part / _STATE, state),
    }
    _write_manifest(part, records, reference)


def _write_manifest(part: Path, records: dict[str, FileRecord], reference: str | None) -> None:
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "files": {name: record._asdict() for name, record in records.items()},
        "reference": reference,
    }
    _write_json(part / _MANIFEST, manifest)
    _flush(part)


def _manifest(path: Path) -> dict[str, Any]:
    if not (path / _MANIFEST).is_file():
        raise InvalidCheckpoint(f"expected {_MANIFEST}, which is written last, got none")
    manifest = _json(path / _MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise InvalidCheckpoint(
            f"{_MANIFEST}: expected {FORMAT} {VERSION}, got {manifest.get('format')} "
            f"{manifest.get('version')}; another version of argrpo wrote it, or nobody did"
        )
    if not isinstance(manifest.get("files"), dict) or "reference" not in manifest:
        raise InvalidCheckpoint(f"{_MANIFEST}: expected files and reference, got others")
    return manifest


def _write_reference(folder: Path, weights: dict[str, Tensor]) -> str:
    """Write the frozen reference under the name of its hash, unless it stands; returns the name."""
    part = folder / f".reference.{os.getpid()}.part"
    part.mkdir()
    record = write_tensors(part / WEIGHTS_FILE, weights)
    _write_manifest(part, {WEIGHTS_FILE: record}, None)
    name = f"reference_{record.sha256[:_HASH_LEN]}"
    if (folder / name).exists():
        # Of a run that ended before it had a checkpoint, or damaged; the same bytes, if whole.
        shutil.rmtree(folder / name)
    part.rename(folder / name)
    return name


def _read_reference(path: Path) -> dict[str, Tensor]:
    try:
        files = _manifest(path)["files"]
        _check_files(path, files, {WEIGHTS_FILE})
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{path.name}: {error}") from error
    if not path.name.endswith(str(files[WEIGHTS_FILE]["sha256"])[:_HASH_LEN]):
        raise InvalidCheckpoint(f"{path.name}: expected the weights of that hash, got others")
    return _tensors(path / WEIGHTS_FILE)


def _check_files(path: Path, listed: dict[str, Any], wanted: set[str]) -> None:
    if listed.keys() != wanted:
        raise InvalidCheckpoint(
            f"{_MANIFEST}: expected the files {', '.join(sorted(wanted))}, got others"
        )
    for name in sorted(wanted):
        file = path / name
        if not file.is_file():
            raise InvalidCheckpoint(f"{name}: expected a file, got none")
        said = listed[name]
        if not isinstance(said, dict) or said.keys() != set(FileRecord._fields):
            raise InvalidCheckpoint(f"{_MANIFEST}: expected size and hash of {name}, got {said!r}")
        if file.stat().st_size != said["num_bytes"]:
            raise InvalidCheckpoint(
                f"{name}: expected {said['num_bytes']} bytes, got {file.stat().st_size}"
            )
        if (found := record_of(file).sha256) != said["sha256"]:
            raise InvalidCheckpoint(
                f"{name}: expected sha256 {said['sha256'][:16]}..., got {found[:16]}..."
            )


def _check_parts(folder: Path, name: object) -> None:
    """An optimizer's parts beside a checkpoint (sharded_state.py). Every rank checks all of them,
    so that all go back to the same checkpoint where one is damaged."""
    if name is None:
        return
    path = folder / str(name)
    try:
        listed = _json(path / "shards.json")
        records = {file: FileRecord(*record)._asdict() for file, record in listed.items()}
        _check_files(path, records, {".metadata", *records})
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{name}: {error}") from error
    except TypeError as error:
        raise InvalidCheckpoint(f"{name}/shards.json: expected sizes and hashes, got others") from (
            error
        )


def _write_json(path: Path, content: dict[str, Any]) -> FileRecord:
    return write_bytes(path, [(json.dumps(content, indent=2) + "\n").encode()])


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{path.name}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(
            f"{path.name}: expected a JSON object, got a {type(content).__name__}"
        )
    return content


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(f"{path.name}: expected a safetensors file, got {error}") from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
