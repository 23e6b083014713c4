"""A step's images through the judges, in a whole run: overlap, failures, what is watched."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
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
from argrpo.engine.sampling_params import SamplingParams
from argrpo.judging_config import JudgingConfig
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy, save_policy, save_tokenizer
from argrpo.models.vq import VQConfig, VQTokenizer
from argrpo.rewards.failure_watch import JudgesUnavailableError
from argrpo.schedules import LearningRateConfig
from argrpo.trainer import Trainer

Start = Callable[[Callable[[Any], None]], str]


class Stretched:
    """Scores in stretches that divide neither a wave nor a batch of the decoder."""

    name = "stretched"
    reward_batch = 5

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        left, right = images.chunk(2, dim=3)
        return (left.mean(dim=(1, 2, 3)) - right.mean(dim=(1, 2, 3))) * 100


def first_of_each_group(images: Tensor, prompts: list[Prompt]) -> Tensor:
    scores = images.mean(dim=(1, 2, 3))
    scores[torch.arange(len(scores)) % 4 != 0] = torch.nan
    return scores


def telling(completions: Any, completion_ids: Any, log_metric: Any, log_extra: Any) -> list[float]:
    """As TRL's reward functions are written."""
    log_metric("tokens", len(completion_ids[0]))
    log_extra("width", [picture.width for picture in completions])
    return [float(picture.getpixel((0, 0))[0]) for picture in completions]


