"""Prompts of a run and the conditions they become."""

import json

import pytest
import torch
from safetensors.torch import save_file

from argrpo.config import DataConfig
from argrpo.data import PromptSet, load_prompts
from argrpo.engine.conditions import TextFeatures


def test_every_class_comes_once_before_any_comes_again() -> None:
    prompts = load_prompts(DataConfig(names="digits"))
    drawn = [p.class_id for step in range(5) for p in prompts.draw(4, seed=3, step=step)]
    assert sorted(drawn[:10]) == list(range(10))
    assert sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_a_step_sees_the_same_prompts_whenever_it_is_asked() -> None:
    prompts = load_prompts(DataConfig(names="digits"))
    assert prompts.draw(4, seed=3, step=7) == prompts.draw(4, seed=3, step=7)
    assert prompts.draw(10, seed=3, step=0) != prompts.draw(10, seed=4, step=0)


def test_classes_become_labels_grouped_by_prompt() -> None:
    prompts = load_prompts(DataConfig(names="digits", classes=[7, 2], template="a {name}"))
    assert [p.text for p in prompts.prompts] == ["a seven", "a two"]
    labels = prompts.conditions(prompts.prompts, repeats=3)
    assert isinstance(labels, torch.Tensor)
    assert labels.tolist() == [7, 7, 7, 2, 2, 2]


def test_imagenet_names_come_from_a_library() -> None:
    prompts = load_prompts(DataConfig(classes=[207], template="{name}"))
    assert prompts.prompts[0].text == "Golden Retriever"


@pytest.mark.parametrize("classes", [[1000], [-1], []])
def test_a_class_without_a_name_is_refused(classes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"data\.classes: expected ids from 0 to 999"):
        load_prompts(DataConfig(classes=classes))


def _write_features(path, count: int, prompts: list[str]) -> None:
    tensors = {"features": torch.randn(count, 5, 8), "mask": torch.ones(count, 5)}
    save_file(tensors, path, metadata={"prompts": json.dumps(prompts)})


def test_encoded_prompts_are_shared_by_their_images(tmp_path) -> None:
    _write_features(tmp_path / "f.safetensors", 3, ["a cat", "a dog", "a hat"])
    prompts = load_prompts(DataConfig(text_features=str(tmp_path / "f.safetensors")))
    conditions = prompts.conditions([prompts.prompts[2], prompts.prompts[0]], repeats=2)
    assert isinstance(conditions, TextFeatures)
    assert conditions.rows.tolist() == [2, 2, 0, 0]
    assert len(conditions.features) == 3


def test_features_without_their_prompts_are_refused(tmp_path) -> None:
    path = tmp_path / "f.safetensors"
    config = DataConfig(text_features=str(path))
    with pytest.raises(FileNotFoundError, match=r"data\.text_features: expected a file"):
        load_prompts(config)
    _write_features(path, 3, ["a cat"])
    with pytest.raises(ValueError, match="with 1 prompts for 3 features"):
        load_prompts(config)
    tensors = {"features": torch.randn(1, 5, 8), "mask": torch.ones(1, 5)}
    save_file(tensors, path, metadata={"prompts": '{"a": 1}'})
    with pytest.raises(ValueError, match="prompts are no list of strings"):
        load_prompts(config)
    save_file(tensors, path, metadata={"prompts": "[a cat]"})
    with pytest.raises(ValueError, match="prompts are no JSON"):
        load_prompts(config)
    save_file({"mask": torch.ones(3, 5)}, path)
    with pytest.raises(ValueError, match="without features"):
        load_prompts(config)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"data\.text_features: .* which cannot be read"):
        load_prompts(config)


def test_drawing_is_independent_of_how_many_prompts_a_step_takes() -> None:
    prompts = PromptSet(load_prompts(DataConfig(names="digits")).prompts)
    whole = prompts.draw(8, seed=1, step=0)
    assert whole == prompts.draw(4, seed=1, step=0) + prompts.draw(4, seed=1, step=1)
