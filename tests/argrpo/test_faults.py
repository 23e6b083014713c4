"""What a run does about numbers that are none, memory that is short, signals and standing still.

Over 300 lines because all of it is done to the same small run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo import checkpoint_writer
from argrpo.checkpoint_names import positions
from argrpo.checkpoints import write_checkpoint
from argrpo.cli import main
from argrpo.config import TrainConfig
from argrpo.config_files import parse_config
from argrpo.data import Prompt
from argrpo.engine.ranges import no_ranges
from argrpo.fault_config import FaultConfig
from argrpo.micro_batch import MicroBatch
from argrpo.models.loading import load_policy
from argrpo.non_finite import NonFiniteError
from argrpo.output_config import OutputConfig
from argrpo.policy_update import PolicyUpdate
from argrpo.run_folder import StorageError
from argrpo.run_lock import RunLock
from argrpo.stop_signals import Preempted, StopSignals
from argrpo.trainer import Trainer
from argrpo.watchdog import Watchdog

JUDGE = """
import os, time

def slow(images, prompts):
    print("judging", flush=True)
    time.sleep(float(os.environ.get("JUDGING_S", "0")))
    return images.mean(dim=(1, 2, 3))
"""


def brightness(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return images.mean(dim=(1, 2, 3)) * 100


def made_config(models: Path, folder: Path, **settings: Any) -> TrainConfig:
    words = f"""--policy.path {models}/policy --tokenizer.path {models}/tokenizer
        --policy.num_heads 2 --output_dir {folder} --data.names digits --num_steps 4
        --prompts_per_step 2 --images_per_prompt 4 --micro_batch 4 --objective.beta 0.1
        --optimizer.learning_rate.peak 1e-2 --output.sample_every 0 --output.sample_images 1
        --output.trackers [] --device cpu""".split()
    words += ["--rewards", json.dumps([{"name": f"{__name__}:brightness"}])]
    return replace(parse_config(TrainConfig, words, command="train", lists={}), **settings)


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int, Any], Any]) -> None:
    """Passes through what an optimizer step's passes leave, with their number from 1."""
    original, calls = PolicyUpdate.passes, [0]

    def passes(self: PolicyUpdate, *args: Any) -> Any:
        calls[0] += 1
        return spoil(calls[0], original(self, *args))

    monkeypatch.setattr(PolicyUpdate, "passes", passes)


