"""The command line: argrpo demo, train, sample, convert, moments, score, eval, report, doctor.

Under torchrun `argrpo train` and `eval` are one run on several processes; all of them end with the
code of the one that failed first, which alone says why. torchrun itself then ends with 1.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

import argrpo
from argrpo.command_words import CommandWords
from argrpo.exit_codes import BUG, DONE, MACHINE, PREEMPTED, STOPPED, WRONG_INPUT, exit_code, saying
from argrpo.warning_lines import WarningLines

_TORCHRUN = "TORCHELASTIC_RUN_ID"  # in the environment of each process that it starts


class _Command(NamedTuple):
    """A command reads and checks its input first; what it returns, if anything, then runs."""

    help: str
    prepare: Callable[[list[str]], Callable[[], None] | None]
    on_ranks: bool = False  # whether the processes that torchrun starts do it together


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Args:
        argv: the words behind `argrpo`; None takes them from the process.
    """
    try:
        chosen = _top_parser().parse_args(argv)
    except SystemExit as stop:
        return _code_of(stop)
    except ValueError as error:
        return _told(str(error), WRONG_INPUT)
    logging.basicConfig(level=logging.WARNING, handlers=[WarningLines()])
    if _TORCHRUN in os.environ:
        return _run_on_ranks(chosen)
    return _run(chosen)


def _run_on_ranks(chosen: argparse.Namespace) -> int:
    from argrpo.process_group import process_group
    from argrpo.ranks import PeerError, is_first

    if not _COMMANDS[chosen.command].on_ranks:
        return _told(f"torchrun: expected argrpo train or eval, got {chosen.command}", WRONG_INPUT)
    with ExitStack() as stack:
        try:
            stack.enter_context(process_group())
        except RuntimeError as error:
            return _told(f"torchrun: {' '.join(str(error).split())}", MACHINE)
        if not is_first():
            logging.disable(logging.WARNING)
        try:
            return _run(chosen)
        except PeerError as error:
            return _told(str(error), error.code) if is_first() else error.code


def _run(chosen: argparse.Namespace) -> int:
    is_running = False
    try:
        run = _COMMANDS[chosen.command].prepare(chosen.arguments)
        if run is not None:
            is_running = True
            run()
    except SystemExit as stop:
        return _code_of(stop)
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except Exception as error:
        code = exit_code(error, is_running)
        if code == BUG or chosen.traceback:
            raise
        return _failed(saying(error), code)
    return DONE


