"""The whole loop on tiny models: draw, decode, score, compare, update."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import REWARD, config_of, run, write_run_models
from transformers import T5EncoderModel

from argrpo import prompt_encoding, run_models
from argrpo.collection import draw_seed
from argrpo.config import DataConfig, OptimizerConfig, PolicyConfig
from argrpo.engine.sampling_params import SamplingParams
from argrpo.learner_config import ParityConfig
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy, save_policy
from argrpo.objective_config import ObjectiveConfig
from argrpo.schedules import LearningRateConfig
from argrpo.text_config import TextEncoderConfig
from argrpo.text_encoder import TextEncoder, load_text_encoder
from argrpo.trainer import Trainer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_models(tmp_path_factory.mktemp("models"))


def test_the_reward_rises(models: Path, tmp_path: Path) -> None:
    config = replace(
        config_of(models),
        num_steps=30,
        images_per_prompt=8,
        objective=ObjectiveConfig(beta=0.0),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-2)),
    )
    _, recorder = run(config, tmp_path / "run")
    rewards = [row["reward"] for row in recorder.rows]
    # 10 steps of 32 images; without learning the difference of two such means is 0 with this
    # standard error, and three of them come by chance once in 700 runs.
    standard_error = recorder.rows[0]["reward_std"] * (2 / (10 * 32)) ** 0.5
    assert sum(rewards[-10:]) / 10 - sum(rewards[:10]) / 10 > 3 * standard_error


def test_the_same_seed_gives_the_same_weights_bit_for_bit(models: Path, tmp_path: Path) -> None:
    first, _ = run(config_of(models), tmp_path / "a")
    second, _ = run(config_of(models), tmp_path / "b")
    third, _ = run(replace(config_of(models), seed=1), tmp_path / "c")
    weights = [t.policy.head_weight for t in (first, second, third)]
    for name, value in first.policy.state_dict().items():
        assert torch.equal(value, second.policy.state_dict()[name]), name
    assert not torch.equal(weights[0], weights[2])


def test_micro_batches_change_memory_and_not_the_result(models: Path, tmp_path: Path) -> None:
    whole, rows = run(config_of(models), tmp_path / "whole")
    split, split_rows = run(replace(config_of(models), micro_batch=3), tmp_path / "split")
    # Two Adam steps of 1e-3; sums in another order move a gradient by about 1e-7 of its size.
    torch.testing.assert_close(
        split.policy.head_weight, whole.policy.head_weight, atol=2e-5, rtol=0
    )
    assert split_rows.rows[0]["loss"] == pytest.approx(rows.rows[0]["loss"], abs=1e-5)


def test_a_step_reports_the_names_people_know(models: Path, tmp_path: Path) -> None:
    _, recorder = run(config_of(models), tmp_path / "run")
    names = set(recorder.rows[-1])
    reward = REWARD
    assert names >= {
        "reward", "reward_std", "frac_reward_zero_std", f"rewards/{reward}/mean",
        f"rewards/{reward}/std", "kl", "loss", "grad_norm", "learning_rate", "entropy/draw",
        "entropy/policy", "ratio_max_abs_dev", "clip_ratio/low_mean", "clip_ratio/high_mean",
        "clip_ratio/region_mean", "step_time", "time/rollout", "time/decode", "time/reward",
        "time/logprob", "time/update", "images_per_second", "num_tokens", "optimizer_step",
        "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
    }  # fmt: skip
    assert all(value == value for value in recorder.rows[-1].values())
    assert recorder.closed
    assert recorder.rows[-1]["optimizer_step"] == 2
    phases = sum(recorder.rows[-1][f"time/{p}"] for p in ("rollout", "decode", "reward"))
    assert phases < recorder.rows[-1]["step_time"]


def test_unguided_draws_are_scored_as_they_were_drawn(models: Path, tmp_path: Path) -> None:
    config = replace(config_of(models), rollout=SamplingParams(temperature=0.9))
    _, recorder = run(config, tmp_path / "run")
    # fp32 rounding of one path against the other, as for policy.logprobs
    gap = [
        recorder.rows[0][f"sampling/sampling_logp_difference/{name}"]
        for name in ("p50", "p99", "max")
    ]
    assert gap == sorted(gap) and gap[-1] < 1e-4
    assert recorder.rows[0]["ratio_max_abs_dev"] == 0.0
    assert recorder.rows[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert recorder.rows[1]["kl"] > 0


def test_the_guided_policy_trains_on_exactly_what_drew(models: Path, tmp_path: Path) -> None:
    rollout = SamplingParams(guidance_scale=2.0, temperature=0.9, top_k=20, top_p=0.9)
    objective = ObjectiveConfig(policy="guided", beta=0.1)
    config = replace(config_of(models), rollout=rollout, objective=objective, num_steps=3)
    _, recorder = run(config, tmp_path / "run")
    for row in recorder.rows:
        assert 0 < row["ratio_max_abs_dev"] <= 1e-3  # fp32 rounding of one path against the other
        assert row["entropy/scored"] == pytest.approx(row["entropy/draw"], rel=1e-4)
        assert row["entropy/policy"] > row["entropy/scored"]
    assert recorder.rows[-1]["kl"] > 0


def test_a_run_shows_and_saves_the_average_of_its_weights(models: Path, tmp_path: Path) -> None:
    trainer, _ = run(replace(config_of(models), weight_ema=0.9), tmp_path / "run")
    saved = load_policy(tmp_path / "run" / "checkpoints" / "step_000002").head_weight
    base = load_policy(models / "policy").head_weight
    moved = (trainer.policy.head_weight - base).norm()
    assert 0 < (saved - base).norm() < 0.3 * moved


def test_foreseeing_memory_changes_nothing(models: Path, tmp_path: Path) -> None:
    plain, _ = run(config_of(models), tmp_path / "plain")
    trainer = Trainer(replace(config_of(models), output_dir=str(tmp_path / "run")), [])
    (line,) = trainer.describe_memory()
    assert "an optimizer step holds" in line
    trainer.train()
    assert torch.equal(plain.policy.head_weight, trainer.policy.head_weight)


def test_inner_epochs_take_a_step_each(models: Path, tmp_path: Path) -> None:
    config = replace(config_of(models), inner_epochs=2, num_steps=1)
    _, recorder = run(config, tmp_path / "run")
    assert recorder.rows[0]["optimizer_step"] == 2
    assert recorder.rows[0]["ratio_max_abs_dev"] > 1e-4


def test_the_tuned_policy_loads_and_differs(models: Path, tmp_path: Path) -> None:
    trainer, recorder = run(config_of(models), tmp_path / "run")
    tuned = load_policy(tmp_path / "run" / "checkpoints" / "step_000002")
    base = load_policy(models / "policy")
    assert torch.equal(tuned.head_weight, trainer.policy.head_weight)
    assert not torch.equal(tuned.head_weight, base.head_weight)
    assert [step for step, _ in recorder.images] == [0, 2]
    assert all(path.is_file() for _, path in recorder.images)


def test_text_conditional_policies_train(models: Path, tmp_path: Path) -> None:
    config = replace(
        config_of(models),
        policy=PolicyConfig(path=str(models / "text_policy"), num_heads=2),
        data=DataConfig(text_features=str(models / "prompts.safetensors")),
        prompts_per_step=3,
    )
    trainer, recorder = run(config, tmp_path / "run")
    assert recorder.rows[1]["kl"] > 0
    assert trainer.policy.config.model_type == "t2i"
    assert "micro-batches of 12" in trainer.describe_memory()[0]
    dropping = replace(config, parity=ParityConfig(label_dropout=0.1))
    with pytest.raises(ValueError, match=r"parity.label_dropout: expected 0 for a text-conditio"):
        Trainer(replace(dropping, output_dir=str(tmp_path / "refused")), [])


def test_prompts_are_encoded_before_the_policy_is_there(
    models: Path, tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alive(kind: type) -> int:
        # A subclass of ndarray in a library fails when it is asked for its class.
        return sum(type(thing) is kind for thing in gc.get_objects())

    def encoder_alone(*args: Any, **options: Any) -> TextEncoder:
        before = alive(LlamaGen)
        assert before == held, "a policy stands beside the encoder"
        return load_text_encoder(*args, **options)

    def policy_alone(*args: Any, **options: Any) -> LlamaGen:
        assert alive(T5EncoderModel) == 0, "the encoder stands beside the policy"
        loaded.append(1)
        return load_policy(*args, **options)

    wide = LlamaGenConfig(
        **{"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "vocab_size": 32},
        **{"image_size": 16, "downsample": 4, "model_type": "t2i"},
        caption_dim=64,
        prefix_len=6,
    )
    save_policy(LlamaGen(wide), tmp_path / "policy")
    (tmp_path / "prompts.txt").write_text("a seven\na small zero\na handwritten seven, tilted!\n")
    config = replace(
        config_of(models),
        policy=PolicyConfig(path=str(tmp_path / "policy")),
        data=DataConfig(
            prompts=str(tmp_path / "prompts.txt"), text_encoder=TextEncoderConfig(path=str(tiny_t5))
        ),
        prompts_per_step=3,
        cache_dir=str(tmp_path / "cache"),
    )
    gc.collect()
    held, loaded = alive(LlamaGen), list[int]()
    monkeypatch.setattr(prompt_encoding, "load_text_encoder", encoder_alone)
    monkeypatch.setattr(run_models, "load_policy", policy_alone)
    trainer, recorder = run(config, tmp_path / "run")
    assert loaded
    assert recorder.rows[1]["kl"] > 0
    assert trainer.policy.config.prefix_len == 6
    # The second run finds the texts encoded, and draws the same.
    monkeypatch.setattr(prompt_encoding, "load_text_encoder", None)
    _, again = run(config, tmp_path / "again")
    assert again.rows[1]["reward"] == recorder.rows[1]["reward"]


def test_a_bf16_working_copy_trains_on_fp32_masters(models: Path, tmp_path: Path) -> None:
    config = config_of(models)
    config = replace(config, policy=replace(config.policy, dtype="bfloat16"))
    trainer, recorder = run(config, tmp_path / "run")
    assert trainer.policy.head_weight.dtype == torch.bfloat16
    assert trainer.policy.rotary.dtype == torch.float32
    assert recorder.rows[1]["kl"] > 0


@pytest.mark.gpu
def test_a_step_on_a_gpu_takes_conditions_from_the_cpu(models: Path, tmp_path: Path) -> None:
    _, recorder = run(replace(config_of(models), device="cuda"), tmp_path / "run")
    assert recorder.rows[1]["kl"] > 0


def test_seeds_of_steps_differ_and_do_not_depend_on_the_machine() -> None:
    assert draw_seed(0, 0) != draw_seed(0, 1) != draw_seed(1, 0)
    assert draw_seed(0, 0) == int.from_bytes(
        __import__("hashlib").blake2b(b"draw 0 0", digest_size=8).digest(), "little", signed=True
    )
