"""bench/bench_kernels.py: what it measures, whom it refuses, what its rows say."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_scripts import ROOT, Scripts, doubling_case, kernel_scripts
from torch import Tensor


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripts]:
    with kernel_scripts(monkeypatch) as found:
        yield found


def command(output: Path, *more: str) -> list[str]:
    return ["--device", "cpu", "--threads", "1", "--cache", "hot", "--samples", "1",
            "--only", "rmsnorm", "--output", str(output), *more]  # fmt: skip


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_wrong_result_of_ours_is_not_timed(scripts: Scripts) -> None:
    case = doubling_case(scripts, ours=lambda x: (2.001 * x,))
    with pytest.raises(scripts.runs.WrongResultError, match="argrpo: expected an error of at most"):
        scripts.runs.measure_case(case, scripts.method(iter(())))


def test_peers_that_are_missing_wrong_or_broken_are_lines_and_the_rest_is_timed(
    scripts: Scripts,
) -> None:
    def missing(_x: Tensor) -> tuple[Tensor, ...]:
        raise scripts.cases.PeerMissingError("fast-double: not installed")

    def broken(_x: Tensor) -> tuple[Tensor, ...]:
        raise TypeError("double() takes 2 arguments")

    case = doubling_case(
        scripts, torch=lambda x: (x + x,), gone=missing, bad=broken, off=lambda x: (2.1 * x,)
    )
    lines: list[str] = []
    say = scripts.runs.said_once(lines.append)
    method = scripts.method(say=say)
    for _ in range(2):
        rows = scripts.runs.measure_case(case, method)
        assert [row["contender"] for row in rows] == ["argrpo", "torch"]
    assert lines[0] == "without fast-double: not installed"
    assert lines[1] == "without bad: TypeError: double() takes 2 arguments"
    assert lines[2].startswith("without off: WrongResultError: off: expected an error of at most 8")
    assert len(lines) == 3


def test_our_own_error_is_not_hidden(scripts: Scripts) -> None:
    def broken(_x: Tensor) -> tuple[Tensor, ...]:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        scripts.runs.measure_case(doubling_case(scripts, ours=broken), scripts.method())


def test_rows_compare_a_call_with_ours_the_floor_and_the_limit(scripts: Scripts) -> None:
    case = doubling_case(scripts, floor=lambda x: (x + x,))
    # One call takes 2.5 ms, so a hot pass is 2 of them; then turns: ours, floor, 1 warm, 2 timed.
    seconds = iter([2.5e-3, 9.0, 9.0, 4e-6, 2e-6, 4e-6, 2e-6])
    ours, floor = scripts.runs.measure_case(case, scripts.method(seconds))
    assert (ours["p50_us"], floor["p50_us"]) == (2.0, 1.0)
    assert (ours["over_ours"], ours["over_floor"]) == (1.0, 2.0)
    assert (floor["over_ours"], floor["over_floor"]) == (0.5, 1.0)
    # 512 bytes at 1e9 a second take 0.512 us.
    assert ours["limit_us"] == 0.512
    assert ours["percent_of_limit"] == 25.6
    assert (ours["cache"], ours["rows"], ours["graph"]) == ("hot", 64, False)
    assert next(seconds, None) is None


def test_inputs_that_never_leave_the_cache_are_not_called_cold(scripts: Scripts) -> None:
    case = doubling_case(scripts)
    assert scripts.runs.input_sets(case, case.make(), "cold", scripts.method()) == ([], 0)
    large = replace(case, work=scripts.timing.Work(32 << 20, 0))
    sets, repeats = scripts.runs.input_sets(large, case.make(), "cold", scripts.method())
    assert (len(sets), repeats) == (5, 1)  # 128 MiB and one more, for a cache of 64
    assert len({id(one) for one in sets}) == 5


@pytest.mark.parametrize("waits", [False, True])
def test_on_a_gpu_calls_are_captured_unless_they_wait_for_the_host(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    events: list[str] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    def captured(calls: list[Callable[[], object]]) -> Graph:
        events.append(f"capture of {len(calls)}")
        return Graph()

    monkeypatch.setattr(scripts.runs, "synchronises", lambda call: waits)
    monkeypatch.setattr(scripts.runs, "captured", captured)
    calls = [lambda name=name: events.append(name) for name in "ab"]
    one = scripts.runs.one_pass(calls, torch.device("cuda"))
    one.run()
    assert one.calls == 2
    assert one.is_graph is not waits
    # The first call compiles, before anything is asked or captured.
    assert events == (["a", "a", "b"] if waits else ["a", "capture of 2", "replay"])


def test_a_peer_that_cannot_be_captured_leaves_the_others_in_the_race(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = doubling_case(scripts, torch=lambda x: (x + x,), odd=lambda x: (x * 2,))
    lines: list[str] = []
    method = scripts.method(say=lines.append)
    entrants = scripts.runs.checked(case, case.make(), method)
    plain = scripts.runs.one_pass
    made: list[int] = []

    def failing_third(calls: list[Callable[[], object]], device: torch.device) -> Any:
        made.append(1)
        if len(made) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return plain(calls, device)

    monkeypatch.setattr(scripts.runs, "one_pass", failing_third)
    passes = scripts.runs.passes_of(entrants, [case.make()], 1, method)
    assert list(passes) == ["argrpo", "torch"]
    assert lines[0].startswith("without odd: RuntimeError: operation not permitted")


def test_rows_are_appended_and_a_second_run_leaves_them_out(
    scripts: Scripts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "results" / "kernels.jsonl"
    ceilings = scripts.timing.Ceilings(1e9, 1e9)
    monkeypatch.setattr(scripts.bench, "ceilings_of", lambda device, dtype: ceilings)
    arguments = command(output, "--models", "tiny", "--images", "2", "--tokens", "256")
    scripts.bench.main(arguments)
    rows = rows_in(output)
    assert [row["contender"] for row in rows] == ["argrpo", "torch eager", "torch library"] * 2
    for field in ("bench", "op", "case", "dtype", "work", "p20_us", "p50_us", "p80_us", "peak_mb",
                  "percent_of_limit", "device", "torch", "triton", "commit", "date"):  # fmt: skip
        assert field in rows[0]
    scripts.bench.main([*arguments, "--resume"])
    assert rows_in(output) == rows
    older = [json.dumps({**row, "commit": "older"}) for row in rows[:3]]
    output.write_text("\n".join([*older, *map(json.dumps, rows[3:]), ""]), encoding="utf-8")
    scripts.bench.main([*arguments, "--resume"])
    assert [row["case"] for row in rows_in(output)[6:]] == [rows[0]["case"]] * 3
    assert "% of the limit" in capsys.readouterr().out


def test_a_wrong_case_ends_in_an_error_after_the_others(
    scripts: Scripts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "kernels.jsonl"
    wrong = replace(doubling_case(scripts, ours=lambda x: (3 * x,)), op="rmsnorm")
    right = replace(doubling_case(scripts), op="rmsnorm", facts={"rows": 1})
    monkeypatch.setattr(scripts.bench, "cases_of", lambda place, grid: iter([wrong, right]))
    ceilings = scripts.timing.Ceilings(1e9, 1e9)
    monkeypatch.setattr(scripts.bench, "ceilings_of", lambda device, dtype: ceilings)
    with pytest.raises(SystemExit, match="1 cases with a wrong result were not timed"):
        scripts.bench.main(command(output))
    assert [row["case"] for row in rows_in(output)] == ["rmsnorm, rows 1"]
    assert "WRONG rmsnorm, rows 64: argrpo: expected an error" in capsys.readouterr().out


def test_a_contender_can_be_left_out_but_not_ours(
    scripts: Scripts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "kernels.jsonl"
    ceilings = scripts.timing.Ceilings(1e9, 1e9)
    monkeypatch.setattr(scripts.bench, "ceilings_of", lambda device, dtype: ceilings)
    small = ["--models", "tiny", "--images", "2", "--tokens", "256"]
    scripts.bench.main(command(output, *small, "--without", "torch library", "liger-kernel"))
    assert {row["contender"] for row in rows_in(output)} == {"argrpo", "torch eager"}
    assert "liger-kernel" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scripts.bench.arguments(["--without", "argrpo"])


def test_odd_numbers_of_tokens_are_refused(
    scripts: Scripts, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        scripts.bench.arguments(["--tokens", "2048", "300"])
    assert "--tokens: expected multiples of 256, got 300" in capsys.readouterr().err


def test_pytest_collects_the_bench_and_groups_it_by_operation(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    chosen = "layernorm and argrpo and rows and not residual and not backward"
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pytest", "bench/", "--benchmark-only"),
            *("-p", "no:cacheprovider", "-k", chosen, f"--benchmark-json={report}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bench,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    assert bench["group"] == "layernorm"
    assert bench["extra_info"]["model"] == "taming"
    assert bench["extra_info"]["percent_of_limit"] > 0
