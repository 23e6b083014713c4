"""Try other tile sizes of a kernel on a GPU, and record what each took.

    python bench/sweep.py --op paged_attention

Tile sizes are constants in the kernels' files, because a winner that changes from run to run would
change bits. This script sets them for the length of a measurement, checks that the result is still
that of the committed constants, times it with a cold L2, and appends one row a case and candidate
to bench/results/sweep.jsonl, then one that names the winner. A candidate wins by 3 % in the sum
over the op's cases, a bound between two paths by where their times cross; the winner is then
written into the kernel's file by hand, with its row as the reason. bench/sweep_cases.py has what
is tried.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from result_rows import Row, append_row, environment
from sweep_cases import Case, Result, Sweep, sweeps
from timing import (
    Call,
    Ceilings,
    EventClock,
    Timing,
    cold_calls,
    l2_bytes,
    measure_ceilings,
    measure_graph,
)
from torch import Tensor
from triton.runtime.errors import OutOfResources

RESULTS = Path(__file__).parent / "results" / "sweep.jsonl"


@contextmanager
def constants_set(module: ModuleType, constants: Mapping[str, int]) -> Iterator[None]:
    """The module's constants for the length of a block, as committed afterwards."""
    committed = {name: getattr(module, name) for name in constants}
    for name, value in constants.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in committed.items():
            setattr(module, name, value)


def run(sweep: Sweep, device: torch.device, ceilings: Ceilings, output: Path) -> list[Result]:
    """Time every candidate that gives the committed result; one row a case and candidate."""
    results, described = [], environment(device)
    expected = [_sample(case, device) for case in sweep.cases]
    for constants in sweep.candidates():
        medians = []
        with constants_set(sweep.module, constants):
            for case, want in zip(sweep.cases, expected, strict=True):
                timing = _time(case, want, device)
                if timing is None:
                    print(f"{sweep.op} {constants}: does not fit, or differs at {case.name}")
                    break
                medians.append(timing.p50_us)
                percent = ceilings.percent(timing, case.work)
                row = {
                    "bench": "sweep",
                    "op": sweep.op,
                    "case": case.name,
                    "dtype": "bf16",
                    "l2": "cold",
                }
                row |= {"constants": str(constants), "percent_of_ceiling": f"{percent:.1f}"}
                times = {"p20_us": timing.p20_us, "p50_us": timing.p50_us, "p80_us": timing.p80_us}
                append_row(output, row | times | described)
                print(f"{sweep.op} {case.name} {constants} {timing.p50_us:.1f} us {percent:.0f} %")
        if len(medians) == len(sweep.cases):
            results.append(Result(constants, tuple(medians)))
    return results


def winner_row(sweep: Sweep, results: list[Result]) -> Row:
    """What becomes of the committed constants.

    Raises:
        RuntimeError: the committed constants have no times to compare with.
    """
    committed = sweep.committed()
    if not results or results[0].constants != committed:
        raise RuntimeError(f"{sweep.op}: expected times of the committed {committed}, got none")
    winner = sweep.choose(results)
    return {
        "bench": "sweep",
        "op": sweep.op,
        "case": "winner",
        "constants": str(winner.constants),
        "committed": str(committed),
        "wins": winner.constants != committed,
        "total_us": round(winner.total_us, 3),
        "committed_us": round(results[0].total_us, 3),
    }


def _sample(case: Case, device: torch.device) -> Tensor:
    torch.manual_seed(0)
    return case.make_call(device)()


def _time(case: Case, want: Tensor, device: torch.device) -> Timing | None:
    try:
        got = _sample(case, device)
    except OutOfResources:
        return None
    # Another tile order rounds another way: one unit of bf16 at the size of the largest value.
    if not (got - want).abs().max() <= 2**-7 * want.abs().max():
        return None

    def make_call() -> Call:
        return case.make_call(device)

    return measure_graph(cold_calls(make_call, case.work.num_bytes, l2_bytes(device)))


def chosen_device() -> torch.device:
    if not torch.cuda.is_available():
        sys.exit("sweep: needs a CUDA GPU, found none")
    return torch.device("cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time other tile sizes of a kernel on a GPU.")
    known = {sweep.op: sweep for sweep in sweeps()}
    parser.add_argument("--op", choices=sorted(known), required=True)
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows are appended here")
    args = parser.parse_args()
    device = chosen_device()
    results = run(known[args.op], device, measure_ceilings(device, EventClock()), args.output)
    row = winner_row(known[args.op], results)
    append_row(args.output, row | environment(device))
    verdict = "wins" if row["wins"] else "stays"
    print(f"{args.op}: {row['constants']} {verdict}, {row['total_us']:.1f} us over all cases")


if __name__ == "__main__":
    main()
