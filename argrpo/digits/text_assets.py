"""What the digits task with captions has beside the models of the one with classes.

    text_encoder/    a frozen T5 with random weights
    policy/          the base policy that reads its features
    captions.jsonl   all captions with their digits, as prompts

Tokenizer and judges are those of `argrpo.digits.assets`. An entry of its own in the cache holds
them, built on first use.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from argrpo.digits.assets import RECIPE, DigitsRecipe, digits_assets
from argrpo.digits.cache_entry import building, write_entry
from argrpo.digits.captions import CAPTIONS, WORDS
from argrpo.digits.text_encoder import DigitsTextEncoderConfig, save_text_encoder
from argrpo.digits.text_policy import PREFIX_LEN, WIDTH, TextPolicyConfig, train_text_policy
from argrpo.digits.training import Progress, no_progress
from argrpo.encoded_texts import EncodedTexts, TextLayout
from argrpo.models.loading import load_tokenizer, save_policy
from argrpo.text_config import TextEncoderConfig

_ENCODER = DigitsTextEncoderConfig(width=WIDTH)
_POLICY = TextPolicyConfig()
_VERSION = 1  # raise it when a change of code makes other models from the same configs


@dataclass(frozen=True, kw_only=True)
class TextDigitsRecipe:
    """How the models are made."""

    digits: DigitsRecipe = RECIPE
    """Of the tokenizer, whose codes the policy learns, and of the judges."""

    encoder: DigitsTextEncoderConfig = _ENCODER
    policy: TextPolicyConfig = _POLICY

    @property
    def key(self) -> str:
        """12 hex digits that change with anything that shapes the models."""
        captions = [caption.text for caption in CAPTIONS]
        record = {"version": _VERSION, "captions": captions, "recipe": asdict(self)}
        record["digits"] = self.digits.key
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


TEXT_RECIPE = TextDigitsRecipe()


@dataclass(frozen=True, slots=True)
class TextDigitsAssets:
    """Where things lie."""

    policy_path: Path  # for load_policy
    encoder_path: Path  # for data.text_encoder.path
    captions_path: Path  # for data.prompts

    @classmethod
    def within(cls, folder: Path) -> "TextDigitsAssets":
        """The layout of a cache entry."""
        return cls(folder / "policy", folder / "text_encoder", folder / "captions.jsonl")


def text_digits_assets(
    cache_dir: str | Path,
    progress: Progress = no_progress,
    recipe: TextDigitsRecipe = TEXT_RECIPE,
) -> TextDigitsAssets:
    """Encoder, policy and captions, made now if the cache does not hold them.

    Args:
        cache_dir: holds an entry `digits-text-v1-KEY` a recipe; made if need be.
        progress: called with (stage, steps done, steps in all) while models train.
        recipe: how they are made.

    Raises:
        OSError: the folder cannot be made or written.
    """
    cache_dir = Path(cache_dir)
    entry = cache_dir / f"digits-text-v{_VERSION}-{recipe.key}"
    if not _is_whole(entry):
        tokenizer_path = digits_assets(cache_dir, progress, recipe.digits).tokenizer_path
        with building(cache_dir, entry.name, progress):
            # Whoever held the lock before may have built it.
            if not _is_whole(entry):
                write_entry(entry, lambda draft: _make(draft, tokenizer_path, recipe, progress))
    return TextDigitsAssets.within(entry)


def _is_whole(entry: Path) -> bool:
    assets = TextDigitsAssets.within(entry)
    configs = [path / "config.json" for path in (assets.policy_path, assets.encoder_path)]
    return all(path.is_file() for path in [*configs, assets.captions_path])


def _make(draft: Path, tokenizer_path: Path, recipe: TextDigitsRecipe, progress: Progress) -> None:
    assets = TextDigitsAssets.within(draft)
    save_text_encoder(recipe.encoder, WORDS, assets.encoder_path)
    rows = [{"text": caption.text, "class_id": caption.digit} for caption in CAPTIONS]
    assets.captions_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    features = _features(assets.encoder_path, draft / "features")
    policy = train_text_policy(recipe.policy, load_tokenizer(tokenizer_path), features, progress)
    save_policy(policy, assets.policy_path)
    (draft / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def _features(encoder_path: Path, cache_dir: Path) -> EncodedTexts:
    from argrpo.prompt_encoding import encode_prompts

    return encode_prompts(
        [caption.text for caption in CAPTIONS],
        TextEncoderConfig(path=str(encoder_path), dtype="float32", batch=len(CAPTIONS)),
        TextLayout(PREFIX_LEN, WIDTH, "left"),
        device=torch.device("cpu"),
        cache_dir=cache_dir,
    )
