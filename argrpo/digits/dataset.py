"""Scikit-learn's 1,797 handwritten digits as 32 x 32 pictures, in fixed and disjoint splits.

The scans are 8 x 8 with 17 grey levels; bicubic upsampling makes pictures of them that a tokenizer
has something to do with. What the policy learns from, what either judge learns from and what
measures never meet: a judge that had seen the policy's pictures would praise it for memory.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI repository, as packaged
in scikit-learn.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

NUM_CLASSES = 10
IMAGE_SIZE = 32
SPLIT_SIZES = {"policy": 700, "reward_judge": 360, "heldout_judge": 360, "evaluation": 377}
"""Images of each split. `policy` also trains the tokenizer; nothing trains on `evaluation`."""

_SPLIT_SEED = 1797
_LEVELS = 16.0  # the scans' largest value


@dataclass(frozen=True, slots=True, eq=False)
class DigitSet:
    """Pictures and what they show."""

    images: Tensor  # [N, 3, 32, 32] fp32 in [0, 1], three equal channels, ink is bright
    labels: Tensor  # [N] int64 in [0, 10)

    def __len__(self) -> int:
        return len(self.labels)


def load_split(name: str) -> DigitSet:
    """One of the splits named in `SPLIT_SIZES`, the same every time.

    Raises:
        ValueError: there is no such split.
    """
    if name not in SPLIT_SIZES:
        raise ValueError(f"split: expected one of {', '.join(SPLIT_SIZES)}, got {name!r}")
    scans, classes = load_digits(return_X_y=True)
    labels = torch.from_numpy(classes).to(torch.int64)
    rows = _split_rows(labels)[name]
    pixels = torch.from_numpy(scans).float().reshape(-1, 1, 8, 8)[rows] / _LEVELS
    return DigitSet(images=_upsample(pixels), labels=labels[rows])


def shift_and_rotate(
    images: Tensor, generator: torch.Generator, *, max_shift: float, max_degrees: float
) -> Tensor:
    """Each image moved and turned a little, at random; what enters at the border is black.

    Args:
        images: [N, C, H, W] floating point.
        generator: a CPU generator; moved on.
        max_shift: largest shift along either axis, in pixels.
        max_degrees: largest turn, in degrees.

    Returns:
        [N, C, H, W], bilinear samples of `images`.
    """
    num_images, _, height, width = images.shape
    draws = torch.rand((3, num_images), generator=generator) * 2.0 - 1.0
    angle = draws[0] * math.radians(max_degrees)
    cos, sin = angle.cos(), angle.sin()
    # Grid coordinates span 2 over the picture, so a shift of one pixel is 2 / size.
    right, down = draws[1] * (2.0 * max_shift / width), draws[2] * (2.0 * max_shift / height)
    rows = [torch.stack([cos, -sin, right], dim=1), torch.stack([sin, cos, down], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images), align_corners=False)


def _split_rows(labels: Tensor) -> dict[str, Tensor]:
    """Row numbers of each split, every class spread over the splits in proportion."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    # A row's place among its class, from 0 to 1: cutting the rows sorted by it cuts each class
    # in the same proportion.
    place = torch.empty(len(labels), dtype=torch.float64)
    for digit in range(NUM_CLASSES):
        rows = order[labels[order] == digit]
        place[rows] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    shuffled = order[place[order].argsort(stable=True)]
    return dict(zip(SPLIT_SIZES, shuffled.split(list(SPLIT_SIZES.values())), strict=True))


def _upsample(pixels: Tensor) -> Tensor:
    """Three-channel pictures [N, 3, 32, 32] of scans [N, 1, 8, 8], both in [0, 1]."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    larger = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)
    # Bicubic weights are negative in places and leave [0, 1] at sharp edges.
    return larger.clamp_(0.0, 1.0).repeat(1, 3, 1, 1)
