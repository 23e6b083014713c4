"""safetensors files whose SHA-256 is known when they are written, and read back in one pass.

The library writes a file in one call; a checkpoint would have to be read again to be hashed, which
for gigabytes is what writing them costs. So the format, which is a length, a JSON header and bytes,
is written here; the library reads it.

Source: the format of huggingface/safetensors, README.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 16 * 2**20  # bytes; large enough that hashing releases the interpreter, small in memory
_ALIGNMENT = 8


class FileRecord(NamedTuple):
    """What a manifest says of a file."""

    num_bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write tensors to a new safetensors file, and flush it to the disk.

    Args:
        path: of the file.
        tensors: on the CPU, by name; the dtypes of `_NAMES`.

    Raises:
        ValueError: a dtype that the file cannot hold.
        OSError: the disk is full or refused.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            names = ", ".join(_NAMES.values())
            raise ValueError(f"{name}: expected one of {names}, got {tensor.dtype}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    parts = (_bytes_of(tensor) for tensor in tensors.values())
    return write_bytes(path, [len(text).to_bytes(8, "little") + text], parts)


def write_bytes(path: Path, *groups: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file part by part, and flush it to the disk.

    Raises:
        OSError: the disk is full or refused.
    """
    digest, count = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for group in groups:
            for part in group:
                for chunk in _chunks(memoryview(part)):
                    written = 0
                    while written < len(chunk):  # a disk that fills up takes a part only
                        written += file.write(chunk[written:])
                    digest.update(chunk)
                    count += len(chunk)
        os.fsync(file.fileno())
    return FileRecord(count, digest.hexdigest())


def record_of(path: Path) -> FileRecord:
    """Size and hash of a file that stands.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(file.tell(), digest.hexdigest())


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _chunks(data: memoryview) -> Iterable[memoryview]:
    return (data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK))
