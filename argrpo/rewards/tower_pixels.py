"""Pixels as an image tower wants to see them, made on the device, all images at once.

The tensor is resized before it is cropped and normalised, as HPSv2's fork of open_clip does. The
towers of open_clip and transformers are published with resizing as a picture, which rounds to 8
bits and clips to black and white on the way: within a grey level of this.

Source: tgxs002/HPSv2 at 866735e, hpsv2/src/open_clip/transform.py.
"""

from typing import Literal, NamedTuple, get_args

from torch import Tensor
from torchvision.transforms import functional as VF

Interpolation = Literal["bicubic", "bilinear"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class TowerPixels(NamedTuple):
    """What an image tower wants to see."""

    size: int  # pixels a side
    mean: tuple[float, ...] = OPENAI_MEAN  # of each channel
    std: tuple[float, ...] = OPENAI_STD
    interpolation: Interpolation = "bicubic"
    antialias: bool = True
    squash: bool = False  # both sides to `size`, instead of the shorter one and a crop


def preprocess(images: Tensor, pixels: TowerPixels) -> Tensor:
    """[N, 3, H, W] in [0, 1] -> [N, 3, size, size] fp32, resized, cropped and normalised."""
    resized = VF.resize(
        images.float(),
        [pixels.size] * (2 if pixels.squash else 1),
        interpolation=VF.InterpolationMode(pixels.interpolation),
        antialias=pixels.antialias,
    )
    cropped = VF.center_crop(resized, [pixels.size, pixels.size])
    return VF.normalize(cropped, list(pixels.mean), list(pixels.std))
