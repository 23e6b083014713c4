"""The Triton functions behind kernels/row_softmax.py.

A program owns a row. A tile of it is DEPTH x LANES logits: a thread reduces over the depth by
itself, so that the loop over tiles exchanges nothing between threads. All arithmetic in fp32, in
base 2: exp2 is one instruction where exp is five, so a logit costs 11 for the scores, 9 for the
gradient.
"""

import triton
import triton.language as tl

DEPTH = 8
LANES = 512
WARPS = 4
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_row(logits_ptr, support_ptr, token_id, columns, vocab_size, HAS_SUPPORT: tl.constexpr):
    """Logits of one row; -inf past its end and outside the support."""
    inside = columns < vocab_size
    x = tl.load(logits_ptr + columns, mask=inside, other=float("-inf"))
    if HAS_SUPPORT:
        byte = tl.load(support_ptr + columns // 8, mask=inside, other=0).to(tl.int32)
        kept = ((byte >> (7 - columns % 8)) & 1 != 0) | (columns == token_id)
        x = tl.where(kept, x, float("-inf"))
    return x


@triton.jit
def _score_row(
    logits_ptr,
    support_ptr,
    token_id,
    vocab_size,
    inv_temperature,
    HAS_SUPPORT: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Log-prob of the token, entropy and normaliser of one row."""
    # Before anything else, because a caller may overwrite the row once the sums are known.
    known = (token_id >= 0) & (token_id < vocab_size)
    chosen = tl.load(logits_ptr + token_id, mask=known, other=float("nan"))
    # Each lane keeps its own maximum m, sum of e and sum of e d, with d = (x - m) / temperature in
    # base 2 and e = 2^d. m starts at -1e20 and not at -inf, because -inf - -inf is NaN.
    to_base_2 = inv_temperature * _LOG2_E
    m = tl.full([LANES], -1e20, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, vocab_size, DEPTH * LANES):
        columns = start + tile
        x = _load_row(logits_ptr, support_ptr, token_id, columns, vocab_size, HAS_SUPPORT)
        new_m = tl.maximum(m, tl.max(x, axis=0))
        step = (m - new_m) * to_base_2
        shrink = tl.exp2(step)
        d = (x - new_m[None, :]) * to_base_2
        e = tl.exp2(d)
        # -inf is raised to a number that exp2 takes to 0 as well, because 0 * -inf is NaN.
        weighted = shrink * (weighted + step * total) + tl.sum(e * tl.maximum(d, -1e4), axis=0)
        total = shrink * total + tl.sum(e, axis=0)
        m = new_m
    row_m = tl.max(m, axis=0)
    step = (m - row_m) * to_base_2
    shrink = tl.exp2(step)
    row_total = tl.sum(shrink * total, axis=0)
    row_weighted = tl.sum(shrink * (weighted + step * total), axis=0)
    log_total = tl.log(row_total)
    logprob = (chosen - row_m) * inv_temperature - log_total
    entropy = log_total - _LN_2 * row_weighted / row_total
    return logprob, entropy, row_m * inv_temperature + log_total


@triton.jit
def _store_gradient(
    logits_ptr,
    support_ptr,
    out_ptr,
    token_offset,
    left,
    normaliser,
    entropy,
    of_logprob,
    of_entropy,
    inv_temperature,
    HAS_SUPPORT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d loss / d logits of one tile; pointers, token_offset and left count from its first logit."""
    offsets = tl.arange(0, BLOCK)
    x = _load_row(logits_ptr, support_ptr, token_offset, offsets, left, HAS_SUPPORT)
    log2_p = x * (inv_temperature * _LOG2_E) - normaliser * _LOG2_E
    of_logprob *= inv_temperature
    factor = tl.full([BLOCK], 0.0, tl.float32) + of_logprob
    if HAS_ENTROPY:
        of_entropy *= inv_temperature
        factor += of_entropy * entropy
        factor += of_entropy * _LN_2 * tl.maximum(log2_p, -1e4)
    gradient = tl.where(offsets == token_offset, of_logprob, 0.0) - tl.exp2(log2_p) * factor
    tl.store(out_ptr + offsets, gradient.to(out_ptr.dtype.element_ty), mask=offsets < left)


@triton.jit
def row_scores_fwd(
    logits_ptr,
    token_ids_ptr,
    support_ptr,
    logprobs_ptr,
    entropies_ptr,
    normalisers_ptr,
    row_stride,
    support_row_stride,
    vocab_size,
    inv_temperature,
    HAS_SUPPORT: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    if HAS_SUPPORT:
        support_ptr += row * support_row_stride
    token_id = tl.load(token_ids_ptr + row)
    logprob, entropy, normaliser = _score_row(
        logits_ptr,
        support_ptr,
        token_id,
        vocab_size,
        inv_temperature,
        HAS_SUPPORT,
        DEPTH,
        LANES,
    )
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropies_ptr + row, entropy)
    tl.store(normalisers_ptr + row, normaliser)


@triton.jit
def row_gradient_bwd(
    logits_ptr,
    token_ids_ptr,
    support_ptr,
    normalisers_ptr,
    entropies_ptr,
    dlogprobs_ptr,
    dentropies_ptr,
    out_ptr,
    row_stride,
    support_row_stride,
    vocab_size,
    tiles,
    inv_temperature,
    HAS_SUPPORT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK
    if HAS_SUPPORT:
        support_ptr += row * support_row_stride + first // 8
    entropy = 0.0
    of_entropy = 0.0
    if HAS_ENTROPY:
        entropy = tl.load(entropies_ptr + row)
        of_entropy = tl.load(dentropies_ptr + row)
    _store_gradient(
        logits_ptr + row * row_stride + first,
        support_ptr,
        out_ptr + row * row_stride + first,
        tl.load(token_ids_ptr + row).to(tl.int32) - first,
        vocab_size - first,
        tl.load(normalisers_ptr + row),
        entropy,
        tl.load(dlogprobs_ptr + row),
        of_entropy,
        inv_temperature,
        HAS_SUPPORT,
        HAS_ENTROPY,
        BLOCK,
    )


@triton.jit
def row_scores_and_gradient(
    logits_ptr,
    token_ids_ptr,
    support_ptr,
    logprobs_ptr,
    entropies_ptr,
    normalisers_ptr,
    of_logprobs_ptr,
    of_kl_ptr,
    ref_logprobs_ptr,
    of_entropies_ptr,
    out_ptr,
    row_stride,
    support_row_stride,
    vocab_size,
    inv_temperature,
    HAS_SUPPORT: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    out_ptr += row * row_stride
    if HAS_SUPPORT:
        support_ptr += row * support_row_stride
    token_id = tl.load(token_ids_ptr + row)
    of_logprob = tl.load(of_logprobs_ptr + row)
    logprob, entropy, normaliser = _score_row(
        logits_ptr,
        support_ptr,
        token_id,
        vocab_size,
        inv_temperature,
        HAS_SUPPORT,
        DEPTH,
        LANES,
    )
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropies_ptr + row, entropy)
    tl.store(normalisers_ptr + row, normaliser)
    if HAS_KL:
        # d k3 / d log-prob
        ratio = tl.exp(tl.load(ref_logprobs_ptr + row) - logprob)
        of_logprob += tl.load(of_kl_ptr + row) * (1.0 - ratio)
    of_entropy = 0.0
    if HAS_ENTROPY:
        of_entropy = tl.load(of_entropies_ptr + row)
    # The row comes from L1 or L2 this time. Its sums went through all warps, so every warp has
    # read what it needs of the row before any of them overwrites it in place.
    for first in range(0, vocab_size, DEPTH * LANES):
        _store_gradient(
            logits_ptr + first,
            support_ptr + first // 8 if HAS_SUPPORT else support_ptr,
            out_ptr + first,
            token_id.to(tl.int32) - first,
            vocab_size - first,
            normaliser,
            entropy,
            of_logprob,
            of_entropy,
            inv_temperature,
            HAS_SUPPORT,
            HAS_ENTROPY,
            DEPTH * LANES,
        )
