"""`pytest bench/ --benchmark-only`: it collects every script's measurements, and they compare."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_suites(folder: Path, *options: str) -> str:
    """What pytest prints on bench/, from the root of the checkout."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "bench/", "--benchmark-only", "-q",
         "-p", "no:cacheprovider", f"--benchmark-storage={folder}", *options],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_suite_is_collected(tmp_path: Path) -> None:
    found = run_suites(tmp_path, "--collect-only")
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


def test_results_are_grouped_carry_what_the_device_says_and_compare(tmp_path: Path) -> None:
    chosen = ["-k", "guided_hidden or leave_one_out", "--benchmark-autosave"]
    first = tmp_path / "first.json"
    run_suites(tmp_path, *chosen, f"--benchmark-json={first}")
    found = json.loads(first.read_text(encoding="utf-8"))["benchmarks"]
    assert {one["group"] for one in found} == {"guided_hidden", "loo_fid"}
    for one in found:
        assert one["extra_info"]["device_us"] > 0
        # Distances have no such figure.
        assert ("percent_of_limit" in one["extra_info"]) == (one["group"] == "guided_hidden")
    printed = run_suites(tmp_path, *chosen, "--benchmark-compare")
    assert "Comparing against benchmarks from" in printed or "(0001" in printed
