"""Judges in batches against one image at a time, pixels without Pillow, a step with a slow server.

    python bench/bench_rewards.py                                         a CPU, few images
    python bench/bench_rewards.py --device cuda --only judges
    python bench/bench_rewards.py --only step --latency_s 2

judges: CLIP (ViT-B/32, ViT-L/14), HPSv2 (ViT-H/14) and MANIQA at their published sizes with random
weights, all images in a batch and one at a time, the same code and weights. pixels: from the
decoder's floats to what a tower takes, as one tensor and as one Pillow picture after another. step:
a training step with a judge behind a server that answers each image after --latency_s, with and
without drawing the next step ahead, and the same step without the judge. What is compared takes
turns; a row a contender is appended to --output. A judge whose batch does not give the scores of
single images is not timed, and the script ends with 1.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from result_rows import Row, append_row, environment, rows_like
from reward_cases import (
    TOWERS,
    judge_calls,
    make_maniqa,
    make_tower_judge,
    make_trainer,
    pixel_calls,
    save_models,
    slow_server,
    take_step,
)
from rollout_contenders import MODELS, Case
from rollout_rows import milliseconds
from timing import Timing, clock_of, pinned_threads
from torch import Tensor
from turns import OtherWork, measure_in_turns, timing_of

from argrpo.environment import cpu_features, cpu_model
from argrpo.rewards.protocols import Reward

RESULTS = Path(__file__).parent / "results"
FAMILIES = ("judges", "pixels", "step")
JUDGES = (*TOWERS, "maniqa")
TOWER_SIZE = 224  # pixels a side
# Products of other batches sum in another order. Cosines of random towers, and MANIQA's averages,
# are of the order of 1; bf16 has 8 bits.
_SAME_SCORES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Two of 255 levels, over the smallest deviation of a channel: see rewards/tower_pixels.py.
_SAME_PIXELS = 0.031


class WrongScoresError(Exception):
    """Two ways that should agree do not; nothing is timed."""


def judge_rows(args: argparse.Namespace, name: str, folder: Path) -> list[Row]:
    """A judge, batched and one at a time."""
    count = args.judge_images if name == "clip_b32" else args.large_images
    images = torch.rand(count, 3, args.image_size, args.image_size, device=args.device)
    calls = judge_calls(_judge(args, name, count, folder), images)
    difference = (calls["batched"]() - calls["one_at_a_time"]()).abs().max().item()
    if not difference <= _SAME_SCORES[args.dtype]:
        raise WrongScoresError(f"{name}: batched scores are off by {difference:.2g}")
    facts: Row = {"judge": name, "images": count, "error": difference}
    if name == "maniqa":
        facts["crops"] = args.crops
    return _compared("judges", calls, facts, args, "one_at_a_time")


def pixel_rows(args: argparse.Namespace) -> list[Row]:
    """Resizing, cropping and normalising for a tower of 224 pixels."""
    calls = pixel_calls(smooth_images(args.images, args.image_size, args.device), TOWER_SIZE)
    difference = (calls["tensor"]().cpu() - calls["pillow"]()).abs().max().item()
    if not difference <= _SAME_PIXELS:
        raise WrongScoresError(f"pixels: tensors and pictures differ by {difference:.2g}")
    facts: Row = {"images": args.images, "size": TOWER_SIZE, "error": difference}
    return _compared("pixels", calls, facts, args, "pillow")


def smooth_images(count: int, size: int, device: torch.device) -> Tensor:
    """[N, 3, size, size], smooth as pictures are: where bicubic weights leave [0, 1], as in white
    noise, Pillow clips."""
    noise = torch.rand(count, 3, size, size, device=device)
    return torch.nn.functional.avg_pool2d(noise, 9, stride=1, padding=4)


def step_rows(args: argparse.Namespace, folder: Path) -> list[Row]:
    """A training step with a slow server among its judges, and without.

    A turn is two steps, of which the second counts: a server must not answer what was drawn ahead
    while another contender has its turn.
    """
    case = Case(
        model=args.model,
        image_size=args.step_image_size,
        images=args.images,
        guidance_scale=2.0,
        dtype=args.dtype,
        device=args.device,
    )
    save_models(case, folder)
    with slow_server(args.latency_s) as url:
        trainers = {
            "without_server": make_trainer(case, folder, args.slots, None),
            "with_server": make_trainer(case, folder, args.slots, url),
            "drawn_ahead": make_trainer(case, folder, args.slots, url, draw_ahead=True),
        }
        taken: dict[str, list[float]] = {name: [] for name in trainers}
        phases: dict[str, Row] = {}
        for turn in range(args.samples + 1):
            for name, trainer in trainers.items():
                take_step(trainer, 2 * turn)
                found = take_step(trainer, 2 * turn + 1)
                phases[name] = {k: round(v, 3) for k, v in found.items() if k.startswith("time/")}
                if found.get("rewards/vlm_rubric/failures", 0.0):
                    raise WrongScoresError("step: the server's judge did not score all images")
                if turn:  # the first one compiles, allocates and connects
                    taken[name].append(found["step_time"] * 1e6)
    timings = {name: timing_of(values) for name, values in taken.items()}
    facts: Row = {
        "images": args.images,
        "model": args.model,
        "step_image_size": args.step_image_size,
        "slots": args.slots,
        "latency_s": args.latency_s,
    }
    return [
        {**row, "phases": phases[row["contender"]]}
        for row in _rows("step", timings, facts, "without_server")
    ]


def _compared(
    family: str,
    calls: dict[str, Callable[[], Tensor]],
    facts: Row,
    args: argparse.Namespace,
    slow: str,
) -> list[Row]:
    clock = clock_of(args.device)
    timings = measure_in_turns(calls, clock, warmup=1, samples=args.samples)
    return _rows(family, timings, facts, slow)


def _rows(family: str, timings: dict[str, Timing], facts: Row, base: str) -> list[Row]:
    """A row a contender; `times_faster` is the base's time over its own."""
    return [
        {
            "family": family,
            "contender": name,
            **facts,
            **milliseconds(timing),
            "times_faster": round(timings[base].p50_us / timing.p50_us, 3),
            f"over_{base}": round(timing.p50_us / timings[base].p50_us, 3),
        }
        for name, timing in timings.items()
    ]


