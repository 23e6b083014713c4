"""The README's figures: what the committed rows give, nothing rounded in our favour."""

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("chosen_rows", "plot", "readme_tables", "result_rows", "scale_model", "timing")
ROLLOUT = {
    "bench": "rollout", "model": "B", "image_size": 256, "images": 8, "guidance_scale": 2.0,
    "dtype": "float32", "text_tokens": 0, "peers": ["llamagen"], "device": "a CPU", "threads": 2,
    "date": "2026-01-02", "commit": "abc1234", "others_busy_cores": 0.5,
    "limit_images_per_s": 1.5,
}  # fmt: skip


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("readme_tables")
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("rollout_cpu", row, row)`: a results folder with these rows."""

    def rows(name: str, *found: dict[str, Any]) -> Path:
        text = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        return tmp_path

    return rows


def rollout(contender: str, ms: float, **changed: Any) -> dict[str, Any]:
    """A row of a rollout in which every step takes so long; ours takes 100 ms."""
    steps = [
        {"position": position, "p20_ms": ms - 1, "p50_ms": ms, "p80_ms": ms + 1}
        for position in (1, 128, 255)
    ]
    row = {
        **ROLLOUT, "contender": contender, "steps": steps, "steps_sum_ms": 256 * ms,
        "images_per_s": 8 / 0.256 / ms, "over_floor": ms / 81.1, "over_ours": ms / 100,
    }  # fmt: skip
    return {**row, **changed}


def line_of(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_readme_holds_what_the_committed_rows_give(tables: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.written(readme, tables.block()) == readme, "python bench/readme_tables.py"


def test_every_chart_of_the_readme_is_there(tables: ModuleType) -> None:
    charts = re.findall(r"\]\((bench/results/charts/\w+\.png)\)", tables.block())
    assert charts
    assert all((ROOT / chart).is_file() for chart in charts)


def test_figures_are_rounded_against_us(tables: ModuleType) -> None:
    assert [tables.low(1.2399), tables.high(1.2301)] == ["1.23", "1.24"]
    assert [tables.low(123_999.0), tables.high(123_001.0)] == ["123,000", "124,000"]
    assert [tables.low(0.012399), tables.high(0.0123001)] == ["0.0123", "0.0124"]
    assert [tables.low(2.0), tables.high(2.0), tables.low(0)] == ["2.00", "2.00", "0"]
    assert [tables.worse(1.001, True), tables.worse(1.009, False)] == ["1.01", "1.00"]
    assert [tables.better(1.009, True), tables.better(1.001, False)] == ["1.00", "1.01"]


def test_ours_and_a_peer_stand_rounded_in_opposite_ways(
    tables: ModuleType, write: Callable[..., Path]
) -> None:
    found = write("rollout_cpu", rollout("argrpo", 100.01), rollout("llamagen", 200.01))
    text = tables.block(found)
    ours, peer = line_of(text, "argrpo |"), line_of(text, "LlamaGen's own sampler")
    assert ours[1:4] == ["0.312", "101 / 101 / 101", "1.24"]
    assert peer[1:4] == ["0.157", "200 / 200 / 200", "2.46"]
    assert "a CPU, 2 threads, 2026-01-02, commit abc1234, others kept 0.50 cores busy" in text


def test_runs_of_several_places_are_told_apart(
    tables: ModuleType, write: Callable[..., Path]
) -> None:
    both = {"bench": "loo_fid", "device": "a CPU", "date": "2026-01-02", "difference": 1e-9}
    rows = [
        {**both, "case": f"loo_fid {case}", "commit": commit, "contender": name,
         "others_busy_cores": busy, "p50_ms": 2.0, "over_ours": 1.0}
        for case, commit, busy in (("a", "abc1234", 0.1), ("b", "abc1234", 0.3), ("c", "old", 0.0))
        for name in ("argrpo", "brute force")
    ]  # fmt: skip
    text = tables.block(write("loo_fid_cpu", *rows))
    assert (
        "a CPU, 2026-01-02, commit abc1234, others kept 0.10 to 0.30 cores busy (a, b); "
        "a CPU, 2026-01-02, commit old, others kept 0.00 cores busy (c):"
    ) in text


def test_memory_of_a_peer_is_rounded_for_it(tables: ModuleType, write: Callable[..., Path]) -> None:
    row = {
        "bench": "step", "case": "a step", "model": "B", "image_size": 128, "images": 4, "group": 4,
        "guidance_scale": 2.0, "tokenizer": "VQ-16", "judges": ["clip"], "dtype": "float32",
        "device": "a CPU", "date": "2026-01-02", "commit": "abc1234", "p50_ms": 1000.0,
        "over_ours": 1.0, "peak_mb": 1234.5,
        **{f"{phase}_ms": 200.0 for phase in tables.PHASES},
    }  # fmt: skip
    found = write("step_cpu", *({**row, "contender": name} for name in ("argrpo", "plain")))
    text = tables.block(found)
    assert line_of(text, "argrpo |")[-1] == "1,240"
    assert line_of(text, "AR-GRPO's arithmetic")[-1] == "1,230"


def test_the_newest_commit_counts_and_of_it_the_run_with_the_most_contenders(
    tables: ModuleType, write: Callable[..., Path]
) -> None:
    newest = {"commit": "def5678"}
    alone = {**newest, "peers": []}
    found = write(
        "rollout_cpu",
        rollout("argrpo", 50), rollout("llamagen", 51), rollout("hf_static", 52),
        rollout("argrpo", 100, **newest), rollout("llamagen", 300, **newest),
        rollout("argrpo", 70, **alone),
    )  # fmt: skip
    text = tables.block(found)
    assert line_of(text, "argrpo |")[2] == "100 / 100 / 100"
    assert "hf_static" not in text and "commit def5678" in text and "abc1234" not in text


def test_what_has_no_row_is_not_measured_yet(tables: ModuleType, tmp_path: Path) -> None:
    text = tables.block(tmp_path)
    for said in ("Drawing", "A whole training step", "The loss head", "Tokens to pixels"):
        assert f"**{said}, on a CPU.** not measured yet." in text
    assert "**On a GPU**: not measured yet" in text
    figures = re.findall(r"\d[\d,]{5,} (.)", text)
    assert figures and set(figures) == {"p"}  # images per GPU-hour, all predicted


def test_a_row_of_a_gpu_appears_beside_its_peers(
    tables: ModuleType, write: Callable[..., Path]
) -> None:
    step = {
        "bench": "step", "case": "step XL 384 px, 32 images", "device": "a GPU",
        "dtype": "bfloat16", "commit": "abc1234", "date": "2026-01-02", "peers": ["plain"],
    }  # fmt: skip
    ours = {**step, "contender": "argrpo", "p50_ms": 1000.4, "images_per_s": 31.99, "over_ours": 1}
    peer = {**step, "contender": "plain", "p50_ms": 9000.0, "images_per_s": 3.5, "over_ours": 8.999}
    text = tables.block(write("step_gpu", ours, peer))
    assert (
        "- step XL 384 px, 32 images: 1,010 ms, 31.9 images/s, AR-GRPO's arithmetic in plain "
        "PyTorch 8.99 times our time (a GPU, 2026-01-02, commit abc1234)"
    ) in text


def test_a_readme_without_its_marks_is_refused(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="expected the two marks of the figures once each"):
        tables.written("no marks", "block")
    with pytest.raises(ValueError, match="expected the mark of the end behind"):
        tables.written(f"{tables.END} {tables.BEGIN}", "block")
    marked = f"before {tables.BEGIN} old {tables.END} after"
    assert tables.written(marked, "new") == "before new after"


def test_charts_show_the_rows_and_say_where_there_are_none(
    tables: ModuleType, write: Callable[..., Path], tmp_path: Path
) -> None:
    from matplotlib.figure import Figure

    plot = importlib.import_module("plot")
    rows = [
        rollout(name, ms, images=images)
        for images in (2, 8)
        for name, ms in (("argrpo", 100.0 * images), ("llamagen", 250.0 * images))
    ]
    figure = Figure()
    left, right = figure.subplots(1, 2)
    plot.throughput(left, rows)
    lines = {line.get_label(): list(line.get_ydata()) for line in left.get_lines()}
    assert lines["argrpo"] == [row["images_per_s"] for row in rows if row["contender"] == "argrpo"]
    assert lines["roofline"] == [1.5, 1.5]
    plot.positions(right, rows)
    assert [list(line.get_xdata()) for line in right.get_lines()] == [[1, 128, 255]] * 2
    files = plot.draw_all(write("rollout_cpu", *rows), tmp_path / "charts")
    assert [path.name for path in files] == ["throughput.png", "positions.png", "phases.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_a_panel_without_rows_says_so(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    said: list[str] = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **style: said.append(text))
    importlib.import_module("plot").draw_all(tmp_path, tmp_path / "charts")
    assert said == ["not measured yet"] * 6
