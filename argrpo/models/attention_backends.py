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
    """Causal attention inside each of several sequences."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        """Queries, keys and values [sum of lengths, H, D], D a multiple of 8 -> the same shape."""
        ...


def packed_attention(name: AttentionName) -> PackedAttention:
    """The function of a library.

    Raises:
        ValueError: it is not installed, or does not fit this torch.
    """
    try:
        return _flash_attn() if name == "flash_attn" else _xformers()
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
    packed_attention(name)
    if device.type != "cuda":
        raise ValueError(f"policy.attention: expected sdpa on a {device.type}, got {name}")
    if name == "flash_attn" and dtype == torch.float32:
        raise ValueError(
            "policy.attention: expected sdpa or xformers with policy.dtype float32, got flash_attn"
        )


def _flash_attn() -> PackedAttention:
    from flash_attn import flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        ends = torch.tensor([0, *lengths], device=q.device).cumsum(0, dtype=torch.int32)
        out: Tensor = flash_attn_varlen_func(
            *(q, k, v, ends, ends, max(lengths), max(lengths)), softmax_scale=scale, causal=True
        )
        return out

    return attend


def _xformers() -> PackedAttention:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        bias = BlockDiagonalCausalMask.from_seqlens(lengths, device=q.device)
        out: Tensor = memory_efficient_attention(
            q[None], k[None], v[None], attn_bias=bias, scale=scale
        )
        return out[0]

    return attend
