"""Prompts to features: from the cache on disk, or from an encoder that is gone afterwards.

prompts -> cleaned -> cache, or T5 and then the cache -> rows of features
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from argrpo.devices import DTYPES, free_memory
from argrpo.encoded_texts import EncodedText, EncodedTexts, TextLayout
from argrpo.model_paths import blamed_on
from argrpo.progress import Report, unreported
from argrpo.text_cache import TextCache
from argrpo.text_cleaning import MAX_CHARACTERS, clean
from argrpo.text_config import TextEncoderConfig
from argrpo.text_encoder import (
    TextEncoder,
    encoder_width,
    find_encoder,
    fingerprint,
    load_text_encoder,
)

_LOG = logging.getLogger(__name__)

# Of a file: 50 MB of captions by flan-t5-xl, and what is lost when an encoding is killed.
_SHARD_TEXTS = 1024


def encode_prompts(
    prompts: Sequence[str],
    config: TextEncoderConfig,
    layout: TextLayout,
    *,
    device: torch.device,
    cache_dir: Path,
    report: Report = unreported,
    encoder: TextEncoder | None = None,
) -> EncodedTexts:
    """The features of prompts.

    The encoder is loaded only where a text is missing in the cache, and its memory is free again
    when this returns.

    Args:
        prompts: as people write them; at least one.
        config: which encoder, by a folder or a hub id, and how it reads.
        layout: what the policy wants, see `argrpo.models.text_layout.text_layout`.
        device: where the encoder computes; the features stay on the CPU.
        cache_dir: where encoded texts are kept.
        report: told ("texts", encoded so far, in all) while any are.
        encoder: that of the config, at hand already; it is used and kept.

    Raises:
        ValueError: there is no such encoder, or its features have another width than the policy
            reads.
        StorageError: the disk is full or refused.
    """
    folder = _matching_encoder(config, layout)
    cleaned = [clean(prompt, config.cleaning) for prompt in prompts]
    # In their order; that of a set would make other shards every time.
    distinct = list(dict.fromkeys(cleaned))
    cache = TextCache(cache_dir, _settings(folder, config, layout))
    found = cache.find(distinct)
    if len(found) < len(distinct):
        with cache.writing():
            # Whoever held the lock before may have encoded some.
            found = cache.find(distinct)
            missing = [text for text in distinct if text not in found]
            if missing:
                # No name for what is loaded, so that nothing holds it after the call.
                _encode(
                    missing,
                    encoder or _loaded(folder, device, config),
                    _Work(cache, config.batch, layout),
                    report,
                )
                free_memory(device)
                found = cache.find(distinct)
    place = {text: row for row, text in enumerate(distinct)}
    index = torch.tensor([place[text] for text in cleaned])
    encoded = EncodedTexts([found[text] for text in distinct], index, layout)
    _warn(prompts, cleaned, encoded)
    return encoded


class _Work(NamedTuple):
    """Where encoded texts go, how many at a time, and their form."""

    cache: TextCache
    batch: int
    layout: TextLayout


def _matching_encoder(config: TextEncoderConfig, layout: TextLayout) -> Path:
    """The folder of the encoder, whose features have the width that the policy reads."""
    if config.path is None:
        raise ValueError(
            "text_encoder.path: expected the encoder that the policy was trained with, as "
            "google/flan-t5-xl, got none"
        )
    with blamed_on("text_encoder.path"):
        folder = find_encoder(config.path)
    width = encoder_width(folder)
    if width != layout.width:
        raise ValueError(
            f"text_encoder.path: expected features of width {layout.width}, as the policy reads, "
            f"got {width} from {config.path}"
        )
    return folder


def _loaded(folder: Path, device: torch.device, config: TextEncoderConfig) -> TextEncoder:
    with blamed_on("text_encoder.path"):
        return load_text_encoder(folder, device=device, dtype=DTYPES[config.dtype])


def _settings(folder: Path, config: TextEncoderConfig, layout: TextLayout) -> dict[str, object]:
    """All that shapes the features of a cleaned text."""
    return {
        "encoder": fingerprint(folder),
        "dtype": config.dtype,
        "max_len": layout.prefix_len,
        "with_end": layout.reads_padded_end,
    }


def _encode(texts: list[str], encoder: TextEncoder, work: _Work, report: Report) -> None:
    """Encode texts of like length together, so that little is padded, and write them."""
    counts = encoder.token_counts(texts)
    ordered = [texts[row] for row in sorted(range(len(texts)), key=counts.__getitem__)]
    report("texts", 0, len(texts))
    for start in range(0, len(ordered), _SHARD_TEXTS):
        shard = ordered[start : start + _SHARD_TEXTS]
        encoded: list[EncodedText] = []
        for first in range(0, len(shard), work.batch):
            encoded += encoder.encode(
                shard[first : first + work.batch],
                work.layout.prefix_len,
                with_end=work.layout.reads_padded_end,
            )
            report("texts", start + len(encoded), len(texts))
        work.cache.add(shard, encoded)


def _warn(prompts: Sequence[str], cleaned: list[str], encoded: EncodedTexts) -> None:
    """One line about the prompts that are cut, and one about those of which nothing is left."""
    is_cut = torch.tensor([text.is_cut for text in encoded.texts])[encoded.index]
    is_cut |= torch.tensor([len(prompt) > MAX_CHARACTERS for prompt in prompts])
    if num_cut := int(is_cut.sum()):
        _LOG.warning(
            "%d of %d prompts are longer than the %d positions of the policy's prefix and are cut",
            num_cut,
            len(prompts),
            encoded.layout.prefix_len,
        )
    if num_empty := sum(not text.strip() for text in cleaned):
        _LOG.warning(
            "%d of %d prompts are empty once cleaned; the policy reads their end token alone",
            num_empty,
            len(prompts),
        )
