"""Measuring one case of the kernel bench: check, bind, capture, take turns, rows.

On a GPU a contender's calls are captured and replayed; one that waits for the host cannot be, and
is timed between events with its launches (`graph` is false in its row).
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_cases import FLOOR, OURS, Case, Contender, PeerMissingError
from timing import (
    MAX_INPUT_SETS,
    Call,
    Ceilings,
    Clock,
    Timing,
    captured,
    cold_sets,
    l2_bytes,
    synchronises,
)
from turns import PeakMemory, measure_in_turns

Row = dict[str, Any]
HOT_SECONDS = 5e-3  # of a hot pass, by repeating its call
HOT_REPEATS = 20


class WrongResultError(Exception):
    """Our result is not the reference's: nothing of this case may be timed."""


@dataclass(frozen=True)
class Method:
    """How to measure."""

    device: torch.device
    clock: Clock
    ceilings: Ceilings
    samples: int = 20
    caches: tuple[str, ...] = ("cold", "hot")
    say: Callable[[str], None] = field(default_factory=lambda: said_once(_print_now))


def said_once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Leaves out a line that was said before."""
    said: set[str] = set()

    def say_new(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    return say_new


@dataclass(frozen=True)
class Entrant:
    """A contender whose result is right, or cannot be compared."""

    contender: Contender
    error: float | None  # 1 is what ours may have
    peak_bytes: int


@dataclass(frozen=True)
class Pass:
    """Calls one after the other, as one thing to time."""

    run: Call
    calls: int
    is_graph: bool


def measure_case(case: Case, method: Method) -> list[Row]:
    """One row a contender and cache.

    Raises:
        WrongResultError: our own result is wrong.
    """
    inputs = case.make()
    entrants = checked(case, inputs, method)
    rows: list[Row] = []
    for cache in method.caches:
        sets, repeats = input_sets(case, inputs, cache, method)
        if sets:
            passes = passes_of(entrants, sets, repeats, method)
            timings = measure_in_turns(
                {name: one.run for name, one in passes.items()},
                method.clock,
                warmup=2 if method.device.type == "cuda" else 1,
                samples=method.samples,
            )
            rows += rows_of(case, cache, entrants, passes, timings, method.ceilings)
            del passes
        del sets
        _let_go(method.device)
    return rows


def checked(case: Case, inputs: Any, method: Method) -> list[Entrant]:
    """Those whose result may be timed; ours is the first of them."""
    expected = case.expect(inputs)
    entrants = []
    for contender in case.contenders:
        try:
            entrants.append(_entrant(contender, inputs, expected, method))
        except PeerMissingError as error:
            method.say(f"without {error}")  # the same for every case: said once
        # Code of other people in versions that we do not know may raise anything.
        except Exception as error:
            if _is_ours(contender):
                raise
            method.say(f"without {contender.name}: {_short(error)}")
    return entrants


def _entrant(contender: Contender, inputs: Any, expected: Any, method: Method) -> Entrant:
    call = contender.bind(inputs)
    result = call()
    error = None if contender.judge is None else contender.judge(result, expected)
    del result
    if error is not None and not error <= contender.allowed:
        message = (
            f"{contender.name}: expected an error of at most {contender.allowed:g}, "
            f"where 1 is what ours may have, got {error:.3g}"
        )
        raise WrongResultError(message)
    memory = PeakMemory(method.device)
    call()
    return Entrant(contender, error, memory.taken())


def input_sets(case: Case, inputs: Any, cache: str, method: Method) -> tuple[list[Any], int]:
    """What a pass goes through, and how often; no sets where the cache holds as many as we make."""
    if cache == "hot":
        call = case.contenders[0].bind(inputs)
        call()
        repeats = math.ceil(HOT_SECONDS / max(method.clock.seconds(call), 1e-9))
        return [inputs], min(repeats, HOT_REPEATS)
    count = cold_sets(case.work.num_bytes, l2_bytes(method.device))
    if count > MAX_INPUT_SETS:
        return [], 0
    return [inputs, *(case.make() for _ in range(count - 1))], 1


def passes_of(
    entrants: Sequence[Entrant], sets: Sequence[Any], repeats: int, method: Method
) -> dict[str, Pass]:
    """What is timed of each contender that can do it on these sets."""
    passes = {}
    for entrant in entrants:
        contender = entrant.contender
        try:
            calls = [contender.bind(inputs) for inputs in sets] * repeats
            passes[contender.name] = one_pass(calls, method.device)
        except Exception as error:  # as in `checked`
            if _is_ours(contender):
                raise
            method.say(f"without {contender.name}: {_short(error)}")
    return passes


def one_pass(calls: Sequence[Call], device: torch.device) -> Pass:
    """Calls in order; on a GPU a graph of them, unless they wait for the host."""

    def in_order() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return Pass(in_order, len(calls), is_graph=False)
    calls[0]()  # what is compiled at a first call may wait for the host there
    if synchronises(calls[0]):
        return Pass(in_order, len(calls), is_graph=False)
    return Pass(captured(calls).replay, len(calls), is_graph=True)


def rows_of(
    case: Case,
    cache: str,
    entrants: Sequence[Entrant],
    passes: Mapping[str, Pass],
    timings: Mapping[str, Timing],
    ceilings: Ceilings,
) -> list[Row]:
    """One row a contender that was timed; the timings are of whole passes."""
    calls = {name: timings[name].shared(one.calls) for name, one in passes.items()}
    rows = []
    for entrant in entrants:
        contender = entrant.contender
        if contender.name not in calls:
            continue
        timing = calls[contender.name]
        row: Row = {
            "op": case.op,
            "case": case.name,
            **case.facts,
            "contender": contender.name,
            "work": contender.does,
            "cache": cache,
            "p20_us": round(timing.p20_us, 3),
            "p50_us": round(timing.p50_us, 3),
            "p80_us": round(timing.p80_us, 3),
            "samples": timing.samples,
            "graph": passes[contender.name].is_graph,
            "limit_us": round(ceilings.floor_us(case.work), 3),
            "percent_of_limit": round(ceilings.percent(timing, case.work), 1),
            "over_ours": round(timing.p50_us / calls[OURS].p50_us, 3),
            "peak_mb": round(entrant.peak_bytes / 1e6, 2),
        }
        if FLOOR in calls:
            row["over_floor"] = round(timing.p50_us / calls[FLOOR].p50_us, 3)
        if entrant.error is not None:
            row["error"] = float(f"{entrant.error:.2g}")
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """A line a case and cache: ours, how near the limit, and how much slower every other is."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["cache"]), {})[row["contender"]] = row
    lines = []
    for (case, cache), group in groups.items():
        ours = group.pop(OURS, None)
        if ours is None:
            continue
        others = ", ".join(f"{name} {row['over_ours']:.2f}x" for name, row in group.items())
        lines.append(
            f"{case}, {cache}: {ours['p50_us']:.1f} us, {ours['percent_of_limit']:.0f} % of the "
            f"limit, {ours['peak_mb']:.1f} MB" + (f"; {others}" if others else "")
        )
    return "\n".join(lines)


def _print_now(line: str) -> None:
    print(line, flush=True)


def _is_ours(contender: Contender) -> bool:
    return contender.name.startswith(OURS)


def _short(error: Exception) -> str:
    """The first line of an error that may be a page."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _let_go(device: torch.device) -> None:
    """Give a case's memory back before the next one asks for its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
