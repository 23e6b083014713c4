"""The cache of the embedded models: built once, whole or not at all, and by recipe."""

import shutil
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from argrpo.digits import assets
from argrpo.digits.assets import DigitsAssets, DigitsRecipe, default_cache_dir, digits_assets
from argrpo.digits.judges import load_judge
from argrpo.digits.training import FitConfig
from argrpo.models.loading import load_policy, load_tokenizer


def tiny(steps: int = 1) -> DigitsRecipe:
    """The real recipe with next to no training."""
    whole = DigitsRecipe()
    short = FitConfig(steps=steps, batch_size=2)
    return DigitsRecipe(
        tokenizer=replace(whole.tokenizer, fit=short),
        policy=replace(whole.policy, fit=short, num_views=1),
        reward_judge=replace(whole.reward_judge, fit=replace(short, seed=1)),
        heldout_judge=replace(whole.heldout_judge, fit=replace(short, seed=2)),
    )


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches") / "not" / "there" / "yet"


@pytest.fixture(scope="module")
def built(cache_dir: Path) -> DigitsAssets:
    return digits_assets(cache_dir, recipe=tiny())


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_all_four_models_load_from_where_they_are_said_to_be(built: DigitsAssets) -> None:
    policy = load_policy(built.policy_path)
    tokenizer = load_tokenizer(built.tokenizer_path)
    assert policy.config == DigitsRecipe().policy.model
    assert tokenizer.config == DigitsRecipe().tokenizer.model
    images = tokenizer.decode(torch.zeros((1, policy.config.num_image_tokens), dtype=torch.int64))
    reward, heldout = load_judge(built.reward_judge_path), load_judge(built.heldout_judge_path)
    assert not torch.equal(reward.logprobs(images), heldout.logprobs(images))


def test_a_model_that_was_removed_is_trained_again(tmp_path: Path) -> None:
    first = digits_assets(tmp_path, recipe=tiny())
    weights = (first.heldout_judge_path / "model.safetensors").read_bytes()
    shutil.rmtree(first.heldout_judge_path)
    assert digits_assets(tmp_path, recipe=tiny()) == first
    assert (first.heldout_judge_path / "model.safetensors").read_bytes() == weights
    assert visible(tmp_path) == [first.policy_path.parent.name]


def test_the_second_call_trains_nothing(
    built: DigitsAssets, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "_train_into", None)  # calling it would raise
    assert digits_assets(cache_dir, recipe=tiny()) == built
    assert visible(cache_dir) == [built.policy_path.parent.name]


def test_a_cache_that_cannot_be_written_is_read(
    built: DigitsAssets, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "building", None)
    assert digits_assets(cache_dir, recipe=tiny()) == built


def test_progress_names_every_stage_up_to_its_end(tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    digits_assets(tmp_path, lambda *report: reports.append(report), recipe=tiny(2))
    stages = ("reward judge", "heldout judge", "tokenizer", "base policy")
    assert reports == [(stage, step, 2) for stage in stages for step in (1, 2)]


def test_another_recipe_makes_another_entry(
    built: DigitsAssets, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "_train_into", lambda folders, recipe, progress: None)
    other = digits_assets(cache_dir, recipe=tiny(3))
    assert other.policy_path.parent != built.policy_path.parent
    assert len(visible(cache_dir)) == 2
    other.policy_path.parent.joinpath("recipe.json").unlink()
    other.policy_path.parent.rmdir()


def test_the_key_follows_every_part_of_the_recipe() -> None:
    recipe = DigitsRecipe()
    others = [
        replace(recipe, tokenizer=replace(recipe.tokenizer, commitment=0.5)),
        replace(recipe, policy=replace(recipe.policy, label_dropout=0.2)),
        replace(recipe, policy=replace(recipe.policy, model=replace(recipe.policy.model, dim=256))),
        replace(recipe, reward_judge=replace(recipe.reward_judge, width=8)),
        replace(recipe, heldout_judge=replace(recipe.heldout_judge, max_shift=0.0)),
    ]
    assert recipe.key == DigitsRecipe().key
    assert len({recipe.key, *(other.key for other in others)}) == 6


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(stage: str, step: int, steps: int) -> None:
        if stage == "tokenizer":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digits_assets(tmp_path, interrupted, recipe=tiny())
    assert visible(tmp_path) == []

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets, "save_policy", disk_full)
    with pytest.raises(OSError, match="No space left"):
        digits_assets(tmp_path, recipe=tiny())
    assert visible(tmp_path) == []


def test_what_a_killed_build_left_is_swept_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "_train_into", lambda folders, recipe, progress: None)
    name = digits_assets(tmp_path, recipe=tiny()).policy_path.parent.name
    (tmp_path / name / "recipe.json").unlink()
    (tmp_path / name).rmdir()
    (tmp_path / f".{name}.abandoned" / "policy").mkdir(parents=True)
    digits_assets(tmp_path, recipe=tiny())
    assert visible(tmp_path) == [name]


def test_of_two_at_once_one_builds_and_the_other_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building, waiting = threading.Event(), threading.Event()
    builds: list[str] = []

    def slow(folders: DigitsAssets, recipe: DigitsRecipe, progress: assets.Progress) -> None:
        builds.append(threading.current_thread().name)
        building.set()
        assert waiting.wait(30), "the other one never came to wait"
        for field in fields(folders):
            folder = getattr(folders, field.name)
            folder.mkdir()
            (folder / "config.json").write_text("{}")

    def note(stage: str, step: int, steps: int) -> None:
        if stage == "waiting for another process":
            waiting.set()

    # Locks belong to open files, so two threads exclude each other as two processes do.
    monkeypatch.setattr(assets, "_train_into", slow)
    first = threading.Thread(target=digits_assets, args=(tmp_path,), kwargs={"recipe": tiny()})
    first.start()
    assert building.wait(30)
    second = digits_assets(tmp_path, note, recipe=tiny())
    first.join()
    assert len(builds) == 1
    assert second.policy_path.parent.is_dir()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cache_dir: expected a folder that can be written"):
        digits_assets(tmp_path / "file", recipe=tiny())


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/argrpo")
    assert default_cache_dir("") == Path("/home/someone/.cache/argrpo")
    assert default_cache_dir("/elsewhere") == Path("/elsewhere/argrpo")
