"""From float pixels to the 8 bits of a file: the rules in use, so that rewards and files agree.

With y in [0, 1], a pixel becomes

    llamagen   floor(255 y + 1/2)      LlamaGen's samplers: 127.5 x + 128 truncated, x = 2 y - 1
    truncate   floor(255 y)            AR-GRPO's rewards: torchvision's to_pil_image
    round      255 y rounded, halves to even
    float      left alone: rewards see what the decoder gave; a file needs one of the others

Source: FoundationVision/LlamaGen at ce98ec4, autoregressive/sample/sample_c2i_ddp.py;
Kwai-Klear/AR-GRPO.
"""

import torch
from torch import Tensor

PIXEL_RULES = ("llamagen", "truncate", "round", "float")


def to_uint8(images: Tensor, rule: str = "llamagen") -> Tensor:
    """8-bit pixels of images.

    Args:
        images: [..., H, W] floating point in [0, 1].
        rule: "llamagen", "truncate" or "round".

    Returns:
        uint8 of the same shape and layout.

    Raises:
        ValueError: the rule is none of these, or images are not floating point.
    """
    if not images.is_floating_point():
        raise ValueError(f"images: expected floating point in [0, 1], got {images.dtype}")
    # fp32, because bf16 cannot tell neighbouring levels above 128 apart after the product.
    levels = images.float() * 255.0
    if rule == "llamagen":
        return (levels + 0.5).clamp_(0.0, 255.0).to(torch.uint8)
    if rule == "truncate":
        return levels.clamp_(0.0, 255.0).to(torch.uint8)
    if rule == "round":
        return levels.round_().clamp_(0.0, 255.0).to(torch.uint8)
    raise ValueError(f"pixels: expected llamagen, truncate or round, got {rule!r}")


def seen_by_judges(images: Tensor, rule: str) -> Tensor:
    """What judges get: the decoder's floats, or floats that went through the 8 bits of a file.

    Args:
        images: [..., H, W] floating point in [0, 1].
        rule: one of `PIXEL_RULES`; "float" gives the images back.

    Returns:
        [..., H, W] in [0, 1], in the dtype of `images`.

    Raises:
        ValueError: the rule is none of these.
    """
    if rule not in PIXEL_RULES:
        raise ValueError(f"pixels: expected one of {', '.join(PIXEL_RULES)}, got {rule!r}")
    return images if rule == "float" else to_uint8(images, rule).to(images.dtype) / 255.0
