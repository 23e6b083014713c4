"""Checkpoints on disk: killed or without room, there is a whole one to go on from."""

import errno
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoints import FILES, snapshot

from argrpo import checkpoints, tensor_file
from argrpo.checkpoint_names import Position, positions, prune
from argrpo.checkpoint_writer import CheckpointWriter
from argrpo.checkpoints import InvalidCheckpoint, Snapshot, read_checkpoint, write_checkpoint
from argrpo.non_finite import NonFiniteError
from argrpo.run_folder import StorageError
from argrpo.tensor_file import record_of, write_tensors

NUM_KILLS = 200


def newest_valid(folder: Path) -> Snapshot | None:
    for _, path in positions(folder):
        try:
            return read_checkpoint(path)
        except InvalidCheckpoint:
            continue
    return None


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path, reference = write_checkpoint(tmp_path, snapshot(7), None)
    found = read_checkpoint(path)
    assert path.name == "step_000007" and found.position == Position(7)
    assert sorted(item.name for item in path.iterdir()) == FILES
    for name, weight in snapshot(7).model.items():
        assert torch.equal(found.model[name], weight)
    assert found.tensors["step"].shape == () and found.state["seed"] == 7
    assert found.reference is not None and torch.equal(
        found.reference["weight"], snapshot(7).reference["weight"]
    )
    assert (tmp_path / "latest").readlink() == Path("step_000007")
    # The frozen reference is written once.
    before = (tmp_path / str(reference) / "model.safetensors").stat().st_mtime_ns
    write_checkpoint(tmp_path, snapshot(8), reference)
    assert (tmp_path / str(reference) / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_our_files_are_what_the_library_would_write(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "strided": torch.arange(24).reshape(4, 6).to(dtype)[:, ::2].T,
        "ü": torch.arange(5).to(dtype),
    }
    record = write_tensors(tmp_path / "ours.safetensors", tensors)
    assert record == record_of(tmp_path / "ours.safetensors")
    found = load_file(tmp_path / "ours.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(found[name].dtype == dtype for name in tensors)


def _saves_for_ever(folder: Path, told: int) -> None:
    """Saves steps 1, 2, ... and tells each one that is complete."""
    reference = None
    for step in range(1, 10_000):
        _, reference = write_checkpoint(folder, snapshot(step), reference)
        prune(folder, keep_last=2, keep_every=None)
        os.write(told, step.to_bytes(4, "little"))


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder on tmpfs, where a save takes milliseconds and a kill finds it anywhere. What fsync
    is for, a machine that loses power, no signal can show."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def _killed_while_saving(folder: Path, num_saves: int, after_s: float) -> int:
    """Kill a process so long after a save of it; the last that was complete then, 0 for none."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _saves_for_ever(folder, write)
        finally:
            os._exit(1)
    os.close(write)
    # Counted in its own saves, so that a busy machine has as many of them as an idle one.
    told = b""
    while len(told) < 4 * num_saves and (part := os.read(read, 4)):
        told += part
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    while part := os.read(read, 65536):
        told += part
    os.close(read)
    return int.from_bytes(told[-4:], "little")


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_its_last_checkpoint(in_memory: Path) -> None:
    chance = random.Random(0)
    started = time.perf_counter()
    write_checkpoint(in_memory / "timing", snapshot(1), None)
    one_save = time.perf_counter() - started
    num_found = 0
    for number in range(NUM_KILLS):
        folder = in_memory / f"run_{number}"
        num_saves, after_s = chance.randrange(3), chance.uniform(0, 1.5 * one_save)
        completed = _killed_while_saving(folder, num_saves, after_s)
        found = newest_valid(folder)
        assert completed >= num_saves
        if found is None:
            assert completed == 0
            continue
        num_found += 1
        assert found.position.step >= completed
        # Whole, and all of one save.
        assert all((weight == found.position.step).all() for weight in found.model.values())
        assert (found.tensors["exp_avg"] == found.position.step).all()
        assert found.reference is not None and found.reference["weight"][1] == 1
        if (folder / "latest").exists():
            read_checkpoint((folder / "latest").resolve())
        # And whoever comes next is not in its way.
        write_checkpoint(folder, snapshot(found.position.step + 1), None)
        shutil.rmtree(folder)
    assert num_found > NUM_KILLS / 2, "too few processes came to a first save"


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".step_000001.123.part").mkdir()
    (tmp_path / ".step_000001.123.part" / "model.safetensors").write_bytes(b"half")
    write_checkpoint(tmp_path, snapshot(1), None)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_best_policy_that_is_being_written_stays(tmp_path: Path) -> None:
    (tmp_path / ".best_step_000001.123.part").mkdir()  # by the main thread, meanwhile
    write_checkpoint(tmp_path, snapshot(1), None)
    assert (tmp_path / ".best_step_000001.123.part").is_dir()


def test_a_full_disk_leaves_what_stood(
    tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    _, reference = write_checkpoint(tmp_path, snapshot(1), None)
    with files_up_to(3000), pytest.raises(StorageError, match=r"step_000002: expected room"):
        write_checkpoint(tmp_path, snapshot(2), reference)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", reference, "step_000001"]
    read_checkpoint(tmp_path / "latest")


@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_an_error_of_the_disk_anywhere_leaves_what_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    _, reference = write_checkpoint(tmp_path, snapshot(1), None)
    error = OSError(number, os.strerror(number))

    def refuses(*args: Any, **options: Any) -> None:
        raise error

    owner = {"fsync": os, "rename": Path, "write": tensor_file}[call]
    monkeypatch.setattr(owner, "write_bytes" if call == "write" else call, refuses)
    if call == "write":
        monkeypatch.setattr(checkpoints, "write_tensors", refuses)
    with pytest.raises(StorageError, match=f"step_000002: .*{os.strerror(number)}"):
        write_checkpoint(tmp_path, snapshot(2), reference)
    monkeypatch.undo()
    found = newest_valid(tmp_path)
    assert found is not None and found.position.step == 1
    write_checkpoint(tmp_path, snapshot(2), reference)  # and the next save works


def test_a_folder_that_refuses_is_named() -> None:
    # /proc refuses new files to everybody, root included, as a read-only disk does.
    with pytest.raises(StorageError, match="/proc/argrpo/step_000001: expected"):
        write_checkpoint(Path("/proc/argrpo"), snapshot(1), None)


def test_the_writer_takes_its_own_copy_and_tells_errors_later(
    tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=None, keep_every=None, reference=None)
    live = snapshot(1)
    writer.save(live)
    for weight in live.model.values():
        weight.fill_(99)
    writer.wait()
    assert (read_checkpoint(tmp_path / "latest").model["layers.0.weight"] == 1).all()
    with files_up_to(3000):
        writer.save(replace(snapshot(2), reference=None))
        with pytest.raises(StorageError, match="step_000002"):
            writer.wait()
    writer.save(replace(snapshot(3), reference=None))
    writer.wait()
    assert [position.step for position, _ in positions(tmp_path)] == [3, 1]


def test_a_writer_that_is_not_asked_again_logs_what_went_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointWriter(tmp_path / "file", keep_last=None, keep_every=None, reference=None)
    (tmp_path / "file").touch()
    writer.save(snapshot(1))
    writer.finish()
    assert "checkpoint: " in caplog.text and "step_000001: expected a file" in caplog.text
    writer.check()  # told once


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=None, keep_every=None, reference=None)
    broken = snapshot(1)
    broken.model["layers.2.weight"][0, 0] = torch.nan
    writer.save(broken)
    with pytest.raises(NonFiniteError, match=r"step_000001: layers\.2\.weight"):
        writer.wait()
    assert positions(tmp_path) == []


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(None, None, [1, 2, 3, 4, 5, 6]), (1, None, [6]), (2, 3, [3, 5, 6]), (1, 2, [2, 4, 6])],
)
def test_old_checkpoints_go_as_asked(
    tmp_path: Path, keep_last: int | None, keep_every: int | None, kept: list[int]
) -> None:
    for step in range(1, 7):
        (tmp_path / Position(step).name).mkdir()
    (tmp_path / Position(4, 2).name).mkdir()
    (tmp_path / "best_step_000001").mkdir()
    prune(tmp_path, keep_last=keep_last, keep_every=keep_every)
    assert sorted(position.step for position, _ in positions(tmp_path)) == kept
    assert all(position.num_updates is None for position, _ in positions(tmp_path))
    assert (tmp_path / "best_step_000001").exists()


def test_a_later_place_in_the_same_step_is_the_newer_one(tmp_path: Path) -> None:
    for position in (Position(2), Position(2, 0), Position(2, 10), Position(2, 9), Position(1, 12)):
        (tmp_path / position.name).mkdir()
    found = [path.name for _, path in positions(tmp_path)]
    assert found == [
        "step_000002_update_10",
        "step_000002_update_09",
        "step_000002_update_00",
        "step_000002",
        "step_000001_update_12",
    ]
