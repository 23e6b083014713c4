"""The prompts of a run as its policy reads them, from a file to conditions."""

import json
from pathlib import Path

import pytest
import torch

from argrpo.data_config import DataConfig
from argrpo.encoded_texts import TextLayout
from argrpo.engine.conditions import TextFeatures
from argrpo.run_prompts import load_run_prompts
from argrpo.text_config import TextEncoderConfig

CPU = torch.device("cpu")
LAYOUT = TextLayout(8, 64, "left")


@pytest.fixture
def encoder(tiny_t5: Path) -> TextEncoderConfig:
    return TextEncoderConfig(path=str(tiny_t5), dtype="float32")


def test_prompts_of_a_file_are_encoded_and_kept_in_the_cache(
    encoder: TextEncoderConfig, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a seven", "class_id": 7}\n{"text": "a small zero"}\n')
    config = DataConfig(prompts=str(path), text_encoder=encoder)
    prompts = load_run_prompts(config, LAYOUT, device=CPU, cache_dir=str(tmp_path / "cache"))
    assert [(p.text, p.class_id, p.prompt_id) for p in prompts.prompts] == [
        ("a seven", 7, 0),
        ("a small zero", None, 1),
    ]
    conditions = prompts.conditions(prompts.prompts, repeats=2)
    assert isinstance(conditions, TextFeatures)
    assert conditions.mask[conditions.rows].sum(dim=1).tolist() == [3, 3, 4, 4]
    assert len(list((tmp_path / "cache" / "texts").glob("*/*.safetensors"))) == 1


def test_the_texts_of_classes_are_prompts_too(encoder: TextEncoderConfig, tmp_path: Path) -> None:
    config = DataConfig(names="digits", classes=[7, 0], template="a {name}", text_encoder=encoder)
    prompts = load_run_prompts(config, LAYOUT, device=CPU, cache_dir=str(tmp_path))
    assert [(p.text, p.class_id) for p in prompts.prompts] == [("a seven", 7), ("a zero", 0)]
    assert isinstance(prompts.probe(), TextFeatures)


def test_a_policy_that_reads_labels_takes_those_of_the_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a seven", "class_id": 7}\n{"text": "a zero", "class_id": 0}\n')
    prompts = load_run_prompts(
        DataConfig(prompts=str(path)), None, device=CPU, cache_dir=str(tmp_path)
    )
    labels = prompts.conditions(prompts.prompts, repeats=2)
    assert isinstance(labels, torch.Tensor)
    assert labels.tolist() == [7, 7, 0, 0]
    path.write_text('"a dog"\n')
    prompts = load_run_prompts(
        DataConfig(prompts=str(path)), None, device=CPU, cache_dir=str(tmp_path)
    )
    with pytest.raises(ValueError, match=r"data\.prompts: expected a class_id .* got none with 'a"):
        prompts.probe()


def test_refusals_have_the_name_of_the_setting(encoder: TextEncoderConfig, tmp_path: Path) -> None:
    def loaded(config: DataConfig, layout: TextLayout = LAYOUT) -> None:
        load_run_prompts(config, layout, device=CPU, cache_dir=str(tmp_path))

    path = tmp_path / "p.json"
    path.write_text(json.dumps(["a dog"]))
    with pytest.raises(ValueError, match=r"^data\.text_encoder\.path: expected the encoder that"):
        loaded(DataConfig(prompts=str(path)))
    wide = TextLayout(8, 2048, "left")
    with pytest.raises(ValueError, match=r"^data\.text_encoder\.path: expected features of width"):
        loaded(DataConfig(prompts=str(path), text_encoder=encoder), wide)
    with pytest.raises(ValueError, match=r"^data\.text_encoder\.path: no/t5: expected the folder"):
        loaded(DataConfig(prompts=str(path), text_encoder=TextEncoderConfig(path="no/t5")))
    with pytest.raises(FileNotFoundError, match=r"^data\.prompts: expected a file"):
        loaded(DataConfig(prompts=str(tmp_path / "none.json"), text_encoder=encoder))


def test_contradicting_settings_are_refused(encoder: TextEncoderConfig) -> None:
    with pytest.raises(ValueError, match=r"text_features: expected no text_encoder\.path beside"):
        DataConfig(text_features="f.safetensors", text_encoder=encoder)
    with pytest.raises(ValueError, match="text_features: expected no prompts beside it"):
        DataConfig(text_features="f.safetensors", prompts="p.txt")
    with pytest.raises(ValueError, match="classes: expected none beside prompts, got 2 of them"):
        DataConfig(prompts="p.txt", classes=[1, 2])
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        TextEncoderConfig(batch=0)
