"""Microseconds of every kernel at the sizes of real policies, beside peers and physical limits.

    python bench/bench_kernels.py                            all, on a GPU if there is one
    python bench/bench_kernels.py --only guided_sample --models XL
    python bench/bench_kernels.py --device cpu --only token_logprobs --tokens 2048 8192
    pytest bench/ --benchmark-only                           the same under pytest-benchmark

All contenders of a case have the same inputs, dtype, filters and guidance, and take turns; a row
says where one does less. Nothing is timed whose result is wrong. Rows are appended to --output
after every case; --resume leaves out cases that have rows of this commit there. bench/README.md
says what the fields mean.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import cases_attention
import cases_gradients
import cases_layers
import cases_logprobs
import cases_record_draw
import cases_sampling
import torch
from kernel_cases import (
    CPU_GRID,
    GPU_GRID,
    MODELS,
    OURS,
    Case,
    Contender,
    Grid,
    PeerMissingError,
    Place,
)
from kernel_runs import Method, Row, WrongResultError, measure_case, one_pass, table
from result_rows import append_row, environment, rows_like
from timing import Ceilings, ceilings_of, clock_of, measure, pinned_threads
from turns import OtherWork

from argrpo.environment import cpu_features, cpu_model

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = (
    "guided_sample", "sample_logits", "paged_decode_attention", "token_logprobs",
    "fixed_scale_gradients", "logprob_gradients", "grouped_logprob_kl", "rmsnorm",
    "rmsnorm_residual", "swiglu", "guided_hidden", "layernorm", "layernorm_residual", "bias_gelu",
    "record_draw",
)  # fmt: skip


def cases_of(place: Place, grid: Grid) -> Iterator[Case]:
    """Every case, those first whose numbers matter most."""
    families = (
        *(cases_sampling, cases_attention, cases_logprobs, cases_gradients, cases_layers),
        cases_record_draw,
    )
    return chain.from_iterable(family.cases(place, grid) for family in families)


def run(place: Place, args: argparse.Namespace) -> tuple[list[Row], int]:
    """Measure what was asked for, appending rows; also how many cases had a wrong result."""
    facts, rows, wrong = facts_of(place, args.threads), [], 0
    method = Method(
        place.device,
        clock_of(place.device),
        ceilings_of(place.device, place.dtype),
        args.samples,
        tuple(args.cache),
    )
    facts["limit_gb_per_s"] = round(method.ceilings.bytes_per_second / 1e9, 1)
    facts["limit_tflops"] = round(method.ceilings.flops_per_second / 1e12, 3)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    done = set()
    if args.resume:
        known = rows_like(args.output, facts)
        done = {row["case"] for row in known if row["dtype"] == facts["dtype"]}
    for case in cases_of(place, args.grid):
        if case.op not in args.only or case.name in done:
            continue
        others, taking_part = (
            OtherWork(),
            [contender for contender in case.contenders if contender.name not in args.without],
        )
        try:
            found = measure_case(replace(case, contenders=taking_part), method)
        except WrongResultError as error:
            print(f"WRONG {case.name}: {error}", flush=True)
            wrong += 1
            continue
        busy = {"others_busy_cores": round(others.busy_cores(), 2)}
        for row in found:
            append_row(args.output, {**facts, **busy, **row})
        print(table(found), flush=True)
        rows += found
    return rows, wrong


def facts_of(place: Place, threads: int) -> Row:
    """What all rows of a run have in common."""
    facts: Row = {
        "bench": "kernels",
        "dtype": str(place.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **environment(place.device),
    }
    if place.device.type == "cpu":
        facts |= {"device": cpu_model(), "cpu_features": " ".join(cpu_features())}
        facts["threads"] = threads
    return facts


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--device", type=torch.device, help="cuda where there is one, else cpu")
    add("--dtype", choices=list(DTYPES), help="bfloat16 on a GPU, float32 on a CPU")
    add("--only", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=", ".join(OPS))
    add("--models", nargs="+", choices=list(MODELS), help="published sizes")
    add("--rows", type=int, nargs="+", help="images whose next token is drawn")
    add("--images", type=int, nargs="+", help="guided images in a step of attention")
    add("--lengths", type=int, nargs="+", help="keys that a new token sees")
    add("--tokens", type=int, nargs="+", help="image tokens scored, multiples of 256")
    add("--without", nargs="+", default=[], metavar="NAME", help="contenders to leave out")
    add("--cache", nargs="+", choices=["cold", "hot"], help="both on a GPU, hot on a CPU")
    add("--samples", type=int, help="timed passes: 20 on a GPU, 3 on a CPU")
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="on a CPU")
    add("--output", type=Path, help="rows are appended here")
    add("--resume", action="store_true", help="leave out cases with rows of this commit in output")
    args = parser.parse_args(argv)
    if args.device is None:
        args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = args.device.type == "cuda"
    args.dtype = DTYPES[args.dtype or ("bfloat16" if gpu else "float32")]
    args.samples = args.samples or (20 if gpu else 3)
    args.cache = args.cache or (["cold", "hot"] if gpu else ["hot"])
    args.output = args.output or RESULTS / f"kernels_{'gpu' if gpu else 'cpu'}.jsonl"
    chosen = {
        name: tuple(getattr(args, name))
        for name in ("models", "rows", "images", "lengths", "tokens")
        if getattr(args, name)
    }
    args.grid = replace(GPU_GRID if gpu else CPU_GRID, **chosen)
    if OURS in args.without:
        parser.error(f"--without: expected peers, got {OURS}, which all are compared with")
    odd = [tokens for tokens in args.grid.tokens if tokens < 256 or tokens % 256]
    if odd:
        parser.error(f"--tokens: expected multiples of 256, got {odd[0]}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    on_cpu = args.device.type == "cpu"
    with pinned_threads(args.threads) if on_cpu else nullcontext():
        _, wrong = run(Place.on(args.device, args.dtype), args)
    if wrong:
        sys.exit(f"bench_kernels: {wrong} cases with a wrong result were not timed")


@cache
def _default_ceilings() -> Ceilings:
    place = _default_place()
    return ceilings_of(place.device, place.dtype)


def _default_place() -> Place:
    if torch.cuda.is_available():
        return Place.on(torch.device("cuda"), torch.bfloat16)
    return Place.on(torch.device("cpu"), torch.float32)


def pytest_generate_tests(metafunc: Any) -> None:
    """A test a case and contender; pytest asks for them by this name."""
    if "contender" not in metafunc.fixturenames:
        return
    place = _default_place()
    grid = GPU_GRID if place.device.type == "cuda" else CPU_GRID
    pairs = [(case, contender) for case in cases_of(place, grid) for contender in case.contenders]
    names = [f"{case.name}, {contender.name}" for case, contender in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)


def test_kernel(benchmark: Any, case: Case, contender: Contender) -> None:
    """One input set, hot in the cache; wall clock by pytest-benchmark, CUDA time beside it."""
    from pytest import skip  # the script itself runs without pytest

    place = _default_place()
    inputs = case.make()
    try:
        call = contender.bind(inputs)
    except PeerMissingError as error:
        skip(str(error))
    if contender.judge is not None:
        assert contender.judge(call(), case.expect(inputs)) <= contender.allowed
    timed = one_pass([call], place.device)

    def wait_for_pass() -> None:
        timed.run()
        if place.device.type == "cuda":
            torch.cuda.synchronize()

    timing = measure([timed.run], clock_of(place.device), warmup=1, samples=5)
    benchmark.group = case.op
    benchmark.extra_info |= {
        "device_us": round(timing.p50_us, 3),
        "percent_of_limit": round(_default_ceilings().percent(timing, case.work), 1),
        "graph": timed.is_graph,
        "work": contender.does,
        **case.facts,
    }
    benchmark.pedantic(wait_for_pass, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
