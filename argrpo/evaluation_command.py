"""`argrpo eval c2i` and `argrpo eval t2i`: from words to what is printed."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from argrpo.config_files import parse_config
from argrpo.embedded_models import prepare_digits_of
from argrpo.eval_c2i import evaluate_classes
from argrpo.eval_c2i_config import C2iConfig, resolved
from argrpo.eval_t2i import evaluate_texts
from argrpo.eval_t2i_config import T2iConfig
from argrpo.evaluation_tables import tell_c2i, tell_t2i, tell_unfinished, wide_console
from argrpo.progress import stage_progress, unreported
from argrpo.ranks import is_first
from argrpo.run_folder import RunFolder
from argrpo.side_by_side import write_side_by_side

_USAGE = """usage: argrpo eval c2i | t2i [--setting value ...]

  c2i      images over classes: FID, sFID, IS, precision, recall, FD-DINOv2 and diversity
  t2i      images of prompts: GenEval's and DrawBench's folders, judges, wins, side by side

`argrpo eval c2i --help` lists the settings of one."""
_C2I_LISTS = {"--labels": None, "--names": None, "--compare": None, "--guidance_scales": None}
_T2I_LISTS = {"--judges": "name", "--compare": None, "--data.classes": None}


def run_evaluation(arguments: list[str], cache_dir: Callable[[str | None], str]) -> None:
    """One evaluation, by the command line behind `argrpo eval`.

    Args:
        arguments: begin with c2i or t2i.
        cache_dir: the folder of the embedded models, of the one asked for.

    Raises:
        ValueError, FileNotFoundError: a setting or an input that does not fit.
        SystemExit: help was asked for and printed.
    """
    commands = {"c2i": _c2i, "t2i": _t2i}
    kind = arguments[0] if arguments else ""
    if kind in ("-h", "--help"):
        wide_console().out(_USAGE, highlight=False)
        raise SystemExit(0)
    if kind not in commands:
        raise ValueError(f"eval: expected {' or '.join(commands)}, got {kind or 'nothing'}")
    commands[kind](arguments[1:], cache_dir)


@contextmanager
def _writable(output_dir: str) -> Iterator[None]:
    """Refuses a folder that cannot be written before models are loaded."""
    folder = RunFolder.create(output_dir, may_hold_run=True)
    try:
        yield
    finally:
        folder.discard_if_empty()


def _c2i(arguments: list[str], cache_dir: Callable[[str | None], str]) -> None:
    config = parse_config(C2iConfig, arguments, command="argrpo eval c2i", lists=_C2I_LISTS)
    config = dataclasses.replace(config, cache_dir=cache_dir(config.cache_dir))
    prepare_digits_of(resolved(config), config.cache_dir)
    console = wide_console()
    with _writable(config.output_dir), stage_progress(console) as report:
        results = evaluate_classes(config, report if is_first() else unreported)
    if results is not None:
        tell_c2i(results, Path(config.output_dir), console)
    elif is_first():
        tell_unfinished(config, console)


def _t2i(arguments: list[str], cache_dir: Callable[[str | None], str]) -> None:
    config = parse_config(T2iConfig, arguments, command="argrpo eval t2i", lists=_T2I_LISTS)
    config = dataclasses.replace(config, cache_dir=cache_dir(config.cache_dir))
    prepare_digits_of(config, config.cache_dir)
    # A judge of your own may lie where the command was started; last on the path, so that no file
    # there hides an installed package.
    sys.path.append(os.getcwd())
    console = wide_console()
    with _writable(config.output_dir), stage_progress(console) as report:
        results = evaluate_texts(config, report if is_first() else unreported)
    if results is not None:
        page = write_side_by_side(results, Path(config.output_dir), config.page_prompts)
        tell_t2i(results, page, console)
    elif is_first():
        tell_unfinished(config, console)
