"""Milliseconds a step and images a second: our engine, the floor of a step, a peer, in one run.

    python bench/bench_rollout.py
    python bench/bench_rollout.py --peer llamagen --peer_path DIR    beside LlamaGen's own sampler
    python bench/bench_rollout.py --model XL --images 2 --rollouts 0

The contenders take turns, because a machine's speed drifts by more than they differ: at every
position A B C A B C ..., then whole rollouts A B. They have the same weights (random, at the
published size), images, guidance, filters (none), dtype and threads. The floor is the matrix
products and the attention of our step alone, as the library computes them in this very run.

One row a contender is appended to --output; bench/README.md says what its fields mean.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from llamagen_peer import LlamaGenPeer, PeerMissingError
from result_rows import append_row, environment
from rollout_contenders import MODELS, Case, Contender, Floor, OurEngine
from timing import Call, Clock, Timing, clock_of, pinned_threads
from turns import OtherWork, PeakMemory, measure_in_turns, sum_between

from argrpo.environment import cpu_features, cpu_model
from argrpo.models.llamagen import LlamaGen

RESULTS = Path(__file__).parent / "results" / "rollout_cpu.jsonl"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]

# How far the peer's logits may lie from ours, relative to their size: the rounding of a forward
# pass, and in bf16 also that the peer mixes rounded logits where we mix hidden states.
_SAME_LOGITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def run(case: Case, args: argparse.Namespace) -> list[Row]:
    """Measure all that was asked for: one row a contender."""
    clock, policy = clock_of(case.device), case.policy()
    ours = OurEngine(case, policy)
    drawing: list[Contender] = [ours, *peers_of(case, policy, args.peer, args.peer_path)]
    peaks = {contender.name: peak_bytes(contender, case) for contender in drawing}
    whole: dict[str, Timing] = {}
    if args.rollouts:
        calls: dict[str, Call] = {contender.name: contender.rollout for contender in drawing}
        whole = measure_in_turns(calls, clock, warmup=0, samples=args.rollouts)
    for contender in drawing:
        contender.prepare()
    floor = Floor(case, policy, ours.cache)
    steps = measure_steps([floor, *drawing], args.positions, clock, args.samples)
    rows = rows_of(case, steps, whole, peaks)
    if args.deterministic_images:
        wider = replace(case, images=args.deterministic_images)
        rows.append(deterministic_row(wider, policy, clock, args.samples))
    return rows


def peers_of(case: Case, policy: LlamaGen, peer: str, path: Path | None) -> list[Contender]:
    """The peer, after a look at its logits; one that is not there is a printed line."""
    if peer == "none":
        return []
    try:
        found = LlamaGenPeer(case, policy, path)
    except PeerMissingError as error:
        print(f"without the peer: {error}")
        return []
    token_ids = torch.zeros(case.images, 1, dtype=torch.int64, device=case.device)
    expected = policy.logits(case.labels, token_ids, case.guidance_scale)[:, 0]
    apart = float((found.first_logits() - expected).norm() / expected.norm())
    if not apart <= _SAME_LOGITS[case.dtype]:
        raise RuntimeError(
            f"{found.name}: expected the logits of our policy within {_SAME_LOGITS[case.dtype]:g}, "
            f"got a relative difference of {apart:.2g}"
        )
    return [found]


def peak_bytes(contender: Contender, case: Case) -> int:
    """Memory of a draw beside the weights: caches, and the last step."""
    memory = PeakMemory(case.device)
    contender.prepare()
    contender.step(case.num_tokens - 1)
    return memory.taken()


def measure_steps(
    contenders: Sequence[Contender | Floor], positions: Sequence[int], clock: Clock, samples: int
) -> dict[str, dict[int, Timing]]:
    """Timings of a step by contender and position."""
    steps: dict[str, dict[int, Timing]] = {contender.name: {} for contender in contenders}
    for position in positions:
        calls = {contender.name: _step(contender, position) for contender in contenders}
        for name, timing in measure_in_turns(calls, clock, warmup=2, samples=samples).items():
            steps[name][position] = timing
    return steps


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
            "steps": [{"position": p, **_ms(timing)} for p, timing in timings.items()],
            "steps_sum_ms": round(sums[name], 1),
            "images_per_s": round(case.images / sums[name] * 1e3, 4),
            "over_floor": round(sums[name] / sums[Floor.name], 3),
            "over_ours": round(sums[name] / sums[ours], 3),
        }
        if name in whole:
            row["rollout"] = _ms(whole[name])
            row["rollout_over_ours"] = round(whole[name].p50_us / whole[ours].p50_us, 3)
        if name in peaks:
            row["peak_mb"] = round(peaks[name] / 1e6, 1)
        rows.append(row)
    return rows


def deterministic_row(case: Case, policy: LlamaGen, clock: Clock, samples: int) -> Row:
    """What `deterministic=True` costs: time an image, over that of one wave of all images."""
    wide, fixed = OurEngine(case, policy), OurEngine(case, policy, deterministic=True)
    position = case.num_tokens // 2
    for engine in (wide, fixed):
        engine.prepare()
    calls = {"wide": _step(wide, position), "fixed": _step(fixed, position)}
    timings = measure_in_turns(calls, clock, warmup=2, samples=samples)
    waves = -(-case.images // fixed.engine.num_slots)
    return {
        "contender": f"{OurEngine.name} deterministic=True",
        "images": case.images,
        "images_a_wave": fixed.engine.num_slots,
        "steps": [{"position": position, **_ms(timings["fixed"])}],
        "over_ours": round(waves * timings["fixed"].p50_us / timings["wide"].p50_us, 3),
    }


def table(rows: Sequence[Row]) -> str:
    """Positions down, contenders across, then what they sum up to."""
    across = [row for row in rows if "steps_sum_ms" in row]

    def line(label: str, cells: Sequence[object]) -> str:
        return f"{label:>20}" + "".join(f"{cell:>12}" for cell in cells)

    lines = [line("", [row["contender"] for row in across])]
    for i, step in enumerate(across[0]["steps"]):
        label = f"step {step['position']}, ms"
        lines.append(line(label, [f"{row['steps'][i]['p50_ms']:.2f}" for row in across]))
    for field in (
        "steps_sum_ms", "images_per_s", "over_floor", "over_ours", "rollout_over_ours", "peak_mb",
    ):  # fmt: skip
        if any(field in row for row in across):
            lines.append(line(field, [row.get(field, "") for row in across]))
    lines += [
        f"{row['contender']}, {row['images']} images: {row['over_ours']} times the time"
        for row in rows
        if row not in across
    ]
    return "\n".join(lines)


def facts_of(case: Case, threads: int) -> Row:
    """What all rows of a run have in common."""
    facts: Row = {
        "bench": "rollout",
        "work": "a step draws one token an image, unfiltered; ours adds its log-prob and entropy",
        "weights": "random, the same for all",
        "model": case.model,
        "image_size": case.image_size,
        "images": case.images,
        "tokens": case.num_tokens,
        "guidance_scale": case.guidance_scale,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": threads,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **environment(case.device),
    }
    if case.device.type == "cpu":
        facts |= {"device": cpu_model(), "cpu_features": " ".join(cpu_features())}
    return facts


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", choices=list(MODELS), default="B")
    add("--image_size", type=int, default=256, help="pixels a side, a multiple of 16")
    add("--images", type=int, default=8, help="drawn at a time")
    add("--guidance_scale", type=float, default=2.0, help="1 turns guidance off")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    add("--positions", type=int, nargs="+", help="tokens to time; default 1, quarters and the last")
    add("--samples", type=int, default=15, help="timed steps at each position")
    add("--rollouts", type=int, default=1, help="whole rollouts of each contender; 0 skips them")
    add("--deterministic_images", type=int, default=32, help="to show its cost on; 0 skips it")
    add("--peer", choices=["none", "llamagen"], default="none")
    add("--peer_path", type=Path, help="a checkout of the peer's repository")
    add("--output", type=Path, default=RESULTS, help="rows are appended here")
    args = parser.parse_args(argv)
    num_tokens = (args.image_size // 16) ** 2
    if args.positions is None:
        quarters = {num_tokens * part // 4 for part in (1, 2, 3)}
        args.positions = sorted({1, *quarters, num_tokens - 1})
    outside = [position for position in args.positions if not 1 <= position < num_tokens]
    if outside:
        parser.error(f"--positions: expected 1 to {num_tokens - 1}, got {outside[0]}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    case = Case(
        model=args.model,
        image_size=args.image_size,
        images=args.images,
        guidance_scale=args.guidance_scale,
        dtype=DTYPES[args.dtype],
        device=args.device,
    )
    with pinned_threads(args.threads):
        facts, others = facts_of(case, args.threads), OtherWork()
        rows = run(case, args)
        facts["others_busy_cores"] = round(others.busy_cores(), 2)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(table(rows))
    for row in rows:
        append_row(args.output, {**facts, **row})


def _step(contender: Contender | Floor, position: int) -> Call:
    return lambda: contender.step(position)


def _ms(timing: Timing) -> dict[str, float | int]:
    return {
        "p20_ms": round(timing.p20_us / 1e3, 3),
        "p50_ms": round(timing.p50_us / 1e3, 3),
        "p80_ms": round(timing.p80_us / 1e3, 3),
        "samples": timing.samples,
    }


if __name__ == "__main__":
    main()
