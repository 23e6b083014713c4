"""Root-mean-square norm:  y = x / sqrt(mean(x^2) + eps) * weight.

Arithmetic in fp32, the normalised row is rounded to the dtype of x before the weight multiplies
it, as the checkpoints were trained (FoundationVision/LlamaGen at ce98ec4, gpt.py RMSNorm).

Source: Zhang and Sennrich, arXiv:1910.07467, equation 4.
"""

import torch
from torch import Tensor

from argrpo.kernels._checks import FLOATS, expect


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension. Differentiable in both tensors.

    Args:
        x: [..., D] bf16, fp16 or fp32, contiguous.
        weight: [D], in the dtype of x.
        eps: added to the mean square, e.g. 1e-5.

    Returns:
        [..., D] in the dtype of x.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    expect("weight", weight, (x.shape[-1],), FLOATS)
    return rmsnorm_reference(x, weight, eps)


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification, in plain PyTorch."""
    if x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight
