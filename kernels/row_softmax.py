"""What a row of logits says of one token, and the gradient of it.

    x = logits / temperature
    normaliser = log sum_S exp x          S: the whole vocabulary, or the token's support
    logprob = x_token - normaliser
    entropy = normaliser - sum_S p x,     p = softmax_S(x)

    d loss / d logits = (g_logprob (onehot - p) - g_entropy p (log p + entropy)) / temperature

A row depends on no other row. A logit of -inf is a token of probability 0; a row with a NaN, a
+inf, or nothing above -inf gives NaN, and on a GPU so does a token id outside 0 .. V - 1.

At V = 16,384 the scores read 64 KiB a row and write 12 bytes; the gradient reads 64 KiB and writes
32 KiB in bf16. For 16,384 rows that is 1.07 and 1.6 GB: 0.25 and 0.38 ms at 4.3 TB/s if it came
from device memory, less from the L2, beside 0.87 ms a GEMM of XL at 790 TFLOP/s. Where the scales
of the loss are known beforehand one launch does both, and its second read comes from L1 or L2.

Source: the gradient of the entropy is that of Ahmed et al., arXiv:1811.11214, appendix.
"""

import torch
import triton
from torch import Tensor

from argrpo.kernels._checks import FLOATS, expect, uses_triton
from argrpo.kernels.row_kernels import (
    DEPTH,
    LANES,
    WARPS,
    row_gradient_bwd,
    row_scores_and_gradient,
    row_scores_fwd,
)
from argrpo.kernels.rows import FixedScales, Rows, RowScores

_LOG_ZERO = -1e4  # stands for -inf beside a probability of 0: exp of it is 0 in fp32 and fp64


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
    out.check("out", logits.shape[0])
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
    scores.check("scores", logits.shape[0])
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


def row_scores_and_gradient_(
    logits: Tensor, rows: Rows, scales: FixedScales, out: Tensor, scores: RowScores | None = None
) -> RowScores:
    """`row_scores` and `row_gradient_` in one launch, for scales that are known beforehand.

    Args:
        logits: [M, V] fp32, contiguous; does not survive.
        rows: the tokens, the temperature (above 0) and the support or None.
        scales: of M rows.
        out: [M, V] of any floating dtype, contiguous; may be `logits` itself.
        scores: where to write what is returned, contiguous; None makes new tensors.

    Returns:
        `RowScores` of [M] fp32 tensors, `scores` where that is given.

    Raises:
        ValueError: a shape, dtype or the temperature is not as above.
    """
    _check(logits, rows)
    scales.check(logits.shape[0])
    expect("out", out, tuple(logits.shape), FLOATS)
    if uses_triton(logits):
        scores = RowScores.empty(logits.shape[0], logits.device) if scores is None else scores
        _launch_scores_and_gradient(logits, rows, scales, scores, out)
        return scores
    scores = row_scores(logits, rows, scores)
    row_gradient_(logits, rows, scores, scales.of_logprobs(scores.logprobs), scales.entropies, out)
    return scores


def _check(logits: Tensor, rows: Rows) -> None:
    expect("logits", logits, (None, None), (torch.float32,))
    rows.check(*logits.shape)


def _launch_scores(logits: Tensor, rows: Rows, out: RowScores) -> None:
    """`row_scores` into `out`."""
    num_rows, vocab_size = logits.shape
    if num_rows:
        row_scores_fwd[(num_rows,)](
            *(logits, rows.token_ids, rows.support, *out),
            *(logits.stride(0), _row_bytes(rows.support), vocab_size, 1.0 / rows.temperature),
            HAS_SUPPORT=rows.support is not None,
            DEPTH=DEPTH,
            LANES=LANES,
            num_warps=WARPS,
        )


def _launch_gradient(
    logits: Tensor,
    rows: Rows,
    scores: RowScores,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    out: Tensor,
) -> None:
    """`row_gradient_` into `out`; a program takes one tile of a row."""
    num_rows, vocab_size = logits.shape
    tiles = triton.cdiv(vocab_size, DEPTH * LANES)
    if num_rows:
        row_gradient_bwd[(num_rows * tiles,)](
            *(logits, rows.token_ids, rows.support, scores.normalisers, scores.entropies),
            *(dlogprobs.contiguous(), _contiguous(dentropies), out),
            *(logits.stride(0), _row_bytes(rows.support), vocab_size, tiles),
            1.0 / rows.temperature,
            HAS_SUPPORT=rows.support is not None,
            HAS_ENTROPY=dentropies is not None,
            BLOCK=DEPTH * LANES,
            num_warps=WARPS,
        )


def _launch_scores_and_gradient(
    logits: Tensor, rows: Rows, scales: FixedScales, scores: RowScores, out: Tensor
) -> None:
    """`row_scores_and_gradient_` into `scores` and `out`."""
    num_rows, vocab_size = logits.shape
    if num_rows:
        row_scores_and_gradient[(num_rows,)](
            *(logits, rows.token_ids, rows.support, *scores),
            *(_contiguous(scale) for scale in scales),
            *(out, logits.stride(0), _row_bytes(rows.support), vocab_size, 1.0 / rows.temperature),
            HAS_SUPPORT=rows.support is not None,
            HAS_KL=scales.kl is not None,
            HAS_ENTROPY=scales.entropies is not None,
            DEPTH=DEPTH,
            LANES=LANES,
            num_warps=WARPS,
        )


def _row_bytes(support: Tensor | None) -> int:
    return 0 if support is None else support.stride(0)


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()
