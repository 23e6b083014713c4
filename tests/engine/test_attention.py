"""Attention over whole sequences, inside a prefix, and the rotary embedding."""

import math

import torch
from torch import Tensor

from argrpo.engine.attention import CausalAttend, PrefixAttend, prefix_allowed, rotate

# fp32 sums in another order, of values of size 1.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
MASK = torch.tensor(
    [[False, False, True, True], [True, True, True, True], [False, True, False, True]]
)


def random_rotary(num_positions: int, head_dim: int) -> Tensor:
    angles = torch.rand(num_positions, head_dim // 2) * 6
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def attention_by_hand(qkv: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v, one row at a time, in fp64."""
    q, k, v = qkv.double().unbind(2)
    scores = torch.einsum("nshd,nthd->nhst", q, k) / math.sqrt(qkv.shape[-1])
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("nhst,nthd->nshd", weights, v).flatten(2).float()


def test_rotation_turns_interleaved_pairs() -> None:
    x, rotary = torch.randn(2, 5, 3, 8), random_rotary(5, 8)
    turned = rotate(x, rotary)
    for position in range(5):
        for pair in range(4):
            cos, sin = rotary[position, pair]
            even, odd = x[:, position, :, 2 * pair], x[:, position, :, 2 * pair + 1]
            torch.testing.assert_close(turned[:, position, :, 2 * pair], even * cos - odd * sin)
            torch.testing.assert_close(turned[:, position, :, 2 * pair + 1], even * sin + odd * cos)


def test_rotation_of_half_precision_is_rounded_once() -> None:
    x, rotary = torch.randn(2, 5, 3, 8).bfloat16(), random_rotary(5, 8)
    assert torch.equal(rotate(x, rotary), rotate(x.float(), rotary).bfloat16())


def test_a_zero_row_of_the_table_gives_zero() -> None:
    assert not rotate(torch.randn(2, 1, 3, 8), torch.zeros(1, 4, 2)).any()


def test_whole_sequences_attend_causally() -> None:
    qkv, rotary = torch.randn(2, 6, 3, 2, 8), random_rotary(6, 8)
    turned = torch.cat([rotate(qkv[:, :, :2], rotary), qkv[:, :, 2:]], dim=2)
    expected = attention_by_hand(turned, torch.ones(6, 6, dtype=torch.bool).tril())
    torch.testing.assert_close(CausalAttend(rotary)(0, qkv), expected, **TOLERANCE)


def test_padded_positions_are_seen_by_themselves_alone() -> None:
    allowed = prefix_allowed(MASK, 6)
    assert allowed.shape == (3, 1, 6, 6)
    for n in range(3):
        for row in range(6):
            for column in range(6):
                is_valid = column >= 4 or bool(MASK[n, column])
                expected = row == column or (column < row and is_valid)
                assert bool(allowed[n, 0, row, column]) == expected


def test_a_prefix_of_zero_scores_is_a_running_mean() -> None:
    qkv = torch.randn(3, 4, 3, 2, 8)
    attend = PrefixAttend(MASK)
    zero_scores = torch.cat([torch.zeros_like(qkv[:, :, :2]), qkv[:, :, 2:]], dim=2)
    expected = attention_by_hand(zero_scores, prefix_allowed(MASK, 4))
    torch.testing.assert_close(attend(5, qkv), expected, **TOLERANCE)
    sums = (qkv[:, :, 2] * MASK[:, :, None, None]).sum(1)
    torch.testing.assert_close(attend.value_sums[5], sums, **TOLERANCE)
