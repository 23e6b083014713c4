"""What a picture of a digit shows beside the digit, read off its pixels: place and tilt.

Both are moments of the ink, so that a caption can be checked without another model, and both
survive the tokenizer. (The amount of ink would not: the decoder's norms make it the same always.)
On the real digits of the evaluation split, 5 to 95 % of them:

    place   moved 4 pixels to the left -.35 to -.11, as scanned -.10 to .15, to the right .16 to .40
    slant   sheared by .4 to the right -.54 to -.17, as scanned -.16 to .23, to the left .23 to .60

The limits lie between.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PLACES = ("on the left", "", "on the right")
"""Words of the place, from left to right; none for the middle."""

TILTS = ("tilted right", "", "tilted left")
"""Words of the tilt, from a negative slant to a positive one; none for the middle."""

_PLACE_LIMITS = (-0.10, 0.155)
_SLANT_LIMITS = (-0.16, 0.22)
# How far a measure has to go over a limit to pass from wrong to mostly right.
_PLACE_WIDTH, _SLANT_WIDTH = 0.04, 0.06


class Attributes(NamedTuple):
    """Place and tilt of N pictures, each an index into its words."""

    places: Tensor  # [N] int64 in 0 .. 2
    tilts: Tensor  # [N] int64 in 0 .. 2


class Moments(NamedTuple):
    """Where the ink of N pictures lies, in half widths of the picture from its middle."""

    place: Tensor  # [N], positive to the right
    slant: Tensor  # [N], the covariance of right and down over the variance of down


def moments(images: Tensor) -> Moments:
    """Moments of pictures [N, 3, H, W] in [0, 1], whose ink is bright.

    A slant is positive where lower strokes lie further right, which reads as tilted to the left.
    A picture without ink has 0 of both.
    """
    grey = images.float().mean(dim=1)
    height, width = grey.shape[1:]
    down = torch.linspace(-1, 1, height, device=grey.device)[None, :, None].expand_as(grey)
    right = torch.linspace(-1, 1, width, device=grey.device)[None, None, :].expand_as(grey)
    mass = grey.sum(dim=(1, 2)).clamp_min(1e-6)

    def mean(values: Tensor) -> Tensor:
        return (grey * values).sum(dim=(1, 2)) / mass

    place, middle = mean(right), mean(down)
    down = down - middle[:, None, None]
    covariance, variance = mean(down * (right - place[:, None, None])), mean(down * down)
    return Moments(place, covariance / variance.clamp_min(1e-6))


def attributes(images: Tensor) -> Attributes:
    """Place and tilt of pictures [N, 3, H, W] in [0, 1]."""
    found = moments(images)
    return Attributes(_class(found.place, _PLACE_LIMITS), _class(found.slant, _SLANT_LIMITS))


def agreement(images: Tensor, wanted: Attributes) -> Tensor:
    """How well pictures show what was asked for, [N] fp32 in [0, 1].

    Each attribute passes smoothly from 0 to 1 at its limits; the score is the mean of the two, so
    that a group of pictures tells near from far.
    """
    found = moments(images)
    place = _degree(found.place, wanted.places, _PLACE_LIMITS, _PLACE_WIDTH)
    tilt = _degree(found.slant, wanted.tilts, _SLANT_LIMITS, _SLANT_WIDTH)
    return (place + tilt) / 2


def _class(values: Tensor, limits: tuple[float, float]) -> Tensor:
    return (values > limits[0]).long() + (values > limits[1]).long()


def _degree(values: Tensor, wanted: Tensor, limits: tuple[float, float], width: float) -> Tensor:
    above = [torch.sigmoid((values - limit) / width) for limit in limits]
    shares = torch.stack([1 - above[0], above[0] - above[1], above[1]], dim=1)
    return shares.gather(1, wanted.to(values.device)[:, None])[:, 0]
