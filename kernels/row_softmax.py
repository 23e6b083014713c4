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


def row_scores(logits: Tensor, rows: Rows) -> RowScores:
    """Log-prob of the given token, entropy and log-normaliser of each row.

    Args:
        logits: [M, V] fp32, contiguous.
        rows: the tokens, the temperature (above 0) and the support or None.

    Returns:
        `RowScores` of [M] fp32 tensors.

    Raises:
        ValueError: a shape, dtype or the temperature is not as above.
    """
    _check(logits, rows)
    if uses_triton(logits):
        return _launch_scores(logits, rows)
    untouched = rows.temperature == 1.0 and rows.support is None
    scaled = logits if untouched else rows.scale_(logits.clone())
    log_probs = torch.log_softmax(scaled, dim=1)
    logprobs = log_probs.gather(1, rows.token_ids[:, None]).squeeze(1)
    normalisers = scaled.amax(dim=1).sub_(log_probs.amax(dim=1))
    # softmax costs less than exp of the log-softmax: the one is fused, the other is not
    probs = torch.softmax(scaled, dim=1)
    entropies = torch.linalg.vecdot(probs, log_probs.clamp_(min=_LOG_ZERO)).neg_()
    return RowScores(logprobs, entropies, normalisers)


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


def _launch_scores(logits: Tensor, rows: Rows) -> RowScores:
    scores = RowScores(*(logits.new_empty(logits.shape[0]) for _ in range(3)))
    support = rows.support
    if logits.shape[0]:
        _row_scores_fwd[(logits.shape[0],)](
            logits,
            rows.token_ids,
            support,
            *scores,
            logits.stride(0),
            0 if support is None else support.stride(0),
            logits.shape[1],
            1.0 / rows.temperature,
            HAS_SUPPORT=support is not None,
            DEPTH=_DEPTH,
            LANES=_LANES,
            num_warps=_WARPS,
        )
    return scores


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
def _load_row(
    logits_ptr,
    support_ptr,
    token_id,
    columns,
    vocab_size,
    inv_temperature,
    HAS_SUPPORT: tl.constexpr,
):
    """Logits of one row over temperature; -inf past its end and outside the support."""
    inside = columns < vocab_size
    x = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")) * inv_temperature
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
    # Each lane keeps its own maximum m, sum of e and sum of e (x - m), with e = exp(x - m): the
    # loop needs no exchange between threads and one exp a logit. -1e30 instead of -inf, because
    # -inf - -inf is NaN.
    m = tl.full([LANES], -1e30, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, vocab_size, DEPTH * LANES):
        x = _load_row(
            logits_ptr,
            support_ptr,
            token_id,
            start + tile,
            vocab_size,
            inv_temperature,
            HAS_SUPPORT,
        )
        new_m = tl.maximum(m, tl.max(x, axis=0))
        shift = tl.exp(m - new_m)
        weighted = shift * (weighted + (m - new_m) * total)
        total = shift * total
        x -= new_m[None, :]
        e = tl.exp(x)
        total += tl.sum(e, axis=0)
        weighted += tl.sum(e * tl.maximum(x, -1e4), axis=0)
        m = new_m
    row_m = tl.max(m, axis=0)
    shift = tl.exp(m - row_m)
    row_total = tl.sum(shift * total, axis=0)
    row_weighted = tl.sum(shift * (weighted + (m - row_m) * total), axis=0)
    log_total = tl.log(row_total)
    known = (token_id >= 0) & (token_id < vocab_size)
    chosen = tl.load(logits_ptr + token_id, mask=known, other=float("nan")) * inv_temperature
    tl.store(logprobs_ptr + row, chosen - row_m - log_total)
    tl.store(entropies_ptr + row, log_total - row_weighted / row_total)
    tl.store(normalisers_ptr + row, row_m + log_total)


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
    columns = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    logits_ptr += row * row_stride
    out_ptr += row * row_stride
    if HAS_SUPPORT:
        support_ptr += row * support_row_stride
    token_id = tl.load(token_ids_ptr + row)
    x = _load_row(
        logits_ptr, support_ptr, token_id, columns, vocab_size, inv_temperature, HAS_SUPPORT
    )
    log_p = x - tl.load(normalisers_ptr + row)
    of_logprob = tl.load(dlogprobs_ptr + row)
    factor = tl.full([BLOCK], 0.0, tl.float32) + of_logprob
    if HAS_ENTROPY:
        entropy = tl.load(entropies_ptr + row)
        factor += tl.load(dentropies_ptr + row) * (tl.maximum(log_p, -1e4) + entropy)
    gradient = tl.where(columns == token_id, of_logprob, 0.0) - tl.exp(log_p) * factor
    gradient *= inv_temperature
    tl.store(out_ptr + columns, gradient.to(out_ptr.dtype.element_ty), mask=columns < vocab_size)
