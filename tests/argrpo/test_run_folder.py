"""A run folder is fresh and writable, and its files are there whole or not at all."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from argrpo.config import TrainConfig
from argrpo.config_files import parse_config
from argrpo.run_folder import RunFolder, StorageError, config_text, point_to, write_atomically


def test_a_new_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "one")
    assert folder.path.is_dir()
    assert list(folder.path.iterdir()) == []


def test_each_rank_leaves_its_stacks_in_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = set()
    for rank in range(2):
        monkeypatch.setattr("argrpo.run_folder.own_rank", lambda rank=rank: rank)
        paths.add(RunFolder(Path("run")).watchdog_path.name)
    assert paths == {"watchdog.txt", "watchdog_rank_1.txt"}


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_a_folder_that_holds_another_run_is_refused_and_untouched(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("kept")
    with pytest.raises(ValueError, match=r"output_dir: expected a folder without a run, got .*"):
        RunFolder.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "kept"


def test_a_run_that_failed_before_its_first_step_may_be_tried_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("written before the first step")
    (tmp_path / "metrics.jsonl").write_text("")
    assert RunFolder.create(tmp_path).path == tmp_path


def test_a_base_policy_that_was_the_best_before_the_first_step_is_no_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.best_of(0).mkdir(parents=True)
    point_to(folder.best_path, folder.best_of(0))
    assert RunFolder.create(tmp_path) == folder
    folder.checkpoint(1).mkdir()
    with pytest.raises(ValueError, match="output_dir: expected a folder without a run"):
        RunFolder.create(tmp_path)


def test_a_file_in_the_way_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(ValueError, match="output_dir: expected a folder, got"):
            RunFolder.create(path)


def test_a_folder_without_write_permission_is_refused_before_anything_runs() -> None:
    # /proc refuses new files to everybody, root included, where permission bits would not.
    with pytest.raises(ValueError, match="output_dir: expected a folder that can be written"):
        RunFolder.create("/proc/argrpo")
    with pytest.raises(ValueError, match="output_dir: expected a folder that can be written"):
        RunFolder.create("/proc/sys")


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    made = [RunFolder.numbered(tmp_path / "demo").path.name for _ in range(3)]
    assert made == ["demo", "demo-2", "demo-3"]


def test_files_of_a_run_lie_where_the_design_says(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.samples(100) == tmp_path / "samples" / "step_000100.png"
    assert folder.checkpoint(7) == tmp_path / "checkpoints" / "step_000007"
    assert folder.report_path == tmp_path / "report.html"


def test_only_an_empty_folder_is_discarded(tmp_path: Path) -> None:
    empty, used = RunFolder.create(tmp_path / "empty"), RunFolder.create(tmp_path / "used")
    (used.path / "file").touch()
    for folder in (empty, used):
        folder.discard_if_empty()
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_a_written_file_replaces_the_one_that_stood(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    for text in ("first", "second"):
        write_atomically(path, lambda part, text=text: part.write_text(text))
    assert path.read_text() == "second"
    assert [found.name for found in path.parent.iterdir()] == ["file.txt"]


def test_the_file_under_way_is_hidden_and_keeps_its_suffix(tmp_path: Path) -> None:
    seen: list[str] = []
    write_atomically(tmp_path / "grid.png", lambda part: (seen.append(part.name), part.touch()))
    assert seen[0].startswith(".")
    assert seen[0].endswith(".png")


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(
    tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "scores.json"
    write_atomically(path, lambda part: part.write_text("old"))
    with files_up_to(4096), pytest.raises(StorageError, match=r"scores\.json: expected room"):
        write_atomically(path, lambda part: part.write_bytes(bytes(10_000)))
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["scores.json"]


def test_a_name_leads_to_one_whole_folder_after_the_other(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        point_to(tmp_path / "best", tmp_path / name)
        assert (tmp_path / "best" / "file").read_text() == name
    # Relative, so that the folder of the run can be moved.
    assert (tmp_path / "best").readlink() == Path("second")
    assert {path.name for path in tmp_path.iterdir()} == {"best", "first", "second"}


def test_a_name_that_is_taken_by_a_folder_stays(tmp_path: Path) -> None:
    for name in ("best", "new"):
        (tmp_path / name).mkdir()
    with pytest.raises(StorageError, match="best: expected a file that can be written"):
        point_to(tmp_path / "best", tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"best", "new"}
    assert not (tmp_path / "best").is_symlink()


def test_an_interrupt_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(part: Path) -> None:
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file.txt", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_written_config_reads_back_as_the_same_config(tmp_path: Path) -> None:
    words = ["--config", "digits.yaml", "--optimizer.betas", "[0.8, 0.95]", "--seed", "3"]
    config = parse_config(TrainConfig, words, command="argrpo train", lists={})
    path = tmp_path / "config.yaml"
    path.write_text(config_text(config))
    again = parse_config(TrainConfig, ["--config", str(path)], command="argrpo train", lists={})
    assert again == config
