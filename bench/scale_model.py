"""Step time and images per GPU-hour on 1 to 1,024 GPUs, on paper, from rows measured on one.

    python bench/scale_model.py                                    B to 3B, data-parallel and FSDP
    python bench/scale_model.py --models XL --image_size 384 --images 32 --gpus 1 8 64

A step is: draw, decode to pixels, score under the reference, learn, one optimizer step. Judges cost
nothing here. Each GPU draws and learns its own `--images`, so the step's batch grows with the GPUs.
A phase is measured where bench/results has a row of the very size on a GPU, else predicted: the
rollout from roofline.py, everything else from its operations or bytes, over the share of the
device's rates that is assumed. What goes between GPUs is always predicted: nothing of it hides
behind work, and there is no latency, no straggler and no failure, so read large numbers of GPUs as
bounds. Nothing has been measured on several GPUs yet: this says what they would be worth.

Every cell ends in m, measured, or p, predicted; a sum with a predicted part is predicted.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from result_rows import Row, rows_in
from scale_costs import (
    DOWNSAMPLE,
    WAYS,
    Cost,
    Machine,
    Work,
    phases,
    state_bytes,
    step_cost,
    traffic,
)
from timing import Ceilings

RESULTS = Path(__file__).parent / "results"
PUBLISHED = ("B", "L", "XL", "XXL", "3B")


def phase_table(works: Sequence[Work], machine: Machine, rows: Sequence[Row]) -> list[str]:
    """Seconds of each phase on one GPU."""
    found = [phases(work, machine, rows) for work in works]
    lines = [f"| seconds on one GPU | {' | '.join(found[0])} |", "|---" * (len(found[0]) + 1) + "|"]
    for work, costs in zip(works, found, strict=True):
        lines.append(f"| {work.model} | {' | '.join(map(str, costs.values()))} |")
    return lines


def scale_table(
    works: Sequence[Work], machine: Machine, rows: Sequence[Row], gpus: Sequence[int]
) -> list[str]:
    """A line for each model, number of GPUs and way of sharing the work."""
    head = (
        "model",
        "GPUs",
        "",
        "s a step",
        "images per GPU-hour",
        "GB sent",
        "s sending",
        "state GB",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for work in works:
        for num_gpus in gpus:
            for way in WAYS if num_gpus > 1 else WAYS[:1]:
                cost = step_cost(work, machine, rows, num_gpus, way)
                hourly = _three_figures(work.images / cost.seconds * 3600)
                sent = traffic(work, machine, num_gpus, way)
                held = state_bytes(work, num_gpus, way) / 1e9
                mark = "m" if cost.is_measured else "p"
                lines.append(
                    f"| {work.model} | {num_gpus} | {way} | {cost} | {hourly:,} {mark} "
                    f"| {sent.num_bytes / 1e9:.2f} p | {Cost(sent.seconds)} | {held:.1f} p |"
                )
    return lines


def predicted_table(models: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Images per GPU-hour with the default assumptions, for the README."""
    args = arguments(["--models", *models])
    machine, gpus = machine_of(args), (1, 8, 64, 1024)
    works = works_of(args)
    head = [
        "images per GPU-hour",
        *(f"{count:,} GPU{'s' * (count > 1)}" for count in gpus),
        f"GB sent a GPU and step, {gpus[-1]:,} GPUs",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for work in works:
        for way in WAYS:
            costs = [step_cost(work, machine, rows, count, way) for count in gpus]
            cells = [
                f"{_three_figures(work.images / cost.seconds * 3600):,} "
                f"{'m' if cost.is_measured else 'p'}"
                for cost in costs
            ]
            if way != WAYS[0]:
                cells[0] = ""  # one GPU has nothing to share
            sent = traffic(work, machine, gpus[-1], way).num_bytes / 1e9
            lines.append(f"| {work.model}, {way} | {' | '.join(cells)} | {sent:.1f} p |")
    return ["**What one GPU and many would be worth.** " + describe(works[0], machine), "", *lines]


def _three_figures(value: float) -> int:
    """Rounded down, not in our favour."""
    step = 10 ** max(0, int(math.log10(value)) - 2)
    return int(value // step * step)


def describe(work: Work, machine: Machine) -> str:
    """What all cells rest on."""
    return (
        f"{work.images} images a GPU and step at {work.image_size} pixels, guidance "
        f"{work.guidance_scale:g}, micro-batches of {work.micro_batch}, one optimizer step. "
        f"Assumed: {machine.ceilings.bytes_per_second / 1e12:g} TB/s, "
        f"{machine.ceilings.flops_per_second / 1e12:g} TFLOP/s in bf16; rollouts reach "
        f"{machine.rollout_share:.0%} of their roofline, decoding and training "
        f"{machine.compute_share:.0%} of the matrix rate; NVLink {machine.nvlink / 1e9:g} GB/s a "
        f"GPU within {machine.node}, {machine.network / 1e9:g} GB/s a GPU between nodes; nothing "
        "sent hides behind work; no latency, no stragglers; judges are free. m: measured, p: "
        "predicted."
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=PUBLISHED, default=PUBLISHED)
    add("--gpus", type=int, nargs="+", default=[1, 8, 64, 512, 1024])
    add("--image_size", type=int, default=256, help="pixels a side, a multiple of 16")
    add("--images", type=int, default=128, help="drawn and learned by each GPU in a step")
    add("--micro_batch", type=int, default=32, help="images of a forward and backward pass")
    add("--guidance_scale", type=float, default=2.0, help="1 turns guidance off")
    add("--tb_per_s", type=float, default=4.3, help="of a GPU's memory")
    add("--tflops", type=float, default=790.0, help="in bf16")
    add("--rollout_share", type=float, default=0.57, help="the least that is aimed at for XL")
    add("--compute_share", type=float, default=0.4, help="the least that is aimed at")
    add("--nvlink_gb_per_s", type=float, default=450.0)
    add("--network_gb_per_s", type=float, default=50.0)
    add("--results", type=Path, default=RESULTS, help="folder of rollout_ and trunk_gpu.jsonl")
    args = parser.parse_args(argv)
    counts = [*args.gpus, args.images, args.micro_batch, args.image_size // DOWNSAMPLE]
    if min(counts) < 1:
        parser.error("--gpus, --images, --micro_batch: expected at least 1; --image_size: 16")
    return args


def machine_of(args: argparse.Namespace) -> Machine:
    """The assumed rates."""
    return Machine(
        Ceilings(bytes_per_second=args.tb_per_s * 1e12, flops_per_second=args.tflops * 1e12),
        *(args.rollout_share, args.compute_share),
        *(args.nvlink_gb_per_s * 1e9, args.network_gb_per_s * 1e9),
    )


def works_of(args: argparse.Namespace) -> list[Work]:
    """A step of each model."""
    sizes = args.image_size, args.images, args.micro_batch, args.guidance_scale
    return [Work(model, *sizes) for model in args.models]


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    machine, works = machine_of(args), works_of(args)
    rows = [
        row for name in ("rollout", "trunk") for row in rows_in(args.results / f"{name}_gpu.jsonl")
    ]
    print(describe(works[0], machine), "", sep="\n")
    print(*phase_table(works, machine, rows), "", sep="\n")
    print(*scale_table(works, machine, rows, args.gpus), sep="\n")


if __name__ == "__main__":
    main()
