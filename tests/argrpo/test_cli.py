"""The command line: wrong input is one line that names it, and the exit code says whose fault."""

import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import argrpo
from argrpo import cli, doctor, exit_codes
from argrpo.cli import main
from argrpo.config_files import parse_config
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import save_policy, save_tokenizer
from argrpo.models.vq import VQConfig, VQTokenizer
from argrpo.non_finite import NonFiniteError
from argrpo.rewards.failure_watch import JudgesUnavailableError
from argrpo.trainer import Trainer

JUDGES = """
import torch

def darkness(images, prompts):
    return 1 - images.mean(dim=(1, 2, 3))

def mistaken(images, prompts):
    return images.no_such_method()

def strict(images, prompts):
    raise ValueError("images: too beautiful")

def lost(images, prompts):
    return open("no_such_file")

def leaving(images, prompts):
    raise SystemExit("that will do")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy and tokenizer, damaged copies of the policy, and a module of judges."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 64, "vocab_size": 32}
    policy = LlamaGen(LlamaGenConfig(**sizes, image_size=16, downsample=4, num_classes=10))
    save_policy(policy, folder / "policy")
    vq = VQConfig(
        codebook_size=32,
        codebook_dim=8,
        z_channels=32,
        channels=32,
        encoder_multipliers=(1, 1, 1),
        decoder_multipliers=(1, 1, 1),
        num_res_blocks=1,
    )
    save_tokenizer(VQTokenizer(vq), folder / "tokenizer")
    weights = load_file(folder / "policy" / "model.safetensors")
    torch.save({"model": weights}, folder / "policy.pt")
    whole = (folder / "policy.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": subprocess.Popen}, folder / "code.pt")
    (folder / "pickle.pt").write_bytes(pickle.dumps({"model": subprocess.Popen}))
    (folder / "own_judges_of_the_cli_test.py").write_text(JUDGES)
    return folder


@pytest.fixture
def config_file(models: Path, tmp_path: Path) -> Path:
    """A run of two tiny steps."""
    config = {
        "output_dir": str(tmp_path / "run"),
        "policy": {"path": str(models / "policy")},
        "tokenizer": {"path": str(models / "tokenizer")},
        "data": {"names": "digits"},
        "rewards": [{"name": "own_judges_of_the_cli_test:darkness"}],
        "prompts_per_step": 2,
        "images_per_prompt": 2,
        "num_steps": 2,
        "device": "cpu",
        "output": {"sample_every": 0, "sample_images": 2, "trackers": []},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def in_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is started where the judges lie."""
    monkeypatch.chdir(models)
    monkeypatch.setattr(sys, "path", list(sys.path))


def refusal(capsys: pytest.CaptureFixture[str], code: int, *words: str | Path) -> str:
    """The one line that a command leaves on standard error."""
    assert main([str(word) for word in words]) == code
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1
    assert code != 2 or not printed.out
    return lines[0].removeprefix("argrpo: ")


