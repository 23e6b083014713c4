"""A run that is killed anywhere goes on bit for bit: weights, optimizer, images and metrics."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resumed_runs import (
    OUTPUT,
    STEPS,
    Spread,
    assert_same,
    at_call,
    in_a_fork,
    kill,
    left_by,
    made_config,
    stop_after,
    terminate,
)

from argrpo import checkpoints, training_step
from argrpo.checkpoint_names import Position
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.optimizer import MasterAdamW
from argrpo.policy_update import PolicyUpdate
from argrpo.resuming import find_start
from argrpo.run_folder import RunFolder
from argrpo.stop_signals import Preempted
from argrpo.trackers import JsonLinesTracker
from argrpo.trainer import Trainer

# Class, method and the call at which the process dies, in the second or third step of four.
PHASES = {
    "rollout": (RolloutEngine, "draw", 7),
    "evaluation": (RolloutEngine, "draw", 5),
    "reward": (Spread, "score", 3),
    "accumulation": (PolicyUpdate, "_accumulate", 18),
    "optimizer step": (MasterAdamW, "step", 11),
    "between inner epochs": (PolicyUpdate, "passes", 11),
    "commit": (training_step.TrainingStep, "commit", 3),
    "log": (JsonLinesTracker, "log", 3),
    "save": (checkpoints, "_write_manifest", 4),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> dict[str, object]:
    """What a run leaves that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    Trainer(made_config(tiny_models, folder)).train()
    return left_by(folder)


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_in_any_phase_goes_on_bit_for_bit(
    tiny_models: Path, tmp_path: Path, whole: dict[str, object], phase: str
) -> None:
    owner, name, count = PHASES[phase]
    config = made_config(tiny_models, tmp_path)

    def run() -> None:
        at_call(owner, name, count, kill)
        Trainer(config).train()

    assert in_a_fork(run) == -signal.SIGKILL
    found = find_start(replace(config, resume="auto"), RunFolder(tmp_path))
    assert found is not None and 1 <= found.snapshot.position.step < STEPS
    Trainer(replace(config, resume="auto")).train()
    assert_same(left_by(tmp_path), whole)


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    tiny_models: Path, tmp_path: Path, whole: dict[str, object]
) -> None:
    config = made_config(tiny_models, tmp_path, output=replace(OUTPUT, save_every=0))

    def run() -> None:
        at_call(Spread, "score", 3, kill)
        Trainer(config).train()

    assert in_a_fork(run) == -signal.SIGKILL
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    Trainer(replace(config, resume="auto")).train()
    assert_same(left_by(tmp_path), whole)


