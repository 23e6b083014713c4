"""Draw the next token of every image: guidance, temperature, top-k, top-p, Gumbel draw, log-prob.

    h = h_u + s (h_c - h_u)          guidance, mixed on the final-norm hidden states in fp32
    x = (W h) / temperature          one bias-free head product, logits in fp32
    S = top-p of top-k of x          ties at the k-th value are all kept; top-p renormalises first
    token = argmax_{v in S} x_v + g_v,   g_v = -log(-log(1 - u_v))
    logprob = x_token - logsumexp_S x,   entropy = logsumexp_S x - sum_S softmax(x) x

The uniforms u_v are a hash of (seed, image id, position, token id): no generator state, so a draw
does not depend on its slot or on what was drawn before (counter_random.py).

Three ways to one result, chosen by static shape, dtype and `settings.filtered`, never by a value on
the device:

- unfiltered, half precision, up to 64 rows: sample_head.py. 2 launches, no logits in memory.
- unfiltered, more rows or fp32: the library's product to fp32 logits, then sample_rows.py. 3
  launches; a Triton product falls behind the library's as rows grow (FlashSampling, same
  decomposition on an H200: 1.2 times as fast at 64 rows, 0.94 at 128).
- filtered: the same 3 launches; the row kernel keeps its row on chip while it searches.

A row's bits never depend on its batch where Triton makes the product: unfiltered, half precision,
up to 64 rows. Elsewhere the library's product may sum in another order for another number of rows;
from the same logits the row kernel gives the same bits in any batch.

At XL (D = 1,280, V = 16,384, bf16) on 4.3 TB/s and 790 TFLOP/s: 64 rows read 41.9 MB of weight,
9.8 us, and multiply for 3.4 us. 128 rows by the library: 9.8 us, 8.4 MB of logits written and read
3.9 us if they left the L2, and the row kernel.

Source: guidance, Ho and Salimans, arXiv:2207.12598 (our scale is their 1 + w); the Gumbel-max
draw, Maddison et al., arXiv:1411.0030; the order of the filters, FoundationVision/LlamaGen at
ce98ec4, autoregressive/models/generate.py.
"""

import torch
from torch import Tensor

from argrpo.kernels._checks import FLOATS, expect, uses_triton
from argrpo.kernels.counter_random import gumbel_noise
from argrpo.kernels.draw import Draw, DrawKeys, DrawSettings
from argrpo.kernels.guidance import head_logits, mix_branches, mix_hidden
from argrpo.kernels.sample_head import sample_head
from argrpo.kernels.sample_rows import sample_rows
from argrpo.kernels.token_filter import filter_mask, pack_support

_MAX_VOCAB = 65536
# Rows up to which the draw inside the head product wins: one row tile, so the weight is read once.
# To be confirmed by a sweep on a GPU.
_MAX_FUSED_ROWS = 64
_LOG_ZERO = -1e4  # stands for -inf beside a probability of 0: exp of it is 0 in fp32 and fp64


def guided_sample(
    cond: Tensor,
    uncond: Tensor | None,
    head_weight: Tensor,
    keys: DrawKeys,
    settings: DrawSettings,
    *,
    cond_logprobs: bool = False,
    support: bool = False,
) -> Draw:
    """Draw one token a row from final-norm hidden states.

    Args:
        cond: [B, D] hidden states given the condition; bf16, fp16 or fp32, contiguous.
        uncond: [B, D] hidden states of the null condition, or None to draw without guidance.
        head_weight: [V, D], in the dtype of `cond`; V up to 65,536.
        keys: seed, image ids and positions that fix the randomness.
        settings: guidance scale, temperature (0 = greedy), top_k, top_p; read on the device.
        cond_logprobs: also return the log-prob under the conditional branch alone. Costs a second
            head product; the two fp32 products are then mixed instead of the hidden states.
        support: also return the kept set as a bitmask (needs `settings.filtered`).

    Returns:
        A `Draw`; `cond_logprobs` and `support` are None unless asked for. A row without a finite
        logit gives some token in range with log-prob NaN.

    Raises:
        ValueError: a shape, dtype, layout or device is not as above, or support without filters.
    """
    expect("cond", cond, (None, None), FLOATS)
    expect("head_weight", head_weight, (None, cond.shape[1]), (cond.dtype,))
    if uncond is not None:
        expect("uncond", uncond, tuple(cond.shape), (cond.dtype,))
    _check_draw("cond", cond, len(head_weight), keys, settings, support)
    if not uses_triton(cond):
        return guided_sample_reference(
            cond, uncond, head_weight, keys, settings, cond_logprobs=cond_logprobs, support=support
        )
    is_half = cond.dtype != torch.float32
    if not settings.filtered and is_half and len(cond) <= _MAX_FUSED_ROWS:
        return sample_head(cond, uncond, head_weight, keys, settings, cond_logprobs=cond_logprobs)
    logits, uncond_logits = _branch_logits(cond, uncond, head_weight, settings, cond_logprobs)
    return sample_rows(
        logits, uncond_logits, keys, settings, cond_logprobs=cond_logprobs, support=support
    )


