"""Which checkpoint a run goes on from, and whether it is the same run."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from argrpo.checkpoint_names import positions
from argrpo.checkpoints import InvalidCheckpoint, Snapshot, read_checkpoint, reference_name
from argrpo.config import TrainConfig
from argrpo.run_folder import RunFolder, plain

_LOG = logging.getLogger(__name__)

# What may change when a run goes on: where it runs, what it costs, what it leaves. micro_batch,
# max_slots and attention change sums in their last bits.
_FREE = (
    "output_dir",
    "resume",
    "output",
    "fault",
    "profile",
    "distributed.shard",
    "distributed.save",
    "judging",
    "cache_dir",
    "device",
    "micro_batch",
    "gradient_checkpointing",
    "max_slots",
    "kv_bytes",
    "policy.path",
    "policy.attention",
    "tokenizer.path",
    "tokenizer.decode_batch",
    "reference.device",
)


class Start(NamedTuple):
    """Where a run goes on from."""

    path: Path
    snapshot: Snapshot
    reference: str | None  # the folder's name, where it lies beside the run's own checkpoints


def find_start(config: TrainConfig, folder: RunFolder) -> Start | None:
    """The checkpoint that `config.resume` means; None: the run begins.

    Raises:
        ValueError: there is none that is valid, it is of another run, or later ones stand.
        FileNotFoundError: nothing stands at the path.
    """
    if config.resume == "no":
        return None
    source = folder.path if config.resume == "auto" else Path(config.resume).expanduser()
    if not source.is_dir():
        if config.resume == "auto":
            return None
        raise FileNotFoundError(
            f"resume: expected auto, no, or the folder of a run or checkpoint, got {source}"
        )
    start: Start | None
    if source.resolve().parent.name == "checkpoints":
        start = _chosen(source.resolve(), folder)
    else:
        start = _newest(RunFolder(source), folder)
    if start is None:
        if config.resume != "auto":
            raise ValueError(f"resume: expected a run with a checkpoint, got none in {source}")
        _check_same_begun(config, folder)
        return None
    check_same_run(config, start.snapshot.state.get("config"), start.path)
    return start


def check_same_run(config: TrainConfig, saved: object, path: Path) -> None:
    """Refuse settings that would make another run of it.

    Args:
        config: of the run that goes on.
        saved: that of the run so far, as `plain` has it.
        path: where that was read.

    Raises:
        ValueError: all settings that differ, named.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: expected the settings of the run, got {type(saved).__name__}")
    before, now = _flat(saved), _flat(plain(dataclasses.asdict(config)))
    free = [*_FREE, *_free_num_steps(config)]
    differ = [
        f"{name} {now[name]!r} instead of {before[name]!r}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name] and not _is_free(name, free)
    ]
    if differ:
        raise ValueError(
            f"resume: expected the settings of the run in {path}, got {', '.join(differ)}; give "
            "the old values, or begin another run from its policy with --policy.path"
        )


def _chosen(path: Path, folder: RunFolder) -> Start:
    """A checkpoint that was named."""
    try:
        snapshot = read_checkpoint(path)
    except InvalidCheckpoint as error:
        raise ValueError(f"resume: expected a whole checkpoint, got {path}: {error}") from error
    is_own = path.parent == folder.checkpoints_path.resolve()
    later = [
        p.name for position, p in positions(path.parent) if position.order > snapshot.position.order
    ]
    if is_own and later:
        raise ValueError(
            f"resume: expected the newest checkpoint of the run, got {path.name} where "
            f"{later[0]} stands; remove the later ones, or go on in another output_dir"
        )
    return Start(path, snapshot, reference_name(path) if is_own else None)


def _newest(source: RunFolder, folder: RunFolder) -> Start | None:
    """The newest valid checkpoint of a run; None where it has none at all."""
    skipped = []
    for _, path in positions(source.checkpoints_path):
        try:
            snapshot = read_checkpoint(path)
        except InvalidCheckpoint as error:
            skipped.append(f"{path.name}: {error}")
            continue
        for line in skipped:
            _LOG.warning("resume: skipped %s", line)
        is_own = path.parent.resolve() == folder.checkpoints_path.resolve()
        return Start(path, snapshot, reference_name(path) if is_own else None)
    if skipped:
        raise ValueError(
            f"resume: expected a valid checkpoint in {source.checkpoints_path}, got none; "
            f"{'; '.join(skipped)}. Remove them to begin anew"
        )
    return None


def _check_same_begun(config: TrainConfig, folder: RunFolder) -> None:
    """A run that was killed before its first checkpoint begins again; its rows are removed, so it
    must not be another's."""
    if not folder.holds_run or not folder.config_path.exists():
        return
    try:
        saved = yaml.safe_load(folder.config_path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{folder.config_path}: expected YAML, got {error}") from error
    check_same_run(config, saved, folder.config_path)


def _free_num_steps(config: TrainConfig) -> list[str]:
    """A longer run has the same steps so far, unless they follow the share of it that is done."""
    follows = config.optimizer.learning_rate.schedule != "constant"
    return [] if follows or config.entropy.control == "loofid" else ["num_steps"]


def _is_free(name: str, free: list[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in free)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name != "options":
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
