"""`pytest bench/ --benchmark-only`: it collects every script's measurements, and they compare."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Three calls of pytest in one process: each of its own would import everything again.
CALLS = """
import contextlib, io, json, pytest, sys
said = {}
for name, options in json.loads(sys.argv[1]).items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = pytest.main(["bench/", "--benchmark-only", "-q", "-p", "no:cacheprovider", *options])
    said[name] = int(code), out.getvalue()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What pytest prints on bench/ from the root of the checkout, and the file it writes."""
    folder = tmp_path_factory.mktemp("suites")
    storage = f"--benchmark-storage={folder}"
    calls = {
        "collected": ["--collect-only"],
        "run": [storage, "-k", "guided_hidden or leave_one_out", "--benchmark-autosave",
                f"--benchmark-json={folder / 'first.json'}"],
        "compared": [storage, "-k", "leave_one_out", "--benchmark-compare"],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-c", CALLS, json.dumps(calls)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (code, text) in found.items():
        assert code == 0, f"{name}: {text}"
    written = json.loads((folder / "first.json").read_text(encoding="utf-8"))
    return {**{name: text for name, (_, text) in found.items()}, "json": written}


def test_every_suite_is_collected(said: dict[str, Any]) -> None:
    found = said["collected"]
    for name in ("guided_sample", "paged_decode_attention", "fixed_scale_gradients", "swiglu"):
        assert f"bench_kernels.py::test_kernel[{name}" in found
    for name in (
        "test_rollout_step[floor]", "test_rollout_step[argrpo]", "test_rollout_step[hf_static]",
        "test_trunk[argrpo]", "test_slots[lockstep]", "test_step[argrpo]", "test_step[plain]",
        "test_decode", "test_leave_one_out[carried]", "test_tower_pixels[tensor]",
    ):  # fmt: skip
        assert f"test_suites.py::{name}" in found
    scripts = {path.stem for path in (ROOT / "bench").glob("bench_*.py")}
    text = (ROOT / "bench" / "test_suites.py").read_text(encoding="utf-8")
    covered = {name for name in scripts if name in text}
    # The rollouts' contenders and the trunk are called by the files that define them.
    assert scripts - covered <= {"bench_kernels", "bench_rollout"}


def test_results_are_grouped_and_carry_what_the_device_says(said: dict[str, Any]) -> None:
    found = said["json"]["benchmarks"]
    assert {one["group"] for one in found} == {"guided_hidden", "loo_fid"}
    for one in found:
        assert one["extra_info"]["device_us"] > 0
        # Distances have no such figure.
        assert ("percent_of_limit" in one["extra_info"]) == (one["group"] == "guided_hidden")


def test_a_second_run_stands_beside_the_first(said: dict[str, Any]) -> None:
    lines = said["compared"].splitlines()
    for name in ("batch", "carried"):
        rows = [line for line in lines if line.startswith(f"test_leave_one_out[{name}] (")]
        assert sorted(row.partition("(")[2][:3] for row in rows) == ["000", "NOW"]
