"""Encoded texts on disk: computed once, read by every run that asks for the same.

One folder an encoder and its settings, named by their hash; in it shards, each a safetensors file
of some texts, named by the hash of what it holds:

    features  [R, C]  the rows of its texts, one after another
    lengths   [n]     int64, valid positions of each text
    has_end   [n]     bool, whether one more row follows them: the encoder's last position
    is_cut    [n]     bool, whether the text had more tokens than fit
    metadata  keys    JSON list of n hashes, one a text

A shard is written under a hidden name and moved to its place whole. Of several processes that lack
texts one encodes while the others wait at a lock, and then read. Who finds all texts needs neither
the lock nor the right to write.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from argrpo.encoded_texts import EncodedText
from argrpo.run_folder import StorageError, storage_error, write_atomically

_VERSION = 1  # raise it when the same settings make other features


class TextCache:
    """The encoded texts of one encoder and one set of settings."""

    def __init__(self, cache_dir: Path, settings: dict[str, object]) -> None:
        """
        Args:
            cache_dir: holds one folder for each settings; made when something is written.
            settings: all that shapes features beside the text itself.
        """
        record = json.dumps({"version": _VERSION, **settings}, sort_keys=True)
        self._settings = record
        self._folder = cache_dir / hashlib.sha256(record.encode()).hexdigest()[:16]

    def find(self, texts: Sequence[str]) -> dict[str, EncodedText]:
        """Those of the texts that are there. Features are mapped, not read.

        Raises:
            ValueError: a shard is damaged, named.
        """
        wanted = {_key(text): text for text in texts}
        found: dict[str, EncodedText] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            for entry in _entries(path, wanted.keys()):
                found[wanted[entry.key]] = entry.text
        return found

    def add(self, texts: Sequence[str], encoded: Sequence[EncodedText]) -> None:
        """Write a shard.

        Raises:
            StorageError: the disk is full or refused; no half-written shard is left.
        """
        keys = [_key(text) for text in texts]
        tensors = {
            "features": torch.cat([torch.cat([text.features, text.end]) for text in encoded]),
            "lengths": torch.tensor([len(text.features) for text in encoded]),
            "has_end": torch.tensor([len(text.end) > 0 for text in encoded]),
            "is_cut": torch.tensor([text.is_cut for text in encoded]),
        }
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:32]
        metadata = {"keys": json.dumps(keys), "settings": self._settings}
        path = self._folder / f"{name}.safetensors"
        try:
            write_atomically(path, lambda part: save_file(tensors, part, metadata=metadata))
        except SafetensorError as error:  # its form of a full disk
            raise StorageError(
                f"{path}: expected room for a file, got {error}; nothing was left half-written"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock, waiting for another process that encodes.

        Raises:
            StorageError: the folder cannot be made or written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / ".lock").open("w")
        except OSError as error:
            raise storage_error(self._folder, error) from error
        with lock:
            # Closing the file lets go of the lock, also when the process is killed.
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class _Entry(NamedTuple):
    key: str
    text: EncodedText


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _entries(path: Path, wanted: Iterable[str]) -> Iterator[_Entry]:
    """The texts of a shard that are wanted."""
    kept = set(wanted)
    try:
        with safe_open(path, framework="pt") as file:
            keys = json.loads((file.metadata() or {})["keys"])
            if kept.isdisjoint(keys):
                return
            features = file.get_tensor("features")
            lengths = file.get_tensor("lengths").tolist()
            has_end = file.get_tensor("has_end").tolist()
            is_cut = file.get_tensor("is_cut").tolist()
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"text_encoder: {path}: expected a whole shard of encoded texts, got a damaged one "
            f"({error}); remove it, and its texts are encoded again"
        ) from error
    start = 0
    for key, length, ends, cut in zip(keys, lengths, has_end, is_cut, strict=True):
        stop = start + length
        if key in kept:
            end = features[stop : stop + int(ends)]
            yield _Entry(key, EncodedText(features[start:stop], end, cut))
        start = stop + int(ends)
