"""A report shows variety beside the rewards."""

import json
import re
from pathlib import Path

from argrpo.report import write_report
from argrpo.report_diversity import Change, diversity
from argrpo.run_folder import RunFolder
from argrpo.run_record import read_run


def run_with(
    tmp_path: Path, rows: list[dict[str, float]], evaluations: list[dict[str, float | None]]
) -> RunFolder:
    folder = RunFolder.create(tmp_path / "run")
    folder.config_path.write_text("seed: 0\n")
    for path, found in ((folder.metrics_path, rows), (folder.evaluations_path, evaluations)):
        path.write_text(
            "".join(json.dumps({"step": i, **row}) + "\n" for i, row in enumerate(found))
        )
    return folder


def test_variety_is_first_and_last_of_what_was_measured(tmp_path: Path) -> None:
    evaluations = [
        {"eval/recall": 0.9, "eval/coverage": None, "eval/pairwise_distance": 4.0},
        {"eval/recall": 0.8, "eval/coverage": 0.5, "eval/pairwise_distance": 3.0},
        {"eval/recall": 0.7, "eval/coverage": 0.4, "eval/pairwise_distance": None},
    ]
    rows = [{"entropy/draw": 3.0, "entropy/policy": 2.0}, {"entropy/draw": 2.5}]
    rows += [{"entropy/draw": 2.0, "entropy/policy": 1.0}]
    folder = run_with(tmp_path, rows, evaluations)
    found = {change.label: change[1:3] for change in diversity(read_run(folder.path))}
    assert found == {
        "recall": (0.9, 0.7),
        "coverage": (0.5, 0.4),
        "distance within a prompt": (4.0, 3.0),
        "policy entropy": (2.0, 1.0),
    }


def test_pixels_stand_in_where_no_network_looked(tmp_path: Path) -> None:
    evaluations: list[dict[str, float | None]] = [{"eval/pairwise_pixels": v} for v in (0.3, 0.2)]
    folder = run_with(tmp_path, [{"entropy/draw": v} for v in (3.0, 2.0)], evaluations)
    distance, entropy = diversity(read_run(folder.path))
    assert distance[:3] == ("distance within a prompt", 0.3, 0.2)
    assert "pixels" in distance.note
    assert entropy == Change("entropy of the draws", 3.0, 2.0, entropy.note)


def test_the_page_has_it_right_after_the_reward(tmp_path: Path) -> None:
    evaluations: list[dict[str, float | None]] = [{"eval/recall": v} for v in (0.9, 0.7)]
    rows = [{"reward": v, "kl": 0.1, "monitors/judge/mean": v} for v in (0.1, 0.5)]
    page = write_report(run_with(tmp_path, rows, evaluations).path).read_text()
    labels = re.findall(r'<div class="label">(.*?)</div>', page)
    assert labels[:3] == ["reward", "recall", "judge"]


def test_a_run_that_measured_none_says_nothing(tmp_path: Path) -> None:
    assert diversity(read_run(run_with(tmp_path, [{"reward": 0.1}], []).path)) == []
