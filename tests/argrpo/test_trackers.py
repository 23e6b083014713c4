"""Trackers write what they are told, whole lines only, and load their packages only when asked."""

import io
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console

from argrpo.config import (
    OutputConfig,
    PolicyConfig,
    RewardConfig,
    TokenizerConfig,
    TrainConfig,
)
from argrpo.image_files import save_grid
from argrpo.progress import ProgressTracker, headline, stage_progress
from argrpo.run_folder import RunFolder, StorageError
from argrpo.trackers import (
    JsonLinesTracker,
    TensorBoardTracker,
    Tracker,
    TrackioTracker,
    WandbTracker,
    make_trackers,
)

METRICS = {
    "reward": 0.75,
    "kl": 0.0125,
    "learning_rate": 1e-4,
    "entropy/draw": 1.5,
    "step_time": 2.0,
    "time/rollout": 1.0,
    "time/decode": 0.25,
    "time/reward": 0.05,
    "time/logprob": 0.2,
    "time/update": 0.5,
    "images_per_second": 64.0,
}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=str(tmp_path / "run"),
        policy=PolicyConfig(path="policy.pt"),
        tokenizer=TokenizerConfig(path="vq.pt"),
        rewards=[RewardConfig(name="clip")],
        num_steps=40,
    )


@pytest.fixture
def folder(config: TrainConfig) -> RunFolder:
    return RunFolder.create(config.output_dir)


def rows(folder: RunFolder) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]


def test_each_step_is_a_line_that_is_there_before_the_next_one(
    config: TrainConfig, folder: RunFolder
) -> None:
    tracker = JsonLinesTracker()
    tracker.start(config, folder)
    for step in (1, 2):
        tracker.log(step, METRICS)
        assert rows(folder)[-1] == {"step": step, **METRICS}
    tracker.close()
    assert len(rows(folder)) == 2


def test_a_number_that_is_not_finite_is_null_and_no_broken_json(
    config: TrainConfig, folder: RunFolder
) -> None:
    tracker = JsonLinesTracker()
    tracker.start(config, folder)
    tracker.log(1, {"loss": float("nan"), "kl": float("inf"), "reward": 1.0})
    tracker.close()
    assert rows(folder) == [{"step": 1, "loss": None, "kl": None, "reward": 1.0}]


def test_evaluations_stand_apart_and_the_one_before_training_only_there(
    config: TrainConfig, folder: RunFolder
) -> None:
    folder.path.mkdir(exist_ok=True)
    folder.evaluations_path.write_text("of a run that failed before its first step")
    tracker = JsonLinesTracker()
    tracker.start(config, folder)
    tracker.log(0, {"eval/frechet": 3.0})
    assert not folder.holds_run
    tracker.log(1, {"reward": 0.5})
    tracker.log(2, {"reward": 0.5, "eval/frechet": float("nan")})
    tracker.close()
    lines = folder.evaluations_path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "eval/frechet": 3.0},
        {"step": 2, "eval/frechet": None},
    ]
    assert rows(folder) == [
        {"step": 1, "reward": 0.5},
        {"step": 2, "reward": 0.5, "eval/frechet": None},
    ]


def test_a_full_disk_leaves_whole_lines_only(
    config: TrainConfig,
    folder: RunFolder,
    files_up_to: Callable[[int], AbstractContextManager[None]],
) -> None:
    tracker = JsonLinesTracker()
    tracker.start(config, folder)
    tracker.log(1, METRICS)
    size = folder.metrics_path.stat().st_size
    with files_up_to(size + 20), pytest.raises(StorageError, match=r"metrics\.jsonl: expected"):
        tracker.log(2, METRICS)
    tracker.close()
    assert rows(folder) == [{"step": 1, **METRICS}]


