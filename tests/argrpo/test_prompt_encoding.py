"""Prompts to features: padded as the published codes do it, computed once, kept on disk."""

import logging
import multiprocessing
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5EncoderModel

from argrpo import prompt_encoding
from argrpo.encoded_texts import EncodedTexts, TextLayout
from argrpo.prompt_encoding import encode_prompts
from argrpo.run_folder import StorageError
from argrpo.text_config import TextEncoderConfig
from argrpo.text_encoder import load_text_encoder

CPU = torch.device("cpu")
LEFT = TextLayout(8, 64, "left")
RIGHT = TextLayout(8, 64, "right")
PROMPTS = ["A Seven", "a small, tilted zero", "a zero", "A  seven!"]


@pytest.fixture
def config(tiny_t5: Path) -> TextEncoderConfig:
    return TextEncoderConfig(path=str(tiny_t5), dtype="float32", batch=2)


def encoded(config: TextEncoderConfig, cache_dir: Path, layout: TextLayout = LEFT) -> EncodedTexts:
    return encode_prompts(PROMPTS, config, layout, device=CPU, cache_dir=cache_dir)


@torch.no_grad()
def published(folder: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded features [P, 8, 64] and mask [P, 8] straight from the library."""
    tokens = AutoTokenizer.from_pretrained(folder)(
        texts, max_length=8, padding="max_length", truncation=True, return_tensors="pt"
    )
    model = T5EncoderModel.from_pretrained(folder).eval()
    states = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    return states.last_hidden_state, tokens.attention_mask


def test_left_padding_is_llamagens(
    config: TextEncoderConfig, tiny_t5: Path, tmp_path: Path
) -> None:
    features, mask = published(tiny_t5, ["a seven", "a small, tilted zero", "a zero", "a seven!"])
    moved = torch.zeros_like(features)
    for row, count in enumerate(mask.sum(dim=1).tolist()):
        moved[row, 8 - count :] = features[row, :count]
    conditions = encoded(config, tmp_path).conditions(torch.arange(4))
    # Less padding in a batch sums in another order: a few ulp of features of size 1.
    torch.testing.assert_close(conditions.features[conditions.rows], moved, rtol=0, atol=2e-5)
    assert torch.equal(conditions.mask[conditions.rows], mask.flip(1))


def test_right_padding_reads_the_last_position_as_ar_grpo_does(
    config: TextEncoderConfig, tiny_t5: Path, tmp_path: Path
) -> None:
    features, mask = published(tiny_t5, ["a seven", "a small, tilted zero", "a zero", "a seven!"])
    conditions = encoded(config, tmp_path, RIGHT).conditions(torch.arange(4))
    got = conditions.features[conditions.rows]
    assert torch.equal(conditions.mask[conditions.rows], mask)
    torch.testing.assert_close(got[:, -1], features[:, -1], rtol=0, atol=2e-5)
    valid = mask.bool()
    torch.testing.assert_close(got[valid], features[valid], rtol=0, atol=2e-5)
    assert not torch.equal(got[0, -1], torch.zeros(64)), "this row is padded there"


def test_prompts_that_clean_to_one_text_share_its_features(
    config: TextEncoderConfig, tmp_path: Path
) -> None:
    texts = encode_prompts(
        ["A seven", "a zero", " a SEVEN"], config, LEFT, device=CPU, cache_dir=tmp_path
    )
    assert len(texts.texts) == 2
    conditions = texts.conditions(torch.tensor([2, 2, 1, 0]))
    assert len(conditions.features) == 2
    assert conditions.rows[0] == conditions.rows[1] == conditions.rows[3] != conditions.rows[2]


def test_the_probe_is_the_longest_prompts(config: TextEncoderConfig, tmp_path: Path) -> None:
    probe = encoded(config, tmp_path).probe()
    assert sorted(probe.mask[probe.rows].sum(dim=1).tolist()) == [4, 6]


def test_nothing_is_encoded_twice(
    config: TextEncoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encoded(config, tmp_path).conditions(torch.arange(4))
    monkeypatch.setattr(prompt_encoding, "load_text_encoder", None)  # calling it would raise
    again = encoded(config, tmp_path).conditions(torch.arange(4))
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.mask, again.mask)


def test_only_what_is_new_is_encoded(config: TextEncoderConfig, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    encoded(config, tmp_path)
    encode_prompts(
        [*PROMPTS, "a new one", "and another"],
        config,
        LEFT,
        device=CPU,
        cache_dir=tmp_path,
        report=lambda *words: told.append(words),
    )
    assert told == [("texts", 0, 2), ("texts", 2, 2)]


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"cleaning": "none"}])
def test_other_settings_give_other_features(
    config: TextEncoderConfig, tmp_path: Path, change: dict[str, str]
) -> None:
    first = encoded(config, tmp_path).conditions(torch.arange(4))
    other = encoded(replace(config, **change), tmp_path).conditions(torch.arange(4))
    assert first.features.dtype != other.features.dtype or not torch.equal(
        first.features[first.rows], other.features[other.rows]
    )


def test_another_padding_and_another_length_are_kept_apart(
    config: TextEncoderConfig, tmp_path: Path
) -> None:
    for layout in (LEFT, RIGHT, TextLayout(4, 64, "left")):
        texts = encoded(config, tmp_path, layout)
        assert texts.conditions(torch.arange(4)).features.shape[1] == layout.prefix_len
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


def test_a_shard_holds_rows_without_padding(config: TextEncoderConfig, tmp_path: Path) -> None:
    encoded(config, tmp_path)
    (shard,) = tmp_path.glob("*/*.safetensors")
    tensors = load_file(shard)
    assert tensors["lengths"].tolist() == [3, 3, 4, 6], "shortest first"
    assert tensors["features"].shape == (16, 64)


def test_prompts_that_are_cut_are_counted_in_one_line(
    config: TextEncoderConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = ["a zero", "one two three four five six seven eight", "x " * 9_000, "x " * 9_000]
    expected = ["3 of 4 prompts are longer than the 8 positions of the policy's prefix and are cut"]
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            texts = encode_prompts(prompts, config, LEFT, device=CPU, cache_dir=tmp_path)
        assert [record.getMessage() for record in caplog.records] == expected
    conditions = texts.conditions(torch.arange(4))
    assert conditions.mask[conditions.rows].sum(dim=1).tolist() == [3, 8, 8, 8]


def test_prompts_that_nothing_is_left_of_are_counted(
    config: TextEncoderConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        texts = encode_prompts(["猫", "a zero"], config, LEFT, device=CPU, cache_dir=tmp_path)
    assert "1 of 2 prompts are empty once cleaned" in caplog.text
    conditions = texts.conditions(torch.arange(2))
    assert conditions.mask[conditions.rows].sum(dim=1).tolist() == [1, 3]


def test_an_encoder_of_another_width_is_refused_before_it_is_loaded(
    config: TextEncoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_encoding, "load_text_encoder", None)
    message = r"text_encoder\.path: expected features of width 2048, .* got 64 from"
    with pytest.raises(ValueError, match=message):
        encoded(config, tmp_path, TextLayout(120, 2048, "left"))
    with pytest.raises(ValueError, match=r"text_encoder\.path: expected the encoder that the pol"):
        encoded(TextEncoderConfig(), tmp_path)


def test_the_encoder_is_gone_when_the_features_are_there(
    config: TextEncoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[torch.nn.Module]] = []

    def watched(*args: object, **options: object) -> object:
        encoder = load_text_encoder(*args, **options)
        models.append(weakref.ref(encoder._model))
        return encoder

    monkeypatch.setattr(prompt_encoding, "load_text_encoder", watched)
    texts = encoded(config, tmp_path)
    assert len(models) == 1
    assert models[0]() is None
    assert len(texts.texts) == 4


def test_an_encoder_at_hand_is_used_and_kept(
    config: TextEncoderConfig, tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_hand = load_text_encoder(tiny_t5, device=CPU, dtype=torch.float32)
    monkeypatch.setattr(prompt_encoding, "load_text_encoder", None)
    texts = encode_prompts(PROMPTS, config, LEFT, device=CPU, cache_dir=tmp_path, encoder=at_hand)
    assert len(texts.texts) == 4
    assert at_hand.token_counts(["a zero"]) == [3]


def _encode_in_a_process(config: TextEncoderConfig, folder: Path, barrier: object) -> None:
    barrier.wait()
    texts = [f"a zero and {number} sevens" for number in range(30)]
    encode_prompts(texts, config, LEFT, device=CPU, cache_dir=folder)


def test_processes_that_ask_at_once_leave_one_shard(
    config: TextEncoderConfig, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [
        context.Process(target=_encode_in_a_process, args=(config, tmp_path, barrier))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (shard,) = tmp_path.glob("*/*.safetensors")
    assert len(load_file(shard)["lengths"]) == 30


def test_a_damaged_shard_is_named(config: TextEncoderConfig, tmp_path: Path) -> None:
    encoded(config, tmp_path)
    (shard,) = tmp_path.glob("*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"text_encoder: .*safetensors: expected a whole shard"):
        encoded(config, tmp_path)
    shard.unlink()
    assert len(encoded(config, tmp_path).texts) == 4


def test_a_full_disk_leaves_no_shard(
    config: TextEncoderConfig, tmp_path: Path, files_up_to
) -> None:
    with files_up_to(1024), pytest.raises(StorageError, match="expected room for a file"):
        encoded(config, tmp_path)
    assert list(tmp_path.glob("*/*.safetensors")) == []
    assert [path.name for path in tmp_path.glob("*/*")] in ([".lock"], [])
