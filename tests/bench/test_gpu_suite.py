"""bench/gpu_suite.py on parts that this file writes, and what its real parts may import."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
# What a bare machine with a GPU does not have.
BLOCKED = ["jsonargparse", "nvtx", "open_clip", "hypothesis", "rich", "tensorboard", "torchvision"]
ROW = 'print("measuring"); open({path!r}, "a").write("{name}\\n")'


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, on a machine that says it has a GPU."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    handler = signal.getsignal(signal.SIGTERM)
    module = importlib.import_module("gpu_suite")
    monkeypatch.setattr(module, "commit_described", lambda: "abc1234")
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    yield module
    signal.signal(signal.SIGTERM, handler)
    for name in ("gpu_suite", "gpu_parts", "result_rows", "suite_headlines"):
        sys.modules.pop(name, None)


@pytest.fixture
def part(suite: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """`part("name", "code after the row", 5.0)`: appends its name to a file, then does more."""

    def make(name: str, more: str = "", limit_s: float = 30.0) -> Any:
        row = ROW.format(path=str(tmp_path / "ran.txt"), name=name)
        return suite.Part(name, ("-c", f"{row}\n{more}"), limit_s)

    return make


def ran(tmp_path: Path) -> list[str]:
    path = tmp_path / "ran.txt"
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def call(suite: ModuleType, tmp_path: Path, parts: list[Any], *more: str) -> int:
    code: int = suite.main(["--results", str(tmp_path / "results"), *more], parts)
    return code


def statuses(tmp_path: Path) -> list[tuple[str, str]]:
    lines = (tmp_path / "results" / "gpu_suite.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["part"], row["status"]) for row in map(json.loads, lines)]


def test_parts_run_in_order_and_end_in_one_table(
    suite: ModuleType, part: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = [part("first"), part("second", "print('3 passed')")]
    step = {"bench": "step", "case": "step XL", "images_per_s": 35.0, "commit": "abc1234"}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "step_gpu.jsonl").write_text(json.dumps(step) + "\n")
    assert call(suite, tmp_path, parts) == 0
    assert ran(tmp_path) == ["first", "second"]
    rows = [
        json.loads(line)
        for line in (tmp_path / "results" / "gpu_suite.jsonl").read_text().splitlines()
    ]
    assert [row["last_line"] for row in rows] == ["measuring", "3 passed"]
    assert {row["commit"] for row in rows} == {"abc1234"}
    printed = capfd.readouterr().out
    assert "step XL: 35.00 images/s\n" in printed  # headlines of this commit come first
    table = printed.partition("part  ")[2]
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [
        ["first", "done"],
        ["second", "done"],
    ]


def test_a_part_over_its_limit_is_ended_with_all_that_it_started(
    suite: ModuleType, part: Callable[..., Any], tmp_path: Path
) -> None:
    pid_file = tmp_path / "child.txt"
    child = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    parts = [part("slow", child, limit_s=3.0), part("next")]
    start = time.monotonic()
    assert call(suite, tmp_path, parts) == 1
    assert time.monotonic() - start < 20
    assert ran(tmp_path) == ["slow", "next"]  # what it wrote before it was ended stays
    assert statuses(tmp_path) == [("slow", "over its limit"), ("next", "done")]
    assert _is_gone(int(pid_file.read_text()))


def test_a_part_that_does_not_listen_is_ended_too(
    suite: ModuleType, part: Callable[..., Any], tmp_path: Path
) -> None:
    deaf = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\ntime.sleep(60)"
    )
    assert call(suite, tmp_path, [part("deaf", deaf, limit_s=1.5)]) == 1
    assert statuses(tmp_path) == [("deaf", "over its limit")]


def test_a_failed_part_shows_its_last_lines_and_the_rest_runs_on(
    suite: ModuleType, part: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = [part("broken", "raise ValueError('no such tile')"), part("next")]
    assert call(suite, tmp_path, parts) == 1
    assert statuses(tmp_path) == [("broken", "failed"), ("next", "done")]
    assert "ValueError: no such tile" in capfd.readouterr().out
    # A second call does not do it again: the commit is the same.
    assert call(suite, tmp_path, parts) == 0
    assert ran(tmp_path) == ["broken", "next"]


def test_a_second_call_continues_where_time_ran_out(
    suite: ModuleType, part: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "LEAST_SECONDS", 1.0)
    parts = [part("first"), part("long", "import time; time.sleep(6)"), part("last")]
    assert call(suite, tmp_path, parts, "--minutes", str(4 / 60)) == 0
    assert statuses(tmp_path) == [("first", "done"), ("long", "cut")]
    assert call(suite, tmp_path, parts) == 0
    # What never ran comes before what was cut.
    assert statuses(tmp_path)[2:] == [("last", "done"), ("long", "done")]
    assert ran(tmp_path) == ["first", "long", "last", "long"]
    assert call(suite, tmp_path, parts) == 0
    assert len(ran(tmp_path)) == 4


def test_a_changed_commit_starts_again(
    suite: ModuleType, part: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [part("first"), part("second")]
    call(suite, tmp_path, parts, "--only", "first")
    monkeypatch.setattr(suite, "commit_described", lambda: "def5678")
    call(suite, tmp_path, parts)
    assert ran(tmp_path) == ["first", "first", "second"]


def test_what_is_done_is_done_again_only_where_that_is_asked(
    suite: ModuleType, part: Callable[..., Any], tmp_path: Path
) -> None:
    parts = [part("first"), part("broken", "raise SystemExit(3)")]
    assert call(suite, tmp_path, parts) == 1
    assert call(suite, tmp_path, parts, "--only", "broken") == 0
    assert call(suite, tmp_path, parts, "--only", "broken", "--again") == 1
    assert ran(tmp_path) == ["first", "broken", "broken"]


def test_only_what_is_named_runs_and_the_state_may_lie_elsewhere(
    suite: ModuleType, part: Callable[..., Any], tmp_path: Path
) -> None:
    parts = [part("first"), part("second"), part("third")]
    state = tmp_path / "elsewhere" / "state.json"
    call(suite, tmp_path, parts, "--only", "third", "first", "--state", str(state))
    assert ran(tmp_path) == ["first", "third"]
    assert json.loads(state.read_text())["parts"] == {"first": "done", "third": "done"}
    with pytest.raises(SystemExit):
        call(suite, tmp_path, parts, "--only", "fourth")


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "gpu_suite: needs a CUDA GPU, found none\n"
    assert not list(tmp_path.iterdir())


def test_ended_from_outside_it_ends_the_part_that_runs(tmp_path: Path) -> None:
    pid_file = tmp_path / "part.txt"
    part = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT / "bench")!r})
torch.cuda.is_available = lambda: True
import gpu_suite
parts = [gpu_suite.Part("endless", ("-c", {part!r}), 60)]
gpu_suite.main(["--results", {str(tmp_path / "results")!r}], parts)
"""
    suite = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        _wait_for(lambda: pid_file.exists() and pid_file.read_text() != "")
        suite.terminate()
        assert suite.wait(30) == 128 + signal.SIGTERM
    finally:
        suite.kill()
    assert _is_gone(int(pid_file.read_text()))


