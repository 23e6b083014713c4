"""Slots in lockstep against slots in cohorts, at one budget of bytes for keys and values.

    python bench/bench_slots.py                                   a small policy in plain PyTorch
    python bench/bench_slots.py --device cuda --model XL --lockstep_slots 64

A slot in lockstep holds all pages of a finished image from the start of its wave to the end.
Cohorts start some pages after each other, hold about half as many on average, and so run more
slots within the same bytes; the later ones start later. Both draw the same images, 1, 4 and 8 times
as many as the slots that fit in lockstep, in turns; a row each goes to --output.
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from result_rows import Row, append_row, environment
from rollout_contenders import MODELS, Case
from rollout_rows import milliseconds
from timing import clock_of, pinned_threads
from turns import OtherWork, PeakMemory, measure_in_turns

from argrpo.engine.cache_plan import CachePlan, plan_cache
from argrpo.engine.rollout import Rollout
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.schedule import count_steps
from argrpo.environment import cpu_features, cpu_model
from argrpo.models.llamagen import LlamaGen

RESULTS = Path(__file__).parent / "results"
_BRANCHES = 2  # the draws are guided, as the plan of a cache expects
_MOST_TIMES = 2  # no layout runs more slots than this many times those in lockstep


class Layout:
    """An engine whose slots are laid out one way within the budget."""

    def __init__(
        self, name: str, policy: LlamaGen, max_slots: int, page_size: int, kv_bytes: int
    ) -> None:
        self.name = name
        # The engine plans for itself; this is the same plan, to say what it holds.
        self.plan: CachePlan = plan_cache(
            policy.shape,
            max_slots=max_slots,
            page_size=page_size,
            itemsize=policy.head_weight.dtype.itemsize,
            kv_bytes=kv_bytes,
        )
        self.engine = RolloutEngine(
            policy, max_slots=max_slots, page_size=page_size, kv_bytes=kv_bytes, paged=True
        )
        assert self.engine.num_slots == self.plan.num_slots

    def draw(self, case: Case) -> Rollout:
        """All images of a case, seed 0; the accounts balance afterwards."""
        rollout = self.engine.draw(case.conditions, case.params, seed=0)
        self.engine.check()
        assert self.engine.num_held_pages == 0
        return rollout

    def facts(self, num_images: int) -> Row:
        """What it holds, and how it draws so many images."""
        plan = self.plan
        used = plan.best_layout(num_images, _BRANCHES, lockstep_only=False)
        return {
            "layout": self.name,
            "slots": plan.num_slots,
            "cohorts": plan.layout.num_cohorts,
            "pages": plan.num_pages,
            "pool_mb": round(plan.pool_bytes / 1e6, 3),
            "used_slots": used.num_slots,
            "used_cohorts": used.num_cohorts,
            "steps": count_steps(used, num_images),
        }


def layouts_of(policy: LlamaGen, lockstep_slots: int, page_size: int) -> tuple[list[Layout], int]:
    """Both layouts within the bytes of so many slots in lockstep, and these bytes."""
    wave = plan_cache(
        policy.shape,
        max_slots=lockstep_slots,
        page_size=page_size,
        itemsize=policy.head_weight.dtype.itemsize,
    )
    asked = {"lockstep": lockstep_slots, "cohorts": _MOST_TIMES * lockstep_slots}
    budget = wave.pool_bytes
    return [Layout(name, policy, most, page_size, budget) for name, most in asked.items()], budget


def measured(case: Case, policy: LlamaGen, args: argparse.Namespace) -> list[Row]:
    """A row a layout: its peak at the first draw, then its time over draws in turns."""
    layouts, budget = layouts_of(policy, args.lockstep_slots, args.page_size)
    drawn: list[Rollout] = []
    peaks = []
    for layout in layouts:
        memory = PeakMemory(case.device)
        drawn.append(layout.draw(case))
        peaks.append(memory.taken())
    calls = {layout.name: partial(layout.draw, case) for layout in layouts}
    timings = measure_in_turns(calls, clock_of(case.device), warmup=0, samples=args.samples)
    lockstep = timings[layouts[0].name]
    # Draws of other slot counts round differently, so that now and then a tie falls the other way.
    same = (drawn[0].token_ids == drawn[1].token_ids).all(dim=1).float().mean()
    return [
        {
            "budget_mb": round(budget / 1e6, 3),
            "images": case.images,
            **layout.facts(case.images),
            "peak_mb": round(peak / 1e6, 1),
            **milliseconds(timings[layout.name]),
            "images_per_s": round(case.images / timings[layout.name].p50_us * 1e6, 4),
            "over_lockstep": round(timings[layout.name].p50_us / lockstep.p50_us, 3),
            "same_images": round(float(same), 4),
        }
        for layout, peak in zip(layouts, peaks, strict=True)
    ]


def facts_of(case: Case, args: argparse.Namespace) -> Row:
    """What all rows of a run have in common."""
    on_cpu = case.device.type == "cpu"
    facts: Row = {
        "bench": "slots",
        "work": "guided draws of whole images, unfiltered, with log-probs and entropies",
        "path": "paged reference in plain PyTorch" if on_cpu else "kernels, steps as CUDA graphs",
        "weights": "random",
        "model": case.model,
        "image_size": case.image_size,
        "tokens": case.num_tokens,
        "page_size": args.page_size,
        "guidance_scale": case.guidance_scale,
        "dtype": str(case.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **environment(case.device),
    }
    if on_cpu:
        facts |= {"device": cpu_model(), "cpu_features": " ".join(cpu_features())}
        facts["threads"] = args.threads
    return facts


def table(rows: Sequence[Row]) -> str:
    """A line a row."""
    fields = (
        "images", "layout", "slots", "used_cohorts", "pages", "pool_mb", "peak_mb", "steps",
        "images_per_s", "over_lockstep", "same_images",
    )  # fmt: skip
    lines = ["".join(f"{field:>14}" for field in fields)]
    lines += ["".join(f"{row[field]:>14}" for field in fields) for row in rows]
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", choices=list(MODELS), help="XL on a GPU, small on a CPU")
    add("--image_size", type=int, help="pixels a side; 256 on a GPU, 128 on a CPU")
    add("--page_size", type=int, help="positions of a page; 64 on a GPU, 16 on a CPU")
    add("--lockstep_slots", type=int, help="what the budget holds; 64 on a GPU, 8 on a CPU")
    add("--times", type=int, nargs="+", default=[1, 4, 8], help="images over these slots")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="on a CPU")
    add("--samples", type=int, default=3, help="timed draws of each layout")
    add("--output", type=Path, help="rows are appended here")
    args = parser.parse_args(argv)
    gpu = args.device.type == "cuda"
    args.model = args.model or ("XL" if gpu else "small")
    args.image_size = args.image_size or (256 if gpu else 128)
    args.page_size = args.page_size or (64 if gpu else 16)
    args.lockstep_slots = args.lockstep_slots or (64 if gpu else 8)
    args.output = args.output or RESULTS / f"slots_{'gpu' if gpu else 'cpu'}.jsonl"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    case = Case(
        model=args.model,
        image_size=args.image_size,
        images=args.lockstep_slots,
        guidance_scale=2.0,
        dtype=torch.bfloat16 if args.device.type == "cuda" else torch.float32,
        device=args.device,
    )
    with pinned_threads(args.threads) if args.device.type == "cpu" else nullcontext():
        policy = case.policy()
        facts = facts_of(case, args)
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        for times in args.times:
            others = OtherWork()
            wider = replace(case, images=times * args.lockstep_slots)
            rows = measured(wider, policy, args)
            busy = {"others_busy_cores": round(others.busy_cores(), 2)}
            print(table(rows), flush=True)
            for row in rows:
                append_row(args.output, {**facts, **row, **busy})


if __name__ == "__main__":
    main()
