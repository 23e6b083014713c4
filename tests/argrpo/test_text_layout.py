"""What a policy on disk says of its texts, before any weight is read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from argrpo.encoded_texts import TextLayout
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy, save_policy
from argrpo.models.text_layout import text_layout

SIZES = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "vocab_size": 8}
GRID = {"image_size": 8, "downsample": 4}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_it_is_that_of_the_policy_once_loaded(tmp_path: Path, padding: str) -> None:
    config = LlamaGenConfig(
        **SIZES, **GRID, model_type="t2i", caption_dim=24, prefix_len=5, text_padding=padding
    )
    save_policy(LlamaGen(config), tmp_path / "policy")
    assert text_layout(tmp_path / "policy") == TextLayout(5, 24, padding)
    loaded = load_policy(tmp_path / "policy").config
    assert (loaded.prefix_len, loaded.caption_dim, loaded.text_padding) == (5, 24, padding)
    assert text_layout(tmp_path / "policy", text_padding="right") == TextLayout(5, 24, "right")


def test_a_policy_of_classes_reads_no_texts(tmp_path: Path) -> None:
    save_policy(LlamaGen(LlamaGenConfig(**SIZES, **GRID, num_classes=3)), tmp_path / "policy")
    assert text_layout(tmp_path / "policy") is None


def test_llamagens_files_and_ar_grpos_folders_say_it_too(golden: Path, tmp_path: Path) -> None:
    file = golden / "llamagen_t2i" / "model.pt"
    assert text_layout(file) == TextLayout(8, 32, "left")
    folder = tmp_path / "ar_grpo"
    folder.mkdir()
    weights = torch.load(file, weights_only=True)["model"]
    renamed = {f"gpt_model.{name}": weight.clone() for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors")
    sizes = {"model_type": "ImgGen_HF", "image_size": 64, "downsample_size": 16}
    (folder / "config.json").write_text(json.dumps(sizes))
    assert load_file(folder / "model.safetensors")
    # Its code pads there and nowhere says so.
    assert text_layout(folder) == TextLayout(8, 32, "right")
    assert load_policy(folder, num_heads=2).config.text_padding == "right"
    assert text_layout(folder, text_padding="left") == TextLayout(8, 32, "left")
    left = load_policy(folder, num_heads=2, text_padding="left")
    assert left.config.text_padding == "left"
