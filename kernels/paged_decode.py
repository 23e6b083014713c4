"""The Triton kernel behind paged_attention.py: how it walks the pages, and what that costs.

One program a (sequence, query head): 2 warps walk the sequence in tiles of 4 KiB of K and of V,
copied ahead into shared memory, each row of threads with an online softmax of its own; the rows
meet once, at the end. Query heads of a group read the same pages, all but the first from L2.

No split of a sequence over programs: 8 guided images are 16 x 12 = 192 programs of GPT-B and 320
of XL, more than an H200 has multiprocessors (132), and 12 programs fit on each. A split needs a
second launch, 1.3 us x 36 layers = 47 us a step of XL; what 3 programs on some multiprocessors and
2 on others lose, at 8 images and 128 positions on average, is at most a quarter of 88 us.

Bytes: 4 B H D (t + 2) in bf16; operations: 4 B H D (t + 1). XL (20 heads of 64), 128 guided images
(B 256): t 64, 128, 256, 576 are 87, 170, 338, 758 MB = 20, 40, 79, 176 us at 4.3 TB/s. The
multiply-adds are 2.15e12/s at that rate, 6 % of the fp32 units: the padded 16- or 64-row tile of a
matrix unit would be slower to feed than to skip. Bytes in flight, 2 tiles ahead x 8 KiB x 12
programs = 196 KB a multiprocessor; 4.3 TB/s at 0.7 us of latency needs 23. Instructions (sm_90):
338 a warp and tile and 466 around them (Triton 3.6: 318 and 532), 67, 53, 46 % of the issue slots
at t 64, 128, 256.

The kernel's body is longer than the house's 80 lines: rotation, store, walk and end share what is
in registers, and a Triton function of its own for each would pass a dozen of them.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from argrpo.kernels.kv_pages import KeyValuePages, PrefixAggregate, padded_head_dim

_WARPS = 2  # 4 cost a third more instructions around the loop; 1 is too slow alone at 8 images
_STAGES = 3  # two tiles on their way while one is used
_TILE_BYTES = 4096  # of K, and again of V; 4 loads of 16 bytes a thread
_LOAD_BYTES = 16
_LOG2_E = math.log2(math.e)


def launch_paged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Tensor | None,
    positions: Tensor,
    pages: KeyValuePages,
    block_table: Tensor,
    prefix: PrefixAggregate | None,
) -> Tensor:
    """Arguments and result of `paged_attention.paged_decode_attention`, which has checked them."""
    batch, num_heads, head_dim = q.shape
    out = q.new_empty(batch, num_heads, head_dim)
    if batch == 0:
        return out
    aggregate: tuple[Tensor | None, ...] = (None, None, None)
    if prefix is not None:
        aggregate = (prefix.value_sums, prefix.counts, prefix.index)
    _paged_decode_fwd[(num_heads, batch)](
        q,
        k,
        v,
        out,
        rotary,
        positions,
        pages.keys,
        pages.values,
        block_table,
        *aggregate,
        _LOG2_E / math.sqrt(head_dim),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        block_table.shape[1],
        **tile_shape(head_dim, pages.keys.shape[2], pages.keys.element_size()),
        GROUP=num_heads // k.shape[1],
        num_warps=_WARPS,
    )
    return out


def tile_shape(head_dim: int, page_size: int, itemsize: int) -> dict[str, int]:
    """The compile-time sizes of the kernel: a tile is STEPS rounds of ROWS positions."""
    block = triton.next_power_of_2(head_dim)
    positions = min(page_size, _TILE_BYTES // (block * itemsize))
    # As many positions as the warps cover with one load a thread.
    rows = min(positions, max(1, _WARPS * 32 * _LOAD_BYTES // (block * itemsize)))
    return {
        "HEAD_DIM": head_dim,
        "ROW_DIM": padded_head_dim(head_dim),
        "BLOCK_D": block,
        "PAGE_SIZE": page_size,
        "ROWS": rows,
        "STEPS": positions // rows,
        "STAGES": _STAGES,
    }


@triton.jit
def _row(at, inside, dims, cos, sin, ROTATES: tl.constexpr):
    """One head's row in fp32, its pairs turned."""
    row = tl.load(at + dims, mask=inside, other=0.0).to(tl.float32)
    if ROTATES:
        partner = tl.load(at + (dims ^ 1), mask=inside, other=0.0).to(tl.float32)
        row = row * cos + partner * sin
    return row


