"""Gradients of a loss on token log-probs made in the forward pass: three products instead of four.

For losses whose scale of a token needs no other token's log-prob: a token-level ratio, not a
sequence-level one. The logits of a chunk are still there when its scores are known, so they turn
into d loss / d logits at once and are never made again. Feed `dhidden` to `hidden.backward` and
`dweight` to the optimizer.

16,384 tokens of XL (D = 1280, V = 16,384) in bf16: 2.06 TFLOP, 2.6 ms at 790 TFLOP/s. In 32 chunks
of 512 rows the launch that scores and scales reads 34 MB twice, from L2 and L1, and writes 17 MB:
about 8 us a chunk at 5 TB/s of the L2, 0.26 ms in all; kernels/token_logprobs.py counts the bytes
that reach device memory, 1.0 ms at 4.3 TB/s behind the products. Beside the inputs it holds the
gradients (42 MB and 84 MB fp32), a chunk of logits (34 MB) and a chunk of d logits (67 MB).
Bits repeat for the same input, not for a row in another batch (kernels/head_chunks.py).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from argrpo.kernels.head_chunks import check_head, chunked_gradients, fp32_zeros
from argrpo.kernels.row_softmax import row_gradient_, row_scores, row_scores_and_gradient_
from argrpo.kernels.rows import FixedScales, Rows, RowScores
from argrpo.kernels.token_logprobs import token_logprobs_reference

# (rows, their log-probs [m], their entropies [m]) -> d loss / d log-prob [m], d loss / d entropy
# [m] or None for zeros; all fp32. It is called once for each chunk of rows, in order.
LossScales: TypeAlias = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class LogprobGradients(NamedTuple):
    """Scores of M tokens and the gradients of a loss, from one pass."""

    logprobs: Tensor  # [M] fp32
    entropies: Tensor  # [M] fp32, nats
    dhidden: Tensor  # [M, D] in the dtype of the hidden states
    dweight: Tensor  # [V, D] fp32


@torch.no_grad()
def logprob_gradients(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    loss_scales: LossScales,
    temperature: float = 1.0,
    support: Tensor | None = None,
    *,
    weight_grad: Tensor | None = None,
) -> LogprobGradients:
    """Scores and gradients in one pass: three products instead of four.

    For losses whose scale of a row needs no other row's log-prob: a token-level ratio, not a
    sequence-level one. Feed `dhidden` to `hidden.backward`, `dweight` to the optimizer.

    Args:
        hidden, head_weight, token_ids, temperature, support: as in `token_logprobs`.
        loss_scales: the loss algebra, see `LossScales`. Its small launches come once a chunk of
            512 rows (V = 16,384) and are worth keeping few.
        weight_grad: [V, D] fp32 to which the gradient of `head_weight` is added; None starts at 0.

    Returns:
        `LogprobGradients`; `dweight` is `weight_grad` where that is given.

    Raises:
        ValueError: a shape, dtype or the temperature is not as in `token_logprobs`.
    """
    rows = Rows(token_ids, temperature, support)
    check_head(hidden, head_weight, rows, weight_grad)

    def fill(scores: RowScores, chunk: slice, logits: Tensor, out: Tensor) -> None:
        part = row_scores(logits, rows.part(chunk), scores.part(chunk))
        scales = loss_scales(chunk, part.logprobs, part.entropies)
        row_gradient_(logits, rows.part(chunk), part, *scales, out)

    return _one_pass(hidden, head_weight, fill, weight_grad)


def logprob_gradients_reference(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    loss_scales: LossScales,
    temperature: float = 1.0,
    support: Tensor | None = None,
) -> LogprobGradients:
    """The specification: autograd through `token_logprobs_reference`."""
    leaves = hidden.detach().requires_grad_(), head_weight.detach().requires_grad_()
    scores = token_logprobs_reference(*leaves, token_ids, temperature, support)
    logprobs, entropies = scores.logprobs.detach(), scores.entropies.detach()
    dlogprobs, dentropies = loss_scales(slice(0, len(hidden)), logprobs, entropies)
    dentropies = torch.zeros_like(entropies) if dentropies is None else dentropies
    gradients = torch.autograd.grad(scores, leaves, (dlogprobs, dentropies))
    return LogprobGradients(logprobs, entropies, *gradients)


@torch.no_grad()
def fixed_scale_gradients(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    scales: FixedScales,
    temperature: float = 1.0,
    support: Tensor | None = None,
    *,
    weight_grad: Tensor | None = None,
) -> LogprobGradients:
    """`logprob_gradients` of a loss whose scales are known before its log-probs are.

    One launch scores a row and makes its gradient, with no loss algebra between.

    Args:
        hidden, head_weight, token_ids, temperature, support, weight_grad: as in
            `logprob_gradients`.
        scales: of M rows; the KL's way into the log-prob is taken here.

    Returns, Raises: as `logprob_gradients`.
    """
    rows = Rows(token_ids, temperature, support)
    check_head(hidden, head_weight, rows, weight_grad)
    scales.check(len(hidden))

    def fill(scores: RowScores, chunk: slice, logits: Tensor, out: Tensor) -> None:
        part = scales.part(chunk)
        row_scores_and_gradient_(logits, rows.part(chunk), part, out, scores.part(chunk))

    return _one_pass(hidden, head_weight, fill, weight_grad)


def _one_pass(
    hidden: Tensor,
    head_weight: Tensor,
    fill: Callable[[RowScores, slice, Tensor, Tensor], None],
    weight_grad: Tensor | None,
) -> LogprobGradients:
    scores = RowScores.empty(len(hidden), hidden.device)
    dhidden = torch.empty_like(hidden)
    dweight = fp32_zeros(head_weight) if weight_grad is None else weight_grad
    chunked_gradients(hidden, head_weight, partial(fill, scores), dhidden=dhidden, dweight=dweight)
    return LogprobGradients(scores.logprobs, scores.entropies, dhidden, dweight)
