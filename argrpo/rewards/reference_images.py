"""Which images of a batch have one to be compared with.

Shapes: N images, M of them with a reference.
"""

import torch
from torch import Tensor

from argrpo.data import Prompt


def with_references(name: str, images: Tensor, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """The images that have a reference.

    Args:
        name: of the judge, for its refusal.
        images: [N, 3, H, W] in [0, 1].
        prompts: N, with `reference_image` [3, H, W] in [0, 1] or None.

    Returns:
        rows [M] int64 and references [M, 3, H, W] in the images' dtype, on their device.

    Raises:
        ValueError: a reference is of another size.
    """
    rows = [i for i, prompt in enumerate(prompts) if prompt.reference_image is not None]
    found = [prompts[row].reference_image for row in rows]
    for reference in found:
        if reference is not None and reference.shape != images.shape[1:]:
            raise ValueError(
                f"rewards.{name}: expected references of shape {list(images.shape[1:])}, as the "
                f"images, got {list(reference.shape)}"
            )
    references = [reference.to(images) for reference in found if reference is not None]
    stacked = torch.stack(references) if references else images[:0]
    return torch.tensor(rows, dtype=torch.int64, device=images.device), stacked


def have_reference(prompts: list[Prompt]) -> list[bool]:
    """Whether each prompt has a reference image: elsewhere a judge by distance does not apply."""
    return [prompt.reference_image is not None for prompt in prompts]


def scattered(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """[M] values of `rows` among `count` images -> [N] fp32, NaN for the others."""
    scores = torch.full((count,), torch.nan, device=values.device)
    scores[rows] = values.float()
    return scores
