"""LlamaGen's rotary embedding: a table of angles over a grid of tokens.

Source: FoundationVision/LlamaGen at ce98ec4, gpt.py precompute_freqs_cis_2d.
"""

import torch
from torch import Tensor


def grid_rotary_table(grid_size: int, head_dim: int, *, prefix_len: int, base: float) -> Tensor:
    """Cosines and sines of a prefix and of a square grid, row by row.

    The first half of a head's pairs turns with the row, the second half with the column. The
    prefix has zeros, which make its queries and keys zero.

    Args:
        grid_size: tokens a side.
        head_dim: numbers of a head, divisible by 4.
        prefix_len: positions before the grid.
        base: of the frequencies.

    Returns:
        [prefix_len + grid_size^2, head_dim / 2, 2] fp32 on the CPU.
    """
    num_frequencies = head_dim // 4
    # On the CPU whatever the default device is, so that every device has the same bits.
    exponents = torch.arange(num_frequencies, dtype=torch.float32, device="cpu") / num_frequencies
    places = torch.arange(grid_size, dtype=torch.float32, device="cpu")
    angles = torch.outer(places, 1.0 / base**exponents)
    rows = angles[:, None, :].expand(-1, grid_size, -1)
    columns = angles[None, :, :].expand(grid_size, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    table = torch.stack([grid.cos(), grid.sin()], dim=-1)
    return torch.cat([table.new_zeros(prefix_len, *table.shape[1:]), table])