def test_make_gpu_needs_no_installation_and_puts_results_where_it_is_told(tmp_path: Path) -> None:
    """With a python on PATH that has no argrpo, and says what it is asked to run."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("argrpo", "kernels", "engine"):
        (tmp_path / folder).mkdir()
    (tmp_path / "argrpo" / "__init__.py").touch()
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = -P ] && exit 1\necho "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    # Under make test, make would take this one for its own and tell of folders that it enters.
    outer = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", "gpu", "MINUTES=2", "RESULTS=/rows"],
        env={**outer, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    links = tmp_path / ".links"
    assert done.stdout == f"{links} bench/gpu_suite.py --minutes 2 --results /rows\n"
    assert {path.name for path in (links / "argrpo").iterdir()} == {
        "__init__.py", "kernels", "engine",
    }  # fmt: skip


def test_what_an_ended_part_printed_stands_in_its_log(
    suite: ModuleType, part: Callable[..., Any], tmp_path: Path
) -> None:
    slow = part("slow", "print('said')\nimport time; time.sleep(60)", limit_s=3.0)
    assert call(suite, tmp_path, [slow]) == 1
    log = tmp_path / "results" / "logs" / "slow.txt"
    assert log.read_text(encoding="utf-8") == "measuring\nsaid\n"


def test_a_part_whose_package_is_missing_is_left_out_until_it_is_there(
    suite: ModuleType, part: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lacking = dataclasses.replace(part("lacking"), needs=("no_such_package", "json"))
    assert call(suite, tmp_path, [lacking, part("next")]) == 0
    assert statuses(tmp_path) == [("lacking", "left out"), ("next", "done")]
    assert "== lacking: left out, needs no_such_package\n" in capfd.readouterr().out
    call(suite, tmp_path, [part("lacking"), part("next")])
    assert ran(tmp_path) == ["next", "lacking"]


def test_real_parts_name_files_and_options_that_exist(suite: ModuleType) -> None:
    names = [part.name for part in suite.PARTS]
    assert len(set(names)) == len(names)
    kernels = importlib.import_module("bench_kernels")
    rollout = importlib.import_module("bench_rollout")
    measured: set[str] = set()
    for part in suite.PARTS:
        files = [word for word in part.command if word.startswith(("bench/", "tests/"))]
        assert files and all((ROOT / name).exists() for name in files)
        if part.command[0] == "bench/bench_kernels.py":
            measured |= set(kernels.arguments(list(part.command[1:])).only)
        if part.command[0] == "bench/bench_rollout.py":
            rollout.arguments(list(part.command[1:]))
    assert measured == set(kernels.OPS)


def test_parts_run_on_a_bare_machine(suite: ModuleType, tmp_path: Path) -> None:
    """What is asked of it: benches can be imported, one draws, and test files are collected."""
    bare = [part for part in suite.PARTS if not part.needs]
    words = [word for part in bare for word in part.command]
    scripts = sorted({Path(word).stem for word in words if word.startswith("bench/")})
    tests = sorted({word for word in words if word.startswith("tests/")} - {"tests/kernels"})
    code = f"""
