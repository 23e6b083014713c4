"""Log-probability, entropy and KL of given tokens, straight from hidden states.

    x = W h / temperature            a chunk of rows at a time, logits in fp32
    logprob = x_token - logsumexp_S x
    entropy = logsumexp_S x - sum_S p x,   p = softmax_S(x)
    kl = k3(logprob, reference's logprob)

S is the whole vocabulary, or the support that the token was drawn from. [M, V] is never held:
`kernels/head_chunks.py` says how a chunk lives, `kernels/row_softmax.py` what happens to a row.

FLOPs: 2 M D V for each product, 4 products forward and backward, 3 where the gradients are made in
the forward pass (`logprob_gradients`). 16,384 tokens of XL (D = 1280, V = 16,384) are 0.69 TFLOP a
product, 0.87 ms at 790 TFLOP/s: 3.5 and 2.6 ms. Bytes that must reach device memory in bf16, three
products: hidden states and their gradient 84 MB, the weight once a chunk of logits 1.3 GB, d logits
written and read twice 1.6 GB, the fp32 gradient of the weight 1.3 GB; 4.3 GB or 1.0 ms at 4.3 TB/s,
behind the arithmetic. The unfused head moves 40 bytes a logit forward and 70 backward: 30 GB.

Source: the chunked head is the idea of Wijmans et al., arXiv:2411.09009, without their gradient
filter, which would drop most of the mass of image tokens.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from argrpo.kernels._checks import FLOATS, expect
from argrpo.kernels.guided_hidden import guided_hidden, guided_hidden_reference
from argrpo.kernels.head_chunks import (
    HeadScores,
    RowScales,
    chunked_gradients,
    chunked_scores,
    fp32_zeros,
)
from argrpo.kernels.kl import k3
from argrpo.kernels.row_softmax import row_scores, row_scores_reference
from argrpo.kernels.rows import Rows, RowScores

# (rows, their log-probs [m], their entropies [m]) -> d loss / d log-prob [m], d loss / d entropy
# [m] or None for zeros; all fp32. It is called once for each chunk of rows, in order.
LossScales: TypeAlias = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class TokenLogprobs(NamedTuple):
    """What one pass over the head says of M given tokens."""

    logprobs: Tensor  # [M] fp32
    entropies: Tensor  # [M] fp32, nats


class LogprobGradients(NamedTuple):
    """Scores of M tokens and the gradients of a loss, from one pass."""

    logprobs: Tensor  # [M] fp32
    entropies: Tensor  # [M] fp32, nats
    dhidden: Tensor  # [M, D] in the dtype of the hidden states
    dweight: Tensor  # [V, D] fp32


class HeadStates(NamedTuple):
    """Final-norm hidden states of one model for P prompts, G images each, and the model's head."""

    hidden: Tensor  # [P, G, T, D] given the condition
    head_weight: Tensor  # [V, D] in the dtype of `hidden`
    uncond: Tensor | None = None  # [P, G, T', D] given the null condition; guides T' <= T tokens


class GroupedLogprobs(NamedTuple):
    """What the policy, and a reference if there is one, say of the tokens of P groups."""

    logprobs: Tensor  # [P, G, T] fp32
    entropies: Tensor  # [P, G, T] fp32, nats
    ref_logprobs: Tensor | None  # [P, G, T] fp32, without gradient
    kl: Tensor | None  # [P, G, T] fp32, nats, k3
    group_logprobs: Tensor  # [P] fp32: the same, averaged over the G x T tokens of a group
    group_entropies: Tensor  # [P]
    group_ref_logprobs: Tensor | None  # [P]
    group_kl: Tensor | None  # [P]


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
    rows = Rows(token_ids, temperature, support)
    _check(hidden, head_weight, rows, weight_grad)
    return TokenLogprobs(*HeadScores.apply(hidden, head_weight, *rows, weight_grad))


def token_logprobs_reference(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    temperature: float = 1.0,
    support: Tensor | None = None,
) -> TokenLogprobs:
    """The specification, in plain PyTorch and at full size; autograd gives the gradients."""
    rows = Rows(token_ids, temperature, support)
    logits = torch.nn.functional.linear(hidden, head_weight)
    wide = torch.promote_types(logits.dtype, torch.float32)  # fp64 stays: tests compare with it
    return TokenLogprobs(*row_scores_reference(logits.to(wide), rows)[:2])


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
    _check(hidden, head_weight, rows, weight_grad)
    dhidden = torch.empty_like(hidden)
    dweight = fp32_zeros(head_weight) if weight_grad is None else weight_grad
    scores = RowScores.empty(len(hidden), hidden.device)

    def scale_rows(chunk: slice, logits: Tensor) -> RowScales:
        part = row_scores(logits, rows.part(chunk), scores.part(chunk))
        return RowScales(part, *loss_scales(chunk, part.logprobs, part.entropies))

    chunked_gradients(hidden, head_weight, rows, scale_rows, dhidden=dhidden, dweight=dweight)
    return LogprobGradients(scores.logprobs, scores.entropies, dhidden, dweight)


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


