"""How a layer attends. The model calls `attend`; the caller decides where keys and values live.

Shapes: N sequences, S positions fed at once, H heads, D head size, P prefix positions, T image
tokens, L layers.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Attend(Protocol):
    """One layer's attention, rotary embedding included."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[N, S, 3, H, D] queries, keys and values before rotation -> [N, S, H * D]."""
        ...


def rotate(x: Tensor, rotary: Tensor | None) -> Tensor:
    """Rotary embedding of interleaved pairs, in fp32, returned in the dtype of x.

    Args:
        x: [N, S, ..., D].
        rotary: [S, D / 2, 2] fp32 cosines and sines of the S positions. A row of zeros makes the
            rotated vector zero: that is how LlamaGen marks its prefix. None leaves x as it is.
    """
    if rotary is None:
        return x
    table = torch.view_as_complex(rotary)
    table = table.view(len(table), *([1] * (x.dim() - 3)), table.shape[1])
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class CausalAttend:
    """Attention over the whole sequence at once: scoring, training."""

    rotary: Tensor | None  # [S, D / 2, 2] fp32
    allowed: Tensor | None = None  # [N, 1, S, S] bool; None: plain causal

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        q, k = rotate(qkv[:, :, :2], self.rotary).transpose(1, 3).unbind(2)
        v = qkv[:, :, 2].transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.allowed, is_causal=self.allowed is None
        )
        return out.transpose(1, 2).flatten(2)


def prefix_allowed(mask: Tensor, num_positions: int) -> Tensor:
    """Who may look at whom when some prefix positions are padding.

    A position sees the valid prefix and the image positions up to itself, and always itself: a
    padded row would otherwise have nothing to attend to.

    Args:
        mask: [N, P] bool, True on valid prefix positions.
        num_positions: S, prefix and image positions.

    Returns:
        [N, 1, S, S] bool.
    """
    valid = F.pad(mask, (0, num_positions - mask.shape[1]), value=True)
    square = torch.ones(num_positions, num_positions, dtype=torch.bool, device=mask.device)
    itself = torch.eye(num_positions, dtype=torch.bool, device=mask.device)
    return ((square.tril() & valid[:, None, :]) | itself)[:, None]


class PrefixAttend:
    """Attention inside a prefix whose rotary rows are zero: every score is 0, so a running mean.

    Keeps what image positions need of each layer: the sum of V over the valid positions.
    """

    def __init__(self, mask: Tensor) -> None:
        """`mask`: [N, P] bool, True on valid positions."""
        self._mask = mask
        self.value_sums: dict[int, Tensor] = {}  # layer: [N, H, D] fp32

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        values = qkv[:, :, 2].float()
        valid = self._mask[:, :, None, None]
        kept = values * valid
        self.value_sums[layer] = kept.sum(dim=1)
        # A padded position sees itself beside the valid ones before it.
        total = kept.cumsum(dim=1) + values * ~valid
        count = self._mask.cumsum(dim=1)[:, :, None, None] + (~valid).int()
        return (total / count).to(qkv.dtype).flatten(2)


class PrefixKeyAttend:
    """Causal attention inside an ordinary prefix. Keeps the keys and values of each layer."""

    def __init__(self, rotary: Tensor | None) -> None:
        """`rotary`: [P, D / 2, 2] fp32 of the prefix positions; None: none."""
        self._attend = CausalAttend(rotary)
        self._rotary = rotary
        self.keys: list[Tensor] = []  # of each layer [N, P, H, D], rotated
        self.values: list[Tensor] = []

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        assert layer == len(self.keys), "layers attend in order"
        self.keys.append(rotate(qkv[:, :, 1], self._rotary))
        self.values.append(qkv[:, :, 2])
        return self._attend(layer, qkv)
