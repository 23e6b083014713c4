"""The best policy of a run changes from one whole folder to the next, and never by NaN."""

import json
import math
from pathlib import Path

import pytest
import torch

from argrpo.best_checkpoint import BestCheckpoint
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy
from argrpo.run_folder import RunFolder

METRIC = "eval/judge/mean"


@pytest.fixture(scope="module")
def policy() -> LlamaGen:
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16, "vocab_size": 8}
    return LlamaGen(LlamaGenConfig(**sizes, image_size=16, downsample=4, num_classes=2))


def kept_steps(folder: RunFolder, policy: LlamaGen, values: list[float], mode: str) -> list[int]:
    """The steps at which the kept policy changed, each whole and with its own weights."""
    best, steps = BestCheckpoint(folder, METRIC, mode), []  # type: ignore[arg-type]
    for step, value in enumerate(values):
        metrics = {METRIC: value, "reward": 1.0, "eval/other": math.nan}
        if best.improves(metrics):
            with torch.no_grad():
                policy.head_weight.fill_(step)
            best.save(policy, step, metrics)
            steps.append(step)
        if steps:
            record = json.loads((folder.best_path / "best.json").read_text())
            assert record["step"] == steps[-1]
            assert load_policy(folder.best_path).head_weight.unique().tolist() == [steps[-1]]
    return steps


def test_a_higher_value_replaces_and_an_equal_one_does_not(
    policy: LlamaGen, tmp_path: Path
) -> None:
    assert kept_steps(RunFolder(tmp_path), policy, [1.0, 3.0, 2.0, 3.0, 4.0], "max") == [0, 1, 4]


def test_what_a_killed_process_left_half_written_goes(policy: LlamaGen, tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / ".best_step_000003.123.part"
    half.mkdir(parents=True)
    assert kept_steps(RunFolder(tmp_path), policy, [1.0], "max") == [0]
    assert not half.exists()


def test_a_lower_value_replaces_where_low_is_good(policy: LlamaGen, tmp_path: Path) -> None:
    assert kept_steps(RunFolder(tmp_path), policy, [3.0, 4.0, 1.0, 1.0], "min") == [0, 2]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_value_that_is_not_finite_never_replaces(
    policy: LlamaGen, tmp_path: Path, mode: str
) -> None:
    values = [math.nan, -math.inf, math.inf, 2.0, math.nan, math.inf, -math.inf]
    assert kept_steps(RunFolder(tmp_path), policy, values, mode) == [3]


def test_a_step_without_an_evaluation_is_passed_over(tmp_path: Path) -> None:
    assert not BestCheckpoint(RunFolder(tmp_path), METRIC, "max").improves({"reward": 1.0})


def test_the_record_says_what_was_measured_in_json_that_all_can_read(
    policy: LlamaGen, tmp_path: Path
) -> None:
    kept_steps(RunFolder(tmp_path), policy, [0.5], "max")
    assert json.loads((RunFolder(tmp_path).best_path / "best.json").read_text()) == {
        "step": 0,
        "metric": METRIC,
        "mode": "max",
        "value": 0.5,
        "metrics": {METRIC: 0.5, "eval/other": None},
    }


def test_nothing_of_older_ones_stays(policy: LlamaGen, tmp_path: Path) -> None:
    kept_steps(RunFolder(tmp_path), policy, [1.0, 2.0, 3.0], "max")
    found = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {"best", "best_step_000002"}


def test_a_full_disk_leaves_the_one_before(policy: LlamaGen, tmp_path: Path, files_up_to) -> None:
    folder = RunFolder(tmp_path)
    best = BestCheckpoint(folder, METRIC, "max")
    best.save(policy, 1, {METRIC: 1.0})
    with files_up_to(1000), pytest.raises(OSError, match="best_step_000002"):
        best.save(policy, 2, {METRIC: 2.0})
    assert json.loads((folder.best_path / "best.json").read_text())["step"] == 1
    load_policy(folder.best_path)
    assert best.improves({METRIC: 1.5})  # a policy that could not be kept is not the best


def test_a_folder_that_a_failed_run_left_is_replaced(policy: LlamaGen, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.best_of(0).mkdir(parents=True)
    (folder.best_of(0) / "half").touch()
    BestCheckpoint(folder, METRIC, "max").save(policy, 0, {METRIC: 1.0})
    load_policy(folder.best_path)
    assert not (folder.best_path / "half").exists()
