"""Milliseconds a step and images a second: our engine, the floor of a step, a peer, in one run.

    python bench/bench_rollout.py
    python bench/bench_rollout.py --peer static_cache hf_static      beside loops of plain PyTorch
    python bench/bench_rollout.py --peer llamagen --peer_path DIR    beside LlamaGen's own sampler
    python bench/bench_rollout.py --models B XL 3B --images 8 64 128 --guidance_scale 2 1
    python bench/bench_rollout.py --models XL --text_tokens 120 --peer static_cache

The contenders take turns, because a machine's speed drifts by more than they differ: at every
position A B C A B C ..., then whole rollouts A B. They have the same weights (random, at the
published size; a row says where not), images, guidance, filters (none), dtype and threads. The
floor is the matrix products and the attention of our step alone, as the library computes them in
this very run; the limit is what the bytes and operations of a step take at the rates that this run
measures first.

Every model, image size, number of images and guidance scale is a case. After each, one row a
contender is appended to --output; bench/README.md says what its fields mean.
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch
from result_rows import Row, append_row, environment, rows_like
from rollout_contenders import MODELS, Case, Contender, Floor, OurEngine
from rollout_peers import PEERS, Peer, forget_compiled, measured_peaks, peak_bytes, peers_of
from rollout_rows import milliseconds, rows_of, table, with_limits
from timing import Call, Ceilings, Clock, Timing, ceilings_of, clock_named, pinned_threads
from turns import OtherWork, kept_heap, measure_in_turns

from argrpo.environment import cpu_features, cpu_model
from argrpo.models.llamagen import LlamaGen

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measured_case(
    case: Case, policy: LlamaGen, ceilings: Ceilings, args: argparse.Namespace
) -> tuple[list[Row], float]:
    """The rows of a case, and how many cores worked for others meanwhile."""
    if args.peer:
        forget_compiled(case.device)
    # Before the others' work is counted: a compiler's processes would be among them.
    peers = peers_of(case, policy, args.peer, args.peer_path)
    others = OtherWork()
    return run(case, policy, peers, ceilings, args), others.busy_cores()


def run(
    case: Case,
    policy: LlamaGen,
    peers: Sequence[Peer],
    ceilings: Ceilings,
    args: argparse.Namespace,
) -> list[Row]:
    """Measure one case: one row a contender."""
    clock = clock_named(args.clock, case.device, args.threads)
    ours = OurEngine(case, policy)
    peaks = {ours.name: peak_bytes(ours, case)} | measured_peaks(peers, case)
    peers = [peer for peer in peers if peer.name in peaks]
    drawing: list[Contender] = [ours, *peers]
    whole: dict[str, Timing] = {}
    if args.rollouts:
        calls: dict[str, Call] = {contender.name: contender.rollout for contender in drawing}
        # A first draw on a GPU compiles and captures.
        warmup = 1 if case.device.type == "cuda" else 0
        whole = measure_in_turns(calls, clock, warmup=warmup, samples=args.rollouts)
    for contender in drawing:
        contender.prepare()
    positions = args.positions or default_positions(case)
    steps = measure_steps([Floor(case, policy), *drawing], positions, clock, args.samples)
    for contender in drawing:
        contender.finish()
    facts = {peer.name: peer.facts for peer in peers}
    rows = with_limits(case, ceilings, rows_of(case, steps, whole, peaks))
    rows = [row | facts.get(row["contender"], {}) for row in rows]
    if args.deterministic_images:
        wider = replace(case, images=args.deterministic_images)
        rows.append(deterministic_row(wider, policy, clock, args.samples))
    return rows


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
        "steps": [{"position": position, **milliseconds(timings["fixed"])}],
        "over_ours": round(waves * timings["fixed"].p50_us / timings["wide"].p50_us, 3),
    }


def facts_of(case: Case, ceilings: Ceilings, args: argparse.Namespace) -> Row:
    """What all rows of a run have in common."""
    facts: Row = {
        "bench": "rollout",
        "work": "a step draws one token an image, unfiltered; ours adds its log-prob and entropy",
        "weights": "random, the same for all",
        "model": case.model,
        "image_size": case.image_size,
        "text_tokens": case.text_tokens,
        "peers": sorted(args.peer),
        "images": case.images,
        "tokens": case.num_tokens,
        "guidance_scale": case.guidance_scale,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "dtype": str(case.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "limit_gb_per_s": round(ceilings.bytes_per_second / 1e9, 1),
        "limit_tflops": round(ceilings.flops_per_second / 1e12, 3),
        **environment(case.device),
    }
    if case.device.type == "cpu":
        facts |= {"device": cpu_model(), "cpu_features": " ".join(cpu_features())}
        facts |= {"threads": args.threads, "clock": args.clock}
    return facts


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=["B"], help="published sizes")
    add("--image_size", type=int, nargs="+", default=[256], help="pixels a side, 16 a token")
    add("--text_tokens", type=int, default=0, help="of a text prefix; 0 draws classes")
    add("--images", type=int, nargs="+", default=[8], help="drawn at a time")
    add("--guidance_scale", type=float, nargs="+", default=[2.0], help="1 turns guidance off")
    add("--dtype", choices=list(DTYPES), help="bfloat16 on a GPU, float32 on a CPU")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="on a CPU")
    add("--clock", choices=["wall", "process"], default="wall", help="process: one thread's CPU")
    add("--positions", type=int, nargs="+", help="tokens to time; default 1, quarters and the last")
    add("--samples", type=int, default=15, help="timed steps at each position")
    add("--rollouts", type=int, default=1, help="whole rollouts of each contender; 0 skips them")
    add("--deterministic_images", type=int, help="to show its cost on: 32 on a CPU, else 0 (skip)")
    add("--peer", nargs="+", choices=["none", *PEERS], default=["none"])
    add("--peer_path", type=Path, help="a checkout of LlamaGen's repository")
    add("--output", type=Path, help="rows are appended here")
    add("--resume", action="store_true", help="leave out cases with rows of this commit in output")
    args = parser.parse_args(argv)
    gpu = args.device.type == "cuda"
    args.dtype = DTYPES[args.dtype or ("bfloat16" if gpu else "float32")]
    args.output = args.output or RESULTS / f"rollout_{'gpu' if gpu else 'cpu'}.jsonl"
    if args.deterministic_images is None:
        args.deterministic_images = 0 if gpu else 32
    args.peer = [name for name in args.peer if name != "none"]
    num_tokens = min((image_size // 16) ** 2 for image_size in args.image_size)
    outside = [position for position in args.positions or () if not 1 <= position < num_tokens]
    if outside:
        parser.error(f"--positions: expected 1 to {num_tokens - 1}, got {outside[0]}")
    return args


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Those of a model follow each other, so that its weights are made once."""
    return [
        Case(
            model=model,
            image_size=image_size,
            images=images,
            guidance_scale=guidance_scale,
            dtype=args.dtype,
            device=args.device,
            text_tokens=args.text_tokens,
        )
        for model in args.models
        for image_size in args.image_size
        for guidance_scale in args.guidance_scale
        for images in args.images
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    on_cpu = args.device.type == "cpu"
    with pinned_threads(args.threads) if on_cpu else nullcontext(), kept_heap():
        clock = clock_named(args.clock, args.device, args.threads)
        ceilings = ceilings_of(args.device, args.dtype, clock)
        for _policy, cases in groupby(cases_of(args), key=attrgetter("model", "image_size")):
            policy: LlamaGen | None = None
            for case in cases:
                facts = facts_of(case, ceilings, args)
                if args.resume and is_measured(args.output, facts):
                    continue
                policy = case.policy() if policy is None else policy
                rows, busy_cores = measured_case(case, policy, ceilings, args)
                facts["others_busy_cores"] = round(busy_cores, 2)
                print(", ".join(f"{name} {value}" for name, value in facts.items()))
                print(table(rows), flush=True)
                for row in rows:
                    append_row(args.output, {**facts, **row})


def default_positions(case: Case) -> list[int]:
    """The first step, the quarters and the last."""
    quarters = {case.num_tokens * part // 4 for part in (1, 2, 3)}
    return sorted({1, *quarters, case.num_tokens - 1})


def is_measured(path: Path, facts: Row) -> bool:
    """Whether a case has rows of this commit, machine and dtype already."""
    same = ("model", "image_size", "text_tokens", "images", "guidance_scale", "dtype", "peers")
    return any(all(row.get(key) == facts[key] for key in same) for row in rows_like(path, facts))


def _step(contender: Contender | Floor, position: int) -> Call:
    return lambda: contender.step(position)


if __name__ == "__main__":
    main()
