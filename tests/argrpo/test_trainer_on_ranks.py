"""A run on several processes: the images of one process, one set of weights, one run folder.

Over 300 lines because every test builds the same small run.
"""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tokenizer import write_tokenizer
from torch import Tensor

import argrpo.sharded_optimizer
import argrpo.sharded_policy
import argrpo.sharded_state  # noqa: F401 (once here, and not a second long in each rank)
from argrpo.config import TrainConfig
from argrpo.data import Prompt
from argrpo.data_config import DataConfig
from argrpo.distributed_config import DistributedConfig
from argrpo.engine.sampling_params import SamplingParams
from argrpo.eval_config import EvalConfig
from argrpo.learner_config import ParityConfig
from argrpo.model_config import PolicyConfig, TokenizerConfig
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy, save_policy
from argrpo.objective_config import ObjectiveConfig
from argrpo.optimizer_config import OptimizerConfig
from argrpo.output_config import OutputConfig
from argrpo.ranks import PeerError, num_ranks, own_rank
from argrpo.reward_config import RewardConfig
from argrpo.run_folder import RunFolder
from argrpo.schedules import LearningRateConfig
from argrpo.stop_signals import Preempted
from argrpo.trainer import Trainer

SLOTS = 4
SPREAD = DistributedConfig(shard="weights")


def brighter_left(images: Tensor, prompts: list[Prompt]) -> Tensor:
    left, right = images.chunk(2, dim=3)
    return (left.mean(dim=(1, 2, 3)) - right.mean(dim=(1, 2, 3))) * 100


def missing_where_dark(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """NaN for images that differ between ranks in number, whatever rank draws them."""
    scores = brighter_left(images, prompts)
    return scores.masked_fill(scores < 0, torch.nan)


def _in_step(step: int, rank: int) -> bool:
    """Whether this is that rank's call of a judge in that step, from 1; a run of two ranks."""
    calls.append(0)
    return len(calls) == step and own_rank() == rank and num_ranks() == 2


calls: list[int] = []  # of the judges below in this process; each rank is forked with none


def stopped_in_step_4(images: Tensor, prompts: list[Prompt]) -> Tensor:
    if _in_step(4, rank=1):
        os.kill(os.getpid(), signal.SIGTERM)
    return brighter_left(images, prompts)


def killed_in_step_4(images: Tensor, prompts: list[Prompt]) -> Tensor:
    if _in_step(4, rank=1):
        os.kill(os.getpid(), signal.SIGKILL)
    return brighter_left(images, prompts)


def lost_on_rank_1(images: Tensor, prompts: list[Prompt]) -> Tensor:
    if own_rank() == 1:
        raise RuntimeError("no such judge here")
    return brighter_left(images, prompts)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A policy of 2 x 2 tokens and a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48, "vocab_size": 32}
    grid = {"image_size": 8, "downsample": 4}
    save_policy(LlamaGen(LlamaGenConfig(**sizes, **grid, num_classes=10)), folder / "policy")
    write_tokenizer(folder / "tokenizer")
    return folder


def _config(models: Path, folder: Path, reward: str = "brighter_left", **settings) -> TrainConfig:
    defaults: dict[str, Any] = {
        "prompts_per_step": 4,
        "images_per_prompt": 4,
        "num_steps": 2,
        "micro_batch": 4,
        "max_slots": SLOTS,
        "objective": ObjectiveConfig(beta=0.1),
    }
    return TrainConfig(
        output_dir=str(folder),
        policy=PolicyConfig(path=str(models / "policy"), num_heads=2),
        tokenizer=TokenizerConfig(path=str(models / "tokenizer")),
        data=DataConfig(names="digits"),
        rewards=[RewardConfig(name=f"{__name__}:{reward}")],
        rollout=SamplingParams(guidance_scale=2.0),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
        output=OutputConfig(sample_every=0, sample_images=2, trackers=[]),
        device="cpu",
        **{**defaults, **settings},
    )


def _collected(config: TrainConfig) -> tuple[Tensor, Tensor, Tensor]:
    trainer = Trainer(config)
    trainer._clock.start_step()
    collected = trainer._collection.collect(3, with_monitors=False, support=False)
    values = trainer._collection.scores(collected).values
    return collected.rollout.image_ids, collected.rollout.token_ids, values


