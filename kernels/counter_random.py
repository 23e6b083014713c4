"""Random numbers as a function of (seed, image id, position, token id): no generator state.

    key   = two 32-bit words, each folded from the halves of seed and image id and the position
    bits  = mix(mix(token ^ key_0) + key_1)
    u     = (bits + 1/2) / 2^32          fp32, so 32-bit resolution towards 0
    noise = -log(-log(1 - u))            standard Gumbel; its large values come from u near 0

A number depends neither on the slot nor on the batch that it is drawn in, nor on what was drawn
before, and a replayed CUDA graph draws anew when the position on the device has moved. Reference
and kernels agree bit for bit up to u; the logarithms differ by rounding.

A token costs two mixes and two logarithms: 18 integer and 16 floating-point instructions.

Source: the 32-bit mixer is "lowbias32" of C. Wellons; Gumbel-max draws, Maddison et al.,
arXiv:1411.0030.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from argrpo.kernels.draw import DrawKeys

_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B
_GOLDEN = 0x9E3779B9
_STREAMS = (0x243F6A88, 0x85A308D3)  # first digits of pi: one start value per half of a row's key
_U_MAX = 1.0 - 2.0**-24  # the largest fp32 below 1; keeps log(1 - u) finite

_MIX_1_C = tl.constexpr(_MIX_1)
_MIX_2_C = tl.constexpr(_MIX_2)
_GOLDEN_C = tl.constexpr(_GOLDEN)
_STREAM_0_C = tl.constexpr(_STREAMS[0])
_STREAM_1_C = tl.constexpr(_STREAMS[1])
_U_MAX_C = tl.constexpr(_U_MAX)
_LN_2_C = tl.constexpr(math.log(2.0))
# The interpreter knows no function of the device library.
_INTERPRETED_C = tl.constexpr(bool(triton.knobs.runtime.interpret))


def gumbel_noise(keys: DrawKeys, vocab_size: int) -> Tensor:
    """[B, V] fp32 standard Gumbel noise, a function of the keys and the token id alone."""
    noise = uniforms(keys, vocab_size).neg_().log1p_().neg_()  # exponential
    return noise.log_().neg_()


def uniforms(keys: DrawKeys, vocab_size: int) -> Tensor:
    """[B, V] fp32 uniforms in [2^-33, 1 - 2^-24], with 32-bit resolution towards 0."""
    bits = token_bits(keys, vocab_size).view(torch.uint32).to(torch.float32)
    return bits.mul_(2.0**-32).add_(2.0**-33).clamp_(max=_U_MAX)


def token_bits(keys: DrawKeys, vocab_size: int) -> Tensor:
    """[B, V] int32 holding the 32 random bits of every token."""
    key_0, key_1 = _row_keys(keys).unsqueeze(2)
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=key_0.device)
    return _mix_(_mix_(tokens ^ key_0).add_(key_1))


def _row_keys(keys: DrawKeys) -> Tensor:
    """[2, B] int32: seed, image id and position folded into 32 bits, one word after another."""
    words = (
        keys.seed,
        keys.seed >> 32,
        keys.image_ids,
        keys.image_ids >> 32,
        keys.positions,
    )
    starts = torch.tensor([_signed(start) for start in _STREAMS], device=keys.image_ids.device)
    key = starts.to(torch.int32)[:, None].expand(2, len(keys.image_ids))
    for word in words:
        key = _mix_(key ^ _low_32(word)).add_(_signed(_GOLDEN))
    return key


def _low_32(word: Tensor) -> Tensor:
    """The low half of int64 as int32. Through the sign-extended value: the cast must not clip."""
    return ((word << 32) >> 32).to(torch.int32)


def _mix_(x: Tensor) -> Tensor:
    """A bijective 32-bit mixer on int32: multiplications wrap, shifts are made logical by masks."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _signed(_MIX_1)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(_MIX_2)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _signed(word: int) -> int:
    """A 32-bit constant as the int32 with the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


@triton.jit
def row_keys(seed, image_id, position):
    """Both halves of a row's key as uint32, from int64 scalars or blocks of rows."""
    return (
        _row_key(_STREAM_0_C, seed, image_id, position),
        _row_key(_STREAM_1_C, seed, image_id, position),
    )


@triton.jit
def _row_key(START: tl.constexpr, seed, image_id, position):
    key = _mix(seed.to(tl.uint32) ^ START) + _GOLDEN_C
    key = _mix((seed >> 32).to(tl.uint32) ^ key) + _GOLDEN_C
    key = _mix(image_id.to(tl.uint32) ^ key) + _GOLDEN_C
    key = _mix((image_id >> 32).to(tl.uint32) ^ key) + _GOLDEN_C
    return _mix(position.to(tl.uint32) ^ key) + _GOLDEN_C


@triton.jit
def random_bits(tokens, key_0, key_1):
    """The 32 random bits of each token, uint32. `tokens`: non-negative int32."""
    return _mix(_mix(tokens.to(tl.uint32) ^ key_0) + key_1)


@triton.jit
def uniform(bits):
    """fp32 in [2^-33, 1 - 2^-24]."""
    return tl.minimum(bits.to(tl.float32) * 2.0**-32 + 2.0**-33, _U_MAX_C)


@triton.jit
def gumbel_log2(bits):
    """Standard Gumbel noise over ln 2, fp32: what one adds to logits over ln 2."""
    u = uniform(bits)
    # 1 - u loses the low bits of a small u, which is where the large noise is: a series there.
    tail = 1 / 4 + u * (1 / 5 + u * (1 / 6 + u * (1 / 7)))
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * tail)))
    exponential = tl.where(u < 1 / 8, series, -_LN_2_C * fast_log2(1.0 - u))
    return -fast_log2(exponential)


@triton.jit
def fast_log2(x):
    """log2 of positive normal fp32 in one instruction, to 2^-22 absolute or relative."""
    if _INTERPRETED_C:
        return tl.log2(x)
    return libdevice.fast_log2f(x)


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= _MIX_1_C
    x ^= x >> 15
    x *= _MIX_2_C
    x ^= x >> 16
    return x
