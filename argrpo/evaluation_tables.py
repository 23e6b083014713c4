"""What `argrpo eval` prints: settings, a table, and which guidance is best."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from argrpo.eval_c2i import C2iResults

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


def tell_c2i(results: C2iResults, console: Console) -> None:
    """Print settings, table, best guidance and, as the last line, everything as JSON."""
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
    console.out(json.dumps(asdict(results)), highlight=False)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
