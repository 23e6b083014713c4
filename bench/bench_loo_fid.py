"""Leave-one-out Frechet distances, exact for one decomposition, beside one decomposition an image.

    python bench/bench_loo_fid.py
    python bench/bench_loo_fid.py --device cuda --sizes 32x256 144x2048

A size is images x features. The batch alone, or mixed half and half into carried moments, as the
LOO-FID reward takes it. The contenders:

    argrpo         `batch_leave_one_out` or `carried_leave_one_out`, all images at once
    brute force    the definition: for each image the moments of the others, and the root of their
                   product with the reference's by an eigendecomposition [C, C]

Both in fp64 on the same features. Brute force is measured on `--brute_images` of the images and its
time multiplied up; the row says on how many. Nothing is timed whose distances differ.
"""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from result_rows import Row, append_row, environment, rows_like
from timing import Clock, clock_named, pinned_threads
from torch import Tensor
from turns import OtherWork, PeakMemory, measure_in_turns

from argrpo.environment import cpu_features, cpu_model
from argrpo.evaluation.frechet_loo import (
    FrechetReference,
    batch_leave_one_out,
    carried_leave_one_out,
)
from argrpo.evaluation.moments import RawMoments, moments_of

RESULTS = Path(__file__).parent / "results"
OURS, BRUTE = "argrpo", "brute force"
DECAY = 0.5  # of the released code
# Relative, in fp64. A root of a covariance with eigenvalues near 0 loses half of the digits.
_SAME = 1e-6
_KINDS = ("batch", "carried")


@dataclass(frozen=True)
class LooCase:
    """So many images in so many features."""

    kind: str
    images: int
    features: int
    device: torch.device

    @property
    def name(self) -> str:
        return f"loo_fid {self.kind}, {self.images} images, {self.features} features"


class Inputs:
    """Features, the reference and the carried moments of a case."""

    def __init__(self, case: LooCase) -> None:
        made = torch.Generator().manual_seed(0)

        def normal(count: int) -> Tensor:
            spread = torch.linspace(0.2, 1.0, case.features)  # directions are not alike
            return torch.randn(count, case.features, generator=made) * spread

        count = 2 * case.features
        reference, past = moments_of(normal(count)), moments_of(normal(count) + 0.1)
        self.kind = case.kind
        self.features = (normal(case.images) + 0.2).to(case.device)
        self.reference = FrechetReference.of(reference.to(case.device))
        self.state = RawMoments.of(past, full=True).to(case.device)

    def ours(self) -> Tensor:
        """[N] distances, each without an image."""
        if self.kind == "batch":
            return batch_leave_one_out(self.features, self.reference).without
        found = carried_leave_one_out(self.features, self.state, self.reference, decay=DECAY)
        return found.without

    def brute(self, count: int) -> Tensor:
        """[count] of the first images."""
        return torch.stack([self._without(i) for i in range(count)])

    def _without(self, left_out: int) -> Tensor:
        wide = self.features.double()
        others = torch.cat([wide[:left_out], wide[left_out + 1 :]])
        mean, size = others.mean(dim=0), len(others)
        if self.kind == "batch":
            apart = others - mean
            return self._distance(mean, apart.T @ apart / (size - 1))
        first, second = self.state.first / self.state.weight, self.state.second / self.state.weight
        mixed = DECAY * first + (1 - DECAY) * mean
        moment = DECAY * second + (1 - DECAY) * (others.T @ others) / size
        return self._distance(mixed, moment - torch.outer(mixed, mixed))

    def _distance(self, mean: Tensor, cov: Tensor) -> Tensor:
        root = self.reference.root
        values = torch.linalg.eigvalsh(root @ cov @ root).clamp_min(0.0)
        gap = (self.reference.mean - mean).square().sum()
        return gap + self.reference.cov.trace() + cov.trace() - 2.0 * values.sqrt().sum()


def check_same(inputs: Inputs, count: int) -> float:
    """The largest relative difference on the images that brute force is measured on.

    Raises:
        RuntimeError: the distances differ.
    """
    expected = inputs.brute(count)
    apart = float(((inputs.ours()[:count] - expected) / expected).abs().max())
    if not apart <= _SAME:
        raise RuntimeError(
            f"{OURS}: expected the distances of {BRUTE} within {_SAME:g}, got a relative "
            f"difference of {apart:.2g}"
        )
    return apart


