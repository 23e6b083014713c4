"""The prompts of a run as its policy reads them, made before the policy comes into memory."""

from dataclasses import replace
from pathlib import Path

import torch

from argrpo.data import PromptSet, load_prompts
from argrpo.data_config import DataConfig
from argrpo.encoded_texts import EncodedTexts, TextLayout
from argrpo.model_paths import named_within, resolve_path
from argrpo.progress import Report, unreported
from argrpo.text_config import TextEncoderConfig

_FOLDER = "texts"  # of the cache


def load_run_prompts(
    config: DataConfig,
    layout: TextLayout | None,
    *,
    device: torch.device,
    cache_dir: str | None,
    report: Report = unreported,
) -> PromptSet:
    """Prompts, and their features if the policy reads texts.

    Args:
        config: which prompts, and which encoder.
        layout: what the policy wants, see `argrpo.models.text_layout.text_layout`; None for one
            that reads labels.
        device: where an encoder computes, should a text not be in the cache.
        cache_dir: holds the cache, and the embedded models; None: argrpo under the user's cache.
        report: told ("texts", encoded so far, in all) while any are.

    Raises:
        ValueError: prompts, or an encoder, that do not fit, named as a setting under data.
        FileNotFoundError: a file is missing.
        StorageError: the disk is full or refused.
    """
    if config.prompts is not None:
        config = replace(config, prompts=str(resolve_path(config.prompts, cache_dir)))
    prompts = load_prompts(config)
    if layout is None or prompts.texts is not None:
        return prompts
    with named_within("data"):
        encoded = encode_texts(
            [prompt.text for prompt in prompts.prompts],
            config.text_encoder,
            layout,
            device=device,
            cache_dir=cache_dir,
            report=report,
        )
    return PromptSet(prompts.prompts, encoded)


def encode_texts(
    texts: list[str],
    config: TextEncoderConfig,
    layout: TextLayout,
    *,
    device: torch.device,
    cache_dir: str | None,
    report: Report = unreported,
) -> EncodedTexts:
    """`argrpo.prompt_encoding.encode_prompts` by settings: paths may be digits:NAME, and the cache
    is where the user keeps it."""
    # transformers takes seconds to import, which runs on class labels need not wait for.
    from argrpo.digits.assets import default_cache_dir
    from argrpo.prompt_encoding import encode_prompts

    path = None if config.path is None else str(resolve_path(config.path, cache_dir))
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    return encode_prompts(
        texts,
        replace(config, path=path),
        layout,
        device=device,
        cache_dir=root / _FOLDER,
        report=report,
    )
