"""Each rank keeps a stretch of the rows of every weight: where it lies, and two exchanges of them.

    reduce_scatter   gradients of all rows on every rank -> the sums of the own rows
    all_gather       the own rows of every rank -> all rows on every rank

Rows are dealt as `torch.chunk` deals them, as DTensor's Shard(0) does: ceil(n / R) to each rank,
fewer or none to the last. A shard is padded to ceil(n / R) rows, so that all have one size. Small
tensors travel together, because a message costs as much as some hundred kilobytes.

Shapes: R ranks, n rows of a weight, S = ceil(n / R) rows of a shard.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from argrpo.ranks import meet, num_ranks, own_rank

try:
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:  # before torch 2.14, under other names
    all_gather_single = dist.all_gather_into_tensor  # type: ignore[assignment]
    reduce_scatter_single = dist.reduce_scatter_tensor  # type: ignore[assignment]

_BUCKET_BYTES = 64 * 2**20


def shard_rows(num_rows: int) -> int:
    """S of a weight with so many rows."""
    return -(-num_rows // num_ranks())


def own_rows(num_rows: int) -> slice:
    """The rows of a weight that this rank keeps."""
    size = shard_rows(num_rows)
    first = min(own_rank() * size, num_rows)
    return slice(first, min(first + size, num_rows))


def shard_of(tensor: Tensor) -> Tensor:
    """A copy of the own rows of a tensor [n, ...]: [S, ...], zeros behind the last row."""
    return padded(tensor[own_rows(len(tensor))], len(tensor)).clone()


def padded(own: Tensor, num_rows: int) -> Tensor:
    """The own rows of a weight of so many, with zeros behind up to S; itself where none miss."""
    missing = shard_rows(num_rows) - len(own)
    if not missing:
        return own
    return torch.cat([own, own.new_zeros(missing, *own.shape[1:])])


def reduce_scatter(tensors: list[Tensor]) -> list[Tensor]:
    """The own rows of the sums over the ranks.

    Args:
        tensors: [n, ...] each, of one dtype; the same shapes on every rank.

    Returns:
        [S, ...] each, rows behind the last are zeros.

    Raises:
        PeerError: a rank failed.
    """
    meet("reduce_scatter")
    shards = []
    for bucket in _buckets(tensors):
        sent = torch.cat([_dealt(tensor) for tensor in bucket], dim=1)
        received = sent.new_empty(sent.shape[1])
        reduce_scatter_single(received, sent.flatten())
        shapes = [(shard_rows(len(tensor)), *tensor.shape[1:]) for tensor in bucket]
        shards += _split(received, shapes)
    return shards


def all_gather(shards: list[Tensor], targets: list[Tensor]) -> None:
    """Write the rows of every rank into whole tensors, in place.

    Args:
        shards: [S, ...] each, of one dtype; this rank's.
        targets: [n, ...] each; cast to their dtype.

    Raises:
        PeerError: a rank failed.
    """
    meet("all_gather")
    places = iter(targets)
    for bucket in _buckets(shards):
        sent = torch.cat([shard.flatten() for shard in bucket])
        received = sent.new_empty(num_ranks() * len(sent))
        all_gather_single(received, sent)
        by_rank = received.view(num_ranks(), -1)
        ends = _ends([shard.numel() for shard in bucket])
        for (first, last), shard in zip(pairwise(ends), bucket, strict=True):
            target = next(places)
            rows = by_rank[:, first:last].reshape(-1, *shard.shape[1:])
            target.copy_(rows[: len(target)])


def _dealt(tensor: Tensor) -> Tensor:
    """[R, S * ...]: the rows of each rank, zeros behind the last."""
    missing = shard_rows(len(tensor)) * num_ranks() - len(tensor)
    if missing:
        tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return tensor.reshape(num_ranks(), -1)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _split(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    ends = _ends([torch.Size(shape).numel() for shape in shapes])
    return [flat[a:b].view(shape) for (a, b), shape in zip(pairwise(ends), shapes, strict=True)]


def _ends(sizes: list[int]) -> list[int]:
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return ends
