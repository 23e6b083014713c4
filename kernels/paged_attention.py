"""Attention of one new token a sequence against its pages of keys and values, in one launch.

    q, k   = rotate(q), rotate(k)                  interleaved pairs, row `position` of the table
    pages[position] = k, v                         this step's row of the cache
    out    = softmax(q K^T / sqrt(D)) V            over positions 0 to `position`

A prefix whose keys are exactly 0 (LlamaGen's: its rotary rows are 0) scores 0 everywhere, so that
it enters as (sum of V, count) alone: 120 text tokens cost one vector and no pages. Several
sequences name one such aggregate by its index. Any other prefix is ordinary keys on earlier pages;
sequences that share it name the same full pages in their block tables.

Scores, softmax and sums in fp32; the rotated q and k are rounded to their dtype first, as a
training forward rounds them, and this step's k and v are used as the cache stores them.

One program a sequence and query head, never a split of a sequence: 8 guided images are 192 to 320
of them on 132 multiprocessors, and a second launch would cost more than an even spread gains.
paged_decode.py has the kernel and that arithmetic: 128 guided images of XL at 128 positions are
170 MB and 40 us at 4.3 TB/s. kv_pages.py has the layout of the cache.

Sources: the online softmax, Milakov and Gimelshein, arXiv:1805.02867; pages, Kwon et al.,
arXiv:2309.06180; rotary embedding, Su et al., arXiv:2104.09864, in the interleaved form of
FoundationVision/LlamaGen at ce98ec4, gpt.py apply_rotary_emb.
"""

import math

import torch
from torch import Tensor

from argrpo.kernels._checks import uses_triton
from argrpo.kernels.kv_pages import (
    KeyValuePages,
    PrefixAggregate,
    check_cache,
    check_step,
    store_positions,
)
from argrpo.kernels.paged_decode import launch_paged_decode


def paged_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Tensor | None,
    positions: Tensor,
    pages: KeyValuePages,
    block_table: Tensor,
    prefix: PrefixAggregate | None = None,
) -> Tensor:
    """Rotate, store this step's k and v in their page, and attend. Writes into `pages`.

    The views of a packed product [B, 3, H, D] will do: `q, k, v = qkv.unbind(1)`.

    Args:
        q: [B, H, D] bf16, fp16 or fp32, before rotation; the last dimension without gaps.
        k: [B, Hkv, D], H a multiple of Hkv; dtype of q.
        v: [B, Hkv, D]; dtype of q.
        rotary: [positions, D / 2, 2] fp32 cosines and sines, row p for position p; None for a
            model without rotary embedding.
        positions: [B] int64 or int32, this token's place in its sequence, counted without a
            collapsed prefix. Below 0: an idle row, which stores nothing and gives zeros.
        pages: the cache of this layer; no two sequences of a call may store into one page.
        block_table: [B, N] int32; entry i is the page of positions i x page_size and on. Entries
            past position / page_size are not read.
        prefix: where given, a prefix of zero keys before position 0.

    Returns:
        [B, H, D] in the dtype of q. Not differentiable.

    Raises:
        ValueError: a shape, dtype or layout is not as above, D is odd or above 128, or the page
            size is not 16, 32, 64 or 128.
    """
    check_step(q, k, v, rotary, positions)
    check_cache(q, k, pages, block_table, prefix)
    if not uses_triton(q):
        return paged_decode_attention_reference(
            q, k, v, rotary, positions, pages, block_table, prefix
        )
    return launch_paged_decode(q, k, v, rotary, positions, pages, block_table, prefix)


def paged_decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Tensor | None,
    positions: Tensor,
    pages: KeyValuePages,
    block_table: Tensor,
    prefix: PrefixAggregate | None = None,
) -> Tensor:
    """The specification, in plain PyTorch; in fp64 where q is."""
    wide = torch.promote_types(q.dtype, torch.float32)
    head_dim, group = q.shape[2], q.shape[1] // k.shape[1]
    places = positions.clamp(min=0).long()
    if rotary is not None:
        q, k = _rotated_reference(q, rotary[places]), _rotated_reference(k, rotary[places])
    busy = positions >= 0
    rows = block_table[busy].long(), places[busy, None]
    store_positions(pages, *rows, k[busy, None], v[busy, None])

    page_size, num_pages = pages.keys.shape[2], block_table.shape[1]
    seen = torch.arange(num_pages * page_size, device=q.device) <= positions[:, None]
    table = block_table.long() * seen[:, ::page_size]
    # [B, N, Hkv, page, D] -> [B, Hkv, 1, positions, D]
    gathered = [side[table].transpose(1, 2).flatten(2, 3) for side in pages]
    keys, values = (side[..., :head_dim].unsqueeze(2).to(wide) for side in gathered)
    seen = seen[:, None, None, :, None]
    keys, values = keys.masked_fill(~seen, 0), values.masked_fill(~seen, 0)

    queries = q.unflatten(1, (-1, group)).to(wide) / math.sqrt(head_dim)
    scores = (keys @ queries.unsqueeze(-1)).masked_fill(~seen, -torch.inf)
    top = scores.amax(dim=3, keepdim=True)
    if prefix is not None:
        count = prefix.counts[prefix.index].to(wide).view(-1, 1, 1, 1, 1)
        top = torch.where(count > 0, top.clamp(min=0), top)
    weights = (scores - top).exp()
    total, out = weights.sum(dim=3), (weights * values).sum(dim=3)
    if prefix is not None:
        zero = torch.where(count > 0, (-top).exp(), 0.0).squeeze(3)
        total = total + count.squeeze(3) * zero
        out = out + prefix.value_sums[prefix.index].unsqueeze(2).to(wide) * zero
    out = (out / total).flatten(1, 2).to(q.dtype)
    return torch.where(busy[:, None, None], out, torch.zeros_like(out))


def _rotated_reference(x: Tensor, angles: Tensor) -> Tensor:
    """[B, H, D] by [B, D / 2, 2] -> [B, H, D] in the dtype of x."""
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.to(even.dtype)[:, None].unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
