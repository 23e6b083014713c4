"""States of several parts as one flat dict of tensors: `optimizer.master.norm.weight`."""

from collections.abc import Mapping

import torch
from torch import Tensor


def with_prefixes(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """PART.NAME of every tensor of every part."""
    return {
        f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()
    }


def part_of(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The state of one part, by its own names."""
    prefix = f"{part}."
    return {k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}


def named(state: Mapping[str, Tensor], name: str) -> Tensor:
    """
    Raises:
        ValueError: there is none of that name.
    """
    if name not in state:
        raise ValueError(f"{name}: expected in the state, got none of that name")
    return state[name]


def whole_number(state: Mapping[str, Tensor], name: str) -> int:
    """
    Raises:
        ValueError: there is none of that name, or it is no int64 number.
    """
    value = named(state, name)
    if value.dtype != torch.int64 or value.dim() != 0:
        raise ValueError(f"{name}: expected an int64 number, got {value.dtype} {list(value.shape)}")
    return int(value)
