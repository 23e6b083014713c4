"""What bench/sweep.py tries: constants of the kernels' files, on which shapes, and who wins."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from bench_kernels import cases_of
from cases_sampling import LOGIT_SPREAD, SETTINGS
from kernel_cases import Case as KernelCase
from kernel_cases import Grid, Place
from timing import Work
from torch import Tensor

from argrpo.kernels import guided_sampling, head_chunks, paged_decode, row_softmax
from argrpo.kernels import rmsnorm as rmsnorm_file
from argrpo.kernels import sample_head as sample_head_file
from argrpo.kernels import sample_rows as sample_rows_file
from argrpo.kernels import swiglu as swiglu_file
from argrpo.kernels.draw import DrawKeys, DrawSettings
from argrpo.kernels.guided_sampling import sample_logits
from argrpo.kernels.kv_pages import KeyValuePages, PrefixAggregate
from argrpo.kernels.paged_attention import paged_decode_attention
from argrpo.kernels.rmsnorm import rmsnorm_residual
from argrpo.kernels.swiglu import swiglu

WINNING_MARGIN = 0.03
BF16 = torch.bfloat16
FUSED_ROWS = (16, 32, 64, 96, 128, 192, 256)
FILTERS = ("k", "k and p")  # settings of the kernel bench's filtered draws
_LOGPROBS_OF_DRAW = 1  # which output of a bench case is compared
_WEIGHT_GRADIENT = 3


@dataclass(frozen=True)
class Case:
    """One shape of an op."""

    name: str
    make_call: Callable[[torch.device], Callable[[], Tensor]]  # fresh random inputs each
    work: Work


@dataclass(frozen=True)
class Result:
    """A candidate over the cases of its op."""

    constants: dict[str, int]
    medians_us: tuple[float, ...]  # in the order of the cases

    @property
    def total_us(self) -> float:
        return math.fsum(self.medians_us)


def choose(results: Sequence[Result]) -> Result:
    """The committed candidate, which comes first, unless another beats it by the margin."""
    committed = results[0]
    best = min(results, key=lambda result: result.total_us)
    return best if best.total_us < committed.total_us * (1 - WINNING_MARGIN) else committed


def choose_bound(sizes: Sequence[int], results: Sequence[Result]) -> Result:
    """The largest size up to which one path wins, for a constant that is the bound of two paths.

    At each size the path that the committed bound takes there stays, unless the other beats it by
    the margin.

    Args:
        sizes: of the cases, ascending.
        results: the committed bound first; among the others 0, where no case takes the path, and
            a bound of at least the last size, where all do.

    Returns:
        The bound, and at each size the time of the path that it takes.
    """
    (name, committed), *_ = results[0].constants.items()
    never = next(one.medians_us for one in results if one.constants[name] == 0)
    always = next(one.medians_us for one in results if one.constants[name] >= sizes[-1])
    bound = 0
    for size, with_path, without in zip(sizes, always, never, strict=True):
        handicap = 1 - WINNING_MARGIN
        is_kept = with_path * handicap <= without
        is_taken = with_path < without * handicap
        if not (is_kept if size <= committed else is_taken):
            break
        bound = size
    # Between two sizes nothing was measured: a committed bound there stays.
    following = next((size for size in sizes if size > bound), None)
    if bound <= committed and (following is None or committed < following):
        bound = committed
    medians = [
        with_path if size <= bound else without
        for size, with_path, without in zip(sizes, always, never, strict=True)
    ]
    return Result({name: bound}, tuple(medians))


@dataclass(frozen=True)
class Sweep:
    """Which constants of which file to try, on what, and how to judge."""

    op: str
    module: ModuleType
    constants: Mapping[str, Sequence[int]]
    cases: Sequence[Case]
    choose: Callable[[Sequence[Result]], Result] = choose

    def committed(self) -> dict[str, int]:
        return {name: getattr(self.module, name) for name in self.constants}

    def candidates(self) -> Iterator[dict[str, int]]:
        """Every combination; the committed one first."""
        committed = self.committed()
        yield committed
        for values in itertools.product(*self.constants.values()):
            candidate = dict(zip(self.constants, values, strict=True))
            if candidate != committed:
                yield candidate


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
        # Where the library's product and a row kernel overtake the fused draw.
        Sweep(
            "fused_rows",
            guided_sampling,
            {"_MAX_FUSED_ROWS": (0, 64, FUSED_ROWS[-1])},
            _bench_cases("guided_sample", Grid(("XL",), FUSED_ROWS, (), (), ()), _LOGPROBS_OF_DRAW),
            partial(choose_bound, FUSED_ROWS),
        ),
        Sweep(
            "sample_rows",
            sample_rows_file,
            {"_MAX_WARPS": (8, 16, 32), "_WARP_WIDTH": (64, 128, 256)},
            [_row_case(rows, 16384, name) for rows in (64, 128, 256) for name in FILTERS],
        ),
        Sweep(
            "sample_rows_long",
            sample_rows_file,
            {"_STREAMED_WARPS": (4, 8, 16), "_STREAMED_PARTS": (4, 8, 16)},
            [_row_case(rows, 65536, name) for rows in (64, 128) for name in FILTERS],
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


def _row_case(rows: int, vocab_size: int, filters: str) -> Case:
    """The row kernel alone, on logits as spread as an image model's."""

    def make_call(device: torch.device) -> Callable[[], Tensor]:
        logits = LOGIT_SPREAD * torch.randn(rows, vocab_size, device=device)
        index = torch.arange(rows, device=device)
        keys = DrawKeys(torch.ones(1, dtype=torch.int64, device=device), index, index)
        scalars = torch.tensor([1.0, 1.0, *SETTINGS[filters]], device=device)
        return lambda: sample_logits(logits, keys, DrawSettings(scalars, filtered=True)).logprobs

    work = Work(4 * rows * vocab_size, 0)
    return Case(f"rows {rows} vocabulary {vocab_size} filters {filters}", make_call, work)


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
