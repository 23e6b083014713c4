"""Cases of one decode step's attention. B sequences, H heads, D head size, S keys.

The pages of a sequence are scattered over the pool; both branches of every image take part. A class
is a prefix of one position whose key is 0: ours takes it as an aggregate, as the engine gives it,
peers as a key like any other; the largest case of the first policy is also measured without. Peers
over a contiguous cache of the same rows (rotated, this step's key in place) do less: no rotation,
no write, no look-up of pages; the row says so.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from kernel_cases import (
    MODELS,
    OURS,
    Case,
    Contender,
    Expected,
    Grid,
    Outputs,
    PeerMissingError,
    Place,
    bound,
    numeric_error,
)
from kernel_peers import flash_attn_decode, flashinfer_decode, installed, xformers_attention
from timing import Call, Work
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from argrpo.kernels.kv_pages import KeyValuePages, PrefixAggregate, padded_head_dim
from argrpo.kernels.paged_attention import paged_decode_attention, paged_decode_attention_reference

PAGE_SIZE = 64
ROTARY_BASE = 10000.0
LESS = "no rotation, no write of this step's key and value, a contiguous cache"
# FlexAttention compiles for half a minute: at these sizes only.
FLEX_IMAGES, FLEX_LENGTHS = 64, (128, 576)


class AttentionInputs(NamedTuple):
    """One layer of one step, twice: as our op takes it, and as a contiguous cache."""

    step: tuple[Tensor, Tensor, Tensor]  # q, k and v [B, H, D], before rotation
    rotary: Tensor  # [S, D / 2, 2]
    positions: Tensor  # [B] int64, S - 1
    pages: KeyValuePages
    block_table: Tensor  # [B, N] int32
    prefix: PrefixAggregate | None  # of one position
    query: Tensor  # [B, H, 1, padded D], rotated
    keys: Tensor  # [B, H, S, padded D], rotated, this step's included; the prefix before them
    values: Tensor


def cases(place: Place, grid: Grid) -> Iterator[Case]:
    for model in grid.models:
        for images in grid.images:
            for length in grid.lengths:
                yield _case(place, model, images, length, has_prefix=True)
    largest = sorted(itertools.product(grid.models[:1], grid.images, grid.lengths))[-1:]
    for model, images, length in largest:
        yield _case(place, model, images, length, has_prefix=False)


def _case(place: Place, model: str, images: int, length: int, *, has_prefix: bool) -> Case:
    sizes = MODELS[model]
    batch, values = 2 * images, sizes.num_heads * sizes.head_dim
    # Both caches but for this step's rows, which are written; q, k, v and the output.
    num_bytes = 2 * batch * values * (length + 2) * place.itemsize
    if has_prefix:
        num_bytes += 4 * batch * values
    scale = sizes.head_dim**-0.5
    return Case(
        "paged_decode_attention",
        {
            "model": model,
            "images": images,
            "sequences": batch,
            "keys": length,
            "prefix": "aggregate" if has_prefix else "none",
        },
        Work(num_bytes, 4 * batch * values * length),
        partial(_make, place, model, batch, length, has_prefix),
        partial(_expect, sizes.head_dim),
        [
            Contender(OURS, bound(_ours), numeric_error, allowed=1.0),
            *_peers(scale, images == FLEX_IMAGES and length in FLEX_LENGTHS),
        ],
    )


def _make(place: Place, model: str, batch: int, length: int, has_prefix: bool) -> AttentionInputs:
    sizes, device = MODELS[model], place.device
    heads, head_dim = sizes.num_heads, sizes.head_dim
    num_pages = -(-length // PAGE_SIZE)
    shape = (batch * num_pages, heads, PAGE_SIZE, padded_head_dim(head_dim))
    pages = KeyValuePages(place.normal(*shape), place.normal(*shape))
    for side in pages:
        side[..., head_dim:] = 0
    order = torch.randperm(batch * num_pages, device=device, generator=place.generator)
    table = order.view(batch, num_pages).int()
    q, k, v = (place.normal(batch, heads, head_dim) for _ in range(3))
    positions = torch.full((batch,), length - 1, device=device)
    rotary = _rotary(length, head_dim, device)
    query = _padded(_rotated(q, rotary[-1]))[:, :, None]
    paged_decode_attention_reference(q, k, v, rotary, positions, pages, table)  # stores k and v
    keys, values = (
        side[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()
        for side in pages
    )
    prefix = None
    if has_prefix:
        sums = place.normal(batch, heads, head_dim)
        ones, index = torch.ones(batch, device=device), torch.arange(batch, device=device)
        prefix = PrefixAggregate(sums.float(), ones, index)
        keys = F.pad(keys, (0, 0, 1, 0))
        values = torch.cat([_padded(sums)[:, :, None], values], dim=2)
    return AttentionInputs((q, k, v), rotary, positions, pages, table, prefix, query, keys, values)


def _expect(head_dim: int, inputs: AttentionInputs) -> Expected:
    """From the contiguous cache, so that the pages are not judged by themselves."""
    wide = torch.float64 if inputs.query.dtype == torch.float32 else torch.float32

    def attend(dtype: torch.dtype) -> Outputs:
        query, keys, values = (
            side.to(dtype) for side in (inputs.query, inputs.keys, inputs.values)
        )
        weights = (query @ keys.mT / math.sqrt(head_dim)).softmax(dim=-1)
        return ((weights @ values)[:, :, 0, :head_dim],)

    return Expected(attend(wide), attend(inputs.query.dtype))


def _ours(inputs: AttentionInputs) -> Outputs:
    return (
        paged_decode_attention(
            *inputs.step,
            inputs.rotary,
            inputs.positions,
            inputs.pages,
            inputs.block_table,
            inputs.prefix,
        ),
    )


def _peers(scale: float, has_flex: bool) -> list[Contender]:
    def peer(name: str, bind: Callable[[AttentionInputs], Call], does: str = LESS) -> Contender:
        return Contender(name, bind, numeric_error, does)

    def flash_attn(inputs: AttentionInputs) -> Call:
        keys, values = (
            side[..., : inputs.step[0].shape[2]].transpose(1, 2).contiguous()
            for side in (inputs.keys, inputs.values)
        )
        # A prefix among the keys: every position is one further.
        before = inputs.keys.shape[2] - len(inputs.rotary)
        rotary = F.pad(inputs.rotary, (0, 0, 0, 0, before, 0))
        return flash_attn_decode(
            inputs.step, rotary, (keys, values), inputs.positions + before, scale
        )

    def flashinfer(inputs: AttentionInputs) -> Call:
        if inputs.prefix is not None:
            raise PeerMissingError("flashinfer: its pages have no prefix that is an aggregate")
        query, num_keys = inputs.query[:, :, 0].contiguous(), inputs.keys.shape[2]
        return _cut(
            flashinfer_decode(query, inputs.pages, inputs.block_table, num_keys, scale), inputs
        )

    def xformers(inputs: AttentionInputs) -> Call:
        return _cut(xformers_attention(inputs.query, inputs.keys, inputs.values, scale), inputs)

    found = [
        peer("sdpa flash", partial(_sdpa, SDPBackend.FLASH_ATTENTION, scale)),
        peer("sdpa cudnn", partial(_sdpa, SDPBackend.CUDNN_ATTENTION, scale)),
        peer("sdpa efficient", partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION, scale)),
        peer("torch eager", partial(_sdpa, SDPBackend.MATH, scale)),
        peer("flash-attn", flash_attn, "the same, but a contiguous cache"),
        peer("flashinfer", flashinfer, "the same pages; no rotation, no write"),
        peer("xformers", xformers),
    ]
    return [*found, peer("flex attention", partial(_flex, scale))] if has_flex else found


def _sdpa(backend: SDPBackend, scale: float, inputs: AttentionInputs) -> Call:
    if inputs.query.device.type == "cpu" and backend in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):
        raise PeerMissingError(f"{backend.name.lower()}: has no CPU form")

    def call() -> Outputs:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                inputs.query, inputs.keys, inputs.values, scale=scale
            )
        return (out[:, :, 0],)

    return _cut(call, inputs)


def _flex(scale: float, inputs: AttentionInputs) -> Call:
    """One query a sequence: its decode kernel. Compiled at the first call, which is not timed."""
    if inputs.query.device.type == "cpu":
        raise PeerMissingError("flex attention: measured on a GPU only")
    flex = installed("flex attention", "torch.nn.attention.flex_attention", "flex_attention")
    attend = torch.compile(flex, dynamic=False)
    return _cut(
        lambda: (attend(inputs.query, inputs.keys, inputs.values, scale=scale)[:, :, 0],), inputs
    )


def _cut(call: Callable[[], Outputs], inputs: AttentionInputs) -> Call:
    """Without the padding of a head; a view, so it costs nothing on the device."""
    head_dim = inputs.step[0].shape[2]

    def without_padding() -> Outputs:
        (out,) = call()
        assert out is not None
        return (out[..., :head_dim],)

    return without_padding


def _rotary(length: int, head_dim: int, device: torch.device) -> Tensor:
    """[S, D / 2, 2] cosines and sines, of a 1-D embedding: only the sizes matter here."""
    rates = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """[B, H, D] by [D / 2, 2] -> [B, H, D] in the dtype of x."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, padded_head_dim(x.shape[-1]) - x.shape[-1]))
