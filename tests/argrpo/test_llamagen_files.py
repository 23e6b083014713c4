"""What is written for LlamaGen's and AR-GRPO's code, against files that their code wrote."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from argrpo.models.checkpoint_files import Checkpoint
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.llamagen_files import (
    argrpo_folder,
    hub_policy_config,
    hub_tokenizer_config,
    policy_state_dict,
    size_name,
    tokenizer_state_dict,
)
from argrpo.models.loading import load_policy
from argrpo.models.policy_config import policy_config
from argrpo.models.vq import VQConfig, VQTokenizer
from argrpo.models.vq_shapes import infer_config

GOLDEN = Path(__file__).parents[1] / "golden"
# Published policies: name, (width, layers, heads, feed-forward width).
PUBLISHED = {
    "GPT-B": (768, 12, 12, 2048),
    "GPT-L": (1024, 24, 16, 2816),
    "GPT-XL": (1280, 36, 20, 3584),
    "GPT-XXL": (1536, 48, 24, 4096),
    "GPT-3B": (3200, 24, 32, 8704),
}
VQ8, VQ16 = (1, 2, 2, 4), (1, 1, 2, 2, 4)
TEXT = {"model_type": "t2i", "prefix_len": 120}


def published(name: str, **sizes: object) -> LlamaGenConfig:
    dim, num_layers, num_heads, ffn_dim = PUBLISHED[name]
    widths = {"dim": dim, "num_layers": num_layers, "num_heads": num_heads, "ffn_dim": ffn_dim}
    return LlamaGenConfig(**widths, vocab_size=16384, **sizes)


def tokenizer(**sizes: object) -> VQTokenizer:
    with torch.device("meta"):
        return VQTokenizer(VQConfig(**sizes))


def meta_policy(config: LlamaGenConfig) -> LlamaGen:
    with torch.device("meta"):
        return LlamaGen(config)


@pytest.mark.parametrize("case", ["llamagen_c2i/main.pt", "llamagen_t2i/model.pt"])
def test_keys_shapes_and_values_are_those_of_llamagens_file(case: str) -> None:
    theirs = torch.load(GOLDEN / case, weights_only=True)
    theirs = theirs.get("model", theirs)
    policy = load_policy(GOLDEN / case, image_size=64 if "t2i" in case else 128, num_heads=2)
    ours = policy_state_dict(policy)
    # A rotary table and caches in a file carry no weights, and its loader makes them anew.
    kept = {k: w for k, w in theirs.items() if k != "freqs_cis" and "kv_cache" not in k}
    assert ours.keys() == kept.keys()
    for key, weight in kept.items():
        assert torch.equal(ours[key], weight.float()), key


def test_a_tokenizers_keys_and_shapes_are_those_of_llamagens_file() -> None:
    theirs = torch.load(GOLDEN / "vq_tokenizer" / "vq.pt", weights_only=True)["model"]
    with torch.device("meta"):
        small = VQTokenizer(infer_config(theirs))
    # Its own code builds 128 channels alone, the golden file was made with 32.
    wide = tokenizer_state_dict(tokenizer(**{"codebook_size": 512}))
    assert small.state_dict().keys() | {"quantize.codebook_used"} == theirs.keys()
    assert wide["quantize.codebook_used"].shape == theirs["quantize.codebook_used"].shape
    with pytest.raises(ValueError, match="tokenizer: expected 128 channels and 2 residual blocks"):
        tokenizer_state_dict(small)


@pytest.mark.parametrize("image_size", [256, 384])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_class_policy_is_named_and_read_back(name: str, image_size: int) -> None:
    config = published(name, image_size=image_size)
    assert size_name(config) == name
    read_back(config)


@pytest.mark.parametrize("downsample", [8, 16])
@pytest.mark.parametrize("image_size", [256, 512], ids=["stage 1", "stage 2"])
def test_both_stages_of_the_text_policy_are_read_back(image_size: int, downsample: int) -> None:
    config = published("GPT-XL", image_size=image_size, downsample=downsample, **TEXT)
    assert config.num_image_tokens == (image_size // downsample) ** 2
    read_back(config)


def read_back(config: LlamaGenConfig) -> None:
    """From the shapes of a file, and from a hub folder's config.json."""
    weights = policy_state_dict(meta_policy(config))
    given = {
        "image_size": config.image_size,
        "num_heads": None,
        "downsample": config.downsample,
    }
    assert policy_config(Checkpoint(Path("file.pt"), weights, None), given) == config
    hub = hub_policy_config(config)
    assert "ffn_dim_multiplier" not in hub, "a published size has LlamaGen's own width"
    given["image_size"] = None
    assert policy_config(Checkpoint(Path("folder"), weights, hub), given) == config


