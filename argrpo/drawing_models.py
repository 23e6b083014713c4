"""The policy and the tokenizer of a command that draws and does not train."""

import torch

from argrpo.devices import DTYPES
from argrpo.drawing_config import DrawingConfig
from argrpo.model_paths import blamed_on, resolve_path
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.loading import load_policy, load_tokenizer
from argrpo.models.pairing import check_pair
from argrpo.models.vq import VQTokenizer


def load_models(
    config: DrawingConfig, path: str, device: torch.device, *, setting: str
) -> tuple[ImagePolicy, VQTokenizer]:
    """A policy and the tokenizer, which fit each other.

    Args:
        config: sizes and dtypes.
        path: the policy's.
        device: where they run.
        setting: which one the path comes from, for messages.

    Raises:
        ValueError, FileNotFoundError: a model that cannot be read or does not fit.
    """
    with blamed_on(setting):
        policy = load_policy(
            resolve_path(path, config.cache_dir),
            image_size=config.image_size,
            num_heads=config.num_heads,
            downsample=config.downsample,
            text_padding=config.text_padding,
            device=device,
            dtype=DTYPES[config.dtype],
        )
    with blamed_on("tokenizer"):
        tokenizer_path = resolve_path(config.tokenizer, config.cache_dir)
        tokenizer = load_tokenizer(tokenizer_path, device=device, dtype=DTYPES[config.dtype])
    check_pair(policy, tokenizer)
    return policy, tokenizer
