"""The paged cache of keys and values: its layout, who writes what, what an op checks of it.

A pool of pages a layer, [page, head, position, D]: one head's page is one contiguous stream. A
sequence names its pages in a row of a block table. Pages that several sequences name are full and
only read; the page that a sequence stores into is its own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.kernels._checks import FLOATS, expect

PAGE_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128


class KeyValuePages(NamedTuple):
    """One layer's cache. Columns past D hold zeros; `store_positions` and the op keep them so."""

    keys: Tensor  # [num_pages, Hkv, page_size, padded_head_dim(D)]
    values: Tensor  # the same


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class PrefixAggregate:
    """Prefixes whose keys are zero, as what one layer's attention needs of them."""

    value_sums: Tensor  # [P, Hkv, D] fp32, sum of V over the prefix
    counts: Tensor  # [P] fp32, its length
    index: Tensor  # [B] int64, which of the P a sequence has


def padded_head_dim(head_dim: int) -> int:
    """Columns of a cache row: the next multiple of 8, so that rows start on 16 bytes."""
    return -(-head_dim // 8) * 8


def store_positions(
    pages: KeyValuePages, block_table: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Put rotated keys, and values, into their pages: how an ordinary prefix gets there.

    Args:
        pages: the cache of one layer, written in place.
        block_table: [B, N], pages of the B sequences.
        positions: [B, S] int64, places of the S tokens in each sequence.
        keys, values: [B, S, Hkv, D].
    """
    page_size, head_dim = pages.keys.shape[2], keys.shape[-1]
    page = block_table.long().gather(1, positions // page_size)
    for side, new in zip(pages, (keys, values), strict=True):
        side[page, :, positions % page_size, :head_dim] = new.to(side.dtype)
        if head_dim < side.shape[-1]:
            side[page, :, positions % page_size, head_dim:] = 0


def check_step(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor | None, positions: Tensor) -> None:
    expect("q", q, (None, None, None), FLOATS, contiguous=False)
    batch, num_heads, head_dim = q.shape
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected an even head size of at most {MAX_HEAD_DIM}, got {head_dim}")
    expect("k", k, (batch, None, head_dim), (q.dtype,), contiguous=False)
    if k.shape[1] == 0 or num_heads % k.shape[1]:
        raise ValueError(f"k: expected a divisor of {num_heads} heads, got {k.shape[1]}")
    expect("v", v, tuple(k.shape), (q.dtype,), contiguous=False)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(2) != 1:
            raise ValueError(
                f"{name}: expected a last dimension without gaps, got strides "
                f"{list(tensor.stride())}; call .contiguous() first"
            )
    if rotary is not None:
        expect("rotary", rotary, (None, head_dim // 2, 2), (torch.float32,))
    expect("positions", positions, (batch,), (torch.int64, torch.int32))


def check_cache(
    q: Tensor, k: Tensor, pages: KeyValuePages, block_table: Tensor, prefix: PrefixAggregate | None
) -> None:
    batch, num_kv_heads, head_dim = k.shape
    columns = padded_head_dim(head_dim)
    expect("pages.keys", pages.keys, (None, num_kv_heads, None, columns), FLOATS)
    expect("pages.values", pages.values, tuple(pages.keys.shape), (pages.keys.dtype,))
    if pages.keys.shape[2] not in PAGE_SIZES:
        raise ValueError(
            f"pages.keys: expected a page size in {PAGE_SIZES}, got {pages.keys.shape[2]}"
        )
    expect("block_table", block_table, (batch, None), (torch.int32,))
    if not block_table.shape[1]:
        raise ValueError("block_table: expected at least one page a sequence, got none")
    if prefix is None:
        return
    expect("prefix.value_sums", prefix.value_sums, (None, num_kv_heads, head_dim), (torch.float32,))
    expect("prefix.counts", prefix.counts, (len(prefix.value_sums),), (torch.float32,))
    expect("prefix.index", prefix.index, (batch,), (torch.int64,))
