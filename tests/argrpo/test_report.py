"""A report is one file that needs nothing else, says what the run's files say, and draws it."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from argrpo.image_files import save_grid
from argrpo.report import write_report
from argrpo.report_charts import Series, bar_chart, line_chart, running_mean, stacked_chart, ticks
from argrpo.run_folder import RunFolder, StorageError
from argrpo.run_record import read_run

CONFIG = """\
policy:
  path: models/<b>policy.pt
rewards:
- name: clip
prompts_per_step: 4
images_per_prompt: 8
num_steps: 30
rollout:
  guidance_scale: 2.0
"""


def step_row(step: int) -> dict[str, float | None]:
    return {
        "step": step,
        "reward": None if step == 5 else step / 40,
        "kl": step / 1000,
        "entropy/draw": 2.0,
        "entropy/policy": 2.5,
        "step_time": 2.0,
        **{f"time/{phase}": 0.4 for phase in ("rollout", "decode", "reward", "logprob", "update")},
        "images_per_second": 16.0,
        **({"monitors/heldout_judge/mean": step / 30} if step % 10 == 0 else {}),
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run with everything that a report can show."""
    folder = RunFolder.create(tmp_path / "my-run")
    folder.config_path.write_text(CONFIG)
    folder.environment_path.write_text(json.dumps({"torch": "2.15.0", "gpu": "none"}))
    lines = [json.dumps(step_row(step)) + "\n" for step in range(1, 31)]
    folder.metrics_path.write_text("".join(lines))
    for step in (0, 10, 20, 30):
        save_grid(torch.rand(4, 3, 8, 8), folder.samples(step))
    for name in ("before", "after"):
        save_grid(torch.rand(4, 3, 8, 8), folder.path / f"{name}.png")
    scores = {"accuracy": 0.72, "frechet": 6.0, "per_class_recall": [0.5, float("nan")]}
    better = {"accuracy": 0.91, "frechet": 5.0, "per_class_recall": [0.6, 0.7]}
    record = {"note": "1,000 fresh samples", "base": scores, "tuned": better}
    folder.evaluation_path.write_text(json.dumps(record))
    return folder


def test_the_report_stands_in_the_run_folder_and_nothing_beside_it(run: RunFolder) -> None:
    before = {path.name for path in run.path.iterdir()}
    assert write_report(run.path) == run.report_path
    assert {path.name for path in run.path.iterdir()} - before == {"report.html"}


def test_the_file_loads_nothing_from_elsewhere(run: RunFolder) -> None:
    page = write_report(run.path).read_text()
    assert "http" not in page
    assert not re.search(r"<script|<link|<iframe|@import|url\(", page)
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == 6  # before, after and four grids
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_pictures_are_those_of_the_run(run: RunFolder) -> None:
    page = write_report(run.path).read_text()
    held = [base64.b64decode(data) for data in re.findall(r'base64,([^"]+)"', page)]
    for path in (run.path / "before.png", run.path / "after.png", run.samples(30)):
        assert path.read_bytes() in held


