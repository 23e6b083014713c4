"""Where a model lies: a path as it stands, or a name of the embedded task."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DIGITS = "digits:"
_TEXT_NAMES = ("text_policy", "text_encoder", "captions")
# What a caller may tell the loader of a policy beside its path.
_SIZES = ("image_size", "num_heads", "downsample", "text_padding")


@contextmanager
def blamed_on(setting: str, *, sizes: str = "") -> Iterator[None]:
    """Refusals of a model's loader under the names of settings.

    Args:
        setting: the one that holds the path, as policy.path.
        sizes: what stands before image_size and the other settings of a loader, as "policy.".

    Raises:
        ValueError, FileNotFoundError: as raised inside, with the setting's name in front.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        is_size = str(error).partition(":")[0] in _SIZES
        raise kind(f"{sizes if is_size else f'{setting}: '}{error}") from error


@contextmanager
def named_within(place: str) -> Iterator[None]:
    """Refusals that begin with the name of an option, with where that option is in front.

    Raises:
        ValueError, FileNotFoundError: as raised inside, under its whole name.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        raise kind(f"{place}.{error}") from error


def resolve_path(path: str, cache_dir: str | None) -> Path:
    """A path, or what the embedded task keeps under `cache_dir`: for `digits:policy`,
    `digits:tokenizer`, `digits:reward_judge` and `digits:heldout_judge`; and for its captions
    `digits:text_policy`, `digits:text_encoder` and `digits:captions`.

    The embedded models are trained if they are not there yet.

    Raises:
        ValueError: a digits: name that is none of these.
    """
    if not path.startswith(_DIGITS):
        return Path(path)
    from argrpo.digits.assets import default_cache_dir, digits_assets

    name = path.removeprefix(_DIGITS)
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    if name in _TEXT_NAMES:
        return _of_text_digits(name, folder)
    assets = digits_assets(folder)
    known = {
        "policy": assets.policy_path,
        "tokenizer": assets.tokenizer_path,
        "reward_judge": assets.reward_judge_path,
        "heldout_judge": assets.heldout_judge_path,
    }
    if name not in known:
        names = ", digits:".join([*known, *_TEXT_NAMES])
        raise ValueError(f"path: expected one of digits:{names}, got {path!r}")
    return known[name]


def names_digits(text: str) -> bool:
    """Whether a text, as the record of a config, holds a name of the embedded task."""
    return _DIGITS in text


def names_text_digits(text: str) -> bool:
    """Whether a text, as the record of a config, holds a name of the task with captions."""
    return any(f"{_DIGITS}{name}" in text for name in _TEXT_NAMES)


def _of_text_digits(name: str, cache_dir: Path) -> Path:
    from argrpo.digits.text_assets import text_digits_assets

    assets = text_digits_assets(cache_dir)
    known = {
        "text_policy": assets.policy_path,
        "text_encoder": assets.encoder_path,
        "captions": assets.captions_path,
    }
    return known[name]
