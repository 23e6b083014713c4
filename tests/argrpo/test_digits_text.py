"""The digits task with captions: its encoder, its policy, and the cache entry that holds them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from argrpo.digits import text_assets, text_policy
from argrpo.digits.captions import CAPTIONS, captioned
from argrpo.digits.dataset import DigitSet, load_split
from argrpo.digits.judges import DigitJudge
from argrpo.digits.text_assets import TextDigitsAssets, TextDigitsRecipe, text_digits_assets
from argrpo.digits.text_encoder import DigitsTextEncoderConfig
from argrpo.digits.text_evaluation import evaluate_captions
from argrpo.digits.text_policy import PREFIX_LEN, WIDTH, TextPolicyConfig, train_text_policy
from argrpo.digits.tokenizer import DigitTokenizerConfig, train_tokenizer
from argrpo.digits.training import FitConfig
from argrpo.encoded_texts import EncodedText, EncodedTexts, TextLayout
from argrpo.model_paths import names_text_digits, resolve_path
from argrpo.models.loading import load_policy, save_tokenizer
from argrpo.models.text_layout import text_layout
from argrpo.models.vq import VQTokenizer

SHORT = FitConfig(steps=2, batch_size=4, seed=6)
TINY = TextDigitsRecipe(policy=TextPolicyConfig(fit=SHORT, num_views=1))


@pytest.fixture(scope="module", autouse=True)
def _fewer_digits() -> Iterator[None]:
    """Sixty pictures of the policy split: all of them are seconds in the tokenizer."""
    whole = load_split("policy")
    fewer = DigitSet(whole.images[:60], whole.labels[:60])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_policy, "load_split", lambda name: fewer)
        yield


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    return train_tokenizer(DigitTokenizerConfig(fit=replace(SHORT, steps=1)))


@pytest.fixture(scope="module")
def cache_dir(tokenizer: VQTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache whose tokenizer hardly trained."""
    folder = tmp_path_factory.mktemp("text")
    save_tokenizer(tokenizer, folder / "tokenizer")

    class Digits:
        tokenizer_path = folder / "tokenizer"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_assets, "digits_assets", lambda *_: Digits)
        yield folder / "cache"


@pytest.fixture(scope="module")
def built(cache_dir: Path) -> TextDigitsAssets:
    """The entry of a policy that hardly trained either."""
    return text_digits_assets(cache_dir, recipe=TINY)


def features() -> EncodedTexts:
    """Random features of each caption."""
    generator = torch.Generator().manual_seed(0)
    texts = [
        EncodedText(torch.randn(6, WIDTH, generator=generator), torch.empty(0, WIDTH), False)
        for _ in CAPTIONS
    ]
    layout = TextLayout(PREFIX_LEN, WIDTH, "left")
    return EncodedTexts(texts, torch.arange(len(CAPTIONS)), layout)


def test_policy_encoder_and_captions_belong_together(
    built: TextDigitsAssets,
) -> None:
    assert text_layout(built.policy_path) == TextLayout(PREFIX_LEN, WIDTH, "left")
    assert load_policy(built.policy_path).config == TextPolicyConfig().model
    rows = [json.loads(line) for line in built.captions_path.read_text().splitlines()]
    assert [row["text"] for row in rows] == [caption.text for caption in CAPTIONS]
    assert [row["class_id"] for row in rows] == [caption.digit for caption in CAPTIONS]
    assert json.loads((built.encoder_path / "config.json").read_text())["d_model"] == WIDTH


def test_the_second_call_makes_nothing(
    built: TextDigitsAssets, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_assets, "_make", None)  # calling it would raise
    assert text_digits_assets(cache_dir, recipe=TINY) == built


def test_the_key_follows_every_part_of_the_recipe() -> None:
    recipe = TextDigitsRecipe()
    others = [
        replace(recipe, encoder=DigitsTextEncoderConfig(width=64, seed=9)),
        replace(recipe, policy=replace(recipe.policy, text_dropout=0.2)),
        replace(
            recipe,
            digits=replace(recipe.digits, tokenizer=DigitTokenizerConfig(commitment=0.5)),
        ),
    ]
    assert recipe.key == TextDigitsRecipe().key
    assert len({recipe.key, *(other.key for other in others)}) == 4


def test_the_policy_learns_captions_and_the_null_text(tokenizer: VQTokenizer) -> None:
    told: list[int] = []
    config = TextPolicyConfig(fit=replace(SHORT, steps=3, batch_size=16), num_views=1)
    untrained = train_text_policy(
        replace(config, fit=replace(config.fit, steps=0)), tokenizer, features()
    )
    policy = train_text_policy(
        replace(config, text_dropout=0.5), tokenizer, features(), lambda *words: told.append(1)
    )
    assert len(told) == 3
    for name in ("cls_embedding.uncond_embedding", "cls_embedding.cap_proj.fc1.weight"):
        assert not torch.equal(policy.state_dict()[name], untrained.state_dict()[name]), name
    again = train_text_policy(replace(config, text_dropout=0.5), tokenizer, features())
    assert torch.equal(policy.head_weight, again.head_weight), "the same every time"


def test_without_dropout_the_null_text_learns_nothing(tokenizer: VQTokenizer) -> None:
    config = TextPolicyConfig(fit=replace(SHORT, steps=0), num_views=1, text_dropout=0.0)
    untrained = train_text_policy(config, tokenizer, features())
    policy = train_text_policy(
        replace(config, fit=replace(SHORT, weight_decay=0.0)), tokenizer, features()
    )
    name = "cls_embedding.uncond_embedding"
    assert torch.equal(policy.state_dict()[name], untrained.state_dict()[name])


def test_real_digits_as_drawn_have_true_captions() -> None:
    references = load_split("evaluation")
    made = captioned(references, torch.Generator().manual_seed(3))
    captions = [CAPTIONS[row].text for row in made.captions.tolist()]
    scores = evaluate_captions(made.images, captions, DigitJudge(), references)
    assert scores.place == scores.tilt == 1.0
    assert scores.all_true == scores.accuracy < 0.5, "the judge has learned nothing"
    wrong = evaluate_captions(made.images, captions[1:] + captions[:1], DigitJudge(), references)
    assert wrong.place < 0.6
    assert wrong.tilt < 0.6


def test_names_of_the_task_are_paths_everywhere(
    built: TextDigitsAssets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_assets, "text_digits_assets", lambda *_: built)
    assert resolve_path("digits:captions", str(tmp_path)) == built.captions_path
    assert resolve_path("digits:text_encoder", str(tmp_path)) == built.encoder_path
    assert names_text_digits("path='digits:text_policy'")
    assert not names_text_digits("path='digits:policy', other='text_policy'")
