"""A training step of every policy family through one trainer, and what surrounds it: memory,
checkpoints, samples, the report."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from argrpo.cli import main
from argrpo.config import TrainConfig
from argrpo.config_files import parse_config
from argrpo.data import Prompt, load_prompts
from argrpo.data_config import DataConfig
from argrpo.engine.sampling_params import SamplingParams
from argrpo.exit_codes import DONE, WRONG_INPUT
from argrpo.memory_preflight import forecast_memory
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy, load_tokenizer, save_policy
from argrpo.models.taming import Taming
from argrpo.trainer import Trainer

GOLDEN = Path(__file__).parents[1] / "golden"
NET2NET = GOLDEN / "taming_net2net"
FAMILIES = ("classes", "texts", "taming")
GRID = {"image_size": 8, "downsample": 2}
SIZES = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "vocab_size": 32, **GRID}


def brighter_left(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """A reward that any policy can learn: how much brighter the left half is than the right."""
    left, right = images.chunk(2, dim=3)
    return (left.mean(dim=(1, 2, 3)) - right.mean(dim=(1, 2, 3))) * 100


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of each family for one tokenizer, the VQGAN of the golden checkpoint."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("families")
    sources = (NET2NET / "last.ckpt", NET2NET / "project.yaml", folder / "converted")
    assert main(["convert", "taming", *map(str, sources), "--dtype", "float32"]) == DONE
    save_policy(LlamaGen(LlamaGenConfig(**SIZES, num_classes=10)), folder / "classes")
    text = {"model_type": "t2i", "caption_dim": 8, "prefix_len": 5}
    save_policy(LlamaGen(LlamaGenConfig(**SIZES, **text)), folder / "texts")
    features = {"features": torch.randn(3, 5, 8), "mask": torch.ones(3, 5, dtype=torch.int64)}
    features["mask"][1, :2] = 0
    prompts = json.dumps(["a cat", "a dog", "a hat"])
    save_file(features, folder / "prompts.safetensors", metadata={"prompts": prompts})
    return folder


def flags(models: Path, family: str) -> list[str]:
    """The preset of the taming recipe, with tiny models and a reward that needs none."""
    paths = {"taming": models / "converted" / "policy"}
    data = {"texts": ["--data.text_features", str(models / "prompts.safetensors")]}
    classes = ["--data.classes", "0", "3", "5"]
    return [
        *("--config", "loofid_taming_256.yaml", "--policy.dtype", "float32"),
        *("--policy.path", str(paths.get(family, models / family))),
        *("--tokenizer.path", str(models / "converted" / "tokenizer")),
        *("--rewards", f"{__name__}:brighter_left", "--prompts_per_step", "3"),
        *("--images_per_prompt", "4", "--num_steps", "2", "--micro_batch", "5"),
        *("--objective.clip_components", "false", "--output.trackers", "[]"),
        *("--optimizer.learning_rate.peak", "1e-3", "--output.sample_images", "4"),
        *data.get(family, classes),
    ]


def config_of(models: Path, family: str, folder: Path) -> TrainConfig:
    lists = {"--rewards": "name", "--data.classes": None}
    words = [*flags(models, family), "--output_dir", str(folder)]
    return parse_config(TrainConfig, words, command="argrpo train", lists=lists)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_by_the_filters_that_drew(
    family: str, models: Path, tmp_path: Path
) -> None:
    config = config_of(models, family, tmp_path / "run")
    trainer = Trainer(
        replace(config, inner_epochs=1, rollout=replace(config.rollout, top_k=20)), []
    )
    before = {name: weight.clone() for name, weight in trainer.policy.state_dict().items()}
    result = trainer.train()
    assert all(math.isfinite(value) for value in result.metrics.values())
    after = trainer.policy.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    # Nothing is drawn or scored without its text, so the learned features of no text stay.
    assert still == ({"cls_embedding.uncond_embedding"} if family == "texts" else set())
    # The same distribution on the same kept sets, in fp32, once from pages and once whole.
    assert result.metrics["ratio_max_abs_dev"] < 1e-4
    read = load_policy(result.policy_path)
    assert type(read) is type(trainer.policy)
    assert read.config == trainer.policy.config
    assert all(torch.equal(weight, after[name]) for name, weight in read.state_dict().items())


def test_a_taming_policy_learns_the_reward(models: Path, tmp_path: Path) -> None:
    config = config_of(models, "taming", tmp_path / "run")
    learning = replace(
        config,
        num_steps=25,
        images_per_prompt=16,
        micro_batch=48,
        inner_epochs=1,
        objective=replace(config.objective, beta=0.0),
        entropy=replace(config.entropy, control="constant"),
        optimizer=replace(
            config.optimizer, learning_rate=replace(config.optimizer.learning_rate, peak=3e-3)
        ),
    )
    Trainer(learning).train()  # without other trackers, rows go to metrics.jsonl alone
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "reward" in row]
    rewards = [row["reward"] for row in rows]
    # 8 steps of 48 images; without learning the difference of two such means has this error, and
    # three of them come by chance once in 700 runs.
    error = rows[0]["reward_std"] * (2 / (8 * 48)) ** 0.5
    assert sum(rewards[-8:]) / 8 - sum(rewards[:8]) / 8 > 3 * error


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_of_a_step_is_foreseen(family: str, models: Path, tmp_path: Path) -> None:
    config = config_of(models, family, tmp_path / "run")
    trainer = Trainer(config, [])
    probe = load_prompts(config.data).probe()
    forecast = forecast_memory(trainer.policy, config, probe)
    own = sum(weight.nbytes for weight in trainer.policy.parameters())
    assert forecast.weights == 2 * own, "the policy and its reference"
    assert forecast.optimizer == 2 * own, "two moments in fp32; fp32 weights are their masters"
    assert forecast.trunk.per_image > 0
    assert forecast.peak(5) > forecast.peak(1) > forecast.weights + forecast.optimizer
    assert any("micro-batches of 5" in line for line in trainer.describe_memory())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--rollout.guidance_scale", "2"], "rollout.guidance_scale: expected 1, because this"),
        (
            ["--objective.policy", "conditional", "--parity.label_dropout", "0.1"],
            "parity.label_dropout: expected 0, because this policy was trained without a null",
        ),
        (["--policy.image_size", "16"], "policy.image_size: expected 8, as"),
        (["--policy.num_heads", "4"], "policy.num_heads: expected 2, as"),
        (["--policy.text_padding", "right"], "policy.text_padding: expected None for a taming"),
        (["--data.classes", "0", "6"], "labels: expected 0 to 5, got 6"),
        (["--policy.path", str(NET2NET / "last.ckpt")], "argrpo convert taming"),
    ],
)
def test_what_a_taming_policy_cannot_do_is_refused_before_a_step(
    change: list[str],
    message: str,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*flags(models, "taming"), "--output_dir", str(tmp_path / "run"), *change]
    assert main(["train", *words]) == WRONG_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_commands_take_a_converted_policy(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *flags(models, "taming"), "--output_dir", str(run)]) == DONE
    assert main(["report", str(run)]) == DONE
    assert "reward" in (run / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    tuned = run / "checkpoints" / "step_000002"
    drawn = tmp_path / "drawn"
    words = ["--policy", str(tuned), "--tokenizer", str(models / "converted" / "tokenizer")]
    words += ["--labels", "3", "5", "--top_k", "600", "--top_p", "0.92", "--seed", "4"]
    words += ["--num_images_per_prompt", "2", "--output_dir", str(drawn)]
    assert main(["sample", *words]) == DONE
    assert len(list(drawn.glob("0*.png"))) == 4
    words += ["--guidance_scale", "2", "--output_dir", str(tmp_path / "guided")]
    assert main(["sample", *words]) == WRONG_INPUT
    assert "guidance_scale: expected 1, because this policy" in capsys.readouterr().err


def test_the_recipe_is_free_of_guidance_and_scores_what_drew() -> None:
    config = parse_config(
        TrainConfig, ["--config", "loofid_taming_256.yaml"], command="argrpo train", lists={}
    )
    assert config.rollout == SamplingParams(top_k=600, top_p=0.92)
    assert config.objective.policy == "guided"
    assert config.data == DataConfig(names="imagenet_synsets", template="a photo of a {name}")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_written_under_the_names_that_were_published(family: str, models: Path) -> None:
    path = models / "converted" / "policy" if family == "taming" else models / family
    policy: ImagePolicy = load_policy(path)
    assert isinstance(policy, Taming if family == "taming" else LlamaGen)
    names = {name for key in policy.state_dict() for name in policy.published_names(key)}
    ours = {".qkv.", ".w13"}
    assert not any(part in name for name in names for part in ours)
    assert load_tokenizer(models / "converted" / "tokenizer").config.unit_codes is False
