"""The state of an optimizer on disk in parts: each rank writes its own rows, and any number of
ranks, one too, reads the rows that it keeps.

    NAME/                 a folder of torch.distributed.checkpoint (DCP)
        __0_0.distcp ...  the rows of a rank
        .metadata         which rows lie where; written when all of them do
        shards.json       size and SHA-256 of each file; written last, before the folder is named

No rank holds more than its own rows, where a whole state would take 12 bytes a weight on the first.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from argrpo.ranks import gather_json, gather_rows, is_first, meet, num_ranks, own_rank
from argrpo.row_shards import own_rows
from argrpo.run_folder import StorageError, storage_error
from argrpo.tensor_file import FileRecord, record_of, write_bytes

_MANIFEST = "shards.json"


def write_shards(path: Path, own: Mapping[str, Tensor]) -> None:
    """Write a state whole or not at all. All ranks call it together.

    Args:
        path: the folder, which all ranks see; replaced where it stands.
        own: the own rows of each tensor, dealt as row_shards.py deals them; what has no rows is
            the same on all ranks.

    Raises:
        StorageError: a disk is full or refused; nothing has the folder's name.
        PeerError: another rank failed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        if is_first():
            for stale in (part, path):  # of a run that ended here, and goes on again
                shutil.rmtree(stale, ignore_errors=True)
            part.mkdir(parents=True)
        meet("shards")
        dcp.save(_spread(own), checkpoint_id=part, no_dist=num_ranks() == 1)
        _write_manifest(part)
        if is_first():
            part.rename(path)
    except OSError as error:
        raise storage_error(path, error) from error
    except CheckpointException as error:
        raise StorageError(f"{path}: expected files that can be written, got {error}") from error
    meet("shards written")


def read_shards(path: Path) -> dict[str, Tensor]:
    """The own rows of a state, or all of it where there is one rank. All ranks call it together.

    Raises:
        ValueError: the folder is not whole; the message says why.
        PeerError: another rank failed.
    """
    _check_files(path)
    meet("shards checked")
    listed = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    targets = {name: _blank(name, found) for name, found in listed.items()}
    dcp.load(targets, checkpoint_id=path, no_dist=num_ranks() == 1)
    return {name: _local(tensor) for name, tensor in targets.items()}


def _spread(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as parts of whole ones."""
    if num_ranks() == 1:
        return dict(own)
    names = [name for name, rows in own.items() if rows.dim()]
    lengths = torch.tensor([len(own[name]) for name in names])
    totals = gather_rows(lengths[None])[0].sum(dim=0).tolist()
    parts = dict(own)
    for name, total in zip(names, totals, strict=True):
        parts[name] = _part(own[name], total)
    return parts


def _part(rows: Tensor, num_rows: int) -> DTensor:
    shape = torch.Size([num_rows, *rows.shape[1:]])
    world = dist.group.WORLD
    assert world is not None
    mesh = DeviceMesh.from_group(world, rows.device.type)
    stride = torch.empty(shape, device="meta").stride()
    rows = rows.contiguous()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _blank(name: str, found: STORAGE_TYPES) -> Tensor:
    if not isinstance(found, TensorStorageMetadata):
        raise ValueError(f"{name}: expected a tensor, got something else")
    dtype, shape = found.properties.dtype, found.size
    if num_ranks() == 1 or not shape:
        return torch.empty(shape, dtype=dtype)
    rows = own_rows(shape[0])
    return _part(torch.empty(rows.stop - rows.start, *shape[1:], dtype=dtype), shape[0])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _write_manifest(part: Path) -> None:
    # Each rank reads what it wrote itself; the first one also the table of all.
    own = [*part.glob(f"__{own_rank()}_*"), *(part.glob(".metadata") if is_first() else [])]
    records = {path.name: list(record_of(path)) for path in own}
    together = {name: record for some in gather_json(records) for name, record in some.items()}
    if is_first():
        write_bytes(part / _MANIFEST, [(json.dumps(together, indent=2) + "\n").encode()])


def _check_files(path: Path) -> None:
    """Sizes of all files, and the hashes of this rank's share of them."""
    try:
        listed = json.loads((path / _MANIFEST).read_text())
        records = {name: FileRecord(*record) for name, record in sorted(listed.items())}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected {_MANIFEST}, written last, got {error}") from error
    for place, (name, record) in enumerate(records.items()):
        file = path / name
        size = file.stat().st_size if file.is_file() else 0
        if size != record.num_bytes:
            raise ValueError(f"{file}: expected {record.num_bytes} bytes, got {size}")
        is_own = place % num_ranks() == own_rank()
        if is_own and record_of(file) != record:
            raise ValueError(f"{file}: expected the bytes that were written, got others")
