"""An evaluation along a run measures what it says, keeps the best and leaves no trace."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

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
from argrpo.digits.judges import DigitJudge, load_judge, save_judge
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.eval_config import EvalConfig
from argrpo.evaluation.during_training import evaluation_seed, spread
from argrpo.evaluation.judge_panel import win_rate
from argrpo.evaluation.moment_files import save_moments
from argrpo.evaluation.moments import moments_of
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy, load_tokenizer, save_policy, save_tokenizer
from argrpo.models.vq import VQConfig, VQTokenizer
from argrpo.objective_config import ObjectiveConfig
from argrpo.schedules import LearningRateConfig
from argrpo.trainer import Trainer

LEFT = f"{__name__}:brighter_left"


def brighter_left(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """How much brighter the left half is than the right; any policy can learn it."""
    left, right = images.chunk(2, dim=3)
    return (left.mean(dim=(1, 2, 3)) - right.mean(dim=(1, 2, 3))) * 100


def noisy(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return brighter_left(images, prompts) + torch.rand(len(images))


def class_asked_for(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return torch.tensor([float(prompt.class_id or 0) for prompt in prompts])


def never_scored(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return torch.full((len(prompts),), torch.nan)


def wrong_shape(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return torch.zeros(len(prompts), 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of 8 x 8 tokens, its tokenizer, and a judge of digits."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "vocab_size": 32}
    grid = {"image_size": 32, "downsample": 4, "num_classes": 10}
    save_policy(LlamaGen(LlamaGenConfig(**sizes, **grid)), folder / "policy")
    sizes = {"codebook_size": 32, "codebook_dim": 8, "z_channels": 32, "channels": 32}
    small = {"encoder_multipliers": (1, 1, 1), "decoder_multipliers": (1, 1, 1)}
    tokenizer = VQTokenizer(VQConfig(**sizes, **small, num_res_blocks=1))
    save_tokenizer(tokenizer, folder / "tokenizer")
    save_judge(DigitJudge(width=2, feature_dim=8), folder / "judge")
    return folder


def config_of(models: Path, evaluation: EvalConfig, reward: str = "brighter_left") -> TrainConfig:
    return TrainConfig(
        output_dir="unused",
        policy=PolicyConfig(path=str(models / "policy"), num_heads=2),
        tokenizer=TokenizerConfig(path=str(models / "tokenizer")),
        data=DataConfig(names="digits"),
        rewards=[RewardConfig(name=f"{__name__}:{reward}")],
        prompts_per_step=2,
        images_per_prompt=4,
        num_steps=3,
        micro_batch=8,
        rollout=SamplingParams(guidance_scale=2.0),
        objective=ObjectiveConfig(beta=0.0),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-2)),
        output=OutputConfig(sample_every=0, sample_images=1, save_every=1, trackers=[]),
        device="cpu",
        eval=evaluation,
    )


def eval_of(models: Path, **settings: Any) -> EvalConfig:
    """Everything that can be measured, of 12 images every other step."""
    judges = [RewardConfig(name=LEFT)]
    return EvalConfig(
        **{
            "every": 2,
            "num_images": 12,
            "judges": judges,
            "features": "digits_judge",
            "features_path": str(models / "judge"),
            "reference": "dataset:digits/evaluation",
            **settings,
        }
    )


def run(config: TrainConfig, folder: Path) -> Trainer:
    trainer = Trainer(replace(config, output_dir=str(folder)))
    trainer.train()
    return trainer


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, evaluated with and without guidance."""
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = eval_of(models, guidance_scales=[2.0, 1.0], best_metric=f"eval/{LEFT}/mean")
    run(config_of(models, settings), folder)
    return folder


def drawn_images(policy_path: Path, models: Path, scale: float) -> Tensor:
    """What an evaluation looks at, drawn by hand."""
    policy, tokenizer = load_policy(policy_path), load_tokenizer(models / "tokenizer")
    engine = RolloutEngine(policy, max_slots=8)
    labels = torch.tensor([*range(10), 0, 1])
    params = SamplingParams(guidance_scale=scale)
    rollout = engine.draw(labels, params, seed=evaluation_seed(0))
    return tokenizer.decode(rollout.token_ids)


def drawn_scores(policy_path: Path, models: Path, scale: float) -> Tensor:
    return brighter_left(drawn_images(policy_path, models, scale), [])


