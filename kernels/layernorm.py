"""Layer norm with bias, alone or with the residual add before it, for GPT-2-style policies.

    s = x + residual
    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

Arithmetic in fp32; s is rounded to the dtype of x, y once at the end, as PyTorch's layer_norm
rounds. The variance is the mean square distance to the mean, from registers: no cancellation.

Programs, stretches of rows and the fixed order of dweight and dbias are those of rmsnorm.py. Bytes
in bf16, R rows of D: forward 4 R D, with the residual 8 R D; backward 6 R D, 8 R D with a gradient
of s. A taming transformer (D 1536) with the residual, 16,384 rows: 201 MB forward, 47 us at
4.3 TB/s, backward the same and 6 MB of parts; a decode step of 64 rows is a launch.
There is no product: some 8 FLOPs an element forward and 14 backward, 0.2 and 0.35 GFLOP, hide
behind the bytes.

Source: Ba, Kiros and Hinton, arXiv:1607.06450, equation 3.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from argrpo.kernels._checks import FLOATS, expect, uses_triton
from argrpo.kernels.rmsnorm import MAX_WIDTH, row_block

_STRETCHES = 512  # as in rmsnorm.py


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension. Differentiable in all three tensors.

    Args:
        x: [..., D] bf16, fp16 or fp32, contiguous.
        weight: [D], in the dtype of x.
        bias: [D], in the dtype of x.
        eps: added to the variance, e.g. 1e-5.

    Returns:
        [..., D] in the dtype of x.

    Raises:
        ValueError: a shape, dtype or layout is not as above.
    """
    _check(x, weight, bias)
    if not uses_triton(x):
        return layernorm_reference(x, weight, bias, eps)
    return _LayerNorm.apply(x, None, weight, bias, eps)[0]


def layernorm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add, then normalise the sum. Differentiable in all four tensors.

    Args:
        x: [..., D] bf16, fp16 or fp32, contiguous: what a block adds to the residual stream.
        residual: as x: the stream before it.
        weight: [D], in the dtype of x.
        bias: [D], in the dtype of x.
        eps: added to the variance.

    Returns:
        The normalised sum and the sum itself (the stream from here on), both as x.

    Raises:
        ValueError: a shape, dtype or layout is not as above.
    """
    _check(x, weight, bias)
    expect("residual", residual, tuple(x.shape), (x.dtype,))
    if not uses_triton(x):
        return layernorm_residual_reference(x, residual, weight, bias, eps)
    return _LayerNorm.apply(x, residual, weight, bias, eps)


def layernorm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The specification, in plain PyTorch; in fp64 where x is."""
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def layernorm_residual_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch."""
    total = x + residual
    return layernorm_reference(total, weight, bias, eps), total


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    expect("x", x, (None,) * max(x.dim(), 1), FLOATS)
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x: expected rows of 1 to {MAX_WIDTH} values, got {x.shape[-1]}")
    expect("weight", weight, (x.shape[-1],), (x.dtype,))
    expect("bias", bias, (x.shape[-1],), (x.dtype,))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        rows = x.numel() // x.shape[-1]
        y = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        moments = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        if rows:
            out = None if residual is None else total
            _layernorm_fwd[(rows,)](
                x, residual, weight, bias, y, out, *moments, eps, **row_block(x.shape[-1])
            )
        ctx.save_for_backward(total, weight, moments)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        return y, None if residual is None else total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dtotal: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        total, weight, moments = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal if ctx.has_residual else None, None, None, None
        rows, width = moments.shape[1], len(weight)
        stretch = max(triton.cdiv(rows, _STRETCHES), 1)
        programs = triton.cdiv(rows, stretch)
        dx = torch.empty_like(total)
        parts = torch.empty(2, programs, width, dtype=torch.float32, device=dx.device)
        if rows:
            _layernorm_bwd[(programs,)](
                dy.contiguous(),
                None if dtotal is None else dtotal.contiguous(),
                total,
                weight,
                *moments,
                dx,
                *parts,
                rows,
                stretch,
                **row_block(width),
            )
        dweight, dbias = parts.sum(dim=1).to(weight.dtype)
        return dx, dx if ctx.has_residual else None, dweight, dbias, None


@triton.jit
def _layernorm_fwd(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    means_ptr,
    scales_ptr,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    at = row * WIDTH + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, axis=0) / WIDTH
    x = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    tl.store(means_ptr + row, mean)
    tl.store(scales_ptr + row, scale)
    y = x * scale * weight + bias
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _layernorm_bwd(
    dy_ptr,
    dtotal_ptr,
    total_ptr,
    weight_ptr,
    means_ptr,
    scales_ptr,
    dx_ptr,
    dweight_parts_ptr,
    dbias_parts_ptr,
    num_rows,
    stretch,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # In int64, because rows x columns passes 2**31 in long batches.
    first = tl.program_id(0).to(tl.int64) * stretch
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(0, tl.minimum(stretch, num_rows - first), num_stages=2):
        row = first + step
        at = row * WIDTH + columns
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales_ptr + row)
        normalised = (x - tl.load(means_ptr + row)) * scale
        dweight += dy * normalised
        dbias += dy
        dnormalised = dy * weight
        # Columns outside are 0 in dnormalised, so their values of `normalised` do not count.
        along = tl.sum(dnormalised * normalised, axis=0) / WIDTH
        level = tl.sum(dnormalised, axis=0) / WIDTH
        dx = (dnormalised - level - normalised * along) * scale
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    part_at = tl.program_id(0).to(tl.int64) * WIDTH + columns
    tl.store(dweight_parts_ptr + part_at, dweight, mask=inside)
    tl.store(dbias_parts_ptr + part_at, dbias, mask=inside)
