"""What the processes of a run tell each other. One process alone is a run of one rank.

Every exchange begins with a meeting: one small integer tensor, reduced on the CPU. A rank that
failed comes to the next meeting with its message, and all leave there with a `PeerError`; so no
rank waits in an exchange for one that will not come. A process that was killed closes its
connections, which ends a meeting at once.

Shapes: R ranks, n rows of one, N rows of all.
"""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_MESSAGE_BYTES = 1024
_TELL_WAIT = timedelta(minutes=1)
_LOST = 74  # the machine's exit code, see argrpo/cli.py


class PeerError(RuntimeError):
    """Another rank failed, and so this one cannot go on."""

    def __init__(self, message: str, code: int = _LOST) -> None:
        """`code` is the exit code of the rank that failed."""
        super().__init__(message, code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


def num_ranks() -> int:
    """Processes of the run."""
    return dist.get_world_size() if _are_several() else 1


def own_rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if _are_several() else 0


def is_first() -> bool:
    """Whether this is the rank that writes files and speaks to the user."""
    return own_rank() == 0


def meet(place: str, *, wish: bool = False) -> bool:
    """Wait for all ranks.

    Args:
        place: where in the program, for messages; the same on every rank.
        wish: something that one rank may want and all have to do, as to save and stop.

    Returns:
        Whether any rank had the wish.

    Raises:
        PeerError: a rank failed, died, stands elsewhere in the program, or did not come in time.
    """
    if not _are_several():
        return wish
    name = zlib.crc32(place.encode())
    failed, wished, highest, lowest = _largest([0, int(wish), name, -name], place)
    if failed:
        _raise_what_was_told()
    if highest != -lowest:
        raise PeerError(f"ranks: expected all at {place!r}, got one that stands elsewhere", 1)
    return bool(wished)


@contextmanager
def node_leader_first(place: str) -> Iterator[None]:
    """Inside, the first process of each machine goes first; the others find what it left on disk.

    Raises:
        PeerError: a rank failed.
    """
    leads = not _are_several() or dist.get_node_local_rank(fallback_rank=own_rank()) == 0
    if not leads:
        meet(place)
    yield
    if leads:
        meet(place)


def tell_failure(message: str, code: int) -> str | None:
    """Take a failure of this rank to the next meeting of the others; its last word.

    Waits a minute at most: a rank that comes later finds the connection closed.

    Args:
        message: for the user, cut after about a thousand bytes.
        code: the exit code of this process, above 0; the others end with it too.

    Returns:
        What to tell the user; None where a rank before this one failed too, and speaks.
    """
    if not _are_several():
        return message
    try:
        state = torch.tensor([1, 0, 0, 0])
        done = dist.all_reduce(state, op=dist.ReduceOp.MAX, async_op=True)
        assert done is not None
        done.wait(_TELL_WAIT)
        failures = _exchanged(message, code)
    except RuntimeError:
        failures = {}  # nobody is there to be told
    is_lowest = min(failures, default=own_rank()) == own_rank()
    return f"rank {own_rank()}: {message}" if is_lowest else None


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """Rows of all ranks, in the order of the ranks, the same on every one.

    Args:
        rows: [n, C], n may differ between ranks; on a device that the process group serves.

    Returns:
        [N, C] of all ranks, and where in it this rank's own rows are.

    Raises:
        PeerError: a rank failed.
    """
    if not _are_several():
        return rows, slice(0, len(rows))
    meet("gather_rows")
    own_count = torch.tensor([len(rows)])
    counts = [torch.empty_like(own_count) for _ in range(num_ranks())]
    dist.all_gather(counts, own_count)
    lengths = [int(count) for count in counts]
    # all_gather wants one size from everyone.
    padded = rows.new_zeros(max(lengths), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    own = sum(lengths[: own_rank()])
    together = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return together, slice(own, own + len(rows))


def gather_images(values: Tensor, image_ids: Tensor) -> Tensor:
    """What is known of each image, from all ranks, in the order of the images.

    So every later sum runs in the same order, however many ranks there are.

    Args:
        values: [n, C] of this rank's images, on a device that the process group serves.
        image_ids: [n] int64 on the CPU; all ranks together hold 0 to N - 1.

    Returns:
        [N, C], row i of image i; the same on every rank.

    Raises:
        PeerError: a rank failed.
    """
    if not _are_several():
        return values[image_ids.argsort()]
    together, _ = gather_rows(values)
    ids, _ = gather_rows(image_ids[:, None])
    return together[ids[:, 0].argsort()]


def gather_json(value: Any) -> list[Any]:
    """What JSON can say, from every rank, in the order of the ranks.

    Raises:
        PeerError: a rank failed.
    """
    if not _are_several():
        return [value]
    line = f"{json.dumps(value)}\n".encode()
    together, _ = gather_rows(torch.tensor(list(line), dtype=torch.uint8)[:, None])
    return [json.loads(part) for part in bytes(together.flatten().tolist()).splitlines()]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over the ranks of a tensor of one shape; written in place and returned.

    Raises:
        PeerError: a rank failed.
    """
    if _are_several():
        meet("sum_over_ranks")
        dist.all_reduce(values)
    return values


def count_over_ranks(count: int) -> int:
    """The sum over the ranks of a number.

    Raises:
        PeerError: a rank failed.
    """
    return int(sum_over_ranks(torch.tensor(count)))


def expect_alike(name: str, values: Tensor) -> None:
    """Check that all ranks hold the same numbers.

    Args:
        name: what they are, in words, for the message.
        values: [K] int64 or fp64, on the CPU.

    Raises:
        ValueError: they differ; raised by all ranks.
        PeerError: a rank failed.
    """
    if not _are_several():
        return
    every, _ = gather_rows(values[None])
    # Bits, because NaN is not equal to itself.
    different = (every.view(torch.int64) != every[0].view(torch.int64)).any(dim=1).nonzero()
    if len(different):
        raise ValueError(
            f"{name}: expected the same on every rank, got others on rank {int(different[0])} than "
            "on rank 0"
        )


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _largest(state: list[int], place: str) -> list[int]:
    values = torch.tensor(state)
    try:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PeerError(
            f"ranks: expected all {num_ranks()} at {place!r}, got {reason}; one of them died or "
            "hangs, and its own output says why"
        ) from error
    return [int(value) for value in values]


def _raise_what_was_told() -> None:
    try:
        failures = _exchanged("", 0)
    except RuntimeError as error:
        raise PeerError("ranks: one failed, and died before it said why") from error
    rank, (code, message) = min(failures.items())
    raise PeerError(f"rank {rank} failed: {message}", code)


def _exchanged(message: str, code: int) -> dict[int, tuple[int, str]]:
    """Code and message of each rank that failed; those that did not send code 0."""
    words = message.encode()[:_MESSAGE_BYTES]
    own = torch.zeros(1 + _MESSAGE_BYTES, dtype=torch.uint8)
    own[0] = code
    own[1 : 1 + len(words)] = torch.tensor(list(words), dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(num_ranks())]
    dist.all_gather(every, own)
    told = {rank: bytes(part.tolist()) for rank, part in enumerate(every)}
    return {
        rank: (part[0], part[1:].rstrip(b"\0").decode(errors="ignore"))
        for rank, part in told.items()
        if part[0]
    }
