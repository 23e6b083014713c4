"""bench/suite_headlines.py: one line for each result, and none under the name of another."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = {"commit": "abc1234"}
KERNEL = {
    "bench": "kernels", "case": "swiglu, rows 8", "cache": "cold", "contender": "argrpo",
    "p50_us": 12.3, "percent_of_limit": 81.2, "over_floor": 1.2, "over_ours": 1.0, **COMMIT,
}  # fmt: skip
ROLLOUT = {
    "bench": "rollout", "model": "XL", "image_size": 256, "images": 128, "guidance_scale": 2.0,
    "contender": "argrpo", "images_per_s": 151.25, "percent_of_limit": 57.2, **COMMIT,
}  # fmt: skip
STEP = {
    "bench": "step", "case": "step XL", "contender": "argrpo", "how": "fused", "p50_ms": 900.0,
    "images_per_s": 35.0, "over_ours": 1.0, **COMMIT,
}  # fmt: skip
REWARD = {"bench": "rewards", "images": 64, "p50_ms": 50.0, **COMMIT}


@pytest.fixture
def headlines(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("suite_headlines")
    for name in ("suite_headlines", "result_rows"):
        sys.modules.pop(name, None)


def told(headlines: ModuleType, folder: Path, *rows: dict[str, Any]) -> list[str]:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows_gpu.jsonl").write_text(text, encoding="utf-8")
    lines: list[str] = headlines.headlines(folder, "gpu", "abc1234")
    return lines


def test_a_kernel_is_told_cold_and_neither_a_peer_nor_another_commit(
    headlines: ModuleType, tmp_path: Path
) -> None:
    hot = {**KERNEL, "cache": "hot", "p50_us": 10.0}
    others = {**KERNEL, "contender": "torch"}, {**KERNEL, "commit": "older", "p50_us": 1.0}
    assert told(headlines, tmp_path, KERNEL, hot, *others) == [
        "swiglu, rows 8: 12.3 us cold, 81 % of limit, 1.20 x floor"
    ]


def test_peers_stand_under_their_own_names(headlines: ModuleType, tmp_path: Path) -> None:
    eager = {"contender": "llamagen", "how": "eager", "images_per_s": 15.0, "over_ours": 10.0}
    plain = {"contender": "plain", "how": "eager", "images_per_s": 5.0, "over_ours": 7.0}
    rows = ROLLOUT, {**ROLLOUT, "contender": "floor"}, {**ROLLOUT, **eager}, STEP, {**STEP, **plain}
    assert told(headlines, tmp_path, *rows) == [
        "rollout XL 256 px, 128 images, guidance 2: 151.25 images/s, 57 % of limit",
        "rollout XL 256 px, 128 images, guidance 2, llamagen: 15.00 images/s, 57 % of limit, "
        "10.00 x our time",
        "step XL: 35.00 images/s",
        "step XL, plain: 5.00 images/s, 7.00 x our time",
    ]


def test_results_that_differ_in_one_setting_have_a_line_each(
    headlines: ModuleType, tmp_path: Path
) -> None:
    slots = [{**ROLLOUT, "bench": "slots", "layout": name} for name in ("lockstep", "cohorts")]
    decode = [{**STEP, "bench": "decode", "dtype": name} for name in ("float32", "bfloat16")]
    lines = told(headlines, tmp_path, ROLLOUT, {**ROLLOUT, "text_tokens": 120}, *slots, *decode)
    names = [line.partition(":")[0] for line in lines]
    assert names == [
        "rollout XL 256 px, 128 images, guidance 2",
        "rollout XL 256 px, 128 images, guidance 2, 120 text tokens",
        "slots XL 256 px, 128 images, guidance 2, lockstep",
        "slots XL 256 px, 128 images, guidance 2, cohorts",
        "step XL, float32",
        "step XL, bfloat16",
    ]


def test_of_judges_pixels_and_servers_the_way_that_a_run_goes_is_told(
    headlines: ModuleType, tmp_path: Path
) -> None:
    judge = {**REWARD, "family": "judges", "judge": "clip_b32"}
    step = {**REWARD, "family": "step"}
    rows = [
        {**judge, "contender": "batched", "over_one_at_a_time": 0.25},
        {**judge, "contender": "one_at_a_time", "over_one_at_a_time": 1.0},
        {**step, "contender": "without_server", "over_without_server": 1.0},
        {**step, "contender": "with_server", "over_without_server": 1.1},
    ]
    assert told(headlines, tmp_path, *rows) == [
        "judges clip_b32, 64 images, batched: 50.0 ms, 0.25 x one at a time",
        "step, 64 images, with_server: 50.0 ms, 1.10 x without server",
    ]


def test_every_row_in_the_repository_can_be_told(headlines: ModuleType) -> None:
    results = ROOT / "bench" / "results"
    rows = [
        row
        for path in results.glob("*_cpu.jsonl")
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    ]
    assert rows
    for commit in {row["commit"] for row in rows}:
        assert headlines.headlines(results, "cpu", commit), commit