def test_a_run_folder_says_with_what_the_run_was_made(
    config: TrainConfig, folder: RunFolder
) -> None:
    tracker = JsonLinesTracker()
    tracker.start(config, folder)
    assert not folder.holds_run
    tracker.log(1, {"reward": 0.5})
    tracker.close()
    facts = json.loads(folder.environment_path.read_text())
    assert facts["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "cpu", "gpu", "commit"} <= set(facts)
    assert "images_per_prompt: 8" in folder.config_path.read_text()
    assert folder.holds_run


def test_tensorboard_has_the_scalars_and_the_picture(
    config: TrainConfig, folder: RunFolder
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save_grid(torch.rand(2, 3, 8, 8), folder.samples(0))
    tracker = TensorBoardTracker()
    tracker.start(config, folder)
    tracker.image(0, "samples", folder.samples(0))
    for step in (1, 2):
        tracker.log(step, {"reward": step / 4})
    tracker.close()
    events = EventAccumulator(str(folder.path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [
        (1, 0.25),
        (2, 0.5),
    ]
    assert [event.step for event in events.Images("samples")] == [0]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_makes_again(
    config: TrainConfig, folder: RunFolder
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for logged, steps, value in ((None, (1, 2, 3), 0.25), (1, (2,), 0.5)):
        tracker = TensorBoardTracker()
        tracker.start(config, folder, logged)
        for step in steps:
            tracker.log(step, {"reward": value})
        tracker.close()
    events = EventAccumulator(str(folder.path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("reward")]
    assert found == [(1, 0.25), (2, 0.5)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    asked = replace(config, output=OutputConfig(trackers=[name]))
    with pytest.raises(ValueError, match=rf"output\.trackers: expected {name} .*argrpo\[track\]"):
        make_trackers(asked, progress=False)


class Recorder(ModuleType):
    """Stands for wandb or trackio: remembers the calls that both packages document."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, object]] = []

    def init(
        self,
        *,
        project: str,
        name: str,
        config: dict,
        resume: str | None,
        dir: str = "",
        id: str | None = None,
    ) -> SimpleNamespace:
        self.calls.append(("init", (project, name, config["images_per_prompt"])))
        self.resumed = (id, resume)
        return SimpleNamespace(id="abc")

    def log(self, metrics: dict, step: int) -> None:
        self.calls.append(("log", (metrics, step)))

    def Image(self, path: str) -> str:
        return f"image of {path}"

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize(("name", "kind"), [("wandb", WandbTracker), ("trackio", TrackioTracker)])
def test_a_dashboard_is_told_the_config_each_step_and_the_pictures(
    config: TrainConfig,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: Callable[[], Tracker],
) -> None:
    dashboard = Recorder(name)
    monkeypatch.setitem(sys.modules, name, dashboard)
    tracker = kind()
    assert dashboard.calls == []
    tracker.start(config, folder)
    tracker.log(1, {"reward": 0.5})
    tracker.image(1, "samples", folder.samples(1))
    tracker.close()
    assert dashboard.calls == [
        ("init", ("argrpo", "run", 8)),
        ("log", ({"reward": 0.5}, 1)),
        ("log", ({"samples": f"image of {folder.samples(1)}"}, 1)),
        ("finish", None),
    ]


@pytest.mark.parametrize(("name", "kind"), [("wandb", WandbTracker), ("trackio", TrackioTracker)])
def test_a_dashboard_goes_on_with_the_run_that_it_knows(
    config: TrainConfig,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: Callable[[], Tracker],
) -> None:
    dashboard = Recorder(name)
    monkeypatch.setitem(sys.modules, name, dashboard)
    fresh = {"wandb": (None, None), "trackio": (None, "never")}
    kind().start(config, folder)
    assert dashboard.resumed == fresh[name]
    kind().start(config, folder, 5)
    assert dashboard.resumed == ("abc" if name == "wandb" else None, "allow")


def test_the_files_come_first_and_progress_only_when_asked(config: TrainConfig) -> None:
    quiet = [type(tracker) for tracker in make_trackers(config, progress=False)]
    assert quiet == [JsonLinesTracker, TensorBoardTracker]
    shown = [type(tracker) for tracker in make_trackers(config, progress=True)]
    assert shown == [*quiet, ProgressTracker]


def test_no_dashboard_is_loaded_unless_a_config_names_it(config: TrainConfig) -> None:
    make_trackers(config, progress=False)
    assert "wandb" not in sys.modules
    assert "trackio" not in sys.modules


def shown_on(config: TrainConfig, folder: RunFolder, *, is_terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=160)
    tracker = ProgressTracker(console)
    tracker.start(config, folder)
    tracker.log(1, {**METRICS, "monitors/heldout/mean": 0.5})
    for step in range(2, config.num_steps + 1):
        tracker.log(step, METRICS)
    tracker.close()
    return stream.getvalue()


def test_a_log_file_gets_few_plain_lines_with_the_time_of_each_phase(
    config: TrainConfig, folder: RunFolder
) -> None:
    text = shown_on(config, folder, is_terminal=False)
    lines = text.splitlines()
    assert len(lines) == 21  # the first step, and 20 over the run
    # The held-out judge's score is the first step's: it judges only every few of them.
    numbers = "reward 0.75  heldout 0.5  kl 0.0125  entropy 1.5  lr 0.0001"
    assert lines[-1].startswith(f"step 40/40  {numbers}")
    for phase in ("rollout 1.00 s", "decode 0.25 s", "reward 0.05 s", "logprob 0.20 s"):
        assert phase in lines[-1]
    assert "2.00 s a step" in lines[-1]
    assert "update 0.50 s" in lines[-1]
    assert "\x1b" not in text


def test_a_terminal_gets_a_bar_with_the_same_numbers(
    config: TrainConfig, folder: RunFolder
) -> None:
    text = shown_on(config, folder, is_terminal=True)
    assert "40/40" in text
    assert "0.0125" in text
    assert "rollout 1.00 s" in text
    assert "\x1b" in text


def test_stages_of_a_preparation_are_named_once_in_a_log_file() -> None:
    stream = io.StringIO()
    with stage_progress(Console(file=stream, width=80)) as show:
        for done in range(1, 4):
            show("tokenizer", done, 3)
        show("base policy", 1, 2)
    assert stream.getvalue().splitlines() == ["tokenizer: 3 to do", "base policy: 2 to do"]


def test_a_preparation_with_nothing_to_do_shows_nothing() -> None:
    stream = io.StringIO()
    with stage_progress(Console(file=stream, force_terminal=True)):
        pass
    assert stream.getvalue() == ""


def test_a_person_sees_how_evaluations_go_with_the_guidance_of_the_first_scale() -> None:
    metrics = {
        "eval/judge/mean": 1.0,
        "eval/judge/win_rate": 0.75,
        "eval/guidance_1/judge/win_rate": 0.5,
        "eval/frechet": 20.0,
        "eval/guidance_1/frechet": 30.0,
    }
    assert headline(metrics) == [("judge wins", "0.75"), ("frechet", "20")]
