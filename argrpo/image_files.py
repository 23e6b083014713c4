"""Images from files, and to PNG files, one by one or as a grid."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from argrpo.pixels import to_uint8
from argrpo.run_folder import write_atomically

_SMALL = 64  # pixels; smaller images are enlarged in a grid, by whole factors, to be seen at all
_GAP = 2  # pixels between images, before enlarging
_GAP_LEVEL = 128  # grey: reads as a line beside dark pictures and bright ones


class UnreadableImageError(ValueError):
    """A file that is no picture, or a broken one."""


def read_image(path: Path, name: str = "images") -> Tensor:
    """[3, H, W] fp32 in [0, 1], as it is stored: transparency is dropped, and a camera's word on
    how it was held is not followed.

    Args:
        path: of a picture.
        name: the setting that asks for it.

    Raises:
        UnreadableImageError: it is none.
    """
    try:
        with Image.open(path) as file:
            # Pillow makes white of most levels where 16 bits of grey become 8.
            is_deep = file.mode.startswith("I")
            levels = np.array(file if is_deep else file.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{name}: expected a picture, got {path} ({error})") from error
    if is_deep:
        return torch.from_numpy(levels.astype(np.float32) / 65535.0).expand(3, -1, -1)
    return torch.from_numpy(levels).permute(2, 0, 1).float() / 255.0


def save_image(image: Tensor, path: Path, *, pixels: str = "llamagen") -> None:
    """One image as a PNG file.

    Args:
        image: [3, H, W] floating point in [0, 1], any device.
        path: the file; written whole or not at all.
        pixels: how floats become bytes, a rule of `to_uint8`.

    Raises:
        ValueError: the shape is not as above, or there is no such rule.
        StorageError: the disk is full or refused.
    """
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected [3, H, W], got {list(image.shape)}")
    _save(to_uint8(image.detach().cpu(), pixels), path)


def save_grid(
    images: Tensor, path: Path, *, columns: int | None = None, pixels: str = "llamagen"
) -> None:
    """Images side by side as one PNG file, row by row.

    Args:
        images: [N, 3, H, W] floating point in [0, 1], any device, at least one.
        path: the file; written whole or not at all.
        columns: images in a row; None finds a number that fills the rows.
        pixels: how floats become bytes, a rule of `to_uint8`.

    Raises:
        ValueError: the shape is not as above, or there is no such rule.
        StorageError: the disk is full or refused.
    """
    _save(grid(images, columns=columns, pixels=pixels), path)


def grid(images: Tensor, *, columns: int | None = None, pixels: str = "llamagen") -> Tensor:
    """Images side by side, as [3, H', W'] uint8; arguments as of `save_grid`."""
    if images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images: expected [N, 3, H, W] with N above 0, got {list(images.shape)}")
    count, _, height, width = images.shape
    columns = _columns(count) if columns is None else min(columns, count)
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    rows = -(-count // columns)
    down, right = height + _GAP, width + _GAP
    sheet = torch.full((3, rows * down - _GAP, columns * right - _GAP), _GAP_LEVEL).to(torch.uint8)
    for place, image in enumerate(to_uint8(images.detach().cpu(), pixels)):
        top, left = place // columns * down, place % columns * right
        sheet[:, top : top + height, left : left + width] = image
    factor = max(1, _SMALL // max(height, width))
    return sheet.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _columns(count: int) -> int:
    """The widest filled rectangle up to about 6 to 1, else the smallest square."""
    widest = math.floor(2.5 * math.sqrt(count))
    filled = [c for c in range(math.ceil(math.sqrt(count)), widest + 1) if count % c == 0]
    return max(filled, default=math.ceil(math.sqrt(count)))


def _save(levels: Tensor, path: Path) -> None:
    picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    write_atomically(path, lambda part: picture.save(part, format="PNG"))
