"""The page of the learning study, from its rows: tables and claims in Markdown."""

from collections.abc import Mapping, Sequence

from result_rows import Row
from study_arms import GUIDANCE
from study_claims import (
    by_arm,
    chosen_weight,
    claims,
    claims_on_rewards,
    frontier_rows,
    longer_frontier,
    longer_runs,
    score,
    spread,
    usual_rows,
)
from study_measures import MEASURES

_DIGITS = {"frechet": 1, "entropy": 2}


def summary(rows: Sequence[Row]) -> str:
    """The whole page in Markdown: tables and claims."""
    arms = by_arm(rows)
    return "\n".join(
        [
            "# The learning study",
            "",
            "Written by `python bench/learning_study.py --summary` from `rows.jsonl`: mean ±",
            "standard deviation over seeds. How to read it stands in `bench/README.md`.",
            "",
            *_sizes(rows),
            "",
            *_arm_table(arms),
            "",
            "## Claims",
            "",
            *[line for claim in claims(arms) for line in (claim, "")],
            *_base_table(arms.get("base", {})),
            *_frontier_table(rows),
            *_longer_sections(rows),
        ]
    )


def cell(rows: Sequence[Row], measure: str, scale: float) -> str:
    """A measure over seeds, for a table."""
    return spread([score(row, measure, scale) for row in rows], _DIGITS.get(measure, 3))


def _sizes(rows: Sequence[Row]) -> list[str]:
    drawing = [row for row in usual_rows(rows) if row["curves"]]
    if not drawing:
        return []
    row, seconds = drawing[0], sum(r["train_seconds"] + r["measure_seconds"] for r in rows)
    return [
        f"{row['steps']} steps of {row['images'] // row['steps']} images ({row['images']:,} drawn) "
        f"an arm and seed, measured on {row['evaluation_images']:,} fresh images at each guidance; "
        f"{len(rows)} trainings, {seconds / 60:.0f} minutes in all, on {row['device']}."
    ]


def _arm_table(arms: Mapping[str, Mapping[int, Row]]) -> list[str]:
    lines = [
        f"| arm | guidance | {' | '.join(MEASURES)} | seeds | training, s |",
        f"|---|---|{'---|' * (len(MEASURES) + 2)}",
    ]
    for scale in (GUIDANCE, 1.0):
        for arm, seeds in arms.items():
            rows = list(seeds.values())
            cells = " | ".join(cell(rows, measure, scale) for measure in MEASURES)
            seconds = spread([row["train_seconds"] for row in rows], 0)
            lines.append(f"| {arm} | {scale:g} | {cells} | {len(rows)} | {seconds} |")
    return lines


def _base_table(base: Mapping[int, Row]) -> list[str]:
    if not base:
        return []
    rows = list(base.values())
    lines = ["## The base over guidance", "", f"| guidance | {' | '.join(MEASURES)} |"]
    lines.append(f"|---|{'---|' * len(MEASURES)}")
    for record in rows[0]["scores"]:
        scale = record["guidance_scale"]
        lines.append(f"| {scale:g} | {' | '.join(cell(rows, m, scale) for m in MEASURES)} |")
    return [*lines, ""]


def _frontier_table(rows: Sequence[Row]) -> list[str]:
    frontier = frontier_rows(rows)
    if len(frontier) < 2:
        return []
    title = f"## The frontier: seed {frontier[0]['seed']}, guidance {GUIDANCE:g}"
    chosen = f"Chosen for the arms: weight {chosen_weight(rows):g}."
    return [title, "", *_by_rewards(frontier), "", chosen, ""]


def _by_rewards(rows: Sequence[Row]) -> list[str]:
    lines = [f"| rewards | {' | '.join(MEASURES)} |", f"|---|{'---|' * len(MEASURES)}"]
    for row in rows:
        cells = " | ".join(cell([row], measure, GUIDANCE) for measure in MEASURES)
        lines.append(f"| {frontier_name(row)} | {cells} |")
    return lines


def _longer_sections(rows: Sequence[Row]) -> list[str]:
    lines = []
    for (images, beta), arms in longer_runs(rows).items():
        lines += [f"## Further on: {images:,} images, weight of the KL {beta:g}", ""]
        lines += [*_arm_table(arms), "", *[f"{text}\n" for text in claims_on_rewards(arms)]]
        frontier = longer_frontier(rows, images, beta)
        if len({row["loo_fid_weight"] for row in frontier}) > 2:
            lines += [f"Seed {frontier[0]['seed']}, guidance {GUIDANCE:g}:", ""]
            lines += [*_by_rewards(frontier), ""]
    return lines


def frontier_name(row: Row) -> str:
    """What a run of the frontier trained on."""
    if row["arm"] == "judge":
        return "judge"
    if row["loo_fid_weight"] == 0:
        return "judge, entropy"
    return f"judge, entropy, LOO-FID {row['loo_fid_weight']:g}"
