"""The fused head: two ways to the same gradients, and neither holds [N, T, V]."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from argrpo.head_gradients import backward
from argrpo.kernels.guided_sampling import pack_support
from argrpo.loss_batch import LossBatch, LossScale
from argrpo.objective_config import ObjectiveConfig
from argrpo.objectives import has_fixed_scales, policy_loss
from argrpo.token_scores import HeadInputs

IMAGES, TOKENS, WIDTH, VOCAB = 6, 8, 12, 50
# fp32 sums of 50 terms in another order: some units of 6e-8 of the largest terms, below 1.
SAME: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def case(*, support: bool) -> tuple[HeadInputs, Tensor, LossBatch]:
    torch.manual_seed(1)
    num_rows = IMAGES * TOKENS
    trunk = torch.randn(num_rows, WIDTH, requires_grad=True)
    kept = pack_support(torch.rand(num_rows, VOCAB) < 0.5) if support else None
    inputs = HeadInputs(trunk * 1.0, torch.randint(0, VOCAB, (num_rows,)), 0.9, kept)
    inputs.hidden.retain_grad()
    # Not wider: exp(reference - policy) multiplies the rounding of an unlikely token's log-prob.
    weight = (0.3 * torch.randn(VOCAB, WIDTH)).requires_grad_()
    batch = LossBatch(
        torch.randn(IMAGES),
        LossScale(IMAGES, IMAGES * TOKENS, TOKENS),
        ref_logprobs=-3 + 0.3 * torch.randn(IMAGES, TOKENS),
    )
    return inputs, weight, batch


def plain_logprobs(inputs: HeadInputs, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies over the whole codebook, at full size, by autograd."""
    log_probs = F.log_softmax(inputs.hidden @ weight.T / inputs.temperature, dim=1)
    chosen = log_probs.gather(1, inputs.token_ids[:, None])
    entropies = -(log_probs.exp() * log_probs).sum(dim=1)
    return chosen.view(IMAGES, TOKENS), entropies.view(IMAGES, TOKENS)


def gradients(config: ObjectiveConfig, batch: LossBatch, *, support: bool) -> tuple[Tensor, Tensor]:
    inputs, weight, _ = case(support=support)
    weight_grad = torch.zeros(VOCAB, WIDTH)
    backward(inputs, weight, weight_grad, batch, config)
    assert weight.grad is None, "nothing goes through the dtype of the weights"
    assert inputs.hidden.grad is not None
    return inputs.hidden.grad, weight_grad


@pytest.mark.parametrize("support", [False, True], ids=["all", "kept"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_both_ways_give_the_same_gradients(level: Any, masked: bool, support: bool) -> None:
    config = ObjectiveConfig(importance_sampling_level=level, entropy_coef=0.1, beta=0.2)
    inputs, weight, batch = case(support=support)
    if masked:
        batch = replace(batch, mask=torch.arange(IMAGES)[:, None].expand(-1, TOKENS) != 2)
    on_policy = backward(inputs, weight, torch.zeros(VOCAB, WIDTH), batch, config)
    # The same log-probs from outside: the ratio is 1 again, by the other way.
    given = replace(batch, old_logprobs=on_policy.logprobs)
    assert has_fixed_scales(batch, config)
    assert not has_fixed_scales(given, config)
    for one, other in zip(
        gradients(config, batch, support=support),
        gradients(config, given, support=support),
        strict=True,
    ):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, **SAME)


@pytest.mark.parametrize("kl_level", ["token", "sequence"])
def test_gradients_are_those_of_the_loss_at_full_size(kl_level: Any) -> None:
    config = ObjectiveConfig(kl_level=kl_level, entropy_coef=0.1, beta=0.2)
    inputs, weight, batch = case(support=False)
    loss = policy_loss(*plain_logprobs(inputs, weight), batch, config).loss
    wanted = torch.autograd.grad(loss, (inputs.hidden, weight))
    for got, want in zip(gradients(config, batch, support=False), wanted, strict=True):
        torch.testing.assert_close(got, want, **SAME)


def test_gradients_add_to_what_the_optimizer_holds_already() -> None:
    config = ObjectiveConfig(beta=0.2)
    inputs, weight, batch = case(support=False)
    total = torch.ones(VOCAB, WIDTH)
    backward(inputs, weight, total, batch, config)
    once = gradients(config, batch, support=False)[1]
    torch.testing.assert_close(total, once + 1, rtol=0, atol=1e-6)  # an ulp of 1 is 1.2e-7


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_logits_of_all_tokens_are_never_held(level: Any) -> None:
    num_images, num_tokens, width, vocab = 8, 128, 8, 2048
    config = ObjectiveConfig(kl_level=level, beta=0.2)  # sequence: through autograd
    hidden = torch.randn(num_images * num_tokens, width, requires_grad=True)
    chosen = torch.randint(0, vocab, (num_images * num_tokens,))
    batch = LossBatch(
        torch.randn(num_images),
        LossScale(num_images, num_images * num_tokens, num_tokens),
        ref_logprobs=torch.full((num_images, num_tokens), -math.log(vocab)),
    )
    weight = torch.randn(vocab, width, requires_grad=True)
    inputs = HeadInputs(hidden * 1.0, chosen, 1.0, None)
    with _LargestTensor() as largest:
        backward(inputs, weight, torch.zeros(vocab, width), batch, config)
    # On a CPU a chunk is 256 rows of logits.
    assert largest.elements == 256 * vocab
    assert largest.elements < num_images * num_tokens * vocab
