"""The README's figures, made from the rows in bench/results and from nothing else.

    python bench/readme_tables.py            writes the block between the two marks in README.md
    python bench/readme_tables.py --check    exit code 1 where the block is not what the rows give

Nothing is rounded in our favour: what is good for us when small is rounded up, what is good for us
when large is rounded down, and of peers the other way round. Where there is no row a line says "not
measured yet".
"""

import argparse
import sys
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path

from chosen_rows import RESULTS, by_contender, rows_of, runs_by, source_of, sources_of
from result_rows import ROOT, Row
from scale_model import PUBLISHED, predicted_table

from argrpo.step_clock import PHASES

README = ROOT / "README.md"
BEGIN = (
    "<!-- figures: begin; python bench/readme_tables.py writes what follows from bench/results -->"
)
END = "<!-- figures: end -->"
NOT_MEASURED = "not measured yet"
OURS, FLOOR = "argrpo", "floor"
_CHARTS = "bench/results/charts"
_WORDS = {
    "floor": "the step's matrix products and attention alone",
    "static_cache": "a static cache in PyTorch, compiled whole",
    "llamagen": "LlamaGen's own sampler",
    "hf_static": "transformers' StaticCache",
    "plain": "AR-GRPO's arithmetic in plain PyTorch",
    "argrpo_code": "AR-GRPO's own model, sampler and tokenizer",
    "torch eager": "[M, V] in fp32, eager",
}


def low(value: float, digits: int = 3) -> str:
    """So many significant digits, rounded down."""
    return _rounded(value, digits, ROUND_FLOOR)


def high(value: float, digits: int = 3) -> str:
    """So many significant digits, rounded up."""
    return _rounded(value, digits, ROUND_CEILING)


def _rounded(value: float, digits: int, way: str) -> str:
    exact = Decimal(str(value))
    if exact == 0:
        return "0"
    place = exact.adjusted() - digits + 1
    rounded = exact.quantize(Decimal(1).scaleb(place), rounding=way)
    return f"{rounded:,f}" if place < 0 else f"{int(rounded):,}"


def worse(value: float, is_ours: bool, digits: int = 3) -> str:
    """A figure that is good when small."""
    return high(value, digits) if is_ours else low(value, digits)


def better(value: float, is_ours: bool, digits: int = 3) -> str:
    """A figure that is good when large."""
    return low(value, digits) if is_ours else high(value, digits)


def block(results: Path = RESULTS) -> str:
    """All of it, marks included."""
    parts = [
        *_rollouts(results), "", *_steps(results), "", *_heads(results), "",
        *_leave_one_out(results), "", *_decodes(results), "", *_gpu(results), "",
        *_predictions(results),
    ]  # fmt: skip
    return "\n".join([BEGIN, "", *parts, "", END])


