"""The sizes of a policy on disk: what the shapes of its weights say, and what they cannot.

Every tensor is sized by the config but for the heads, which share their columns, and the token
grid, whose rotary table is computed. Those two come from config.json or from the caller.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from math import isqrt
from pathlib import Path
from typing import Any, TypeAlias

from argrpo.models.checkpoint_files import CONFIG_FILE, Checkpoint, first_keys
from argrpo.models.llamagen import LlamaGenConfig
from argrpo.models.taming import TamingConfig

POLICY_FORMAT = "argrpo-policy"
"""The `format` in config.json of the folders that argrpo writes."""

ARGRPO_MODEL_TYPE = "ImgGen_HF"
"""The `model_type` in config.json of AR-GRPO's folders, which hold policy and tokenizer."""

ARGRPO_TEXT_PADDING = "right"
"""Where AR-GRPO's code pads texts, in training and in sampling; its config.json does not say it."""

FAMILY_OF_CONFIG: dict[type, str] = {LlamaGenConfig: "llamagen", TamingConfig: "taming"}
"""The `family` in config.json of our folders; older ones, without it, hold LlamaGen policies."""

Sizes: TypeAlias = Mapping[str, int | None]
"""What a caller says of a policy: image_size, num_heads and downsample, each a number or None."""

_HEADS_BY_WIDTH = {
    768: 12,
    1024: 16,
    1280: 20,
    1536: 24,
    2048: 32,
    2560: 40,
    3200: 32,
    4096: 32,
}
_DEFAULT_DOWNSAMPLE = 16
_LABELS = "cls_embedding.embedding_table.weight"
_NULL_TEXT = "cls_embedding.uncond_embedding"

# AR-GRPO's name of a size, ours. The published model that its config names may be another one.
_ARGRPO_NAMES = {"image_size": "image_size", "downsample_size": "downsample"}

# LlamaGen's hub: its name of a size, ours.
_HUB_NAMES = {
    "dim": "dim",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "vocab_size": "vocab_size",
    "model_type": "model_type",
    "num_classes": "num_classes",
    "caption_dim": "caption_dim",
    "cls_token_num": "prefix_len",
    "norm_eps": "norm_eps",
    "rope_base": "rope_base",
}


def refuse_unconverted(checkpoint: Checkpoint) -> None:
    """ValueError for a checkpoint of taming-transformers, which names how to convert it."""
    if any(key.startswith("transformer.blocks.") for key in checkpoint.weights):
        raise ValueError(
            f"{checkpoint.path}: expected a policy or a tokenizer, got a checkpoint of "
            "taming-transformers, which is both; run argrpo convert taming CKPT YAML OUT once"
        )


