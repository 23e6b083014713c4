"""What a row of logits says of one token, and the gradient of it.

    x = logits / temperature
    normaliser = log sum_S exp x          S: the whole vocabulary, or the token's support
    logprob = x_token - normaliser
    entropy = normaliser - sum_S p x,     p = softmax_S(x)

    d loss / d logits = (g_logprob (onehot - p) - g_entropy p (log p + entropy)) / temperature

A row depends on no other row. A logit of -inf is a token of probability 0; a row with a NaN, a
+inf, or nothing above -inf gives NaN.

Source: the gradient of the entropy is that of Ahmed et al., arXiv:1811.11214, appendix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.kernels._checks import FLOATS, expect
from argrpo.kernels.guided_sampling import unpack_support

_LOG_ZERO = -1e4  # stands for -inf beside a probability of 0: exp of it is 0 in fp32 and fp64


class Rows(NamedTuple):
    """Tokens to be scored, one for each of M rows."""

    token_ids: Tensor  # [M] int64
    temperature: float
    support: Tensor | None  # [M, ceil(V / 8)] uint8; the given token always counts

    def part(self, rows: slice) -> "Rows":
        support = None if self.support is None else self.support[rows]
        return Rows(self.token_ids[rows], self.temperature, support)


class RowScores(NamedTuple):
    """What M rows of logits say of their tokens."""

    logprobs: Tensor  # [M] fp32
    entropies: Tensor  # [M] fp32, nats
    normalisers: Tensor  # [M] fp32

    def part(self, rows: slice) -> "RowScores":
        return RowScores(self.logprobs[rows], self.entropies[rows], self.normalisers[rows])


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
    untouched = rows.temperature == 1.0 and rows.support is None
    scaled = logits if untouched else _scale_(logits.clone(), rows)
    log_probs = torch.log_softmax(scaled, dim=1)
    logprobs = log_probs.gather(1, rows.token_ids[:, None]).squeeze(1)
    normalisers = scaled.amax(dim=1).sub_(log_probs.amax(dim=1))
    # softmax costs less than exp of the log-softmax: the one is fused, the other is not
    probs = torch.softmax(scaled, dim=1)
    entropies = torch.linalg.vecdot(probs, log_probs.clamp_(min=_LOG_ZERO)).neg_()
    return RowScores(logprobs, entropies, normalisers)


def row_scores_reference(logits: Tensor, rows: Rows) -> RowScores:
    """The specification, in plain PyTorch; autograd gives the gradients."""
    scaled = logits / rows.temperature
    if rows.support is not None:
        scaled = scaled.masked_fill(~_kept(rows, logits.shape[1]), -torch.inf)
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
    scaled = _scale_(logits, rows)
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
    num_rows, vocab_size = logits.shape
    expect("token_ids", rows.token_ids, (num_rows,), (torch.int64,))
    if rows.support is not None:
        expect("support", rows.support, (num_rows, (vocab_size + 7) // 8), (torch.uint8,))
    if not rows.temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {rows.temperature}")


def _scale_(logits: Tensor, rows: Rows) -> Tensor:
    """Divide by the temperature and put -inf outside the support."""
    if rows.temperature != 1.0:
        logits.div_(rows.temperature)
    if rows.support is not None:
        logits.masked_fill_(~_kept(rows, logits.shape[1]), -torch.inf)
    return logits


def _kept(rows: Rows, vocab_size: int) -> Tensor:
    assert rows.support is not None
    return unpack_support(rows.support, vocab_size).scatter(1, rows.token_ids[:, None], True)
