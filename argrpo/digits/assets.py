"""The models of the digits task: trained on first use, then read from a cache folder.

A cache entry carries a hash of everything that shapes it, so another recipe makes another entry.
An entry that somebody took a model from is built again.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from argrpo.digits.base_policy import BasePolicyConfig, train_base_policy
from argrpo.digits.cache_entry import building, write_entry
from argrpo.digits.dataset import SPLIT_SIZES
from argrpo.digits.judges import (
    HELDOUT_JUDGE,
    REWARD_JUDGE,
    JudgeConfig,
    save_judge,
    train_judge,
)
from argrpo.digits.tokenizer import DigitTokenizerConfig, train_tokenizer
from argrpo.digits.training import Progress, no_progress
from argrpo.models.loading import save_policy, save_tokenizer

_TOKENIZER = DigitTokenizerConfig()
_POLICY = BasePolicyConfig()
_VERSION = 1  # raise it when a change of code makes other models from the same configs


@dataclass(frozen=True, kw_only=True)
class DigitsRecipe:
    """How the four models are trained."""

    tokenizer: DigitTokenizerConfig = _TOKENIZER
    policy: BasePolicyConfig = _POLICY
    reward_judge: JudgeConfig = REWARD_JUDGE
    heldout_judge: JudgeConfig = HELDOUT_JUDGE

    @property
    def key(self) -> str:
        """12 hex digits that change with anything that shapes the models."""
        record = {"version": _VERSION, "splits": SPLIT_SIZES, "recipe": asdict(self)}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


RECIPE = DigitsRecipe()


@dataclass(frozen=True, slots=True)
class DigitsAssets:
    """Folders of the four models, each with model.safetensors and config.json."""

    policy_path: Path  # for load_policy
    tokenizer_path: Path  # for load_tokenizer
    reward_judge_path: Path  # for load_judge and DigitJudgeReward
    heldout_judge_path: Path

    @classmethod
    def within(cls, folder: Path) -> "DigitsAssets":
        """The layout of a cache entry."""
        return cls(
            policy_path=folder / "policy",
            tokenizer_path=folder / "tokenizer",
            reward_judge_path=folder / "reward_judge",
            heldout_judge_path=folder / "heldout_judge",
        )


def default_cache_dir(xdg_cache_home: str | None = None) -> Path:
    """Where models are kept unless told otherwise: argrpo under the user's cache folder.

    Args:
        xdg_cache_home: the environment's XDG_CACHE_HOME, which the command line reads; empty or
            None for ~/.cache.
    """
    base = Path(xdg_cache_home) if xdg_cache_home else Path.home() / ".cache"
    return base / "argrpo"


def digits_assets(
    cache_dir: str | Path,
    progress: Progress = no_progress,
    recipe: DigitsRecipe = RECIPE,
) -> DigitsAssets:
    """The four models, trained now if the cache does not hold them.

    Args:
        cache_dir: holds an entry `digits-v1-KEY` a recipe; made if need be.
        progress: called with (stage, steps done, steps in all) while models train.
        recipe: how they are trained.

    Raises:
        OSError: the folder cannot be made or written.
    """
    cache_dir = Path(cache_dir)
    entry = cache_dir / f"digits-v{_VERSION}-{recipe.key}"
    if _is_whole(entry):
        return DigitsAssets.within(entry)
    with building(cache_dir, entry.name, progress):
        # Whoever held the lock before may have built it.
        if not _is_whole(entry):
            _build(entry, recipe, progress)
    return DigitsAssets.within(entry)


def _is_whole(entry: Path) -> bool:
    """Whether all models are there; whether they can be read is known when they are."""
    assets = DigitsAssets.within(entry)
    folders = [getattr(assets, field.name) for field in fields(assets)]
    return all((folder / "config.json").is_file() for folder in folders)


def _build(entry: Path, recipe: DigitsRecipe, progress: Progress) -> None:
    def fill(draft: Path) -> None:
        _train_into(DigitsAssets.within(draft), recipe, progress)
        (draft / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")

    write_entry(entry, fill)


def _train_into(assets: DigitsAssets, recipe: DigitsRecipe, progress: Progress) -> None:
    save_judge(train_judge(recipe.reward_judge, progress), assets.reward_judge_path)
    save_judge(train_judge(recipe.heldout_judge, progress), assets.heldout_judge_path)
    tokenizer = train_tokenizer(recipe.tokenizer, progress)
    save_tokenizer(tokenizer, assets.tokenizer_path)
    policy = train_base_policy(recipe.policy, tokenizer, progress)
    save_policy(policy, assets.policy_path)