@pytest.mark.parametrize("count", [2, 4])
def test_a_step_has_the_same_images_on_any_number_of_ranks(
    models: Path, tmp_path: Path, run_ranks: Callable, count: int
) -> None:
    _, tokens, scores = _collected(_config(models, tmp_path / "alone"))
    config = _config(models, tmp_path / "run")
    found = [ended.result for ended in run_ranks(count, _collected, config)]
    ids = torch.cat([image_ids for image_ids, _, _ in found])
    assert sorted(ids.tolist()) == list(range(16))
    assert torch.equal(torch.cat([part for _, part, _ in found]), tokens[ids])
    for _, _, its_scores in found:
        # Pixels are decoded in batches of another size: convolutions round differently.
        torch.testing.assert_close(its_scores, scores, atol=1e-4, rtol=1e-4)
        assert torch.equal(its_scores, found[0][2])


def _trained(config: TrainConfig) -> tuple[str, dict[str, Tensor]]:
    trainer = Trainer(config)
    trainer.train()
    weights = trainer.policy.state_dict()
    digest = hashlib.sha256(b"".join(w.float().numpy().tobytes() for w in weights.values()))
    return digest.hexdigest(), weights


def _rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in RunFolder(folder).metrics_path.read_text().splitlines()]


def _comparable(row: dict[str, float]) -> list[str]:
    """Metrics that are neither times nor sizes of a rank's batches."""
    apart = ("time", "seconds", "second", "batch")
    return [name for name in row if not name.split("/")[-1].endswith(apart) and "time/" not in name]


def _largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_two_ranks_repeat_twenty_steps_bit_for_bit(
    models: Path, tmp_path: Path, run_ranks: Callable
) -> None:
    digests = set()
    for name in ("first", "second"):
        config = _config(models, tmp_path / name, num_steps=20, prompts_per_step=2)
        digests |= {ended.result[0] for ended in run_ranks(2, _trained, config)}
    assert len(digests) == 1
    first, second = _rows(tmp_path / "first"), _rows(tmp_path / "second")
    assert len(first) == 20
    for one, other in zip(first, second, strict=True):
        assert _comparable(one) == _comparable(other)
        assert [one[name] for name in _comparable(one)] == [
            other[name] for name in _comparable(one)
        ]


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts_per_step": 8, "minibatches": 2, "inner_epochs": 2, "weight_ema": 0.9},
        {
            "prompts_per_step": 2,
            "distributed": DistributedConfig(split_groups=True),
            "parity": ParityConfig(label_dropout=0.5),
            "reward": "missing_where_dark",
        },
        {"dtype": "bfloat16"},
        {"distributed": SPREAD, "dtype": "bfloat16", "gradient_checkpointing": True},
        {"distributed": SPREAD, "objective": ObjectiveConfig(policy="guided", beta=0.1)},
    ],
    ids=[
        "minibatches",
        "split groups, dropout",
        "bfloat16",
        "spread bfloat16",
        "spread guided",
    ],
)
def test_four_ranks_train_as_one_does(
    models: Path, tmp_path: Path, run_ranks: Callable, settings: dict[str, Any]
) -> None:
    settings = dict(settings)
    dtype = settings.pop("dtype", "float32")

    def config(name: str) -> TrainConfig:
        plain = _config(models, tmp_path / name, **settings)
        return replace(plain, policy=replace(plain.policy, dtype=dtype))

    _, alone = _trained(config("alone"))
    results = [ended.result for ended in run_ranks(4, _trained, config("run"))]
    assert len({digest for digest, _ in results}) == 1
    # Up to eight optimizer steps of 1e-3. Sums run in another order: 1e-7 of a gradient, which Adam
    # turns into more where the gradient itself is next to nothing. bf16 passes of other sizes
    # round apart by 2^-8 of a gradient, and weights of 0.02 by 2^-14.
    assert _largest_difference(results[0][1], alone) < (5e-5 if dtype == "float32" else 1e-3)
    for row, wanted in zip(_rows(tmp_path / "run"), _rows(tmp_path / "alone"), strict=True):
        assert row.keys() == wanted.keys()
        for name in _comparable(row):
            loose = {"rel": 0.1, "abs": 0.02} if dtype == "bfloat16" else {"rel": 1e-3, "abs": 1e-4}
            assert row[name] == pytest.approx(wanted[name], **loose), name


def test_the_first_rank_alone_writes_the_run_folder(
    models: Path, tmp_path: Path, run_ranks: Callable
) -> None:
    folder = tmp_path / "run"
    judge = RewardConfig(name=f"{__name__}:brighter_left")
    best = f"eval/{judge.name}/mean"
    evaluation = EvalConfig(every=1, num_images=3, judges=[judge], best_metric=best)
    results = run_ranks(2, _trained, _config(models, folder, eval=evaluation))
    saved = load_policy(RunFolder(folder).checkpoint(2)).state_dict()
    assert _largest_difference(saved, results[1].result[1]) == 0
    assert len(_rows(folder)) == 2
    assert RunFolder(folder).best_path.is_dir()
    assert len(RunFolder(folder).evaluations_path.read_text().splitlines()) == 3


