"""The fused head: three ways to the same gradients, and none holds [N, T, V]."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from argrpo.head_gradients import LearnedBatch, backward
from argrpo.kernels.token_filter import pack_support
from argrpo.kernels.token_logprobs import token_logprobs
from argrpo.loss_batch import LossBatch, LossScale
from argrpo.objective_config import ObjectiveConfig
from argrpo.objectives import has_fixed_scales, has_token_scales, policy_loss
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


def by_autograd(
    inputs: HeadInputs, weight: Tensor, total: Tensor, batch: LossBatch, config: ObjectiveConfig,
    *, reversed_clip: bool,
) -> LearnedBatch:  # fmt: skip
    """`backward`, but the loss itself says what its gradient is."""
    scores = token_logprobs(inputs.hidden, weight, *inputs[1:], weight_grad=total)
    logprobs, entropies = (score.view(IMAGES, TOKENS) for score in scores)
    loss = policy_loss(logprobs, entropies, batch, config, reversed_clip=reversed_clip)
    loss.loss.backward()
    return LearnedBatch(logprobs.detach(), loss.metrics)


def moving_batch(*, masked: bool, components: bool) -> LossBatch:
    """Ratios from 0.3 to 3, both signs of advantages, and nothing at the masked tokens."""
    inputs, weight, batch = case(support=False)
    logprobs = plain_logprobs(inputs, weight)[0].detach()
    old = logprobs + torch.empty(IMAGES, TOKENS).uniform_(-1.1, 1.1)
    drawn = old + torch.empty(IMAGES, TOKENS).uniform_(-0.5, 0.5)
    reference, mask = batch.ref_logprobs, torch.rand(IMAGES, TOKENS) < 0.7
    assert reference is not None
    if masked:
        old, drawn, reference = (
            values.masked_fill(~mask, math.nan) for values in (old, drawn, reference)
        )
    return replace(
        batch,
        advantages=torch.randn(IMAGES, 2) if components else batch.advantages,
        scale=LossScale(IMAGES, int(mask.sum()) if masked else IMAGES * TOKENS, TOKENS),
        mask=mask if masked else None,
        old_logprobs=old,
        ref_logprobs=reference,
        draw_logprobs=drawn,
    )


def check_as_autograd(
    batch: LossBatch, config: ObjectiveConfig, *, reversed_clip: bool = False
) -> None:
    assert has_token_scales(batch, config)
    found = []
    for way in (backward, by_autograd):
        inputs, weight, _ = case(support=True)
        total = torch.zeros(VOCAB, WIDTH)
        done = way(inputs, weight, total, batch, config, reversed_clip=reversed_clip)
        assert inputs.hidden.grad is not None
        found.append((done, {"hidden": inputs.hidden.grad, "weight": total}))
    (got, gradients_got), (want, gradients_wanted) = found
    for name, wanted in gradients_wanted.items():
        assert wanted.abs().max() > 1e-3, name
        torch.testing.assert_close(
            gradients_got[name], wanted, msg=lambda text, name=name: f"{name}: {text}", **SAME
        )
    assert torch.equal(got.logprobs, want.logprobs)
    # The same log-probs through the same algebra; the loss is one of them.
    assert got.metrics.named() == want.metrics.named()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("components", [False, True], ids=["one", "components"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_moving_ratios_give_the_gradients_and_metrics_of_autograd(
    loss_type: Any, components: bool, masked: bool
) -> None:
    batch = moving_batch(masked=masked, components=components)
    for clip, delta, cap, entropy_coef in itertools.product(
        ({"epsilon": 0.2}, {"epsilon": 0.1, "epsilon_high": 0.5}, {"epsilon": 0.9}),
        (None, 2.0),
        (None, 1.1),
        (0.0, torch.linspace(0.05, 0.2, IMAGES)),
    ):
        config = ObjectiveConfig(
            loss_type=loss_type, delta=delta, importance_sampling_cap=cap, **clip
        )
        check_as_autograd(replace(batch, entropy_coef=entropy_coef), config)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("components", [False, True], ids=["one", "components"])
def test_so_do_reversed_clips_no_kl_and_weights_of_the_draw_alone(
    components: bool, masked: bool
) -> None:
    batch = moving_batch(masked=masked, components=components)
    for reversed_clip, has_old, beta, cap, delta in itertools.product(
        (False, True), (False, True), (0.0, 0.2), (None, 1.1), (None, 2.0)
    ):
        config = ObjectiveConfig(beta=beta, importance_sampling_cap=cap, delta=delta)
        given = batch if has_old else replace(batch, old_logprobs=None)
        check_as_autograd(given, config, reversed_clip=reversed_clip)


class _Products(TorchDispatchMode):
    """How many matrix products were made."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0].rstrip("_")
        self.count += name in ("mm", "addmm", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("changed", "products"),
    [
        ({}, 3),
        ({"importance_sampling_cap": 2.0}, 3),
        ({"beta": 0.0, "kl_level": "sequence"}, 3),
        ({"importance_sampling_level": "sequence"}, 4),
        ({"kl_level": "sequence"}, 4),
    ],
    ids=str,
)
def test_the_logits_are_made_once_unless_tokens_need_their_image(
    changed: dict[str, Any], products: int
) -> None:
    inputs, weight, _ = case(support=False)
    batch = moving_batch(masked=False, components=False)
    config = ObjectiveConfig(entropy_coef=0.1, **changed)
    assert has_token_scales(batch, config) is (products == 3)
    assert not has_fixed_scales(batch, config)
    with _Products() as made:
        backward(inputs, weight, torch.zeros(VOCAB, WIDTH), batch, config)
    assert made.count == products


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


@pytest.mark.parametrize(
    ("level", "has_old"), [("token", False), ("token", True), ("sequence", True)]
)
def test_logits_of_all_tokens_are_never_held(level: Any, has_old: bool) -> None:
    num_images, num_tokens, width, vocab = 8, 128, 8, 2048
    config = ObjectiveConfig(kl_level=level, beta=0.2)  # sequence: through autograd
    uniform = torch.full((num_images, num_tokens), -math.log(vocab))
    hidden = torch.randn(num_images * num_tokens, width, requires_grad=True)
    chosen = torch.randint(0, vocab, (num_images * num_tokens,))
    batch = LossBatch(
        torch.randn(num_images),
        LossScale(num_images, num_images * num_tokens, num_tokens),
        old_logprobs=uniform if has_old else None,
        ref_logprobs=uniform,
    )
    weight = torch.randn(vocab, width, requires_grad=True)
    inputs = HeadInputs(hidden * 1.0, chosen, 1.0, None)
    with _LargestTensor() as largest:
        backward(inputs, weight, torch.zeros(vocab, width), batch, config)
    # On a CPU a chunk is 256 rows of logits.
    assert largest.elements == 256 * vocab
    assert largest.elements < num_images * num_tokens * vocab
