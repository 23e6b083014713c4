"""Policies and tokenizers from disk and back.

Reads LlamaGen's `.pt` files in every wrapping, its hub folders, AR-GRPO's Hugging Face folders, and
our own: config.json and model.safetensors under the published names, packed weights apart. What
taming-transformers published is converted to such folders first. Sizes of LlamaGen's models come
from the shapes of their weights; what shapes cannot say comes from config.json or the caller.
Nothing is guessed: an unknown or missing key, another shape or a contradiction is refused by name.

Source: the formats of FoundationVision/LlamaGen at ce98ec4 and Kwai-Klear/AR-GRPO at 65947ad.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argrpo.models import vq
from argrpo.models.checkpoint_files import (
    CONFIG_FILE,
    Checkpoint,
    first_keys,
    read_checkpoint,
    write_folder,
)
from argrpo.models.filling import fill
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.llamagen import LlamaGen
from argrpo.models.policy_config import (
    ARGRPO_MODEL_TYPE,
    FAMILY_OF_CONFIG,
    POLICY_FORMAT,
    Sizes,
    is_taming,
    policy_config,
    refuse_unconverted,
    taming_config,
)
from argrpo.models.taming import Taming
from argrpo.models.vq import VQTokenizer
from argrpo.models.vq_shapes import infer_config

TOKENIZER_FORMAT = "argrpo-tokenizer"
"""The `format` in config.json of the tokenizer folders that argrpo writes."""

# Keys of published policies that carry no weights: the rotary table, which is computed here, and
# caches that a sampler left behind.
_POLICY_EXTRAS = re.compile(r"freqs_cis|layers\.\d+\.attention\.kv_cache\.[kv]_cache")
_TOKENIZER_EXTRAS = re.compile("|".join(map(re.escape, vq.KNOWN_EXTRAS)))

# The parts of an AR-GRPO folder. Under ref_model. training keeps a second, frozen copy of both.
_ARGRPO_PARTS = ("gpt_model.", "vq_model.", "ref_model.")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load_policy(
    path: str | Path,
    *,
    image_size: int | None = None,
    num_heads: int | None = None,
    downsample: int = 16,
    text_padding: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ImagePolicy:
    """Read a policy: a `LlamaGen`, or a `Taming` that was converted.

    Args:
        path: a `.pt` or `.safetensors` file, or a folder of LlamaGen's hub, AR-GRPO or argrpo.
        image_size: pixels a side that the policy was trained for; required where the path does
            not say it, because no weight depends on it.
        num_heads: attention heads; required where the path does not say it and the width is none
            of the published ones, because no shape depends on it.
        downsample: pixels of a token's side, where the path does not say it.
        text_padding: left or right, where padding stands in a text; None takes what the path says
            (AR-GRPO's folders are of the right), and left where it says nothing. No weight depends
            on it, so it may be chosen anew.
        device: where the weights go.
        dtype: floating; what the weights become.

    Returns:
        A policy with its own copy of the weights: the file may change afterwards.

    Raises:
        FileNotFoundError: nothing stands at the path.
        ValueError: the file is damaged or no policy, a key or shape is unexpected, a size is
            missing, or an argument contradicts the file. The message names it.
    """
    _check_dtype(dtype)
    checkpoint = _part(read_checkpoint(path), "gpt_model.")
    refuse_unconverted(checkpoint)
    if "quantize.embedding.weight" in checkpoint.weights:
        raise ValueError(f"{path}: expected a policy, got a tokenizer; use load_tokenizer")
    sizes: Sizes = {"image_size": image_size, "num_heads": num_heads, "downsample": downsample}
    policy = _blank_policy(checkpoint, sizes, text_padding)
    checkpoint = _without(checkpoint, _POLICY_EXTRAS)
    fill(policy, checkpoint, torch.device(device), dtype, policy.published_names)
    return policy


def _blank_policy(
    checkpoint: Checkpoint, sizes: Sizes, text_padding: str | None
) -> LlamaGen | Taming:
    """The policy of a checkpoint without its weights."""
    with torch.device("meta"):
        if is_taming(checkpoint):
            if text_padding not in (None, "left"):
                raise ValueError(
                    f"text_padding: expected None for a taming policy, which reads no texts, got "
                    f"{text_padding}"
                )
            return Taming(taming_config(checkpoint, sizes))
        config = policy_config(checkpoint, sizes)
        if text_padding is not None:
            config = replace(config, text_padding=text_padding)
        return LlamaGen(config)


def load_tokenizer(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VQTokenizer:
    """Read a VQ tokenizer.

    Args:
        path: as for `load_policy`; of an AR-GRPO folder, what stands beside the policy.
        device, dtype: as for `load_policy`.

    Returns:
        A tokenizer with its own copy of the weights: the file may change afterwards.

    Raises:
        FileNotFoundError: nothing stands at the path.
        ValueError: the file is damaged or no tokenizer, or a key or shape is unexpected.
    """
    _check_dtype(dtype)
    checkpoint = _without(_part(read_checkpoint(path), "vq_model."), _TOKENIZER_EXTRAS)
    refuse_unconverted(checkpoint)
    if {"tok_embeddings.weight", "tok_emb.weight"} & checkpoint.weights.keys():
        raise ValueError(f"{path}: expected a tokenizer, got a policy; use load_policy")
    try:
        config = infer_config(checkpoint.weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config = replace(config, unit_codes=_has_unit_codes(checkpoint))
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    fill(tokenizer, checkpoint, torch.device(device), dtype, lambda key: (key,))
    return tokenizer


def holds_tokenizer(path: str | Path) -> bool:
    """Whether a path holds a policy and its tokenizer, as AR-GRPO's folders do."""
    config = read_checkpoint(path).config
    return config is not None and config.get("model_type") == ARGRPO_MODEL_TYPE


def save_policy(policy: ImagePolicy, folder: str | Path) -> None:
    """Write a policy to a new or empty folder, whole or not at all, in the dtype it has.

    Raises:
        ValueError: the folder holds something.
        OSError: it cannot be written; nothing is left behind.
    """
    write_folder(folder, published_weights(policy), policy_record(policy))


def published_weights(policy: ImagePolicy) -> dict[str, Tensor]:
    """A policy's weights under the published names; views of its own."""
    weights: dict[str, Tensor] = {}
    for key, weight in policy.state_dict().items():
        names = policy.published_names(key)
        weights.update(zip(names, weight.chunk(len(names)), strict=True))
    return weights


@torch.no_grad()
def load_published_weights(policy: ImagePolicy, weights: Mapping[str, Tensor]) -> None:
    """Give a policy weights under the published names, at the addresses that it has.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs; the policy is as it was.
    """
    own = published_weights(policy)
    for name in sorted(own.keys() | weights.keys()):
        found, wanted = weights.get(name), own.get(name)
        if found is None or wanted is None or found.shape != wanted.shape:
            raise ValueError(
                f"{name}: expected {None if wanted is None else list(wanted.shape)}, got "
                f"{None if found is None else list(found.shape)}"
            )
    for name, weight in own.items():
        weight.copy_(weights[name])


def policy_record(policy: ImagePolicy) -> dict[str, object]:
    """The config.json of a policy's folder."""
    config: Any = policy.config
    family = FAMILY_OF_CONFIG[type(config)]
    return {"format": POLICY_FORMAT, "family": family, "config": asdict(config)}


def save_tokenizer(tokenizer: VQTokenizer, folder: str | Path) -> None:
    """Write a tokenizer to a new or empty folder, whole or not at all, in the dtype it has.

    Raises:
        ValueError: the folder holds something.
        OSError: it cannot be written; nothing is left behind.
    """
    config = {"format": TOKENIZER_FORMAT, "config": asdict(tokenizer.config)}
    write_folder(folder, tokenizer.state_dict(), config)


def _has_unit_codes(checkpoint: Checkpoint) -> bool:
    """What no shape tells of a tokenizer: published ones and older folders of ours have them."""
    config = checkpoint.config
    if config is None or config.get("format") != TOKENIZER_FORMAT:
        return True
    stated = config.get("config")
    value = stated.get("unit_codes", True) if isinstance(stated, dict) else stated
    if not isinstance(value, bool):
        raise ValueError(
            f"{checkpoint.path / CONFIG_FILE}: config.unit_codes: expected true or false, got "
            f"{value!r}"
        )
    return value


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _FLOATS:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")


def _part(checkpoint: Checkpoint, part: str) -> Checkpoint:
    """The policy or the tokenizer of an AR-GRPO folder; any other checkpoint as it is."""
    config = checkpoint.config
    if config is None or config.get("model_type") != ARGRPO_MODEL_TYPE:
        return checkpoint
    unknown = [key for key in checkpoint.weights if not key.startswith(_ARGRPO_PARTS)]
    if unknown:
        raise ValueError(
            f"{checkpoint.path}: expected keys under {', '.join(_ARGRPO_PARTS)}, got "
            f"{first_keys(unknown)}"
        )
    mine = {
        key.removeprefix(part): weight
        for key, weight in checkpoint.weights.items()
        if key.startswith(part)
    }
    return checkpoint._replace(weights=mine)


def _without(checkpoint: Checkpoint, extras: re.Pattern[str]) -> Checkpoint:
    kept = {k: weight for k, weight in checkpoint.weights.items() if not extras.fullmatch(k)}
    return checkpoint._replace(weights=kept)
