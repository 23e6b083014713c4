"""A run that is killed anywhere goes on bit for bit: weights, optimizer, images and metrics.

Over 300 lines because every place to die in is held against the same run that nobody stopped.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo import checkpoints, training_step
from argrpo.checkpoint_names import Position, positions
from argrpo.config import TrainConfig
from argrpo.config_files import parse_config
from argrpo.data import Prompt
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.models.loading import load_policy
from argrpo.optimizer import MasterAdamW
from argrpo.optimizer_config import OptimizerConfig
from argrpo.output_config import OutputConfig
from argrpo.policy_update import PolicyUpdate
from argrpo.resuming import check_same_run, find_start
from argrpo.run_folder import RunFolder, plain
from argrpo.schedules import LearningRateConfig
from argrpo.stop_signals import Preempted
from argrpo.trackers import JsonLinesTracker
from argrpo.trainer import Trainer

STEPS = 4


def brightness(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """Also draws from the global generators, as a judge of a user's may."""
    return images.mean(dim=(1, 2, 3)) * 100 + torch.rand(len(images))


class Spread:
    """A distribution reward whose state moves once a step."""

    name = "spread"

    def __init__(self) -> None:
        self._mean, self._next = torch.zeros(()), None

    def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        values = images.mean(dim=(1, 2, 3))
        self._next = 0.5 * self._mean + 0.5 * values.mean()
        return values - self._mean

    def update(self) -> None:
        if self._next is not None:
            self._mean, self._next = self._next, None

    def state_dict(self) -> dict[str, Tensor]:
        state = {"mean": self._mean}
        return state if self._next is None else state | {"next": self._next}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._mean, self._next = state["mean"], state.get("next")


OUTPUT = OutputConfig(sample_every=2, sample_images=2, save_every=1, trackers=[])


def made_config(models: Path, folder: Path, **settings: object) -> TrainConfig:
    """A run with everything that has state, on one thread's worth of model."""
    words = f"""--policy.path {models}/policy --tokenizer.path {models}/tokenizer
        --policy.num_heads 2 --output_dir {folder} --data.names digits --num_steps {STEPS}
        --prompts_per_step 2 --images_per_prompt 2 --micro_batch 1 --minibatches 2
        --inner_epochs 2 --objective.beta 0.1 --optimizer.learning_rate.peak 1e-2
        --entropy.control target --weight_ema 0.9 --parity.label_dropout 0.3
        --rollout.guidance_scale 2 --reference.sync_every {settings.pop("sync_every", 0)}
        --eval.every 2 --eval.num_images 2 --eval.best_metric eval/entropy
        --judging.overlap false --device cpu""".split()
    rewards = [{"name": f"{__name__}:{name}"} for name in ("brightness", "Spread")]
    judge = [{"name": f"{__name__}:brightness", "options": {}}]
    words += ["--rewards", json.dumps(rewards), "--eval.judges", json.dumps(judge)]
    config = parse_config(TrainConfig, words, command="train", lists={})
    return replace(config, output=settings.pop("output", OUTPUT), **settings)


def left_by(folder: Path, *, all_samples: bool = True) -> dict[str, Any]:
    """All that a run leaves, without times."""
    found: dict[str, Any] = {"rows": timeless(folder / "metrics.jsonl")}
    if all_samples:
        found["evaluations"] = timeless(folder / "evaluations.jsonl")
        found |= {path.name: path.read_bytes() for path in sorted((folder / "samples").iterdir())}
    last = folder / "checkpoints" / f"step_{STEPS:06d}"
    for name in ("model.safetensors", "training.safetensors"):
        found |= {f"{name}/{key}": value for key, value in load_file(last / name).items()}
    return found


def timeless(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    is_time = ("time", "second")
    return [{k: v for k, v in row.items() if not any(t in k for t in is_time)} for row in rows]


def assert_same(one: dict[str, object], other: dict[str, object]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], (name, _different(value, other[name]))


def in_a_fork(work: Callable[[], object]) -> int:
    """Run something in a fork of this process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_call(owner: Any, name: str, count: int, act: Callable[[], object]) -> None:
    """Act before a method's count-th call; for a fork, because it stays so."""
    original, calls = getattr(owner, name), [0]

    def counted(*args: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] == count:
            act()
        return original(*args, **options)

    setattr(owner, name, counted)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_after(config: TrainConfig, num_steps: int) -> None:
    """A run that is killed once that many steps are saved."""

    def run() -> None:
        at_call(training_step.TrainingStep, "run", num_steps + 1, kill_when_saved)
        Trainer(config).train()

    assert in_a_fork(run) == -signal.SIGKILL


def kill_when_saved() -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    kill()


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


def _different(one: Any, other: Any) -> object:
    """The entries of two lists of rows that differ, for the message."""
    if not isinstance(one, list):
        return None
    pairs = zip(one, other, strict=False)
    return [{k: (a[k], b.get(k)) for k in a if a[k] != b.get(k)} for a, b in pairs]
