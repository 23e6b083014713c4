"""What a row of logits says of one token, and the gradient of it.

    x = logits / temperature
    normaliser = log sum_S exp x          S: the whole vocabulary, or the token's support
    logprob = x_token - normaliser
    entropy = normaliser - sum_S p x,     p = softmax_S(x)

    d loss / d logits = (g_logprob (onehot - p) - g_entropy p (log p + entropy)) / temperature

A row depends on no other row. A logit of -inf is a token of probability 0; a row with a NaN, a
+inf, or nothing above -inf gives NaN, and on a GPU so does a token id outside 0 .. V - 1.

Each kernel reads a row once and keeps nothing of it. At V = 16,384 the scores read 64 KiB a row
and write 12 bytes, with about 8 instructions and one exp a logit; the gradient reads 64 KiB and
writes 32 KiB in bf16. For 16,384 rows that is 1.07 and 1.6 GB: 0.25 and 0.38 ms at 4.3 TB/s if it
came from device memory, less from the L2, beside 0.87 ms a GEMM of XL at 790 TFLOP/s.

Source: the gradient of the entropy is that of Ahmed et al., arXiv:1811.11214, appendix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from argrpo.kernels._checks import FLOATS, expect, uses_triton
from argrpo.kernels.rows import Rows, RowScores

_LOG_ZERO = -1e4  # stands for -inf beside a probability of 0: exp of it is 0 in fp32 and fp64
_DEPTH = 8  # a tile is DEPTH x LANES logits; a thread keeps its own maximum over the depth
_LANES = 512
_WARPS = 4
_LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is five
_LN_2 = tl.constexpr(0.6931471805599453)


def row_scores(logits: Tensor, rows: Rows, out: RowScores | None = None) -> RowScores:
    """Log-prob of the given token, entropy and log-normaliser of each row.

    Args:
        logits: [M, V] fp32, contiguous.
        rows: the tokens, the temperature (above 0) and the support or None.
        out: where to write, contiguous; None makes new tensors.

    Returns:
        `RowScores` of [M] fp32 tensors, `out` where that is given.

    Raises:
        ValueError: a shape, dtype or the temperature is not as above.
    """
    _check(logits, rows)
    if out is None:
        out = RowScores.empty(logits.shape[0], logits.device)
    if uses_triton(logits):
        _launch_scores(logits, rows, out)
        return out
    untouched = rows.temperature == 1.0 and rows.support is None
    scaled = logits if untouched else rows.scale_(logits.clone())
    log_probs = torch.log_softmax(scaled, dim=1)
    out.logprobs.copy_(log_probs.gather(1, rows.token_ids[:, None]).squeeze(1))
    out.normalisers.copy_(scaled.amax(dim=1) - log_probs.amax(dim=1))
    # softmax costs less than exp of the log-softmax: the one is fused, the other is not
    probs = torch.softmax(scaled, dim=1)
    out.entropies.copy_(torch.linalg.vecdot(probs, log_probs.clamp_(min=_LOG_ZERO)).neg_())
    return out


def row_scores_reference(logits: Tensor, rows: Rows) -> RowScores:
    """The specification, in plain PyTorch; autograd gives the gradients."""
    scaled = rows.scale_(logits.clone())
    log_probs = torch.log_softmax(scaled, dim=1)
    logprobs = log_probs.gather(1, rows.token_ids[:, None]).squeeze(1)
    weighted = log_probs.exp() * log_probs.clamp(min=_LOG_ZERO)
    return RowScores(logprobs, -weighted.sum(dim=1), torch.logsumexp(scaled, dim=1))


def row_gradient_(
    logits: Tensor,
    rows: Rows,
    scores: RowScores,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    out: Tensor,
) -> None:
    """d loss / d logits of rows, written to `out`; `logits` does not survive.

    Args:
        logits: [M, V] fp32, contiguous.
        rows: as given to `row_scores`.
        scores: what `row_scores` said of these rows.
        dlogprobs: [M] fp32, d loss / d log-prob.
        dentropies: [M] fp32, d loss / d entropy, or None for zeros at less cost.
        out: [M, V] of any floating dtype, contiguous; may be `logits` itself.

    Raises:
        ValueError: a shape, dtype or the temperature is not as above.
    """
    _check(logits, rows)
    num_rows = (logits.shape[0],)
    expect("dlogprobs", dlogprobs, num_rows, (torch.float32,), contiguous=False)
    if dentropies is not None:
        expect("dentropies", dentropies, num_rows, (torch.float32,), contiguous=False)
    expect("out", out, tuple(logits.shape), FLOATS)
    if uses_triton(logits):
        _launch_gradient(logits, rows, scores, dlogprobs, dentropies, out)
        return
    scaled = rows.scale_(logits)
    per_logit = dlogprobs / rows.temperature
    if dentropies is None:
        gradient = torch.softmax(scaled, dim=1, out=scaled).mul_(-per_logit[:, None])
    else:
        factor = torch.log_softmax(scaled, dim=1).clamp_(min=_LOG_ZERO)
        per_entropy = dentropies / rows.temperature
        factor.mul_(-per_entropy[:, None])
        factor.sub_((per_logit + per_entropy * scores.entropies)[:, None])
        gradient = torch.softmax(scaled, dim=1, out=scaled).mul_(factor)
    gradient.scatter_add_(1, rows.token_ids[:, None], per_logit[:, None])
    if out.data_ptr() != gradient.data_ptr():
        out.copy_(gradient)


def _check(logits: Tensor, rows: Rows) -> None:
    expect("logits", logits, (None, None), (torch.float32,))
    rows.check(*logits.shape)


def _launch_scores(logits: Tensor, rows: Rows, out: RowScores) -> None:
    support = rows.support
    if logits.shape[0]:
        _row_scores_fwd[(logits.shape[0],)](
            logits,
            rows.token_ids,
            support,
            *out,
            logits.stride(0),
            0 if support is None else support.stride(0),
            logits.shape[1],
            1.0 / rows.temperature,
            HAS_SUPPORT=support is not None,
            DEPTH=_DEPTH,
            LANES=_LANES,
            num_warps=_WARPS,
        )


def _launch_gradient(
    logits: Tensor,
    rows: Rows,
    scores: RowScores,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    out: Tensor,
) -> None:
    num_rows, vocab_size = logits.shape
    tiles = triton.cdiv(vocab_size, _DEPTH * _LANES)
    support = rows.support
    if num_rows:
        _row_gradient_bwd[(num_rows * tiles,)](
            logits,
            rows.token_ids,
            support,
            scores.normalisers,
            scores.entropies,
            dlogprobs.contiguous(),
            None if dentropies is None else dentropies.contiguous(),
            out,
            logits.stride(0),
            0 if support is None else support.stride(0),
            vocab_size,
            tiles,
            1.0 / rows.temperature,
            HAS_SUPPORT=support is not None,
            HAS_ENTROPY=dentropies is not None,
            BLOCK=_DEPTH * _LANES,
            num_warps=_WARPS,
        )


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
def _row_scores_fwd(
    logits_ptr,
    token_ids_ptr,
    support_ptr,
    logprobs_ptr,
    entropies_ptr,
    normalisers_ptr,
    logits_row_stride,
    support_row_stride,
    vocab_size,
    inv_temperature,
    HAS_SUPPORT: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row_stride
    if HAS_SUPPORT:
        support_ptr += row * support_row_stride
    token_id = tl.load(token_ids_ptr + row)
    known = (token_id >= 0) & (token_id < vocab_size)
    token_id = token_id.to(tl.int32)
    # Each lane keeps its own maximum m, sum of e and sum of e d, with d = (x - m) / temperature in
    # base 2 and e = 2^d: the loop needs no exchange between threads and one exponential a logit.
    # m starts at -1e20 and not at -inf, because -inf - -inf is NaN.
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
    chosen = tl.load(logits_ptr + token_id, mask=known, other=float("nan"))
    tl.store(logprobs_ptr + row, (chosen - row_m) * inv_temperature - log_total)
    tl.store(entropies_ptr + row, log_total - _LN_2 * row_weighted / row_total)
    tl.store(normalisers_ptr + row, row_m * inv_temperature + log_total)


@triton.jit
def _row_gradient_bwd(
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
    offsets = tl.arange(0, BLOCK)
    logits_ptr += row * row_stride + first
    out_ptr += row * row_stride + first
    if HAS_SUPPORT:
        support_ptr += row * support_row_stride + first // 8
    left = vocab_size - first
    token_offset = tl.load(token_ids_ptr + row).to(tl.int32) - first
    x = _load_row(logits_ptr, support_ptr, token_offset, offsets, left, HAS_SUPPORT)
    log2_p = x * (inv_temperature * _LOG2_E) - tl.load(normalisers_ptr + row) * _LOG2_E
    of_logprob = tl.load(dlogprobs_ptr + row) * inv_temperature
    factor = tl.full([BLOCK], 0.0, tl.float32) + of_logprob
    if HAS_ENTROPY:
        of_entropy = tl.load(dentropies_ptr + row) * inv_temperature
        factor += of_entropy * tl.load(entropies_ptr + row)
        factor += of_entropy * _LN_2 * tl.maximum(log2_p, -1e4)
    gradient = tl.where(offsets == token_offset, of_logprob, 0.0) - tl.exp2(log2_p) * factor
    tl.store(out_ptr + offsets, gradient.to(out_ptr.dtype.element_ty), mask=offsets < left)