def test_an_unusual_feed_forward_width_is_what_llamagens_formula_gives() -> None:
    for dim in (64, 768, 1280):
        for ffn_dim in (1, 96, 515, 4321):
            config = replace(
                published("GPT-B", image_size=256), dim=dim, num_heads=2, ffn_dim=ffn_dim
            )
            hub = hub_policy_config(config)
            width = int(hub["ffn_dim_multiplier"] * int(2 * 4 * dim / 3))
            assert -(-width // hub["multiple_of"]) * hub["multiple_of"] == ffn_dim


@pytest.mark.parametrize(("multipliers", "name"), [(VQ16, "VQ-16"), (VQ8, "VQ-8")])
def test_both_published_tokenizers_are_described_as_llamagen_does(
    multipliers: tuple[int, ...], name: str
) -> None:
    both = {"encoder_multipliers": multipliers, "decoder_multipliers": multipliers}
    made = tokenizer(**both)
    config = hub_tokenizer_config(made.config)
    assert config["encoder_ch_mult"] == list(multipliers)
    assert made.downsample == {"VQ-16": 16, "VQ-8": 8}[name]
    policy = meta_policy(published("GPT-B", image_size=256, downsample=made.downsample))
    assert argrpo_folder(policy, made).config["vq_model"] == name


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("GPT-B", {"image_size": 256}),
        ("GPT-L", {"image_size": 256}),
        ("GPT-XL", {"image_size": 384}),
        ("GPT-XL", {"image_size": 256, "text_padding": "right", **TEXT}),
    ],
)
def test_an_argrpo_folder_has_the_keys_and_settings_of_theirs(
    name: str, sizes: dict[str, object]
) -> None:
    policy = meta_policy(published(name, **sizes))
    folder = argrpo_folder(policy, tokenizer())
    assert policy_config(
        Checkpoint(Path("x"), policy_state_dict(policy), folder.config),
        {"image_size": None, "num_heads": None, "downsample": 16},
    ) == replace(policy.config)
    theirs = GOLDEN / "argrpo_hf_checkpoint" / "plain"
    settings = json.loads((theirs / "config.json").read_text(encoding="utf-8"))
    assert folder.config.keys() <= settings.keys()
    for key, value in folder.config.items():
        assert type(value) is type(settings[key]), key
    assert {key.partition(".")[0] for key in folder.weights} == {"gpt_model", "vq_model"}
    assert "vq_model.quantize.codebook_used" in load_file(theirs / "model.safetensors")
    assert "vq_model.quantize.codebook_used" in folder.weights


def test_what_their_code_cannot_build_is_refused() -> None:
    small = replace(published("GPT-B", image_size=256), num_layers=11)
    with pytest.raises(ValueError, match="policy: expected a size that LlamaGen has a name for"):
        argrpo_folder(meta_policy(small), tokenizer())
    few = replace(published("GPT-B", image_size=256), num_classes=10)
    with pytest.raises(ValueError, match="10 classes"):
        argrpo_folder(meta_policy(few), tokenizer())
    policy = meta_policy(published("GPT-B", image_size=256))
    with pytest.raises(ValueError, match="tokenizer: expected VQ-16 or VQ-8"):
        argrpo_folder(policy, tokenizer(decoder_multipliers=(1, 1, 1, 2, 4)))
    with pytest.raises(ValueError, match="expected codes of unit length"):
        argrpo_folder(policy, tokenizer(unit_codes=False))