def test_a_judge_that_fails_on_one_rank_ends_the_run_on_all(
    models: Path, tmp_path: Path, run_ranks: Callable
) -> None:
    config = _config(models, tmp_path / "run", "lost_on_rank_1")
    first, second, *_ = run_ranks(4, _trained, config)
    assert str(second.result) == "no such judge here"
    assert isinstance(first.result, PeerError)
    assert str(first.result) == "rank 1 failed: no such judge here"


def _refused(config: TrainConfig, other: TrainConfig) -> str:
    assert num_ranks() == 2
    with pytest.raises((ValueError, PeerError)) as refusal:
        Trainer(config if own_rank() == 0 else other)
    return str(refusal.value)


def test_ranks_that_were_given_different_things_refuse_to_start(
    models: Path, tmp_path: Path, run_ranks: Callable
) -> None:
    config = _config(models, tmp_path / "run")
    other = tmp_path / "policy"
    policy = load_policy(models / "policy")
    with torch.no_grad():
        policy.norm.weight[3] += 1
    save_policy(policy, other)
    for change, message in (
        ({"seed": 1}, "--config: expected the same on every rank, got others on rank 1"),
        (
            {"policy": replace(config.policy, path=str(other))},
            "--config: expected the same on every rank",
        ),
        ({"prompts_per_step": 3}, "prompts_per_step: expected a multiple of the 2 ranks, got 3"),
    ):
        answers = run_ranks(2, _refused, config, replace(config, **change))
        assert message in answers[1].result


@pytest.mark.parametrize(
    ("shard", "save", "ahead"), [("optimizer", "whole", True), ("weights", "parts", False)]
)
def test_a_run_that_a_signal_stopped_goes_on_bit_for_bit(
    models: Path, tmp_path: Path, run_ranks: Callable, shard: str, save: str, ahead: bool
) -> None:
    settings = {
        "num_steps": 6,
        "draw_ahead": ahead,
        "weight_ema": 0.9,
        "distributed": DistributedConfig(shard=shard, save=save),
    }
    straight = run_ranks(2, _trained, _config(models, tmp_path / "straight", **settings))
    config = _config(models, tmp_path / "run", "stopped_in_step_4", **settings)
    stopped = run_ranks(2, _trained, config)
    for ended in stopped:
        assert isinstance(ended.result, Preempted)
    assert "saved in" in str(stopped[1].result)
    resumed = run_ranks(2, _trained, replace(config, resume="auto"))
    assert {ended.result[0] for ended in resumed} == {straight[0].result[0]}
    names = _comparable(_rows(tmp_path / "straight")[0])
    names = [name for name in names if not name.startswith("rewards/")]
    for row, wanted in zip(_rows(tmp_path / "run"), _rows(tmp_path / "straight"), strict=True):
        assert [row[name] for name in names] == [wanted[name] for name in names]


def test_a_run_that_was_killed_goes_on_with_another_number_of_ranks(
    models: Path, tmp_path: Path, run_ranks: Callable
) -> None:
    every = OutputConfig(sample_every=0, sample_images=2, save_every=1, trackers=[])
    settings = {"num_steps": 6, "distributed": DistributedConfig(save="parts")}
    straight = replace(_config(models, tmp_path / "straight", **settings), output=every)
    weights = run_ranks(2, _trained, straight)[0].result[1]
    config = _config(models, tmp_path / "run", "killed_in_step_4", **settings)
    first, second = run_ranks(2, _trained, replace(config, output=every))
    assert isinstance(first.result, PeerError) and second.code == -signal.SIGKILL
    # The same run again: a bit of its newest checkpoint's parts flips, so the one before counts.
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    newest = max((tmp_path / "copy" / "checkpoints").glob("optimizer_step_*"))
    part = next(newest.glob("__1_*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    for name, count in (("run", 4), ("copy", 1)):
        again = replace(config, output=every, output_dir=str(tmp_path / name), resume="auto")
        found = run_ranks(count, _trained, again)[0].result[1]
        # Four more steps of 1e-3 after the same state; see the tolerance of four ranks against one.
        assert _largest_difference(found, weights) < 5e-5
        assert [row["step"] for row in _rows(tmp_path / name)] == [1, 2, 3, 4, 5, 6]
