"""Root-mean-square norm, alone or with the residual add before it.

    s = x + residual
    y = s / sqrt(mean(s^2) + eps) * weight

Arithmetic in fp32, with the roundings that the checkpoints were trained with
(FoundationVision/LlamaGen at ce98ec4, gpt.py RMSNorm): s is rounded to the dtype of x, then the
normalised row, then its product with the weight.

Forward: one program a row, the row in registers, each value read once. Backward: one program a
stretch of rows; dx in the same pass as the stretch's part of dweight, in fp32. The parts of at most
512 stretches are added in a fixed order, without atomics: the same input gives the same bits.

Bytes in bf16, R rows of D: forward 4 R D, with the residual 8 R D; backward 6 R D, 8 R D with a
gradient of s. XL (D 1280), with the residual: a decode step of 256 rows moves 2.6 MB, all of it in
L2, so that the launch is the cost; 16,384 rows are 168 MB, 39 us at 4.3 TB/s, backward the same,
and 5 MB of parts. About 10 operations a value are nothing beside that.

Source: Zhang and Sennrich, arXiv:1910.07467, equation 4.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from argrpo.kernels._checks import FLOATS, expect, uses_triton

MAX_WIDTH = 16384  # a row stays in registers
_VALUES_A_THREAD = 16
_STRETCHES = 512  # backward programs: 4 an H200 multiprocessor, each with rows on their way


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension. Differentiable in both tensors.

    Args:
        x: [..., D] bf16, fp16 or fp32, contiguous.
        weight: [D], in the dtype of x.
        eps: added to the mean square, e.g. 1e-5.

    Returns:
        [..., D] in the dtype of x.

    Raises:
        ValueError: a shape, dtype or layout is not as above.
    """
    _check(x, weight)
    if not uses_triton(x):
        return rmsnorm_reference(x, weight, eps)
    return _RMSNorm.apply(x, None, weight, eps)[0]


def rmsnorm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add, then normalise the sum. Differentiable in all three tensors.

    Args:
        x: [..., D] bf16, fp16 or fp32, contiguous: what a block adds to the residual stream.
        residual: as x: the stream before it.
        weight: [D], in the dtype of x.
        eps: added to the mean square.

    Returns:
        The normalised sum and the sum itself (the stream from here on), both as x.

    Raises:
        ValueError: a shape, dtype or layout is not as above.
    """
    _check(x, weight)
    expect("residual", residual, tuple(x.shape), (x.dtype,))
    if not uses_triton(x):
        return rmsnorm_residual_reference(x, residual, weight, eps)
    return _RMSNorm.apply(x, residual, weight, eps)


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification, in plain PyTorch; in fp64 where x is."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight


def rmsnorm_residual_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch."""
    total = x + residual
    return rmsnorm_reference(total, weight, eps), total


def _check(x: Tensor, weight: Tensor) -> None:
    expect("x", x, (None,) * max(x.dim(), 1), FLOATS)
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x: expected rows of 1 to {MAX_WIDTH} values, got {x.shape[-1]}")
    expect("weight", weight, (x.shape[-1],), (x.dtype,))


def row_block(width: int) -> dict[str, int]:
    """Compile-time sizes of a row kernel: the row as a power of two, 16 values a thread."""
    block = triton.next_power_of_2(width)
    num_warps = min(max(block // (32 * _VALUES_A_THREAD), 1), 16)
    return {"WIDTH": width, "BLOCK": block, "num_warps": num_warps}


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        rows = x.numel() // x.shape[-1]
        y = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        scales = torch.empty(rows, dtype=torch.float32, device=x.device)
        if rows:
            out = None if residual is None else total
            _rmsnorm_fwd[(rows,)](
                x, residual, weight, y, out, scales, eps, **row_block(x.shape[-1])
            )
        ctx.save_for_backward(total, weight, scales)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        return y, None if residual is None else total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dtotal: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        total, weight, scales = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal if ctx.has_residual else None, None, None
        rows, width = len(scales), len(weight)
        stretch = max(triton.cdiv(rows, _STRETCHES), 1)
        programs = triton.cdiv(rows, stretch)
        dx = torch.empty_like(total)
        parts = torch.empty(programs, width, dtype=torch.float32, device=dx.device)
        if rows:
            _rmsnorm_bwd[(programs,)](
                dy.contiguous(),
                None if dtotal is None else dtotal.contiguous(),
                total,
                weight,
                scales,
                dx,
                parts,
                rows,
                stretch,
                **row_block(width),
            )
        dweight = parts.sum(dim=0).to(weight.dtype)
        return dx, dx if ctx.has_residual else None, dweight, None


@triton.jit
def _rmsnorm_fwd(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
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
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    tl.store(scales_ptr + row, scale)
    dtype = y_ptr.dtype.element_ty
    y = (x * scale).to(dtype).to(tl.float32) * weight
    tl.store(y_ptr + at, y.to(dtype), mask=inside)


@triton.jit
def _rmsnorm_bwd(
    dy_ptr,
    dtotal_ptr,
    total_ptr,
    weight_ptr,
    scales_ptr,
    dx_ptr,
    parts_ptr,
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
    dtype = dx_ptr.dtype.element_ty
    dweight = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(0, tl.minimum(stretch, num_rows - first), num_stages=2):
        row = first + step
        at = row * WIDTH + columns
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales_ptr + row)
        normalised = x * scale
        dweight += dy * normalised.to(dtype).to(tl.float32)
        dnormalised = dy * weight
        along = tl.sum(dnormalised * normalised, axis=0) / WIDTH
        dx = (dnormalised - normalised * along) * scale
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dtype), mask=inside)
    part_at = parts_ptr + tl.program_id(0).to(tl.int64) * WIDTH
    tl.store(part_at + columns, dweight, mask=inside)
