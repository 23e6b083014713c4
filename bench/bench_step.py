"""One whole training step, split by phase: ours beside AR-GRPO's arithmetic in plain PyTorch.

    python bench/bench_step.py                                     B at 128 px, 4 images
    python bench/bench_step.py --peer argrpo --peer_path DIR       beside AR-GRPO's own code
    python bench/bench_step.py --device cuda --models XL --image_size 384 --images 32 \
        --judges clip hpsv2

A step draws, decodes, scores, compares and learns, as the published class-conditional run does:
guidance 2 when drawing, conditional log-probs, KL weight .1, one update. Contenders have the same
weights, classes, judges and dtype, and take turns step by step. Before anything is timed a peer's
logits, log-probs, gradients, pixels and scores are compared with ours. One row a contender is
appended to --output after each case; bench/README.md says what its fields mean.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from argrpo_peer import CheckoutStep
from plain_path import PlainLlamaGen, PlainStep
from result_rows import Row, append_row, environment, rows_like
from rollout_contenders import MODELS, Case
from rollout_peers import or_a_line
from step_case import TOKENIZERS, TOWERS, Judges, StepCase, StepContender
from step_checks import differences
from step_ours import OurStep
from timing import clock_named, pinned_threads
from turns import OtherWork, PeakMemory, kept_heap, timing_of

from argrpo.environment import cpu_features, cpu_model
from argrpo.models.llamagen import LlamaGen
from argrpo.models.vq import VQTokenizer
from argrpo.step_clock import PHASES

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEERS = ("plain", "argrpo")

Samples = dict[str, list[dict[str, float]]]  # by contender, one record a step


def measured_case(case: StepCase, args: argparse.Namespace) -> list[Row]:
    """One row a contender."""
    policy = case.draw.policy()
    tokenizer, judges = case.make_tokenizer(), case.make_judges()
    # Before ours, whose optimizer moves the weights that peers start from.
    peers = []
    for name in args.peer:
        make = partial(make_peer, name, case, policy, tokenizer, judges, args.peer_path)
        peer = or_a_line(name, make)
        if peer is not None:
            peers.append(peer)
    policy.requires_grad_(True)
    apart = {peer.name: differences(case, policy, tokenizer, judges, peer) for peer in peers}
    ours = OurStep(case, policy, tokenizer, judges)
    contenders: list[StepContender] = [ours, *peers]
    samples, peaks = measure(contenders, case, args.warmup, args.samples)
    facts = {one.name: {**one.facts, **apart.get(one.name, {})} for one in contenders}
    rows = rows_of(samples, peaks, case.draw.images)
    return [row | facts[row["contender"]] for row in rows]


def make_peer(
    name: str,
    case: StepCase,
    policy: LlamaGen,
    tokenizer: VQTokenizer,
    judges: Judges,
    path: Path | None,
) -> PlainStep:
    """A contender of `PEERS`, with the weights of the policy as they are now."""
    if name == "argrpo":
        return CheckoutStep(case, policy, tokenizer, judges, path)
    models = PlainLlamaGen(case, policy, trained=True), PlainLlamaGen(case, policy, trained=False)
    return PlainStep("plain", case, models, tokenizer, judges)


def measure(
    contenders: Sequence[StepContender], case: StepCase, warmup: int, samples: int
) -> tuple[Samples, dict[str, int]]:
    """Steps in turns, A B C A B C, and the memory that the first step of each took."""
    taken: Samples = {one.name: [] for one in contenders}
    peaks = {}
    for turn in range(warmup + samples):
        for one in contenders:
            memory = PeakMemory(case.draw.device)
            seconds = one.run(seed=turn)
            peaks.setdefault(one.name, memory.taken())
            if turn >= warmup:
                taken[one.name].append(seconds)
    return taken, peaks


def rows_of(samples: Samples, peaks: Mapping[str, int], images: int) -> list[Row]:
    """Medians of the step and of each phase, beside ours."""
    medians = {
        name: {
            field: timing_of([record[field] * 1e6 for record in records])
            for field in ("step_time", *(f"time/{phase}" for phase in PHASES))
        }
        for name, records in samples.items()
    }
    ours = medians[OurStep.name]
    rows = []
    for name, timings in medians.items():
        step = timings["step_time"]
        row: Row = {
            "contender": name,
            "p20_ms": round(step.p20_us / 1e3, 2),
            "p50_ms": round(step.p50_us / 1e3, 2),
            "p80_ms": round(step.p80_us / 1e3, 2),
            "samples": step.samples,
            "images_per_s": round(images / step.p50_us * 1e6, 4),
            "over_ours": round(step.p50_us / ours["step_time"].p50_us, 3),
            "peak_mb": round(peaks[name] / 1e6, 1),
        }
        for phase in PHASES:
            timing = timings[f"time/{phase}"]
            row[f"{phase}_ms"] = round(timing.p50_us / 1e3, 2)
            row[f"{phase}_over_ours"] = round(timing.p50_us / ours[f"time/{phase}"].p50_us, 3)
        rows.append(row)
    return rows


def facts_of(case: StepCase, args: argparse.Namespace) -> Row:
    """What all rows of a case have in common."""
    draw = case.draw
    facts: Row = {
        "bench": "step",
        "case": case.name,
        "work": "draw, decode, score, reference, one update; the same classes, judges and dtype",
        "weights": "random, the same for all",
        "model": draw.model,
        "image_size": draw.image_size,
        "images": draw.images,
        "group": case.group,
        "micro_batch": case.micro_batch,
        "guidance_scale": draw.guidance_scale,
        "tokenizer": case.tokenizer,
        "judges": list(case.judges),
        "peers": sorted(args.peer),
        "dtype": str(draw.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **environment(draw.device),
    }
    if draw.device.type == "cpu":
        facts |= {"device": cpu_model(), "cpu_features": " ".join(cpu_features())}
        facts |= {"threads": args.threads, "clock": args.clock}
    return facts


def table(rows: Sequence[Row]) -> str:
    """Contenders down, phases across, in ms."""
    names = [*PHASES, "step"]
    lines = [f"{'ms':14}" + "".join(f"{name:>11}" for name in names) + f"{'x ours':>9}{'MB':>9}"]
    for row in rows:
        cells = [row[f"{phase}_ms"] for phase in PHASES] + [row["p50_ms"]]
        lines.append(
            f"{row['contender']:14}"
            + "".join(f"{cell:>11.1f}" for cell in cells)
            + f"{row['over_ours']:>9.2f}{row['peak_mb']:>9.0f}"
        )
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=["B"], help="published sizes")
    add("--image_size", type=int, help="pixels a side, 16 a token; 256 on a GPU, 128 on a CPU")
    add("--images", type=int, nargs="+", help="of a step; 32 on a GPU, 4 on a CPU")
    add("--group", type=int, help="images of a class; 8, or all images where they are fewer")
    add("--micro_batch", type=int, default=8, help="images of a forward and backward pass")
    add("--guidance_scale", type=float, default=2.0, help="of the draw; 1 turns it off")
    add("--judges", nargs="+", choices=list(TOWERS), default=["clip"])
    add("--tokenizer", choices=list(TOKENIZERS), default="VQ-16")
    add("--dtype", choices=list(DTYPES), help="bfloat16 on a GPU, float32 on a CPU")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="on a CPU")
    add("--clock", choices=["wall", "process"], default="wall", help="process: one thread's CPU")
    add("--warmup", type=int, help="steps that are not counted: 2 on a GPU, 0 on a CPU")
    add("--samples", type=int, help="steps that are: 5 on a GPU, 2 on a CPU")
    add("--peer", nargs="+", choices=["none", *PEERS], default=["plain"])
    add("--peer_path", type=Path, help="a checkout of AR-GRPO's repository, for argrpo")
    add("--output", type=Path, help="rows are appended here")
    add("--resume", action="store_true", help="leave out cases with rows of this commit in output")
    args = parser.parse_args(argv)
    gpu = args.device.type == "cuda"
    args.dtype = DTYPES[args.dtype or ("bfloat16" if gpu else "float32")]
    args.images = args.images or [32 if gpu else 4]
    args.image_size = args.image_size or (256 if gpu else 128)
    args.samples = args.samples or (5 if gpu else 2)
    args.warmup = (2 if gpu else 0) if args.warmup is None else args.warmup
    args.output = args.output or RESULTS / f"step_{'gpu' if gpu else 'cpu'}.jsonl"
    args.peer = [name for name in args.peer if name != "none"]
    try:
        clock_named(args.clock, args.device, args.threads)
    except ValueError as error:
        parser.error(str(error))
    for images in args.images:
        group = args.group or min(8, images)
        if images < 2 or group < 2 or images % group:
            parser.error(f"--images: expected a multiple of the group of {group}, got {images}")
    return args


def cases_of(args: argparse.Namespace) -> list[StepCase]:
    draw = partial(
        Case,
        image_size=args.image_size,
        guidance_scale=args.guidance_scale,
        dtype=args.dtype,
        device=args.device,
    )
    return [
        StepCase(
            draw=draw(model=model, images=images),
            group=args.group or min(8, images),
            micro_batch=args.micro_batch,
            judges=tuple(args.judges),
            tokenizer=args.tokenizer,
            clock=args.clock,
        )
        for model in args.models
        for images in args.images
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    on_cpu = args.device.type == "cpu"
    with pinned_threads(args.threads) if on_cpu else nullcontext(), kept_heap():
        for case in cases_of(args):
            facts = facts_of(case, args)
            if args.resume and is_measured(args.output, facts):
                continue
            others, rows = OtherWork(), measured_case(case, args)
            facts["others_busy_cores"] = round(others.busy_cores(), 2)
            print(", ".join(f"{name} {value}" for name, value in facts.items()))
            print(table(rows), flush=True)
            for row in rows:
                append_row(args.output, {**facts, **row})


def is_measured(path: Path, facts: Row) -> bool:
    """Whether a case has rows of this commit, machine, dtype and peers already."""
    same = ("case", "dtype", "peers", "group", "micro_batch")
    return any(all(row.get(key) == facts[key] for key in same) for row in rows_like(path, facts))


if __name__ == "__main__":
    main()
