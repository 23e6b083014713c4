"""The sizes of a policy on disk: from shapes, from config.json, from the caller, never guessed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from argrpo.models.checkpoint_files import Checkpoint
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy, save_policy
from argrpo.models.policy_config import policy_config

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = GOLDEN / "llamagen_c2i" / "small_model.pt"
ARGRPO = GOLDEN / "argrpo_hf_checkpoint"


def published() -> dict[str, Tensor]:
    return dict(torch.load(SMALL, weights_only=True)["model"])


@pytest.fixture(scope="module")
def policy() -> LlamaGen:
    return load_policy(SMALL, image_size=64, num_heads=2)


def hub_config(**changes: object) -> dict[str, object]:
    config = {"dim": 128, "n_layer": 1, "n_head": 2, "n_kv_head": None, "vocab_size": 64}
    more = {"block_size": 16, "model_type": "c2i", "num_classes": 10, "cls_token_num": 1}
    return {**config, **more, "rope_base": 10000, "norm_eps": 1e-5, **changes}


def hub_folder(path: Path, config: dict[str, object]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    save_file(published(), path / "model.safetensors")
    return path


def test_a_hub_folder_says_its_heads_and_grid(tmp_path: Path, policy: LlamaGen) -> None:
    folder = hub_folder(tmp_path, hub_config())
    loaded = load_policy(folder)
    assert loaded.config == policy.config
    assert torch.equal(loaded.head_weight, policy.head_weight)
    assert load_policy(folder, downsample=8).config.image_size == 32
    with pytest.raises(ValueError, match=r"image_size: expected 64, as .* says, got 128"):
        load_policy(folder, image_size=128)
    with pytest.raises(ValueError, match=r"num_heads: expected 2, as .* says, got 4"):
        load_policy(folder, num_heads=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 256}, "dim: expected 128, as the weights have it, got 256 in config.json"),
        ({"n_layer": 2}, "num_layers: expected 1, as the weights have it, got 2"),
        ({"model_type": "t2i"}, "model_type: expected c2i, as the weights have it, got t2i"),
        ({"block_size": 15}, "block_size: expected a square number, got 15"),
        ({"block_size": None}, "block_size: expected a square number, got None"),
        ({"n_head": "two"}, "num_heads: expected int, got 'two'"),
        ({"norm_eps": True}, "norm_eps: expected float, got True"),
    ],
)
def test_a_hub_config_that_contradicts_its_weights_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(hub_folder(tmp_path, hub_config(**changes)))


@pytest.mark.parametrize(
    ("dim", "num_heads"),
    [(768, 12), (1024, 16), (1280, 20), (1536, 24), (2048, 32), (2560, 40), (3200, 32), (4096, 32)],
)
def test_published_widths_know_their_heads(dim: int, num_heads: int) -> None:
    with torch.device("meta"):
        weights = {
            "tok_embeddings.weight": torch.empty(16384, dim),
            "layers.0.feed_forward.w1.weight": torch.empty(512, dim),
            "cls_embedding.embedding_table.weight": torch.empty(1001, dim),
        }
    config = policy_config(
        Checkpoint(SMALL, weights, None),
        {"image_size": 384, "num_heads": None, "downsample": 16},
    )
    assert config == LlamaGenConfig(
        dim=dim,
        num_layers=1,
        num_heads=num_heads,
        ffn_dim=512,
        vocab_size=16384,
        image_size=384,
    )


def test_heads_of_another_width_are_required() -> None:
    with pytest.raises(ValueError, match=r"num_heads: expected for width 128, .*pass num_heads="):
        load_policy(SMALL, image_size=64)


def test_image_size_is_required_where_the_file_does_not_say_it() -> None:
    with pytest.raises(ValueError, match=r"image_size: expected, because .* pass image_size=256"):
        load_policy(SMALL, num_heads=2)
    training = GOLDEN / "llamagen_c2i" / "small_training.pt"
    with pytest.raises(ValueError, match=r"image_size: .*its training arguments say 256"):
        load_policy(training, num_heads=2)


def test_arguments_that_contradict_the_file_are_refused() -> None:
    folder = ARGRPO / "plain"
    assert load_policy(folder, num_heads=2, image_size=8, downsample=2).config.grid_size == 4
    with pytest.raises(ValueError, match=r"image_size: expected 8, as .* says, got 64"):
        load_policy(folder, num_heads=2, image_size=64)
    with pytest.raises(ValueError, match=r"downsample: expected 2, as .* says, got 8"):
        load_policy(folder, num_heads=2, downsample=8)
    with_table = GOLDEN / "llamagen_c2i" / "small_compiled.pt"
    with pytest.raises(ValueError, match=r"freqs_cis: expected \[257, 32, 2\] for image_size 256"):
        load_policy(with_table, image_size=256, num_heads=2)
    with pytest.raises(ValueError, match=r"freqs_cis: expected \[17, 16, 2\] .* num_heads 4"):
        load_policy(with_table, image_size=64, num_heads=4)


def test_a_config_of_our_own_is_read_strictly(tmp_path: Path, policy: LlamaGen) -> None:
    save_policy(policy, tmp_path / "policy")
    file = tmp_path / "policy" / "config.json"
    whole = json.loads(file.read_text())

    def refused(content: str, message: str) -> None:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_policy(tmp_path / "policy")

    sizes = whole["config"]
    refused(json.dumps({**whole, "config": {**sizes, "depth": 1}}), "fields .* got 'depth'")
    refused(json.dumps({**whole, "config": {**sizes, "image_size": "64"}}), "image_size: .*'64'")
    refused(json.dumps({**whole, "config": {**sizes, "ffn_dim": 65}}), "ffn_dim: expected 64")
    refused(json.dumps({**whole, "config": None}), "config: expected an object, got None")
    refused(json.dumps({**whole, "format": "other"}), "expected a policy of argrpo")
    refused("[1]", "expected a JSON object, got a list")
    refused("{", "expected JSON")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: expected in a checkpoint folder"):
        load_policy(tmp_path / "policy")