def guided_sample_reference(
    cond: Tensor,
    uncond: Tensor | None,
    head_weight: Tensor,
    keys: DrawKeys,
    settings: DrawSettings,
    *,
    cond_logprobs: bool = False,
    support: bool = False,
) -> Draw:
    """The specification of `guided_sample`, in plain PyTorch."""
    scale, temperature = settings.scalars[:2]
    if not cond_logprobs:
        hidden = cond if uncond is None else mix_hidden(cond, uncond, scale)
        logits = head_logits(hidden, head_weight)
        return sample_logits_reference(logits, keys, settings, support=support)
    cond_logits = head_logits(cond, head_weight)
    logits = cond_logits
    if uncond is not None:
        uncond_logits = head_logits(uncond, head_weight)
        logits = uncond_logits + scale * (cond_logits - uncond_logits)
    draw = sample_logits_reference(logits, keys, settings, support=support)
    scaled = cond_logits / torch.where(temperature > 0, temperature, 1.0)
    chosen = torch.log_softmax(scaled, dim=1).gather(1, draw.token_ids[:, None]).squeeze(1)
    return draw._replace(cond_logprobs=_certain_if(temperature <= 0, chosen))


def sample_logits(
    logits: Tensor, keys: DrawKeys, settings: DrawSettings, *, support: bool = False
) -> Draw:
    """Draw one token a row from given logits (guidance already mixed).

    Args:
        logits: [B, V] fp32, contiguous, before temperature and filters; V up to 65,536.
        keys: seed, image ids and positions that fix the randomness.
        settings: temperature (0 = greedy), top_k, top_p; the guidance scale is not used.
        support: also return the kept set as a bitmask (needs `settings.filtered`).

    Returns:
        A `Draw` without `cond_logprobs`. A row without a finite logit gives some token in range
        with log-prob NaN.

    Raises:
        ValueError: a shape, dtype, layout or device is not as above, or support without filters.
    """
    expect("logits", logits, (None, None), (torch.float32,))
    _check_draw("logits", logits, logits.shape[1], keys, settings, support)
    if not uses_triton(logits):
        return sample_logits_reference(logits, keys, settings, support=support)
    return sample_rows(logits, None, keys, settings, support=support)


def sample_logits_reference(
    logits: Tensor, keys: DrawKeys, settings: DrawSettings, *, support: bool = False
) -> Draw:
    """The specification of `sample_logits`, in plain PyTorch (fp32, or fp64 in tests)."""
    _, temperature, top_k, top_p = settings.scalars.unbind()
    # Greedy draws divide by 1 and add no noise: the arg max itself, with log-prob and entropy 0.
    greedy = temperature <= 0
    divisor = torch.where(greedy, 1.0, temperature)
    scaled = logits / divisor
    kept = None
    if settings.filtered:
        kept = filter_mask(logits, top_k, top_p, divisor)
        scaled.masked_fill_(~kept, -torch.inf)
    log_probs = torch.log_softmax(scaled, dim=1)
    noise = gumbel_noise(keys, logits.shape[1]).mul_(~greedy)
    token_ids = scaled.add_(noise).argmax(dim=1)
    logprobs = log_probs.gather(1, token_ids[:, None]).squeeze(1)
    entropies = -log_probs.exp().mul_(log_probs.clamp_(min=_LOG_ZERO)).sum(dim=1)
    return Draw(
        token_ids,
        _certain_if(greedy, logprobs),
        _certain_if(greedy, entropies),
        None,
        pack_support(kept) if support and kept is not None else None,
    )


def _branch_logits(
    cond: Tensor,
    uncond: Tensor | None,
    head_weight: Tensor,
    settings: DrawSettings,
    cond_logprobs: bool,
) -> tuple[Tensor, Tensor | None]:
    """What the row kernel reads: mixed logits, or those of both branches for it to mix."""
    if uncond is None:
        return head_logits(cond, head_weight), None
    if not cond_logprobs:
        return head_logits(mix_branches(cond, uncond, settings.scalars), head_weight), None
    # One product of both branches reads the weight once.
    pair = head_logits(torch.cat([cond, uncond]), head_weight)
    return pair[: len(cond)], pair[len(cond) :]


def _certain_if(greedy: Tensor, scores: Tensor) -> Tensor:
    """0 for a greedy draw, but NaN stays NaN: it says that the logits are broken."""
    return scores.masked_fill(greedy & ~scores.isnan(), 0.0)


def _check_draw(
    name: str,
    rows: Tensor,
    vocab_size: int,
    keys: DrawKeys,
    settings: DrawSettings,
    support: bool,
) -> None:
    """Refuse what both ops refuse; `rows` are the first argument of either, called `name`."""
    if not len(rows) or not rows.shape[1]:
        raise ValueError(f"{name}: expected at least 1 row and column, got {list(rows.shape)}")
    if not 1 <= vocab_size <= _MAX_VOCAB:
        raise ValueError(f"vocabulary: expected 1 to {_MAX_VOCAB} tokens, got {vocab_size}")
    per_row = (len(rows),)
    wanted = {
        "keys.seed": (keys.seed, (1,), torch.int64),
        "keys.image_ids": (keys.image_ids, per_row, torch.int64),
        "keys.positions": (keys.positions, per_row, torch.int64),
        "settings.scalars": (settings.scalars, (4,), torch.float32),
    }
    for label, (tensor, shape, dtype) in wanted.items():
        expect(label, tensor, shape, (dtype,))
        if tensor.device != rows.device:
            raise ValueError(f"{label}: expected a tensor on {rows.device}, got {tensor.device}")
    if support and not settings.filtered:
        raise ValueError("support: expected settings.filtered, got an unfiltered draw")
