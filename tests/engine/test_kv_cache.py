"""One decode step over the cache equals attention over the whole sequence."""

import pytest
import torch

from argrpo.engine.attention import CausalAttend, prefix_allowed
from argrpo.engine.kv_cache import WaveCache, slot_bytes
from argrpo.engine.policy import PolicyShape
from argrpo.engine.prefix import PrefixStates

# fp32 sums in another order, of values of size 1.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
HEADS, HEAD_DIM, NUM_TOKENS = 3, 100, 6


def shape(prefix_len: int) -> PolicyShape:
    return PolicyShape(2, HEADS, HEAD_DIM, 16, prefix_len, NUM_TOKENS)


def grid_rotary(prefix_len: int) -> torch.Tensor:
    angles = torch.rand(prefix_len + NUM_TOKENS, HEAD_DIM // 2) * 6
    rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
    rotary[:prefix_len] = 0
    return rotary


@pytest.mark.parametrize("mask", [[[1], [1]], [[0, 0, 1, 1], [1, 1, 1, 1]]], ids=["label", "text"])
def test_steps_over_the_cache_equal_one_pass_over_the_sequence(mask: list[list[int]]) -> None:
    valid = torch.tensor(mask).bool()
    prefix_len = valid.shape[1]
    rotary = grid_rotary(prefix_len)
    qkv = torch.randn(2, prefix_len + NUM_TOKENS - 1, 3, HEADS, HEAD_DIM)
    allowed = prefix_allowed(valid, qkv.shape[1])
    expected = CausalAttend(rotary[: qkv.shape[1]], allowed)(1, qkv)[:, prefix_len:]

    cache = WaveCache(shape(prefix_len), 4, torch.device("cpu"))
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    sums = (qkv[:, :prefix_len, 2] * valid[:, :, None, None]).sum(1)
    states = PrefixStates(
        torch.stack([torch.full_like(sums, torch.nan), sums]),
        valid.sum(1).float(),
        torch.empty(0),
        torch.tensor([1, 0]),
    )
    # The row of a draw says which distinct prefix it uses; here they are swapped twice.
    cache.write_prefix(slice(0, 2), states, torch.tensor([1, 0]))
    for entry in range(1, NUM_TOKENS):
        at = prefix_len + entry - 1
        attend = cache.attend(2, entry, rotary[at : at + 1])
        out = attend(1, qkv[:, at : at + 1])
        torch.testing.assert_close(out[:, 0], expected[:, entry - 1], **TOLERANCE)


def test_slot_bytes_are_the_bytes_of_the_cache() -> None:
    cache = WaveCache(shape(1), 6, torch.device("cpu"))
    assert cache.keys.nbytes + cache.values.nbytes == 3 * slot_bytes(shape(1), num_branches=2)
    assert slot_bytes(shape(1), num_branches=2) == 2 * slot_bytes(shape(1), num_branches=1)
