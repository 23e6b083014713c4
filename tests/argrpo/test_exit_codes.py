"""What goes wrong in a run, and by which code and which words a command says whose fault it was."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from command_line import refusal, write_config, write_models

from argrpo import doctor, exit_codes
from argrpo.cli import main
from argrpo.non_finite import NonFiniteError
from argrpo.rewards.failure_watch import JudgesUnavailableError
from argrpo.trainer import Trainer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def config_file(models: Path, tmp_path: Path) -> Path:
    return write_config(models, tmp_path)


@pytest.fixture
def in_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is started where the judges lie."""
    monkeypatch.chdir(models)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_more_than_fits_into_memory_is_the_machines_fault(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--policy", models / "policy", "--tokenizer", models / "tokenizer", "--labels", "3"]
    words += ["--output_dir", tmp_path / "out", "--num_images_per_prompt", "100000000000000"]
    line = refusal(capsys, 74, "sample", *words)
    assert line.startswith("memory: expected room for 800,000,000,000,000 bytes more, got none")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_the_machines_fault_and_leaves_nothing(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files_up_to: Callable[[int], AbstractContextManager[None]],
) -> None:
    words = ["--policy", models / "policy", "--tokenizer", models / "tokenizer", "--labels", "3"]
    with files_up_to(60):
        line = refusal(capsys, 74, "sample", *words, "--output_dir", tmp_path / "out")
    assert "00000_class_0003.png: expected room for a file, got a full disk" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_models")
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (JudgesUnavailableError("rewards.deqa: expected scores, got none"), 69),
        (NonFiniteError("grad_norm: expected a finite number"), 70),
        (torch.OutOfMemoryError("memory: 3 GB wanted"), 74),
        (PermissionError(13, "Permission denied"), 74),
    ],
)
def test_what_goes_wrong_in_a_run_has_an_exit_code_of_its_own(
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
) -> None:
    def broken(_: Trainer) -> None:
        raise error

    monkeypatch.setattr(Trainer, "train", broken)
    assert refusal(capsys, code, "train", "--config", config_file) == str(error)


@pytest.mark.usefixtures("in_models")
@pytest.mark.parametrize(
    ("judge", "error", "said"),
    [
        ("mistaken", AttributeError, "no_such_method"),
        ("strict", ValueError, "too beautiful"),
        ("lost", FileNotFoundError, "no_such_file"),
    ],
)
def test_a_bug_in_a_judge_shows_its_traceback(
    config_file: Path, judge: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        words = ["--config", str(config_file), "--rewards", f"own_judges_of_the_cli_test:{judge}"]
        main(["train", *words])


@pytest.mark.usefixtures("in_models")
def test_a_judge_that_ends_the_program_is_heard(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", config_file, "--rewards", "own_judges_of_the_cli_test:leaving"]
    assert refusal(capsys, 1, "train", *words) == "that will do"


@pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_quiet_end_keeps_its_code(
    monkeypatch: pytest.MonkeyPatch, given: int | None, code: int
) -> None:
    def leaving(*_: object) -> None:
        raise SystemExit(given)

    monkeypatch.setattr(doctor, "examine", leaving)
    assert main(["doctor"]) == code


def test_ctrl_c_while_pytorch_is_imported_is_as_short() -> None:
    code = """
import sys
from argrpo import cli
sys.modules["torch"] = None  # as after an import that was stopped
def stopped(_):
    raise KeyboardInterrupt
cli._COMMANDS["doctor"] = cli._Command("", stopped)
sys.exit(cli.main(["doctor"]))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "argrpo: stopped by Ctrl-C\n")


def test_ctrl_c_is_a_short_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert refusal(capsys, 130, "doctor") == "stopped by Ctrl-C"


def test_the_exit_codes_of_the_documentation_are_those_of_the_code() -> None:
    named = {name: code for name, code in vars(exit_codes).items() if name[0].isupper()}
    codes = {*named.values(), 124}
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for code in codes:
        assert f"\n    {code} " in (exit_codes.__doc__ or "")
        assert f"| {code} |" in readme
