"""kernels/counter_random.py: the same bits in the kernels and in plain PyTorch, and good ones."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from argrpo.kernels.counter_random import (
    gumbel_log2,
    gumbel_noise,
    random_bits,
    row_keys,
    token_bits,
    uniform,
    uniforms,
)
from argrpo.kernels.draw import DrawKeys

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_TOKENS = 1000
# Two fp32 logarithms on each side, of results up to 16 and 23, each within two units in the last
# place (1.9e-6); on a GPU log2 is one instruction, off by 2^-22 where 1 - u is near 1 (2e-6).
NOISE_TOLERANCE = 4e-6
EXTREMES = [0, -1, 1, 2**31, -(2**31), 2**32, 2**62 + 12345, -(2**63), 2**63 - 1]


@triton.jit
def _store_random(  # type: ignore[no-untyped-def]
    seed_ptr, image_ids_ptr, positions_ptr, bits_ptr, uniforms_ptr, noise_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    image_id, position = tl.load(image_ids_ptr + row), tl.load(positions_ptr + row)
    key = row_keys(tl.load(seed_ptr), image_id, position)
    tokens = tl.arange(0, BLOCK)
    bits = random_bits(tokens, key[0], key[1])
    at = row * V + tokens
    tl.store(bits_ptr + at, bits.to(tl.int32, bitcast=True), mask=tokens < V)
    tl.store(uniforms_ptr + at, uniform(bits), mask=tokens < V)
    tl.store(noise_ptr + at, gumbel_log2(bits), mask=tokens < V)


@triton.jit
def _store_noise(words_ptr, noise_ptr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, COUNT)
    words = tl.load(words_ptr + at).to(tl.uint32, bitcast=True)
    tl.store(noise_ptr + at, gumbel_log2(words))


def _in_kernel(keys: DrawKeys) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(keys.image_ids), NUM_TOKENS)
    bits = torch.empty(shape, dtype=torch.int32, device=DEVICE)
    real, noise = torch.empty(2, *shape, device=DEVICE)
    _store_random[(shape[0],)](*keys, bits, real, noise, V=NUM_TOKENS, BLOCK=1024)
    return bits, real, noise * math.log(2)


def _keys(seed: int, image_ids: list[int], positions: list[int]) -> DrawKeys:
    return DrawKeys(*(torch.tensor(part, device=DEVICE) for part in ([seed], image_ids, positions)))


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 3, -(2**63)])
def test_bits_and_uniforms_are_the_same_in_kernel_and_reference(seed: int) -> None:
    keys = _keys(seed, EXTREMES, list(range(len(EXTREMES))))
    bits, real, noise = _in_kernel(keys)
    assert torch.equal(bits, token_bits(keys, NUM_TOKENS))
    assert torch.equal(real, uniforms(keys, NUM_TOKENS))
    torch.testing.assert_close(noise, gumbel_noise(keys, NUM_TOKENS), rtol=0, atol=NOISE_TOLERANCE)


def test_bits_follow_the_written_hash() -> None:
    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    def half_key(start: int, words: list[int]) -> int:
        for word in words:
            start = (mix(start ^ word % 2**32) + 0x9E3779B9) % 2**32
        return start

    seed, image_id, position = -(2**40) + 17, 2**35 + 5, 575
    words = [seed, seed >> 32, image_id, image_id >> 32, position]
    first, second = half_key(0x243F6A88, words), half_key(0x85A308D3, words)
    wanted = [mix((mix(token ^ first) + second) % 2**32) for token in range(NUM_TOKENS)]
    got = token_bits(_keys(seed, [image_id], [position]), NUM_TOKENS)[0]
    assert [bits % 2**32 for bits in got.tolist()] == wanted


def test_each_key_and_each_half_of_it_changes_the_numbers() -> None:
    base = (5, [7], [9])
    others = [(6, [7], [9]), (5 + 2**32, [7], [9]), (5, [8], [9])]
    others += [(5, [7 + 2**32], [9]), (5, [7], [10]), (7, [5], [9]), (5, [9], [7])]
    numbers = token_bits(_keys(*base), NUM_TOKENS)
    for other in others:
        assert (token_bits(_keys(*other), NUM_TOKENS) != numbers).float().mean() > 0.99, other


def test_uniforms_keep_32_bits_towards_zero_and_stay_below_one() -> None:
    extremes = torch.tensor([0, 1, 2, -1, -256], dtype=torch.int32)  # -1 is the largest word
    real = uniforms_of(extremes)
    assert real[:3].tolist() == [2.0**-33, 1.5 * 2.0**-32, 2.5 * 2.0**-32]
    assert real[3:].max() == 1 - 2.0**-24
    noise = -torch.log(-torch.log1p(-real))
    assert noise.isfinite().all()
    assert noise[0] > 22


def test_the_kernel_turns_every_size_of_word_into_its_noise() -> None:
    """Random words almost never reach the tail: 2^-k of them are as small as 2^(32 - k)."""
    words = [0, 2**32 - 1, *(2**power + near for power in range(1, 32) for near in (-1, 0))]
    signed = torch.tensor([word - 2**32 * (word >= 2**31) for word in words], dtype=torch.int32)
    noise = torch.empty(64, device=DEVICE)
    _store_noise[(1,)](signed.to(DEVICE), noise, COUNT=64)
    wanted = -torch.log(-torch.log1p(-uniforms_of(signed).double()))
    assert wanted[0] > 22
    got = noise.cpu().double() * math.log(2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=NOISE_TOLERANCE)


@pytest.mark.parametrize("depth", [6, 12, 18, 21])
def test_the_tail_of_the_noise_has_its_exact_weight(depth: int) -> None:
    """Of all 2^32 words, how many give noise above a depth: noise falls as the word rises."""
    low, high = 0, 2**32 - 1
    while high - low > 1:
        middle = (low + high) // 2
        word = torch.tensor([middle - 2**32 if middle >= 2**31 else middle], dtype=torch.int32)
        noise = -torch.log(-torch.log1p(-uniforms_of(word)))
        low, high = (middle, high) if noise > depth else (low, middle)
    expected = 2.0**32 * -math.expm1(-math.exp(-depth))
    # One word more or less, and the fp32 rounding of a word and of the noise itself.
    assert abs(high - expected) <= 1 + 1e-5 * expected


def uniforms_of(words: Tensor) -> Tensor:
    """What `uniforms` makes of given words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("argrpo.kernels.counter_random.token_bits", lambda keys, size: words[None])
        return uniforms(_keys(0, [0], [0]), len(words))[0]


def test_words_of_many_rows_are_uniform() -> None:
    keys = _keys(11, list(range(256)), [0] * 256)
    words = token_bits(keys, 4096).flatten().long() % 2**32
    for shift in (0, 12, 24):
        counts = torch.bincount((words >> shift) & 255, minlength=256).double()
        expected = len(words) / 256
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        # 255 degrees of freedom: mean 255, standard deviation 22.6; five of them
        assert abs(chi_square - 255) < 113, shift


def test_rows_of_neighbouring_images_positions_and_tokens_are_uncorrelated() -> None:
    rows = 512
    by_image = uniforms(_keys(3, list(range(rows)), [0] * rows), 1024)
    by_position = uniforms(_keys(3, [0] * rows, list(range(rows))), 1024)
    pairs = {
        "image": (by_image[:-1], by_image[1:]),
        "position": (by_position[:-1], by_position[1:]),
        "token": (by_image[:, :-1], by_image[:, 1:]),
        "image and position": (by_image[1:], by_position[1:]),
    }
    for name, (left, right) in pairs.items():
        correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
        # half a million pairs: standard deviation 1.4e-3; five of them
        assert abs(correlation) < 7e-3, name
