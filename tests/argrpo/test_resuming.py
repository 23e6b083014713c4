"""Which run may go on from what: other settings, a longer run, a folder that is in use."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import OUTPUT, STEPS, made_config, stop_after
from safetensors.torch import load_file

from argrpo.checkpoint_names import positions
from argrpo.models.loading import load_policy
from argrpo.optimizer_config import OptimizerConfig
from argrpo.resuming import check_same_run
from argrpo.run_folder import plain
from argrpo.schedules import LearningRateConfig
from argrpo.trainer import Trainer


def test_settings_that_make_another_run_are_refused_by_name(
    tiny_models: Path, tmp_path: Path
) -> None:
    config = made_config(tiny_models, tmp_path)
    stop_after(config, 2)
    other = replace(config, seed=1, inner_epochs=1, resume="auto", micro_batch=4)
    with pytest.raises(ValueError, match=r"resume: .* inner_epochs 1 instead of 2, seed 1 instead"):
        Trainer(other)
    # A constant rate does not follow the share of the run that is done.
    Trainer(replace(config, num_steps=3, resume="auto")).train()
    with pytest.raises(ValueError, match="expected the newest checkpoint of the run, got step_000"):
        Trainer(replace(config, resume=str(tmp_path / "checkpoints" / "step_000001")))
    with pytest.raises(FileNotFoundError, match="resume: expected auto, no, or the folder"):
        Trainer(replace(config, resume=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="output_dir: expected a folder without a run"):
        Trainer(config)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_may_be_made_longer_unless_its_rate_follows_its_length(
    schedule: Any, tiny_models: Path, tmp_path: Path
) -> None:
    rate = LearningRateConfig(schedule=schedule)
    config = made_config(tiny_models, tmp_path, optimizer=OptimizerConfig(learning_rate=rate))
    saved, longer = plain(asdict(config)), replace(config, num_steps=STEPS + 1)
    if schedule == "constant":
        check_same_run(longer, saved, tmp_path)
        return
    with pytest.raises(ValueError, match=f"num_steps {STEPS + 1} instead of {STEPS}"):
        check_same_run(longer, saved, tmp_path)


def test_only_so_many_checkpoints_stay(tiny_models: Path, tmp_path: Path) -> None:
    output = replace(OUTPUT, save_every=1, keep_last=1, keep_every=2)
    Trainer(made_config(tiny_models, tmp_path, output=output)).train()
    names = [path.name for _, path in positions(tmp_path / "checkpoints")]
    assert names == ["step_000004", "step_000002"]
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step_000004"
    assert len(list((tmp_path / "checkpoints").glob("reference_*"))) == 1
    # And its policy loads as any other.
    loaded = load_policy(tmp_path / "checkpoints" / "latest")
    saved = load_file(tmp_path / "checkpoints" / "step_000004" / "model.safetensors")
    assert torch.equal(loaded.head_weight, saved["output.weight"])


def test_two_runs_in_one_folder_are_refused(tiny_models: Path, tmp_path: Path) -> None:
    config = made_config(tiny_models, tmp_path, resume="auto")
    first = Trainer(config)
    wanted = rf"in use by process {os.getpid()} on"
    with pytest.raises(ValueError, match=wanted):
        Trainer(config)
    first.train()
    Trainer(config)  # which let go of it
