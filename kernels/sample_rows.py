"""One token from each row of fp32 logits: filters, draw, log-prob, entropy, kept set; one launch.

One program owns one row. Up to V = 16,384 it reads the row once, in 16-byte loads, and keeps it in
the registers of 16 warps (32 values a thread); everything after is arithmetic on chip. A longer
row is read again in each pass. Conditional log-probs read the conditional row twice more.

A row's bits follow from its logits wherever it stands in a batch. One exception: where V is no
multiple of 4, a slice of a tensor may start at an address that 16 does not divide; it is then read
in smaller loads, laid out in another way, and its sums may differ in the last place.

Per row and pass over it, V = 16,384:

    read            64 KiB once, from the L2 that the product filled; 256 KiB with both branches
                    and conditional log-probs, 192 KiB without guidance
    top-k, top-p    10 to 18 rounds each (filter_search.py): compare, add, one reduction
    draw            32 noise values a thread
    write           2 KiB of kept set when asked for, 20 bytes otherwise

128 rows are 8.4 MB: 2.0 us at 4.3 TB/s, 3.9 us with the writing of the logits by the product. The
rounds are the cost: by count 0.35 us each (4 instructions a logit, one row a multiprocessor), so 4
to 6 us for k or p and 8 to 12 us for both, beside 3 us for the draw (60 instructions a logit).
There is no product, so 790 TFLOP/s do not enter.

Logits here are measured from the row's maximum, in units of ln 2 x temperature, so that each
exponential is one instruction.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from argrpo.kernels.counter_random import gumbel_log2, random_bits, row_keys
from argrpo.kernels.draw import Draw, DrawKeys, DrawSettings
from argrpo.kernels.filter_search import find_edges, load_block, row_extent

_ON_CHIP = 16384  # logits a program keeps in registers
_MAX_WARPS = 16  # 32 values a thread: more of them spill, more warps have too few registers
_WARP_WIDTH = 128  # logits of a part a warp: one 16-byte load a thread
_STREAMED_WARPS = 8  # for a row that is too long to keep
_STREAMED_PARTS = 8
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
# Below every distance that matters: beside a weight of 0 it stands for -inf, and 0 x -inf is NaN.
_FAR = tl.constexpr(-1000.0)


def sample_rows(
    logits: Tensor,
    uncond_logits: Tensor | None,
    keys: DrawKeys,
    settings: DrawSettings,
    *,
    cond_logprobs: bool = False,
    support: bool = False,
) -> Draw:
    """Launch the row kernel.

    Args:
        logits: [B, V] fp32; those of the conditional branch if `uncond_logits` is given.
        uncond_logits: [B, V] fp32, or None where guidance is mixed already or off.
        keys: seed, image ids and positions that fix the randomness.
        settings: guidance scale, temperature, top_k and top_p.
        cond_logprobs: also score the token under `logits` alone, without guidance and filters.
        support: also return the kept set.
    """
    num_rows, vocab_size = logits.shape
    device = logits.device
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    scores = torch.empty(3, num_rows, dtype=torch.float32, device=device)
    kept = None
    if support:
        kept = torch.empty(num_rows, -(-vocab_size // 8), dtype=torch.uint8, device=device)
    tile = row_tile(vocab_size)
    _sample_rows[(num_rows,)](
        logits,
        logits if uncond_logits is None else uncond_logits,
        settings.scalars,
        *keys,
        token_ids,
        scores,
        token_ids if kept is None else kept,
        V=vocab_size,
        WIDTH=tile.width,
        PARTS=tile.parts,
        GUIDED=uncond_logits is not None,
        COND=cond_logprobs,
        FILTERED=settings.filtered,
        SUPPORT=support,
        num_warps=tile.num_warps,
    )
    logprobs, entropies, cond = scores.unbind()
    return Draw(token_ids, logprobs, entropies, cond if cond_logprobs else None, kept)


class RowTile(NamedTuple):
    """How a program holds its row."""

    width: int  # logits a part
    parts: int  # parts a block; one block stays on chip if it is the whole row
    num_warps: int


def row_tile(vocab_size: int) -> RowTile:
    """The tile for rows of this length. Depends on nothing else, so that bits do not."""
    if vocab_size > _ON_CHIP:
        return RowTile(_STREAMED_WARPS * _WARP_WIDTH, _STREAMED_PARTS, _STREAMED_WARPS)
    num_warps = max(1, triton.next_power_of_2(vocab_size) * _MAX_WARPS // _ON_CHIP)
    width = num_warps * _WARP_WIDTH
    return RowTile(width, triton.cdiv(vocab_size, width), num_warps)


@triton.jit
def _sample_rows(
    logits_ptr, uncond_ptr, scalars_ptr, seed_ptr, image_ids_ptr, positions_ptr,
    token_ids_ptr, scores_ptr, support_ptr,
    V: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    GUIDED: tl.constexpr, COND: tl.constexpr, FILTERED: tl.constexpr, SUPPORT: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)  # int64: B x V passes 2^31
    row = (logits_ptr + index * V, uncond_ptr + index * V, tl.load(scalars_ptr))
    temperature = tl.load(scalars_ptr + 1)
    greedy = temperature <= 0
    per_unit = _LOG2_E / tl.where(greedy, 1.0, temperature)
    score_ptr = scores_ptr + index
    if COND:
        cond_top, cond_total = _cond_sums(row, per_unit, V, WIDTH, PARTS)
    x = load_block(row, 0, V, WIDTH, PARTS, GUIDED)
    extent = row_extent(x, row, V, WIDTH, PARTS, GUIDED)
    edges = (extent[1], extent[0], V)
    if FILTERED:
        top_k = tl.load(scalars_ptr + 2).to(tl.int32)
        top_p = tl.load(scalars_ptr + 3)
        edges = find_edges(x, row, extent, per_unit, top_k, top_p, V, WIDTH, PARTS, GUIDED)

    seed, image_id = tl.load(seed_ptr), tl.load(image_ids_ptr + index)
    key = row_keys(seed, image_id, tl.load(positions_ptr + index))
    noise_scale = tl.where(greedy, 0.0, 1.0)
    totals = tl.full((WIDTH,), 0, tl.float32)
    moments = tl.full((WIDTH,), 0, tl.float32)
    best = tl.full((WIDTH,), -float("inf"), tl.float32)
    best_ids = tl.arange(0, WIDTH)
    for start in range(0, V, WIDTH * PARTS):
        block = x if WIDTH * PARTS >= V else load_block(row, start, V, WIDTH, PARTS, GUIDED)
        for part in tl.static_range(PARTS):
            value = block[part]
            first = start + part * WIDTH
            ids = first + tl.arange(0, WIDTH)
            distance = (value - extent[0]) * per_unit
            if FILTERED:
                kept = (value >= edges[0]) & ((ids <= edges[2]) | (value >= edges[1]))
                distance = tl.where(kept, distance, -float("inf"))
                if SUPPORT:
                    _store_bits(support_ptr + index * ((V + 7) // 8), kept, first, V, WIDTH)
            weight = tl.exp2(distance)
            totals += weight
            moments += weight * tl.maximum(distance, _FAR)
            noisy = distance + noise_scale * gumbel_log2(random_bits(ids, key[0], key[1]))
            best_ids = tl.where(noisy > best, ids, best_ids)
            best = tl.maximum(best, noisy)

    # Equal values go to the lowest token id; a row of NaN gives some token in range.
    token = tl.min(tl.where(best == tl.max(best), best_ids, V - 1))
    log_total = tl.log2(tl.sum(totals))
    entropy = log_total - tl.sum(moments) / tl.sum(totals)
    drawn = tl.load(row[0] + token)
    num_rows = tl.num_programs(0)
    if COND:
        cond = (drawn - cond_top) * per_unit - tl.log2(cond_total)
        tl.store(score_ptr + 2 * num_rows, certain_if(greedy, cond * _LN_2))
    if GUIDED:
        uncond = tl.load(row[1] + token)
        drawn = uncond + row[2] * (drawn - uncond)
    logprob = (drawn - extent[0]) * per_unit - log_total
    tl.store(token_ids_ptr + index, token.to(tl.int64))
    tl.store(score_ptr, certain_if(greedy, logprob * _LN_2))
    tl.store(score_ptr + num_rows, certain_if(greedy, entropy * _LN_2))


@triton.jit
def _cond_sums(row, per_unit, V: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Largest conditional logit, and the sum of the exponentials of the distances from it."""
    top = tl.full((WIDTH,), -float("inf"), tl.float32)
    for start in range(0, V, WIDTH * PARTS):
        block = load_block(row, start, V, WIDTH, PARTS, False)
        for part in tl.static_range(PARTS):
            top = tl.maximum(top, block[part])
    largest = tl.max(top)
    totals = tl.full((WIDTH,), 0, tl.float32)
    for start in range(0, V, WIDTH * PARTS):
        block = load_block(row, start, V, WIDTH, PARTS, False)
        for part in tl.static_range(PARTS):
            totals += tl.exp2((block[part] - largest) * per_unit)
    return largest, tl.sum(totals)


@triton.jit
def _store_bits(support_ptr, kept, first, V: tl.constexpr, WIDTH: tl.constexpr):
    """Eight tokens a byte, the lowest token id in the highest bit."""
    bits = tl.reshape(kept.to(tl.int32), (WIDTH // 8, 8)) << (7 - tl.arange(0, 8))[None, :]
    at = first // 8 + tl.arange(0, WIDTH // 8)
    tl.store(support_ptr + at, tl.sum(bits, axis=1).to(tl.uint8), mask=at * 8 < V)


@triton.jit
def certain_if(greedy, score):
    """0 for a greedy draw, but NaN stays NaN: it says that the logits are broken."""
    return tl.where(greedy & (score == score), 0.0, score)
