"""bench/bench_slots.py on a tiny policy: one budget, two layouts, the same images."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = (
    "bench_slots",
    "gpu_parts",
    "result_rows",
    "rollout_contenders",
    "rollout_rows",
    "roofline",
    "timing",
    "turns",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The script, with a size called tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        contenders = importlib.import_module("rollout_contenders")
        patch.setitem(contenders.MODELS, "tiny", contenders.Sizes(16, 1, 2, 24))
        yield importlib.import_module("bench_slots")
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def rows(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Images once and four times the 6 slots that fit in lockstep, 64 tokens in pages of 16."""
    output = tmp_path_factory.mktemp("slots") / "slots.jsonl"
    command = [
        "--model", "tiny", "--image_size", "128", "--page_size", "16", "--lockstep_slots", "6",
        "--times", "1", "4", "--samples", "1", "--threads", "1", "--output", str(output),
    ]  # fmt: skip
    bench.main(command)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_rows_say_what_each_layout_held_and_how_long_it_took(rows: list[dict[str, Any]]) -> None:
    assert [(row["layout"], row["images"]) for row in rows] == [
        ("lockstep", 6), ("cohorts", 6), ("lockstep", 24), ("cohorts", 24),
    ]  # fmt: skip
    for row in rows:
        assert row["path"] == "paged reference in plain PyTorch"
        assert row["peak_mb"] >= 0
        assert row["pool_mb"] <= row["budget_mb"]
        assert row["images_per_s"] == pytest.approx(row["images"] / row["p50_ms"] * 1e3, rel=1e-2)
        assert {"commit", "device", "date", "others_busy_cores", "threads"} <= row.keys()
    lockstep, cohorts = rows[2:]
    # A key and a value of 16 numbers in fp32, 2 branches, 64 entries in whole pages.
    assert lockstep["budget_mb"] == pytest.approx(6 * 2 * 64 * 2 * 16 * 4 / 1e6, abs=1e-3)
    assert (lockstep["slots"], lockstep["cohorts"], lockstep["pages"]) == (6, 1, 6 * 2 * 4)
    # Two cohorts hold 2 + 4 pages a pair of slots at their peak, so 48 are room for 4 pairs.
    assert (cohorts["slots"], cohorts["cohorts"], cohorts["pages"]) == (8, 2, 2 * 4 * 6)
    # Four waves of 63 steps; three, of which the second cohort's start 32 steps later.
    assert (lockstep["steps"], cohorts["steps"]) == (4 * 63, 3 * 63 + 32)
    assert lockstep["over_lockstep"] == 1.0


def test_both_layouts_draw_the_same_images(rows: list[dict[str, Any]]) -> None:
    # A tie that falls the other way is rarer than one image in 24.
    assert all(row["same_images"] == 1.0 for row in rows)


def test_a_lost_page_ends_the_bench(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_engine: Any) -> None:
        raise RuntimeError("a page is lost")

    monkeypatch.setattr(bench.RolloutEngine, "check", lost)
    with pytest.raises(RuntimeError, match="a page is lost"):
        bench.main(["--model", "tiny", "--image_size", "32", "--lockstep_slots", "2"])


def test_the_suite_asks_for_options_that_exist(bench: Any) -> None:
    parts = importlib.import_module("gpu_parts").PARTS
    (command,) = [part.command for part in parts if part.command[0] == "bench/bench_slots.py"]
    args = bench.arguments(list(command[1:]))
    assert (args.device.type, args.model, args.image_size) == ("cuda", "XL", 256)
