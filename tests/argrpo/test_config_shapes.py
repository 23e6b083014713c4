"""What a YAML file may hold in place of a config: one line says where it is none."""

from pathlib import Path

import pytest

from argrpo.config import TrainConfig
from argrpo.config_files import parse_config

RUN = "output_dir: o\npolicy: {path: p}\ntokenizer: {path: t}\nrewards: [{name: clip}]\n"


def train(*words: str | Path) -> TrainConfig:
    return parse_config(TrainConfig, [str(w) for w in words], command="argrpo train", lists={})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"config: expected a mapping of settings in \S+, got an empty file"),
        ("- 1\n- 2\n", r"config: expected a mapping of settings in \S+, got \[1, 2\]"),
        ("policy: small.pt", "policy: expected its settings, as {path: ...}, got small.pt"),
        ("optimizer: {learning_rate: 3}", "optimizer.learning_rate: expected its settings, as {pe"),
        ("rewards: [clip]", "rewards: expected its settings, as {name: ...}, got clip"),
        ("objective: {beta: .nan}", "objective.beta: expected a finite number of at least 0, got"),
        (b"\xff\xfe", r"config: expected YAML in UTF-8, got something else at byte 0 of \S+"),
    ],
)
def test_a_file_of_another_shape_is_refused_where_it_differs(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    path, run = tmp_path / "wrong.yaml", tmp_path / "run.yaml"
    run.write_text(RUN)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"^{said}"):
        train("--config", run, "--config", path)


def test_a_weights_file_in_place_of_settings_is_told_which_setting_was_meant(
    tmp_path: Path,
) -> None:
    run, weights = tmp_path / "run.yaml", tmp_path / "small.pt"
    run.write_text(RUN)
    weights.write_bytes(b"PK\x03\x04\x80")
    for words in (["--policy", str(weights)], [f"--policy={weights}"]):
        with pytest.raises(ValueError, match=r"^policy: expected .* as --policy\.path, got "):
            train("--config", run, *words)


def test_settings_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    run, policy = tmp_path / "run.yaml", tmp_path / "policy.yaml"
    policy.write_text("{path: q, image_size: 64}")
    run.write_text(RUN)
    assert train("--config", run, "--policy", policy).policy.image_size == 64
    run.write_text(RUN.replace("{path: p}", str(policy)))
    assert train("--config", run).policy.path == "q"
