"""Keys and values in pages: the tensors, who holds which page, what the kernel is given.

Rows 0 to R - 1 are the conditional branch of the R slots, rows R to 2R - 1 the unconditional one.
Nothing moves after it is built, so a captured step may keep the addresses; what changes between
steps is written into the same tensors.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from argrpo.engine.page_pool import PagePool
from argrpo.engine.policy import PolicyShape
from argrpo.engine.prefix import PrefixKeys, PrefixStates
from argrpo.engine.schedule import pages_of
from argrpo.kernels.kv_pages import (
    KeyValuePages,
    PrefixAggregate,
    padded_head_dim,
    store_positions,
)
from argrpo.kernels.paged_attention import paged_decode_attention


class PagedCache:
    """A pool of pages and the rows that hold them."""

    def __init__(
        self,
        shape: PolicyShape,
        *,
        num_pages: int,
        page_size: int,
        num_rows: int,
        pages_per_row: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        columns = padded_head_dim(shape.head_dim)
        size = (shape.num_layers, num_pages, shape.num_heads, page_size, columns)
        self._keys = torch.zeros(size, dtype=dtype, device=device)
        self._values = torch.zeros(size, dtype=dtype, device=device)
        self._page_size = page_size
        self.pool = PagePool(num_pages)
        self._held: list[list[int]] = [[] for _ in range(num_rows)]
        self._table = torch.zeros(num_rows, pages_per_row, dtype=torch.int32)
        self.block_table = self._table.to(device, copy=True)  # [2R, pages] int32
        self._is_changed = False
        # As many prefixes as rows: a row's is found through the index, and is often shared.
        heads = (shape.num_heads, shape.head_dim)
        self._value_sums = torch.zeros(shape.num_layers, num_rows, *heads, device=device)
        self._counts = torch.zeros(num_rows, device=device)
        self._prefix_index = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def layer(self, index: int) -> KeyValuePages:
        return KeyValuePages(self._keys[index], self._values[index])

    def aggregate(self, layer: int, num_rows: int) -> PrefixAggregate:
        """The collapsed prefixes of the first rows, as one layer's attention takes them."""
        index = self._prefix_index[:num_rows]
        return PrefixAggregate(self._value_sums[layer], self._counts, index)

    def reserve(self, rows: Iterable[int], num_entries: int) -> None:
        """Give rows pages for so many entries; those that they hold stay. `upload` follows."""
        wanted = pages_of(num_entries, self._page_size)
        for row in rows:
            while len(self._held[row]) < wanted:
                self._append(row, self.pool.take())

    def release(self, rows: Iterable[int]) -> None:
        """Give all pages of some rows back. Their table entries are stale and are never read."""
        for row in rows:
            for page in self._held[row]:
                self.pool.release(page)
            self._held[row].clear()

    def reset(self) -> None:
        """Nobody holds a page, whatever was under way: an interrupted call may have left halves."""
        self.pool = PagePool(self.pool.num_pages)
        self._held = [[] for _ in self._held]

    def check(self) -> None:
        """RuntimeError unless every page is free, or held by the rows that say so."""
        self.pool.check(page for held in self._held for page in held)

    def write_collapsed(self, rows: slice, prefixes: PrefixStates, images: slice) -> None:
        """The collapsed prefixes of some rows.

        Args:
            rows: n rows; their prefixes take the places of the same numbers.
            prefixes: of a draw.
            images: the n images of the draw that the rows draw.
        """
        prompts = prefixes.index[images]
        if len(prefixes.counts) <= len(prompts):
            at = slice(rows.start, rows.start + len(prefixes.counts))
            self._value_sums[:, at] = prefixes.value_sums
            self._counts[at] = prefixes.counts
            self._prefix_index[rows] = prompts + rows.start
        else:
            self._value_sums[:, rows] = prefixes.value_sums[:, prompts]
            self._counts[rows] = prefixes.counts[prompts]
            self._prefix_index[rows] = torch.arange(
                rows.start, rows.stop, device=self._prefix_index.device
            )

    def write_keys(self, rows: slice, prefixes: PrefixKeys, images: slice) -> None:
        """Ordinary prefixes of some rows that hold no page yet: full pages shared, the rest copied.

        Args: as `write_collapsed`.
        """
        prompts = prefixes.prompts[images]
        length = prefixes.keys.shape[2]
        num_full = length // self._page_size
        shared = {prompt: [self.pool.take() for _ in range(num_full)] for prompt in set(prompts)}
        writers: dict[int, int] = {}  # prompt: the row that writes its full pages for all
        for row, prompt in enumerate(prompts, rows.start):
            for page in shared[prompt]:
                self._append(row, self.pool.share(page) if prompt in writers else page)
            writers.setdefault(prompt, row)
        self.reserve(range(rows.start, rows.stop), length)
        border = num_full * self._page_size
        self._store(list(writers.values()), prefixes, list(writers), range(border))
        everyone = list(range(rows.start, rows.stop))
        self._store(everyone, prefixes, prompts, range(border, length))

    def _store(
        self, rows: list[int], prefixes: PrefixKeys, prompts: list[int], places: range
    ) -> None:
        """Put some positions of prompts into the pages of rows, in every layer."""
        if not places:
            return
        device = self.block_table.device
        table = self._table[rows].to(device, non_blocking=True)
        at = torch.arange(places.start, places.stop, device=device).expand(len(rows), -1)
        which = torch.tensor(prompts).to(device, non_blocking=True)
        part = slice(places.start, places.stop)
        for layer in range(len(self._keys)):
            keys, values = prefixes.keys[layer, :, part], prefixes.values[layer, :, part]
            store_positions(self.layer(layer), table, at, keys[which], values[which])

    def upload(self) -> None:
        """Let the device see which pages the rows hold, if that has changed."""
        if self._is_changed:
            # From pageable memory the copy is staged before this returns: the host does not wait
            # for the device, and may write the next change at once.
            self.block_table.copy_(self._table, non_blocking=True)
            self._is_changed = False

    def _append(self, row: int, page: int) -> None:
        self._table[row, len(self._held[row])] = page
        self._held[row].append(page)
        self._is_changed = True


class PagedAttend:
    """Attention of a decode step through the pages: one launch a layer."""

    def __init__(
        self,
        cache: PagedCache,
        entries: Tensor,
        rotary: Tensor | None,
        *,
        collapsed: bool,
    ) -> None:
        """Args:
        cache: its first rows take part.
        entries: [rows] int64, where this step's keys go; -1 for idle rows.
        rotary: [entries, D / 2, 2] fp32, or None for a model without rotary embedding.
        collapsed: whether rows start from the cache's collapsed prefixes.
        """
        self._cache = cache
        self._entries = entries
        self._rotary = rotary
        self._collapsed = collapsed
        self._table = cache.block_table[: len(entries)]

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[rows, 1, 3, H, D] -> [rows, 1, H * D]."""
        q, k, v = qkv[:, 0].unbind(1)
        prefix = self._cache.aggregate(layer, len(qkv)) if self._collapsed else None
        out = paged_decode_attention(
            q, k, v, self._rotary, self._entries, self._cache.layer(layer), self._table, prefix
        )
        return out.flatten(1)[:, None]
