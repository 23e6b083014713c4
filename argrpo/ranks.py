"""What the processes of a run tell each other. One process alone is a run of one rank."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """Rows of all ranks, in the order of the ranks, the same on every one.

    Args:
        rows: [n, C], n may differ between ranks; on the device that the process group serves.

    Returns:
        [N, C] of all ranks, and where in it this rank's own rows are.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return rows, slice(0, len(rows))
    own_count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own_count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own_count)
    lengths = [int(count) for count in counts]
    # all_gather wants one size from everyone.
    padded = rows.new_zeros(max(lengths), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    own = sum(lengths[: dist.get_rank()])
    together = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return together, slice(own, own + len(rows))
