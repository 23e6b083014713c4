"""`argrpo score`: a folder of pictures through judges, into files that people open."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from argrpo.cli import main
from argrpo.data import Prompt
from argrpo.image_files import save_image
from argrpo.image_folder import list_images, read_batches, with_prompts, with_references
from argrpo.reward_config import RewardConfig
from argrpo.rewards.lanes import Outcome
from argrpo.rewards.pool import Scoring
from argrpo.score import ScoreConfig, prepare_scoring

Start = Callable[[Callable[[Any], None]], str]

_JUDGE = """
import torch


def redness(images, prompts):
    scores = images[:, 0].mean(dim=(1, 2))
    return scores.masked_fill(scores > 0.9, torch.nan)


def letters(prompts, completions, **kwargs):
    return [float(len(prompt)) for prompt in prompts]


def strict(images, prompts):
    raise ValueError("a bug of this judge")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with five pictures of two sizes, prompts, and judges beside it."""
    for index, level in enumerate((0.0, 0.2, 0.4, 0.6, 1.0)):
        size = 8 if index < 3 else 12
        image = torch.zeros(3, size, size)
        image[0] = level
        save_image(image, tmp_path / "images" / f"{index:05d}_cat.png")
    save_image(torch.zeros(3, 8, 8), tmp_path / "images" / "grid.png")
    (tmp_path / "prompts.txt").write_text("a\nbb\nccc\n\ndddd\neeeee\n")
    (tmp_path / "score_judges.py").write_text(_JUDGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def _score(*words: str) -> int:
    return main(["score", "--images", "images", "--output_dir", "out", *words])


def test_a_folder_becomes_a_table_a_summary_and_a_picture(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--rewards", "score_judges:redness", "score_judges:letters"]
    assert _score(*words, "--prompts", "prompts.txt", "--batch", "2") == 0
    assert "out: scores.csv, scores.json, histograms.png" in capsys.readouterr().out
    with (folder / "out/scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{i:05d}_cat.png" for i in range(5)]
    assert [row["prompt"] for row in rows] == ["a", "bb", "ccc", "dddd", "eeeee"]
    reds = [row["score_judges:redness"] for row in rows]
    assert reds[-1] == "", "not scored"
    # 8 bits: half a level of rounding.
    assert [float(red) for red in reds[:-1]] == pytest.approx([0, 0.2, 0.4, 0.6], abs=1 / 510)
    assert [float(row["score_judges:letters"]) for row in rows] == [1, 2, 3, 4, 5]
    assert float(rows[3]["reward"]) == pytest.approx(4.6, abs=1 / 510) and rows[4]["reward"] == ""
    found = json.loads((folder / "out/scores.json").read_text())
    judge = found["judges"]["score_judges:redness"]
    assert (judge["scored"], judge["failures"]) == (4, 1)
    assert judge["mean"] == pytest.approx(0.3, abs=1 / 510) and judge["seconds"] > 0
    assert judge["problem"] == "NaN for 1 of 2 images"
    assert [image["file"] for image in found["images"]] == [row["file"] for row in rows]
    assert found["images"][4]["score_judges:redness"] is None
    with Image.open(folder / "out/histograms.png") as picture:
        assert picture.width > 600 and len(picture.convert("L").getcolors(256) or []) > 10


def test_the_summary_has_the_most_memory_that_a_judge_had_in_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--rewards", "score_judges:redness", "score_judges:letters"]
    words += ["--prompts", "prompts.txt", "--batch", "2"]
    # A GPU's allocator would say it, of three batches here; a judge behind a server has none.
    peaks, finish = iter([5, 9, 7]), Scoring.finish

    def on_a_gpu(scoring: Scoring) -> list[Outcome]:
        first, second = finish(scoring)
        return [replace(first, peak_bytes=next(peaks)), second]

    with monkeypatch.context() as patched:
        patched.setattr(Scoring, "finish", on_a_gpu)
        assert _score(*words) == 0
    judges = json.loads((folder / "out/scores.json").read_text())["judges"]
    assert judges["score_judges:redness"]["peak_bytes"] == 9
    assert "peak_bytes" not in judges["score_judges:letters"]


def test_weights_and_options_come_from_a_file(folder: Path) -> None:
    (folder / "judges.yaml").write_text(
        "images: images\nprompts: prompts.txt\nrewards:\n"
        "- {name: 'score_judges:redness', weight: 2}\n"
        "- {name: 'score_judges:letters', weight: -0.5}\n"
    )
    assert main(["score", "--config", "judges.yaml"]) == 0
    found = json.loads((folder / "scores/scores.json").read_text())["images"][1]
    expected = 2 * found["score_judges:redness"] - 0.5 * found["score_judges:letters"]
    assert found["reward"] == pytest.approx(expected, abs=1e-6)
    assert main(["score", "--config", "judges.yaml"]) == 0
    assert (folder / "scores-2/scores.csv").is_file(), "an earlier result is kept"


def test_scores_that_stand_there_are_not_written_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _score("--rewards", "score_judges:redness") == 0
    table = (folder / "out/scores.csv").read_bytes()
    assert _score("--rewards", "score_judges:letters") == 2
    assert "output_dir: expected a folder without scores, got out, which" in capsys.readouterr().err
    assert (folder / "out/scores.csv").read_bytes() == table


def test_a_folder_is_compared_with_another_by_the_names_of_its_pictures(folder: Path) -> None:
    (folder / "originals").mkdir()
    for index, name in ((1, "00001_cat.png"), (3, "00003_cat.bmp")):
        level = (0.0, 0.4, 0.0, 0.8, 0.0)[index]  # .2 and .2 redder than the image
        levels = (round(255 * level), 0, 0)
        Image.new("RGB", (24, 24), levels).save(folder / "originals" / name)
    assert _score("--rewards", "mse", "--references", "originals") == 0
    scores = json.loads((folder / "out/scores.json").read_text())
    found = [image["mse"] for image in scores["images"]]
    assert [found[i] for i in (0, 2, 4)] == [None] * 3
    # Squares of a third of .2, whose 8 bits are off by up to half a level each.
    assert [found[1], found[3]] == pytest.approx([0.2**2 / 3] * 2, abs=1e-3)
    assert scores["judges"]["mse"]["failures"] == 0


def test_references_are_found_whatever_their_suffix_and_the_missing_ones_counted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, originals = folder / "images", folder / "originals"
    (images / "00002_cat.png").rename(images / "图 2.v1.png")
    (images / "not_a_picture.png").mkdir()
    originals.mkdir()
    for name in ("00001_cat.bmp", "00001_cat.png", "图 2.v1.PNG"):
        Image.new("RGB", (8, 8)).save(originals / name)
    pictures = with_prompts(list_images(images), images, None)
    found = with_references(pictures, images, originals)
    names = [p.prompt.reference_path and p.prompt.reference_path.name for p in found]
    assert names == [None, "00001_cat.png", None, None, "图 2.v1.PNG"]
    assert "references: 3 of 5 are missing, as of 00000_cat.png" in caplog.text


def test_prompts_go_by_line_for_so_many_images_or_by_name(folder: Path) -> None:
    images = folder / "images"
    paths = list_images(images)[:4]
    (folder / "two.txt").write_text("first\nsecond\n")
    pictures = with_prompts(paths, images, folder / "two.txt")
    assert [p.prompt.text for p in pictures] == ["first", "first", "second", "second"]
    assert [p.prompt.prompt_id for p in pictures] == [0, 0, 1, 1]
    named = {path.name: f"of {path.stem}" for path in reversed(paths)}
    (folder / "named.json").write_text(json.dumps(named))
    pictures = with_prompts(paths, images, folder / "named.json")
    assert [p.prompt.text for p in pictures] == [f"of {path.stem}" for path in paths]
    assert [p.prompt.text for p in with_prompts(paths, images, None)] == [""] * 4


def test_batches_hold_pictures_of_one_size_in_order(folder: Path) -> None:
    paths = list_images(folder / "images")
    parts = list(read_batches(with_prompts(paths, folder, None), 2))
    assert [(start, tuple(images.shape)) for start, images in parts] == [
        (0, (2, 3, 8, 8)),
        (2, (1, 3, 8, 8)),
        (3, (2, 3, 12, 12)),
    ]
    assert parts[2][1][1, 0].min() == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rewards", "nonesuch"], "rewards.name: expected one of "),
        (["--rewards", "score_judges:redness", "--images", "none"], "images: expected a folder"),
        (["--rewards", "score_judges:redness", "--prompts", "none"], "prompts: expected a file"),
        (["--rewards", "score_judges:redness", "--prompts", "three.txt"], "prompts: expected a l"),
        (["--rewards", "score_judges:redness", "--prompts", "bad.json"], "prompts: expected JSON"),
        (["--rewards", "score_judges:redness", "--prompts", "list.json"], "prompts: expected an "),
        (["--rewards", "score_judges:redness", "--prompts", "few.json"], "00001_cat.png and 3 mo"),
        (["--rewards", "score_judges:redness", "--images", "empty"], "images: expected pictures"),
        (["--rewards", "score_judges:redness", "--batch", "0"], "batch: expected at least 1"),
        (["--rewards", "score_judges:redness", "score_judges:redness"], "a column of its own"),
        (["--rewards", "score_judges:redness", "mse"], "references: expected a folder of"),
        (
            ["--rewards", "mse", "--references", "empty"],
            "references: expected pictures of the same names, such as 00000_cat.png, got none in",
        ),
        (["--rewards", "mse", "--references", "none"], "references: expected a folder, got none"),
        (["--rewards", '[{"name":"score_judges:redness","weight":0}]'], "a weight that is not 0"),
        ([], "rewards: expected a value, got none"),
    ],
)
def test_wrong_inputs_are_named_before_anything_is_scored(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (folder / "empty").mkdir()
    (folder / "three.txt").write_text("a\nb\nc\n")
    (folder / "bad.json").write_text("{")
    (folder / "list.json").write_text("[]")
    (folder / "few.json").write_text('{"00000_cat.png": "a cat"}')
    assert _score(*words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (folder / "out").exists()


def test_a_broken_picture_is_named_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "images/00002_cat.png"
    path.write_bytes(path.read_bytes()[:40])
    assert _score("--rewards", "score_judges:redness") == 2
    assert "images: expected a picture, got images/00002_cat.png" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_bug_in_a_judge_is_no_wrong_input(folder: Path) -> None:
    with pytest.raises(ValueError, match="a bug of this judge"):
        _score("--rewards", "score_judges:strict")


def test_a_server_that_is_gone_costs_its_column_alone_and_exit_code_69(
    folder: Path, scripted_server: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    url = scripted_server(lambda exchange: exchange.reply({}, 404))
    options = {"url": url, "connection": {"max_retries": 0}}
    judges = [{"name": "deqa", "options": options}, {"name": "score_judges:redness"}]
    assert _score("--rewards", json.dumps(judges)) == 69
    assert "rewards.deqa: expected scores, got none for 5 images" in capsys.readouterr().err
    found = json.loads((folder / "out/scores.json").read_text())
    assert found["judges"]["deqa"]["scored"] == 0 and found["judges"]["deqa"]["mean"] is None
    assert found["judges"]["score_judges:redness"]["scored"] == 4


def test_a_judge_of_whole_sets_is_refused(folder: Path) -> None:
    class Whole:
        name = "whole"

        def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
            return images.mean(dim=(1, 2, 3))

        def update(self) -> None: ...

        def state_dict(self) -> dict[str, Tensor]:
            return {}

    import score_judges  # type: ignore[import-not-found]

    score_judges.Whole = Whole
    config = ScoreConfig(rewards=[RewardConfig(name="score_judges:Whole")], images="images")
    with pytest.raises(ValueError, match="expected judges that score images one by one, got whole"):
        prepare_scoring(config)


def test_a_deadline_that_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match=r"deadline_s: expected a finite number above 0, got inf"):
        ScoreConfig(rewards=[RewardConfig(name="clip")], images="x", deadline_s=math.inf)
