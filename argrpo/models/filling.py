"""Weights of a checkpoint into a module: every one of them, under the names that were published."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from argrpo.models.checkpoint_files import Checkpoint, first_keys


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    published_names: Callable[[str], tuple[str, ...]],
) -> None:
    """Give a module of the meta device its weights, and forget the checkpoint's one by one.

    So a model is never held twice: most files are mapped, and the weights of one that could not be
    are let go as they are copied.
    """
    path, weights = checkpoint.path, checkpoint.weights
    blank = module.state_dict()
    _check_keys(path, weights, [name for key in blank for name in published_names(key)])
    filled: dict[str, Tensor] = {}
    for key, parameter in blank.items():
        names = published_names(key)
        weight = torch.empty(parameter.shape, device=device, dtype=dtype)
        for name, rows in zip(names, weight.chunk(len(names)), strict=True):
            _copy(path, name, weights.pop(name), rows)
        filled[key] = weight
    module.load_state_dict(filled, strict=True, assign=True)


def _check_keys(path: Path, found: Mapping[str, Tensor], expected: list[str]) -> None:
    unknown = found.keys() - set(expected)
    missing = set(expected) - found.keys()
    if unknown:
        raise ValueError(f"{path}: expected known keys only, got {first_keys(unknown)}")
    if missing:
        raise ValueError(f"{path}: expected {first_keys(missing)}, got no such key")


def _copy(path: Path, name: str, source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:
        raise ValueError(f"{path}: {name}: expected {list(target.shape)}, got {list(source.shape)}")
    if not source.is_floating_point():
        raise ValueError(f"{path}: {name}: expected floating point, got {source.dtype}")
    target.copy_(source)
