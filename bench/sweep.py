"""Try other tile sizes of a kernel on a GPU, and record what each took.

    python bench/sweep.py --op paged_attention

Tile sizes are constants in the kernels' files, because a winner that changes from run to run would
change bits. This script sets them for the length of a measurement, checks that the result is still
that of the committed constants, times it with a cold L2, and appends one row a candidate to
bench/results/sweep.jsonl. A candidate wins by 3 % in the sum over the op's cases; the winner is
then written into the kernel's file by hand, with its row as the reason.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench_kernels import cases_of
from kernel_cases import Case as KernelCase
from kernel_cases import Grid, Place
from result_rows import append_row, environment
from timing import (
    Call,
    Ceilings,
    EventClock,
    Timing,
    Work,
    cold_calls,
    l2_bytes,
    measure_ceilings,
    measure_graph,
)
from torch import Tensor
from triton.runtime.errors import OutOfResources

from argrpo.kernels import guided_sampling, head_chunks, paged_decode, row_softmax
from argrpo.kernels import rmsnorm as rmsnorm_file
from argrpo.kernels import sample_head as sample_head_file
from argrpo.kernels import swiglu as swiglu_file
from argrpo.kernels.kv_pages import KeyValuePages, PrefixAggregate
from argrpo.kernels.paged_attention import paged_decode_attention
from argrpo.kernels.rmsnorm import rmsnorm_residual
from argrpo.kernels.swiglu import swiglu

RESULTS = Path(__file__).parent / "results" / "sweep.jsonl"
WINNING_MARGIN = 0.03
BF16 = torch.bfloat16
_LOGPROBS_OF_DRAW = 1  # which output of a bench case is compared
_WEIGHT_GRADIENT = 3


@dataclass(frozen=True)
class Case:
    """One shape of an op."""

    name: str
    make_call: Callable[[torch.device], Callable[[], Tensor]]  # fresh random inputs each
    work: Work


@dataclass(frozen=True)
class Sweep:
    """Which constants of which file to try, and on what."""

    op: str
    module: ModuleType
    constants: Mapping[str, Sequence[int]]
    cases: Sequence[Case]

    def candidates(self) -> Iterator[dict[str, int]]:
        """Every combination; the committed one first."""
        committed = {name: getattr(self.module, name) for name in self.constants}
        yield committed
        for values in itertools.product(*self.constants.values()):
            candidate = dict(zip(self.constants, values, strict=True))
            if candidate != committed:
                yield candidate


@dataclass(frozen=True)
class Result:
    """A candidate over all cases of its op."""

    constants: dict[str, int]
    total_us: float  # sum of the medians


def sweeps() -> list[Sweep]:
    return [
        Sweep(
            "paged_attention",
            paged_decode,
            {"_WARPS": (1, 2, 4), "_STAGES": (2, 3, 4), "_TILE_BYTES": (2048, 4096, 8192)},
            [_attention_case(rows, length) for rows in (16, 64, 256) for length in (64, 128, 255)],
        ),
        Sweep(
            "rmsnorm",
            rmsnorm_file,
            {"_VALUES_A_THREAD": (8, 16, 32), "_STRETCHES": (264, 512, 1024)},
            [_rmsnorm_case(rows) for rows in (256, 16384)],
        ),
        Sweep(
            "swiglu",
            swiglu_file,
            {"_BLOCK": (512, 1024, 2048, 4096), "_WARPS": (2, 4, 8)},
            [_swiglu_case(rows) for rows in (256, 16384)],
        ),
        Sweep(
            "sample_head",
            sample_head_file,
            {"_TOKENS": (64, 128), "_DEPTH": (64, 128), "_STAGES": (3, 4), "_WARPS": (4, 8)},
            _bench_cases("guided_sample", Grid(("XL",), (64,), (), (), ()), _LOGPROBS_OF_DRAW),
        ),
        # Where the library's product and a row kernel overtake the fused draw: compare its rows.
        Sweep(
            "fused_rows",
            guided_sampling,
            {"_MAX_FUSED_ROWS": (0, 64, 256)},
            _bench_cases(
                "guided_sample", Grid(("XL",), (32, 64, 128, 256), (), (), ()), _LOGPROBS_OF_DRAW
            ),
        ),
        Sweep(
            "head_chunks",
            head_chunks,
            {"_GPU_LOGITS": (4 << 20, 8 << 20, 16 << 20), "_GPU_PARTS": (2, 4, 8)},
            _bench_cases(
                "fixed_scale_gradients", Grid(("XL",), (), (), (), (16384,)), _WEIGHT_GRADIENT
            ),
        ),
        Sweep(
            "row_softmax",
            row_softmax,
            {"DEPTH": (4, 8, 16), "LANES": (256, 512, 1024), "WARPS": (4, 8)},
            _bench_cases(
                "fixed_scale_gradients", Grid(("XL",), (), (), (), (2048,)), _WEIGHT_GRADIENT
            ),
        ),
    ]


def choose(results: Sequence[Result]) -> Result:
    """The committed candidate, which comes first, unless another beats it by the margin."""
    committed = results[0]
    best = min(results, key=lambda result: result.total_us)
    return best if best.total_us < committed.total_us * (1 - WINNING_MARGIN) else committed


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
            results.append(Result(constants, math.fsum(medians)))
    return results


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


def _bench_cases(op: str, grid: Grid, output: int) -> list[Case]:
    """Our part of the kernel bench's cases of an op, unfiltered; one of its outputs."""

    def found(device: torch.device) -> dict[str, KernelCase]:
        return {
            case.name: case
            for case in cases_of(Place.on(device, BF16), grid)
            if case.op == op and case.facts.get("filters", "none") == "none"
        }

    def make_call(name: str, device: torch.device) -> Callable[[], Tensor]:
        case = found(device)[name]
        call: Callable[[], Any] = case.contenders[0].bind(case.make())
        return lambda: call()[output]

    return [
        Case(name, partial(make_call, name), case.work)
        for name, case in found(torch.device("cpu")).items()
    ]


