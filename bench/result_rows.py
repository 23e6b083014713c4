"""Results as data: one JSON object a line, with where and by which code it was measured."""

import hashlib
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).parents[1]
MEASURED_FOLDERS = ("kernels", "engine", "argrpo", "bench")
Row = dict[str, Any]


def environment(device: torch.device) -> dict[str, str]:
    """Which machine, which versions, which commit: a part of every row."""
    gpu = device.type == "cuda"
    described = {
        "device": torch.cuda.get_device_name(device) if gpu else platform.machine() or "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit_described(),
    }
    return described | ({"driver": _driver()} if gpu else {})


def commit_described() -> str:
    """The commit of this checkout, with a digest of the code where that alone does not name it.

    That is where files differ from the commit ("2b6f3a1-dirty.90fe3d8c") or without git
    ("unknown.90fe3d8c").
    """
    commit = _first_line("git", "describe", "--always", "--dirty") or "unknown"
    if commit != "unknown" and not commit.endswith("-dirty"):
        return commit
    digest = hashlib.sha256()
    for folder in MEASURED_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"{commit}.{digest.hexdigest()[:8]}"


def append_row(path: Path, row: Row) -> None:
    """Add one measurement to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, sort_keys=True) + "\n")


def rows_in(path: Path) -> list[Row]:
    """All measurements of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_like(path: Path, facts: Row) -> list[Row]:
    """Those measured by the same code on the same machine with the same versions."""
    same = ("commit", "device", "torch", "triton")
    return [row for row in rows_in(path) if all(row.get(key) == facts[key] for key in same)]


def _driver() -> str:
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or (
        "unknown"
    )


def _first_line(*command: str) -> str:
    """Of what a program prints when it runs in the checkout; nothing where it is missing."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
