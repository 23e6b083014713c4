"""What the cases of a loss's head share: inputs, least work, floors, and the eager form.

M tokens, D width, V codebook. The eager form holds [M, V] in fp32, as the published trainers do;
the floors are matrix products alone, on inputs as large, with nothing between them.
"""

from typing import NamedTuple

import torch
from kernel_cases import VOCAB_SIZE, Outputs, Place
from timing import Work
from torch import Tensor
from torch.nn import functional as F

LOGIT_SPREAD = 2.0  # standard deviation, as an image model's
POLICY_DISTANCE = 0.1  # of its hidden states from the reference's, relative


class HeadInputs(NamedTuple):
    """What is scored, and the gradients that come back. All [M] but the token ids are fp32."""

    hidden: Tensor  # [M, D]
    head_weight: Tensor  # [V, D]
    token_ids: Tensor  # [M]
    dlogprobs: Tensor  # [M]
    dentropies: Tensor  # [M]
    ref_logprobs: Tensor  # [M]


class GuidedInputs(NamedTuple):
    """Policy and reference, both branches."""

    hidden: Tensor  # [M, D]
    uncond: Tensor  # [M, D]
    head_weight: Tensor  # [V, D]
    ref_hidden: Tensor  # [M, D]
    ref_uncond: Tensor  # [M, D]
    ref_weight: Tensor  # [V, D]
    token_ids: Tensor  # [M]
    dlogprobs: Tensor  # [M] fp32


def head_inputs(place: Place, dim: int, tokens: int, *, even: bool) -> HeadInputs:
    """Random ones; `even` makes every gradient of a log-prob 1, which all peers can."""
    fp32 = torch.float32
    dlogprobs = place.normal(tokens, dtype=fp32)
    return HeadInputs(
        place.normal(tokens, dim),
        _weight(place, dim),
        place.integers(VOCAB_SIZE, tokens),
        torch.ones_like(dlogprobs) if even else dlogprobs,
        place.normal(tokens, dtype=fp32),
        place.normal(tokens, dtype=fp32) - 10,
    )


def guided_inputs(place: Place, dim: int, tokens: int) -> GuidedInputs:
    """Random ones; the policy is a short way from its reference."""
    ref_hidden, ref_uncond = place.normal(tokens, dim), place.normal(tokens, dim)
    weight = _weight(place, dim)
    return GuidedInputs(
        ref_hidden + place.normal(tokens, dim, scale=POLICY_DISTANCE),
        ref_uncond + place.normal(tokens, dim, scale=POLICY_DISTANCE),
        weight,
        ref_hidden,
        ref_uncond,
        weight.clone(),
        place.integers(VOCAB_SIZE, tokens),
        place.normal(tokens, dtype=torch.float32),
    )


def _weight(place: Place, dim: int) -> Tensor:
    return place.normal(VOCAB_SIZE, dim, scale=LOGIT_SPREAD * dim**-0.5)


def head_work(place: Place, dim: int, tokens: int, products: int) -> Work:
    """Hidden states and weight are read; with gradients (3 products), theirs are written."""
    passes = 1 if products == 1 else 2
    moved = passes * (tokens + VOCAB_SIZE) * dim * place.itemsize + 8 * tokens
    return Work(moved, 2 * products * tokens * dim * VOCAB_SIZE)


def one_product(inputs: HeadInputs) -> Outputs:
    return (inputs.hidden @ inputs.head_weight.t(),)


def three_products(inputs: HeadInputs) -> Outputs:
    return _products(inputs.hidden, inputs.head_weight)


def four_products(inputs: GuidedInputs) -> Outputs:
    inputs.ref_hidden @ inputs.ref_weight.t()
    return _products(inputs.hidden, inputs.head_weight)


def _products(hidden: Tensor, head_weight: Tensor) -> Outputs:
    """The products of a forward and a backward pass; the logits stand for their gradient."""
    logits = hidden @ head_weight.t()
    return logits @ head_weight, logits.t() @ hidden


def eager_head(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, by way of [M, V] in fp32."""
    log_probs = _log_probs(hidden, head_weight)
    entropies = -(log_probs.exp() * log_probs).sum(dim=-1)
    return log_probs.gather(-1, token_ids[:, None]).squeeze(-1), entropies


def eager_logprobs(hidden: Tensor, head_weight: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    """Log-probs alone, by way of [M, V] in fp32."""
    return (_log_probs(hidden, head_weight).gather(-1, token_ids[:, None]).squeeze(-1),)


def _log_probs(hidden: Tensor, head_weight: Tensor) -> Tensor:
    return F.linear(hidden, head_weight).float().log_softmax(dim=-1)
