"""Lists as people type them, presets by name, and a printed config that is a file again."""

import shlex
from pathlib import Path

import pytest

from argrpo.cli import main
from argrpo.config import RewardConfig, TrainConfig
from argrpo.config_files import TEXTS, parse_config, preset_names
from argrpo.sample_config import SampleConfig

MODELS = ["--policy", "p", "--tokenizer", "t"]
LISTS = {"--labels": None, "--prompts": TEXTS}


def sample(*words: str) -> SampleConfig:
    return parse_config(SampleConfig, [*MODELS, *words], command="argrpo sample", lists=LISTS)


def test_words_of_a_list_of_texts_stay_as_they_are() -> None:
    words = ["7", "[a] red, fox", "null", "3.5", "a: b"]
    assert sample("--prompts", *words).prompts == words
    assert sample("--prompts=[a] fox", "--seed", "3").prompts == ["[a] fox"]


def test_words_of_another_list_are_what_they_look_like() -> None:
    assert sample("--labels", "207", "360").labels == [207, 360]
    assert sample("--labels=[207,360]").labels == [207, 360]


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_a_valid_config_by_its_name_alone(preset: str) -> None:
    for name in (preset, preset.removesuffix(".yaml")):
        config = parse_config(TrainConfig, ["--config", name], command="argrpo train", lists={})
        assert config.output_dir.startswith("runs/")


def test_a_file_of_the_users_comes_before_a_preset_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    preset = parse_config(TrainConfig, ["--config", "digits.yaml"], command="", lists={})
    Path("digits.yaml").write_text("output_dir: mine\npolicy: {path: a}\ntokenizer: {path: b}\n")
    words = ["--config", "digits.yaml", "--rewards", "clip", "hpsv2"]
    mine = parse_config(TrainConfig, words, command="", lists={"--rewards": "name"})
    assert (preset.output_dir, mine.output_dir) == ("runs/digits", "mine")
    assert [judge.name for judge in mine.rewards] == ["clip", "hpsv2"]


@pytest.mark.parametrize(
    ("words", "rewards"),
    [
        ("--rewards mine:f", [RewardConfig(name="mine:f")]),
        ("--rewards=mine:f", [RewardConfig(name="mine:f")]),
        ("--rewards a:b c:d", [RewardConfig(name="a:b"), RewardConfig(name="c:d")]),
        ("--rewards a:b c:d e:f", [RewardConfig(name=name) for name in ("a:b", "c:d", "e:f")]),
        ('--rewards \'[{"name": "a:b", "weight": 2}]\'', [RewardConfig(name="a:b", weight=2.0)]),
    ],
)
def test_judges_of_a_flag_take_nothing_from_those_of_the_file(
    words: str, rewards: list[RewardConfig]
) -> None:
    lists = {"--rewards": "name", "--monitors": "name"}
    for flag, preset in (("rewards", "argrpo_c2i_xl_384"), ("monitors", "digits")):
        asked = shlex.split(f"--config {preset} {words.replace('--rewards', f'--{flag}')}")
        assert getattr(parse_config(TrainConfig, asked, command="", lists=lists), flag) == rewards


def test_print_config_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "digits", "--seed", "9", "--print_config"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    printed = parse_config(TrainConfig, ["--config", str(path)], command="", lists={})
    asked = parse_config(TrainConfig, ["--config", "digits", "--seed", "9"], command="", lists={})
    assert printed == asked
