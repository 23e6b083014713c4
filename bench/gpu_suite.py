"""Everything that needs a GPU, in order of value, inside a number of minutes.

    python bench/gpu_suite.py --minutes 9
    python bench/gpu_suite.py --minutes 9 --only kernels_sampling rollout_xl --results DIR
    python bench/gpu_suite.py --list

Each part is a process of its own under its own time limit. Benches append their rows to the results
folder as they go, so that a cut run loses at most the case it was in. A state file says which parts
are done at which commit: a second call continues where the first stopped, benches leave out what
they have measured, and a changed commit starts again. It ends with one table.

Exit codes: 0 all that ran went well, 1 a part failed or ran over its limit, 2 there is no GPU.
What the parts are says gpu_parts.py.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_parts import PARTS, Part
from result_rows import append_row, commit_described
from suite_headlines import headlines

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
# A part is not started with less than this left: importing torch and the first launch take half.
LEAST_SECONDS = 20.0
GRACE_SECONDS = 5.0  # between asking a process to end and ending it
LAST_LINES = 15  # of a failed part's output
_AGAIN = ("over its limit", "cut", "left out")  # what a second call takes up once more


@dataclass(frozen=True)
class Outcome:
    """How a part ended: done, failed, over its limit, cut by the end of the suite's time, or left
    out because a package is missing."""

    part: str
    status: str
    seconds: float
    returncode: int | None
    last_line: str


@dataclass(frozen=True)
class Suite:
    """Where results and state lie, and what is run."""

    parts: Sequence[Part]
    results: Path
    state: Path
    commit: str
    again: bool = False  # run parts whatever became of them before
    device: str = "gpu"  # in the names of its files
    now: Callable[[], float] = time.monotonic

    def run(self, seconds: float) -> list[Outcome]:
        """Run what is left to do until the time is over; the outcomes of this call."""
        end = self.now() + seconds
        outcomes = []
        for part in self.left():
            available = end - self.now()
            if available < min(LEAST_SECONDS, part.limit_s):
                break
            outcome = _left_out(part) or self._run_part(part, available)
            outcomes.append(outcome)
            self._remember(outcome)
        return outcomes

    def left(self) -> list[Part]:
        """What never ran at this commit, then what did not get to its end; a failed part did."""
        seen = {} if self.again else self.outcomes()
        new = [part for part in self.parts if part.name not in seen]
        cut = [part for part in self.parts if seen.get(part.name, "") in _AGAIN]
        return new + cut

    def outcomes(self) -> dict[str, str]:
        """Status by part at this commit."""
        if not self.state.exists():
            return {}
        state = json.loads(self.state.read_text(encoding="utf-8"))
        return dict(state["parts"]) if state["commit"] == self.commit else {}

    def _remember(self, outcome: Outcome) -> None:
        parts = {**self.outcomes(), outcome.part: outcome.status}
        self.state.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.state.with_suffix(".new")
        fresh.write_text(json.dumps({"commit": self.commit, "parts": parts}), encoding="utf-8")
        fresh.replace(self.state)
        row = {
            "bench": f"{self.device}_suite",
            "part": outcome.part,
            "status": outcome.status,
            "seconds": round(outcome.seconds, 1),
            "last_line": outcome.last_line,
            "commit": self.commit,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        append_row(self.results / f"{self.device}_suite.jsonl", row)

    def _run_part(self, part: Part, available: float) -> Outcome:
        print(f"== {part.name}: at most {min(part.limit_s, available):.0f} s", flush=True)
        log = self.results / "logs" / f"{part.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = [word.replace("{results}", str(self.results)) for word in part.command]
        start = self.now()
        with log.open("w", encoding="utf-8") as out:
            code = run_within([sys.executable, *arguments], min(part.limit_s, available), out)
        seconds = self.now() - start
        status = "done" if code == 0 else "failed"
        if code is None:
            status = "over its limit" if part.limit_s <= available else "cut"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        if status != "done":
            print("\n".join(f"   {line}" for line in lines[-LAST_LINES:]), flush=True)
        written = [line for line in lines if line.strip()]
        last = written[-1].strip() if written else ""
        print(f"== {part.name}: {status} after {seconds:.0f} s", flush=True)
        return Outcome(part.name, status, seconds, code, last[:200])


def _left_out(part: Part) -> Outcome | None:
    """Of a part whose packages are not all here; None where it can run."""
    missing = [name for name in part.needs if find_spec(name) is None]
    if not missing:
        return None
    said = f"needs {', '.join(missing)}"
    print(f"== {part.name}: left out, {said}", flush=True)
    return Outcome(part.name, "left out", 0.0, None, said)


def run_within(command: Sequence[str], seconds: float, out: Any) -> int | None:
    """The exit code of a program; None if it was still running and had to be ended.

    Everything that it started is ended with it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as in the Makefile: bits stay
    environment["PYTHONUNBUFFERED"] = "1"  # what was printed stands in the log of an ended part
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of a process and its children; nothing where it has ended by itself."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def table(suite: Suite, outcomes: Sequence[Outcome]) -> str:
    """The headline of every result of this commit, then what ran and what is left."""
    lines = headlines(suite.results, suite.device, suite.commit)
    lines.append(f"{'part':24} {'status':16} {'seconds':>8}")
    lines += [f"{one.part:24} {one.status:16} {one.seconds:>8.0f}" for one in outcomes]
    ran = {one.part for one in outcomes}
    before = {name: status for name, status in suite.outcomes().items() if name not in ran}
    lines += [f"{name:24} {status:16} {'earlier':>8}" for name, status in before.items()]
    to_come = [part.name for part in suite.parts if part.name not in {*ran, *before}]
    lines += [f"{name:24} {'to come':16}" for name in to_come]
    return "\n".join(lines)


def arguments(
    argv: Sequence[str] | None, parts: Sequence[Part], description: str, minutes: float
) -> argparse.Namespace:
    """What a suite is asked; `minutes` unless told otherwise."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    names = [part.name for part in parts]
    parser.add_argument("--minutes", type=float, default=minutes, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--state", type=Path, help="what is done; default: in the results folder")
    parser.add_argument("--again", action="store_true", help="also what is done or failed already")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits")
    return parser.parse_args(argv)


def listed(parts: Sequence[Part]) -> str:
    """Parts and their limits."""
    return "\n".join(f"{part.name:24} {part.limit_s:>4.0f} s" for part in parts)


def run_parts(args: argparse.Namespace, parts: Sequence[Part], device: str) -> int:
    """Run what is wanted and left; the exit code."""
    results = args.results.resolve()
    wanted = [part for part in parts if args.only is None or part.name in args.only]
    # Ended from outside, it ends the part that is running and keeps what that has written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    state = args.state or results / f"{device}_suite_state.json"
    suite = Suite(wanted, results, state, commit_described(), args.again, device)
    outcomes = suite.run(args.minutes * 60)
    print(table(suite, outcomes))
    return 1 if any(one.status in ("failed", "over its limit") for one in outcomes) else 0


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """The suite on this machine; the exit code."""
    args = arguments(argv, parts, __doc__ or "", minutes=9.0)
    if args.list:
        print(listed(parts))
        return 0
    if not torch.cuda.is_available():
        print("gpu_suite: needs a CUDA GPU, found none", file=sys.stderr)
        return 2
    return run_parts(args, parts, "gpu")


if __name__ == "__main__":
    sys.exit(main())
