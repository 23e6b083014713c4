"""What a policy says of given images: logits, and log-probs under the distribution of a draw.

    h = h_u + s (h_c - h_u)      on the guided tokens, h = h_c on the others
    logprob = log softmax_S(W h / temperature) of the given token;  S: the draw's kept set

The same distribution that the engine draws from, over whole images at once.

Shapes: N images, T tokens, D width, V codebook.
"""

from typing import Protocol

import torch
from torch import Tensor

from argrpo.engine.conditions import Conditions, moved_to, num_images
from argrpo.engine.policy import Policy
from argrpo.engine.sampling_params import SamplingParams
from argrpo.kernels.guidance import head_logits
from argrpo.kernels.guided_hidden import guided_hidden
from argrpo.kernels.token_filter import filter_mask, pack_support
from argrpo.kernels.token_logprobs import token_logprobs

_SUPPORT_CHUNK = 512  # rows of logits held at once while a support is rebuilt


class ScoringPolicy(Policy, Protocol):
    """A policy that scores whole images."""

    def hidden(self, conditions: Conditions, token_ids: Tensor) -> Tensor:
        """[N, T, D] final-norm hidden states; row t predicts token t. Differentiable."""
        ...


def drawn_hidden(
    policy: ScoringPolicy, conditions: Conditions, token_ids: Tensor, params: SamplingParams
) -> Tensor:
    """Hidden states that the head turns into the (mixed) logits of a draw. Differentiable.

    Args:
        policy: the model.
        conditions: labels [N] int64, or `TextFeatures` with N rows, on its device.
        token_ids: [N, T] int64.
        params: guidance; the null condition runs over the guided tokens only.

    Returns:
        [N, T, D] in the dtype of the weights, contiguous.
    """
    cond = policy.hidden(conditions, token_ids)
    num_guided = params.num_guided(token_ids.shape[1])
    if num_guided == 0:
        return cond
    uncond = policy.hidden(policy.null_conditions(conditions), token_ids[:, :num_guided])
    return guided_hidden(cond, uncond, params.guidance_scale)


def drawn_logits(
    policy: ScoringPolicy, conditions: Conditions, token_ids: Tensor, params: SamplingParams
) -> Tensor:
    """[N, T, V] fp32 mixed logits before temperature and filters.

    Raises:
        ValueError: conditions or token ids do not fit the policy.
    """
    conditions = _checked(policy, conditions, token_ids)
    hidden = drawn_hidden(policy, conditions, token_ids, params)
    return head_logits(hidden.flatten(0, 1), policy.head_weight).unflatten(0, token_ids.shape)


def drawn_logprobs(
    policy: ScoringPolicy,
    conditions: Conditions,
    token_ids: Tensor,
    params: SamplingParams,
    support: Tensor | None,
) -> Tensor:
    """[N, T] fp32 log-probs of given tokens, see `LlamaGen.logprobs`. Differentiable.

    Raises:
        ValueError: conditions or token ids do not fit the policy.
    """
    conditions = _checked(policy, conditions, token_ids)
    hidden = drawn_hidden(policy, conditions, token_ids, params).flatten(0, 1)
    chosen, weight = token_ids.flatten(), policy.head_weight
    if params.temperature == 0:
        return _greedy_logprobs(hidden, weight, chosen).view(token_ids.shape)
    kept = None if support is None else support.flatten(0, 1)
    if kept is None and params.is_filtered:
        kept = _support(hidden, weight, params)
    scores = token_logprobs(hidden, weight, chosen, params.temperature, kept)
    return scores.logprobs.view(token_ids.shape)


def _checked(policy: ScoringPolicy, conditions: Conditions, token_ids: Tensor) -> Conditions:
    """The conditions where the tokens are."""
    conditions = moved_to(conditions, token_ids.device)
    policy.check_conditions(conditions)
    rows, limit = num_images(conditions), policy.shape.num_image_tokens
    fits = token_ids.dim() == 2 and len(token_ids) == rows
    if not fits or not 1 <= token_ids.shape[1] <= limit or token_ids.dtype != torch.int64:
        raise ValueError(
            f"token_ids: expected int64 of shape [{rows}, 1..{limit}], "
            f"got {token_ids.dtype} {list(token_ids.shape)}"
        )
    return conditions


@torch.no_grad()
def _greedy_logprobs(hidden: Tensor, head_weight: Tensor, chosen: Tensor) -> Tensor:
    """[N * T]: a token is certain (0) if it is the likeliest, else impossible (-inf)."""
    chunks = hidden.split(_SUPPORT_CHUNK)
    best = torch.cat([head_logits(chunk, head_weight).argmax(dim=1) for chunk in chunks])
    return torch.zeros(len(chosen), device=chosen.device).masked_fill(best != chosen, -torch.inf)


@torch.no_grad()
def _support(hidden: Tensor, head_weight: Tensor, params: SamplingParams) -> Tensor:
    """[N * T, ceil(V / 8)] uint8 kept sets, found from the logits a chunk at a time."""
    parts = []
    for chunk in hidden.split(_SUPPORT_CHUNK):
        logits = head_logits(chunk, head_weight)
        kept = filter_mask(logits, params.top_k, params.top_p, params.temperature)
        parts.append(pack_support(kept))
    return torch.cat(parts)