@triton.jit
def _paged_decode_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    rotary_ptr,
    positions_ptr,
    key_pages_ptr,
    value_pages_ptr,
    block_table_ptr,
    value_sums_ptr,
    counts_ptr,
    prefix_index_ptr,
    score_scale,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    table_row_stride,
    HEAD_DIM: tl.constexpr,
    ROW_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
):
    query_head = tl.program_id(0)
    head = query_head // GROUP
    num_heads = tl.num_programs(0) // GROUP
    sequence = tl.program_id(1).to(tl.int64)
    position = tl.load(positions_ptr + sequence).to(tl.int32)
    busy = position >= 0
    table_ptr = block_table_ptr + sequence * table_row_stride
    # What the end needs is asked for here, so that nothing is waited for after the loop.
    page = tl.load(table_ptr)
    if value_sums_ptr is not None:
        prefix = tl.load(prefix_index_ptr + sequence).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < HEAD_DIM

    ROTATES: tl.constexpr = rotary_ptr is not None
    cos = 0.0
    sin = 0.0
    if ROTATES:
        angles = rotary_ptr + tl.maximum(position, 0).to(tl.int64) * HEAD_DIM + (dims // 2) * 2
        cos = tl.load(angles, mask=inside, other=0.0)
        sin = tl.load(angles + 1, mask=inside, other=0.0)
        # even' = even cos - odd sin, odd' = odd cos + even sin
        sin = tl.where(dims % 2 == 0, -sin, sin)
    q_at = q_ptr + sequence * q_row_stride + query_head * q_head_stride
    q = _row(q_at, inside, dims, cos, sin, ROTATES)
    q = q.to(q_ptr.dtype.element_ty).to(tl.float32) * score_scale

    head_at = head.to(tl.int64) * (PAGE_SIZE * ROW_DIM)
    # Pages x heads x positions x D passes 2**31 elements in a cache of 4 GiB.
    page_stride = num_heads.to(tl.int64) * (PAGE_SIZE * ROW_DIM)
    k_at = k_ptr + sequence * k_row_stride + head * k_head_stride
    v_at = v_ptr + sequence * v_row_stride + head * v_head_stride
    k = _row(k_at, inside, dims, cos, sin, ROTATES)
    k = k.to(k_ptr.dtype.element_ty).to(key_pages_ptr.dtype.element_ty)
    v = tl.load(v_at + dims, mask=inside, other=0.0).to(value_pages_ptr.dtype.element_ty)
    own_page = tl.load(table_ptr + position // PAGE_SIZE, mask=busy, other=0)
    row_at = own_page.to(tl.int64) * page_stride + head_at + (position % PAGE_SIZE) * ROW_DIM
    stores = dims < tl.where(busy & (query_head % GROUP == 0), ROW_DIM, 0)
    tl.store(key_pages_ptr + row_at + dims, k, mask=stores)
    tl.store(value_pages_ptr + row_at + dims, v, mask=stores)

    if value_sums_ptr is not None:
        count = tl.load(counts_ptr + prefix)
        sums_at = value_sums_ptr + (prefix * num_heads + head) * HEAD_DIM
        sums = tl.load(sums_at + dims, mask=inside, other=0.0)

    offsets = tl.arange(0, STEPS * ROWS)
    at = offsets[:, None] * ROW_DIM + dims[None, :]
    # Finite, so that a row of threads without a position yet subtracts no infinities.
    top = tl.full((ROWS,), -3.0e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in tl.range(0, position, STEPS * ROWS, num_stages=STAGES):
        base = page.to(tl.int64) * page_stride + head_at + (start % PAGE_SIZE) * ROW_DIM
        valid = offsets < position - start
        mask = valid[:, None] & (dims < ROW_DIM)[None, :]
        keys = tl.load(key_pages_ptr + base + at, mask=mask, other=0.0)
        values = tl.load(value_pages_ptr + base + at, mask=mask, other=0.0)
        following = start + STEPS * ROWS
        page = tl.load(table_ptr + following // PAGE_SIZE, mask=following < position, other=0)
        # Split only now: of a three-dimensional load Triton 3.6 would lay STEPS across the threads.
        keys = tl.reshape(keys.to(tl.float32), (STEPS, ROWS, BLOCK_D))
        scores = tl.sum(q[None, None, :] * keys, axis=2)
        scores = tl.where(tl.reshape(valid, (STEPS, ROWS)), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp2(scores - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        values = tl.reshape(values.to(tl.float32), (STEPS, ROWS, BLOCK_D))
        acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * values, axis=0)
        top = new_top

    own_score = tl.sum(q * k.to(tl.float32), axis=0)
    highest = tl.maximum(tl.max(top, axis=0), own_score)
    if value_sums_ptr is not None:
        highest = tl.where(count > 0, tl.maximum(highest, 0.0), highest)
    shrink = tl.exp2(top - highest)
    own = tl.exp2(own_score - highest)
    denominator = tl.sum(total * shrink, axis=0) + own
    out = tl.sum(acc * shrink[:, None], axis=0) + own * v.to(tl.float32)
    if value_sums_ptr is not None:
        # Without a prefix the score of 0 may lie far above all others: 0 x infinity.
        zero = tl.where(count > 0, tl.exp2(tl.minimum(-highest, 0.0)), 0.0)
        denominator += count * zero
        out += sums * zero
    out = tl.where(busy, out / denominator, 0.0)
    out_at = out_ptr + (sequence * tl.num_programs(0) + query_head) * HEAD_DIM
    tl.store(out_at + dims, out.to(out_ptr.dtype.element_ty), mask=inside)
