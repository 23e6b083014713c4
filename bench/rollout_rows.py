"""What bench_rollout.py makes of its timings: rows, how near they came to the limit, a table."""

from collections.abc import Mapping, Sequence

from result_rows import Row
from rollout_contenders import Case, Floor, OurEngine
from roofline import least_rollout_us, least_step_us
from timing import Ceilings, Timing
from turns import sum_between


def rows_of(
    case: Case,
    steps: Mapping[str, Mapping[int, Timing]],
    whole: Mapping[str, Timing],
    peaks: Mapping[str, int],
) -> list[Row]:
    """One row a contender, each compared with the floor and with our engine."""
    ours = OurEngine.name
    sums = {
        name: sum_between({p: t.p50_us / 1e3 for p, t in timings.items()}, range(case.num_tokens))
        for name, timings in steps.items()
    }
    rows = []
    for name, timings in steps.items():
        row: Row = {
            "contender": name,
            "steps": [{"position": p, **milliseconds(timing)} for p, timing in timings.items()],
            "steps_sum_ms": round(sums[name], 1),
            "images_per_s": round(case.images / sums[name] * 1e3, 4),
            "over_floor": round(sums[name] / sums[Floor.name], 3),
            "over_ours": round(sums[name] / sums[ours], 3),
        }
        if name in whole:
            row["rollout"] = milliseconds(whole[name])
            row["rollout_over_ours"] = round(whole[name].p50_us / whole[ours].p50_us, 3)
            row["rollout_images_per_s"] = round(case.images / whole[name].p50_us * 1e6, 4)
        if name in peaks:
            row["peak_mb"] = round(peaks[name] / 1e6, 1)
        rows.append(row)
    return rows


def with_limits(case: Case, ceilings: Ceilings, rows: Sequence[Row]) -> list[Row]:
    """The rows with how near each step, and the whole of them, came to what it must move."""
    sizes = case.step_sizes
    whole = least_rollout_us(sizes, case.num_tokens, ceilings) / 1e3
    reading = {}
    if case.text_tokens:
        mean_entries = (case.num_tokens + 1) / 2 + case.text_tokens - 1
        step = least_step_us(sizes, mean_entries, ceilings) / 1e6
        reading = {
            "limit_reading_prefix_images_per_s": round(case.images / step / case.num_tokens, 3)
        }
    limited = []
    for row in rows:
        steps = [
            {**step, "percent_of_limit": round(100 * least / step["p50_ms"], 1)}
            for step in row["steps"]
            for least in [least_step_us(sizes, step["position"] + 1, ceilings) / 1e3]
        ]
        limited.append(
            {
                **row,
                "steps": steps,
                "limit_images_per_s": round(case.images / whole * 1e3, 3),
                "percent_of_limit": round(100 * whole / row["steps_sum_ms"], 1),
                **reading,
            }
        )
    return limited


def table(rows: Sequence[Row]) -> str:
    """Positions down, contenders across, then what they sum up to."""
    across = [row for row in rows if "steps_sum_ms" in row]
    width = max(12, *(len(row["contender"]) + 2 for row in across))

    def line(label: str, cells: Sequence[object]) -> str:
        return f"{label:>20}" + "".join(f"{cell:>{width}}" for cell in cells)

    lines = [line("", [row["contender"] for row in across])]
    for i, step in enumerate(across[0]["steps"]):
        label = f"step {step['position']}, ms"
        lines.append(line(label, [f"{row['steps'][i]['p50_ms']:.2f}" for row in across]))
    for field in (
        "steps_sum_ms", "images_per_s", "percent_of_limit", "over_floor", "over_ours",
        "rollout_images_per_s", "rollout_over_ours", "peak_mb",
    ):  # fmt: skip
        if any(field in row for row in across):
            lines.append(line(field, [row.get(field, "") for row in across]))
    lines += [
        f"{row['contender']}, {row['images']} images: {row['over_ours']} times the time"
        for row in rows
        if row not in across
    ]
    return "\n".join(lines)


def milliseconds(timing: Timing) -> dict[str, float | int]:
    """A timing as fields of a row."""
    return {
        "p20_ms": round(timing.p20_us / 1e3, 3),
        "p50_ms": round(timing.p50_us / 1e3, 3),
        "p80_ms": round(timing.p80_us / 1e3, 3),
        "samples": timing.samples,
    }
