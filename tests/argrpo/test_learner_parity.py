"""Quirks of released codes: each moves what it should, and nothing where it is off."""

from typing import Any

import pytest
import torch
from torch import Tensor

from argrpo.advantages import Advantages, group_advantages
from argrpo.config import (
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    TokenizerConfig,
    TrainConfig,
)
from argrpo.engine.conditions import TextFeatures
from argrpo.engine.rollout import Rollout
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.entropy_control import EntropyConfig
from argrpo.learner import Learner
from argrpo.learner_config import ParityConfig
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.pairing import check_first_token_mask
from argrpo.objective_config import ObjectiveConfig
from argrpo.schedules import LearningRateConfig
from argrpo.token_scores import scored

PROMPTS, GROUP = 3, 4
IMAGES = PROMPTS * GROUP


def make_policy(**sizes: Any) -> LlamaGen:
    torch.manual_seed(4)
    defaults = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "vocab_size": 24}
    policy = LlamaGen(
        LlamaGenConfig(**{**defaults, "image_size": 48, "num_classes": 10, **sizes})  # type: ignore[arg-type]
    )
    with torch.no_grad():  # far enough from uniform for conditions to matter
        policy.output.weight.mul_(20)
    return policy


def make_config(**settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "policy": PolicyConfig(path="unused"),
        "prompts_per_step": PROMPTS,
        "images_per_prompt": GROUP,
        "micro_batch": 5,
        "optimizer": OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
    }
    return TrainConfig(
        output_dir="unused",
        tokenizer=TokenizerConfig(path="unused"),
        rewards=[RewardConfig(name="clip")],
        **{**defaults, **settings},
    )


def draw(policy: LlamaGen) -> Rollout:
    labels = torch.arange(PROMPTS).repeat_interleave(GROUP)
    return RolloutEngine(policy, max_slots=IMAGES).draw(labels, SamplingParams(), seed=0)


def some_advantages() -> Advantages:
    generator = torch.Generator().manual_seed(0)
    return group_advantages(torch.randn(PROMPTS, GROUP, generator=generator))


def step(policy: LlamaGen, config: TrainConfig, rollout: Rollout) -> dict[str, float]:
    learner = Learner(policy, config)
    return learner.learn(learner.prepare(rollout, some_advantages()), 0)


def weights(policy: LlamaGen) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def test_the_released_sum_over_a_group_is_its_size_times_the_mean() -> None:
    rollout = draw(make_policy())
    mean = step(make_policy(), make_config(), rollout)
    total = step(make_policy(), make_config(parity=ParityConfig(sum_over_group=True)), rollout)
    assert total["loss"] == pytest.approx(GROUP * mean["loss"], rel=1e-5, abs=1e-9)
    assert total["grad_norm"] == pytest.approx(GROUP * mean["grad_norm"], rel=1e-5)


def test_the_released_clip_moves_the_second_pass_only() -> None:
    rollout = draw(make_policy())
    moved = {}
    for epochs in (1, 4):
        for is_reversed in (False, True):
            policy = make_policy()
            config = make_config(
                inner_epochs=epochs,
                parity=ParityConfig(reversed_clip=is_reversed),
                objective=ObjectiveConfig(epsilon=0.01),
            )
            step(policy, config, rollout)
            moved[epochs, is_reversed] = weights(policy)
    assert torch.equal(moved[1, False], moved[1, True])
    assert not torch.equal(moved[4, False], moved[4, True])


def test_released_label_dropout_makes_ratios_of_two_conditions() -> None:
    rollout = draw(make_policy())
    config = make_config(inner_epochs=2, parity=ParityConfig(label_dropout=0.5))
    learner = Learner(make_policy(), config)
    old = learner.prepare(rollout, some_advantages()).old_logprobs
    assert old is not None
    is_null = (old - rollout.logprobs).abs().amax(dim=1) > 1e-3
    assert 0 < is_null.sum() < IMAGES
    again = Learner(make_policy(), config).prepare(rollout, some_advantages()).old_logprobs
    assert again is not None
    assert torch.equal(old, again), "the run's seed decides"


def test_texts_have_no_label_to_drop() -> None:
    policy = make_policy(model_type="t2i", caption_dim=8, prefix_len=3)
    texts = TextFeatures(torch.randn(IMAGES, 3, 8), torch.ones(IMAGES, 3, dtype=torch.int64))
    rollout = RolloutEngine(policy, max_slots=IMAGES).draw(texts, SamplingParams(), seed=0)
    config = make_config(parity=ParityConfig(label_dropout=0.1))
    with pytest.raises(ValueError, match=r"parity.label_dropout: expected 0 for a text"):
        step(policy, config, rollout)


