"""The unfiltered draw inside the head product: [B, V] logits never reach device memory.

Two launches. `_sample_tiles` multiplies 64 rows by 128 tokens of the head; what is left of a tile
is six numbers a row: {best noisy logit, its token, its logit, largest logit, sum e, sum x e}, three
more with conditional log-probs. `_merge_tiles` merges the V / 128 of a row into token, log-prob and
entropy. Exact, because a maximum of maxima is the maximum and the sums rescale.

Guidance costs no pass of its own: both branches are mixed in fp32 as they are loaded and rounded
once, or, when the conditional log-prob is asked for, the pair's two fp32 accumulators are mixed.

Bytes and FLOPs at V = 16,384 in bf16, against 4.3 TB/s and 790 TFLOP/s:

    model   D      weight     time     B = 64: product   with the pair's accumulators
    B       768    25.2 MB    5.9 us   2.0 us            4.1 us
    XL      1,280  41.9 MB    9.8 us   3.4 us            6.8 us
    3B      3,200  104.9 MB   24.4 us  8.5 us            17.0 us

so it is bound by the bytes of the weight, read once up to 64 rows; the partial results are 6 x 4 x
V / 128 = 3 KiB a row. Hidden states come from the L2, once per program: 128 programs x 2 branches x
64 rows x D, 42 MB at XL. The noise is 64 x 128 x 40 instructions a program, by count 1.3 us; it is
made first, while 64 KiB of weight a program are on their way. What follows the product is 0.8 us.

64 rows are multiplied however few there are: the weight's bytes hide it, and a row's bits do not
depend on how many rows are drawn with it. (`guided_sample` comes here with up to 64; more
take the library's product, which makes no such promise.)

Source: the decomposition of Gumbel-max over tiles of the head, Ruiz et al., arXiv:2603.15854
(FlashSampling/FlashSampling at 1e5d8fa); guidance, log-prob and entropy are ours.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from argrpo.kernels.counter_random import gumbel_log2, random_bits, row_keys
from argrpo.kernels.draw import Draw, DrawKeys, DrawSettings
from argrpo.kernels.guidance import mix
from argrpo.kernels.sample_rows import certain_if

_ROWS = 64  # the least that a warpgroup's matrix instruction takes
_TOKENS = 128  # 128 programs at V = 16,384: one for almost every multiprocessor of an H200
_DEPTH = 64  # 128 bytes of a row a step
_STAGES = 4
_WARPS = 8
_FIELDS = 6
_COND_FIELDS = 9
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
# Below every distance that matters: beside a weight of 0 it stands for -inf, and 0 x -inf is NaN.
_FAR = tl.constexpr(-1000.0)
_INTERPRETED_C = tl.constexpr(bool(triton.knobs.runtime.interpret))


def sample_head(
    cond: Tensor,
    uncond: Tensor | None,
    head_weight: Tensor,
    keys: DrawKeys,
    settings: DrawSettings,
    *,
    cond_logprobs: bool = False,
) -> Draw:
    """Launch both kernels. Arguments as `guided_sample`; bf16 or fp16, no filters."""
    (num_rows, dim), vocab_size = cond.shape, head_weight.shape[0]
    num_tiles = triton.cdiv(vocab_size, _TOKENS)
    num_fields = _COND_FIELDS if cond_logprobs else _FIELDS
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=cond.device)
    scores = torch.empty(3, num_rows, dtype=torch.float32, device=cond.device)
    partials = torch.empty(num_rows, num_fields, num_tiles, dtype=torch.float32, device=cond.device)
    # Row tiles of one token tile run side by side, so that they share its weight in the L2.
    _sample_tiles[(triton.cdiv(num_rows, _ROWS), num_tiles)](
        cond,
        cond if uncond is None else uncond,
        head_weight,
        settings.scalars,
        *keys,
        partials,
        num_rows,
        D=dim,
        V=vocab_size,
        GUIDED=uncond is not None,
        COND=cond_logprobs,
        ROWS=_ROWS,
        TOKENS=_TOKENS,
        DEPTH=_DEPTH,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    _merge_tiles[(num_rows,)](
        partials,
        settings.scalars,
        token_ids,
        scores,
        V=vocab_size,
        NUM_TILES=num_tiles,
        BLOCK=triton.next_power_of_2(num_tiles),
        COND=cond_logprobs,
        num_warps=1,
    )
    logprobs, entropies, cond_scores = scores.unbind()
    return Draw(token_ids, logprobs, entropies, cond_scores if cond_logprobs else None, None)


@triton.jit
def _sample_tiles(
    cond_ptr, uncond_ptr, weight_ptr, scalars_ptr, seed_ptr, image_ids_ptr, positions_ptr,
    partials_ptr, num_rows,
    D: tl.constexpr, V: tl.constexpr, GUIDED: tl.constexpr, COND: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    depths = tl.arange(0, DEPTH)
    scale = tl.load(scalars_ptr)
    # int64 because V x D may pass 2^31
    row_offsets = rows.to(tl.int64)[:, None] * D + depths[None, :]
    token_offsets = tokens.to(tl.int64)[None, :] * D + depths[:, None]
    # The noise needs no memory: it is made while the first weights are on their way to the L2.
    _prefetch(weight_ptr, tokens, D, V)
    temperature = tl.load(scalars_ptr + 1)
    greedy = temperature <= 0
    image_ids = tl.load(image_ids_ptr + rows, mask=rows < num_rows, other=0)
    positions = tl.load(positions_ptr + rows, mask=rows < num_rows, other=0)
    key = row_keys(tl.load(seed_ptr), image_ids, positions)
    bits = random_bits(tokens[None, :], key[0][:, None], key[1][:, None])
    noise = tl.where(greedy, 0.0, 1.0) * gumbel_log2(bits)
    product = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    uncond_product = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    for depth in range(0, D, DEPTH):
        row_mask = (rows < num_rows)[:, None]
        token_mask = (tokens < V)[None, :]
        if D % DEPTH != 0:
            row_mask &= (depths < D - depth)[None, :]
            token_mask &= (depths < D - depth)[:, None]
        weight = tl.load(weight_ptr + token_offsets + depth, mask=token_mask, other=0.0)
        hidden = tl.load(cond_ptr + row_offsets + depth, mask=row_mask, other=0.0)
        if GUIDED:
            uncond = tl.load(uncond_ptr + row_offsets + depth, mask=row_mask, other=0.0)
            if COND:
                uncond_product = _dot(uncond, weight, uncond_product)
            else:
                hidden = mix(hidden, uncond, scale)
        product = _dot(hidden, weight, product)

    x = product
    if GUIDED and COND:
        x = uncond_product + scale * (product - uncond_product)
    per_unit = _LOG2_E / tl.where(greedy, 1.0, temperature)
    top, distance = _distances(x, tokens, per_unit, V, TOKENS)
    weight = tl.exp2(distance)
    noisy = distance + noise
    best = tl.max(noisy, axis=1)
    columns = tl.arange(0, TOKENS)[None, :]
    column = tl.min(tl.where(noisy == best[:, None], columns, TOKENS - 1), axis=1)
    is_drawn = columns == column[:, None]

    num_tiles = tl.num_programs(1)
    fields = 9 if COND else 6
    out_ptr = partials_ptr + rows.to(tl.int64) * (fields * num_tiles) + tile
    token = tl.minimum(tile * TOKENS + column, V - 1)
    valid = rows < num_rows
    tl.store(out_ptr, best, mask=valid)
    tl.store(out_ptr + num_tiles, token.to(tl.float32), mask=valid)
    drawn = tl.sum(tl.where(is_drawn, distance, 0.0), axis=1)
    tl.store(out_ptr + 2 * num_tiles, drawn, mask=valid)
    tl.store(out_ptr + 3 * num_tiles, top, mask=valid)
    tl.store(out_ptr + 4 * num_tiles, tl.sum(weight, axis=1), mask=valid)
    moment = tl.sum(weight * tl.maximum(distance, _FAR), axis=1)
    tl.store(out_ptr + 5 * num_tiles, moment, mask=valid)
    if COND:
        top, distance = _distances(product, tokens, per_unit, V, TOKENS)
        drawn = tl.sum(tl.where(is_drawn, distance, 0.0), axis=1)
        tl.store(out_ptr + 6 * num_tiles, drawn, mask=valid)
        tl.store(out_ptr + 7 * num_tiles, top, mask=valid)
        tl.store(out_ptr + 8 * num_tiles, tl.sum(tl.exp2(distance), axis=1), mask=valid)


@triton.jit
def _dot(left, right, total):
    if _INTERPRETED_C:
        # Triton's interpreter multiplies the bits of bf16, not its values.
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(left, right, total)


@triton.jit
def _distances(x, tokens, per_unit, V: tl.constexpr, TOKENS: tl.constexpr):
    """The largest logit of each row, and how far below it each lies, in powers of two."""
    if V % TOKENS != 0:
        x = tl.where((tokens < V)[None, :], x, -float("inf"))
    top = tl.max(x, axis=1)
    # A tile of -inf is measured from 0: its sums are 0 and not NaN.
    origin = tl.where(top == -float("inf"), 0.0, top)
    return top, (x - origin[:, None]) * per_unit


@triton.jit
def _prefetch(weight_ptr, tokens, D: tl.constexpr, V: tl.constexpr):
    """Ask the L2 for the first 512 bytes of each token's weight, 128 bytes a request."""
    if not _INTERPRETED_C:
        line = tl.minimum(tl.arange(0, 4) * 64, D - 1)
        token = tl.minimum(tokens, V - 1).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [weight_ptr + token[:, None] * D + line[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _merge_tiles(
    partials_ptr, scalars_ptr, token_ids_ptr, scores_ptr,
    V: tl.constexpr, NUM_TILES: tl.constexpr, BLOCK: tl.constexpr, COND: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0)
    temperature = tl.load(scalars_ptr + 1)
    greedy = temperature <= 0
    per_unit = _LOG2_E / tl.where(greedy, 1.0, temperature)
    tiles = tl.arange(0, BLOCK)
    inside = tiles < NUM_TILES
    in_ptr = partials_ptr + index * (9 if COND else 6) * NUM_TILES + tiles

    best = tl.load(in_ptr, mask=inside, other=-float("inf"))
    tokens = tl.load(in_ptr + NUM_TILES, mask=inside, other=0.0)
    drawn = tl.load(in_ptr + 2 * NUM_TILES, mask=inside, other=0.0)
    tops = tl.load(in_ptr + 3 * NUM_TILES, mask=inside, other=-float("inf"))
    totals = tl.load(in_ptr + 4 * NUM_TILES, mask=inside, other=0.0)
    moments = tl.load(in_ptr + 5 * NUM_TILES, mask=inside, other=0.0)
    shift = (tops - tl.max(tops)) * per_unit
    noisy = best + shift
    # Equal values go to the lowest token id; a row of NaN gives some token in range.
    winner = tl.min(tl.where(noisy == tl.max(noisy), tiles, NUM_TILES - 1))
    is_winner = tiles == winner
    token = tl.sum(tl.where(is_winner, tokens, 0.0)).to(tl.int64)
    total = tl.sum(totals * tl.exp2(shift))
    moment = tl.sum((moments + totals * tl.maximum(shift, _FAR)) * tl.exp2(shift))
    logprob = tl.sum(tl.where(is_winner, drawn + shift, 0.0)) - tl.log2(total)
    entropy = tl.log2(total) - moment / total
    tl.store(token_ids_ptr + index, token)
    tl.store(scores_ptr + index, certain_if(greedy, logprob * _LN_2))
    tl.store(scores_ptr + num_rows + index, certain_if(greedy, entropy * _LN_2))
    if COND:
        drawn = tl.load(in_ptr + 6 * NUM_TILES, mask=inside, other=0.0)
        tops = tl.load(in_ptr + 7 * NUM_TILES, mask=inside, other=-float("inf"))
        totals = tl.load(in_ptr + 8 * NUM_TILES, mask=inside, other=0.0)
        shift = (tops - tl.max(tops)) * per_unit
        total = tl.sum(totals * tl.exp2(shift))
        cond = tl.sum(tl.where(is_winner, drawn + shift, 0.0)) - tl.log2(total)
        tl.store(scores_ptr + 2 * num_rows + index, certain_if(greedy, cond * _LN_2))
