"""Images as the npz file that ADM's evaluator reads, written and read a part at a time.

    arr_0   uint8 [N, H, W, 3]; levels by a rule of argrpo/pixels.py, LlamaGen's by default
    arr_1   int64 [N], the class of each image, where it was drawn for one

A file of 50,000 images of 256 pixels has 9.8 GB; one part of it is in memory. The same images make
the same bytes: entries are stored as they are, under one date.

Shapes: N images, n of a part.

Source: openai/guided-diffusion at 22e0df8, evaluations/evaluator.py and scripts/image_sample.py.
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from argrpo.run_folder import write_atomically

IMAGES, LABELS = "arr_0", "arr_1"
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can have
_BROKEN = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError)


class _Entry(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


def write_samples(
    path: Path, parts: Iterable[Tensor], count: int, others: Mapping[str, np.ndarray]
) -> None:
    """Write images and small arrays beside them, whole or not at all.

    Args:
        path: the npz file.
        parts: [n, H, W, 3] uint8 on the CPU, together `count` images of one size.
        count: N.
        others: arrays that fit into memory, by name.

    Raises:
        StorageError: the disk is full or refused; nothing is left.
    """
    write_atomically(path, lambda part: _write(part, parts, count, others))


def has_images(path: Path) -> bool:
    """Whether a path is an npz file with images."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return f"{IMAGES}.npy" in archive.namelist()


def count_images(path: Path) -> int:
    """N of a file.

    Raises:
        ValueError: it holds no images, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as stream:
            return _header(path, stream).shape[0]
    except (*_BROKEN, KeyError) as error:
        raise _unreadable(path, error) from error


def read_samples(path: Path, batch: int) -> Iterator[Tensor]:
    """The images of a file in order, [n, H, W, 3] uint8, `batch` of them a part.

    Raises:
        ValueError: it holds no images, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as stream:
            entry = _header(path, stream)
            size = int(np.prod(entry.shape[1:]))
            for first in range(0, entry.shape[0], batch):
                rows = min(batch, entry.shape[0] - first)
                data = _read(stream, rows * size)
                yield torch.frombuffer(data, dtype=torch.uint8).view(rows, *entry.shape[1:])
    except (*_BROKEN, KeyError) as error:
        raise _unreadable(path, error) from error


def _write(
    path: Path, parts: Iterable[Tensor], count: int, others: Mapping[str, np.ndarray]
) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        written = 0
        with archive.open(_info(IMAGES), "w", force_zip64=True) as stream:
            for part in parts:
                if written == 0:
                    _write_header(stream, (count, *part.shape[1:]))
                stream.write(part.contiguous().numpy().data)
                written += len(part)
        assert written == count, f"expected {count} images, got {written}"
        for name, values in others.items():
            with archive.open(_info(name), "w") as stream:
                np.lib.format.write_array(stream, values, allow_pickle=False)


def _info(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy", date_time=_DATE)


def _write_header(stream: IO[bytes], shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def _header(path: Path, stream: IO[bytes]) -> _Entry:
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"a header of version 1 or 2 was expected, got {version}")
    shape, is_fortran, dtype = readers[version](stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or is_fortran:
        raise ValueError(f"expected uint8 [N, H, W, 3], got {dtype} {list(shape)}")
    return _Entry(shape, dtype)


def _read(stream: IO[bytes], count: int) -> bytearray:
    data = bytearray()
    while len(data) < count:
        piece = stream.read(count - len(data))
        if not piece:
            raise EOFError("the images end too early")
        data += piece
    return data


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{IMAGES}: expected images, uint8 [N, H, W, 3], in {path}: {error}")