async def later(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    policy = LlamaGenConfig(
        dim=32, num_layers=1, num_heads=2, ffn_dim=32, vocab_size=32, image_size=16, downsample=4,
        num_classes=10,
    )  # fmt: skip
    save_policy(LlamaGen(policy), folder / "policy")
    tokenizer = VQConfig(
        codebook_size=32, codebook_dim=8, z_channels=32, channels=32, num_res_blocks=1,
        encoder_multipliers=(1, 1, 1), decoder_multipliers=(1, 1, 1),
    )  # fmt: skip
    save_tokenizer(VQTokenizer(tokenizer), folder / "tokenizer")
    return folder


def _config(models: Path, *rewards: RewardConfig, **judging: Any) -> TrainConfig:
    return TrainConfig(
        output_dir="unused",
        policy=PolicyConfig(path=str(models / "policy"), num_heads=2),
        tokenizer=TokenizerConfig(path=str(models / "tokenizer"), decode_batch=3),
        data=DataConfig(names="digits"),
        rewards=list(rewards),
        judging=JudgingConfig(**judging),
        prompts_per_step=4,
        images_per_prompt=4,
        max_slots=4,
        num_steps=2,
        micro_batch=16,
        rollout=SamplingParams(),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
        output=OutputConfig(sample_every=0, sample_images=4, save_every=0, trackers=[]),
        device="cpu",
    )


def _own(name: str, **options: Any) -> RewardConfig:
    return RewardConfig(name=f"{__name__}:{name}", **options)


def _server(url: str) -> RewardConfig:
    connection = {"timeout_s": 10, "max_retries": 1, "backoff_s": 0.01}
    return RewardConfig(name="deqa", options={"url": url, "connection": connection})


def _run(config: TrainConfig, folder: Path) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = Trainer(replace(config, output_dir=str(folder)))
    trainer.train()
    return trainer, _rows(folder)


def _rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_overlap_changes_the_time_of_a_step_and_nothing_else(models: Path, tmp_path: Path) -> None:
    rewards = [_own("Stretched"), _own("later"), _own("telling", weight=0.01)]
    config = _config(models, *rewards)
    kept = {}
    for name in ("overlapping", "after_each_other"):
        judging = JudgingConfig(overlap=name == "overlapping")
        trainer, rows = _run(replace(config, judging=judging), tmp_path / name)
        timed = ("time/", "step_time", "images_per_second")
        plain = [
            {k: v for k, v in row.items() if not (k.startswith(timed) or k.endswith("/seconds"))}
            for row in rows
        ]
        kept[name] = trainer.policy.state_dict(), plain
    (weights, metrics), (other, other_metrics) = kept.values()
    assert metrics == other_metrics and len(metrics) == 2
    for key, value in weights.items():
        assert torch.equal(value, other[key]), key
    assert metrics[1]["rewards/stretched/batch"] == 5


@pytest.mark.gpu
def test_overlap_on_a_gpu_changes_no_score(models: Path, tmp_path: Path) -> None:
    config = _config(models, _own("Stretched"), _own("later"), _own("telling", weight=0.01))
    kept = []
    for overlap in (True, False):
        judging = JudgingConfig(overlap=overlap)
        chosen = replace(config, judging=judging, device="cuda", num_steps=1)
        _, rows = _run(chosen, tmp_path / str(overlap))
        kept.append({k: v for k, v in rows[0].items() if k.endswith(("/mean", "/std"))})
    # Of the first step alone: sums of gradients may come in another order.
    scores = [{k: v for k, v in row.items() if k.startswith("rewards/")} for row in kept]
    assert scores[0] == scores[1] and len(scores[0]) >= 6


def test_every_step_says_what_its_images_are_like_and_what_judges_took(
    models: Path, tmp_path: Path
) -> None:
    _, rows = _run(_config(models, _own("telling")), tmp_path / "run")
    name = f"rewards/{__name__}:telling"
    for row in rows:
        assert row[f"{name}/tokens"] == 16 and row[f"{name}/seconds"] > 0
        assert (row[f"{name}/batch"], row[f"{name}/failures"], row[f"{name}/retries"]) == (16, 0, 0)
        assert 1 <= row["images/distinct_tokens"] <= 16
        assert row["images/distinct_tokens"] <= row["images/distinct_tokens_of_step"] <= 32
        for kind in ("saturation", "edge_density", "colour_entropy"):
            assert 0 <= row[f"images/{kind}"] <= 9
    extras = [json.loads(line) for line in (tmp_path / "run/reward_extras.jsonl").open()]
    assert [extra["step"] for extra in extras] == [1, 2]
    assert extras[0]["judge"] == f"{__name__}:telling"
    assert extras[0]["columns"] == {"width": [16] * 16}


def test_a_group_with_fewer_than_two_scores_moves_nothing(models: Path, tmp_path: Path) -> None:
    config = _config(models, _own("first_of_each_group"), max_failure_rate=1.0)
    trainer, rows = _run(config, tmp_path / "run")
    before = load_policy(models / "policy").state_dict()
    assert all(torch.equal(v, before[k]) for k, v in trainer.policy.state_dict().items())
    assert rows[-1]["optimizer_step"] == 0
    assert rows[-1][f"rewards/{__name__}:first_of_each_group/failures"] == 12


def test_a_judge_that_is_gone_for_too_long_ends_the_run_with_a_checkpoint(
    models: Path, tmp_path: Path, scripted_server: Start
) -> None:
    url = scripted_server(lambda exchange: exchange.reply({"error": "no GPU"}, 500))
    config = replace(_config(models, _server(url), patience=2), num_steps=5)
    with pytest.raises(
        JudgesUnavailableError,
        match=r"rewards\.deqa: expected scores for at least 50% of a step's images, got 0 of 16 in "
        r"the last of 2 such steps \(http://127\.0\.0\.1:\d+: HTTP 500: .*no GPU.*saved in",
    ):
        _run(config, tmp_path / "run")
    rows = _rows(tmp_path / "run")
    assert len(rows) == 2
    # Two requests of 8 images, each sent twice.
    assert (rows[0]["rewards/deqa/failures"], rows[0]["rewards/deqa/retries"]) == (16, 2)
    saved = load_policy(tmp_path / "run/checkpoints/step_000002").state_dict()
    before = load_policy(models / "policy").state_dict()
    assert all(torch.equal(value, before[key]) for key, value in saved.items())


def test_a_judge_that_comes_back_is_forgiven(
    models: Path, tmp_path: Path, scripted_server: Start
) -> None:
    def script(exchange: Any) -> None:
        is_down = exchange.number < 4  # two requests of the first step and their retries
        scores = {"scores": [i / 8 for i in range(len(exchange.body["images"]))]}
        exchange.reply({} if is_down else scores, 503 if is_down else 200)

    url = scripted_server(script)
    _, rows = _run(_config(models, _server(url), patience=2), tmp_path / "run")
    assert [row["rewards/deqa/failures"] for row in rows] == [16, 0]
    assert [row["optimizer_step"] for row in rows] == [0, 1]
    assert rows[0]["reward"] is None and rows[1]["reward"] == pytest.approx(3.5 / 8)


def test_a_monitor_that_fails_ends_nothing(
    models: Path, tmp_path: Path, scripted_server: Start
) -> None:
    url = scripted_server(lambda exchange: exchange.reply({}, 400))
    config = _config(models, _own("Stretched"), patience=1, monitor_every=1)
    _, rows = _run(replace(config, monitors=[_server(url)]), tmp_path / "run")
    assert [row["monitors/deqa/failures"] for row in rows] == [16, 16]


@pytest.mark.parametrize(("every", "steps"), [(None, [3]), (1, [1, 2, 3]), (2, [2, 3])])
def test_monitors_measure_as_often_as_they_are_asked_to(
    models: Path, tmp_path: Path, every: int | None, steps: list[int]
) -> None:
    config = replace(_config(models, _own("Stretched"), monitor_every=every), num_steps=3)
    _, rows = _run(replace(config, monitors=[_own("later")]), tmp_path / "run")
    assert [r["step"] for r in rows if f"monitors/{__name__}:later/mean" in r] == steps


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"deadline_s": 0}, r"judging\.deadline_s: expected a finite number above 0, got 0"),
        ({"max_failure_rate": 1.1}, r"judging\.max_failure_rate: expected a number in \[0, 1\]"),
        ({"patience": 0}, r"judging\.patience: expected at least 1, got 0"),
        ({"monitor_every": 0}, r"judging\.monitor_every: expected at least 1, or null"),
    ],
)
def test_settings_that_cannot_be_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgingConfig(**setting)
