"""Where the time of a step went: one table of kernels, one of ranges, from any trace.

    python profiles/summarize.py rollout.sqlite             nsys export --type sqlite X.nsys-rep
    python profiles/summarize.py runs/x/profile/steps_000020_000022.json.gz
    python profiles/summarize.py TRACE --range decode       launched inside decode[...] alone

What is counted was launched inside the ranges called `step`, or `rollout` where there is none, or
anywhere in a trace without ranges. A range that waits for its work is as long as it was open; one
that only launches lasts from its first kernel to its last.

    total    time in the kernel; on a CPU without the operations that it called
    gap      time before it in which nothing ran: work that came too late
"""

import argparse
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from traces import Activity, Range, Trace, read_trace

_WHOLE = ("step", "rollout")  # what a share is of, the first that a trace has
_NAME_WIDTH = 64
_AT_THE_END = "(after the last one)"


class KernelRow(NamedTuple):
    """All calls of one kernel."""

    name: str
    num_calls: int
    total_ns: int
    gap_ns: int  # idle time before its calls
    num_bytes: int | None  # moved by all of them, where the trace knows


class Window(NamedTuple):
    """A stretch of time, and what happened in it."""

    span_ns: int
    gaps: list[tuple[str, int]]  # (what came after the gap, its length)
    activities: list[Activity]

    @property
    def idle_ns(self) -> int:
        return sum(length for _, length in self.gaps)


class RangeRow(NamedTuple):
    """All ranges of one path."""

    path: str
    num_times: int
    span_ns: int
    num_activities: int
    idle_ns: int


class Summary(NamedTuple):
    """What the tables say."""

    whole: str  # the range that shares are of; "" for the whole trace
    num_times: int  # that it was opened
    span_ns: int
    gaps: list[int]
    kernels: list[KernelRow]  # most time first
    ranges: list[RangeRow]  # in the order of their start, those inside one another together
    num_outside: int  # activities outside the ranges that are counted
    on_gpu: bool


def summarize(trace: Trace, name: str | None = None) -> Summary:
    """Count what ran inside the ranges of a name.

    Args:
        trace: from `read_trace`.
        name: of the ranges; `decode` also means decode[1..64]. None: step, else rollout, else all.

    Raises:
        ValueError: the trace has no such range.
    """
    chosen, whole = _chosen(trace, name)
    windows = [_window(trace.activities, opened) for opened in chosen]
    counted = sum(len(window.activities) for window in windows)
    return Summary(
        whole=whole,
        num_times=len(chosen),
        span_ns=sum(window.span_ns for window in windows),
        gaps=[length for window in windows for _, length in window.gaps],
        kernels=_kernel_rows(windows),
        ranges=_range_rows(trace, chosen) if whole else [],
        num_outside=len(trace.activities) - counted,
        on_gpu=trace.on_gpu,
    )


def tables(summary: Summary, top: int) -> str:
    """The summary in Markdown, the `top` kernels with the most time in it."""
    work = "kernel" if summary.on_gpu else "operation"
    idle = sum(summary.gaps)
    of = f"{summary.num_times} x {summary.whole}" if summary.whole else "the whole trace"
    lines = [
        f"{of}: {_ms(summary.span_ns)} ms, of which no {work} ran for {_ms(idle)} ms "
        f"({_percent(idle, summary.span_ns)} %) in {len(summary.gaps)} gaps"
        + (f", the longest {_us(max(summary.gaps))} us" if summary.gaps else "")
    ]
    if summary.num_outside:
        lines.append(f"launched outside and not counted: {summary.num_outside} {work}(s)")
    lines += ["", *_kernel_table(summary, work, top)]
    if summary.ranges:
        lines += ["", *_range_table(summary, work)]
    return "\n".join(lines)


def _chosen(trace: Trace, name: str | None) -> tuple[list[Range], str]:
    for wanted in [name] if name is not None else _WHOLE:
        found = [one for one in trace.ranges if wanted in (one.name, one.name.partition("[")[0])]
        # Of ranges inside one another, the outer ones: nothing is counted twice.
        outer: list[Range] = []
        for one in found:
            if not outer or one.start >= outer[-1].end:
                outer.append(one)
        if outer:
            return outer, str(wanted)
    if name is not None:
        names = sorted({one.name for one in trace.ranges})
        raise ValueError(f"--range: expected one of {', '.join(names) or 'none'}, got {name}")
    first = min(min(one.start, one.launched) for one in trace.activities)
    return [Range("", first, max(one.end for one in trace.activities))], ""


def _window(activities: list[Activity], opened: Range) -> Window:
    """What was launched while a range was open, and when none of it ran."""
    first = bisect_left(activities, opened.start, key=lambda one: one.launched)
    last = bisect_left(activities, opened.end, key=lambda one: one.launched)
    inside = sorted(activities[first:last], key=lambda one: one.start)
    start, end = opened.start, opened.end
    if inside and max(one.end for one in inside) > opened.end:
        start, end = inside[0].start, max(one.end for one in inside)
    gaps, until = [], start
    for one in inside:
        if one.start > until:
            gaps.append((one.name, one.start - until))
        until = max(until, one.end)
    if end > until:
        gaps.append((_AT_THE_END, end - until))
    return Window(end - start, gaps, inside)


