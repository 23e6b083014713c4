"""Plain numbers about images that a rising reward should not move: the watch for reward hacking.

    saturation       (max - min) / max of a pixel's channels, the mean over pixels
    edge_density     share of pixels whose brightness changes by more than a tenth a pixel (Sobel)
    colour_entropy   bits of the histogram of colours, 8 levels a channel: 0 to 9
    distinct_tokens  different tokens of an image

A policy that games a judge shows it here first: garish or washed-out colours, grids and blank
backgrounds, the same few tokens everywhere.

Letters: N images, H x W pixels, T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

STATISTICS = ("saturation", "edge_density", "colour_entropy", "distinct_tokens")

_LEVELS = 8  # of a channel in the histogram of colours
_EDGE = 0.1  # of the range from black to white, a pixel
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def image_statistics(images: Tensor, token_ids: Tensor) -> Tensor:
    """What each image has of `STATISTICS`; an image's row does not depend on the others.

    Args:
        images: [N, 3, H, W] floating point in [0, 1].
        token_ids: [N, T] int64 that they were decoded from.

    Returns:
        [N, 4] fp32 on the images' device, without waiting for it.
    """
    pixels = images.float()
    high, low = pixels.amax(dim=1), pixels.amin(dim=1)
    # Black has no colour: its saturation is 0 by convention.
    saturation = ((high - low) / high.clamp_min(1e-8)).mean(dim=(1, 2))
    ordered = token_ids.sort(dim=1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1) + 1
    columns = [saturation, _edge_density(pixels), _colour_entropy(pixels), distinct.float()]
    return torch.stack(columns, dim=1)


def statistics_metrics(values: Tensor, token_ids: Tensor) -> dict[str, float]:
    """The means over a step's images, as they are logged.

    Args:
        values: [N, 4] of `image_statistics`.
        token_ids: of all its images, in any shape; each token that occurs at least once.

    Returns:
        images/NAME of each of `STATISTICS`, and images/distinct_tokens_of_step.
    """
    means = values.double().mean(dim=0).tolist()
    found = {f"images/{name}": mean for name, mean in zip(STATISTICS, means, strict=True)}
    return {**found, "images/distinct_tokens_of_step": float(len(token_ids.unique()))}


def _edge_density(pixels: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA, device=pixels.device)
    luma = torch.einsum("nchw,c->nhw", pixels, weights)[:, None]
    slope = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8.0
    kernels = torch.stack([slope, slope.T])[:, None].to(pixels.device)
    # The border repeats, so that a flat image has no edge there.
    steps = F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), kernels)
    return (steps.square().sum(dim=1) > _EDGE**2).float().mean(dim=(1, 2))


def _colour_entropy(pixels: Tensor) -> Tensor:
    levels = (pixels * _LEVELS).long().clamp_(0, _LEVELS - 1)
    colours = (levels[:, 0] * _LEVELS + levels[:, 1]) * _LEVELS + levels[:, 2]
    flat = colours.flatten(1)
    counts = torch.zeros(len(flat), _LEVELS**3, device=flat.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
    shares = counts / flat.shape[1]
    return torch.special.entr(shares).sum(dim=1) / torch.log(torch.tensor(2.0))
