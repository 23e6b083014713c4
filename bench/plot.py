"""The README's charts, drawn from the rows in bench/results and from nothing else.

    python bench/plot.py                 three PNG files into bench/results/charts
    python bench/plot.py --output DIR

    throughput    images a second by images drawn together, beside peers, the floor and the roofline
    positions     ms of a decode step against the position of its token
    phases        a training step by phase, ours beside its peers

Each has a panel for a CPU and one for a GPU; a panel without rows says "not measured yet".
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chosen_rows import DEVICES, RESULTS, by_contender, rows_of, runs_by, sources_of
from result_rows import Row

from argrpo.step_clock import PHASES

NOT_MEASURED = "not measured yet"
OURS, FLOOR = "argrpo", "floor"
_COLORS = {
    "argrpo": "#1f4e9e", "floor": "#9e9e9e", "llamagen": "#c0392b", "static_cache": "#2e8b57",
    "hf_static": "#8a63d2", "llamagen_graph": "#e67e22", "plain": "#e67e22",
    "argrpo_code": "#c0392b", "limit": "#202020",
}  # fmt: skip
_PHASE_COLORS = dict(
    zip(PHASES, ("#1f4e9e", "#8a63d2", "#2e8b57", "#e6b800", "#e67e22"), strict=True)
)
_SAME = ("model", "image_size", "guidance_scale", "dtype", "text_tokens")

Panel = Callable[[Any, Sequence[Row]], None]  # (axes, rows of one kind of device)


def draw_all(results: Path, output: Path) -> list[Path]:
    """The files that were written."""
    output.mkdir(parents=True, exist_ok=True)
    charts: dict[str, tuple[str, Panel]] = {
        "throughput": ("rollout", throughput),
        "positions": ("rollout", positions),
        "phases": ("step", phases),
    }
    return [
        _draw(
            output / f"{name}.png", panel, {kind: rows_of(bench, kind, results) for kind in DEVICES}
        )
        for name, (bench, panel) in charts.items()
    ]


def _draw(path: Path, panel: Panel, rows: dict[str, list[Row]]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (kind, found) in zip(figure.subplots(1, len(rows)), rows.items(), strict=True):
        axes.set_title(kind.upper(), loc="left", fontweight="bold")
        if found:
            panel(axes, found)
        else:
            axes.text(0.5, 0.5, NOT_MEASURED, ha="center", va="center", fontsize=14)
            axes.set_xticks([])
            axes.set_yticks([])
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def chosen_runs(rows: Sequence[Row]) -> dict[int, dict[str, Row]]:
    """Rollouts of the settings measured last: by images, then by contender."""
    whole = [row for row in rows if "steps_sum_ms" in row]
    newest = tuple(whole[-1].get(field) for field in _SAME)
    alike = [row for row in whole if tuple(row.get(field) for field in _SAME) == newest]
    runs = runs_by(alike, lambda row: row["images"])
    return {images: by_contender(runs[images]) for images in sorted(runs)}


def throughput(axes: Any, rows: Sequence[Row]) -> None:
    """Images a second by images drawn together."""
    runs = chosen_runs(rows)
    for name in _names(run for run in runs.values()):
        points = [
            (images, run[name]["images_per_s"]) for images, run in runs.items() if name in run
        ]
        axes.plot(*zip(*points, strict=True), "o-", color=_color(name), label=name)
    limits = [
        (images, run[OURS]["limit_images_per_s"])
        for images, run in runs.items()
        if "limit_images_per_s" in run.get(OURS, {})
    ]
    if limits:
        axes.plot(*zip(*limits, strict=True), "k:", marker="_", label="roofline")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(runs), [str(images) for images in runs])
    axes.set_yscale("log")
    for side in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        side("{x:g}")
    axes.set_xlabel("images drawn together")
    axes.set_ylabel("images a second")
    _finish(axes, {f"{images} images": list(run.values()) for images, run in runs.items()})


def positions(axes: Any, rows: Sequence[Row]) -> None:
    """Milliseconds of a step, where most contenders were measured."""
    runs = chosen_runs(rows)
    images = max(reversed(runs), key=lambda count: len(runs[count]))
    run = runs[images]
    for name, row in run.items():
        steps = row["steps"]
        at = [step["position"] for step in steps]
        axes.plot(at, [step["p50_ms"] for step in steps], "o-", color=_color(name), label=name)
        low, high = ([step[field] for step in steps] for field in ("p20_ms", "p80_ms"))
        axes.fill_between(at, low, high, color=_color(name), alpha=0.15)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"position of the token, {images} images")
    axes.set_ylabel("ms a step (p20 to p80)")
    _finish(axes, {"": list(run.values())})


def phases(axes: Any, rows: Sequence[Row]) -> None:
    """Seconds of a training step, stacked by phase."""
    runs = runs_by(rows, lambda row: (row["case"], row["dtype"]))
    run = by_contender(list(runs.values())[-1])
    names = list(run)
    below = [0.0] * len(names)
    for phase in PHASES:
        seconds = [run[name][f"{phase}_ms"] / 1e3 for name in names]
        axes.barh(names, seconds, left=below, color=_PHASE_COLORS[phase], label=phase)
        below = [start + part for start, part in zip(below, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(right=1.3 * max(below))  # room for the legend
    axes.set_xlabel("seconds a step")
    _finish(axes, {"": list(run.values())})


def _names(runs: Any) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run))


def _color(name: str) -> str:
    return _COLORS.get(name, "#607d8b")


def _finish(axes: Any, runs: Mapping[str, Sequence[Row]]) -> None:
    """A legend, a grid, and what was measured where."""
    one = next(iter(runs.values()))[0]
    what = (
        f"{one['model']} {one['image_size']} px, guidance {one['guidance_scale']:g}, {one['dtype']}"
    )
    axes.set_title(what, fontsize=9, loc="right")
    axes.set_xlabel(f"{axes.get_xlabel()}\n{sources_of(runs).replace('; ', chr(10))}", fontsize=7)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--output", type=Path, help="default: charts in the results folder")
    args = parser.parse_args(argv)
    for path in draw_all(args.results, args.output or args.results / "charts"):
        print(path)


if __name__ == "__main__":
    main()
