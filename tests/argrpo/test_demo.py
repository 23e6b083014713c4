"""`argrpo demo` from an empty cache to a report, with models that hardly train."""

import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from argrpo.config_files import TEXTS, parse_config
from argrpo.demo import DemoConfig, DemoResult, run_demo
from argrpo.digits import assets
from argrpo.digits.assets import RECIPE, DigitsRecipe, digits_assets
from argrpo.digits.evaluation import DigitsScores
from argrpo.digits.text_assets import TEXT_RECIPE, TextDigitsRecipe, text_digits_assets
from argrpo.digits.training import FitConfig
from argrpo.run_folder import RunFolder
from argrpo.sample_config import SampleConfig
from argrpo.sampling import draw_samples


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds models of the real sizes, trained for a few steps, as the real ones."""
    folder = tmp_path_factory.mktemp("cache")
    short = FitConfig(steps=2, batch_size=4)
    recipe = DigitsRecipe(
        tokenizer=replace(RECIPE.tokenizer, fit=short),
        policy=replace(RECIPE.policy, fit=short, num_views=1),
        reward_judge=replace(RECIPE.reward_judge, fit=short),
        heldout_judge=replace(RECIPE.heldout_judge, fit=replace(short, seed=1)),
    )
    with_captions = TextDigitsRecipe(
        digits=recipe, policy=replace(TEXT_RECIPE.policy, fit=short, num_views=1)
    )
    made = text_digits_assets(folder, recipe=with_captions).policy_path.parent
    made.rename(folder / made.name.replace(with_captions.key, TEXT_RECIPE.key))
    made = digits_assets(folder, recipe=recipe).policy_path.parent
    made.rename(folder / made.name.replace(recipe.key, RECIPE.key))
    return folder


@pytest.fixture(scope="module")
def shown(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, str]:
    """What a demo of one step left, and what it said; the default folder was taken."""
    place, stream = tmp_path_factory.mktemp("place"), io.StringIO()
    (place / "runs" / "demo").mkdir(parents=True)
    config = DemoConfig(cache_dir=str(cache_dir), num_steps=1, num_evaluation_images=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        result = run_demo(config, Console(file=stream, width=120))
    folder = RunFolder(place / result.folder.path)
    moved = replace(result, folder=folder, policy_path=place / result.policy_path)
    return moved, stream.getvalue()


def test_the_demo_leaves_an_ordinary_run_folder(shown: tuple[DemoResult, str]) -> None:
    folder = shown[0].folder
    assert folder.holds_run
    assert folder.report_path.is_file()
    assert folder.samples(1).is_file()
    assert (shown[0].policy_path / "model.safetensors").is_file()
    assert len(folder.metrics_path.read_text().splitlines()) == 1


def test_it_measures_base_and_tuned_policy_alike(shown: tuple[DemoResult, str]) -> None:
    result = shown[0]
    record = json.loads(result.folder.evaluation_path.read_text())
    assert record["num_images"] == 50
    assert record["base"]["accuracy"] == result.base.accuracy
    assert record["tuned"]["recall"] == result.tuned.recall
    # The policies differ by one step, so equal scores would mean one of them was measured twice.
    assert record["base"]["frechet"] != record["tuned"]["frechet"]


def test_before_and_after_show_five_of_each_digit(shown: tuple[DemoResult, str]) -> None:
    folder = shown[0].folder.path
    pictures = [np.asarray(Image.open(folder / f"{name}.png")) for name in ("before", "after")]
    # Ten columns and five rows of 32 pixels with gaps of 2, enlarged twice.
    assert {picture.shape for picture in pictures} == {(2 * (5 * 34 - 2), 2 * (10 * 34 - 2), 3)}
    assert not np.array_equal(*pictures)


def test_it_says_what_came_of_it_and_where_to_look(shown: tuple[DemoResult, str]) -> None:
    result, text = shown
    for words in ("accuracy", "precision", "recall of 9", "runs/demo-2/report.html"):
        assert words in text
    assert result.policy_path.name == "step_000001"
    assert "argrpo sample --policy runs/demo-2/checkpoints/step_000001" in text


def test_the_report_has_the_pictures_and_the_scores(shown: tuple[DemoResult, str]) -> None:
    page = shown[0].folder.report_path.read_text()
    assert "Before and after" in page
    assert "Measured on fresh samples" in page


def test_a_taken_default_folder_is_left_alone(shown: tuple[DemoResult, str]) -> None:
    taken = shown[0].folder.path.parent / "demo"
    assert shown[0].folder.path.name == "demo-2"
    assert list(taken.iterdir()) == []


def test_the_task_with_captions_goes_from_texts_to_a_report(
    cache_dir: Path, tmp_path: Path
) -> None:
    stream = io.StringIO()
    config = DemoConfig(
        task="text",
        cache_dir=str(cache_dir),
        output_dir=str(tmp_path / "run"),
        num_steps=1,
        num_evaluation_images=90,
    )
    result = run_demo(config, Console(file=stream, width=120))
    record = json.loads(result.folder.evaluation_path.read_text())
    assert {"accuracy", "place", "tilt", "all_true", "recall"} <= record["tuned"].keys()
    assert record["base"] != record["tuned"]
    page = result.folder.report_path.read_text()
    assert "Before and after" in page
    assert "all_true" in page
    assert "all_true" in stream.getvalue()
    row = json.loads(result.folder.metrics_path.read_text().splitlines()[-1])
    assert 0 < row["rewards/digits_attributes/mean"] < 1
    # What the last line says to go on with.
    flags = stream.getvalue().partition("argrpo sample ")[2].splitlines()[0]
    words = [*shlex.split(flags), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    lists = {"--prompts": TEXTS}
    drawn = parse_config(SampleConfig, words, command="argrpo sample", lists=lists)
    folder = draw_samples(replace(drawn, cache_dir=str(cache_dir)))
    assert json.loads((folder / "prompts.json").read_text()) == ["a handwritten seven, tilted left"]
    assert np.load(folder / "tokens.npy").shape == (4, 64)


def test_an_interrupted_preparation_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_build", interrupted)
    config = DemoConfig(output_dir=str(tmp_path / "demo"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, Console(file=io.StringIO()))
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_a_run_is_refused_before_anything_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(assets, "_build", never)
    (tmp_path / "metrics.jsonl").write_text("a step\n")
    config = DemoConfig(output_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="output_dir: expected a folder without a run"):
        run_demo(config, Console(file=io.StringIO()))


def test_too_few_images_to_show_are_refused() -> None:
    with pytest.raises(ValueError, match="num_evaluation_images: expected at least 50, got 49"):
        DemoConfig(num_evaluation_images=49)


def test_the_digit_that_lost_most_variety_is_the_one_reported() -> None:
    def scores(*recalls: float) -> DigitsScores:
        return DigitsScores(1.0, 1.0, 1.0, 0.0, (1.0,) * len(recalls), recalls)

    result = DemoResult(RunFolder(Path()), Path(), scores(0.8, 0.5, 0.0), scores(0.8, 0.2, 0.0))
    assert result.lowest_recall_ratio == pytest.approx(0.4)