def is_taming(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is our folder of a taming policy.

    Raises:
        ValueError: a folder of ours of a family that this version does not know.
    """
    config = checkpoint.config
    if config is None or config.get("format") != POLICY_FORMAT:
        return False
    family = config.get("family", "llamagen")
    if family not in FAMILY_OF_CONFIG.values():
        raise ValueError(
            f"{checkpoint.path / CONFIG_FILE}: family: expected one of "
            f"{', '.join(FAMILY_OF_CONFIG.values())}, got {family!r}"
        )
    return family == "taming"


def taming_config(checkpoint: Checkpoint, sizes: Sizes) -> TamingConfig:
    """The config of our folder of a taming policy.

    Raises:
        ValueError: a field is missing or of another type, or the caller says otherwise.
    """
    assert checkpoint.config is not None, "is_taming"
    file = checkpoint.path / CONFIG_FILE
    stated = _checked(file, _object(file, checkpoint.config, "config"), TamingConfig)
    missing = {field.name for field in fields(TamingConfig)} - stated.keys()
    if missing:
        raise ValueError(f"{file}: expected {first_keys(missing)} in config, got no such key")
    _check_given(checkpoint, _given(sizes, stated), stated)
    return TamingConfig(**stated)


def policy_config(checkpoint: Checkpoint, sizes: Sizes) -> LlamaGenConfig:
    """The config of a LlamaGen policy whose weights carry the published names.

    Raises:
        ValueError: a size is neither in the file nor given, or two sources contradict each other.
    """
    shaped = _sizes_from_shapes(checkpoint)
    stated = _sizes_from_config(checkpoint, sizes["downsample"] or _DEFAULT_DOWNSAMPLE)
    given = _given(sizes, stated)
    for name in sorted(shaped.keys() & stated.keys()):
        if shaped[name] != stated[name]:
            raise ValueError(
                f"{checkpoint.path}: {name}: expected {shaped[name]}, as the weights have it, "
                f"got {stated[name]} in {CONFIG_FILE}"
            )
    _check_given(checkpoint, given, stated)
    known = {**shaped, **stated, **given}
    if "num_heads" not in known:
        known["num_heads"] = _published_heads(known["dim"])
    if "image_size" not in known:
        raise ValueError(_image_size_is_missing(checkpoint))
    config = LlamaGenConfig(**known)
    _check_rotary(checkpoint, config)
    return config


def _given(sizes: Sizes, stated: Mapping[str, Any]) -> dict[str, int]:
    """What the caller says; the default pixels of a token say nothing where the file does."""
    given = {name: value for name, value in sizes.items() if value is not None}
    if given.get("downsample") == _DEFAULT_DOWNSAMPLE and "downsample" in stated:
        del given["downsample"]
    return given


def _check_given(
    checkpoint: Checkpoint, given: Mapping[str, int], stated: Mapping[str, Any]
) -> None:
    for name in sorted(given.keys() & stated.keys()):
        if given[name] != stated[name]:
            raise ValueError(
                f"{name}: expected {stated[name]}, as {checkpoint.path} says, got {given[name]}"
            )


def _sizes_from_shapes(checkpoint: Checkpoint) -> dict[str, Any]:
    """The sizes that weights have, by the name of their field."""
    weights = checkpoint.weights
    vocab_size, dim = _shape(checkpoint, "tok_embeddings.weight")
    ffn_dim, _ = _shape(checkpoint, "layers.0.feed_forward.w1.weight")
    layers = {match[1] for key in weights if (match := re.match(r"layers\.(\d+)\.", key))}
    sizes = {
        "dim": dim,
        "num_layers": len(layers),
        "ffn_dim": ffn_dim,
        "vocab_size": vocab_size,
    }
    if _NULL_TEXT in weights:
        prefix_len, caption_dim = _shape(checkpoint, _NULL_TEXT)
        text = {"model_type": "t2i", "prefix_len": prefix_len, "caption_dim": caption_dim}
        return {**sizes, **text}
    num_labels, _ = _shape(checkpoint, _LABELS)
    return {**sizes, "model_type": "c2i", "prefix_len": 1, "num_classes": num_labels - 1}


def _shape(checkpoint: Checkpoint, key: str) -> tuple[int, int]:
    if key not in checkpoint.weights:
        raise ValueError(
            f"{checkpoint.path}: expected the weights of a LlamaGen policy, got no {key} beside "
            f"{first_keys(checkpoint.weights) or 'nothing'}"
        )
    shape = checkpoint.weights[key].shape
    if len(shape) != 2:
        raise ValueError(f"{checkpoint.path}: {key}: expected a matrix, got {list(shape)}")
    return shape[0], shape[1]


def _sizes_from_config(checkpoint: Checkpoint, downsample: int) -> dict[str, Any]:
    """The sizes that config.json states, by the name of our field."""
    config = checkpoint.config
    if config is None:
        return {}
    file = checkpoint.path / CONFIG_FILE
    if config.get("format") == POLICY_FORMAT:
        return _checked(file, _object(file, config, "config"), LlamaGenConfig)
    if config.get("model_type") == ARGRPO_MODEL_TYPE:
        padding = {"text_padding": ARGRPO_TEXT_PADDING} if _NULL_TEXT in checkpoint.weights else {}
        return _checked(file, {**_renamed(config, _ARGRPO_NAMES), **padding}, LlamaGenConfig)
    if "n_layer" in config and "block_size" in config:
        return _hub_sizes(file, config, downsample)
    raise ValueError(
        f"{file}: expected a policy of argrpo (format {POLICY_FORMAT}), AR-GRPO (model_type "
        f"{ARGRPO_MODEL_TYPE}) or LlamaGen's hub (n_layer, block_size), got the keys "
        f"{first_keys(config) or 'none'}"
    )


def _hub_sizes(file: Path, config: dict[str, object], downsample: int) -> dict[str, Any]:
    num_tokens = config["block_size"]
    if not isinstance(num_tokens, int) or num_tokens < 1 or isqrt(num_tokens) ** 2 != num_tokens:
        raise ValueError(f"{file}: block_size: expected a square number, got {num_tokens!r}")
    sizes = _checked(file, _renamed(config, _HUB_NAMES), LlamaGenConfig)
    # The hub knows the number of tokens alone; how many pixels a token has is the tokenizer's.
    return {**sizes, "image_size": isqrt(num_tokens) * downsample}


def _renamed(config: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _object(file: Path, config: dict[str, object], key: str) -> dict[str, object]:
    value = config.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {key}: expected an object, got {value!r}")
    return value


def _checked(
    file: Path, sizes: Mapping[str, object], kind: type[LlamaGenConfig] | type[TamingConfig]
) -> dict[str, Any]:
    """The sizes, each a field of a config with its type."""
    types: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    for name, value in sizes.items():
        if name not in types:
            raise ValueError(f"{file}: expected fields of a policy's config, got {name!r}")
        wanted = (int, float) if types[name] is float else types[name]
        if isinstance(value, bool) or not isinstance(value, wanted):
            kind = getattr(types[name], "__name__", types[name])
            raise ValueError(f"{file}: {name}: expected {kind}, got {value!r}")
    return dict(sizes)


def _published_heads(dim: int) -> int:
    if dim not in _HEADS_BY_WIDTH:
        raise ValueError(
            f"num_heads: expected for width {dim}, which is none of the published ones "
            f"({', '.join(map(str, _HEADS_BY_WIDTH))}), got None; pass num_heads=..., which no "
            "shape tells"
        )
    return _HEADS_BY_WIDTH[dim]


def _image_size_is_missing(checkpoint: Checkpoint) -> str:
    hint = "pass image_size=256 if it was trained on 256 pixels a side"
    if checkpoint.training_image_size is not None:
        # The arguments of a run, not facts about the weights: fine-tuned files keep old ones.
        hint += f" (its training arguments say {checkpoint.training_image_size})"
    return f"image_size: expected, because {checkpoint.path} does not say it, got None; {hint}"


def _check_rotary(checkpoint: Checkpoint, config: LlamaGenConfig) -> None:
    """Refuse sizes that contradict the rotary table of a file that holds one.

    The table itself is not used: it is computed.
    """
    table = checkpoint.weights.get("freqs_cis")
    if table is None or table.dim() != 3:
        return
    expected = [config.prefix_len + config.num_image_tokens, config.head_dim // 2, 2]
    if list(table.shape) != expected:
        raise ValueError(
            f"{checkpoint.path}: freqs_cis: expected {expected} for image_size "
            f"{config.image_size}, downsample {config.downsample} and num_heads "
            f"{config.num_heads}, got {list(table.shape)}"
        )
