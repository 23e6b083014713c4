"""What every kernel compiles to, without a GPU: registers, spills, shared memory, load widths.

    python bench/compile_report.py                      the table, for sm_80 and sm_90
    python bench/compile_report.py --only rmsnorm       kernels whose name begins so
    python bench/compile_report.py --json FILE          the same as data
    python bench/compile_report.py --record             write the budgets of this Triton version
    python bench/compile_report.py --sass "rmsnorm xl"  one kernel's sm_90 disassembly

Another Triton version lays out other code (one tile of paged_attention once took 525 instructions
in 3.6 and 337 in 3.9), so look at both ends of what is supported:

    pip install --no-deps --target /somewhere/else triton==3.6.0
    PYTHONPATH=/somewhere/else python bench/compile_report.py --record

The kernels come from tests/kernels/aot_specs_<op>.py, each a file with a function
`aot_specs() -> list[AotSpec]` that begins with `from aot import AotSpec`. The budgets stand in
tests/kernels/budgets.json and are compared by tests/kernels/test_budgets.py.
"""

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path

import triton
from aot import AotReport, AotSpec, compile_spec, sass_of

__all__ = ["ARCHS", "AotReport", "AotSpec", "all_specs", "compile_spec"]

ARCHS = (80, 90)
BUDGETS = Path(__file__).parents[1] / "tests" / "kernels" / "budgets.json"
# What a patch release of the compiler may change before anyone has to look. Spills have no room.
_REGISTER_ROOM = 1.1
_FLIGHT_ROOM = 0.75


def all_specs() -> list[AotSpec]:
    """The specs of every kernel, in the order of their files."""
    specs: list[AotSpec] = []
    for path in sorted(BUDGETS.parent.glob("aot_specs_*.py")):
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        specs += module.aot_specs()
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"aot_specs: expected each name once, got {twice} more than once")
    return specs


def table(reports: list[AotReport]) -> str:
    """One line a report."""
    head = (
        f"{'kernel':44} {'sm':>3} {'reg':>4} {'spill':>5} {'shared':>7} {'load':>4} {'wide':>9} "
        f"{'store':>5} {'HGMMA':>5} {'HMMA':>5} {'per SM':>6} {'in flight/SM':>12}"
    )
    lines = [
        f"{r.name:44} {r.arch:>3} {r.registers:>4} {r.spill_bytes:>5} {r.shared_bytes:>7} "
        f"{r.widest_load_bytes:>4} {f'{r.num_wide_loads}/{r.num_loads}':>9} "
        f"{r.widest_store_bytes:>5} {r.hgmma:>5} {r.hmma:>5} {r.programs_per_sm:>6} "
        f"{r.sm_bytes_in_flight:>12,}"
        for r in reports
    ]
    return "\n".join([head, *lines])


def triton_version() -> str:
    """Major and minor, the key of a budget."""
    return ".".join(triton.__version__.split(".")[:2])


def record(reports: list[AotReport]) -> None:
    """Write what these reports measured as the budgets of the running Triton version."""
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8")) if BUDGETS.exists() else {}
    known = {f"{spec.name} sm_{arch}" for spec in all_specs() for arch in ARCHS}
    rows = budgets.get(triton_version(), {})
    mine = {name: row for name, row in rows.items() if name in known}
    for report in reports:
        mine[f"{report.name} sm_{report.arch}"] = {
            "registers": min(255, round(report.registers * _REGISTER_ROOM)),
            "shared_bytes": report.shared_bytes,
            "widest_load_bytes": report.widest_load_bytes,
            "sm_bytes_in_flight": round(report.sm_bytes_in_flight * _FLIGHT_ROOM),
            "hgmma": min(report.hgmma, 1),
            "hmma": min(report.hmma, 1),
        }
    budgets[triton_version()] = mine
    ordered = {version: dict(sorted(rows.items())) for version, rows in sorted(budgets.items())}
    BUDGETS.write_text(_one_row_a_line(ordered), encoding="utf-8")


def _one_row_a_line(budgets: dict[str, dict[str, dict[str, int]]]) -> str:
    versions = []
    for version, rows in budgets.items():
        body = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()
        )
        versions.append(f"  {json.dumps(version)}: {{\n{body}\n  }}")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="kernels whose name begins so")
    parser.add_argument("--json", type=Path, help="write the reports here, as a list of objects")
    parser.add_argument("--record", action="store_true", help="write tests/kernels/budgets.json")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th kernel, from the i-th on")
    parser.add_argument("--sass", help="print this kernel's sm_90 disassembly and nothing else")
    args = parser.parse_args()
    specs = [spec for spec in all_specs() if spec.name.startswith(args.sass or args.only)]
    first, step = map(int, args.shard.split("/"))
    if not specs:
        sys.exit(f"--only: expected the beginning of a kernel's name, got {args.only!r}")
    if args.sass:
        print(sass_of(specs[0], 90))
        return
    reports = [compile_spec(spec, arch) for spec in specs[first::step] for arch in ARCHS]
    print(table(reports))
    if args.json:
        args.json.write_text(json.dumps([asdict(report) for report in reports]), encoding="utf-8")
    if args.record:
        record(reports)


if __name__ == "__main__":
    main()
