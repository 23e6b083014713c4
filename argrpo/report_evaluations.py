"""What a report says of the evaluations along a run: a table through time, and curves."""

from html import escape

from argrpo.report_charts import Series, line_chart, number
from argrpo.report_page import card
from argrpo.run_record import RunRecord

_EVAL = "eval/"
_MAX_COLUMNS = 8  # evaluations side by side; of more, evenly spaced ones
_MAX_CURVES = 5  # colours of a chart
# Endings of metrics that share a chart, and what it is called.
_CHARTS = (
    ("/mean", "Judges, mean score"),
    ("/win_rate", "Wins against the base, same seeds and conditions"),
    ("frechet", "Frechet distance to the reference"),
    ("precision", "Precision"),
    ("recall", "Recall"),
    ("density", "Density"),
    ("coverage", "Coverage"),
    ("pairwise_distance", "Distance between images of one prompt, in features"),
    ("pairwise_pixels", "Distance between images of one prompt, in pixels"),
    ("entropy", "Entropy of the draws, nats a token"),
)


def evaluations(record: RunRecord) -> str:
    """Table and curves; empty text where a run was not evaluated."""
    if not record.evaluations:
        return ""
    charts = [(title, _chart(record, ending)) for ending, title in _CHARTS]
    cards = [card(f"<h3>{escape(title)}</h3>{chart}") for title, chart in charts if chart]
    return f'{card(_table(record))}{_note(record)}<div class="charts">{"".join(cards)}</div>'


def _note(record: RunRecord) -> str:
    settings = record.config.get("eval") or {}
    count = settings.get("num_images")
    words = ["Same seeds and conditions every time, never optimised"]
    if count:
        words[0] = f"{count} images each, {words[0][0].lower()}{words[0][1:]}"
    best = record.best
    if best:
        step = f"step {best['step']}" if best["step"] else "the policy before training"
        words.append(
            f"checkpoints/best is {step}, with {best['metric']} {number(float(best['value']))}"
        )
    return f'<p class="note">{escape(". ".join(words))}.</p>'


def _table(record: RunRecord) -> str:
    rows, best = _shown(record), record.best.get("step")
    steps = [int(row["step"] or 0) for row in rows]
    heads = "".join(
        f"<th class=num>{'base' if step == 0 else f'step {step}'}{'*' * (step == best)}</th>"
        for step in steps
    )
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(_EVAL))
    lines = [
        f"<tr><th>{escape(_short(name))}</th>{''.join(_cell(row.get(name)) for row in rows)}</tr>"
        for name in names
        if not name.endswith("seconds")
    ]
    return f'<div class="wide"><table><tr><th></th>{heads}</tr>{"".join(lines)}</table></div>'


def _shown(record: RunRecord) -> list[dict[str, float | None]]:
    """All evaluations, or evenly spaced ones, the first and the last among them."""
    rows = record.evaluations
    if len(rows) <= _MAX_COLUMNS:
        return rows
    last = len(rows) - 1
    return [rows[round(place * last / (_MAX_COLUMNS - 1))] for place in range(_MAX_COLUMNS)]


def _cell(value: float | None) -> str:
    return f"<td class=num>{'' if value is None else number(value)}</td>"


def _chart(record: RunRecord, ending: str) -> str:
    rows = record.evaluations
    names = dict.fromkeys(
        name for row in rows for name in row if name.startswith(_EVAL) and name.endswith(ending)
    )
    curves = []
    for name in list(names)[:_MAX_CURVES]:
        found = [(row["step"] or 0.0, row[name]) for row in rows if name in row]
        curves.append(Series(_short(name), [s for s, _ in found], [v for _, v in found]))
    return line_chart(curves)


def _short(name: str) -> str:
    """eval/guidance_1.5/judge/win_rate as `judge win rate, guidance 1.5`."""
    parts = name.removeprefix(_EVAL).split("/")
    scale = ""
    if parts[0].startswith("guidance_") and len(parts) > 1:
        scale = f", guidance {parts.pop(0).removeprefix('guidance_')}"
    words = [part for part in parts if part != "mean"]
    return " ".join(words).replace("_", " ") + scale
