"""What ran and under which names, read from an nsys export or a trace of torch.profiler.

Times are integers in nanoseconds, on one clock for host and device.
"""

import gzip
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from argrpo.nvtx_ranges import TRAINER_DOMAIN

_SQLITE_MAGIC = b"SQLite format 3\x00"
_GZIP_MAGIC = b"\x1f\x8b"
_DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
# Types of nsys's NVTX_EVENTS: a range that was pushed and popped, and the making of a domain.
_PUSHED, _DOMAIN = 59, 75
_COPY_KINDS = {1: "host to device", 2: "device to host", 8: "device to device"}


class Activity(NamedTuple):
    """A kernel, copy or fill of a GPU; in a trace without one, an operation on the CPU."""

    name: str
    start: int
    end: int
    own: int  # without the operations that it called; a kernel calls none
    num_bytes: int | None  # that it moved, where the trace knows
    launched: int  # when the host asked for it


class Range(NamedTuple):
    """A named stretch of the host's time."""

    path: str  # names of the ranges around it and its own: step/rollout/prefill
    start: int
    end: int

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class Trace(NamedTuple):
    """Activities in the order in which they were asked for; ranges in that of their start."""

    activities: list[Activity]
    ranges: list[Range]
    on_gpu: bool


class _Span(NamedTuple):
    """What nests: its thread, its extent, its name."""

    thread: object
    start: int
    end: int
    name: str


def read_trace(path: Path, *, gpu: int | None = None) -> Trace:
    """Read an sqlite export of nsys, or a Chrome trace (.json, .json.gz) of torch.profiler.

    Args:
        path: the file.
        gpu: of which device; None where only one was at work.

    Raises:
        ValueError: the file is neither, holds nothing that ran, or several devices.
    """
    with path.open("rb") as file:
        head = file.read(len(_SQLITE_MAGIC))
    if head == _SQLITE_MAGIC:
        trace = _read_nsys(path, gpu)
    elif path.suffix == ".nsys-rep":
        raise ValueError(
            f"{path}: expected an export, got a report; nsys export --type sqlite {path}"
        )
    else:
        trace = _read_chrome(path, head.startswith(_GZIP_MAGIC), gpu)
    if not trace.activities:
        raise ValueError(f"{path}: expected kernels or operations, found none")
    return trace


def _read_nsys(path: Path, gpu: int | None) -> Trace:
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if "CUPTI_ACTIVITY_KIND_GRAPH_TRACE" in tables:
            raise ValueError(
                f"{path}: expected the kernels inside CUDA graphs, got graphs traced whole; record "
                "with --cuda-graph-trace=node"
            )
        rows = list(_nsys_work(connection, tables))
        chosen = _one_device(path, [row[0] for row in rows], gpu)
        launches = _nsys_launches(connection, tables)
        activities = [
            Activity(
                name, start, end, end - start, num_bytes, launches.get((pid, correlation), start)
            )
            for device, name, start, end, num_bytes, pid, correlation in rows
            if device == chosen
        ]
        ranges = _nested(_nsys_ranges(connection)) if "NVTX_EVENTS" in tables else []
    finally:
        connection.close()
    return Trace(sorted(activities, key=lambda one: one.launched), ranges, on_gpu=True)


def _nsys_work(connection: sqlite3.Connection, tables: set[str]) -> Iterator[tuple[Any, ...]]:
    """(device, name, start, end, bytes, process, correlation) of kernels, copies and fills."""
    process = "globalPid >> 24"
    if "CUPTI_ACTIVITY_KIND_KERNEL" in tables:
        yield from connection.execute(
            f"SELECT deviceId, value, start, end, NULL, {process}, correlationId "
            "FROM CUPTI_ACTIVITY_KIND_KERNEL JOIN StringIds ON StringIds.id = demangledName"
        )
    if "CUPTI_ACTIVITY_KIND_MEMCPY" in tables:
        for device, kind, *rest in connection.execute(
            f"SELECT deviceId, copyKind, start, end, bytes, {process}, correlationId "
            "FROM CUPTI_ACTIVITY_KIND_MEMCPY"
        ):
            yield device, f"copy {_COPY_KINDS.get(kind, 'of another kind')}", *rest
    if "CUPTI_ACTIVITY_KIND_MEMSET" in tables:
        yield from connection.execute(
            f"SELECT deviceId, 'fill', start, end, bytes, {process}, correlationId "
            "FROM CUPTI_ACTIVITY_KIND_MEMSET"
        )


def _nsys_launches(connection: sqlite3.Connection, tables: set[str]) -> dict[tuple[int, int], int]:
    """(process, correlation): when the host called. All nodes of a graph share its launch."""
    if "CUPTI_ACTIVITY_KIND_RUNTIME" not in tables:
        return {}
    rows = connection.execute(
        "SELECT globalTid >> 24, correlationId, start FROM CUPTI_ACTIVITY_KIND_RUNTIME"
    )
    return {(process, correlation): start for process, correlation, start in rows}


