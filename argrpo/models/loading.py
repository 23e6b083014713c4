"""Policies and tokenizers from disk and back.

Reads LlamaGen's `.pt` files in every wrapping, its hub folders, AR-GRPO's Hugging Face folders, and
our own: config.json and model.safetensors under the published names, `w1` and `w3` apart. Sizes
come from the shapes of the weights; what shapes cannot say comes from config.json or the caller.
Nothing is guessed: an unknown or missing key, another shape or a contradiction is refused by name.

Source: the formats of FoundationVision/LlamaGen at ce98ec4 and Kwai-Klear/AR-GRPO at 65947ad.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from argrpo.models import vq
from argrpo.models.checkpoint_files import Checkpoint, first_keys, read_checkpoint, write_folder
from argrpo.models.llamagen import LlamaGen
from argrpo.models.policy_config import ARGRPO_MODEL_TYPE, POLICY_FORMAT, policy_config
from argrpo.models.vq import VQTokenizer

_TOKENIZER_FORMAT = "argrpo-tokenizer"

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
) -> LlamaGen:
    """Read a LlamaGen policy.

    Args:
        path: a `.pt` or `.safetensors` file, or a folder of LlamaGen's hub, AR-GRPO or argrpo.
        image_size: pixels a side that the policy was trained for; required where the path does
            not say it, because no weight depends on it.
        num_heads: attention heads; required where the path does not say it and the width is none
            of the published ones, because no shape depends on it.
        downsample: pixels of a token's side, where the path does not say it.
        text_padding: left or right, where padding stands in a text; None takes what the path says,
            and left where it says nothing. No weight depends on it, so it may be chosen anew.
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
    if "quantize.embedding.weight" in checkpoint.weights:
        raise ValueError(f"{path}: expected a policy, got a tokenizer; use load_tokenizer")
    config = policy_config(
        checkpoint, image_size=image_size, num_heads=num_heads, downsample=downsample
    )
    if text_padding is not None:
        config = replace(config, text_padding=text_padding)
    with torch.device("meta"):
        policy = LlamaGen(config)
    checkpoint = _without(checkpoint, _POLICY_EXTRAS)
    _fill(policy, checkpoint, torch.device(device), dtype)
    return policy


def load_tokenizer(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VQTokenizer:
    """Read a VQ tokenizer.

    Args:
        path: a `.pt` or `.safetensors` file, or a folder of LlamaGen's hub, AR-GRPO (which holds
            the policy's tokenizer beside it) or argrpo.
        device: where the weights go.
        dtype: floating; what the weights become.

    Returns:
        A tokenizer with its own copy of the weights: the file may change afterwards.

    Raises:
        FileNotFoundError: nothing stands at the path.
        ValueError: the file is damaged or no tokenizer, or a key or shape is unexpected. The
            message names it.
    """
    _check_dtype(dtype)
    checkpoint = _without(_part(read_checkpoint(path), "vq_model."), _TOKENIZER_EXTRAS)
    if "tok_embeddings.weight" in checkpoint.weights:
        raise ValueError(f"{path}: expected a tokenizer, got a policy; use load_policy")
    try:
        config = vq.infer_config(checkpoint.weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    _fill(tokenizer, checkpoint, torch.device(device), dtype)
    return tokenizer


def save_policy(policy: LlamaGen, folder: str | Path) -> None:
    """Write a policy to a new or empty folder, whole or not at all, in the dtype it has.

    Raises:
        ValueError: the folder holds something.
        OSError: it cannot be written; nothing is left behind.
    """
    weights: dict[str, Tensor] = {}
    for key, weight in policy.state_dict().items():
        names = _published_names(key)
        weights.update(zip(names, weight.chunk(len(names)), strict=True))
    write_folder(folder, weights, {"format": POLICY_FORMAT, "config": asdict(policy.config)})


def save_tokenizer(tokenizer: VQTokenizer, folder: str | Path) -> None:
    """Write a tokenizer to a new or empty folder, whole or not at all, in the dtype it has.

    Raises:
        ValueError: the folder holds something.
        OSError: it cannot be written; nothing is left behind.
    """
    config = {"format": _TOKENIZER_FORMAT, "config": asdict(tokenizer.config)}
    write_folder(folder, tokenizer.state_dict(), config)


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


def _published_names(key: str) -> tuple[str, ...]:
    """The published parameters that are the row blocks of one of ours, in order."""
    stem = key.removesuffix("feed_forward.w13")
    if stem == key:
        return (key,)
    return (f"{stem}feed_forward.w1.weight", f"{stem}feed_forward.w3.weight")


def _fill(
    module: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a module of the meta device its weights, and forget the checkpoint's one by one.

    So a model is never held twice: most files are mapped, and the weights of one that could not be
    are let go as they are copied.
    """
    path, weights = checkpoint.path, checkpoint.weights
    blank = module.state_dict()
    _check_keys(path, weights, [name for key in blank for name in _published_names(key)])
    filled: dict[str, Tensor] = {}
    for key, parameter in blank.items():
        names = _published_names(key)
        weight = torch.empty(parameter.shape, device=device, dtype=dtype)
        for name, rows in zip(names, weight.chunk(len(names)), strict=True):
            _copy(path, name, weights.pop(name), rows)
        filled[key] = weight
    module.load_state_dict(filled, strict=True, assign=True)


def _check_keys(path: Path, found: Mapping[str, Tensor], expected: list[str]) -> None:
    unknown = found.keys() - set(expected)
    missing = set(expected) - found.keys()
    if unknown:
        raise ValueError(f"{path}: expected known keys only, got {first_keys(unknown)}")
    if missing:
        raise ValueError(f"{path}: expected {first_keys(missing)}, got no such key")


def _copy(path: Path, name: str, source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:
        raise ValueError(f"{path}: {name}: expected {list(target.shape)}, got {list(source.shape)}")
    if not source.is_floating_point():
        raise ValueError(f"{path}: {name}: expected floating point, got {source.dtype}")
    target.copy_(source)