def test_a_wide_picture_is_made_smaller_so_that_the_file_can_be_sent(run: RunFolder) -> None:
    save_grid(torch.rand(4, 3, 700, 700), run.samples(30), columns=4)
    page = write_report(run.path).read_text()
    (data,) = re.findall(r'data:image/jpeg;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(data))).width == 1400


def test_the_page_says_what_the_run_was_and_what_came_of_it(run: RunFolder) -> None:
    page = write_report(run.path).read_text()
    for words in (
        "<h1>my-run</h1>",
        "30 steps of 4 x 8 images, drawn at guidance 2, rewarded by clip",
        "heldout judge",
        "1,000 fresh samples",
        "2.15.0",
        "step 30",
        "before training",
    ):
        assert words in page
    for title in ("Reward", "Held-out judges", "KL to the", "Entropy", "Seconds a step"):
        assert f"<h3>{title}" in page


def test_what_a_config_says_cannot_become_markup(run: RunFolder) -> None:
    page = write_report(run.path).read_text()
    assert "models/&lt;b&gt;policy.pt" in page
    assert "<b>policy" not in page


def test_every_chart_is_well_formed(run: RunFolder) -> None:
    page = write_report(run.path).read_text()
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(charts) == 6  # five curves and the recall bars; this run has no learning rate
    for chart in charts:
        ElementTree.fromstring(chart)
        assert "nan" not in chart


def test_a_run_that_was_cut_short_is_told_with_what_it_has(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "short")
    folder.config_path.write_text(CONFIG)
    whole = json.dumps(step_row(1)) + "\n"
    folder.metrics_path.write_text(whole + '{"step": 2, "rewa')
    page = write_report(folder.path).read_text()
    assert "1 of 30 steps" in page
    assert "Before and after" not in page


def test_a_run_that_has_not_made_a_step_still_has_a_report(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "empty")
    folder.metrics_path.touch()
    assert "0 steps" in write_report(folder.path).read_text()


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run: expected the folder of a run"):
        write_report(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"run: expected a folder with metrics\.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize("damage", ["{broken}\n", "[1]\n", '{"reward": 1}\n', '{"step": null}\n'])
def test_a_damaged_line_is_named(run: RunFolder, damage: str) -> None:
    with run.metrics_path.open("a") as file:
        file.write(damage)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected .* line 31"):
        write_report(run.path)


def test_a_damaged_side_file_is_named(run: RunFolder) -> None:
    run.evaluation_path.write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json: expected JSON"):
        write_report(run.path)


def test_a_full_disk_leaves_no_half_report(run: RunFolder, files_up_to) -> None:
    with files_up_to(1000), pytest.raises(StorageError, match=r"report\.html: expected room"):
        write_report(run.path)
    assert not [path for path in run.path.iterdir() if "report" in path.name]


def test_a_record_gives_curves_at_the_steps_that_have_them(run: RunFolder) -> None:
    record = read_run(run.path)
    assert record.curve("monitors/heldout_judge/mean") == ([10, 20, 30], [1 / 3, 2 / 3, 1.0])
    assert len(record.finite("reward")) == 29
    assert [step for step, _ in record.samples] == [0, 10, 20, 30]


def test_a_line_goes_through_its_points_and_breaks_at_a_gap() -> None:
    chart = line_chart([Series("x", [0, 1, 2, 3, 4], [0.0, 1.0, None, 1.0, 0.0])])
    (path,) = re.findall(r'<path d="([^"]+)"', chart)
    assert path.count("M") == 2
    points = [tuple(map(float, pair.split(","))) for pair in re.findall(r"[ML]([\d.,]+)", path)]
    (left, low), (_, high), (_, high_again), (right, low_again) = points
    assert (low, high) == (low_again, high_again)
    assert low > high  # y grows downwards
    assert right > left


def test_layers_of_a_stack_add_up_to_the_sum() -> None:
    chart = stacked_chart([Series("a", [1, 2], [1.0, 1.0]), Series("b", [1, 2], [1.0, 3.0])])
    outlines = re.findall(r'points="([^"]+)"', chart)
    bottom, top = ([tuple(map(float, p.split(","))) for p in text.split()] for text in outlines)
    floor, first, both = bottom[-1][1], bottom[0][1], top[0][1]
    # a and b are 1 at the first step, so the sum stands twice as high as a; 0.1 is the rounding.
    assert floor - both == pytest.approx(2 * (floor - first), abs=0.2)
    assert top[2] == bottom[1]


def test_bars_are_as_high_as_their_values() -> None:
    chart = bar_chart(["0", "1"], [("base", [0.5, 1.0]), ("tuned", [1.0, float("nan")])])
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert heights == [pytest.approx(heights[1] / 2, abs=0.1), heights[1], heights[1]]


def test_a_running_mean_looks_back_only() -> None:
    curve = Series("x", list(range(20)), [0.0] * 10 + [1.0] * 10)
    means = running_mean(curve).values  # a window of two
    assert means[:10] == [0.0] * 10
    assert means[10:] == [0.5] + [1.0] * 9


@given(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(1e-6, 1e6, allow_nan=False),
)
def test_ticks_are_few_even_and_within(low: float, width: float) -> None:
    high = low + width
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        return  # closer than the labels can tell apart
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 8
    room = 1e-6 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert all(low - room <= mark <= high + room for mark in marks)


@given(st.lists(st.floats(-1e9, 1e9, allow_nan=False) | st.none(), min_size=1, max_size=40))
def test_any_curve_can_be_drawn(values: list[float | None]) -> None:
    chart = line_chart([Series("x", list(range(len(values))), values)], smooth=True)
    for found in re.findall(r"<svg.*?</svg>", chart):
        ElementTree.fromstring(found)
        assert "nan" not in found
        assert "inf" not in found


def test_what_images_look_like_and_which_judge_failed_have_charts(run: RunFolder) -> None:
    assert "judge failed" not in write_report(run.path).read_text()
    rows = [
        {
            **step_row(step),
            "images/saturation": 0.3,
            "images/edge_density": 0.1,
            "images/colour_entropy": 5.0,
            "images/distinct_tokens": 40.0,
            "rewards/clip/failures": 0.0,
            "rewards/deqa/failures": float(step > 20),
        }
        for step in range(1, 31)
    ]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run.path).read_text()
    for title in (
        "Images: saturation",
        "Images: entropy of",
        "Images: distinct",
        "Images that a j",
    ):
        assert f"<h3>{title}" in page
    failed = page[page.index("<h3>Images that a judge") :].split("<h3>")[1]
    assert "deqa" in failed and "clip" not in failed