def _attention_case(rows: int, length: int, heads: int = 20, head_dim: int = 64) -> Case:
    page_size, num_pages = 64, -(-(length + 1) // 64)

    def make_call(device: torch.device) -> Callable[[], Tensor]:
        shape = (rows * num_pages, heads, page_size, head_dim)
        pages = KeyValuePages(*torch.randn(2, *shape, device=device, dtype=BF16))
        table = torch.randperm(rows * num_pages, device=device).view(rows, num_pages).int()
        q, k, v = torch.randn(rows, 3, heads, head_dim, device=device, dtype=BF16).unbind(1)
        rotary = torch.randn(length + 1, head_dim // 2, 2, device=device)
        sums = torch.randn(1, heads, head_dim, device=device)
        one = torch.ones(1, device=device)
        index = torch.zeros(rows, dtype=torch.int64, device=device)
        prefix, positions = PrefixAggregate(sums, one, index), torch.full_like(index, length)
        return lambda: paged_decode_attention(q, k, v, rotary, positions, pages, table, prefix)

    work = 4 * rows * heads * head_dim * (length + 2)
    return Case(f"rows {rows} positions {length}", make_call, Work(work, work))


def _rmsnorm_case(rows: int, width: int = 1280) -> Case:
    def make_call(device: torch.device) -> Callable[[], Tensor]:
        x, residual, dy = torch.randn(3, rows, width, device=device, dtype=BF16)
        x.requires_grad_()
        weight = torch.ones(width, device=device, dtype=BF16, requires_grad=True)

        def call() -> Tensor:
            y, total = rmsnorm_residual(x, residual, weight, 1e-5)
            return torch.autograd.grad((y, total), (x, weight), (dy, dy))[0]

        return call

    return Case(f"rows {rows} forward and backward", make_call, Work(16 * rows * width, 0))


def _swiglu_case(rows: int, width: int = 3584) -> Case:
    def make_call(device: torch.device) -> Callable[[], Tensor]:
        gate_up = torch.randn(1, rows, 2 * width, device=device, dtype=BF16, requires_grad=True)
        dy = torch.randn(1, rows, width, device=device, dtype=BF16)
        return lambda: torch.autograd.grad(swiglu(gate_up), gate_up, dy)[0]

    return Case(f"rows {rows} forward and backward", make_call, Work(16 * rows * width, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time other tile sizes of a kernel on a GPU.")
    known = {sweep.op: sweep for sweep in sweeps()}
    parser.add_argument("--op", choices=sorted(known), required=True)
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows are appended here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("sweep: needs a CUDA GPU, found none")
    device = torch.device("cuda")
    results = run(known[args.op], device, measure_ceilings(device, EventClock()), args.output)
    winner = choose(results)
    verdict = "stays" if winner is results[0] else "wins"
    print(f"{args.op}: {winner.constants} {verdict}, {winner.total_us:.1f} us over all cases")


if __name__ == "__main__":
    main()
