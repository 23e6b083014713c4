"""Attention libraries that training may use in place of PyTorch's: flash-attn and xformers.

Each is imported inside its function, and becomes one form: rows of all sequences one behind the
other, causal inside each. Neither is required; pip install 'argrpo[attention]' brings both.

Source: flash_attn_varlen_func of Dao-AILab/flash-attention 2.8; memory_efficient_attention and
BlockDiagonalCausalMask of facebookresearch/xformers 0.0.35.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

AttentionName = Literal["sdpa", "flash_attn", "xformers"]


class PackedAttention(Protocol):
    """Causal attention inside each of some sequences, whose lengths it knows."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Queries, keys and values [sum of lengths, H, D], D a multiple of 8 -> the same shape."""
        ...


def packed_attention(
    name: AttentionName, lengths: list[int], device: torch.device
) -> PackedAttention:
    """The function of a library, for all layers of a pass.

    Args:
        name: any but sdpa.
        lengths: positions of each sequence, on the host.
        device: where the sequences are.

    Raises:
        ValueError: the library is not installed, or does not fit this torch.
    """
    try:
        return (_flash_attn if name == "flash_attn" else _xformers)(lengths, device)
    except ImportError as error:
        raise ValueError(
            f"policy.attention: expected an installed package, got {name} ({error}); "
            "pip install 'argrpo[attention]', or set sdpa"
        ) from error


def check_attention(name: AttentionName, device: torch.device, dtype: torch.dtype) -> None:
    """Whether a run can use it, before anything is loaded.

    Raises:
        ValueError: the package is missing, or does not compute on this device or in this dtype.
    """
    if name == "sdpa":
        return
    packed_attention(name, [1], torch.device("cpu"))
    if device.type != "cuda":
        raise ValueError(f"policy.attention: expected sdpa on a {device.type}, got {name}")
    if name == "flash_attn" and dtype == torch.float32:
        raise ValueError(
            "policy.attention: expected sdpa or xformers with policy.dtype float32, got flash_attn"
        )


def _flash_attn(lengths: list[int], device: torch.device) -> PackedAttention:
    from flash_attn import flash_attn_varlen_func

    ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    sequences = (ends, ends, max(lengths), max(lengths))

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out: Tensor = flash_attn_varlen_func(q, k, v, *sequences, softmax_scale=scale, causal=True)
        return out

    return attend


def _xformers(lengths: list[int], device: torch.device) -> PackedAttention:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    bias = BlockDiagonalCausalMask.from_seqlens(lengths, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        row = (q[None], k[None], v[None])
        out: Tensor = memory_efficient_attention(*row, attn_bias=bias, scale=scale)
        return out[0]

    return attend