def test_the_released_first_token_mask_moves_token_0_of_short_prompts_alone() -> None:
    policy = make_policy(model_type="t2i", caption_dim=8, prefix_len=3, text_padding="right")
    lengths = torch.arange(IMAGES) % 3 + 1
    texts = TextFeatures(torch.randn(IMAGES, 3, 8) * 50, torch.arange(3) < lengths[:, None])
    rollout = RolloutEngine(policy, max_slots=IMAGES).draw(texts, SamplingParams(), seed=0)
    scores = {}
    for is_released in (False, True):
        parity = ParityConfig(first_token_mask=is_released)
        learner = Learner(policy, make_config(inner_epochs=2, parity=parity))
        experience = learner.prepare(rollout, some_advantages())
        assert experience.old_logprobs is not None and experience.ref_logprobs is not None
        # The reference is the policy, so that both see the same mask.
        assert torch.equal(experience.old_logprobs, experience.ref_logprobs)
        scores[is_released] = experience.old_logprobs
    # fp32 logits of size 10 in another order, by the cached steps.
    torch.testing.assert_close(scores[False], rollout.logprobs, atol=1e-4, rtol=0)
    moved = scores[True] != scores[False]
    assert moved[lengths < 3, 0].all()
    assert not moved[lengths == 3].any() and not moved[:, 1:].any()


def test_a_first_token_mask_needs_padding_on_the_right() -> None:
    policy = make_policy(model_type="t2i", caption_dim=8, prefix_len=3)
    with pytest.raises(ValueError, match=r"first_token_mask: expected policy.text_padding right"):
        check_first_token_mask(policy, True)
    check_first_token_mask(policy, False)


def test_released_bf16_weights_lose_small_updates() -> None:
    moved = {}
    for is_bf16 in (False, True):
        policy = make_policy().bfloat16()
        before = weights(policy)
        config = make_config(
            policy=PolicyConfig(path="unused", dtype="bfloat16"),
            parity=ParityConfig(bf16_masters=is_bf16),
            optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=2e-5)),
        )
        learner = Learner(policy, config)
        rollout = draw(policy)
        for _ in range(5):  # 1e-4 together: over half a unit of a weight of 0.02, where one is not
            learner.learn(learner.prepare(rollout, some_advantages()), 0)
        moved[is_bf16] = (weights(policy) != before).float().mean().item()
    assert moved[True] < 0.8 * moved[False]


def test_each_place_of_a_group_has_the_coefficient_of_its_own_entropy() -> None:
    policy, heard = make_policy(), []

    def rule(entropy: float) -> float:
        heard.append(entropy)
        return 0.1 * entropy

    rollout, config = draw(policy), make_config(inner_epochs=2)
    learner = Learner(policy, config)
    experience = learner.prepare(rollout, some_advantages())
    before = scored(policy, experience.tokens, IMAGES).entropies
    learner.learn(experience, 0, entropy_rule=rule)
    want = [before[place::GROUP].mean().item() for place in range(GROUP)]
    # Sums of fp32 in another order.
    assert heard[:GROUP] == pytest.approx(want, rel=1e-5)
    assert heard[GROUP:] != heard[:GROUP]  # the second pass measures the policy that has moved
    assert len(heard) == 2 * GROUP


def test_coefficients_by_completion_are_those_of_a_tensor() -> None:
    moved = []
    for by_rule in (False, True):
        policy = make_policy()
        learner = Learner(policy, make_config())
        experience = learner.prepare(draw(policy), some_advantages())
        if by_rule:
            metrics = learner.learn(experience, 0, entropy_rule=lambda entropy: 0.1 * entropy)
        else:
            entropies = scored(policy, experience.tokens, 5).entropies
            of_places = 0.1 * entropies.mean(dim=1).view(PROMPTS, GROUP).mean(dim=0)
            learner.learn(experience, 0, entropy_coef=of_places.repeat(PROMPTS))
        moved.append(weights(policy))
    # The rule is told in fp64 what the tensor holds in fp32.
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-6)
    assert metrics["entropy/coef"] == pytest.approx(of_places.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected entropy.control loofid and objective.policy conditional with it, got const"),
        (
            {
                "entropy": EntropyConfig(control="loofid"),
                "objective": ObjectiveConfig(policy="guided"),
            },
            "got loofid and guided",
        ),
        (
            {"entropy": EntropyConfig(control="loofid"), "minibatches": 2},
            "minibatches: expected a divisor of the 3 prompts",
        ),
    ],
)
def test_coefficients_by_completion_want_whole_groups_and_their_control(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(parity=ParityConfig(entropy_by_completion=True), **settings)