@pytest.mark.usefixtures("in_models")
def test_train_runs_a_config_with_overrides_and_leaves_a_run_folder(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", str(config_file), "--num_steps", "1"]) == 0
    run = tmp_path / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert yaml.safe_load((run / "config.yaml").read_text())["num_steps"] == 1
    text = capsys.readouterr().out
    assert "2 prompts x 2 images = 4 images a step" in text
    assert f"argrpo report {run}" in text
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images_per_prompt", "1"], "images_per_prompt: expected at least 2 images"),
        (["--prompts_per_step", "0"], "prompts_per_step: expected at least 1, got 0"),
        (["--prompts_per_step", "many"], "prompts_per_step: expected int, got many"),
        (["--rollout.top_p", "0"], "rollout.top_p: expected a number in (0, 1], got 0.0"),
        (["--rollout.top_p", "1.5"], "rollout.top_p: expected a number in (0, 1], got 1.5"),
        (["--objective.beta", "-1"], "objective.beta: expected a finite number of at least 0"),
        (["--optimizer.learning_rate.peak", "0"], "optimizer.learning_rate.peak: expected"),
        (["--tokenizer.decode_batch", "0"], "tokenizer.decode_batch: expected at least 1, got 0"),
        (["--rewards"], "rewards: expected a value, got none"),
        (["--rollout.top_q", "1"], "rollout.top_q: expected a known setting, got an unknown one"),
        (["--num_step", "3"], "num_step: expected a known setting, got an unknown one; did you"),
        (["--num_steps"], "num_steps: expected a value, got none"),
        (["--device", "tpu"], "device: expected one of auto, cpu, cuda, got tpu"),
        (["--max_slots", "some"], "max_slots: expected int or null, got some"),
        (["--rewards", "beauty"], "rewards.name: expected one of"),
        (["--rewards", "own:judge"], "rewards.name: cannot load 'own:judge'"),
        (["--data.classes", "3", "10"], "data.classes: expected ids from 0 to 9, got 10"),
        (["--policy.path", "missing.pt"], "policy.path: missing.pt"),
        (["--output.trackers", "wandb"], "output.trackers: expected wandb to be installed"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = refusal(capsys, 2, "train", "--config", config_file, *words)
    assert line.startswith(said)
    assert [path.name for path in config_file.parent.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_stepz: 3", "num_stepz: expected a known setting, got an unknown one; did you mean"),
        ("rollout: {top_q: 1}", "rollout.top_q: expected a known setting"),
        ("rewards: [{name: clip, wieght: 2}]", "rewards.wieght: expected a known setting"),
        ("num_steps: many", "num_steps: expected int, got many"),
        ("rewards: [", "config: expected YAML, got something else"),
        ("num_steps: 3", "rewards: expected a value, got none"),
    ],
)
def test_a_wrong_config_file_is_one_line_that_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert said in refusal(capsys, 2, "train", "--config", path)


def test_a_missing_config_file_is_answered_with_the_presets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refusal(capsys, 2, "train", "--config", "digit.yml")
    assert line.startswith("config: expected a YAML file or one of the presets")
    assert "digits.yaml" in line


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("nowhere.pt", [], "nowhere.pt"),
        ("truncated.pt", [], "truncated.pt"),
        ("code.pt", [], "Popen"),
        ("pickle.pt", [], "pickle.pt: expected a torch or safetensors checkpoint"),
        ("policy.pt", ["--num_heads", "2"], "image_size"),
        ("policy.pt", ["--image_size", "16", "--downsample", "4"], "num_heads"),
        ("policy", ["--image_size", "24"], "image_size: expected 16"),
        ("policy", ["--labels", "1000"], "labels: expected 0 to 9, got 1000"),
        ("policy", ["--labels", "-1"], "labels: expected 0 to 9, got -1"),
        ("policy", ["--top_p", "1.5"], "top_p: expected a number in (0, 1]"),
    ],
)
def test_a_model_that_cannot_be_drawn_from_is_one_line(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    more: list[str],
    said: str,
) -> None:
    words = ["--policy", models / name, "--tokenizer", models / "tokenizer", "--labels", "3"]
    line = refusal(capsys, 2, "sample", *words, "--output_dir", tmp_path / "out", *more)
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_another_run_is_refused_and_stays(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("kept")
    line = refusal(capsys, 2, "train", "--config", config_file)
    assert line.startswith("output_dir: expected a folder without a run")
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [("metrics.jsonl", "kept")]


def test_a_folder_that_cannot_be_written_is_a_wrong_setting(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, 2, "train", "--config", config_file, "--output_dir", "/proc/run")
    assert line.startswith("output_dir: expected a folder that can be written, got /proc/run")


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


def test_the_traceback_of_a_refusal_can_be_asked_for(config_file: Path) -> None:
    with pytest.raises(ValueError, match="num_steps: expected at least 1"):
        main(["--traceback", "train", "--config", str(config_file), "--num_steps", "0"])


def test_ctrl_c_is_a_short_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert refusal(capsys, 130, "doctor") == "stopped by Ctrl-C"


def test_help_of_each_command_says_what_its_settings_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command, words in {
        "train": "Images drawn per condition",
        "sample": "Classifier-free guidance",
        "demo": "or runs/demo-2, ... when taken",
        "moments": "The network that makes features",
        "report": "folder of the run",
        "doctor": "What is installed here",
    }.items():
        assert main([command, "--help"]) == 0
        assert words in " ".join(capsys.readouterr().out.split())


def test_the_help_lists_the_commands_that_stand_and_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("demo", "train", "sample", "moments", "score", "report", "doctor"):
        assert f"\n  {command} " in text
    assert main(["eval"]) == 2


def test_the_exit_codes_of_the_documentation_are_those_of_the_code() -> None:
    named = {name: code for name, code in vars(exit_codes).items() if name.isupper()}
    codes = {*named.values(), 124}
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for code in codes:
        assert f"\n    {code} " in (exit_codes.__doc__ or "")
        assert f"| {code} |" in readme


class _Parsed(Exception):
    """A command has read its words."""


def test_the_commands_of_the_readme_parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def only_parsed(*arguments: object, **options: object) -> None:
        parse_config(*arguments, **options)
        raise _Parsed

    # config_files last: a module that is first imported here must keep the real one.
    for place in ("evaluation_command", "train_command", "config_files"):
        monkeypatch.setattr(f"argrpo.{place}.parse_config", only_parsed)
    text = (Path(__file__).parents[2] / "README.md").read_text().replace("\\\n", "")
    commands = [line.split("#")[0] for line in re.findall(r"\n    argrpo (.*)", text)]
    parsed = [shlex.split(command) for command in commands]
    assert {words[0] for words in parsed} >= {"train", "sample"}
    preset = resources.files("argrpo.configs").joinpath("digits.yaml").read_text(encoding="utf-8")
    (tmp_path / "runs" / "warm").mkdir(parents=True)
    for file in ("my.yaml", "runs/warm/config.yaml"):  # the reader's own
        (tmp_path / file).write_text(preset, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command, *words in parsed:
        with pytest.raises(_Parsed):
            cli._COMMANDS[command].prepare(words)


def test_the_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(doctor, "examine", lambda _, cache_dir: seen.append(cache_dir) or [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["doctor"]) == 0
    assert main(["doctor", "--cache_dir", "elsewhere"]) == 0
    assert seen == [tmp_path / "argrpo", Path("elsewhere")]


def test_the_installed_command_starts_without_loading_torch() -> None:
    code = "import sys, argrpo.cli as c; c.main(['--version']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["argrpo", argrpo.__version__, "False"]
