"""T5 encoders from a folder: what they make of texts, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel

from argrpo.digits.text_encoder import DigitsTextEncoderConfig, save_text_encoder
from argrpo.text_encoder import (
    TextEncoder,
    encoder_width,
    find_encoder,
    fingerprint,
    load_text_encoder,
)

CPU = torch.device("cpu")
TEXTS = ["a seven", "a small handwritten zero , tilted", "", "unheard words of a seven seven seven"]


@pytest.fixture(scope="module")
def encoder(tiny_t5: Path) -> TextEncoder:
    return load_text_encoder(tiny_t5, device=CPU, dtype=torch.float32)


@pytest.fixture
def changed(tiny_t5: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the encoder, and the name of a file of it to change."""
    return lambda name: Path(shutil.copytree(tiny_t5, tmp_path / name))


@torch.no_grad()
def as_published(folder: Path, texts: list[str], max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [P, L, C] and mask [P, L] as T5Embedder makes them: padded to max_len."""
    tokens = AutoTokenizer.from_pretrained(folder)(
        texts, max_length=max_len, padding="max_length", truncation=True, return_tensors="pt"
    )
    model = T5EncoderModel.from_pretrained(folder).eval()
    states = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    return states.last_hidden_state, tokens.attention_mask


@pytest.mark.parametrize("with_end", [False, True])
def test_features_are_those_of_the_library(
    encoder: TextEncoder, tiny_t5: Path, with_end: bool
) -> None:
    expected, mask = as_published(tiny_t5, TEXTS, 8)
    encoded = encoder.encode(TEXTS, 8, with_end=with_end)
    for row, text in enumerate(encoded):
        length = int(mask[row].sum())
        assert text.features.shape == (length, 64)
        # Less padding sums in another order: a few ulp of features of size 1.
        torch.testing.assert_close(text.features, expected[row, :length], rtol=0, atol=2e-5)
        assert len(text.end) == int(with_end and length < 8)
        if len(text.end):
            torch.testing.assert_close(text.end[0], expected[row, -1], rtol=0, atol=2e-5)
    assert [text.is_cut for text in encoded] == [False, False, False, False]


def test_a_long_text_is_cut_before_its_end_token(encoder: TextEncoder, tiny_t5: Path) -> None:
    assert encoder.token_counts(TEXTS) == [3, 7, 1, 8]
    expected, mask = as_published(tiny_t5, TEXTS, 5)
    encoded = encoder.encode(TEXTS, 5)
    assert [text.is_cut for text in encoded] == [False, True, False, True]
    assert mask.sum(dim=1).tolist() == [len(text.features) for text in encoded]
    torch.testing.assert_close(encoded[1].features, expected[1], rtol=0, atol=2e-5)


def test_nothing_of_an_encoder_can_be_trained(encoder: TextEncoder) -> None:
    assert not any(text.features.requires_grad for text in encoder.encode(TEXTS, 8))


def test_a_tokenizer_of_sentencepiece_reads_as_t5s_do(tmp_path: Path) -> None:
    """The published folders of T5 hold spiece.model, and some nothing else."""
    folder = tmp_path / "spiece"
    save_text_encoder(DigitsTextEncoderConfig(), [f"word{row}" for row in range(140)], folder)
    (tmp_path / "corpus.txt").write_text("a handwritten seven, tilted, or a small zero\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=30,
        model_type="unigram",
        hard_vocab_limit=False,
        # T5's: padding, end, unknown, and no start.
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    encoder = load_text_encoder(folder, device=CPU, dtype=torch.float32)
    processor = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))
    text = "a seven, tilted"
    assert encoder.token_counts([text]) == [len(processor.encode(text)) + 1]
    assert len(encoder.encode([text], 120)[0].features) == len(processor.encode(text)) + 1


def test_a_folder_that_is_no_t5_is_refused(changed: Callable[[str], Path]) -> None:
    folder = changed("other")
    assert encoder_width(find_encoder(str(folder))) == 64
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match=r"expected a T5 \(model_type t5 in config.json\), got 'b"):
        find_encoder(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"expected a folder with the config\.json of a T5"):
        find_encoder(str(folder))


def test_a_name_that_is_nowhere_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="no/such-t5: expected the folder of a T5"):
        find_encoder("no/such-t5")
    with pytest.raises(ValueError, match="expected the folder of a T5 or a hub id"):
        find_encoder("/not/there/at/all")


def test_weights_that_are_not_all_there_are_never_made_up(changed: Callable[[str], Path]) -> None:
    folder = changed("partial")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"all weights of a T5, got no encoder\.block\.1\."):
        load_text_encoder(folder, device=CPU, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="expected the weights of a T5, got none that can be read"):
        load_text_encoder(folder, device=CPU, dtype=torch.float32)


def test_a_folder_without_a_tokenizer_is_refused(changed: Callable[[str], Path]) -> None:
    folder = changed("mute")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"expected tokenizer\.json or spiece\.model, got neither"):
        load_text_encoder(folder, device=CPU, dtype=torch.float32)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected a tokenizer, got one .* 'argrpo\[text\]'"):
        load_text_encoder(folder, device=CPU, dtype=torch.float32)


def test_a_tokenizer_of_another_model_is_refused(
    changed: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = changed("mixed")
    words = [f"word{row}" for row in range(40)]
    save_text_encoder(DigitsTextEncoderConfig(), words, tmp_path / "b")
    shutil.copy(tmp_path / "b" / "tokenizer.json", folder)
    with pytest.raises(ValueError, match=r"expected a tokenizer of at most 11 tokens, .* got 43"):
        load_text_encoder(folder, device=CPU, dtype=torch.float32)


def test_the_fingerprint_goes_by_what_is_in_the_folder(
    tiny_t5: Path, changed: Callable[[str], Path]
) -> None:
    same = changed("same")
    assert fingerprint(same) == fingerprint(tiny_t5)
    weights = load_file(same / "model.safetensors")
    weights["shared.weight"][3, 5] += 1
    save_file(weights, same / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(same) != fingerprint(tiny_t5)
    other = changed("other")
    (other / "tokenizer_config.json").write_text("{}")
    assert fingerprint(other) != fingerprint(tiny_t5)
