"""bench/cpu_suite.py: parts that exist, and gpu_suite's way of running them without a GPU."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module = importlib.import_module("cpu_suite")
    monkeypatch.setattr(sys.modules["gpu_suite"], "commit_described", lambda: "abc1234")
    yield module
    for name in list(sys.modules):
        if name.startswith(
            ("bench_", "cpu_suite", "gpu_", "result_rows", "rollout_", "suite_", "cases_")
        ):
            sys.modules.pop(name)


def test_parts_name_scripts_and_options_that_exist(suite: ModuleType) -> None:
    names = [part.name for part in suite.PARTS]
    assert len(set(names)) == len(names)
    for part in suite.PARTS:
        script, *options = part.command
        module = importlib.import_module(Path(script).stem)
        args = module.arguments(options)
        assert args.device.type == "cpu"
        assert args.output.name.endswith("_cpu.jsonl")


def test_what_the_readme_shows_has_a_part_on_both_kinds_of_device(suite: ModuleType) -> None:
    gpu = importlib.import_module("gpu_parts")
    for parts in (suite.PARTS, gpu.PARTS):
        scripts = {Path(part.command[0]).stem for part in parts}
        shown = {"rollout", "step", "kernels", "decode", "loo_fid", "trunk", "slots"}
        assert {f"bench_{name}" for name in shown} <= scripts


def test_a_cut_run_goes_on_and_ends_with_a_table(
    suite: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    row = (
        '{"bench": "decode", "case": "decode 256 px", "contender": "argrpo", "dtype": "float32", '
        '"p50_ms": 12.34, "images_per_s": 81.0, "percent_of_limit": 40.4, "commit": "abc1234"}'
    )
    code = f"import sys; open(sys.argv[1] + '/decode_cpu.jsonl', 'w').write({row!r})"
    parts = [
        suite.Part("first", ("-c", code, "{results}"), 60),
        suite.Part("second", ("-c", "print('measured')"), 60),
    ]
    place = ["--results", str(tmp_path)]
    assert suite.main([*place, "--only", "first"], parts) == 0
    assert suite.main(place, parts) == 0
    done = [json.loads(line) for line in (tmp_path / "cpu_suite.jsonl").read_text().splitlines()]
    assert [(one["part"], one["status"]) for one in done] == [("first", "done"), ("second", "done")]
    assert "decode 256 px, float32: 81.00 images/s, 40 % of limit" in capfd.readouterr().out
    assert suite.main([*place, "--list"], parts) == 0
