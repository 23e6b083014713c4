"""Which images of a batch have one to be compared with.

Shapes: N images, M of them with a reference.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from argrpo.data import Prompt


def references_of(images: Tensor, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """The images that have a reference.

    A reference of another size is brought to that of the images: the shorter side resized, bicubic
    and antialiased, and the middle cut out.

    Args:
        images: [N, 3, H, W] in [0, 1].
        prompts: N.

    Returns:
        rows [M] int64 and references [M, 3, H, W] in the images' dtype, on their device.

    Raises:
        UnreadableImageError: a reference is no picture.
    """
    height, width = images.shape[2:]
    found = enumerate(reference_images(prompts))
    there = {i: _fitted(image.to(images), height, width) for i, image in found if image is not None}
    rows = torch.tensor(list(there), dtype=torch.int64, device=images.device)
    return rows, torch.stack(list(there.values())) if there else images[:0]


def reference_images(prompts: list[Prompt]) -> list[Tensor | None]:
    """[3, H, W] in [0, 1] of each prompt, of any size; None without one. A group's is read once.

    Raises:
        UnreadableImageError: one is no picture.
    """
    read: dict[int, Tensor | None] = {}
    for prompt in prompts:
        if id(prompt) not in read:
            read[id(prompt)] = prompt.reference()
    return [read[id(prompt)] for prompt in prompts]


def have_reference(prompts: list[Prompt]) -> list[bool]:
    """Whether each prompt has a reference image: elsewhere a judge by distance does not apply."""
    return [prompt.has_reference for prompt in prompts]


def scattered(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """[M] values of `rows` among `count` images -> [N] fp32, NaN for the others."""
    scores = torch.full((count,), torch.nan, device=values.device)
    scores[rows] = values.float()
    return scores


def _fitted(image: Tensor, height: int, width: int) -> Tensor:
    """[3, H, W] of any size -> [3, height, width]."""
    own_height, own_width = image.shape[1:]
    if (own_height, own_width) == (height, width):
        return image
    factor = max(height / own_height, width / own_width)
    size = [max(round(own_height * factor), height), max(round(own_width * factor), width)]
    (resized,) = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)
    # Halves to even, as torchvision does.
    top, left = (round((got - kept) / 2) for got, kept in zip(size, (height, width), strict=True))
    middle = resized[:, top : top + height, left : left + width]
    # Bicubic weights leave [0, 1] beside edges.
    return middle.clamp(0.0, 1.0).to(image.dtype)
