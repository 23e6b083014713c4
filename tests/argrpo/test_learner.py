"""From a rollout to a step of the policy: what is scored, what it is compared with, what moves.

Over 300 lines because every test builds the same small run.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from argrpo.advantages import Advantages, group_advantages, normalise_then_sum
from argrpo.config import (
    AdvantageConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    TokenizerConfig,
    TrainConfig,
)
from argrpo.engine.rollout import Rollout
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.learner import Learner
from argrpo.learner_config import ParityConfig, ReferenceConfig
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.objective_config import ObjectiveConfig
from argrpo.schedules import LearningRateConfig

PROMPTS, GROUP = 3, 4
IMAGES = PROMPTS * GROUP
DRAWS = {
    "plain": SamplingParams(),
    "guided": SamplingParams(guidance_scale=3.0, temperature=0.9),
    "interval": SamplingParams(guidance_scale=3.0, guidance_interval=2),
    "filtered": SamplingParams(guidance_scale=2.0, temperature=1.1, top_k=9, top_p=0.9),
}


def make_policy(**sizes: Any) -> LlamaGen:
    torch.manual_seed(4)
    defaults = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "vocab_size": 24}
    policy = LlamaGen(
        LlamaGenConfig(**{**defaults, "image_size": 48, "num_classes": 10, **sizes})  # type: ignore[arg-type]
    )
    with torch.no_grad():  # far enough from uniform for guidance and filters to matter
        policy.output.weight.mul_(20)
    return policy


def make_config(params: SamplingParams | None = None, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "policy": PolicyConfig(path="unused"),
        "prompts_per_step": PROMPTS,
        "images_per_prompt": GROUP,
        "micro_batch": 5,
        "rollout": params or SamplingParams(),
        "optimizer": OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
    }
    return TrainConfig(
        output_dir="unused",
        tokenizer=TokenizerConfig(path="unused"),
        rewards=[RewardConfig(name="clip")],
        **{**defaults, **settings},
    )


def draw(policy: LlamaGen, params: SamplingParams, seed: int = 0) -> Rollout:
    labels = torch.arange(PROMPTS).repeat_interleave(GROUP)
    engine = RolloutEngine(policy, max_slots=IMAGES)
    return engine.draw(labels, params, seed=seed, support=params.is_filtered)


def some_advantages(seed: int = 0) -> Advantages:
    generator = torch.Generator().manual_seed(seed)
    return group_advantages(torch.randn(PROMPTS, GROUP, generator=generator))


def step(
    policy: LlamaGen, config: TrainConfig, rollout: Rollout | None = None
) -> tuple[Learner, dict[str, float]]:
    learner = Learner(policy, config)
    rollout = draw(policy, config.rollout) if rollout is None else rollout
    return learner, learner.learn(learner.prepare(rollout, some_advantages()), 0)


def weights(policy: LlamaGen) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


@pytest.mark.parametrize("name", DRAWS)
def test_the_guided_policy_scores_what_drew(name: str) -> None:
    config = make_config(DRAWS[name], objective=ObjectiveConfig(policy="guided"))
    _, metrics = step(make_policy(), config)
    # fp32 rounding of one path against the other; the project's own bound on a CPU.
    assert metrics["ratio_max_abs_dev"] <= 1e-3
    assert metrics["ratio_max_abs_dev"] > 0, "compared with the draw, not with itself"
    assert metrics["sampling/sampling_logp_difference/max"] <= 1e-3
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-9), "the reference is the policy still"


@pytest.mark.parametrize("name", ["guided", "interval", "filtered"])
def test_the_conditional_policy_does_not_score_what_drew_and_says_so(name: str) -> None:
    _, metrics = step(make_policy(), make_config(DRAWS[name]))
    assert metrics["ratio_max_abs_dev"] == 0.0
    assert metrics["sampling/sampling_logp_difference/mean"] > 0.05


def test_a_filtered_draw_without_its_kept_sets_cannot_be_scored_as_drawn() -> None:
    policy, config = make_policy(), make_config(objective=ObjectiveConfig(policy="guided"))
    rollout = replace(draw(policy, DRAWS["filtered"]), support=None)
    with pytest.raises(ValueError, match=r"rollout.support: expected the kept sets"):
        Learner(policy, config).prepare(rollout, some_advantages())
    assert Learner(policy, config).wants_support
    assert not Learner(policy, make_config()).wants_support


@pytest.mark.parametrize("name", ["guided", "filtered"])
def test_the_reference_is_scored_at_the_same_guidance_temperature_and_support(name: str) -> None:
    policy, params = make_policy(), DRAWS[name]
    learner = Learner(policy, make_config(params, objective=ObjectiveConfig(policy="guided")))
    rollout = draw(policy, params)
    with torch.no_grad():
        policy.output.weight.mul_(0.5)
    experience = learner.prepare(rollout, some_advantages())
    assert experience.ref_logprobs is not None
    # The draw was the reference's.
    torch.testing.assert_close(experience.ref_logprobs, rollout.logprobs, atol=1e-4, rtol=0)


def test_one_update_needs_no_pass_before_it_and_several_do() -> None:
    policy = make_policy()
    rollout = draw(policy, SamplingParams())
    once = Learner(policy, make_config()).prepare(rollout, some_advantages())
    assert once.old_logprobs is None
    for settings in ({"inner_epochs": 2}, {"minibatches": 2}):
        old = Learner(policy, make_config(**settings)).prepare(rollout, some_advantages())
        assert old.old_logprobs is not None
        torch.testing.assert_close(old.old_logprobs, rollout.logprobs, atol=1e-4, rtol=0)
        assert not torch.equal(old.old_logprobs, rollout.logprobs)
    drawn = make_config(inner_epochs=2, objective=ObjectiveConfig(old_logprobs="draw"))
    given = Learner(policy, drawn).prepare(rollout, some_advantages())
    assert given.old_logprobs is rollout.logprobs


@pytest.mark.parametrize("kind", ["conditional", "guided"])
def test_a_step_at_the_draws_logprobs_is_that_of_recomputed_ones(kind: Any) -> None:
    params = DRAWS["guided"] if kind == "guided" else SamplingParams()
    moved = []
    for old in ("recomputed", "draw"):
        objective = ObjectiveConfig(policy=kind, old_logprobs=old)  # type: ignore[arg-type]
        policy = make_policy()
        _, metrics = step(policy, make_config(params, inner_epochs=2, objective=objective))
        assert metrics["ratio_max_abs_dev"] > 1e-4, "the second pass has moved"
        moved.append(weights(policy))
    before = weights(make_policy())
    change = (moved[0] - before).norm()
    # Log-probs that differ by 1e-6 move a gradient by as much of itself.
    assert (moved[0] - moved[1]).norm() < 1e-2 * change


def test_minibatches_take_a_step_each_on_their_own_images() -> None:
    _, metrics = step(make_policy(), make_config(minibatches=2, inner_epochs=3))
    assert metrics["optimizer_step"] == 6


def test_a_minibatch_is_a_step_of_its_images_alone() -> None:
    rollout = draw(make_policy(), SamplingParams())
    rewards = torch.randn(PROMPTS, GROUP)
    rewards[1:] = torch.nan  # only the first of three minibatches takes a step
    advantages = group_advantages(rewards)
    learner = Learner(make_policy(), make_config(minibatches=PROMPTS))
    split = learner.learn(learner.prepare(rollout, advantages), 0)
    first = replace(
        rollout,
        token_ids=rollout.token_ids[:GROUP],
        logprobs=rollout.logprobs[:GROUP],
        conditions=rollout.conditions[:GROUP],  # type: ignore[index]
    )
    alone_learner = Learner(make_policy(), make_config(prompts_per_step=1))
    alone = alone_learner.learn(alone_learner.prepare(first, group_advantages(rewards[:1])), 0)
    # Means over three updates, two of which took no step; fp32 sums by another way.
    assert PROMPTS * split["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
    assert PROMPTS * split["loss"] == pytest.approx(alone["loss"], abs=1e-6)


def test_a_minibatch_without_a_score_takes_no_step() -> None:
    policy, config = make_policy(), make_config(minibatches=3)
    rewards = torch.randn(PROMPTS, GROUP)
    rewards[1] = torch.nan
    learner = Learner(policy, config)
    experience = learner.prepare(draw(policy, config.rollout), group_advantages(rewards))
    metrics = learner.learn(experience, 0)
    assert metrics["optimizer_step"] == 2
    assert all(value == value for value in metrics.values())


@pytest.mark.parametrize("device", ["policy", "cpu"])
def test_a_reference_is_frozen_or_follows_every_so_many_steps(device: Any) -> None:
    kls = {}
    for every in (0, 2):
        policy = make_policy()
        config = make_config(reference=ReferenceConfig(sync_every=every, device=device))
        learner = Learner(policy, config)
        kls[every] = []
        for number in range(4):
            experience = learner.prepare(draw(policy, config.rollout, number), some_advantages())
            kls[every].append(learner.learn(experience, number)["kl"])
    assert [kl > 1e-8 for kl in kls[0]] == [False, True, True, True]
    assert [kl > 1e-8 for kl in kls[2]] == [False, True, False, True]
    assert kls[0][:2] == kls[2][:2]


def test_checkpointed_layers_train_the_same() -> None:
    plain, again = make_policy(), make_policy()
    step(plain, make_config())
    step(again, make_config(gradient_checkpointing=True))
    assert again.checkpoints_layers
    assert torch.equal(weights(plain), weights(again))


def test_the_average_of_weights_is_shown_and_the_policy_goes_on_from_its_own() -> None:
    policy = make_policy()
    before = weights(policy)
    learner, _ = step(policy, make_config(weight_ema=0.9))
    after = weights(policy)
    with learner.averaged():
        torch.testing.assert_close(weights(policy), 0.9 * before + 0.1 * after)
    assert torch.equal(weights(policy), after)
    plain, _ = step(make_policy(), make_config())
    with plain.averaged():
        pass


def test_components_share_a_pass_and_may_be_clipped_apart() -> None:
    scores = torch.randn(PROMPTS, GROUP, 2)
    advantages = normalise_then_sum(scores, torch.tensor([1.0, 2.0]))
    moved = []
    for is_apart in (False, True):
        policy = make_policy()
        config = make_config(
            objective=ObjectiveConfig(clip_components=is_apart),
            advantage=AdvantageConfig(aggregation="normalize_then_sum"),
        )
        learner = Learner(policy, config)
        learner.learn(learner.prepare(draw(policy, config.rollout), advantages), 0)
        moved.append(weights(policy))
    # With a ratio of 1 nothing is clipped: the same sum, in another order.
    torch.testing.assert_close(moved[0], moved[1], atol=1e-6, rtol=0)


def test_an_image_level_objective_has_the_gradient_of_its_formula() -> None:
    policy, beta, coefficient = make_policy(), 3.0, 0.01
    config = make_config(
        objective=ObjectiveConfig(
            importance_sampling_level="sequence",
            kl_level="sequence",
            beta=beta,
            entropy_coef=coefficient,
            clip_components=True,
        ),
        advantage=AdvantageConfig(aggregation="normalize_then_sum"),
        parity=ParityConfig(sum_over_group=True),
    )
    advantages = normalise_then_sum(torch.randn(PROMPTS, GROUP, 2), torch.tensor([1.0, 2.0]))
    rollout = draw(policy, config.rollout)
    learner = Learner(policy, config)
    with torch.no_grad():
        policy.output.weight.mul_(0.9)  # away from the reference
    experience = learner.prepare(rollout, advantages)
    by_hand = copy.deepcopy(policy)
    log_probs = by_hand.logits(rollout.conditions, rollout.token_ids).log_softmax(-1)
    means = log_probs.gather(2, rollout.token_ids[..., None]).squeeze(2).mean(dim=1)
    entropies = -(log_probs.exp() * log_probs).sum(-1).mean(dim=1)
    assert experience.ref_logprobs is not None
    difference = experience.ref_logprobs.mean(dim=1) - means
    surrogate = (means - means.detach()).exp() * advantages.values.flatten()
    k3 = difference.exp() - difference - 1
    ((beta * k3 - surrogate - coefficient * entropies).sum() / PROMPTS).backward()
    gradients = [p.grad.flatten() for p in by_hand.parameters() if p.grad is not None]
    got = learner.learn(experience, 0)["grad_norm"]
    assert got == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-4)  # fp32 sums


def test_an_entropy_coefficient_replaces_that_of_the_objective() -> None:
    moved = []
    for configured, given in ((0.3, None), (0.0, 0.3), (0.0, torch.full((IMAGES,), 0.3))):
        policy = make_policy()
        config = make_config(objective=ObjectiveConfig(entropy_coef=configured))
        learner = Learner(policy, config)
        experience = learner.prepare(draw(policy, config.rollout), some_advantages())
        learner.learn(experience, 0, entropy_coef=given)
        moved.append(weights(policy))
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[0], moved[2])
    plain = make_policy()
    step(plain, make_config())
    assert not torch.equal(moved[0], weights(plain))


def test_draws_of_another_model_are_weighed_up_to_the_cap() -> None:
    policy, other = make_policy(), make_policy()
    with torch.no_grad():
        other.output.weight.mul_(0.5)
    rollout = draw(other, SamplingParams())
    results = []
    for cap in (None, 1.5):
        trained = copy.deepcopy(policy)
        config = make_config(objective=ObjectiveConfig(importance_sampling_cap=cap))
        results.append((step(trained, config, rollout)[1], weights(trained)))
    assert results[0][0]["loss"] != results[1][0]["loss"]
    assert not torch.equal(results[0][1], results[1][1])


def test_the_entropy_of_the_policy_is_logged_whatever_is_scored() -> None:
    policy = make_policy()
    _, conditional = step(policy, make_config(DRAWS["guided"]))
    _, guided = step(
        make_policy(), make_config(DRAWS["guided"], objective=ObjectiveConfig(policy="guided"))
    )
    assert guided["entropy/policy"] > 1.2 * guided["entropy/scored"], "guidance sharpens"
    tempered = make_policy()
    rollout = draw(tempered, SamplingParams())
    _, plain = step(make_policy(), make_config(micro_batch=IMAGES), rollout)
    warm = replace(rollout, params=SamplingParams(temperature=2.0))
    _, scored = step(make_policy(), make_config(micro_batch=IMAGES), warm)
    assert scored["entropy/policy"] == pytest.approx(plain["entropy/policy"], rel=1e-6)
    assert "entropy/scored" in conditional


@pytest.mark.parametrize("kind", ["conditional", "guided"])
def test_a_bf16_policy_hands_its_heads_gradient_to_the_masters_unrounded(kind: Any) -> None:
    policy = make_policy().bfloat16()
    config = make_config(DRAWS["guided"], objective=ObjectiveConfig(policy=kind))
    _, metrics = step(policy, config)
    assert metrics["grad_norm"] > 0
    assert all(parameter.grad is None for parameter in policy.parameters())
