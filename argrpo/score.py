"""`argrpo score`: what judges say of a folder of images.

Leaves scores.csv (a line an image; empty: not scored), scores.json (the same, and what each judge
came to: statistics, seconds, failures, on a GPU the memory in use at once) and histograms.png.

Shapes: N images, R judges.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from argrpo.advantages import combine_rewards
from argrpo.data import Prompt
from argrpo.devices import choose_device
from argrpo.image_folder import (
    Picture,
    list_images,
    read_batches,
    with_prompts,
    with_references,
)
from argrpo.progress import Report, unreported
from argrpo.reward_config import RewardConfig
from argrpo.rewards.background_loop import BackgroundLoop
from argrpo.rewards.failure_watch import JudgesUnavailableError
from argrpo.rewards.lanes import Judge, Outcome
from argrpo.rewards.pool import Asking, Scoring
from argrpo.rewards.protocols import Answer, Applying, DistributionReward
from argrpo.rewards.registry import make_reward
from argrpo.rewards.sharing import SharedNetworks
from argrpo.run_folder import RunFolder, write_atomically

_DEFAULT_FOLDER = "scores"
_BINS = 40
_COLUMNS = 3  # histograms side by side


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score a folder of images."""

    rewards: list[RewardConfig]
    """Judges, as --rewards clip hpsv2; with weights and options in a YAML file."""

    images: str
    """Folder of PNG, JPEG, WebP or BMP files; they are taken in the order of their names."""

    prompts: str | None = None
    """A text file with a prompt a line, in the order of the images, each for as many in a row as
    come on a line; or .json, an object from file names to prompts. None: for judges that read
    none."""

    references: str | None = None
    """Folder of pictures of the same names, whatever their suffixes, for judges that compare (mse,
    lpips, iqa:NAME of that kind); brought to the size of the images."""

    output_dir: str | None = None
    """Folder of the results; None: scores, or scores-2, ... when taken."""

    batch: int = 64
    """Images in memory at a time; judges have their own reward_batch below it."""

    deadline_s: float = 600.0
    """Seconds that judges behind a server have for a batch."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""

    cache_dir: str | None = None
    """Where the embedded digits models are kept."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("rewards: expected at least one judge, got none")
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: expected a weight that is not 0, got none")
        if self.batch < 1:
            raise ValueError(f"batch: expected at least 1, got {self.batch}")
        if not 0 < self.deadline_s < math.inf:
            raise ValueError(f"deadline_s: expected a finite number above 0, got {self.deadline_s}")


@dataclass(frozen=True, slots=True, eq=False)
class ImageScores:
    """What judges said of all images of a folder."""

    pictures: list[Picture]
    folder: Path  # of the pictures
    names: list[str]  # of the judges
    values: Tensor  # [N, R] fp32, NaN = not scored
    rewards: Tensor  # [N] fp32, the weighted sum of an image's scores, NaN without one of them
    outcomes: list[Outcome]


def prepare_scoring(config: ScoreConfig) -> Callable[[Report], Path]:
    """Check all that can be checked, load the judges, and give back what does the work.

    Raises:
        ValueError: a judge, an option, or prompts that do not fit the images, named.
        FileNotFoundError, NotADirectoryError: a path is not there.
    """
    folder = Path(config.images).expanduser()
    prompts = None if config.prompts is None else Path(config.prompts).expanduser()
    pictures = with_prompts(list_images(folder), folder, prompts)
    if config.references is not None:
        pictures = with_references(pictures, folder, Path(config.references).expanduser())
    device, shared = choose_device(config.device), SharedNetworks()
    judges = [make_reward(reward, device, config.cache_dir, shared) for reward in config.rewards]
    _check_judges(judges, [picture.prompt for picture in pictures])
    weights = torch.tensor([reward.weight for reward in config.rewards])
    output = _folder(config.output_dir)

    def run(report: Report = unreported) -> Path:
        try:
            outcomes = _ask(judges, pictures, device, config, report)
            values = torch.stack([outcome.answer.scores for outcome in outcomes], dim=1)
            names, total = [judge.name for judge in judges], combine_rewards(values, weights)
            scores = ImageScores(pictures, folder, names, values, total, outcomes)
            write_scores(scores, output.path)
        except BaseException:
            output.discard_if_empty()
            raise
        _check_answers(outcomes, output.path)
        return output.path

    return run


