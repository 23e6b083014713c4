"""The command line: wrong input is one line that names it, and the exit code says whose fault."""

import re
import shlex
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml
from command_line import refusal, write_config, write_models

import argrpo
from argrpo import cli, doctor
from argrpo.cli import main
from argrpo.config_files import parse_config


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
        ("policy.pt", ["--image_size", "16", "--num_heads", "0"], "num_heads: expected a divisor"),
        (
            "policy.pt",
            ["--num_heads", "2", "--image_size", "16", "--downsample", "0"],
            "downsample",
        ),
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


def test_the_traceback_of_a_refusal_can_be_asked_for(config_file: Path) -> None:
    with pytest.raises(ValueError, match="num_steps: expected at least 1"):
        main(["--traceback", "train", "--config", str(config_file), "--num_steps", "0"])


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
