"""Pictures as the processor's file of a CLIP folder wants them, against transformers' own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPProcessor

from argrpo.data import Prompt
from argrpo.rewards.clip import ClipReward
from argrpo.rewards.clip_processor import pixels_of
from argrpo.rewards.image_transfer import pil_images
from argrpo.rewards.tower_pixels import TowerPixels, preprocess

_CPU = torch.device("cpu")
_CROP = {"height": 32, "width": 32}
_PROMPTS = [Prompt(text) for text in ("a cat", "a dog", "a hat")]

SETTINGS: list[dict[str, Any]] = [
    {"size": {"shortest_edge": 32}, "crop_size": _CROP},
    {"size": {"shortest_edge": 41}, "crop_size": _CROP},
    {"size": {"shortest_edge": 36}, "crop_size": _CROP, "resample": 2},
    {"size": _CROP, "do_center_crop": False},
    {"size": _CROP, "crop_size": _CROP, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
    {"size": {"shortest_edge": 32}, "crop_size": _CROP, "do_normalize": False},
    {"size": 35, "crop_size": 32},  # as versions 4 began
]


def _folder(tmp_path: Path, clip_folder: tuple[Path, Any], settings: dict[str, Any]) -> Path:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder[0], folder)
    CLIPImageProcessor(**settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(61, 45), (48, 48), (30, 53)])
def test_the_cosine_is_that_of_the_librarys_own_pictures(
    tmp_path: Path, clip_folder, settings: dict[str, Any], shape: tuple[int, int]
) -> None:
    folder, model = _folder(tmp_path, clip_folder, settings), clip_folder[1]
    images = torch.rand(3, 3, *shape)
    scores = ClipReward(str(folder), device=_CPU)(images, _PROMPTS)
    processor = CLIPImageProcessor.from_pretrained(folder)
    texts = [prompt.text for prompt in _PROMPTS]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        pixels = processor(images=pil_images(images), return_tensors="pt").pixel_values
        seen = model.get_image_features(pixel_values=pixels).pooler_output
        read = model.get_text_features(**tokens).pooler_output
    # fp32 sums of 24 products in another order; the library resizes by the same function of torch.
    torch.testing.assert_close(scores, F.cosine_similarity(seen, read), atol=1e-5, rtol=0)


def test_a_whole_processor_of_transformers_5_is_read(tmp_path: Path, clip_folder) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder[0], folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=_CROP)
    CLIPProcessor(processor, AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    judge = ClipReward(str(folder), device=_CPU)
    assert (judge._pixels.shorter, judge._pixels.size) == (40, 32)


def test_a_folder_without_the_file_is_seen_as_openai_published(clip_folder) -> None:
    judge = ClipReward(str(clip_folder[0]), device=_CPU)
    images = torch.rand(2, 3, 50, 44)
    assert torch.equal(preprocess(images, judge._pixels), preprocess(images, TowerPixels(32)))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"do_resize": False}, "do_resize: expected true"),
        ({"do_rescale": False}, "do_rescale: expected true"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor: expected 1 / 255"),
        ({"resample": 1}, "resample: expected 2 or 3, bilinear or bicubic, .* got 1"),
        ({"crop_size": {"height": 48, "width": 48}}, "crop_size: expected the 32 pixels"),
        ({"crop_size": {"height": 32, "width": 24}}, "crop_size: expected the 32 pixels"),
        ({"size": {"shortest_edge": 24}}, "size: expected .* 32 or more .* with a crop$"),
        ({"size": 32, "do_center_crop": False}, "size: expected .* got 32 without a crop$"),
        ({"size": {"height": 32, "width": 48}}, "size: expected .* a height and a width of 32"),
        ({"size": {"longest_edge": 32}}, "size: expected"),
    ],
)
def test_what_is_not_done_here_is_named(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixels_of(said, 32)


def test_a_refusal_names_the_judges_option_and_the_folder(tmp_path: Path, clip_folder) -> None:
    folder = _folder(tmp_path, clip_folder, {"size": {"shortest_edge": 32}, "crop_size": _CROP})
    said = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**said, "resample": 0}))
    wanted = rf"rewards\.clip\.options\.model: .* {folder}: resample: expected 2 or 3"
    with pytest.raises(ValueError, match=wanted):
        ClipReward(str(folder), device=_CPU)
