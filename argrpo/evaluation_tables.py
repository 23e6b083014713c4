"""What `argrpo eval` prints: settings, a table, and which guidance is best."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from argrpo.eval_c2i import C2iResults
from argrpo.eval_t2i import T2iResults
from argrpo.images_config import ImagesConfig

_WIDTH = 160  # columns where the output is no terminal, so that no table is folded
# Short heads of columns, by metric.
_HEADS = {
    "guidance_scale": "guidance",
    "spatial_frechet": "sFID",
    "inception_score": "IS",
    "pairwise_distance": "distance within",
    "dinov2_frechet": "FD-DINOv2",
    "dinov2_pairwise_distance": "dinov2 distance within",
}
_HIDDEN = ("inception_score_std",)


def wide_console() -> Console:
    """The terminal, or a file as wide as a table."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def tell_c2i(results: C2iResults, folder: Path, console: Console) -> None:
    """Print settings, table, best guidance, where all is and, as the last line, it as JSON."""
    settings = results.settings
    for line in (
        f"{settings['num_images']:,} images, {settings['classes']} classes, seed "
        f"{settings['seed']}, temperature {settings['temperature']:g}, top_k {settings['top_k']}, "
        f"top_p {settings['top_p']:g}, pixels {settings['pixels']}, batch {settings['batch']}",
        f"features {settings.get('features', 'none')}; reference {settings['reference']}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    is_fid = str(settings.get("features")).startswith("inception_fid")
    heads = {**_HEADS, "frechet": "FID" if is_fid else "Frechet distance"}
    names = [name for name in results.rows[0] if name not in _HIDDEN]
    table = Table()
    for name in names:
        label = heads.get(name, name.replace("_", " "))
        table.add_column(label, justify="left" if name == "policy" else "right")
    for row in results.rows:
        table.add_row(*(_cell(row[name]) for name in names))
    console.print(table)
    best_by = settings["best_by"]
    for name, row in results.best.items():
        words = f"{name}: best {best_by} {row[best_by]:.4g} at guidance {row['guidance_scale']:g}"
        console.print(words, highlight=False, soft_wrap=True)
    said = "results.json; images in POLICY/guidance_SCALE/samples.npz"
    console.out(f"{folder}: {said}", highlight=False)
    console.out(json.dumps(asdict(results)), highlight=False)


def tell_t2i(results: T2iResults, page: Path, console: Console) -> None:
    """Print settings, a table and, as the last line, everything as JSON."""
    settings = results.settings
    for line in (
        f"{len(results.prompts):,} prompts, {settings['num_images_per_prompt']} images each, "
        f"guidance {settings['guidance_scale']:g}, seed {settings['seed']}, temperature "
        f"{settings['temperature']:g}, top_k {settings['top_k']}, top_p {settings['top_p']:g}, "
        f"pixels {settings['pixels']}, batch {settings['batch']}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("")
    for each in results.policies:
        table.add_column(each.name, justify="right")
    for name in dict.fromkeys(name for each in results.policies for name in each.metrics):
        cells = [each.metrics.get(name) for each in results.policies]
        table.add_row(name.replace("/", " ").replace("_", " "), *map(_cell, cells))
    console.print(table)
    for each in results.policies:
        console.out(f"{each.name}: {each.folders.folder}", highlight=False)
    console.out(f"look at {page}", highlight=False)
    record = {"settings": settings, "rows": results.rows()}
    console.out(json.dumps(record), highlight=False)


def tell_unfinished(config: ImagesConfig, console: Console) -> None:
    """Print that other processes still draw."""
    said = f"{config.output_dir}: shard {config.shard} of {config.num_shards} is done; "
    console.out(f"{said}the process that finishes last measures", highlight=False)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
