"""`argrpo demo`: from nothing to a tuned policy, on the embedded digits, by the ordinary trainer.

What it claims at the end is measured by a judge that was never the reward, on fresh samples of
both policies at the same guidance and seeds.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from argrpo.config import TrainConfig, describe
from argrpo.config_files import parse_config
from argrpo.demo_tasks import PRESETS, DemoTask, TaskName, make_task
from argrpo.digits.dataset import NUM_CLASSES
from argrpo.digits.evaluation import DigitsScores
from argrpo.embedded_models import prepare_digits
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.image_files import save_grid
from argrpo.models.loading import load_policy, load_tokenizer
from argrpo.models.vq import VQTokenizer
from argrpo.report import write_report
from argrpo.run_folder import RunFolder, write_atomically
from argrpo.trackers import make_trackers
from argrpo.trainer import Trainer

_DEFAULT_FOLDER = "runs/demo"
_SHOWN = 5 * NUM_CLASSES  # images before and after: five of each digit
_SLOTS = 250  # images drawn at a time when measuring
_SEED_OFFSET = 1_000_000  # away from the seeds of the run's own sample grids
_LEAST_RECALL = 0.5  # of a class's recall, what GRPO has to leave for it not to be called lost


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train the embedded digits task from nothing, measure what came of it, and report."""

    task: TaskName = "classes"
    """What the policy reads: the class of a digit, or a caption, with its place and tilt, too."""

    output_dir: str | None = None
    """Folder of the run; None: runs/demo, or runs/demo-2, ... when taken."""

    cache_dir: str | None = None
    """Where the embedded models are kept once trained; None: argrpo under the cache folder."""

    seed: int = 0
    """Of the training run."""

    num_steps: int | None = None
    """Rollout iterations; None takes the preset's."""

    num_evaluation_images: int = 1000
    """Fresh samples of each policy that are measured; a multiple of 10 shows all digits alike."""

    def __post_init__(self) -> None:
        if self.num_evaluation_images < _SHOWN:
            raise ValueError(
                f"num_evaluation_images: expected at least {_SHOWN}, "
                f"got {self.num_evaluation_images}"
            )


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo left and measured."""

    folder: RunFolder
    policy_path: Path  # the tuned policy, for load_policy
    base: DigitsScores
    tuned: DigitsScores

    @property
    def lowest_recall_ratio(self) -> float:
        """Tuned over base recall, of the digit that lost most."""
        pairs = zip(self.tuned.per_class_recall, self.base.per_class_recall, strict=True)
        return min((tuned / base for tuned, base in pairs if base > 0), default=1.0)


def run_demo(config: DemoConfig, console: Console) -> DemoResult:
    """The whole demo.

    Raises:
        ValueError: the output folder holds another run or cannot be written.
        StorageError: the disk is full or refused.
    """
    started = time.monotonic()
    # First, so that a taken folder is known before minutes go into the models.
    if config.output_dir is None:
        folder = RunFolder.numbered(_DEFAULT_FOLDER)
    else:
        folder = RunFolder.create(config.output_dir)
    try:
        assets = prepare_digits(config.cache_dir, console, with_captions=config.task == "text")
    except BaseException:
        folder.discard_if_empty()
        raise
    training = _train_config(config, folder)
    for line in describe(training):
        console.print(line, highlight=False, soft_wrap=True)
    trained = Trainer(training, make_trackers(training, progress=True)).train()
    console.print("measuring base and tuned policy", highlight=False)
    task = make_task(config.task, assets, training)
    tokenizer = load_tokenizer(assets.tokenizer_path)
    base, before = _measure(task.policy_path, tokenizer, task, training, config)
    tuned, after = _measure(trained.policy_path, tokenizer, task, training, config)
    result = DemoResult(folder, trained.policy_path, base, tuned)
    save_grid(before, folder.path / "before.png", columns=NUM_CLASSES)
    save_grid(after, folder.path / "after.png", columns=NUM_CLASSES)
    _write_scores(result, training, config)
    report = write_report(folder.path)
    _tell(result, task, console)
    _tell_where(result, task, report, time.monotonic() - started, console)
    return result


def _train_config(config: DemoConfig, folder: RunFolder) -> TrainConfig:
    words = [
        "--config",
        PRESETS[config.task],
        "--output_dir",
        str(folder.path),
        "--seed",
        str(config.seed),
    ]
    if config.cache_dir is not None:
        words += ["--cache_dir", config.cache_dir]
    if config.num_steps is not None:
        words += ["--num_steps", str(config.num_steps)]
    return parse_config(TrainConfig, words, command="argrpo train", lists={})


def _measure(
    policy_path: Path,
    tokenizer: VQTokenizer,
    task: DemoTask,
    training: TrainConfig,
    config: DemoConfig,
) -> tuple[DigitsScores, Tensor]:
    """Scores of a policy on fresh samples, and the first samples, five of each digit."""
    count = config.num_evaluation_images
    engine = RolloutEngine(load_policy(policy_path), max_slots=min(_SLOTS, count))
    seed = config.seed + _SEED_OFFSET
    rollout = engine.draw(task.conditions(count), training.rollout, seed=seed)
    images = tokenizer.decode(rollout.token_ids, decode_batch=training.tokenizer.decode_batch)
    return task.scores(images), images[:_SHOWN]


def _write_scores(result: DemoResult, training: TrainConfig, config: DemoConfig) -> None:
    count, scale = config.num_evaluation_images, training.rollout.guidance_scale
    record = {
        "note": (
            f"{count:,} fresh samples of each policy at guidance {scale:g} and the same seeds. "
            "The held-out judge, which was never a reward, says what a sample shows; precision, "
            "recall and the Frechet distance compare samples with real digits in its features."
        ),
        "num_images": count,
        "seed": config.seed + _SEED_OFFSET,
        "lowest_recall_ratio": result.lowest_recall_ratio,
        "base": asdict(result.base),
        "tuned": asdict(result.tuned),
    }
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(result.folder.evaluation_path, lambda part: part.write_text(text))


def _tell(result: DemoResult, task: DemoTask, console: Console) -> None:
    table = Table(title="held-out judge, fresh samples", title_justify="left")
    for column in ("", "base", "tuned"):
        table.add_column(column, justify="left" if not column else "right")
    for name in task.measures:
        base, tuned = getattr(result.base, name), getattr(result.tuned, name)
        table.add_row(name, f"{base:.3f}", f"{tuned:.3f}")
    recalls = zip(result.base.per_class_recall, result.tuned.per_class_recall, strict=True)
    for digit, (base, tuned) in enumerate(recalls):
        table.add_row(f"  recall of {digit}", f"{base:.3f}", f"{tuned:.3f}")
    console.print(table)
    if result.lowest_recall_ratio < _LEAST_RECALL:
        console.print(
            f"one digit kept only {result.lowest_recall_ratio:.0%} of its recall: the policy gave "
            "up variety for reward",
            style="yellow",
        )


def _tell_where(
    result: DemoResult, task: DemoTask, report: Path, seconds: float, console: Console
) -> None:
    for line in (
        f"done in {seconds / 60:.1f} minutes",
        f"look at   {report}",
        f"          {result.folder.path / 'before.png'}, after.png",
        f"go on     argrpo sample --policy {result.policy_path} --tokenizer digits:tokenizer "
        f"{task.sample_flags} --guidance_scale 2",
    ):
        console.print(line, highlight=False, soft_wrap=True)
