"""What the terminal shows while a run goes: a bar, the numbers that matter, where the time goes."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from argrpo.config import TrainConfig
from argrpo.run_folder import RunFolder
from argrpo.step_clock import PHASES

Report = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it, and how much that is in all."""

_PLAIN_LINES = 20  # lines of a whole run where nobody watches a bar


def unreported(stage: str, done: int, total: int) -> None:
    """Show nothing."""


class ProgressTracker:
    """A bar on a terminal; elsewhere, as in a log file, one plain line every few steps.

    Args:
        console: where to show; None is standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._num_steps = 0
        self._latest: dict[str, float] = {}
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("step"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("steps", total=None)

    def start(self, config: TrainConfig, folder: RunFolder, logged: int | None = None) -> None:
        self._num_steps = config.num_steps
        self._bar.update(self._task, total=config.num_steps, completed=logged or 0)
        if self._console.is_terminal:
            self._live = Live(self._screen(), console=self._console, refresh_per_second=4)
            self._live.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # Kept over steps, because monitors judge only every few of them.
        self._latest |= metrics
        self._bar.update(self._task, completed=step)
        if self._live is not None:
            self._live.update(self._screen())
        elif self._is_told(step):
            self._console.print(self._plain_line(step), soft_wrap=True, highlight=False)

    def image(self, step: int, name: str, path: Path) -> None:
        """A terminal shows no pictures."""

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _is_told(self, step: int) -> bool:
        every = max(1, self._num_steps // _PLAIN_LINES)
        return step % every == 0 or step in (1, self._num_steps)

    def _plain_line(self, step: int) -> str:
        numbers = "  ".join(f"{name} {value}" for name, value in headline(self._latest))
        return f"step {step}/{self._num_steps}  {numbers}  {_phases_in_words(self._latest)}"

    def _screen(self) -> Group:
        if not self._latest:
            return Group(self._bar)
        numbers = Table.grid(padding=(0, 3))
        numbers.add_row(*(Text(name, style="dim") for name, _ in headline(self._latest)))
        numbers.add_row(*(Text(value, style="bold") for _, value in headline(self._latest)))
        return Group(self._bar, numbers, Text(_phases_in_words(self._latest), style="dim"))


def headline(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """The few metrics that a person follows, named and formatted, as far as they are there."""
    shown = {"reward": "reward"}
    for key in metrics:
        if key.startswith("monitors/") and key.endswith("/mean"):
            shown[key] = key.removeprefix("monitors/").removesuffix("/mean")
        elif key == "eval/frechet" or re.fullmatch(r"eval/[^/]+/win_rate", key):
            shown[key] = key.removeprefix("eval/").replace("/win_rate", " wins")
    shown |= {"kl": "kl", "entropy/draw": "entropy", "learning_rate": "lr"}
    return [(label, f"{metrics[key]:.4g}") for key, label in shown.items() if key in metrics]


def _phases_in_words(metrics: dict[str, float]) -> str:
    """`1.31 s a step: rollout 0.62 s, decode 0.08 s, ...  97.7 images/s`."""
    if "step_time" not in metrics:
        return ""
    parts = [
        f"{phase} {metrics[f'time/{phase}']:.2f} s"
        for phase in PHASES
        if f"time/{phase}" in metrics
    ]
    words = f"{metrics['step_time']:.2f} s a step: {', '.join(parts)}"
    if "images_per_second" in metrics:
        words += f"  {metrics['images_per_second']:.3g} images/s"
    return words


@contextmanager
def stage_progress(console: Console) -> Iterator[Report]:
    """Shows stages, one bar or plain line each.

    Nothing is shown before the first call.
    """
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
            if console.is_terminal:
                bars.start()
            else:
                console.print(f"{stage}: {total} to do", highlight=False)
        bars.update(tasks[stage], completed=done)

    try:
        yield show
    finally:
        if tasks and console.is_terminal:
            bars.stop()