def grouped_logprob_kl(
    policy: HeadStates,
    token_ids: Tensor,
    reference: HeadStates | None = None,
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    support: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> GroupedLogprobs:
    """Log-probs, entropies and k3 KL of grouped tokens, with their means over each group.

    Differentiable in the policy's hidden states (both branches) and head weight; what is said of
    the reference carries no gradient.

    Args:
        policy: hidden states and head; with `uncond`, the guided distribution is scored.
        token_ids: [P, G, T] int64 in 0 .. V - 1.
        reference: the model that the KL is measured to, guided if and only if the policy is.
        guidance_scale: used where there is an `uncond`.
        temperature: above 0; divides the logits of both models.
        support: [P, G, T, ceil(V / 8)] uint8 bitmask of the tokens that count, for both models
            alike; the given token always counts. None: all tokens.
        weight_grad: as in `token_logprobs`, for the policy's head.

    Returns:
        `GroupedLogprobs`; what concerns the reference is None without one.

    Raises:
        ValueError: a shape, dtype, layout or the temperature is not as above.
    """
    expect("token_ids", token_ids, (None, None, None), (torch.int64,))
    if reference is not None and (reference.uncond is None) != (policy.uncond is None):
        raise ValueError("reference.uncond: expected the same branches as policy, got others")
    rows = _group_rows(token_ids, temperature, support)
    hidden = _mixed("policy", policy, token_ids, guidance_scale)
    _check(hidden, policy.head_weight, rows, weight_grad)
    scores = HeadScores.apply(hidden, policy.head_weight, *rows, weight_grad)
    logprobs, entropies = (score.view(token_ids.shape) for score in scores)
    if reference is None:
        return _with_means(logprobs, entropies, None)
    with torch.no_grad():
        hidden = _mixed("reference", reference, token_ids, guidance_scale)
        _check(hidden, reference.head_weight, rows, None)
        ref_scores = chunked_scores(hidden, reference.head_weight, rows)
    return _with_means(logprobs, entropies, ref_scores.logprobs.view(token_ids.shape))


def grouped_logprob_kl_reference(
    policy: HeadStates,
    token_ids: Tensor,
    reference: HeadStates | None = None,
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    support: Tensor | None = None,
) -> GroupedLogprobs:
    """The specification, in plain PyTorch and at full size; autograd gives the gradients."""
    rows = _group_rows(token_ids, temperature, support)

    def scored(states: HeadStates) -> TokenLogprobs:
        hidden = states.hidden.flatten(0, 1)
        if states.uncond is not None:
            uncond = states.uncond.flatten(0, 1)
            hidden = guided_hidden_reference(hidden, uncond, guidance_scale)
        scores = token_logprobs_reference(hidden.flatten(0, 1), states.head_weight, *rows)
        return TokenLogprobs(*(score.view(token_ids.shape) for score in scores))

    ref_logprobs = None if reference is None else scored(reference).logprobs.detach()
    return _with_means(*scored(policy), ref_logprobs)


def _check(hidden: Tensor, head_weight: Tensor, rows: Rows, weight_grad: Tensor | None) -> None:
    expect("hidden", hidden, (None, None), FLOATS)
    expect("head_weight", head_weight, (None, hidden.shape[1]), (hidden.dtype,))
    rows.check(len(hidden), len(head_weight))
    if weight_grad is not None:
        expect("weight_grad", weight_grad, tuple(head_weight.shape), (torch.float32,))


def _group_rows(token_ids: Tensor, temperature: float, support: Tensor | None) -> Rows:
    if support is not None:
        expect("support", support, (*token_ids.shape, None), (torch.uint8,))
        support = support.flatten(0, 2)
    return Rows(token_ids.flatten(), temperature, support)


def _mixed(name: str, states: HeadStates, token_ids: Tensor, guidance_scale: float) -> Tensor:
    """[P * G * T, D] hidden states of the distribution that is scored."""
    expect(f"{name}.hidden", states.hidden, (*token_ids.shape, None), FLOATS)
    hidden, uncond = states.hidden, states.uncond
    if uncond is None:
        return hidden.flatten(0, 2)
    expect(f"{name}.uncond", uncond, (*hidden.shape[:2], None, hidden.shape[3]), (hidden.dtype,))
    return guided_hidden(hidden.flatten(0, 1), uncond.flatten(0, 1), guidance_scale).flatten(0, 1)


def _with_means(logprobs: Tensor, entropies: Tensor, ref: Tensor | None) -> GroupedLogprobs:
    group_logprobs, group_entropies = logprobs.mean(dim=(1, 2)), entropies.mean(dim=(1, 2))
    if ref is None:
        return GroupedLogprobs(
            *(logprobs, entropies, None, None), *(group_logprobs, group_entropies, None, None)
        )
    kl = k3(logprobs, ref)
    return GroupedLogprobs(
        *(logprobs, entropies, ref, kl),
        *(group_logprobs, group_entropies, ref.mean(dim=(1, 2)), kl.mean(dim=(1, 2))),
    )