def write_scores(scores: ImageScores, output: Path) -> None:
    """scores.csv, scores.json and histograms.png.

    Raises:
        StorageError: the disk is full or refused.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["file", "prompt", *scores.names, "reward"])
    records = []
    columns = torch.cat([scores.values, scores.rewards[:, None]], dim=1)
    for picture, row in zip(scores.pictures, columns.tolist(), strict=True):
        name = picture.path.relative_to(scores.folder).as_posix()
        numbers = [value if math.isfinite(value) else None for value in row]
        writer.writerow([name, picture.prompt.text, *numbers])
        found = dict(zip([*scores.names, "reward"], numbers, strict=True))
        records.append({"file": name, "prompt": picture.prompt.text, **found})
    content = {"judges": _summaries(scores), "images": records}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(
        output / "scores.csv",
        lambda part: part.write_text(table.getvalue(), encoding="utf-8", newline=""),
    )
    write_atomically(output / "scores.json", lambda part: part.write_text(text, encoding="utf-8"))
    write_atomically(output / "histograms.png", lambda part: _draw_histograms(scores, part))


def _folder(wanted: str | None) -> RunFolder:
    if wanted is None:
        return RunFolder.numbered(_DEFAULT_FOLDER)
    folder = RunFolder.create(wanted)
    if (folder.path / "scores.csv").exists():
        raise ValueError(
            f"output_dir: expected a folder without scores, got {folder.path}, which holds some; "
            "choose another, or remove it"
        )
    return folder


def _ask(
    judges: list[Judge],
    pictures: list[Picture],
    device: torch.device,
    config: ScoreConfig,
    report: Report,
) -> list[Outcome]:
    """What each judge said of all images."""
    asking = Asking(BackgroundLoop(), config.deadline_s)
    parts: list[list[Outcome]] = []
    try:
        for start, images in read_batches(pictures, config.batch):
            stop = start + len(images)
            prompts = [picture.prompt for picture in pictures[start:stop]]
            scoring = Scoring(judges, prompts, asking)
            scoring.add(images.to(device))
            parts.append(scoring.finish())
            report("scores", stop, len(pictures))
    finally:
        asking.close(judges)
    return [_joined(found) for found in zip(*parts, strict=True)]


def _joined(parts: Sequence[Outcome]) -> Outcome:
    """What one judge said of consecutive batches."""
    peaks = [part.peak_bytes for part in parts if part.peak_bytes is not None]
    return Outcome(
        parts[0].name,
        Answer.joined([part.answer for part in parts]),
        sum(part.seconds for part in parts),
        max(part.batch for part in parts),
        max(peaks, default=None),
    )


def _check_judges(judges: list[Judge], prompts: list[Prompt]) -> None:
    for judge in judges:
        if isinstance(judge, Applying) and not any(judge.applies(prompts)):
            raise ValueError(
                f"references: expected a folder of pictures for {judge.name}, which compares with "
                "them, got none"
            )
        if isinstance(judge, DistributionReward):
            raise ValueError(
                f"rewards: expected judges that score images one by one, got {judge.name}"
            )
    names = [judge.name for judge in judges]
    if len({*names, "reward", "file", "prompt"}) < len(names) + 3:
        raise ValueError(
            "rewards: expected each judge to have a column of its own beside file, prompt and "
            f"reward, got {', '.join(names)}; give one the option name, or take it out"
        )


def _check_answers(outcomes: list[Outcome], output: Path) -> None:
    for outcome in outcomes:
        count = len(outcome.answer.scores)
        if outcome.answer.num_failures == count:
            raise JudgesUnavailableError(
                f"rewards.{outcome.name}: expected scores, got none for {count} images "
                f"({outcome.answer.problem}); what there is was saved in {output}"
            )


def _summaries(scores: ImageScores) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for outcome, column in zip(scores.outcomes, scores.values.unbind(1), strict=True):
        scored = column[column.isfinite()].double()
        numbers = {
            "mean": scored.mean().item(),
            "std": scored.std().item() if len(scored) > 1 else 0.0,
            "min": scored.min().item() if len(scored) else math.nan,
            "max": scored.max().item() if len(scored) else math.nan,
        }
        found[outcome.name] = {
            **{k: v if math.isfinite(v) else None for k, v in numbers.items()},
            "scored": len(scored),
            **outcome.metrics(),
            "problem": outcome.answer.problem,
        }
    return found


def _draw_histograms(scores: ImageScores, path: Path) -> None:
    """One a judge. matplotlib without its state machine, which would look for a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    count = len(scores.names)
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.0 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, column) in enumerate(zip(scores.names, scores.values.unbind(1), strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        scored = column[column.isfinite()].numpy()
        axes.set_title(f"{name}: {len(scored)} of {len(column)} images", fontsize=10)
        if len(scored):
            # Bins of 64 bits: scores that differ in their last of 32 leave no room for 40 of those.
            axes.hist(scored.astype("float64"), bins=_BINS)
            axes.axvline(scored.mean(), linestyle="--", color="black", linewidth=1)
        # Few, because small scores have long labels; and images come whole.
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("score, dashed: mean")
        axes.set_ylabel("images")
    figure.savefig(path, dpi=120)
