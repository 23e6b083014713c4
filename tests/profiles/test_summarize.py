"""Tables of traces whose every number is known."""

import gzip
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import summarize
import torch
from summarize import KernelRow, RangeRow, Summary, tables
from traces import read_trace

PROCESS = (3 << 48) | (77 << 24)  # nsys: hardware, process and thread in one number
MAIN, AUTOGRAD = PROCESS | 77, PROCESS | 78
NAMES = {1: "attention", 2: "void gemm<bf16>", 3: "prefill", 4: "cudaLaunchKernel", 5: "argrpo"}
US = 1000

# (name, start, end, correlation) of kernels, in microseconds. Launch 11 is a graph of two nodes.
KERNELS = [(2, 110, 130, 10), (1, 140, 180, 11), (2, 180, 190, 11), (1, 320, 350, 13)]
KERNELS += [(2, 900, 950, 14)]  # launched outside the steps
COPIES = [(200, 210, 12, 40_000, 2)]  # start, end, correlation, bytes, kind: device to host
FILLS = [(310, 315, 15, 5_000)]
LAUNCHES = [(10, 102, MAIN), (11, 120, MAIN), (12, 150, MAIN), (15, 304, MAIN)]
LAUNCHES += [(13, 306, AUTOGRAD), (14, 890, MAIN)]
# Of each its name or the id of that, start, end, thread and domain.
RANGES = [
    ("step", None, 100, 220, MAIN, 1),
    (None, 3, 101, 118, MAIN, 2),  # the package nvtx registers its strings
    ("decode[1..8]", None, 119, 125, MAIN, 2),  # only launches
    ("step", None, 300, 360, MAIN, 1),
    ("step", None, 880, 960, MAIN, 9),  # of somebody else's domain
]
DOMAINS = [("argrpo", None, 1), ("argrpo.engine", None, 2), ("cublas", None, 9)]


def nsys_export(path: Path, *, device: int = 0) -> Path:
    """An sqlite export with the columns that we read, and a few that we do not."""
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT)")
        db.executemany("INSERT INTO StringIds VALUES (?, ?)", NAMES.items())
        db.execute(
            "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT, end INT, deviceId INT, "
            "streamId INT, correlationId INT, globalPid INT, demangledName INT, shortName INT, "
            "graphNodeId INT)"
        )
        db.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, 7, ?, ?, ?, ?, NULL)",
            [(s * US, e * US, device, c, PROCESS, name, name) for name, s, e, c in KERNELS],
        )
        db.execute(
            "CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INT, end INT, deviceId INT, "
            "correlationId INT, globalPid INT, bytes INT, copyKind INT)"
        )
        db.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (?, ?, 0, ?, ?, ?, ?)",
            [(s * US, e * US, c, PROCESS, size, kind) for s, e, c, size, kind in COPIES],
        )
        db.execute(
            "CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (start INT, end INT, deviceId INT, "
            "correlationId INT, globalPid INT, bytes INT)"
        )
        db.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_MEMSET VALUES (?, ?, 0, ?, ?, ?)",
            [(s * US, e * US, c, PROCESS, size) for s, e, c, size in FILLS],
        )
        db.execute(
            "CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INT, end INT, globalTid INT, "
            "correlationId INT, nameId INT)"
        )
        db.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?, 4)",
            [(at * US, at * US + 900, thread, c) for c, at, thread in LAUNCHES],
        )
        db.execute(
            "CREATE TABLE NVTX_EVENTS (start INT, end INT, eventType INT, text TEXT, "
            "globalTid INT, textId INT, domainId INT)"
        )
        db.executemany(
            "INSERT INTO NVTX_EVENTS VALUES (0, NULL, 75, ?, ?, ?, ?)",
            [(text, MAIN, text_id, domain) for text, text_id, domain in DOMAINS],
        )
        db.executemany(
            "INSERT INTO NVTX_EVENTS VALUES (?, ?, 59, ?, ?, ?, ?)",
            [(s * US, e * US, text, t, text_id, d) for text, text_id, s, e, t, d in RANGES],
        )
    db.close()
    return path


def summary_of(path: Path, name: str | None = None) -> Summary:
    return summarize.summarize(read_trace(path), name)


