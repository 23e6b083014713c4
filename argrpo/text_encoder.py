"""T5 encoders: texts to features, one text a tensor of the positions that count.

Shapes: S positions of a text, C features.

Source: Raffel et al., arXiv:1910.10683; how FoundationVision/LlamaGen at ce98ec4 calls it in
language/t5.py: the end token is kept, and what is too long is cut before it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel
from transformers.utils import logging as transformers_logging

from argrpo.encoded_texts import EncodedText

_MODEL_TYPE = "t5"
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer.json", "spiece.model")
# Of a file of weights that much is hashed: sixteen blocks from its first to its last byte. Weights
# that were trained further differ everywhere, and flan-t5-xl has 11 GB.
_BLOCKS, _BLOCK_BYTES = 16, 65_536


class TextEncoder:
    """A frozen T5 encoder with its tokenizer. Made by `load_text_encoder`."""

    def __init__(self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model
        self._tokenizer = tokenizer

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, the end token included, before anything is cut."""
        return [len(ids) for ids in self._tokenizer(list(texts), verbose=False)["input_ids"]]

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], max_len: int, *, with_end: bool = False
    ) -> list[EncodedText]:
        """Encode some texts as one batch.

        Args:
            texts: cleaned already.
            max_len: positions of a text; longer ones are cut, their end token is kept.
            with_end: pad to max_len and keep what the encoder says of the last position, too.

        Returns:
            One record a text, on the CPU, in the dtype of the weights.
        """
        whole = self._tokenizer(list(texts), verbose=False)["input_ids"]
        cut = self._tokenizer(list(texts), truncation=True, max_length=max_len)["input_ids"]
        padded_len = max_len if with_end else max(map(len, cut))
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (padded_len - len(row)) for row in cut])
        lengths = torch.tensor([len(row) for row in cut])
        mask = torch.arange(padded_len) < lengths[:, None]
        device = self._model.device
        states = self._model(
            input_ids=ids.to(device), attention_mask=mask.long().to(device)
        ).last_hidden_state.cpu()
        return [
            EncodedText(
                features=states[row, :length].clone(),
                end=states[row, max(length, padded_len - 1) :][: int(with_end)].clone(),
                is_cut=len(whole[row]) > length,
            )
            for row, length in enumerate(lengths.tolist())
        ]


def find_encoder(path: str) -> Path:
    """The local folder of an encoder; a hub id is fetched once if the hub's cache lacks it.

    Raises:
        ValueError: neither a folder with a T5 nor a hub id that can be had.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = _fetched(path)
    config = _config(folder, path)
    if config.get("model_type") != _MODEL_TYPE or not isinstance(config.get("d_model"), int):
        raise ValueError(
            f"{path}: expected a T5 (model_type {_MODEL_TYPE} in config.json), got "
            f"{config.get('model_type')!r}"
        )
    return folder


def encoder_width(folder: Path) -> int:
    """Features of a position, as config.json says."""
    width = _config(folder, str(folder))["d_model"]
    assert isinstance(width, int)  # `find_encoder` has looked
    return width


def fingerprint(folder: Path) -> str:
    """16 hex digits that change with the encoder's config, tokenizer or weights, not its place."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.model"), *_weight_files(folder)]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if file.suffix in (".json", ".model"):
                digest.update(stream.read())
                continue
            for block in range(_BLOCKS):
                stream.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def load_text_encoder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """Read an encoder and its tokenizer.

    Args:
        folder: of `find_encoder`.
        device: where it computes.
        dtype: what its weights become.

    Raises:
        ValueError: weights or tokenizer are missing or damaged, or not of one model; named.
    """
    with quietly():
        tokenizer, model = _tokenizer(folder), _model(folder, dtype)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{folder}: expected a tokenizer of at most {model.config.vocab_size} tokens, as the "
            f"weights have, got {len(tokenizer)}"
        )
    return TextEncoder(model.requires_grad_(False).eval().to(device), tokenizer)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    # Where none is there, the library makes one that knows no word.
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ValueError(f"{folder}: expected {' or '.join(_TOKENIZERS)}, got neither")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    # What a missing sentencepiece, a missing file and a damaged one raise.
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder}: expected a tokenizer, got one that cannot be read ({_short(error)}); "
            "spiece.model needs pip install 'argrpo[text]'"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{folder}: expected a tokenizer with a pad token, got none")
    return tokenizer


def _model(folder: Path, dtype: torch.dtype) -> T5EncoderModel:
    try:
        # A pair where the record is asked for, which the library's types do not say.
        read: Any = T5EncoderModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{folder}: expected the weights of a T5, got none that can be read ({_short(error)})"
        ) from error
    model: T5EncoderModel = read[0]
    record = read[1]
    # Left alone they would be random numbers.
    absent = {*record["missing_keys"], *(name for name, *_ in record["mismatched_keys"])}
    if absent:
        raise ValueError(f"{folder}: expected all weights of a T5, got no {sorted(absent)[0]}")
    return model


@contextmanager
def quietly() -> Iterator[None]:
    """transformers without its bars, and without its report of a decoder's weights, unread here."""
    level = transformers_logging.get_verbosity()
    has_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bar:
            transformers_logging.enable_progress_bar()


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from argrpo.hub_reach import HubOutOfReachError, hub_within_reach

    described = ["*.json", "*.model"]
    try:
        # One format of weights, the safe one where there is one.
        with hub_within_reach():
            for weights in _WEIGHTS:
                folder = Path(snapshot_download(name, allow_patterns=[*described, weights]))
                if _weight_files(folder):
                    break
    except HubOutOfReachError as error:
        raise ValueError(
            f"{name}: expected the folder of a T5, or a hub id that is cached or can be fetched, "
            f"got neither ({error} does not answer)"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{name}: expected the folder of a T5 or a hub id that can be fetched, got neither "
            f"({_short(error)})"
        ) from error
    return folder


def _weight_files(folder: Path) -> list[Path]:
    return [file for pattern in _WEIGHTS for file in folder.glob(pattern)]


def _config(folder: Path, path: str) -> dict[str, object]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a folder with the config.json of a T5, got none that can be read"
        ) from error
    return config if isinstance(config, dict) else {}


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
