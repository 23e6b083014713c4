"""How different the images of one prompt are from each other.

Recall and coverage ask whether all of the reality is there; this asks the question that a policy
tuned by rewards fails first: does one prompt still give different pictures?

Shapes: N images, C features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_THUMBNAIL = 32  # pixels a side; finer detail is noise to this measure, and costs memory


def has_pairs(groups: Tensor) -> bool:
    """Whether a prompt of groups [N] has at least two images."""
    return len(torch.unique(groups)) < len(groups)


def distance_within(features: Tensor, groups: Tensor) -> float:
    """Mean Euclidean distance between two images of one prompt: of its pairs, then of the prompts.

    Args:
        features: [N, C] floating point. Rows that are not finite are left out.
        groups: [N] int64, which prompt an image is of.

    Returns:
        At least 0; NaN where no prompt has two images.
    """
    is_finite = features.isfinite().all(dim=1)
    kept, of = features[is_finite], groups.to(features.device)[is_finite]
    order = of.argsort(stable=True)
    counts = torch.unique_consecutive(of[order], return_counts=True)[1].tolist()
    means = [
        torch.pdist(group.double()).mean() for group in kept[order].split(counts) if len(group) > 1
    ]
    return torch.stack(means).mean().item() if means else torch.nan


def thumbnails(images: Tensor) -> Tensor:
    """Pixels to compare where no network is at hand.

    Args:
        images: [N, 3, H, W] floating point in [0, 1].

    Returns:
        [N, C] fp32 on the CPU, scaled so that the Euclidean distance of two rows is the root mean
        square difference of their pixels, from 0 to 1.
    """
    height, width = images.shape[2:]
    size = (min(height, _THUMBNAIL), min(width, _THUMBNAIL))
    rows = F.adaptive_avg_pool2d(images.float(), size).flatten(1).cpu()
    return rows / rows.shape[1] ** 0.5
