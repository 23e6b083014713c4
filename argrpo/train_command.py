"""`argrpo train`: from words to a run, and what is said before and after it."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from argrpo.config import TrainConfig, describe
from argrpo.config_files import parse_config
from argrpo.ranks import num_ranks
from argrpo.run_folder import RunFolder
from argrpo.step_split import describe_split
from argrpo.trainer import Trainer, TrainResult

_LISTS = {
    "--rewards": "name",
    "--monitors": "name",
    "--data.classes": None,
    "--output.trackers": None,
    "--eval.judges": "name",
    "--eval.guidance_scales": None,
}
_RESUME = "--resume"


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """A run from the command line behind `argrpo train`.

    A bare --resume means auto. --resume with the folder of a run and no --config takes the settings
    and the folder of that run.

    Raises:
        ValueError, FileNotFoundError, SystemExit: as `parse_config`.
    """
    words = _with_run_of(_with_auto(arguments))
    return parse_config(TrainConfig, words, command="argrpo train", lists=_LISTS)


def said_before(trainer: Trainer, config: TrainConfig) -> list[str]:
    """What follows from the settings, in words."""
    ranks = describe_split(config, num_ranks())
    return [*describe(config), *ranks, trainer.engine.describe(), *trainer.describe_memory()]


def said_after(trainer: Trainer, config: TrainConfig, result: TrainResult) -> list[str]:
    """What the run left, and what to do next."""
    lines = [f"tuned policy: {result.policy_path}"]
    if trainer.profile.trace_path is not None:
        lines.append(f"trace: {trainer.profile.trace_path}")
    if result.best_path is not None:
        lines.append(f"best by {config.eval.best_metric}: {result.best_path}")
    return [*lines, f"next: argrpo report {config.output_dir}"]


def _with_auto(arguments: Sequence[str]) -> list[str]:
    words: list[str] = []
    for place, word in enumerate(arguments):
        words.append(word)
        if word == _RESUME and (
            place + 1 == len(arguments) or arguments[place + 1].startswith("--")
        ):
            words.append("auto")
    return words


def _with_run_of(words: list[str]) -> list[str]:
    """Settings and folder of the run that --resume names, before all other words."""
    if any(word.partition("=")[0] == "--config" for word in words):
        return words
    named = [word.partition("=")[2] for word in words if word.startswith(f"{_RESUME}=")]
    named += [after for word, after in itertools.pairwise(words) if word == _RESUME]
    for name in named:
        folder = RunFolder(Path(name).expanduser())
        if folder.config_path.is_file():
            own = ["--config", str(folder.config_path), "--output_dir", str(folder.path)]
            return [*own, *words]
    return words
