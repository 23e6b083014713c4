"""The models of the embedded task, trained where it can be seen before a command reads them."""

from pathlib import Path

from rich.console import Console

from argrpo.digits.assets import DigitsAssets, default_cache_dir, digits_assets
from argrpo.model_paths import names_digits, names_text_digits
from argrpo.progress import stage_progress
from argrpo.ranks import is_first


def prepare_digits_of(config: object, cache_dir: str | None) -> None:
    """Train the embedded models now, if a path of a config names one and the cache has none.

    Args:
        config: any record of settings.
        cache_dir: as for `prepare_digits`.
    """
    named = repr(config)
    if names_digits(named):
        console = Console(quiet=not is_first())
        prepare_digits(cache_dir, console, with_captions=names_text_digits(named))


def prepare_digits(
    cache_dir: str | None, console: Console, *, with_captions: bool = False
) -> DigitsAssets:
    """The embedded models, trained now under the eyes of the user if the cache has none.

    Args:
        cache_dir: where they are kept; None: argrpo under the user's cache folder.
        console: where progress is shown.
        with_captions: those of the task with captions, too.
    """
    folder = Path(cache_dir) if cache_dir else default_cache_dir()
    with stage_progress(console) as progress:
        assets = digits_assets(folder, progress)
        if with_captions:
            # Here, because transformers is seconds to import.
            from argrpo.digits.text_assets import text_digits_assets

            text_digits_assets(folder, progress)
        return assets
