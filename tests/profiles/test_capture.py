"""Captures on a CPU, and the nsys scripts with nsys played by a stub."""

import subprocess
from pathlib import Path

import capture
import pytest
import torch
from random_models import SIZES, random_policy

PROFILES = Path(__file__).parents[2] / "profiles"

FAKE_NSYS = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word" >> "$0.calls"; done
"""
# Says that there is a GPU, or not; as a summary it prints one line.
FAKE_PYTHON = """#!/bin/sh
case "$1" in -c) exit {gpu} ;; *) echo "table of $2" ;; esac
"""


@pytest.mark.parametrize(
    ("what", "inside"),
    [
        ("rollout", ["rollout", "prefill", "decode[1..15]"]),
        ("step", ["step", "rollout", "decode", "reward", "forward", "backward", "optimizer"]),
        ("run", ["step", "rollout", "decode", "reward", "forward", "backward", "optimizer"]),
    ],
)
def test_a_capture_leaves_a_trace_and_its_table(
    what: str, inside: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    words = [what, "--device", "cpu", "--images", "2", "--output", str(folder), "--top", "3"]
    words += ["--count", "2"] + ([] if what == "run" else ["--warmup", "1"])
    capture.main(words)
    assert sorted(path.name for path in folder.iterdir()) == [f"{what}.json.gz", f"{what}.md"]
    table = (folder / f"{what}.md").read_text()
    lines = table.splitlines()
    assert lines[0].startswith(f"what {what}, model tiny, image_size 64, images 2")
    assert lines[2].startswith("2 x rollout:" if what == "rollout" else "2 x step:")
    ranges = [line.split("|")[1].strip().lstrip("- ") for line in lines if line.startswith("| ")]
    assert set(inside) <= set(ranges)
    assert table in capsys.readouterr().out


def test_a_second_capture_leaves_the_first_one_alone(tmp_path: Path) -> None:
    words = ["rollout", "--device", "cpu", "--images", "2", "--warmup", "0"]
    for _ in range(2):
        capture.main([*words, "--output", str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--images", "12"], "--images: expected a multiple of 8, got 12"),
        (["rollout", "--images", "1"], "--images: expected at least 2, got 1"),
        (["run", "--count", "0"], "--count: expected at least 1, got 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        capture.main([*words, "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_nsys_on_a_cpu_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"profile\.tool: expected torch on a cpu, got nsys"):
        capture.main(["rollout", "--device", "cpu", "--tool", "nsys", "--output", str(tmp_path)])


@pytest.mark.parametrize(("name", "millions"), [("B", 111), ("XL", 775)])
def test_random_policies_have_the_published_number_of_weights(name: str, millions: int) -> None:
    policy = random_policy(name, 256, device=torch.device("meta"), dtype=torch.bfloat16)
    # As the paper rounds them, arXiv:2406.06525 table 1.
    assert sum(weight.numel() for weight in policy.parameters()) / 1e6 == pytest.approx(
        millions, abs=1
    )
    assert SIZES[name].dim == policy.config.dim


def run_script(
    name: str, words: list[str], folder: Path, *, has_nsys: bool = True, has_gpu: bool = True
) -> subprocess.CompletedProcess[str]:
    """A script with stubs for nsys and python; REPORT is folder/reports/r."""
    stubs = folder / "stubs"
    stubs.mkdir()
    python = stubs / "python"
    python.write_text(FAKE_PYTHON.format(gpu=0 if has_gpu else 1))
    python.chmod(0o755)
    if has_nsys:
        (stubs / "nsys").write_text(FAKE_NSYS)
        (stubs / "nsys").chmod(0o755)
    environment = {
        "PATH": f"{stubs}:/usr/bin:/bin",
        "PYTHON": str(python),
        "REPORT": str(folder / "reports" / "r"),
    }
    return subprocess.run(
        ["bash", str(PROFILES / name), *words],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words", "work"),
    [
        (
            "nsys_rollout.sh",
            ["--model", "B"],
            ["rollout", "--tool", "nsys", "--device", "cuda", "--model", "B"],
        ),
        (
            "nsys_step.sh",
            ["--count", "3"],
            ["step", "--tool", "nsys", "--device", "cuda", "--count", "3"],
        ),
        (
            "nsys_step.sh",
            ["train", "--config", "a b.yaml", "--profile.steps", "[2,3]"],
            [
                *("argrpo", "train", "--config", "a b.yaml", "--profile.steps", "[2,3]"),
                *("--profile.tool", "nsys"),
            ],
        ),
    ],
)
def test_the_scripts_record_kernels_in_graphs_inside_the_capture_range(
    name: str, words: list[str], work: list[str], tmp_path: Path
) -> None:
    done = run_script(name, words, tmp_path)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "stubs" / "nsys.calls").read_text().splitlines()
    profile, export = calls[: calls.index("export")], calls[calls.index("export") :]
    report = tmp_path / "reports" / "r"
    assert profile[0] == "profile"
    assert {
        "--cuda-graph-trace=node", "--capture-range=cudaProfilerApi", "--capture-range-end=stop",
        f"--output={report}",
    } <= set(profile)  # fmt: skip
    assert profile[-len(work) :] == work
    assert export[-2:] == [f"--output={report}.sqlite", f"{report}.nsys-rep"]
    assert report.with_suffix(".md").read_text() == f"table of {report}.sqlite\n"


@pytest.mark.parametrize("name", ["nsys_rollout.sh", "nsys_step.sh"])
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"has_nsys": False}, "expected nsys on PATH, found none"),
        ({"has_gpu": False}, "expected a CUDA GPU and a torch that sees it, found none"),
    ],
)
def test_a_script_that_lacks_something_says_what(
    name: str, missing: dict[str, bool], message: str, tmp_path: Path
) -> None:
    done = run_script(name, [], tmp_path, **missing)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{name}: {message}")
    assert not (tmp_path / "reports").exists()


@pytest.mark.gpu
def test_a_rollout_on_a_gpu_shows_the_kernels_inside_its_graphs(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    capture.main(["rollout", "--model", "tiny", "--images", "4", "--output", str(folder)])
    table = (folder / "rollout.md").read_text()
    assert "_paged_decode" in table and "capture" not in table
