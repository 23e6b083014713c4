"""Log-probability, entropy and KL of given tokens, straight from hidden states.

    x = W h / temperature            a chunk of rows at a time, logits in fp32
    logprob = x_token - logsumexp_S x
    entropy = logsumexp_S x - sum_S p x,   p = softmax_S(x)
    kl = k3(logprob, reference's logprob)

S is the whole vocabulary, or the support that the token was drawn from. [M, V] is never held:
`kernels/head_chunks.py` says how a chunk lives, `kernels/row_softmax.py` what happens to a row.

FLOPs: 2 M D V for each product, 4 products forward and backward, 3 where the gradients are made in
the forward pass (kernels/logprob_gradients.py). 16,384 tokens of XL (D = 1280, V = 16,384) are 0.69
TFLOP a product, 0.87 ms at 790 TFLOP/s: 3.5 and 2.6 ms. Bytes that must reach device memory in
bf16, three products: hidden states and their gradient 84 MB, the weight once a chunk of logits 1.3
GB, d logits written once and read twice 1.6 GB, the fp32 gradient of the weight 1.3 GB; 4.3 GB or
1.0 ms at 4.3 TB/s, behind the arithmetic. An unfused head moves 110 bytes a logit, 30 GB.

The same input gives the same bits. A row in another batch may differ in the last places, because
the library's product may sum a chunk of another length in another order (kernels/head_chunks.py).

Source: the chunked head is the idea of Wijmans et al., arXiv:2411.09009, without their gradient
filter, which would drop most of the mass of image tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.kernels._checks import FLOATS, expect
from argrpo.kernels.guided_hidden import guided_hidden, guided_hidden_reference
from argrpo.kernels.head_chunks import HeadScores, check_head, chunked_scores
from argrpo.kernels.kl import k3
from argrpo.kernels.row_softmax import row_scores_reference
from argrpo.kernels.rows import Rows


class TokenLogprobs(NamedTuple):
    """What one pass over the head says of M given tokens."""

    logprobs: Tensor  # [M] fp32
    entropies: Tensor  # [M] fp32, nats


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
    check_head(hidden, head_weight, rows, weight_grad)
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
    check_head(hidden, policy.head_weight, rows, weight_grad)
    scores = HeadScores.apply(hidden, policy.head_weight, *rows, weight_grad)
    logprobs, entropies = (score.view(token_ids.shape) for score in scores)
    if reference is None:
        return _with_means(logprobs, entropies, None)
    with torch.no_grad():
        hidden = _mixed("reference", reference, token_ids, guidance_scale)
        check_head(hidden, reference.head_weight, rows, None)
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