def rows_of(case: LooCase, clock: Clock, samples: int, brute_images: int) -> list[Row]:
    """Ours and brute force."""
    inputs, count = Inputs(case), min(brute_images, case.images)
    apart = check_same(inputs, count)
    calls: dict[str, Callable[[], object]] = {
        OURS: inputs.ours,
        BRUTE: partial(inputs.brute, count),
    }
    peaks = {}
    for name, call in calls.items():
        memory = PeakMemory(case.device)
        call()
        peaks[name] = memory.taken()
    timings = measure_in_turns(calls, clock, warmup=0, samples=samples)
    scale = {OURS: 1.0, BRUTE: case.images / count}
    ours = timings[OURS].p50_us
    return [
        {
            "contender": name,
            "measured_images": case.images if name == OURS else count,
            "p20_ms": round(timing.p20_us * scale[name] / 1e3, 3),
            "p50_ms": round(timing.p50_us * scale[name] / 1e3, 3),
            "p80_ms": round(timing.p80_us * scale[name] / 1e3, 3),
            "samples": timing.samples,
            "over_ours": round(timing.p50_us * scale[name] / ours, 2),
            "difference": float(f"{apart:.2g}"),
            "peak_mb": round(peaks[name] / 1e6, 1),
        }
        for name, timing in timings.items()
    ]


def facts_of(case: LooCase, threads: int, clock: str) -> Row:
    """What both rows of a case have in common."""
    facts: Row = {
        "bench": "loo_fid",
        "case": case.name,
        "work": "a distance for each image left out, fp64",
        "images": case.images,
        "features": case.features,
        "dtype": "float64",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **environment(case.device),
    }
    if case.device.type == "cpu":
        facts["clock"] = clock
        facts |= {"device": cpu_model(), "cpu_features": " ".join(cpu_features())}
        facts["threads"] = threads
    return facts


def table(rows: Sequence[Row]) -> str:
    return "\n".join(
        f"{row['contender']:14}{row['p50_ms']:>12.1f} ms {row['over_ours']:>9.2f} x ours "
        f"{row['peak_mb']:>8.1f} MB, measured on {row['measured_images']} images"
        for row in rows
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--sizes", nargs="+", default=["32x256", "144x2048"], help="images x features")
    add("--kinds", nargs="+", choices=_KINDS, default=list(_KINDS))
    add("--brute_images", type=int, default=2, help="images that brute force is measured on")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="on a CPU")
    add("--clock", choices=["wall", "process"], default="wall", help="process: one thread's CPU")
    add("--samples", type=int, default=2, help="timed calls")
    add("--output", type=Path, help="rows are appended here")
    add("--resume", action="store_true", help="leave out cases with rows of this commit in output")
    args = parser.parse_args(argv)
    sizes = [re.fullmatch(r"(\d+)x(\d+)", size) for size in args.sizes]
    if not all(sizes) or min(int(match[1]) for match in sizes if match) < 4:
        parser.error("--sizes: expected IMAGESxFEATURES with at least 4 images, as 144x2048")
    args.sizes = [(int(match[1]), int(match[2])) for match in sizes if match]
    kind = "gpu" if args.device.type == "cuda" else "cpu"
    args.output = args.output or RESULTS / f"loo_fid_{kind}.jsonl"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    with pinned_threads(args.threads) if args.device.type == "cpu" else nullcontext():
        clock = clock_named(args.clock, args.device, args.threads)
        for images, features in args.sizes:
            for kind in args.kinds:
                case = LooCase(kind, images, features, args.device)
                facts = facts_of(case, args.threads, args.clock)
                known = rows_like(args.output, facts)
                if args.resume and any(row["case"] == case.name for row in known):
                    continue
                others, rows = OtherWork(), rows_of(case, clock, args.samples, args.brute_images)
                facts["others_busy_cores"] = round(others.busy_cores(), 2)
                print(case.name)
                print(table(rows), flush=True)
                for row in rows:
                    append_row(args.output, {**facts, **row})


if __name__ == "__main__":
    main()