def nan_loss_at(number: int) -> Callable[[int, Any], Any]:
    """Only the loss is no number; the gradients are fine."""

    def spoil(call: int, passed: Any) -> Any:
        if call != number:
            return passed
        losses = replace(passed.losses, loss=passed.losses.loss * torch.nan)
        return passed._replace(losses=losses)

    return spoil


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_its_batch(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, nan_loss_at(3))
    trainer = Trainer(made_config(tiny_models, tmp_path))
    with pytest.raises(NonFiniteError, match=r"at step 3, got nan; .* in non_finite/"):
        trainer.train()
    Trainer(made_config(tiny_models, tmp_path / "two", num_steps=2)).train()
    expected = load_policy(tmp_path / "two" / "checkpoints" / "step_000002")
    for name, weight in trainer.policy.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name
    assert positions(tmp_path / "checkpoints") == []
    record = json.loads((tmp_path / "non_finite" / "step_000003.json").read_text())
    tensors = load_file(tmp_path / "non_finite" / "step_000003.safetensors")
    assert record["step"] == 3 and record["grad_norms"] == ["nan"]
    assert isinstance(record["seed"], int)
    assert [image["image_id"] for image in record["images"]] == list(range(8))
    assert {image["text"].split()[-1] for image in record["images"]} <= {
        "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    }  # fmt: skip
    judge = f"{__name__}:brightness"
    scores = [float(image["scores"][judge]) for image in record["images"]]
    assert all(score == score for score in scores)
    assert tensors["token_ids"].shape == (8, 4)


def test_a_run_that_fails_lets_its_folder_go_when_its_checkpoint_is_written(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = RunLock.release, []

    def slow(*given: Any) -> Any:
        time.sleep(1.0)
        return write_checkpoint(*given)

    def release(self: RunLock) -> None:
        seen.extend(path.name for _, path in positions(tmp_path / "checkpoints"))
        original(self)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", slow)
    monkeypatch.setattr(RunLock, "release", release)
    spoiled(monkeypatch, nan_loss_at(2))
    output = OutputConfig(sample_every=0, sample_images=1, save_every=1, trackers=[])
    with pytest.raises(NonFiniteError, match="at step 2"):
        Trainer(made_config(tiny_models, tmp_path, output=output)).train()
    assert seen == ["step_000001"]


def test_skipped_steps_move_nothing_and_are_counted(
    tiny_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoiled(monkeypatch, nan_loss_at(3))
    fault = FaultConfig(on_non_finite="skip", max_skipped=1)
    Trainer(made_config(tiny_models, tmp_path, fault=fault)).train()
    rows = rows_of(tmp_path)
    assert [row["optimizer_step"] for row in rows] == [1, 2, 2, 3]
    assert rows[2]["loss"] is None and rows[3]["loss"] is not None
    assert "skipped, as 1 of at most 1" in caplog.text
    assert (tmp_path / "non_finite" / "step_000003.json").exists()
    final = load_policy(tmp_path / "checkpoints" / "latest").state_dict()
    assert all(weight.isfinite().all() for weight in final.values())


def test_too_many_skipped_steps_stop_the_run(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(
        monkeypatch,
        lambda call, passed: nan_loss_at(call)(call, passed) if call > 1 else passed,
    )
    fault = FaultConfig(on_non_finite="skip", max_skipped=2)
    with pytest.raises(NonFiniteError, match="at step 4"):
        Trainer(made_config(tiny_models, tmp_path, fault=fault)).train()
    assert len(rows_of(tmp_path)) == 3


def test_a_micro_batch_that_does_not_fit_is_halved_once_with_the_same_result(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    split = made_config(tiny_models, tmp_path / "split", micro_batch=2)
    Trainer(split).train()
    original, calls = PolicyUpdate._accumulate, [0]

    def short(self: PolicyUpdate, tokens: Any, batch: Any) -> Any:
        calls[0] += 1
        # In the second step, after one micro-batch of four images has left its gradient.
        if len(tokens.token_ids) > 2 and calls[0] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, tokens, batch)

    monkeypatch.setattr(PolicyUpdate, "_accumulate", short)
    Trainer(made_config(tiny_models, tmp_path / "short")).train()
    assert "micro_batch: 4 images did not fit" in caplog.text
    assert calls[0] == 2 + 2 + 3 * 4
    for row, other in zip(rows_of(tmp_path / "short"), rows_of(tmp_path / "split"), strict=True):
        # The first step was summed in two parts here and in four there: about 1e-7 of a gradient.
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["reward"] == pytest.approx(other["reward"], abs=1e-3)


def test_memory_that_stays_short_is_told_with_numbers() -> None:
    undone = []

    def never(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    micro_batch = MicroBatch(5)
    with pytest.raises(torch.OutOfMemoryError, match="expected 5 and then 3 images at a time"):
        micro_batch.fitted(never, lambda: undone.append(1))
    with pytest.raises(torch.OutOfMemoryError, match="expected 5 and then 3 images"):
        micro_batch.fitted(never, lambda: undone.append(1))
    assert undone == [1]
    with pytest.raises(torch.OutOfMemoryError, match="expected 1 images"):
        MicroBatch(1).fitted(never, lambda: None)


def test_the_command_ends_with_the_code_of_what_happened(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    words = f"""train --policy.path {tiny_models}/policy --tokenizer.path {tiny_models}/tokenizer
        --policy.num_heads 2 --data.names digits --num_steps 2 --prompts_per_step 2
        --images_per_prompt 2 --output.trackers [] --device cpu""".split()
    words += ["--rewards", f"{__name__}:brightness", "--output_dir"]

    def short(self: PolicyUpdate, tokens: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        spoiled(patched, nan_loss_at(1))
        assert main([*words, str(tmp_path / "nan")]) == 70
    with monkeypatch.context() as patched:
        patched.setattr(PolicyUpdate, "_accumulate", short)
        assert main([*words, str(tmp_path / "oom")]) == 74
    assert "micro_batch: expected 8 and then 4 images" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        spoiled(patched, lambda call, passed: os.kill(os.getpid(), signal.SIGUSR1) or passed)
        assert main([*words, str(tmp_path / "stop")]) == 143
    told = capsys.readouterr().err
    assert f"argrpo train --resume {tmp_path}/stop goes on" in told
    # As it says, with nothing but the folder; and a bare --resume is auto.
    assert main(["train", "--resume", str(tmp_path / "stop")]) == 0
    assert main([*words, str(tmp_path / "stop"), "--resume"]) == 0


@pytest.fixture
def command(tiny_models: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """A training of a process of its own, whose judge takes its time."""
    (tmp_path / "slow_judge_of_the_fault_test.py").write_text(JUDGE)

    def started(judging_s: float, *more: str) -> subprocess.Popen[str]:
        words = f"""train --policy.path {tiny_models}/policy
            --tokenizer.path {tiny_models}/tokenizer --policy.num_heads 2 --data.names digits
            --num_steps 50 --prompts_per_step 2 --images_per_prompt 2 --output.trackers []
            --rewards slow_judge_of_the_fault_test:slow --output_dir run --device cpu""".split()
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("argrpo")), *words, *more],
            cwd=tmp_path,
            env={**os.environ, "JUDGING_S": str(judging_s)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return started


def wait_for(process: subprocess.Popen[str], word: str, count: int) -> None:
    assert process.stdout is not None
    while count and (line := process.stdout.readline()):
        count -= word in line
    assert count == 0, process.communicate()[1]


def test_a_signal_ends_a_judge_that_takes_for_ever_and_saves(command, tmp_path: Path) -> None:
    process = command(60.0)
    wait_for(process, "judging", 1)
    started = time.monotonic()
    # Ctrl-C under torchrun comes twice, from the terminal and passed on: that is one wish.
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    # Small states take 5 s at most; a busy machine gets three times that.
    assert time.monotonic() - started < 15
    assert "stopped by SIGINT, saved in run/checkpoints/step_000000" in told


def test_signals_are_one_wish_until_a_second_comes_late() -> None:
    with StopSignals() as signals:
        with pytest.raises(Preempted, match="SIGUSR1"), signals.breakable("work"):
            os.kill(os.getpid(), signal.SIGUSR1)
            pytest.fail("the work went on")
        os.kill(os.getpid(), signal.SIGTERM)  # at once: an echo
        with pytest.raises(Preempted):
            signals.check("between")
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)  # outside of what may be broken
        with pytest.raises(Preempted, match="SIGTERM"), signals.breakable("work"):
            pytest.fail("the work began")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_a_second_later_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        try:
            with StopSignals():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1.1)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_a_phase_that_stands_still_ends_the_run_with_its_stacks(tmp_path: Path) -> None:
    path, read_write = tmp_path / "watchdog.txt", os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(read_write[1], 2)
            with Watchdog(0.5, path) as watchdog:
                ranges = watchdog.watched(no_ranges)
                for _ in range(8):  # alive for longer than is allowed
                    with ranges("rollout"):
                        time.sleep(0.1)
                with ranges("reward"), ranges("reward clip"):
                    time.sleep(60)
        finally:
            os._exit(1)
    os.close(read_write[1])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 124
    with os.fdopen(read_write[0]) as file:
        told = file.read()
    for text in (told, path.read_text()):
        assert "no progress for" in text and "in: reward > reward clip" in text
        assert "test_a_phase_that_stands_still" in text, "the stack of the main thread"


def test_a_watchdog_that_is_off_or_done_watches_nothing(tmp_path: Path) -> None:
    for allowed in (0.0, 0.05):
        watchdog = Watchdog(allowed, tmp_path / "watchdog.txt")
        with watchdog, watchdog.watched(no_ranges)("rollout"):
            pass
    time.sleep(0.2)
    assert not (tmp_path / "watchdog.txt").exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        RunLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert f"process {child} on" in (tmp_path / ".lock").read_text()
    lock = RunLock(tmp_path)
    with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on"):
        RunLock(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"max_skipped": -1}, {"watchdog_s": -1.0}])
def test_settings_of_faults_are_checked(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"fault\.{name}: expected .*at least 0, got -1"):
        FaultConfig(**settings)


def test_a_full_disk_has_no_room_for_the_lock_and_keeps_none(
    tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    with files_up_to(0), pytest.raises(StorageError, match=r"\.lock: expected room for a file"):
        RunLock(tmp_path)
    assert list(tmp_path.iterdir()) == []
