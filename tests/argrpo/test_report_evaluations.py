"""A report shows what evaluations along a run measured, through time."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from argrpo.report import write_report
from argrpo.run_folder import RunFolder, point_to
from argrpo.run_record import read_run

JUDGE = "eval/heldout<judge>"


def evaluation(step: int) -> dict[str, float | None]:
    return {
        "step": step,
        f"{JUDGE}/mean": 0.5 + step / 100,
        f"{JUDGE}/win_rate": None if step == 10 else 0.5,
        "eval/frechet": 30.0 - step,
        "eval/guidance_1/frechet": 40.0,
        "eval/seconds": 1.0,
    }


def run_with(tmp_path: Path, steps: list[int]) -> RunFolder:
    folder = RunFolder.create(tmp_path / "run")
    folder.config_path.write_text("eval:\n  num_images: 200\n")
    lines = [json.dumps({"step": step, "reward": 0.1}) + "\n" for step in range(1, 31)]
    folder.metrics_path.write_text("".join(lines))
    lines = [json.dumps(evaluation(step)) + "\n" for step in steps]
    folder.evaluations_path.write_text("".join(lines))
    return folder


def table_of(page: str) -> list[list[str]]:
    """The cells of the table of evaluations."""
    table = page.split("<h2>Evaluated along the run</h2>")[1].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_every_metric_has_a_row_and_every_evaluation_a_column(tmp_path: Path) -> None:
    page = write_report(run_with(tmp_path, [0, 10, 20]).path).read_text()
    assert table_of(page) == [
        ["", "base", "step 10", "step 20"],
        ["heldout&lt;judge&gt;", "0.5", "0.6", "0.7"],
        ["heldout&lt;judge&gt; win rate", "0.5", "", "0.5"],
        ["frechet", "30", "20", "10"],
        ["frechet, guidance 1", "40", "40", "40"],
    ]
    assert "200 images each, same seeds and conditions" in page


def test_curves_begin_before_the_first_step_and_break_where_nothing_was_measured(
    tmp_path: Path,
) -> None:
    page = write_report(run_with(tmp_path, [0, 10, 20]).path).read_text()
    part = page.split("<h2>Evaluated along the run</h2>")[1].split("</section>")[0]
    assert re.findall(r"<h3>(.*?)</h3>", part) == [
        "Judges, mean score",
        "Wins against the base, same seeds and conditions",
        "Frechet distance to the reference",
    ]
    charts = re.findall(r"<svg.*?</svg>", part, flags=re.DOTALL)
    for chart in charts:
        ElementTree.fromstring(chart)
    dots = [re.findall(r"<title>step (\d+)", chart) for chart in charts]
    assert dots == [["0", "10", "20"], ["0", "20"], ["0", "10", "20"] * 2]


def test_a_long_run_shows_evenly_spaced_evaluations_with_the_first_and_the_last(
    tmp_path: Path,
) -> None:
    page = write_report(run_with(tmp_path, list(range(0, 61, 2))).path).read_text()
    heads = table_of(page)[0]
    assert len(heads) == 9
    assert (heads[1], heads[-1]) == ("base", "step 60")


def test_the_best_policy_is_named_and_marked(tmp_path: Path) -> None:
    folder = run_with(tmp_path, [0, 10, 20])
    folder.best_of(10).mkdir(parents=True)
    record = {"step": 10, "metric": "eval/frechet", "value": 20.0, "mode": "min"}
    (folder.best_of(10) / "best.json").write_text(json.dumps(record))
    point_to(folder.best_path, folder.best_of(10))
    page = write_report(folder.path).read_text()
    assert "checkpoints/best is step 10, with eval/frechet 20" in page
    assert table_of(page)[0] == ["", "base", "step 10*", "step 20"]


def test_a_run_without_evaluations_says_nothing_of_them(tmp_path: Path) -> None:
    folder = run_with(tmp_path, [])
    assert "Evaluated along the run" not in write_report(folder.path).read_text()
    folder.evaluations_path.unlink()
    assert read_run(folder.path).evaluations == []


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    folder = run_with(tmp_path, [0])
    folder.evaluations_path.write_text("{broken}\n")
    with pytest.raises(ValueError, match=r"evaluations\.jsonl: expected JSON in line 1"):
        write_report(folder.path)
