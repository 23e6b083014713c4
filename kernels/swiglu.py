"""Gated feed-forward activation:  y = silu(gate) * up,  (gate | up) = x @ w13^T in one product.

The packed product is read once and the result written once.

Source: Shazeer, arXiv:2002.05202, the SwiGLU row of section 2.
"""

import torch
from torch import Tensor

from argrpo.kernels._checks import FLOATS, expect


def swiglu(gate_up: Tensor) -> Tensor:
    """silu of the first half of the last dimension, times the second half. Differentiable.

    Args:
        gate_up: [N, S, 2 F] bf16, fp16 or fp32, contiguous: the rows of w1 x, then of w3 x.

    Returns:
        [N, S, F] in the dtype of `gate_up`.

    Raises:
        ValueError: the shape or dtype is not as above.
    """
    expect("gate_up", gate_up, (None, None, None), FLOATS)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected an even last dimension, got {gate_up.shape[-1]}")
    return swiglu_reference(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The specification, in plain PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