import importlib, sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Bare())
sys.path.insert(0, {str(ROOT / "bench")!r})
for name in {scripts}:
    importlib.import_module(name)
import bench_rollout, rollout_contenders
rollout_contenders.MODELS["tiny"] = rollout_contenders.Sizes(16, 2, 2, 24)
bench_rollout.main(["--models", "tiny", "--image_size", "64", "--images", "2", "--threads", "1",
    "--samples", "1", "--deterministic_images", "0", "--output", {str(tmp_path / "rows.jsonl")!r}])
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--collect-only", *{tests}]))
"""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["contender"] for row in rows] == ["floor", "argrpo"]


def test_parts_of_gpu_tests_name_files_that_have_some(suite: ModuleType) -> None:
    """A test that moved to another file leaves a part that runs nothing, which pytest fails."""
    for part in suite.PARTS:
        if "pytest" not in part.command or part.command[part.command.index("-m", 2) + 1] != "gpu":
            continue
        for word in (word for word in part.command if word.startswith("tests/")):
            path = ROOT / word
            files = path.glob("test_*.py") if path.is_dir() else [path]
            assert any("pytest.mark.gpu" in file.read_text(encoding="utf-8") for file in files)


def test_every_kernel_test_is_run_once_and_needs_nothing_that_a_bare_machine_lacks(
    suite: ModuleType,
) -> None:
    words = [word for part in suite.PARTS for word in part.command]
    named = [word for word in words if word.startswith("tests/kernels/")]
    rest = next(part for part in suite.PARTS if "tests/kernels" in part.command)
    left_out = [word.removeprefix("--ignore=") for word in rest.command if "--ignore" in word]
    assert len(set(named)) == len(named)
    assert set(named) < set(left_out)
    needs_none = {"tests/kernels/test_budgets.py", "tests/kernels/test_token_filter.py"}
    assert set(left_out) - set(named) == needs_none
    for path in (ROOT / "tests" / "kernels").glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        wants = [name for name in BLOCKED if f"import {name}" in text or f"from {name}" in text]
        assert not wants or f"tests/kernels/{path.name}" in needs_none


def _is_gone(pid: int) -> bool:
    """Whether a process has ended, after a moment for the system to take note."""
    return _wait_for(lambda: not _runs(pid))


def _runs(pid: int) -> bool:
    """Whether a process is there and not only a line in the system's table."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def _wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it becomes true within 20 seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False