def written(readme: str, made: str) -> str:
    """A README with its block replaced.

    Raises:
        ValueError: it does not hold the two marks, once each and in this order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError("README.md: expected the two marks of the figures once each")
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError("README.md: expected the mark of the end behind that of the beginning")
    return f"{before}{made}{after}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]


def _named(contender: str) -> str:
    return _WORDS.get(contender, contender)


def _rollouts(results: Path) -> list[str]:
    rows = [row for row in rows_of("rollout", "cpu", results) if "steps_sum_ms" in row]
    lines = ["**Drawing, on a CPU.**"]
    if not rows:
        return [f"{lines[0]} {NOT_MEASURED}."]
    runs = runs_by([row for row in rows if row["images"] == 8] or rows, _rollout_case)
    run = list(runs.values())[-1]
    shown = [step["position"] for step in run[0]["steps"]]
    places = [0, len(shown) // 2, len(shown) - 1]
    one = run[0]
    lines[0] += (
        f" GPT-{one['model']} at {one['image_size']} pixels, {one['images']} images, guidance "
        f"{one['guidance_scale']:g}, {one['dtype']}; {source_of(one)}:"
    )
    at = " / ".join(str(shown[place]) for place in places)
    table = []
    for name, row in by_contender(run).items():
        ours = name == OURS
        steps = " / ".join(worse(row["steps"][place]["p50_ms"], ours) for place in places)
        over = "1" if name == FLOOR else worse(row["over_floor"], ours)
        speed = better(row["images_per_s"], ours)
        table.append([_named(name), speed, steps, over, better(1 / row["over_ours"], False)])
    head = ("", "images/s", f"a step at position {at}, ms", "over the floor", "of our speed")
    return [
        *lines, "", *_table(head, table), "",
        f"![throughput by batch]({_CHARTS}/throughput.png)",
        f"![ms a step against position]({_CHARTS}/positions.png)",
    ]  # fmt: skip


def _rollout_case(row: Row) -> tuple[object, ...]:
    fields = ("model", "image_size", "guidance_scale", "dtype", "text_tokens", "images")
    return tuple(row.get(field) for field in fields)


def _steps(results: Path) -> list[str]:
    said = "**A whole training step, on a CPU.**"
    runs = runs_by(rows_of("step", "cpu", results), lambda row: (row["case"], row["dtype"]))
    if not runs:
        return [f"{said} {NOT_MEASURED}."]
    run = list(runs.values())[-1]
    one = run[0]
    table = []
    for name, row in by_contender(run).items():
        cells = [worse(row[f"{phase}_ms"] / 1e3, name == OURS) for phase in PHASES]
        whole = worse(row["p50_ms"] / 1e3, name == OURS)
        peak = worse(row["peak_mb"], name == OURS)
        table.append([_named(name), *cells, whole, low(row["over_ours"]), peak])
    head = ("seconds", *PHASES, "step", "over ours", "peak MB")
    return [
        f"{said} GPT-{one['model']} at {one['image_size']} pixels, {one['images']} images in "
        f"groups of {one['group']}, guidance {one['guidance_scale']:g}, tokenizer "
        f"{one['tokenizer']}, judges of the size of {' and '.join(one['judges'])}, "
        f"{one['dtype']}; {source_of(one)}. Same weights, classes and judges; log-probs and "
        "gradients of all were compared before:",
        "", *_table(head, table), "",
        f"![step time by phase]({_CHARTS}/phases.png)",
    ]  # fmt: skip


def _heads(results: Path) -> list[str]:
    said = "**The loss head, on a CPU.**"
    rows = [
        row for row in rows_of("kernels", "cpu", results) if row["op"] == "fixed_scale_gradients"
    ]
    if not rows:
        return [f"{said} {NOT_MEASURED}."]
    most = max(row["tokens"] for row in rows)
    runs = runs_by([row for row in rows if row["tokens"] == most], lambda row: row["case"])
    run = by_contender(list(runs.values())[-1])
    one = run[OURS]
    table = [
        [
            _named(name), worse(row["p50_us"] / 1e6, name == OURS), low(row["over_ours"]),
            worse(row["peak_mb"], name == OURS), low(row["peak_mb"] / one["peak_mb"]),
        ]
        for name, row in run.items()
        if name != FLOOR
    ]  # fmt: skip
    head = ("", "seconds", "over ours", "peak MB", "over ours")
    return [
        f"{said} Log-probs, entropies, KL and all gradients of {most:,} tokens, policy "
        f"{one['model']}, 16,384 codes, {one['dtype']}; {source_of(one)}:",
        "", *_table(head, table),
    ]  # fmt: skip


def _leave_one_out(results: Path) -> list[str]:
    said = "**Leave-one-out Frechet distances, on a CPU.**"
    runs = runs_by(rows_of("loo_fid", "cpu", results), lambda row: row["case"])
    if not runs:
        return [f"{said} {NOT_MEASURED}."]
    table = []
    for case, run in runs.items():
        found = by_contender(run)
        ours, brute = found[OURS], found["brute force"]
        table.append(
            [
                case.removeprefix("loo_fid "), high(ours["p50_ms"]), low(brute["p50_ms"]),
                low(brute["over_ours"]), f"{Decimal(high(ours['difference'], 2)):.1e}",
            ]
        )  # fmt: skip
    head = ("", "ours, ms", "one decomposition an image, ms", "over ours", "largest difference")
    named = {case.removeprefix("loo_fid "): run for case, run in runs.items()}
    return [f"{said} fp64; {sources_of(named)}:", "", *_table(head, table)]


def _decodes(results: Path) -> list[str]:
    said = "**Tokens to pixels, on a CPU.**"
    runs = runs_by(rows_of("decode", "cpu", results), lambda row: row["case"])
    if not runs:
        return [f"{said} {NOT_MEASURED}."]
    table = [
        [
            f"{row['contender']}, {row['dtype']}", str(row["images"]),
            worse(row["ms_per_image"], row["contender"] == OURS),
            better(row["percent_of_limit"], row["contender"] == OURS),
        ]
        for run in runs.values()
        for row in run
    ]  # fmt: skip
    one = list(runs.values())[-1][0]
    head = ("", "images at once", "ms an image", "% of a large product's rate")
    return [
        f"{said} {one['tokenizer']} at {one['image_size']} pixels; {sources_of(runs)}:",
        "", *_table(head, table),
    ]  # fmt: skip


def _gpu(results: Path) -> list[str]:
    """A line for each result of ours; what it is beside its peers."""
    lines = []
    for bench in ("rollout", "step", "decode", "trunk", "loo_fid"):
        rows = [row for row in rows_of(bench, "gpu", results) if "over_ours" in row]
        runs = runs_by(rows, lambda row: row.get("case") or _rollout_case(row))
        lines += [_gpu_line(bench, by_contender(run)) for run in runs.values()]
    if not lines:
        return [f"**On a GPU**: {NOT_MEASURED}, none of it. `make gpu` measures it."]
    return ["**On a GPU.**", "", *lines]


def _gpu_line(bench: str, run: dict[str, Row]) -> str:
    one = run.get(OURS) or next(iter(run.values()))
    name = one.get("case") or (
        f"rollout {one['model']} {one['image_size']} px, {one['images']} images, guidance "
        f"{one['guidance_scale']:g}"
    )
    told = [f"{high(one['p50_ms'])} ms"] if "p50_ms" in one else []
    if "images_per_s" in one:
        told.append(f"{low(one['images_per_s'])} images/s")
    if "percent_of_limit" in one:
        told.append(f"{low(one['percent_of_limit'], 2)} % of the limit")
    told += [
        f"{_named(peer)} {low(row['over_ours'])} times our time"
        for peer, row in run.items()
        if peer not in (OURS, FLOOR)
    ]
    return f"- {name}: {', '.join(told)} ({source_of(one)})"


def _predictions(results: Path) -> list[str]:
    rows = [row for name in ("rollout", "trunk") for row in rows_of(name, "gpu", results)]
    return predicted_table(PUBLISHED, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it is stale")
    args = parser.parse_args(argv)
    before = README.read_text(encoding="utf-8")
    after = written(before, block())
    if args.check:
        return int(after != before)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
