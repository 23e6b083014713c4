"""Images as text for servers, and back: PNG in base64, which loses nothing of 8 bits."""

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from argrpo.pixels import to_uint8

# zlib's fastest: a server on the same machine or network reads bytes faster than we squeeze them.
_COMPRESS_LEVEL = 1


def pil_images(images: Tensor) -> list[Image.Image]:
    """[n, 3, H, W] in [0, 1] -> n pictures of 8 bits, rounded."""
    levels = to_uint8(images.detach(), "round").permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(picture) for picture in levels]


def png_base64(image: Image.Image) -> str:
    """A picture as the base64 of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=_COMPRESS_LEVEL)
    return base64.b64encode(file.getvalue()).decode("ascii")


def from_png_base64(text: str) -> Tensor:
    """[3, H, W] fp32 in [0, 1] of the base64 of a PNG file.

    Raises:
        ValueError: it is none.
    """
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as file:
            levels = np.array(file.convert("RGB"))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"images: expected PNG files in base64, got something else: {error}"
        ) from error
    return torch.from_numpy(levels).permute(2, 0, 1).float() / 255.0
