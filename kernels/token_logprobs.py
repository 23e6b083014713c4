"""Log-probability and entropy of given tokens, straight from hidden states.

    x = W h / temperature            a chunk of rows at a time, logits in fp32
    logprob = x_token - logsumexp_S x
    entropy = logsumexp_S x - sum_S p x,   p = softmax_S(x)

S is the whole vocabulary, or the support that the token was drawn from. [M, V] is never held:
a chunk of rows is made, reduced and dropped, and made again in the backward pass
(`kernels/head_chunks.py`; the arithmetic of a row is in `kernels/row_softmax.py`).

Source: the chunked head is the idea of Wijmans et al., arXiv:2411.09009, without their gradient
filter, which would drop most of the mass of image tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from argrpo.kernels._checks import FLOATS, expect
from argrpo.kernels.guided_sampling import head_logits
from argrpo.kernels.head_chunks import RowScales, chunked_gradients, chunked_scores
from argrpo.kernels.row_softmax import Rows, RowScores, row_scores_reference


class TokenLogprobs(NamedTuple):
    """What one pass over the head says of M given tokens."""

    logprobs: Tensor  # [M] fp32
    entropies: Tensor  # [M] fp32, nats


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    temperature: float = 1.0,
    support: Tensor | None = None,
    *,
    weight_grad: Tensor | None = None,
) -> TokenLogprobs:
    """Log-probs and entropies of tokens. Both differentiable in `hidden` and `head_weight`.

    Args:
        hidden: [M, D] final-norm hidden states; bf16, fp16 or fp32, contiguous.
        head_weight: [V, D], in the dtype of `hidden`.
        token_ids: [M] int64 in 0 .. V - 1.
        temperature: above 0; divides the logits.
        support: [M, ceil(V / 8)] uint8 bitmask of the tokens that count, or None for all of them.
            The given token always counts.
        weight_grad: [V, D] fp32 to which the backward pass adds the gradient of `head_weight`,
            instead of returning it rounded to the weight's dtype; None returns it.

    Returns:
        `TokenLogprobs` of [M] fp32 tensors.

    Raises:
        ValueError: a shape, dtype or the temperature is not as above.
    """
    _check_tokens(hidden, head_weight, token_ids, temperature, support)
    if weight_grad is not None:
        expect("weight_grad", weight_grad, tuple(head_weight.shape), (torch.float32,))
    return TokenLogprobs(
        *_TokenLogprobs.apply(hidden, head_weight, token_ids, temperature, support, weight_grad)
    )


def token_logprobs_reference(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    temperature: float = 1.0,
    support: Tensor | None = None,
) -> TokenLogprobs:
    """The specification, in plain PyTorch and at full size; autograd gives the gradients."""
    rows = Rows(token_ids, temperature, support)
    scores = row_scores_reference(head_logits(hidden, head_weight), rows)
    return TokenLogprobs(scores.logprobs, scores.entropies)


def _check_tokens(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    temperature: float,
    support: Tensor | None,
) -> None:
    expect("hidden", hidden, (None, None), FLOATS)
    num_rows, width = hidden.shape
    expect("head_weight", head_weight, (None, width), (hidden.dtype,))
    expect("token_ids", token_ids, (num_rows,), (torch.int64,))
    if support is not None:
        expect("support", support, (num_rows, (len(head_weight) + 7) // 8), (torch.uint8,))
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")


class _TokenLogprobs(torch.autograd.Function):
    """Chunks of rows, recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        token_ids: Tensor,
        temperature: float,
        support: Tensor | None,
        weight_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        scores = chunked_scores(hidden, head_weight, Rows(token_ids, temperature, support))
        ctx.save_for_backward(hidden, head_weight, token_ids, support, *scores)
        ctx.temperature = temperature
        ctx.weight_grad = weight_grad
        # An output that the loss does not use costs nothing in the backward pass.
        ctx.set_materialize_grads(False)
        return scores.logprobs, scores.entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor | None, dentropies: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        if dlogprobs is None and dentropies is None:
            return None, None, None, None, None, None
        hidden, head_weight, token_ids, support, *saved = ctx.saved_tensors
        scores = RowScores(*saved)
        dlogprobs = torch.zeros_like(scores.logprobs) if dlogprobs is None else dlogprobs
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = None
        if wants_weight:
            dweight = _fp32_zeros(head_weight) if ctx.weight_grad is None else ctx.weight_grad

        def scale_rows(chunk: slice, logits: Tensor) -> RowScales:
            of_entropy = None if dentropies is None else dentropies[chunk]
            return RowScales(scores.part(chunk), dlogprobs[chunk], of_entropy)

        rows = Rows(token_ids, ctx.temperature, support)
        chunked_gradients(hidden, head_weight, rows, scale_rows, dhidden=dhidden, dweight=dweight)
        if dweight is not None:
            dweight = dweight.to(head_weight.dtype) if ctx.weight_grad is None else None
        return dhidden, dweight, None, None, None, None


def _fp32_zeros(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight, dtype=torch.float32)