def test_an_evaluation_changes_neither_weights_nor_metrics(models: Path, tmp_path: Path) -> None:
    # Reward and judge draw from torch's one generator; the average of weights is swapped in.
    judges = [RewardConfig(name=f"{__name__}:noisy")]
    settings = eval_of(models, every=1, judges=judges, guidance_scales=[1.0, 3.0])
    config = replace(config_of(models, settings, "noisy"), weight_ema=0.5)
    runs = {}
    for name, chosen in (("with", config), ("without", replace(config, eval=EvalConfig()))):
        torch.manual_seed(0)
        runs[name] = run(chosen, tmp_path / name)
    for key, value in runs["with"].policy.state_dict().items():
        assert torch.equal(value, runs["without"].policy.state_dict()[key]), key
    measured, plain = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("with", "without"))
    assert any(key.startswith("eval/") for key in measured[0])
    timing = ("time/", "step_time", "images_per_second", "eval/")

    def untimed(row: dict[str, float]) -> dict[str, float]:
        return {
            k: v for k, v in row.items() if not (k.startswith(timing) or k.endswith("/seconds"))
        }

    assert [untimed(row) for row in measured] == [untimed(row) for row in plain]


def test_there_is_one_before_the_first_step_one_after_the_last_and_one_at_every_turn(
    finished: Path,
) -> None:
    evaluations = rows_of(finished / "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    metrics = rows_of(finished / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert [any(key.startswith("eval/") for key in row) for row in metrics] == [False, True, True]
    assert {k: v for k, v in metrics[2].items() if k.startswith(("eval/", "step"))} == {
        **evaluations[2],
        "step_time": metrics[2]["step_time"],
    }


def test_metrics_are_of_judges_distances_and_each_guidance_scale(finished: Path) -> None:
    kinds = [f"{LEFT}/mean", f"{LEFT}/std", f"{LEFT}/win_rate", "frechet", "precision", "recall"]
    kinds += ["density", "coverage", "pairwise_distance", "pairwise_pixels", "entropy"]
    names = {f"eval/{place}{kind}" for place in ("", "guidance_1/") for kind in kinds}
    for row in rows_of(finished / "evaluations.jsonl"):
        assert row.keys() == names | {"eval/seconds", "step"}
        assert all(value is not None for value in row.values())
        assert row["eval/entropy"] != row["eval/guidance_1/entropy"]


def test_an_image_is_compared_with_that_of_the_base_at_its_seed_and_condition(
    finished: Path, models: Path
) -> None:
    first, *_, last = rows_of(finished / "evaluations.jsonl")
    tuned = finished / "checkpoints" / "step_000003"
    for place, scale in (("eval/", 2.0), ("eval/guidance_1/", 1.0)):
        base, scores = (drawn_scores(p, models, scale) for p in (models / "policy", tuned))
        assert first[f"{place}{LEFT}/win_rate"] == 0.5
        assert last[f"{place}{LEFT}/win_rate"] == win_rate(scores, base) != 0.5
        # batches of 12 against 8 and 4 in the decoder
        assert first[f"{place}{LEFT}/mean"] == pytest.approx(base.mean().item(), abs=1e-4)
        assert last[f"{place}{LEFT}/mean"] == pytest.approx(scores.mean().item(), abs=1e-4)
        assert last[f"{place}{LEFT}/std"] == pytest.approx(scores.std().item(), rel=1e-4)


def test_distances_are_between_images_of_one_prompt(finished: Path, models: Path) -> None:
    # Of 12 images over 10 classes, 0 and 1 have two, 10 rows apart.
    images = drawn_images(models / "policy", models, 2.0)
    first = rows_of(finished / "evaluations.jsonl")[0]
    judge = load_judge(models / "judge")
    features, pixels = judge.features(images).double(), images.double().flatten(1)
    far = [(features[i] - features[i + 10]).norm().item() for i in (0, 1)]
    # batches of 12 against 8 and 4 in the decoder
    assert first["eval/pairwise_distance"] == pytest.approx(sum(far) / 2, rel=1e-3)
    gaps = [(pixels[i] - pixels[i + 10]).square().mean().sqrt().item() for i in (0, 1)]
    assert first["eval/pairwise_pixels"] == pytest.approx(sum(gaps) / 2, rel=1e-3)


def test_one_image_a_prompt_has_no_distance_to_another(models: Path, tmp_path: Path) -> None:
    settings = eval_of(models, every=1, num_images=10, judges=[])
    run(replace(config_of(models, settings), num_steps=1), tmp_path / "run")
    names = rows_of(tmp_path / "run" / "evaluations.jsonl")[0].keys()
    assert "eval/coverage" in names
    assert not [name for name in names if "pairwise" in name]


def test_the_best_policy_is_that_of_the_best_evaluation_and_says_so(finished: Path) -> None:
    rows = rows_of(finished / "evaluations.jsonl")
    values = {row["step"]: row[f"eval/{LEFT}/mean"] for row in rows}
    step = max(values, key=lambda step: values[step])
    best = finished / "checkpoints" / "best"
    record = json.loads((best / "best.json").read_text())
    assert (record["step"], record["value"]) == (step, values[step])
    assert step > 0  # the reward is the metric, so three large steps do not all fail to raise it
    saved = load_policy(finished / "checkpoints" / f"step_{step:06d}")
    assert torch.equal(load_policy(best).head_weight, saved.head_weight)
    assert len(list(best.parent.glob("best_*"))) == 1


def test_the_base_stays_the_best_where_nothing_was_better(models: Path, tmp_path: Path) -> None:
    settings = eval_of(models, best_metric=f"eval/{LEFT}/mean", best_mode="min")
    config = replace(config_of(models, settings), num_steps=2)
    trainer = Trainer(replace(config, output_dir=str(tmp_path / "run")))
    result = trainer.train()
    values = [row[f"eval/{LEFT}/mean"] for row in rows_of(tmp_path / "run" / "evaluations.jsonl")]
    assert values[0] < values[1]  # trained to raise it
    assert result.best_path is not None
    base = load_policy(models / "policy").head_weight
    assert torch.equal(load_policy(result.best_path).head_weight, base)


def test_what_is_measured_is_the_average_of_weights(models: Path, tmp_path: Path) -> None:
    config = config_of(models, eval_of(models, every=3, best_metric=f"eval/{LEFT}/win_rate"))
    trainer = run(replace(config, weight_ema=0.9), tmp_path / "run")
    saved = tmp_path / "run" / "checkpoints" / "step_000003"
    (_, last) = rows_of(tmp_path / "run" / "evaluations.jsonl")
    assert not torch.equal(trainer.policy.head_weight, load_policy(saved).head_weight)
    mean = drawn_scores(saved, models, 2.0).mean().item()
    assert last[f"eval/{LEFT}/mean"] == pytest.approx(mean, abs=1e-4)  # as above


def test_a_metric_that_could_not_be_measured_is_null_and_chooses_no_policy(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"{__name__}:never_scored"
    judges = [RewardConfig(name=name)]
    settings = eval_of(models, judges=judges, best_metric=f"eval/{name}/mean")
    run(config_of(models, settings), tmp_path / "run")
    rows = rows_of(tmp_path / "run" / "evaluations.jsonl")
    assert [row[f"eval/{name}/mean"] for row in rows] == [None] * 3
    assert [row[f"eval/{name}/win_rate"] for row in rows] == [None] * 3
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()
    assert "expected a finite number to choose the best policy by, got nan" in caplog.text


def test_a_run_without_judges_and_features_is_not_evaluated(models: Path, tmp_path: Path) -> None:
    run(replace(config_of(models, EvalConfig(every=1)), num_steps=1), tmp_path / "run")
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_judges_see_the_prompts_of_their_images(models: Path, tmp_path: Path) -> None:
    judges = [RewardConfig(name=f"{__name__}:class_asked_for")]
    settings = eval_of(models, judges=judges, num_images=20, features_path=None, reference=None)
    run(replace(config_of(models, settings), num_steps=1), tmp_path / "run")
    (row, _) = rows_of(tmp_path / "run" / "evaluations.jsonl")
    assert row[f"eval/{__name__}:class_asked_for/mean"] == 4.5


def test_a_policy_that_reads_texts_is_measured_on_its_prompts(models: Path, tmp_path: Path) -> None:
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "vocab_size": 32}
    text = {"model_type": "t2i", "caption_dim": 8, "prefix_len": 5}
    policy = LlamaGen(LlamaGenConfig(**sizes, **text, image_size=32, downsample=4))
    save_policy(policy, tmp_path / "policy")
    features = {"features": torch.randn(3, 5, 8), "mask": torch.ones(3, 5, dtype=torch.int64)}
    prompts = json.dumps(["a cat", "a dog", "a hat"])
    save_file(features, tmp_path / "prompts.safetensors", metadata={"prompts": prompts})
    config = replace(
        config_of(models, eval_of(models, every=1)),
        policy=PolicyConfig(path=str(tmp_path / "policy"), num_heads=2),
        data=DataConfig(text_features=str(tmp_path / "prompts.safetensors")),
        num_steps=1,
    )
    run(config, tmp_path / "run")
    (base, tuned) = rows_of(tmp_path / "run" / "evaluations.jsonl")
    assert base[f"eval/{LEFT}/mean"] != tuned[f"eval/{LEFT}/mean"]


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_evaluated_there(models: Path, tmp_path: Path) -> None:
    settings = eval_of(models, guidance_scales=[2.0, 1.0], best_metric="eval/recall")
    run(replace(config_of(models, settings), device="cuda"), tmp_path / "run")
    for row in rows_of(tmp_path / "run" / "evaluations.jsonl"):
        assert None not in row.values()


def refused(models: Path, tmp_path: Path, message: str, **settings: Any) -> None:
    config = config_of(models, eval_of(models, **settings))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Trainer(replace(config, output_dir=str(tmp_path / "run")), [])
    assert not (tmp_path / "run").exists()


def judge_named(name: str, **options: Any) -> list[RewardConfig]:
    return [RewardConfig(name=name, options=options)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"best_metric": "eval/heldout/mean"},
            r"eval\.best_metric: expected one of eval/.*:brighter_left/mean, .*eval/recall, .*"
            "eval/entropy, got eval/heldout/mean",
        ),
        ({"judges": judge_named("clipp")}, r"eval\.judges\.name: expected one of .* got 'clipp'"),
        (
            {"judges": judge_named("hpsv2", checkpoint="nowhere.pt")},
            r"eval\.judges\.hpsv2\.options\.checkpoint: expected",
        ),
        ({"judges": [RewardConfig(name=LEFT)] * 2}, r"eval\.judges: .* a name of its own"),
        ({"features_path": "nowhere"}, r"eval\.features_path: judge: expected a folder"),
        ({"features": "inception"}, r"eval\.features_path: expected a state_dict of torchvision"),
        ({"reference": "nowhere.npz"}, r"eval\.reference: expected an npz file or a folder"),
        ({"reference": "dataset:digits/x"}, r"eval\.reference: split: expected one of"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_the_first_step(
    models: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    refused(models, tmp_path, message, **settings)


def test_moments_of_another_dimension_are_refused_by_name(models: Path, tmp_path: Path) -> None:
    save_moments(moments_of(torch.rand(9, 5)), tmp_path / "m.npz")
    message = r"eval\.reference: expected moments of 8 features .* got 5"
    refused(models, tmp_path, message, reference=str(tmp_path / "m.npz"))


def test_a_distribution_reward_is_no_judge_of_single_images(models: Path, tmp_path: Path) -> None:
    options = {"features": "digits_judge", "features_path": str(models / "judge")}
    judges = judge_named("loo_fid", reference="dataset:digits/policy", **options)
    message = r"eval\.judges: expected judges that score images one by one, got loo_fid"
    refused(models, tmp_path, message, judges=judges)


def test_scores_of_another_shape_are_refused_by_name(models: Path, tmp_path: Path) -> None:
    judges = [RewardConfig(name=f"{__name__}:wrong_shape")]
    with pytest.raises(ValueError, match=r"wrong_shape: expected scores of shape \[8\], got \[8,"):
        run(config_of(models, eval_of(models, judges=judges)), tmp_path / "run")


def test_a_tie_counts_half_and_a_missing_score_not_at_all() -> None:
    nan = torch.nan
    scores = torch.tensor([2.0, 1.0, 0.0, nan, 5.0, torch.inf])
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, nan, 0.0])
    assert win_rate(scores, base) == 0.5
    assert win_rate(scores[:2], base[:2]) == 0.75
    assert win_rate(scores[3:], base[3:]) != win_rate(scores[3:], base[3:])  # NaN


def test_images_are_spread_evenly_over_the_prompts() -> None:
    prompts = [Prompt(str(place), prompt_id=place) for place in range(10)]
    assert [prompt.prompt_id for prompt in spread(prompts, 4)] == [0, 2, 5, 7]
    assert [prompt.prompt_id for prompt in spread(prompts, 12)] == [*range(10), 0, 1]