def _top_parser() -> CommandWords:
    listing = "\n".join(f"  {name:<8} {command.help}" for name, command in _COMMANDS.items())
    parser = CommandWords(
        prog="argrpo",
        usage="argrpo [--version] [--traceback] COMMAND ...",
        description="Fine-tune autoregressive image models with GRPO.",
        epilog=f"commands:\n{listing}\n\n`argrpo COMMAND --help` lists the settings of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"argrpo {argrpo.__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error was raised, not its line only"
    )
    parser.add_argument(
        "command", choices=list(_COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _demo(arguments: list[str]) -> None:
    from argrpo.config_files import parse_config
    from argrpo.demo import DemoConfig, run_demo

    config = parse_config(DemoConfig, arguments, command="argrpo demo", lists={})
    run_demo(dataclasses.replace(config, cache_dir=_cache_dir(config.cache_dir)), Console())


def _train(arguments: list[str]) -> Callable[[], None]:
    from argrpo.embedded_models import prepare_digits_of
    from argrpo.progress import stage_progress
    from argrpo.ranks import is_first
    from argrpo.trackers import make_trackers
    from argrpo.train_command import parse_train, said_after, said_before
    from argrpo.trainer import Trainer

    config = parse_train(arguments)
    config = dataclasses.replace(config, cache_dir=_cache_dir(config.cache_dir))
    # A judge of your own, my_rewards:score, may lie where the command was started. Last on the
    # path, so that no file there hides an installed package.
    sys.path.append(os.getcwd())
    prepare_digits_of(config, config.cache_dir)
    with stage_progress(Console(quiet=not is_first())) as report:
        trainer = Trainer(config, make_trackers(config, progress=True), report)

    def run() -> None:
        for line in said_before(trainer, config) if is_first() else []:
            print(line)
        result = trainer.train()
        for line in said_after(trainer, config, result) if is_first() else []:
            print(line)

    return run


def _sample(arguments: list[str]) -> None:
    from argrpo.config_files import TEXTS, parse_config
    from argrpo.embedded_models import prepare_digits_of
    from argrpo.progress import stage_progress
    from argrpo.sample_config import SampleConfig
    from argrpo.sampling import draw_samples

    lists = {"--labels": None, "--names": TEXTS, "--prompts": TEXTS}
    config = parse_config(SampleConfig, arguments, command="argrpo sample", lists=lists)
    config = dataclasses.replace(config, cache_dir=_cache_dir(config.cache_dir))
    prepare_digits_of(config, config.cache_dir)
    with stage_progress(Console()) as report:
        folder = draw_samples(config, report)
    print(f"{folder}: one PNG file an image, grid.png, tokens.npy")


def _convert(arguments: list[str]) -> None:
    from argrpo.convert import convert
    from argrpo.convert_command import parse_convert

    for line in convert(*parse_convert(arguments)):
        print(line)


def _moments(arguments: list[str]) -> None:
    from argrpo.config_files import parse_config
    from argrpo.embedded_models import prepare_digits_of
    from argrpo.moments import MomentsConfig, write_moments
    from argrpo.progress import stage_progress

    config = parse_config(MomentsConfig, arguments, command="argrpo moments", lists={})
    config = dataclasses.replace(config, cache_dir=_cache_dir(config.cache_dir))
    prepare_digits_of(config, config.cache_dir)
    with stage_progress(Console()) as report:
        moments = write_moments(config, report)
    print(f"{config.output}: {moments.num_images} images, {moments.dim} features")


def _score(arguments: list[str]) -> Callable[[], None]:
    from argrpo.config_files import parse_config
    from argrpo.embedded_models import prepare_digits_of
    from argrpo.progress import stage_progress
    from argrpo.score import ScoreConfig, prepare_scoring

    lists: dict[str, str | None] = {"--rewards": "name"}
    config = parse_config(ScoreConfig, arguments, command="argrpo score", lists=lists)
    config = dataclasses.replace(config, cache_dir=_cache_dir(config.cache_dir))
    sys.path.append(os.getcwd())  # as for argrpo train
    prepare_digits_of(config, config.cache_dir)
    run = prepare_scoring(config)

    def scored() -> None:
        with stage_progress(Console()) as report:
            folder = run(report)
        print(f"{folder}: scores.csv, scores.json, histograms.png")

    return scored


def _eval(arguments: list[str]) -> None:
    from argrpo.evaluation_command import run_evaluation

    run_evaluation(arguments, _cache_dir)


def _report(arguments: list[str]) -> None:
    from argrpo.report import write_report

    parser = CommandWords(
        prog="argrpo report",
        description="One HTML file about a run, readable without a network.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="the file; default: report.html in the folder")
    chosen = parser.parse_args(arguments)
    print(write_report(chosen.run, chosen.output))


def _doctor(arguments: list[str]) -> None:
    from argrpo.doctor import examine, show

    parser = CommandWords(
        prog="argrpo doctor",
        description="What is installed here, what will be used, and why.",
        allow_abbrev=False,
    )
    parser.add_argument("--cache_dir", help="folder of the embedded models, if not the usual one")
    chosen = parser.parse_args(arguments)
    cache_dir = Path(str(_cache_dir(chosen.cache_dir)))
    show(examine(Path.cwd(), cache_dir), Console())


def _cache_dir(asked: str | None) -> str:
    """The folder of the embedded models; the one place that reads XDG_CACHE_HOME."""
    from argrpo.digits.assets import default_cache_dir

    return asked or str(default_cache_dir(os.environ.get("XDG_CACHE_HOME")))


def _failed(message: str, code: int) -> int:
    """Say what went wrong: to the other ranks of the run, and to the user if none did before."""
    from argrpo.ranks import tell_failure

    line = tell_failure(message, code)
    return code if line is None else _told(line, code)


def _stopped(stop: KeyboardInterrupt) -> int:
    if type(stop) is KeyboardInterrupt and "argrpo.ranks" not in sys.modules:
        # PyTorch may be imported by half, and then cannot be imported again.
        return _told("stopped by Ctrl-C", STOPPED)
    from argrpo.ranks import is_first
    from argrpo.stop_signals import Preempted

    if not isinstance(stop, Preempted):
        return _failed("stopped by Ctrl-C", STOPPED)
    # All ranks stop together, so there is nobody to be told but the user.
    return _told(str(stop), PREEMPTED) if is_first() else PREEMPTED


def _told(message: str, code: int) -> int:
    print(f"argrpo: {message}", file=sys.stderr)
    return code


def _code_of(stop: SystemExit) -> int:
    """What Python itself would make of sys.exit(None), sys.exit(3) and sys.exit("message")."""
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or DONE
    return _told(str(stop.code), BUG)


_COMMANDS = {
    "demo": _Command("train the embedded digits task from nothing, and report on it", _demo),
    "train": _Command(
        "fine-tune a policy: --config FILE.yaml or a preset, and overrides", _train, on_ranks=True
    ),
    "sample": _Command("draw images from a policy into PNG files", _sample),
    "convert": _Command("write a model in the form that another code reads", _convert),
    "moments": _Command("mean and covariance of images' features, for loo_fid", _moments),
    "score": _Command("what judges say of a folder of images: a table and histograms", _score),
    "eval": _Command(
        "c2i or t2i: draw many images and measure them as papers do", _eval, on_ranks=True
    ),
    "report": _Command("write report.html about a run folder", _report),
    "doctor": _Command("say what is installed, what will be used, and why", _doctor),
}
