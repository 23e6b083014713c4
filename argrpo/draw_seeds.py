"""From seeds or generators, one for all pictures or one for each, to what the engine draws by."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

_LARGEST_SEED = 2**63 - 1


class DrawSeeds(NamedTuple):
    """How a draw names its pictures: a token depends on the draw's seed and its picture's id."""

    draw: int
    image_ids: list[int]


def draw_seeds(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    count: int,
) -> DrawSeeds:
    """How to draw some pictures.

    Args:
        seed: one for all, or a list of one a picture, signed 64-bit.
        generator: in place of seeds, which are drawn from it, or from each of a list; without
            either they are drawn from PyTorch's own.
        count: of pictures.

    Raises:
        ValueError: both are given, or a list of another length, or a seed out of range.
    """
    if seed is not None and generator is not None:
        raise ValueError("generator: expected None beside a seed, got both")
    if isinstance(generator, Sequence):
        seed = [_drawn(each) for each in generator]
    elif seed is None:
        seed = _drawn(generator)
    if not isinstance(seed, Sequence):
        return DrawSeeds(seed, list(range(count)))
    if len(seed) != count:
        raise ValueError(f"seed: expected one, or one for each of {count} images, got {len(seed)}")
    outside = [each for each in seed if not -_LARGEST_SEED <= each <= _LARGEST_SEED]
    if outside:
        raise ValueError(f"seed: expected signed 64-bit integers, got {outside[0]}")
    return DrawSeeds(0, list(seed))


def _drawn(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(_LARGEST_SEED, (), generator=generator, device=device))