def _judge(args: argparse.Namespace, name: str, count: int, folder: Path) -> Reward:
    if name in TOWERS:
        return make_tower_judge(name, count, args.device, args.dtype)
    return make_maniqa(count, args.device, args.dtype, num_crops=args.crops, folder=folder)


def facts_of(args: argparse.Namespace) -> Row:
    """What all rows of a run have in common."""
    facts: Row = {
        "bench": "rewards",
        "weights": "random",
        "image_size": args.image_size,
        "dtype": str(args.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **environment(args.device),
    }
    if args.device.type == "cpu":
        facts |= {"device": cpu_model(), "cpu_features": " ".join(cpu_features())}
        facts["threads"] = args.threads
    return facts


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--only", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    add("--judges", choices=JUDGES, nargs="*", default=list(JUDGES))
    add("--images", type=int, default=64)
    add("--judge_images", type=int, help="of CLIP ViT-B/32; 64 on a GPU, 16 on a CPU")
    add("--large_images", type=int, help="of the large judges; 64 on a GPU, 2 on a CPU")
    add("--crops", type=int, help="of MANIQA; 20 on a GPU, 1 on a CPU")
    add("--image_size", type=int, default=256, help="pixels a side of judged images")
    add("--model", choices=list(MODELS), help="of the step; XL on a GPU, small on a CPU")
    add("--step_image_size", type=int, help="of the step; 256 on a GPU, 64 on a CPU")
    add("--slots", type=int, help="images drawn at a time in the step; 64 on a GPU, 16 on a CPU")
    add("--latency_s", type=float, default=2.0, help="of the server")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="on a CPU")
    add("--samples", type=int, default=3, help="timed turns")
    add("--output", type=Path, help="rows are appended here")
    add("--resume", action="store_true", help="leave out what this code has measured here")
    args = parser.parse_args(argv)
    gpu = args.device.type == "cuda"
    args.dtype = torch.bfloat16 if gpu else torch.float32
    args.judge_images = args.judge_images or (64 if gpu else 16)
    args.large_images = args.large_images or (64 if gpu else 2)
    args.crops = args.crops or (20 if gpu else 1)
    args.model = args.model or ("XL" if gpu else "small")
    args.step_image_size = args.step_image_size or (256 if gpu else 64)
    args.slots = args.slots or (64 if gpu else 16)
    args.output = args.output or RESULTS / f"rewards_{'gpu' if gpu else 'cpu'}.jsonl"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    is_wrong = False
    pinned = pinned_threads(args.threads) if args.device.type == "cpu" else nullcontext()
    with pinned, tempfile.TemporaryDirectory() as name:
        folder, facts = Path(name), facts_of(args)
        known = rows_like(args.output, facts) if args.resume else []
        done = {(row["family"], row.get("judge")) for row in known}
        works: list[tuple[str, str | None, Callable[[], list[Row]]]] = [
            ("pixels", None, lambda: pixel_rows(args)),
            ("step", None, lambda: step_rows(args, folder)),
            *(("judges", j, partial(judge_rows, args, j, folder)) for j in args.judges),
        ]
        for family, judge, work in works:
            if family not in args.only or (family, judge) in done:
                continue
            others = OtherWork()
            try:
                rows = work()
            except WrongScoresError as error:
                print(f"wrong, not timed: {error}", flush=True)
                is_wrong = True
                continue
            busy = {"others_busy_cores": round(others.busy_cores(), 2)}
            for row in rows:
                print(", ".join(f"{k} {v}" for k, v in row.items() if k != "phases"), flush=True)
                append_row(args.output, {**facts, **row, **busy})
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
