"""Pixels as an image tower wants to see them, made on the device, all images at once.

    picture   rounded to 8 bits, then resized as Pillow does, which rounds and clips to black and
              white after each of its two passes: the towers of open_clip and transformers
    tensor    floats from end to end: HPSv2's fork of open_clip, and recipes without antialiasing

Then cropped and normalised. A resized level is Pillow's but where a sum ends near a half, at most
two levels off: a CPU resizes bytes with 16 bits of a weight where Pillow has 22, and a GPU, which
resizes no bytes, has floats. Across comes first, as in Pillow to 12. Its 13 goes down first where a
picture is squashed that is taller than wide, or three times as tall, which is not followed: up to
26 levels of white noise. A picture with a pixel that is no finite number is NaN.

Source: tgxs002/HPSv2 at 866735e, hpsv2/src/open_clip/transform.py; python-pillow/Pillow at 4e5f09f,
src/libImaging/Resample.c.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from argrpo.pixels import to_uint8

Interpolation = Literal["bicubic", "bilinear"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
ResizedAs = Literal["picture", "tensor"]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# Images at a time on a CPU, few enough that what lies between the passes stays in its cache:
# 64 of 256 pixels to 224 take half the time that one pass over all of them takes.
_CPU_IMAGES = 4


class TowerPixels(NamedTuple):
    """What an image tower wants to see."""

    size: int  # pixels a side
    mean: tuple[float, ...] = OPENAI_MEAN  # of each channel
    std: tuple[float, ...] = OPENAI_STD
    interpolation: Interpolation = "bicubic"
    resized_as: ResizedAs = "picture"
    antialias: bool = True  # of a tensor; a picture always is
    squash: bool = False  # both sides to `size`, instead of the shorter one and a crop
    shorter: int | None = None  # the shorter side before the crop, at least `size`; None: `size`
    crop_from: Literal["rounded", "floor"] = "rounded"  # half of an odd number beside the crop


def preprocess(images: Tensor, pixels: TowerPixels) -> Tensor:
    """[N, 3, H, W] in [0, 1] -> [N, 3, size, size] fp32, resized, cropped and normalised."""
    count = len(images)
    seen = images.new_empty(count, 3, pixels.size, pixels.size, dtype=torch.float32)
    batch = _CPU_IMAGES if images.device.type == "cpu" else max(count, 1)
    mean, std = (
        torch.tensor(numbers, device=images.device)[:, None, None]
        for numbers in (pixels.mean, pixels.std)
    )
    for part, out in zip(images.split(batch), seen.split(batch), strict=True):
        if pixels.resized_as == "picture":
            out.copy_(_cropped(_resized_levels(to_uint8(part, "round"), pixels), pixels))
            # 0 of an image, or NaN where a pixel is: a tenth of the time of asking each.
            nothing = part.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float32) * 0.0
            out.mul_(1.0 / (255.0 * std)).sub_(mean / std + nothing)
        else:
            shape = _resized_shape(part, pixels)
            resized = _resized(part.float(), shape, pixels, antialias=pixels.antialias)
            out.copy_(_cropped(resized, pixels)).sub_(mean).div_(std)
    return seen


def _resized_shape(images: Tensor, pixels: TowerPixels) -> tuple[int, int]:
    height, width = images.shape[-2:]
    if pixels.squash:
        return pixels.size, pixels.size
    shorter, wanted = min(height, width), pixels.shorter or pixels.size
    # Cut off, as the libraries do.
    return wanted * height // shorter, wanted * width // shorter


def _resized_levels(levels: Tensor, pixels: TowerPixels) -> Tensor:
    """uint8 -> uint8, or whole numbers in fp32 on a GPU."""
    shape = _resized_shape(levels, pixels)
    if levels.device.type == "cpu":
        return _resized(levels, shape, pixels)
    return resized_in_passes(levels.float(), shape, pixels)


def resized_in_passes(levels: Tensor, shape: tuple[int, int], pixels: TowerPixels) -> Tensor:
    """A picture's resizing in floats: across, rounded, then down, rounded.

    Args:
        levels: [N, 3, H, W] fp32, whole numbers from 0 to 255.
        shape: height and width to come.
        pixels: with the interpolation.

    Returns:
        [N, 3, height, width] fp32, whole numbers from 0 to 255.
    """
    for target in ((levels.shape[-2], shape[1]), shape):
        levels = _resized(levels, target, pixels).add_(0.5).floor_().clamp_(0.0, 255.0)
    return levels


def _resized(
    images: Tensor, shape: tuple[int, int], pixels: TowerPixels, *, antialias: bool = True
) -> Tensor:
    return F.interpolate(images, shape, mode=pixels.interpolation, antialias=antialias)


def _cropped(images: Tensor, pixels: TowerPixels) -> Tensor:
    beside = [side - pixels.size for side in images.shape[-2:]]
    # torchvision rounds halves to even, transformers down.
    starts = [round(x / 2) if pixels.crop_from == "rounded" else x // 2 for x in beside]
    top, left = starts
    return images[..., top : top + pixels.size, left : left + pixels.size]