@pytest.fixture(scope="module")
def whole_ahead(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> dict[str, object]:
    """The same of a run that draws each step before the last one's scores."""
    folder = tmp_path_factory.mktemp("whole_ahead")
    Trainer(made_config(tiny_models, folder, draw_ahead=True)).train()
    return left_by(folder)


@pytest.mark.parametrize("phase", ["rollout", "reward", "optimizer step", "commit", "save"])
def test_a_run_that_draws_ahead_goes_on_bit_for_bit(
    tiny_models: Path, tmp_path: Path, whole_ahead: dict[str, object], phase: str
) -> None:
    owner, name, count = PHASES[phase]
    config = made_config(tiny_models, tmp_path, draw_ahead=True)

    def run() -> None:
        at_call(owner, name, count, kill)
        Trainer(config).train()

    assert in_a_fork(run) == -signal.SIGKILL
    Trainer(replace(config, resume="auto")).train()
    assert_same(left_by(tmp_path), whole_ahead)


@pytest.mark.parametrize(
    ("owner", "name", "count", "position"),
    [
        (PolicyUpdate, "passes", 5, Position(1, 0)),  # scored, not moved
        (PolicyUpdate, "passes", 7, Position(1, 2)),
        (Spread, "score", 3, Position(2)),
        (RolloutEngine, "draw", 5, Position(1)),
    ],
)
def test_a_signal_saves_what_was_drawn_ahead(
    tiny_models: Path,
    tmp_path: Path,
    whole_ahead: dict[str, object],
    owner: object,
    name: str,
    count: int,
    position: Position,
) -> None:
    output = replace(OUTPUT, save_every=0)
    config = made_config(tiny_models, tmp_path, draw_ahead=True, output=output)

    def run() -> None:
        at_call(owner, name, count, terminate)
        with pytest.raises(Preempted):
            Trainer(config).train()
        os._exit(143)

    assert in_a_fork(run) == 143
    start = find_start(replace(config, resume="auto"), RunFolder(tmp_path))
    assert start is not None and start.snapshot.position == position
    assert "step.ahead.rollout.token_ids" in start.snapshot.tensors
    Trainer(replace(config, resume="auto")).train()
    assert_same(left_by(tmp_path), whole_ahead)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_a_signal_inside_a_step_saves_and_goes_on_bit_for_bit(
    tiny_models: Path, tmp_path: Path, whole: dict[str, object], count: int
) -> None:
    config = made_config(tiny_models, tmp_path, output=replace(OUTPUT, save_every=0))

    def run() -> None:
        # In the passes before the count-th optimizer step, of four a step.
        at_call(PolicyUpdate, "passes", count, terminate)
        with pytest.raises(Preempted, match="stopped by SIGTERM, saved in"):
            Trainer(config).train()
        os._exit(143)

    assert in_a_fork(run) == 143
    start = find_start(replace(config, resume="auto"), RunFolder(tmp_path))
    step, num_updates = divmod(count - 1, 4)
    assert start is not None and start.snapshot.position == Position(step, num_updates)
    Trainer(replace(config, resume="auto")).train()
    assert_same(left_by(tmp_path), whole)
    # Whoever finished the step no longer needs its middle.
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert not [name for name in names if "update" in name]


@pytest.mark.parametrize(
    ("owner", "name", "count", "position"),
    [
        (Spread, "score", 3, Position(2)),
        (RolloutEngine, "draw", 4, Position(1)),
        (MasterAdamW, "step", 6, Position(1, 2)),
        (training_step.TrainingStep, "commit", 2, Position(2)),
        (JsonLinesTracker, "log", 3, Position(2)),
    ],
)
def test_a_signal_between_passes_waits_for_a_state_that_can_be_saved(
    tiny_models: Path,
    tmp_path: Path,
    whole: dict[str, object],
    owner: object,
    name: str,
    count: int,
    position: Position,
) -> None:
    config = made_config(tiny_models, tmp_path, output=replace(OUTPUT, save_every=0))

    def run() -> None:
        at_call(owner, name, count, terminate)
        with pytest.raises(Preempted):
            Trainer(config).train()
        os._exit(143)

    assert in_a_fork(run) == 143
    start = find_start(replace(config, resume="auto"), RunFolder(tmp_path))
    assert start is not None and start.snapshot.position == position
    Trainer(replace(config, resume="auto")).train()
    assert_same(left_by(tmp_path), whole)


def test_a_signal_before_the_first_step_has_nothing_to_save(
    tiny_models: Path, tmp_path: Path, whole: dict[str, object]
) -> None:
    config = made_config(tiny_models, tmp_path)

    def run() -> None:
        at_call(RolloutEngine, "draw", 1, terminate)
        with pytest.raises(Preempted, match="nothing was to be saved"):
            Trainer(config).train()
        os._exit(143)

    assert in_a_fork(run) == 143
    assert not (tmp_path / "checkpoints").exists()
    Trainer(replace(config, resume="auto")).train()
    assert_same(left_by(tmp_path), whole)


def test_another_micro_batch_goes_on_within_rounding(
    tiny_models: Path, tmp_path: Path, whole: dict[str, object]
) -> None:
    config = made_config(tiny_models, tmp_path)
    stop_after(config, 2)
    # Label dropout draws for all images of an optimizer step at once, so it stays the same.
    Trainer(replace(config, resume="auto", micro_batch=2)).train()
    rows, expected = left_by(tmp_path)["rows"], whole["rows"]
    assert rows[:2] == expected[:2]
    for row, other in zip(rows[2:], expected[2:], strict=True):
        # A gradient summed in another order moves by about 1e-7 of its size. Adam divides by that
        # size, so a weight moves by up to 1e-2 times that an optimizer step; exact it is not.
        assert row["reward"] == pytest.approx(other["reward"], abs=1e-3)
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_another_micro_batch_goes_on_within_rounding_in_bf16(
    tiny_models: Path, tmp_path: Path
) -> None:
    config = made_config(tiny_models, tmp_path / "one", num_steps=2)
    config = replace(config, policy=replace(config.policy, dtype="bfloat16"))
    Trainer(config).train()
    shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=True)
    for name, size in (("one", 1), ("two", 2)):
        again = replace(config, output_dir=str(tmp_path / name), resume="auto", num_steps=STEPS)
        Trainer(replace(again, micro_batch=size)).train()
    one, two = left_by(tmp_path / "one"), left_by(tmp_path / "two")
    assert one["rows"][:2] == two["rows"][:2]
    # bf16 passes of other sizes round a gradient apart by 2^-8 of its size, and an optimizer step
    # of 1e-2 by more only where micro-batches nearly cancel: half of one step in all eight.
    for name in (key for key in one if key.startswith("training.safetensors/") and "master" in key):
        assert (one[name] - two[name]).abs().max() < 5e-3, name
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=0.02)


def test_a_run_goes_on_in_another_folder(
    tiny_models: Path, tmp_path: Path, whole: dict[str, object]
) -> None:
    config = made_config(tiny_models, tmp_path / "first")
    stop_after(config, 2)
    before = sorted(path.name for path in (tmp_path / "first" / "checkpoints").iterdir())
    for name, source in (("run", "first"), ("checkpoint", "first/checkpoints/step_000001")):
        fork = replace(config, output_dir=str(tmp_path / name), resume=str(tmp_path / source))
        Trainer(fork).train()
        left = left_by(tmp_path / name, all_samples=False)
        assert left["rows"] == whole["rows"][-len(left["rows"]) :]
        assert all(torch.equal(left[key], whole[key]) for key in left if "model" in key)
    assert before == sorted(path.name for path in (tmp_path / "first" / "checkpoints").iterdir())


def test_the_newest_checkpoint_that_is_whole_is_found(
    tiny_models: Path,
    tmp_path: Path,
    whole: dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = made_config(tiny_models, tmp_path)
    stop_after(config, 3)
    damaged = tmp_path / "checkpoints" / "step_000003" / "training.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-9] ^= 1
    damaged.write_bytes(content)
    (tmp_path / "checkpoints" / "step_000002" / "manifest.json").unlink()
    Trainer(replace(config, resume="auto")).train()
    assert "skipped step_000003: training.safetensors: expected sha256" in caplog.text
    assert "skipped step_000002: expected manifest.json" in caplog.text
    assert_same(left_by(tmp_path), whole)
