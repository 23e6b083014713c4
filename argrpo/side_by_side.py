"""side_by_side.html: what policies drew for the same prompts and seeds, and what judges said of it.

Pictures stay the files that they are, beside the page; nothing else is loaded.
"""

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

import argrpo
from argrpo.eval_t2i import PolicyImages, T2iResults
from argrpo.report_charts import number
from argrpo.report_page import PAGE, card, section
from argrpo.run_folder import write_atomically

_STYLE = """<style>
.prompt { margin-top: 16px; }
.prompt h3 { font-size: 14.5px; }
.policies { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
  gap: 8px 22px; }
.policies > div > p { margin: 0 0 6px; color: var(--soft); font-size: 12.5px; }
.shots { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 8px; }
.shots figcaption { line-height: 1.35; font-size: 11.5px; overflow-wrap: anywhere; }
.shots span { white-space: nowrap; }
.shots img { image-rendering: $rendering; }
</style>"""
_SMALL = 64  # pixels; smaller pictures are shown with sharp pixels


def write_side_by_side(results: T2iResults, output_dir: Path, num_prompts: int) -> Path:
    """Write the page beside the policies' folders.

    Args:
        results: of `evaluate_texts`.
        output_dir: its folder.
        num_prompts: shown; evenly spaced ones where there are more.

    Returns:
        The file.

    Raises:
        StorageError: the disk is full or refused.
    """
    path = output_dir / "side_by_side.html"
    page = render(results, output_dir, num_prompts)
    write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path


def render(results: T2iResults, output_dir: Path, num_prompts: int) -> str:
    """The page as text."""
    count = len(results.prompts)
    shown = [place * count // num_prompts for place in range(min(num_prompts, count))]
    if count <= num_prompts:
        shown = list(range(count))
    cards = [_prompt(results, place, output_dir) for place in shown]
    names = " and ".join(each.name for each in results.policies)
    repeats = results.settings["num_images_per_prompt"]
    omitted = f"; {len(shown)} of them here" if len(shown) < count else ""
    size = _image_size(results)
    style = Template(_STYLE).substitute(rendering="pixelated" if size <= _SMALL else "auto")
    return PAGE.substitute(
        title=f"{escape(names)} - argrpo",
        heading=escape(names),
        lead=escape(
            f"{count} prompts, {repeats} images each, guidance "
            f"{results.settings['guidance_scale']:g}, seed {results.settings['seed']}: the same "
            f"prompts and seeds for all{omitted}."
        ),
        body="\n".join(
            [style, section("Measured", card(_table(results))), section("Images", "\n".join(cards))]
        ),
        footer=f"Written by argrpo {argrpo.__version__}. Pictures are the files beside this page.",
    )


def _table(results: T2iResults) -> str:
    heads = "".join(f"<th class=num>{escape(each.name)}</th>" for each in results.policies)
    lines = []
    # The last policy's, because the first has no wins.
    for metric, value in results.policies[-1].metrics.items():
        is_beside = metric.endswith(("/win_rate_error", "/std"))
        if is_beside or (metric.endswith("/not_scored") and value == 0):
            continue
        cells = "".join(_cell(each, metric) for each in results.policies)
        lines.append(f"<tr><th>{escape(_words(metric))}</th>{cells}</tr>")
    return f'<div class="wide"><table><tr><th></th>{heads}</tr>{"".join(lines)}</table></div>'


def _words(metric: str) -> str:
    if metric.endswith("/win_rate"):
        return f"{metric.removesuffix('/win_rate')}: wins against the first, ± standard error"
    if metric.endswith("/mean"):
        return f"{metric.removesuffix('/mean')}: mean, ± spread over images"
    named = {
        "entropy": "entropy of the draws, nats a token",
        "pairwise_distance": "distance between images of a prompt, in features",
        "pairwise_pixels": "distance between images of a prompt, in pixels",
    }
    return named.get(metric, metric.replace("/", " ").replace("_", " "))


def _cell(policy: PolicyImages, metric: str) -> str:
    value = policy.metrics.get(metric)
    if value is None or not math.isfinite(value):
        return "<td class=num></td>"
    spread = policy.metrics.get(metric.replace("/mean", "/std"), math.nan)
    if metric.endswith("/win_rate"):
        spread = policy.metrics.get(f"{metric}_error", math.nan)
    is_spread = metric.endswith(("/mean", "/win_rate")) and math.isfinite(spread)
    more = f" <small>&plusmn; {number(spread)}</small>" if is_spread else ""
    kind = ""
    if metric.endswith("/win_rate"):
        kind = " better" if value > 0.5 else " worse" if value < 0.5 else ""
    return f'<td class="num{kind}">{number(value)}{more}</td>'


def _prompt(results: T2iResults, place: int, output_dir: Path) -> str:
    repeats = results.settings["num_images_per_prompt"]
    rows = range(place * repeats, (place + 1) * repeats)
    columns = []
    for each in results.policies:
        shots = "".join(_shot(results, each, row, output_dir) for row in rows)
        columns.append(f'<div><p>{escape(each.name)}</p><div class="shots">{shots}</div></div>')
    text = escape(results.prompts[place].text)
    return card(f'<h3>{text}</h3><div class="policies">{"".join(columns)}</div>', "prompt")


def _shot(results: T2iResults, policy: PolicyImages, row: int, output_dir: Path) -> str:
    source = quote(policy.folders.path(row).relative_to(output_dir).as_posix())
    said = "<br>".join(_said(results, policy, row))
    return (
        f'<figure><img src="{source}" loading="lazy" alt="{escape(policy.name)}">'
        f"<figcaption>{said}</figcaption></figure>"
    )


def _said(results: T2iResults, policy: PolicyImages, row: int) -> Iterator[str]:
    """Each judge's score, coloured by whether it is above that of the first policy's image."""
    base = results.policies[0].scores
    for place, judge in enumerate(results.judges):
        score, before = float(policy.scores[row, place]), float(base[row, place])
        value = number(score) if math.isfinite(score) else "not scored"
        # A colour between two numbers that read alike would only puzzle.
        is_other = math.isfinite(before) and value != number(before)
        kind = "better" if is_other and score > before else "worse" if is_other else ""
        yield f'{escape(judge)} <span class="{kind}">{value}</span>'


def _image_size(results: T2iResults) -> int:
    from PIL import Image

    with Image.open(results.policies[0].folders.path(0)) as picture:
        return picture.width