def _nsys_ranges(connection: sqlite3.Connection) -> list[_Span]:
    """Ours where there are any; else those of everyone."""
    domains = connection.execute(
        "SELECT globalTid >> 24, domainId, COALESCE(text, value) FROM NVTX_EVENTS "
        f"LEFT JOIN StringIds ON StringIds.id = textId WHERE eventType = {_DOMAIN}"
    )
    ours = {
        (process, domain)
        for process, domain, name in domains
        if name is not None and name.split(".")[0] == TRAINER_DOMAIN
    }
    rows = connection.execute(
        "SELECT globalTid, domainId, start, end, COALESCE(text, value) FROM NVTX_EVENTS "
        f"LEFT JOIN StringIds ON StringIds.id = textId WHERE eventType = {_PUSHED} "
        "AND end IS NOT NULL AND COALESCE(text, value) IS NOT NULL"
    )
    return [
        _Span(thread, start, end, name)
        for thread, domain, start, end, name in rows
        if not ours or (thread >> 24, domain) in ours
    ]


def _read_chrome(path: Path, is_packed: bool, gpu: int | None) -> Trace:
    content = path.read_bytes()
    try:
        events = json.loads(gzip.decompress(content) if is_packed else content)["traceEvents"]
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: expected an sqlite export of nsys or a trace of torch.profiler, got neither"
        ) from error
    done = [event for event in events if event.get("ph") == "X" and "dur" in event]
    ranges = _nested([_span(event) for event in done if event.get("cat") == "user_annotation"])
    work = [event for event in done if event.get("cat") in _DEVICE_WORK]
    if work:
        chosen = _one_device(path, [event["args"].get("device") for event in work], gpu)
        activities = _chrome_kernels(done, chosen)
    else:
        activities = _cpu_operations(done)
    return Trace(sorted(activities, key=lambda one: one.launched), ranges, on_gpu=bool(work))


def _chrome_kernels(events: list[dict[str, Any]], gpu: object) -> list[Activity]:
    launches = {
        event["args"]["correlation"]: _span(event).start
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    activities = []
    for event in events:
        if event.get("cat") not in _DEVICE_WORK or event["args"].get("device") != gpu:
            continue
        span, facts = _span(event), event["args"]
        launched = launches.get(facts.get("correlation"), span.start)
        took = span.end - span.start
        activities.append(
            Activity(span.name, span.start, span.end, took, facts.get("bytes"), launched)
        )
    return activities


def _cpu_operations(events: list[dict[str, Any]]) -> list[Activity]:
    spans = [_span(event) for event in events if event.get("cat") == "cpu_op"]
    own = [span.end - span.start for span in spans]
    for child, parents in _parents(spans):
        if parents:
            own[parents[-1]] -= spans[child].end - spans[child].start
    return [
        Activity(span.name, span.start, span.end, left, None, span.start)
        for span, left in zip(spans, own, strict=True)
    ]


def _span(event: dict[str, Any]) -> _Span:
    # Microseconds with three decimals in the file.
    start, took = round(event["ts"] * 1000), round(event["dur"] * 1000)
    return _Span((event.get("pid"), event.get("tid")), start, start + took, event["name"])


def _nested(spans: list[_Span]) -> list[Range]:
    ranges = [
        Range(
            "/".join([*(spans[parent].name for parent in parents), spans[child].name]),
            spans[child].start,
            spans[child].end,
        )
        for child, parents in _parents(spans)
    ]
    return sorted(ranges, key=lambda one: (one.start, -one.end))


def _parents(spans: list[_Span]) -> Iterator[tuple[int, list[int]]]:
    """Each span's index, and those of the spans of its thread around it, outermost first."""
    order = sorted(
        range(len(spans)), key=lambda i: (str(spans[i].thread), spans[i].start, -spans[i].end)
    )
    around: list[int] = []
    for child in order:
        span = spans[child]
        while around and not _holds(spans[around[-1]], span):
            around.pop()
        yield child, list(around)
        around.append(child)


def _holds(outer: _Span, inner: _Span) -> bool:
    return outer.thread == inner.thread and inner.end <= outer.end and inner.start < outer.end


def _one_device(path: Path, found: list[Any], wanted: int | None) -> Any:
    devices = sorted(set(found), key=str)
    if wanted is not None and wanted not in devices:
        raise ValueError(f"--gpu: expected one of {devices} in {path}, got {wanted}")
    if wanted is None and len(devices) > 1:
        raise ValueError(f"{path}: expected one GPU, got {devices}; choose one with --gpu")
    return wanted if wanted is not None else next(iter(devices), None)
