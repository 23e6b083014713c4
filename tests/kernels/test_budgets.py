"""Every kernel, compiled for sm_80 and sm_90, spills nothing and stays inside its budget.

The compiler runs in processes of its own, because the interpreter that the other kernel tests need
replaces `triton.jit` in a whole process. A budget belongs to a Triton version; a version without
one is still held to no spill and to 16-byte loads.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[2]
PROCESSES = 2
AT_MOST = ("registers", "shared_bytes")
AT_LEAST = ("widest_load_bytes", "hgmma", "hmma", "sm_bytes_in_flight")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """The compile report of every kernel, by its name and architecture."""
    folder = tmp_path_factory.mktemp("reports")
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    files = [folder / f"{shard}.json" for shard in range(PROCESSES)]
    script = str(ROOT / "bench" / "compile_report.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, "--json", str(file), "--shard", f"{shard}/{PROCESSES}"],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for shard, file in enumerate(files)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    return {f"{row['name']} sm_{row['arch']}": row for row in rows}


@pytest.fixture(scope="module")
def budgets() -> dict[str, dict[str, int]] | None:
    """The budgets of the running Triton version, or None if it has none yet."""
    recorded = json.loads((Path(__file__).parent / "budgets.json").read_text(encoding="utf-8"))
    return recorded.get(".".join(triton.__version__.split(".")[:2]))


def test_every_op_is_compiled(reports: dict[str, dict[str, int]]) -> None:
    compiled = {name.split()[0] for name in reports}
    # A name begins with its op, so a file that yields no spec is missed here.
    files = Path(__file__).parent.glob("aot_specs_*.py")
    expected = {path.stem.removeprefix("aot_specs_") for path in files}
    assert compiled == expected


def test_no_kernel_spills(reports: dict[str, dict[str, int]]) -> None:
    assert {name: row["spill_bytes"] for name, row in reports.items() if row["spill_bytes"]} == {}


def test_every_kernel_loads_sixteen_bytes_at_once(reports: dict[str, dict[str, int]]) -> None:
    narrow = {name for name, row in reports.items() if row["widest_load_bytes"] < 16}
    assert {name for name in narrow if reports[name]["wants_wide_loads"]} == set()


def test_every_kernel_stays_inside_its_budget(
    reports: dict[str, dict[str, int]], budgets: dict[str, dict[str, int]] | None
) -> None:
    if budgets is None:
        pytest.skip(f"Triton {triton.__version__} has no budgets: held to no spill and wide loads")
    wrong = []
    for name, row in reports.items():
        budget = budgets.get(name)
        if budget is None:
            command = f"bench/compile_report.py --only '{row['name']}' --record"
            wrong.append(f"{name}: no budget; look at the report, then run {command}")
            continue
        wrong += [f"{name}: {k} {row[k]} > {budget[k]}" for k in AT_MOST if row[k] > budget[k]]
        wrong += [f"{name}: {k} {row[k]} < {budget[k]}" for k in AT_LEAST if row[k] < budget[k]]
    assert wrong == []


def test_budgets_name_only_kernels_that_exist(
    reports: dict[str, dict[str, int]], budgets: dict[str, dict[str, int]] | None
) -> None:
    assert set(budgets or {}) <= set(reports)