def _kernel_rows(windows: Iterable[Window]) -> list[KernelRow]:
    calls: dict[str, list[Activity]] = defaultdict(list)
    gaps: dict[str, int] = defaultdict(int)
    for window in windows:
        for activity in window.activities:
            calls[activity.name].append(activity)
        for name, length in window.gaps:
            gaps[name] += length
    rows = []
    for name in {**calls, **gaps}:
        moved = [one.num_bytes for one in calls[name] if one.num_bytes is not None]
        total = sum(one.own for one in calls[name])
        num_bytes = sum(moved) if moved else None
        rows.append(KernelRow(name, len(calls[name]), total, gaps[name], num_bytes))
    return sorted(rows, key=lambda row: (-row.total_ns, -row.gap_ns, row.name))


def _range_rows(trace: Trace, chosen: list[Range]) -> list[RangeRow]:
    """The chosen ranges and those inside them, by path."""
    windows: dict[str, list[Window]] = defaultdict(list)
    around = iter(chosen)
    current = next(around)
    for one in trace.ranges:
        while one.start >= current.end and (later := next(around, None)) is not None:
            current = later
        if current.start <= one.start and one.end <= current.end:
            windows[one.path].append(_window(trace.activities, one))
    # A path that comes late still stands below the one that it lies in.
    place = {path: index for index, path in enumerate(windows)}
    return [
        RangeRow(
            path,
            len(windows[path]),
            sum(window.span_ns for window in windows[path]),
            sum(len(window.activities) for window in windows[path]),
            sum(window.idle_ns for window in windows[path]),
        )
        for path in sorted(windows, key=lambda path: [place.get(up, -1) for up in _upwards(path)])
    ]


def _upwards(path: str) -> list[str]:
    """Each path that a path lies in, outermost first, and itself."""
    names = path.split("/")
    return ["/".join(names[: count + 1]) for count in range(len(names))]


def _kernel_table(summary: Summary, work: str, top: int) -> list[str]:
    head = [work, "count", "total ms", "mean us", "% of the time", "gap ms", "MB", "GB/s"]
    rows = []
    for row in summary.kernels[:top]:
        is_call = row.num_calls > 0
        moved = row.num_bytes is not None and row.total_ns > 0
        rows.append(
            [
                _short(row.name),
                str(row.num_calls) if is_call else "",
                _ms(row.total_ns) if is_call else "",
                _us(row.total_ns / row.num_calls) if is_call else "",
                _percent(row.total_ns, summary.span_ns) if is_call else "",
                _ms(row.gap_ns),
                f"{row.num_bytes / 1e6:.3f}" if row.num_bytes is not None else "",
                f"{row.num_bytes / row.total_ns:.0f}"
                if row.num_bytes is not None and moved
                else "",
            ]
        )
    if left := summary.kernels[top:]:
        count, total = sum(row.num_calls for row in left), sum(row.total_ns for row in left)
        share, gap = _percent(total, summary.span_ns), _ms(sum(row.gap_ns for row in left))
        rows.append([f"({len(left)} others)", str(count), _ms(total), "", share, gap, "", ""])
    return _aligned(head, rows)


def _range_table(summary: Summary, work: str) -> list[str]:
    head = ["range", "count", "ms", "% of the time", f"{work}s", "idle ms"]
    outermost = min(row.path.count("/") for row in summary.ranges)
    rows = [
        [
            "- " * (row.path.count("/") - outermost) + _short(row.path.rpartition("/")[2]),
            str(row.num_times),
            _ms(row.span_ns),
            _percent(row.span_ns, summary.span_ns),
            str(row.num_activities),
            _ms(row.idle_ns),
        ]
        for row in summary.ranges
    ]
    return _aligned(head, rows)


def _aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose columns also stand under each other; numbers to the right."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(head), line(rule), *map(line, rows)]


def _short(name: str) -> str:
    """Names of templates run to hundreds of letters."""
    name = name.removeprefix("void ").replace("|", "/")
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 3]}..."


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.3f}"


def _us(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e3:.1f}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "0.0"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path, help="sqlite export of nsys, or .json[.gz] of torch")
    parser.add_argument("--range", help="count only what was launched inside ranges of this name")
    parser.add_argument("--top", type=int, default=25, help="kernels in the table")
    parser.add_argument("--gpu", type=int, help="which one, where several were at work")
    chosen = parser.parse_args(argv)
    try:
        print(tables(summarize(read_trace(chosen.trace, gpu=chosen.gpu), chosen.range), chosen.top))
    except (OSError, ValueError) as error:
        sys.exit(f"summarize.py: {error}")


if __name__ == "__main__":
    main()
