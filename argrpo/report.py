"""`argrpo report`: one HTML file about a run, readable anywhere and without a network."""

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

from PIL import Image

import argrpo
from argrpo.report_charts import Series, bar_chart, line_chart, number, stacked_chart
from argrpo.report_diversity import diversity
from argrpo.report_evaluations import evaluations
from argrpo.report_page import PAGE, card, section
from argrpo.run_folder import write_atomically
from argrpo.run_record import RunRecord, read_run
from argrpo.step_clock import PHASES

_MAX_GRIDS = 12  # samples through time that are shown; a long run has more than one looks at
_MAX_WIDTH = 1400  # pixels; wider pictures are made smaller, so that the file can be sent around


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        run: the run's folder.
        output: the file; None: report.html in the folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no run is in it, or a file of it is damaged.
        StorageError: the disk is full or refused.
    """
    record = read_run(run)
    path = output or record.folder.report_path
    page = render(record)
    write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path


def render(record: RunRecord) -> str:
    """The page as text."""
    name = record.folder.path.resolve().name
    body = [
        f'<div class="facts">{"".join(_facts(record))}</div>',
        section("Before and after", _before_and_after(record)),
        section("Measured on fresh samples", _evaluation(record)),
        section("Evaluated along the run", evaluations(record)),
        section("Curves", _charts(record)),
        section("Samples through time", _samples(record)),
        section("How it was run", _settings(record)),
    ]
    return PAGE.substitute(
        title=f"{escape(name)} - argrpo",
        heading=escape(name),
        lead=_lead(record),
        body="\n".join(body),
        footer=f"Written by argrpo {argrpo.__version__}. Self-contained: nothing is loaded.",
    )


def _lead(record: RunRecord) -> str:
    config = record.config
    policy = escape(str(config.get("policy", {}).get("path", "unknown policy")))
    rewards = ", ".join(escape(str(judge.get("name"))) for judge in config.get("rewards", []))
    wanted = config.get("num_steps")
    steps = len(record.rows)
    words = f"{steps} steps" if wanted in (None, steps) else f"{steps} of {wanted} steps"
    sizes = f"{config.get('prompts_per_step', '?')} x {config.get('images_per_prompt', '?')}"
    scale = config.get("rollout", {}).get("guidance_scale")
    guidance = "" if scale is None else f", drawn at guidance {scale:g}"
    return f"GRPO on {policy}: {words} of {sizes} images{guidance}, rewarded by {rewards or '?'}."


def _facts(record: RunRecord) -> Iterable[str]:
    rewards = record.finite("reward")
    if rewards:
        first, last = _ends(rewards)
        yield _fact("reward", _change(first, last), "first and last tenth of the steps")
    for change in diversity(record):
        yield _fact(change.label, _change(change.first, change.last), change.note)
    for name in record.names("monitors/", "/mean"):
        values = record.finite(name)
        if len(values) > 1:
            label = name.removeprefix("monitors/").removesuffix("/mean").replace("_", " ")
            yield _fact(label, _change(values[0], values[-1]), "never optimised; first and last")
    kl = record.finite("kl")
    if kl:
        yield _fact("KL to the start", number(kl[-1]), "nats a token, last step")
    times, speeds = record.finite("step_time"), record.finite("images_per_second")
    if times and speeds:
        unit = f"{number(median(speeds))} <small>images/s</small>"
        yield _fact("speed", unit, f"{number(median(times))} s a step, medians")
        total = sum(times)
        clock = (
            f"{total / 60:.1f} <small>min</small>"
            if total >= 90
            else f"{total:.0f} <small>s</small>"
        )
        yield _fact("in steps", clock, f"{len(times)} steps, without sample grids and loading")


def _fact(label: str, value: str, more: str) -> str:
    return card(
        f'<div class="label">{escape(label)}</div><div class="value">{value}</div>'
        f'<div class="more">{escape(more)}</div>',
        "fact",
    )


def _change(first: float, last: float) -> str:
    return f"<small>{number(first)} &rarr;</small> {number(last)}"


def _ends(values: list[float]) -> tuple[float, float]:
    tenth = max(1, len(values) // 10)
    return fmean(values[:tenth]), fmean(values[-tenth:])


def _before_and_after(record: RunRecord) -> str:
    pictures = [
        _figure(record.folder.path / f"{name}.png", caption)
        for name, caption in (("before", "base policy"), ("after", "tuned policy, same seeds"))
        if (record.folder.path / f"{name}.png").is_file()
    ]
    return f'<div class="pair">{"".join(map(card, pictures))}</div>' if pictures else ""


def _evaluation(record: RunRecord) -> str:
    found = record.evaluation
    base, tuned = found.get("base"), found.get("tuned")
    if not isinstance(base, dict) or not isinstance(tuned, dict):
        return ""
    rows = [
        _measure_row(name, base[name], tuned[name], lower_is_better=name == "frechet")
        for name, value in base.items()
        if isinstance(value, int | float) and name in tuned
    ]
    head = (
        "<tr><th></th><th class=num>base</th><th class=num>tuned</th><th class=num>change</th></tr>"
    )
    parts = [card(f"<table>{head}{''.join(rows)}</table>")]
    for name, values in base.items():
        if isinstance(values, list) and isinstance(tuned.get(name), list):
            groups = [("base", values), ("tuned", tuned[name])]
            chart = bar_chart([str(place) for place in range(len(values))], groups)
            parts.append(card(f"<h3>{escape(name.replace('_', ' '))}</h3>{chart}"))
    note = f'<p class="note">{escape(str(found["note"]))}</p>' if found.get("note") else ""
    return f'<div class="charts small">{"".join(parts)}</div>{note}'


def _measure_row(name: str, base: float, tuned: float, *, lower_is_better: bool) -> str:
    change = tuned - base
    is_better = change <= 0 if lower_is_better else change >= 0
    kind = "better" if is_better else "worse"
    arrow = ", lower is better" if lower_is_better else ""
    return (
        f"<tr><th>{escape(name)}{arrow}</th><td class=num>{number(base)}</td>"
        f'<td class=num>{number(tuned)}</td><td class="num {kind}">{change:+.3g}</td></tr>'
    )


def _charts(record: RunRecord) -> str:
    judges = record.names("rewards/", "/mean")
    rewards = ["reward", *judges] if len(judges) > 1 else ["reward"]
    monitors = record.names("monitors/", "/mean")
    entropies = record.names("entropy/")
    phases = [f"time/{phase}" for phase in PHASES if record.names(f"time/{phase}")]
    charts = [
        ("Reward", line_chart(_series(record, rewards), smooth=True)),
        ("Held-out judges: measured, never optimised", line_chart(_series(record, monitors))),
        ("KL to the starting policy, nats a token", _chart_from_zero(record, ["kl"])),
        ("Entropy, nats a token", line_chart(_series(record, entropies), smooth=True)),
        ("Seconds a step, by phase", stacked_chart(_series(record, phases))),
        ("Gradient norm, before clipping", _chart_from_zero(record, ["grad_norm"])),
        (
            "Groups without a difference to learn from",
            _chart_from_zero(record, ["frac_reward_zero_std"]),
        ),
        ("Learning rate", _chart_from_zero(record, ["learning_rate"])),
        *_image_charts(record),
        ("Images that a judge failed to score", _chart_from_zero(record, _failing(record))),
    ]
    cards = [card(f"<h3>{title}</h3>{chart}") for title, chart in charts if chart]
    return f'<div class="charts">{"".join(cards)}</div>' if cards else ""


def _image_charts(record: RunRecord) -> list[tuple[str, str]]:
    """What shows first that a judge is being gamed."""
    titles = {
        "Images: saturation and edges, share": ["images/saturation", "images/edge_density"],
        "Images: entropy of colours, bits": ["images/colour_entropy"],
        "Images: distinct tokens of one": ["images/distinct_tokens"],
    }
    return [(title, _chart_from_zero(record, names)) for title, names in titles.items()]


def _failing(record: RunRecord) -> list[str]:
    """The counts of judges that have failed at all."""
    names = record.names("rewards/", "/failures")
    return [name for name in names if any(record.finite(name))]


def _chart_from_zero(record: RunRecord, names: list[str]) -> str:
    return line_chart(_series(record, names), from_zero=True)


def _series(record: RunRecord, names: list[str]) -> list[Series]:
    named = [(name, record.curve(name)) for name in names]
    return [Series(_short(name), *curve) for name, curve in named if curve[0]]


def _short(name: str) -> str:
    for prefix in ("rewards/", "monitors/", "time/", "entropy/", "images/"):
        name = name.removeprefix(prefix)
    return name.removesuffix("/mean").removesuffix("/failures").replace("_", " ")


def _samples(record: RunRecord) -> str:
    grids = record.samples
    if len(grids) > _MAX_GRIDS:
        last = len(grids) - 1
        kept = sorted({round(place * last / (_MAX_GRIDS - 1)) for place in range(_MAX_GRIDS)})
        grids = [grids[place] for place in kept]
    figures = "".join(
        _figure(path, f"step {step}" if step else "before training") for step, path in grids
    )
    omitted = len(record.samples) - len(grids)
    note = f"; {omitted} more in samples/" if omitted else ""
    if not figures:
        return ""
    return f'<div class="strip">{figures}</div><p class="note">Same prompts and seeds{note}.</p>'


def _figure(path: Path, caption: str) -> str:
    kind, data = _picture(path)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure><img src="{source}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _picture(path: Path) -> tuple[str, bytes]:
    """The file as it is, or a smaller JPEG of a picture that is wide."""
    with Image.open(path) as picture:
        if picture.width <= _MAX_WIDTH:
            return "png", path.read_bytes()
        smaller = picture.convert("RGB")
        smaller.thumbnail((_MAX_WIDTH, _MAX_WIDTH * 4))
        buffer = io.BytesIO()
        smaller.save(buffer, format="JPEG", quality=90)
    return "jpeg", buffer.getvalue()


def _settings(record: RunRecord) -> str:
    parts = []
    if record.environment:
        parts.append(card(f"<h3>Environment</h3>{_table(record.environment)}"))
    if record.config_text:
        text = f"<pre>{escape(record.config_text)}</pre>"
        parts.append(card(f"<h3>config.yaml</h3>{text}"))
    return f'<div class="pair small">{"".join(parts)}</div>' if parts else ""


def _table(facts: dict[str, Any]) -> str:
    rows = [
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    ]
    return f"<table>{''.join(rows)}</table>"
