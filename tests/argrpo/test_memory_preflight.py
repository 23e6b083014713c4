"""The memory of an optimizer step, foreseen and then measured by the allocator's own events."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from argrpo.advantages import group_advantages
from argrpo.config import PolicyConfig, ReferenceConfig, RewardConfig, TokenizerConfig, TrainConfig
from argrpo.engine.conditions import TextFeatures, select
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.learner import Learner
from argrpo.learner_config import ParityConfig
from argrpo.memory_preflight import Line, MemoryForecast, forecast_memory
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.objective_config import ObjectiveConfig

GB = 10**9
BF16 = PolicyConfig(path="unused", dtype="bfloat16")
GUIDED = SamplingParams(guidance_scale=2.0, top_k=100)
RUNS: dict[str, dict[str, Any]] = {
    "one micro-batch": {"micro_batch": 16},
    "several micro-batches": {"micro_batch": 4},
    "no reference": {"micro_batch": 16, "objective": ObjectiveConfig(beta=0.0)},
    "checkpointed": {"micro_batch": 16, "gradient_checkpointing": True},
    "guided": {"micro_batch": 8, "objective": ObjectiveConfig(policy="guided"), "rollout": GUIDED},
    "more gradients than activations": {"micro_batch": 1, "minibatches": 16},
    "two passes": {"micro_batch": 16, "inner_epochs": 2},
    "texts": {"micro_batch": 16},
    "texts split between micro-batches": {"micro_batch": 6},
    "guided texts": {
        "micro_batch": 4,
        "objective": ObjectiveConfig(policy="guided"),
        "rollout": GUIDED,
    },
    "bf16": {"micro_batch": 8, "policy": BF16},
    "bf16 masters": {"micro_batch": 8, "policy": BF16, "parity": ParityConfig(bf16_masters=True)},
    "bf16 masters in one micro-batch, most of it gradients": {
        "micro_batch": 1,
        "minibatches": 16,
        "policy": BF16,
        "parity": ParityConfig(bf16_masters=True),
    },
}


def make_run(*, prefix_len: int = 1, **settings: Any) -> tuple[LlamaGen, TrainConfig]:
    config = TrainConfig(
        **{
            "output_dir": "unused",
            "policy": PolicyConfig(path="unused"),
            "tokenizer": TokenizerConfig(path="unused"),
            "rewards": [RewardConfig(name="clip")],
            "prompts_per_step": 2,
            "images_per_prompt": 8,
            **settings,
        }
    )
    sizes = {"dim": 64, "num_layers": 3, "num_heads": 4, "ffn_dim": 192, "vocab_size": 512}
    if prefix_len > 1:
        sizes |= {"prefix_len": prefix_len, "caption_dim": 16}
    kind = "c2i" if prefix_len == 1 else "t2i"
    policy = LlamaGen(
        LlamaGenConfig(**sizes, image_size=64, downsample=8, num_classes=10, model_type=kind)
    )
    policy.to(torch.bfloat16 if config.policy.dtype == "bfloat16" else torch.float32)
    policy.checkpoints_layers = config.gradient_checkpointing
    return policy, config


def make_texts() -> TextFeatures:
    """One text of 60 positions and one nearly as long."""
    mask = torch.arange(60) >= torch.tensor([[0], [5]])
    return TextFeatures(torch.randn(2, 60, 16), mask)


def allocated_peak(run: Any) -> int:
    """The most bytes above those before, from the CPU allocator's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = sorted(
        (event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    now = peak = 0
    for event in memory:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("name", RUNS)
def test_the_forecast_is_within_5_percent_of_the_truth(name: str) -> None:
    is_text = "text" in name
    policy, config = make_run(**RUNS[name], prefix_len=60 if is_text else 1)
    conditions = make_texts() if is_text else torch.arange(2)
    forecast = forecast_memory(policy, config, conditions)
    drawn = select(conditions, torch.arange(2).repeat_interleave(8))
    assert all(parameter.grad is None for parameter in policy.parameters())
    engine = RolloutEngine(policy, max_slots=16)
    support = config.objective.policy == "guided"
    rollout = engine.draw(drawn, config.rollout, seed=0, support=support)
    learner = Learner(policy, config)
    advantages = group_advantages(torch.randn(2, 8))
    # The first step makes the moments; from the second on everything stands.
    learner.learn(learner.prepare(rollout, advantages), 0)
    experience = learner.prepare(rollout, advantages)
    tensors = [rollout.token_ids, rollout.logprobs, rollout.entropies, rollout.support]
    tensors += [experience.ref_logprobs, experience.old_logprobs]
    standing = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    num_policies = 2 if config.objective.beta > 0 else 1
    standing += num_policies * sum(parameter.nbytes for parameter in policy.parameters())
    standing += sum(tensor.nbytes for tensor in learner._update._optimizer.state_dict().values())
    truth = standing + allocated_peak(lambda: learner.learn(experience, 1))
    # What an operation holds only while it runs is not foreseen.
    assert forecast.peak(config.micro_batch) == pytest.approx(truth, rel=0.05)


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    forecast = MemoryForecast(
        weights=100,
        optimizer=200,
        gradients=100,
        gradients_before=100,
        rollout=0,
        trunk=Line(fixed=10, per_image=20),
        kept=Line(fixed=0, per_image=10),
        head=5,
    )
    assert forecast.peak(2) == 400 + 10 + 40
    assert forecast.largest_micro_batch(450, 8) == 2
    assert forecast.largest_micro_batch(449, 8) == 1
    assert forecast.largest_micro_batch(10**6, 8) == 8
    assert forecast.largest_micro_batch(400, 8) == 0


@pytest.mark.parametrize(
    ("micro_batch", "num_prompts"), [(1, 1), (2, 1), (4, 1), (8, 2), (3, 2), (5, 2), (6, 2), (7, 3)]
)
def test_a_micro_batch_counts_every_text_that_it_may_touch(
    micro_batch: int, num_prompts: int
) -> None:
    forecast = MemoryForecast(
        *(0, 0, 0, 0, 0), Line(0, 0, per_prompt=1), Line(0, 0), head=0, images_per_prompt=4
    )
    rows = torch.arange(240) // 4
    touched = [len(part.unique()) for part in rows.split(micro_batch)]
    assert forecast.peak(micro_batch) == num_prompts == max(touched)


def test_the_longest_texts_are_rehearsed_wherever_they_stand() -> None:
    policy, config = make_run(prefix_len=60)
    texts = make_texts()
    mask = torch.cat([torch.arange(60)[None] >= 58, texts.mask])
    among = TextFeatures(torch.randn(3, 60, 16), mask)
    assert forecast_memory(policy, config, among) == forecast_memory(policy, config, texts)
    alone = forecast_memory(policy, config, select(texts, torch.tensor([0])))
    assert alone.trunk.per_prompt == 0


def test_the_head_counts_where_its_chunk_is_larger_than_what_the_trunk_needs() -> None:
    small = MemoryForecast(0, 0, 0, 0, 0, Line(0, 10), Line(0, 8), head=1000)
    assert small.peak(4) == 4 * 8 + 1000


def test_what_is_foreseen_is_said_with_a_remedy() -> None:
    policy, config = make_run(micro_batch=4)
    forecast = forecast_memory(policy, config, torch.arange(2))
    plenty, scarce = forecast.describe(config, GB), forecast.describe(config, 1000)
    assert "micro-batches of 4" in plenty[0]
    assert plenty[1] == "in 1.00 GB micro_batch 16 fits"
    assert "set gradient_checkpointing, reference.device cpu" in scarce[1]
    assert len(forecast.describe(config, forecast.peak(4))) == 1


def test_the_cache_gets_a_share_of_what_an_optimizer_step_leaves() -> None:
    policy, config = make_run(micro_batch=4)
    forecast = forecast_memory(policy, config, torch.arange(2))
    peak = forecast.peak(4)
    assert forecast.left_for_cache(config, peak + GB) == GB * 8 // 10
    with pytest.raises(ValueError, match=r"micro_batch: expected an optimizer step that leaves ro"):
        forecast.left_for_cache(config, peak)


def test_a_reference_on_the_cpu_and_an_average_are_counted_where_they_stand() -> None:
    policy, beside = make_run(micro_batch=4)
    _, away = make_run(micro_batch=4, reference=ReferenceConfig(device="cpu"))
    _, averaged = make_run(micro_batch=4, weight_ema=0.9)
    own = sum(parameter.nbytes for parameter in policy.parameters())
    counted = [
        forecast_memory(policy, config, torch.arange(2)).weights
        for config in (beside, away, averaged)
    ]
    assert counted == [2 * own, own, 3 * own]
