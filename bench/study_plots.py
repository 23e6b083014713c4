"""The pictures of the learning study, from its rows: PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from result_rows import Row
from study_arms import ARMS, GUIDANCE
from study_claims import WINDOW, by_arm, frontier_rows, score
from study_tables import frontier_name

_COLOURS = dict(
    zip(ARMS, ("#666666", "#1f77b4", "#d62728", "#9467bd", "#2ca02c", "#8c564b"), strict=True)
)


def draw_plots(rows: Sequence[Row], folder: Path) -> None:
    """Write frontier.png, curves.png and guidance.png into a folder."""
    arms = by_arm(rows)
    _frontier(arms, frontier_rows(rows)).savefig(folder / "frontier.png", dpi=110)
    _curves(arms).savefig(folder / "curves.png", dpi=110)
    _guidance(arms).savefig(folder / "guidance.png", dpi=110)


def _frontier(arms: Mapping[str, Mapping[int, Row]], frontier: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for arm, seeds in arms.items():
        points = [_point(row) for row in seeds.values()]
        recall, accuracy = np.array(points).T
        axes.errorbar(
            recall.mean(),
            accuracy.mean(),
            xerr=recall.std(),
            yerr=accuracy.std(),
            fmt="o",
            color=_COLOURS[arm],
            label=arm,
        )
    if frontier:
        points = [_point(row) for row in frontier]
        axes.plot(*zip(*points, strict=True), "kx", label="frontier, one seed")
        for row, point in zip(frontier, points, strict=True):
            axes.annotate(
                frontier_name(row), point, xytext=(5, 4), textcoords="offset points", fontsize=7
            )
    axes.set(
        xlabel="recall",
        ylabel="accuracy by the held-out judge",
        title=f"Accuracy against recall at guidance {GUIDANCE:g}",
    )
    _finish(axes)
    return figure


def _point(row: Row) -> tuple[float, float]:
    return score(row, "recall", GUIDANCE), score(row, "accuracy", GUIDANCE)


def _curves(arms: Mapping[str, Mapping[int, Row]]) -> Figure:
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    names = {"reward": "reward", "heldout_accuracy": "accuracy by the held-out judge"}
    for axes, (curve, label) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for arm, seeds in arms.items():
            drawn = [row for row in seeds.values() if row["curves"]]
            if drawn:
                _band(axes, arm, curve, drawn)
        axes.set(xlabel="images drawn", ylabel=f"{label}, mean of {WINDOW} steps")
        _finish(axes)
    return figure


def _band(axes: Axes, arm: str, curve: str, rows: Sequence[Row]) -> None:
    window = min(WINDOW, rows[0]["steps"])
    kernel = np.ones(window) / window
    smooth = np.array([np.convolve(row["curves"][curve], kernel, "valid") for row in rows])
    each = rows[0]["images"] // rows[0]["steps"]
    images = (np.arange(smooth.shape[1]) + window) * each
    middle, spread = smooth.mean(axis=0), smooth.std(axis=0)
    axes.plot(images, middle, color=_COLOURS[arm], label=arm)
    axes.fill_between(images, middle - spread, middle + spread, color=_COLOURS[arm], alpha=0.15)


def _guidance(arms: Mapping[str, Mapping[int, Row]]) -> Figure:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for arm, seeds in arms.items():
        rows = list(seeds.values())
        scales = [record["guidance_scale"] for record in rows[0]["scores"]]
        values = np.array([[score(row, "frechet", scale) for scale in scales] for row in rows])
        axes.errorbar(
            scales,
            values.mean(axis=0),
            yerr=values.std(axis=0),
            fmt="o-",
            color=_COLOURS[arm],
            label=arm,
        )
    axes.set(xlabel="guidance scale at sampling", ylabel="Frechet distance, held-out judge")
    _finish(axes)
    return figure


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)