def test_an_nsys_export_gives_counts_times_bytes_and_the_gap_before_each_kernel(
    tmp_path: Path,
) -> None:
    summary = summary_of(nsys_export(tmp_path / "report.sqlite"))
    assert (summary.whole, summary.num_times, summary.on_gpu) == ("step", 2, True)
    assert summary.span_ns == (120 + 60) * US
    assert summary.kernels == [
        # 130 to 140; 315 to 320, after the fill
        KernelRow("attention", 2, 70 * US, 15 * US, None),
        KernelRow("void gemm<bf16>", 2, 30 * US, 10 * US, None),  # 100 to 110
        KernelRow("copy device to host", 1, 10 * US, 10 * US, 40_000),  # 190 to 200
        KernelRow("fill", 1, 5 * US, 10 * US, 5_000),  # 300 to 310
        KernelRow("(after the last one)", 0, 0, 20 * US, None),  # 210 to 220, 350 to 360
    ]
    assert sorted(summary.gaps) == [5 * US, *[10 * US] * 6]
    assert summary.num_outside == 1
    busy = sum(row.total_ns for row in summary.kernels)
    assert busy + sum(summary.gaps) == summary.span_ns, "nothing ran side by side here"


def test_kernels_belong_to_the_range_that_launched_them(tmp_path: Path) -> None:
    summary = summary_of(nsys_export(tmp_path / "report.sqlite"))
    assert summary.ranges == [
        RangeRow("step", 2, 180 * US, 6, 65 * US),
        # Launched at 102 and still running after the range: from its first kernel to its last.
        RangeRow("step/prefill", 1, 20 * US, 1, 0),
        RangeRow("step/decode[1..8]", 1, 50 * US, 2, 0),
    ]


def test_one_range_can_be_asked_for_without_its_numbers(tmp_path: Path) -> None:
    summary = summary_of(nsys_export(tmp_path / "report.sqlite"), "decode")
    assert summary.span_ns == 50 * US
    assert [(row.name, row.num_calls) for row in summary.kernels] == [
        ("attention", 1),
        ("void gemm<bf16>", 1),
    ]
    with pytest.raises(ValueError, match=r"--range: expected one of decode\[1..8\], prefill, step"):
        summary_of(tmp_path / "report.sqlite", "reward")


def test_the_tables_show_shares_of_the_step(tmp_path: Path) -> None:
    text = tables(summary_of(nsys_export(tmp_path / "report.sqlite")), top=2)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert text.startswith(
        "2 x step: 0.180 ms, of which no kernel ran for 0.065 ms (36.1 %) in 7 gaps, the longest "
        "10.0 us\nlaunched outside and not counted: 1 kernel(s)"
    )
    assert ["attention", "2", "0.070", "35.0", "38.9", "0.015", "", ""] in lines
    assert ["gemm<bf16>", "2", "0.030", "15.0", "16.7", "0.010", "", ""] in lines
    assert ["(3 others)", "2", "0.015", "", "8.3", "0.040", "", ""] in lines
    assert ["- decode[1..8]", "1", "0.050", "27.8", "2", "0.000"] in lines
    everything = tables(summary_of(tmp_path / "report.sqlite"), top=9)
    copied = next(line for line in everything.splitlines() if "device to host" in line)
    assert [cell.strip() for cell in copied.split("|")[7:9]] == ["0.040", "4"], "40 kB in 10 us"


def test_graphs_that_were_traced_whole_are_refused_with_the_flag_that_opens_them(
    tmp_path: Path,
) -> None:
    path = nsys_export(tmp_path / "report.sqlite")
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INT, end INT)")
    db.close()
    with pytest.raises(ValueError, match="--cuda-graph-trace=node"):
        read_trace(path)


def test_several_gpus_are_told_apart(tmp_path: Path) -> None:
    path = nsys_export(tmp_path / "report.sqlite", device=1)  # kernels on 1, copies on 0
    with pytest.raises(ValueError, match=r"expected one GPU, got \[0, 1\]; .* --gpu"):
        read_trace(path)
    assert len(read_trace(path, gpu=1).activities) == len(KERNELS)
    with pytest.raises(ValueError, match=r"--gpu: expected one of \[0, 1\] in .*, got 2"):
        read_trace(path, gpu=2)


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 5, "tid": tid,
        "args": args,
    }  # fmt: skip


CPU_EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 5, "args": {}},
    event("user_annotation", "step", 1000.0, 100.0),
    event("user_annotation", "rollout", 1010.0, 60.0),
    event("cpu_op", "aten::linear", 1010.0, 40.5),
    event("cpu_op", "aten::mm", 1015.25, 30.0),
    event("cpu_op", "aten::add", 1060.5, 9.5),
    event("cpu_op", "aten::add", 1080.0, 20.0),
    event("cpu_op", "aten::add", 2000.0, 20.0),
    event("python_function", "learner.py(12)", 1000.0, 90.0),
]
GPU_EVENTS = [
    event("user_annotation", "rollout", 1000.0, 100.0),
    event("gpu_user_annotation", "rollout", 1020.0, 60.0, tid=7),
    event("cpu_op", "aten::mm", 1005.0, 10.0),
    event("cuda_runtime", "cudaGraphLaunch", 1006.0, 5.0, correlation=3),
    event("kernel", "attention", 1020.0, 30.0, tid=7, correlation=3, device=0),
    event("kernel", "gemm", 1052.0, 18.0, tid=7, correlation=3, device=0),
    event("gpu_memcpy", "Memcpy DtoH", 1070.0, 10.0, tid=7, device=0, bytes=1000),
]


