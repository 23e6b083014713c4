"""Cases of a loss head's other forms: gradients in the forward pass, and groups with a KL."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from head_inputs import (
    GuidedInputs,
    HeadInputs,
    eager_head,
    four_products,
    guided_inputs,
    head_inputs,
    head_work,
    three_products,
)
from kernel_cases import (
    FLOOR,
    MODELS,
    OURS,
    Case,
    Contender,
    Grid,
    Outputs,
    Place,
    bound,
    expect_from,
    forward_and_backward,
    numeric_error,
)
from kernel_peers import liger_grpo
from timing import Call
from torch import Tensor

from argrpo.kernels.guidance import mix_hidden
from argrpo.kernels.kl import k3
from argrpo.kernels.logprob_gradients import (
    LogprobGradients,
    LossScales,
    fixed_scale_gradients,
    logprob_gradients,
    logprob_gradients_reference,
)
from argrpo.kernels.rows import FixedScales
from argrpo.kernels.token_logprobs import (
    GroupedLogprobs,
    HeadStates,
    grouped_logprob_kl,
    grouped_logprob_kl_reference,
)

GUIDANCE_SCALE = 2.0
KL_WEIGHT = 0.1
TOKENS_AN_IMAGE = 256
IMAGES_A_GROUP = 8


def cases(place: Place, grid: Grid) -> Iterator[Case]:
    for model in grid.models:
        for tokens in grid.tokens:
            yield from _one_pass_cases(place, model, tokens)
            if tokens % (IMAGES_A_GROUP * TOKENS_AN_IMAGE) == 0:
                yield _grouped_case(place, model, tokens)


def _one_pass_cases(place: Place, model: str, tokens: int) -> Iterator[Case]:
    """A token-level loss with a KL: three products instead of four."""

    def run(function: Callable[..., LogprobGradients], inputs: HeadInputs) -> Outputs:
        return tuple(function(*inputs[:3], _loss_scales(inputs)))

    def fixed(inputs: HeadInputs) -> Outputs:
        return tuple(fixed_scale_gradients(*inputs[:3], _fixed_scales(inputs)))

    ways: dict[str, Callable[[HeadInputs], Outputs]] = {
        "fixed_scale_gradients": fixed,
        "logprob_gradients": partial(run, logprob_gradients),
    }
    dim = MODELS[model].dim
    for op, ours in ways.items():
        yield Case(
            op,
            {"model": model, "tokens": tokens, "pass": "forward and backward", "kl": True},
            head_work(place, dim, tokens, products=3),
            partial(head_inputs, place, dim, tokens, even=False),
            expect_from(partial(run, logprob_gradients_reference)),
            [
                Contender(OURS, bound(ours), numeric_error, allowed=1.0),
                Contender(FLOOR, bound(three_products), None, "the three products alone"),
                Contender("torch eager", bound(_eager_loss), numeric_error),
            ],
        )


def _fixed_scales(inputs: HeadInputs) -> FixedScales:
    weights = torch.full_like(inputs.dlogprobs, KL_WEIGHT)
    return FixedScales(inputs.dlogprobs, weights, inputs.ref_logprobs)


def _loss_scales(inputs: HeadInputs) -> LossScales:
    scales = _fixed_scales(inputs)
    return lambda rows, logprobs, _entropies: (scales.part(rows).of_logprobs(logprobs), None)


def _eager_loss(inputs: HeadInputs) -> Outputs:
    hidden, head_weight = (tensor.detach().requires_grad_() for tensor in inputs[:2])
    logprobs, entropies = eager_head(hidden, head_weight, inputs.token_ids)
    kl = k3(logprobs, inputs.ref_logprobs)
    loss = (inputs.dlogprobs * logprobs + KL_WEIGHT * kl).sum()
    gradients = torch.autograd.grad(loss, (hidden, head_weight))
    return logprobs.detach(), entropies.detach(), *gradients


def _grouped_case(place: Place, model: str, tokens: int) -> Case:
    """Policy and reference, both guided; gradients into both branches and the policy's head."""

    def run(function: Callable[..., GroupedLogprobs], inputs: GuidedInputs) -> Outputs:
        reference = HeadStates(
            _grouped(inputs.ref_hidden), inputs.ref_weight, _grouped(inputs.ref_uncond)
        )

        def scored(hidden: Tensor, uncond: Tensor, head_weight: Tensor) -> tuple[Tensor, ...]:
            policy = HeadStates(_grouped(hidden), head_weight, _grouped(uncond))
            scores = function(
                policy, _grouped(inputs.token_ids), reference, guidance_scale=GUIDANCE_SCALE
            )
            assert scores.kl is not None
            return scores.logprobs.flatten(), scores.kl.flatten()

        return forward_and_backward(scored, inputs[:3], _gradients(inputs))

    dim = MODELS[model].dim
    return Case(
        "grouped_logprob_kl",
        {
            "model": model,
            "tokens": tokens,
            "pass": "forward and backward",
            "guidance_scale": GUIDANCE_SCALE,
        },
        # Three products for the policy, one for the reference.
        head_work(place, dim, tokens, products=4),
        partial(guided_inputs, place, dim, tokens),
        expect_from(partial(run, grouped_logprob_kl_reference)),
        [
            Contender(OURS, bound(partial(run, grouped_logprob_kl)), numeric_error, allowed=1.0),
            Contender(FLOOR, bound(four_products), None, "the four products alone"),
            Contender("torch eager", bound(_eager_groups), numeric_error),
            Contender("liger-kernel GRPO", _liger, None, "no guidance, no entropy; its own loss"),
        ],
    )


def _gradients(inputs: GuidedInputs) -> tuple[Tensor, Tensor]:
    """Of log-probs and of the KL, both [M]."""
    return inputs.dlogprobs, torch.full_like(inputs.dlogprobs, KL_WEIGHT)


def _eager_groups(inputs: GuidedInputs) -> Outputs:
    def scored(hidden: Tensor, uncond: Tensor, head_weight: Tensor) -> tuple[Tensor, ...]:
        mixed = mix_hidden(hidden, uncond, GUIDANCE_SCALE)
        with torch.no_grad():
            ref_mixed = mix_hidden(inputs.ref_hidden, inputs.ref_uncond, GUIDANCE_SCALE)
            ref_logprobs, _ = eager_head(ref_mixed, inputs.ref_weight, inputs.token_ids)
        logprobs, _ = eager_head(mixed, head_weight, inputs.token_ids)
        return logprobs, k3(logprobs, ref_logprobs)

    return forward_and_backward(scored, inputs[:3], _gradients(inputs))


def _liger(inputs: GuidedInputs) -> Call:
    def images(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, TOKENS_AN_IMAGE))

    policy = images(inputs.hidden), inputs.head_weight
    reference = images(inputs.ref_hidden), inputs.ref_weight
    token_ids = images(inputs.token_ids)
    advantages = inputs.dlogprobs[: len(token_ids)]
    return liger_grpo(policy, reference, token_ids, advantages, KL_WEIGHT)


def _grouped(values: Tensor) -> Tensor:
    """[M, ...] -> [P, G, T, ...]."""
    return values.unflatten(0, (-1, IMAGES_A_GROUP, TOKENS_AN_IMAGE))
