"""The whole loop on tiny models: draw, decode, score, compare, update."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5EncoderModel

from argrpo import prompt_encoding, run_models
from argrpo.collection import draw_seed
from argrpo.config import (
    DataConfig,
    OptimizerConfig,
    OutputConfig,
    PolicyConfig,
    RewardConfig,
    TokenizerConfig,
    TrainConfig,
)
from argrpo.data import Prompt
from argrpo.devices import choose_device
from argrpo.engine.sampling_params import SamplingParams
from argrpo.learner_config import ParityConfig
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy, save_policy, save_tokenizer
from argrpo.models.vq import VQConfig, VQTokenizer
from argrpo.non_finite import NonFiniteError
from argrpo.objective_config import ObjectiveConfig
from argrpo.run_folder import RunFolder
from argrpo.schedules import LearningRateConfig
from argrpo.text_config import TextEncoderConfig
from argrpo.text_encoder import TextEncoder, load_text_encoder
from argrpo.trainer import Trainer


def brighter_left(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """A reward that any policy can learn: how much brighter the left half is than the right.

    Not plain brightness, which the decoder's group norms take away. Scaled to a random decoder.
    """
    left, right = images.chunk(2, dim=3)
    return (left.mean(dim=(1, 2, 3)) - right.mean(dim=(1, 2, 3))) * 100


def sometimes_missing(images: Tensor, prompts: list[Prompt]) -> Tensor:
    scores = brighter_left(images, prompts)
    scores[::3] = torch.nan
    return scores


def never_scored(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return torch.full((len(prompts),), torch.nan)


def infinite(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return brighter_left(images, prompts) / 0


def wrong_shape(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return brighter_left(images, prompts)[:-1]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a policy of 4 x 4 tokens, a text-conditional one, and a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "vocab_size": 32}
    grid = {"image_size": 16, "downsample": 4}
    save_policy(LlamaGen(LlamaGenConfig(**sizes, **grid, num_classes=10)), folder / "policy")
    text = LlamaGenConfig(**sizes, **grid, model_type="t2i", caption_dim=8, prefix_len=5)
    save_policy(LlamaGen(text), folder / "text_policy")
    tokenizer = VQTokenizer(
        VQConfig(
            codebook_size=32,
            codebook_dim=8,
            z_channels=32,
            channels=32,
            encoder_multipliers=(1, 1, 1),
            decoder_multipliers=(1, 1, 1),
            num_res_blocks=1,
        )
    )
    save_tokenizer(tokenizer, folder / "tokenizer")
    features = {"features": torch.randn(3, 5, 8), "mask": torch.ones(3, 5, dtype=torch.int64)}
    features["mask"][1, :2] = 0
    prompts = json.dumps(["a cat", "a dog", "a hat"])
    save_file(features, folder / "prompts.safetensors", metadata={"prompts": prompts})
    return folder


def _config(models: Path, reward: str = "brighter_left") -> TrainConfig:
    return TrainConfig(
        output_dir="unused",
        policy=PolicyConfig(path=str(models / "policy"), num_heads=2),
        tokenizer=TokenizerConfig(path=str(models / "tokenizer")),
        data=DataConfig(names="digits"),
        rewards=[RewardConfig(name=f"{__name__}:{reward}")],
        prompts_per_step=4,
        images_per_prompt=4,
        num_steps=2,
        micro_batch=16,
        rollout=SamplingParams(guidance_scale=2.0),
        objective=ObjectiveConfig(beta=0.1),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
        output=OutputConfig(sample_every=0, sample_images=4, trackers=[]),
        device="cpu",
    )


class _Recorder:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.images: list[tuple[int, Path]] = []
        self.closed = False

    def start(self, config: TrainConfig, folder: RunFolder, logged: int | None = None) -> None:
        self.rows.clear()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)

    def image(self, step: int, name: str, path: Path) -> None:
        self.images.append((step, path))

    def close(self) -> None:
        self.closed = True


def _run(config: TrainConfig, folder: Path) -> tuple[Trainer, _Recorder]:
    recorder = _Recorder()
    trainer = Trainer(replace(config, output_dir=str(folder)), [recorder])
    trainer.train()
    return trainer, recorder


def test_the_reward_rises(models: Path, tmp_path: Path) -> None:
    config = replace(
        _config(models),
        num_steps=30,
        images_per_prompt=8,
        objective=ObjectiveConfig(beta=0.0),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-2)),
    )
    _, recorder = _run(config, tmp_path / "run")
    rewards = [row["reward"] for row in recorder.rows]
    # 10 steps of 32 images; without learning the difference of two such means is 0 with this
    # standard error, and three of them come by chance once in 700 runs.
    standard_error = recorder.rows[0]["reward_std"] * (2 / (10 * 32)) ** 0.5
    assert sum(rewards[-10:]) / 10 - sum(rewards[:10]) / 10 > 3 * standard_error


def test_the_same_seed_gives_the_same_weights_bit_for_bit(models: Path, tmp_path: Path) -> None:
    first, _ = _run(_config(models), tmp_path / "a")
    second, _ = _run(_config(models), tmp_path / "b")
    third, _ = _run(replace(_config(models), seed=1), tmp_path / "c")
    weights = [t.policy.head_weight for t in (first, second, third)]
    for name, value in first.policy.state_dict().items():
        assert torch.equal(value, second.policy.state_dict()[name]), name
    assert not torch.equal(weights[0], weights[2])


def test_micro_batches_change_memory_and_not_the_result(models: Path, tmp_path: Path) -> None:
    whole, rows = _run(_config(models), tmp_path / "whole")
    split, split_rows = _run(replace(_config(models), micro_batch=3), tmp_path / "split")
    # Two Adam steps of 1e-3; sums in another order move a gradient by about 1e-7 of its size.
    torch.testing.assert_close(
        split.policy.head_weight, whole.policy.head_weight, atol=2e-5, rtol=0
    )
    assert split_rows.rows[0]["loss"] == pytest.approx(rows.rows[0]["loss"], abs=1e-5)


def test_a_step_reports_the_names_people_know(models: Path, tmp_path: Path) -> None:
    _, recorder = _run(_config(models), tmp_path / "run")
    names = set(recorder.rows[-1])
    reward = f"{__name__}:brighter_left"
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
    config = replace(_config(models), rollout=SamplingParams(temperature=0.9))
    _, recorder = _run(config, tmp_path / "run")
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
    config = replace(_config(models), rollout=rollout, objective=objective, num_steps=3)
    _, recorder = _run(config, tmp_path / "run")
    for row in recorder.rows:
        assert 0 < row["ratio_max_abs_dev"] <= 1e-3  # fp32 rounding of one path against the other
        assert row["entropy/scored"] == pytest.approx(row["entropy/draw"], rel=1e-4)
        assert row["entropy/policy"] > row["entropy/scored"]
    assert recorder.rows[-1]["kl"] > 0


def test_a_run_shows_and_saves_the_average_of_its_weights(models: Path, tmp_path: Path) -> None:
    trainer, _ = _run(replace(_config(models), weight_ema=0.9), tmp_path / "run")
    saved = load_policy(tmp_path / "run" / "checkpoints" / "step_000002").head_weight
    base = load_policy(models / "policy").head_weight
    moved = (trainer.policy.head_weight - base).norm()
    assert 0 < (saved - base).norm() < 0.3 * moved


def test_foreseeing_memory_changes_nothing(models: Path, tmp_path: Path) -> None:
    plain, _ = _run(_config(models), tmp_path / "plain")
    trainer = Trainer(replace(_config(models), output_dir=str(tmp_path / "run")), [])
    (line,) = trainer.describe_memory()
    assert "an optimizer step holds" in line
    trainer.train()
    assert torch.equal(plain.policy.head_weight, trainer.policy.head_weight)


def test_inner_epochs_take_a_step_each(models: Path, tmp_path: Path) -> None:
    config = replace(_config(models), inner_epochs=2, num_steps=1)
    _, recorder = _run(config, tmp_path / "run")
    assert recorder.rows[0]["optimizer_step"] == 2
    assert recorder.rows[0]["ratio_max_abs_dev"] > 1e-4


def test_the_tuned_policy_loads_and_differs(models: Path, tmp_path: Path) -> None:
    trainer, recorder = _run(_config(models), tmp_path / "run")
    tuned = load_policy(tmp_path / "run" / "checkpoints" / "step_000002")
    base = load_policy(models / "policy")
    assert torch.equal(tuned.head_weight, trainer.policy.head_weight)
    assert not torch.equal(tuned.head_weight, base.head_weight)
    assert [step for step, _ in recorder.images] == [0, 2]
    assert all(path.is_file() for _, path in recorder.images)


def test_images_that_a_judge_did_not_score_are_left_out(models: Path, tmp_path: Path) -> None:
    _, recorder = _run(_config(models, "sometimes_missing"), tmp_path / "run")
    assert all(value == value for row in recorder.rows for value in row.values())
    assert recorder.rows[0]["grad_norm"] > 0


def test_text_conditional_policies_train(models: Path, tmp_path: Path) -> None:
    config = replace(
        _config(models),
        policy=PolicyConfig(path=str(models / "text_policy"), num_heads=2),
        data=DataConfig(text_features=str(models / "prompts.safetensors")),
        prompts_per_step=3,
    )
    trainer, recorder = _run(config, tmp_path / "run")
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
        _config(models),
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
    trainer, recorder = _run(config, tmp_path / "run")
    assert loaded
    assert recorder.rows[1]["kl"] > 0
    assert trainer.policy.config.prefix_len == 6
    # The second run finds the texts encoded, and draws the same.
    monkeypatch.setattr(prompt_encoding, "load_text_encoder", None)
    _, again = _run(config, tmp_path / "again")
    assert again.rows[1]["reward"] == recorder.rows[1]["reward"]


def test_a_bf16_working_copy_trains_on_fp32_masters(models: Path, tmp_path: Path) -> None:
    config = _config(models)
    config = replace(config, policy=replace(config.policy, dtype="bfloat16"))
    trainer, recorder = _run(config, tmp_path / "run")
    assert trainer.policy.head_weight.dtype == torch.bfloat16
    assert trainer.policy.rotary.dtype == torch.float32
    assert recorder.rows[1]["kl"] > 0


def test_a_step_without_a_single_score_moves_nothing(models: Path, tmp_path: Path) -> None:
    trainer, recorder = _run(_config(models, "never_scored"), tmp_path / "run")
    base = load_policy(models / "policy")
    assert torch.equal(trainer.policy.head_weight, base.head_weight)
    assert recorder.rows[-1]["optimizer_step"] == 0


def test_a_prompt_that_the_policy_cannot_draw_is_refused_before_the_first_step(
    models: Path, tmp_path: Path
) -> None:
    config = replace(_config(models), data=DataConfig(names="imagenet"))
    with pytest.raises(ValueError, match="labels: expected 0 to 9, got 10"):
        Trainer(replace(config, output_dir=str(tmp_path / "run")), [])
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_a_step_on_a_gpu_takes_conditions_from_the_cpu(models: Path, tmp_path: Path) -> None:
    _, recorder = _run(replace(_config(models), device="cuda"), tmp_path / "run")
    assert recorder.rows[1]["kl"] > 0


def test_scores_of_another_shape_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected scores of shape \[16\], got \[15\]"):
        _run(_config(models, "wrong_shape"), tmp_path / "run")


def test_infinite_scores_are_failures_and_move_nothing(models: Path, tmp_path: Path) -> None:
    trainer, recorder = _run(_config(models, "infinite"), tmp_path / "run")
    name = f"rewards/{__name__}:infinite/failures"
    assert [row[name] for row in recorder.rows] == [16, 16]
    before = load_policy(models / "policy").state_dict()
    for key, value in trainer.policy.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(
    models: Path, tmp_path: Path
) -> None:
    config = _config(models)
    trainer = Trainer(replace(config, output_dir=str(tmp_path / "run")), [])
    before = trainer.policy.head_weight.detach().clone()
    trainer.policy.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFiniteError, match="grad_norm: expected a finite number at step 1"):
        trainer.train()
    assert torch.equal(trainer.policy.head_weight, before)


def test_a_tokenizer_of_another_grid_or_codebook_is_refused(models: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    save_tokenizer(
        VQTokenizer(
            VQConfig(
                codebook_size=64,
                codebook_dim=8,
                z_channels=32,
                channels=32,
                encoder_multipliers=(1, 1, 1),
                decoder_multipliers=(1, 1, 1),
                num_res_blocks=1,
            )
        ),
        other,
    )
    config = replace(_config(models), tokenizer=TokenizerConfig(path=str(other)))
    with pytest.raises(ValueError, match="expected a codebook of 32, as the policy has, got 64"):
        Trainer(replace(config, output_dir=str(tmp_path / "run")), [])


def test_seeds_of_steps_differ_and_do_not_depend_on_the_machine() -> None:
    assert draw_seed(0, 0) != draw_seed(0, 1) != draw_seed(1, 0)
    assert draw_seed(0, 0) == int.from_bytes(
        __import__("hashlib").blake2b(b"draw 0 0", digest_size=8).digest(), "little", signed=True
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="device: expected a CUDA GPU, got none"):
        choose_device("cuda")


def test_a_bound_on_the_cache_reaches_the_engine(models: Path, tmp_path: Path) -> None:
    config = replace(_config(models), kv_bytes=1)
    with pytest.raises(ValueError, match=r"kv_bytes: expected at least .* for one guided image"):
        Trainer(replace(config, output_dir=str(tmp_path / "none")), [])
    roomy = Trainer(replace(config, output_dir=str(tmp_path / "some"), kv_bytes=10**9), [])
    assert roomy.engine.num_slots == config.images_per_step