def chrome_trace(path: Path, events: list[dict[str, Any]]) -> Path:
    text = json.dumps({"schemaVersion": 1, "traceEvents": events}).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_an_operation_on_the_cpu_counts_without_those_that_it_called(
    name: str, tmp_path: Path
) -> None:
    summary = summary_of(chrome_trace(tmp_path / name, CPU_EVENTS))
    assert not summary.on_gpu
    assert summary.span_ns == 100_000
    assert summary.kernels == [
        KernelRow("aten::mm", 1, 30_000, 0, None),
        KernelRow("aten::add", 2, 29_500, 20_000, None),  # 1050.5 to 1060.5, 1070 to 1080
        KernelRow("aten::linear", 1, 10_500, 10_000, None),  # 1000 to 1010
    ]
    assert summary.ranges == [
        RangeRow("step", 1, 100_000, 4, 30_000),
        RangeRow("step/rollout", 1, 60_000, 3, 10_000),
    ]
    assert summary.num_outside == 1


def test_a_range_that_comes_late_stands_below_the_one_it_lies_in(tmp_path: Path) -> None:
    events = [
        event("user_annotation", name, start, length)
        for name, start, length in [
            ("step", 0, 50), ("reward", 0, 20), ("reward clip", 1, 5), ("update", 30, 5),
            ("step", 100, 50), ("reward", 100, 20), ("reward late", 101, 5), ("update", 130, 5),
        ]
    ]  # fmt: skip
    events.append(event("cpu_op", "aten::mm", 2, 1))
    summary = summary_of(chrome_trace(tmp_path / "trace.json", events))
    assert [row.path for row in summary.ranges] == [
        "step", "step/reward", "step/reward/reward clip", "step/reward/reward late", "step/update",
    ]  # fmt: skip


def test_a_gpu_trace_counts_kernels_and_not_the_operations_that_launched_them(
    tmp_path: Path,
) -> None:
    summary = summary_of(chrome_trace(tmp_path / "trace.json", GPU_EVENTS))
    assert (summary.whole, summary.span_ns) == ("rollout", 100_000)
    assert [(row.name, row.num_calls, row.gap_ns, row.num_bytes) for row in summary.kernels] == [
        ("attention", 1, 20_000, None),
        ("gemm", 1, 2_000, None),
        ("Memcpy DtoH", 1, 0, 1000),
        ("(after the last one)", 0, 20_000, None),
    ]


def test_a_trace_without_ranges_is_counted_whole(tmp_path: Path) -> None:
    events = [one for one in CPU_EVENTS if one.get("cat") != "user_annotation"]
    summary = summary_of(chrome_trace(tmp_path / "trace.json", events))
    assert (summary.whole, summary.span_ns, summary.ranges) == ("", 1_010_000, [])
    assert tables(summary, 5).startswith("the whole trace: 1.010 ms")


def test_a_trace_that_torch_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function("rollout"):
            for _ in range(3):
                torch.ones(8, 8) @ torch.ones(8, 8)
        torch.ones(4).add(1)
    profiler.export_chrome_trace(str(path))
    summary = summary_of(path)
    counts = {row.name: row.num_calls for row in summary.kernels}
    assert counts["aten::mm"] == 3 and counts["aten::ones"] == 6
    assert "aten::add" not in counts
    own = sum(row.total_ns for row in summary.kernels)
    # Everything ran on one thread, so that its own times and the gaps add up to the range.
    assert own + sum(summary.gaps) == summary.span_ns


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.nsys-rep", b"\x00\x01", "nsys export --type sqlite"),
        ("notes.txt", b"hello", "expected an sqlite export of nsys or a trace of torch"),
        ("list.json", b"[1, 2]", "expected an sqlite export of nsys or a trace of torch"),
        ("cut.json.gz", b"\x1f\x8b\x08", "expected an sqlite export of nsys or a trace of torch"),
        ("empty.json", b'{"traceEvents": []}', "expected kernels or operations, found none"),
    ],
)
def test_a_file_that_is_no_trace_is_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        summarize.main([str(tmp_path / name)])


def test_the_script_prints_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = nsys_export(tmp_path / "report.sqlite")
    summarize.main([str(path), "--range", "decode", "--top", "1"])
    printed = capsys.readouterr().out
    assert "1 x decode" in printed and "(1 others)" in printed
