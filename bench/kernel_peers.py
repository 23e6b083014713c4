"""Peers that are packages of their own: used where installed, else a `PeerMissingError`.

Written against liger-kernel 0.8.5 (on a CPU its fused GRPO loss has the gradients of the formula),
cut-cross-entropy 25.1.1, and the documentation of flash-attn, xformers and FlashInfer. The
interfaces of others move: what fails is a printed line.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from kernel_cases import Outputs, PeerMissingError
from timing import Call
from torch import Tensor


def installed(package: str, module: str, name: str) -> Any:
    """A name out of a package.

    Raises:
        PeerMissingError: it is not installed, or not with that name.
    """
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PeerMissingError(f"{package}: {error}") from error


def liger_layer(op: str, eps: float) -> Callable[..., Any]:
    """liger-kernel's form of an op of cases_layers.py; takes what ours takes."""

    def function(name: str) -> Any:
        return installed("liger-kernel", "liger_kernel.ops", name)

    # in_place would write the gradient over the one given, which is used again.
    if op == "rmsnorm":
        norm = function("LigerRMSNormFunction")
        return lambda x, weight: norm.apply(x, weight, eps, 0.0, "llama", False)
    if op == "rmsnorm_residual":
        add_norm = function("LigerFusedAddRMSNormFunction")
        return lambda x, residual, weight: add_norm.apply(
            x, residual, weight, eps, 0.0, "llama", False
        )
    if op == "swiglu":
        gate = function("LigerFusedGateUpSiLUMulFunction")
        return lambda gate_up: gate.apply(gate_up[0])[None]  # its gradient has two dimensions
    if op == "layernorm":
        layer_norm = function("LigerLayerNormFunction")
        return lambda x, weight, bias: layer_norm.apply(x, weight, bias, eps)
    raise PeerMissingError(f"liger-kernel: has no {op}")


def liger_cross_entropy(
    hidden: Tensor, head_weight: Tensor, token_ids: Tensor
) -> Callable[[], Outputs]:
    """Its fused linear cross entropy: the sum of -log-prob and both gradients."""
    loss_type = installed(
        "liger-kernel", "liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"
    )
    loss = loss_type(reduction="sum", accum_dtype=torch.float32)

    def call() -> Outputs:
        leaves = [tensor.detach().requires_grad_() for tensor in (head_weight, hidden)]
        total = loss(*leaves, token_ids)
        dweight, dhidden = torch.autograd.grad(total, leaves)
        return None, None, -dhidden, -dweight

    return call


def liger_grpo(
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    token_ids: Tensor,
    advantages: Tensor,
    beta: float,
) -> Call:
    """Its fused linear GRPO loss with a reference model: hidden states [N, T, D] and head each."""
    loss_type = installed("liger-kernel", "liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    # Compiled is its default; what it compiles would compete with the capture.
    loss = loss_type(beta=beta, loss_type="grpo", use_ref_model=True, compiled=False)
    mask = torch.ones_like(token_ids)

    def call() -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in policy]
        total, _metrics = loss(
            *leaves,
            token_ids,
            mask,
            advantages,
            ref_input=reference[0],
            ref_weight=reference[1],
        )
        return torch.autograd.grad(total, leaves)

    return call


def cut_cross_entropy(
    hidden: Tensor, head_weight: Tensor, token_ids: Tensor, dlogprobs: Tensor | None
) -> Callable[[], Outputs]:
    """Exact: without its filter, which drops every gradient below 2^-12 and so most of an image's.

    Args:
        hidden, head_weight, token_ids: as in `token_logprobs`.
        dlogprobs: [M] gradient of each log-prob; None for the forward pass alone.
    """
    loss = installed("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")

    def call() -> Outputs:
        if dlogprobs is None:
            return (-loss(hidden, head_weight, token_ids, reduction="none", filter_eps=None),)
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, head_weight)]
        losses = loss(*leaves, token_ids, reduction="none", filter_eps=None)
        gradients = torch.autograd.grad(losses, leaves, -dlogprobs.to(losses.dtype))
        return -losses.detach(), None, *gradients

    return call


def flashinfer_draw(
    logits_of: Callable[[], Tensor], top_k: int, top_p: float
) -> Callable[[], tuple[Tensor, None, None]]:
    """Its sampler on logits [B, V] that `logits_of` makes; token ids alone."""
    module = "flashinfer.sampling"
    if top_k == 0 and top_p == 1.0:
        draw = installed("flashinfer", module, "sampling_from_logits")
        return lambda: (draw(logits_of()).long(), None, None)
    filtered = installed("flashinfer", module, "top_k_top_p_sampling_from_logits")

    def call() -> tuple[Tensor, None, None]:
        logits = logits_of()
        drawn = filtered(logits, top_k or logits.shape[1], top_p, filter_apply_order="top_k_first")
        return drawn.long(), None, None

    return call


def flash_attn_decode(
    step: tuple[Tensor, Tensor, Tensor],
    rotary: Tensor,
    cache: tuple[Tensor, Tensor],
    positions: Tensor,
    scale: float,
) -> Call:
    """flash-attn's decode over a contiguous cache: rotates, writes and attends, as ours does.

    Args:
        step: q, k and v of this step, [B, H, D] each.
        rotary: [positions, D / 2, 2] cosines and sines.
        cache: keys and values [B, positions, H, D].
        positions: [B] int64, of this step.
        scale: of the scores.
    """
    attend = installed("flash-attn", "flash_attn", "flash_attn_with_kvcache")
    q, k, v = (tensor[:, None].contiguous() for tensor in step)
    cos, sin = (table.contiguous().to(q.dtype) for table in rotary.unbind(-1))
    lengths = positions.int()
    return lambda: (
        attend(
            q, *cache, k=k, v=v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths,
            softmax_scale=scale, rotary_interleaved=True,
        )[:, 0],
    )  # fmt: skip


def xformers_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Callable[[], Outputs]:
    """xformers' attention of one query; [B, H, 1, D] and [B, H, positions, D]."""
    attend = installed("xformers", "xformers.ops", "memory_efficient_attention")
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, keys, values))
    return lambda: (attend(q, k, v, scale=scale)[:, 0],)


def flashinfer_decode(
    query: Tensor, pages: tuple[Tensor, Tensor], block_table: Tensor, num_keys: int, scale: float
) -> Callable[[], Outputs]:
    """FlashInfer's paged decode on our own pages; the plan is made beforehand and not timed.

    Args:
        query: [B, H, D], rotated.
        pages: keys and values [num_pages, H, page_size, D].
        block_table: [B, N] int32, every entry of which is in use.
        num_keys: that every sequence sees.
        scale: of the scores.
    """
    wrapper_type = installed("flashinfer", "flashinfer", "BatchDecodeWithPagedKVCacheWrapper")
    batch, num_pages = block_table.shape
    _, num_heads, page_size, head_dim = pages[0].shape
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
    wrapper = wrapper_type(workspace, "HND")
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * num_pages
    last = torch.full((batch,), (num_keys - 1) % page_size + 1, dtype=torch.int32)
    wrapper.plan(
        starts,
        block_table.flatten(),
        last.to(query.device),
        num_heads,
        num_heads,
        head_dim,
        page_size,
        q_data_type=query.dtype,
        kv_data_type=query.dtype,
        sm_scale=scale,
    )
    return lambda: (wrapper.run(query, pages),)
