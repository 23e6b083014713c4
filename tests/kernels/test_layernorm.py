"""kernels/layernorm.py against fp64, forward and every gradient.

Tolerances: fp32 sums of a row differ by order only, 2e-6 of the largest value; dweight and dbias
add many rows, hence ten times that. In bf16 and fp16 the kernel may be twice as far from fp64 as
the reference in the same dtype, plus one unit in the last place of the largest value, because
Triton's interpreter truncates where a GPU rounds.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from argrpo.kernels import layernorm as layernorm_file
from argrpo.kernels.layernorm import (
    layernorm,
    layernorm_reference,
    layernorm_residual,
    layernorm_residual_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
LAST_PLACE = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
ROOM = {"dweight": 10, "dbias": 10}  # times the last place
SHAPES = [(1, 2), (3, 63), (2, 5, 999), (1, 1024), (3, 1536)]


class Inputs(NamedTuple):
    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    dtotal: Tensor


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    x, residual, dy, dtotal = torch.randn(4, *shape, device=DEVICE).to(dtype)
    weight, bias = 0.3 * torch.randn(2, shape[-1], device=DEVICE)
    return Inputs(x, residual, (1 + weight).to(dtype), bias.to(dtype), dy, dtotal)


def run(inputs: Inputs, dtype: torch.dtype, *, residual: bool, op: object) -> dict[str, Tensor]:
    """Outputs and gradients by name, computed in `dtype`."""
    x, other, weight, bias = (side.to(dtype).detach().requires_grad_() for side in inputs[:4])
    if residual:
        y, total = op(x, other, weight, bias, EPS)
        torch.autograd.backward([y, total], [inputs.dy.to(dtype), inputs.dtotal.to(dtype)])
        outputs = {"y": y, "total": total, "dresidual": other.grad}
    else:
        y = op(x, weight, bias, EPS)
        y.backward(inputs.dy.to(dtype))
        outputs = {"y": y}
    return {name: value.detach() for name, value in outputs.items()} | {
        "dx": x.grad,
        "dweight": weight.grad,
        "dbias": bias.grad,
    }


def check(inputs: Inputs, *, residual: bool) -> None:
    dtype = inputs.x.dtype
    op = layernorm_residual if residual else layernorm
    reference = layernorm_residual_reference if residual else layernorm_reference
    got = run(inputs, dtype, residual=residual, op=op)
    exact = run(inputs, torch.float64, residual=residual, op=reference)
    same = run(inputs, dtype, residual=residual, op=reference)
    for name, value in got.items():
        assert value.dtype == dtype, name
        allowed = 2 * (same[name].double() - exact[name]).abs().max()
        allowed += ROOM.get(name, 1) * LAST_PLACE[dtype] * exact[name].abs().max()
        assert (value.double() - exact[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_every_gradient_match_fp64(shape: tuple[int, ...], residual: bool) -> None:
    check(make_inputs(shape, torch.float32), residual=residual)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(dtype: torch.dtype, residual: bool) -> None:
    check(make_inputs((4, 1024), dtype), residual=residual)


@pytest.mark.parametrize("residual", [False, True])
def test_more_rows_than_backward_programs(residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven rows over four programs: stretches of 3, 3, 3 and 2."""
    monkeypatch.setattr(layernorm_file, "_STRETCHES", 4)
    check(make_inputs((11, 64), torch.float32), residual=residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    inputs = make_inputs((5, 1024), dtype)
    together, again = (run(inputs, dtype, residual=True, op=layernorm_residual) for _ in range(2))
    for row in (0, 3):
        one = slice(row, row + 1)
        x, residual, weight, bias, dy, dtotal = inputs
        alone = Inputs(x[one], residual[one], weight, bias, dy[one], dtotal[one])
        single = run(alone, dtype, residual=True, op=layernorm_residual)
        for name in ("y", "total", "dx", "dresidual"):
            assert torch.equal(single[name][0], together[name][row]), name
    for name, value in together.items():
        assert torch.equal(value, again[name]), name


def test_either_output_may_go_without_a_gradient() -> None:
    inputs = make_inputs((3, 64), torch.float32)
    names = ("dx", "dresidual", "dweight", "dbias")
    for used in (0, 1):
        grads = []
        for op, dtype in (
            (layernorm_residual, None),
            (layernorm_residual_reference, torch.float64),
        ):
            sides = [side.to(dtype).detach().requires_grad_() for side in inputs[:4]]
            op(*sides, EPS)[used].backward(inputs.dy.to(dtype))
            grads.append([side.grad for side in sides])
        for name, got, want in zip(names, *grads, strict=True):
            if got is None:
                assert used == 1 and name in ("dweight", "dbias")
                assert want is None
                continue
            assert (got.double() - want).abs().max() <= 1e-5, name


def test_a_row_far_from_zero_keeps_its_variance() -> None:
    """A mean of 1000 beside a spread of 1: mean(x^2) - mean(x)^2 would lose 5 digits."""
    x = 1000 + torch.randn(2, 777, device=DEVICE)
    weight, bias = torch.ones(777, device=DEVICE), torch.zeros(777, device=DEVICE)
    exact = layernorm_reference(x.double(), weight.double(), bias.double(), EPS)
    # x itself holds 1000 to 6e-5, and its mean is exact to about as much.
    assert (layernorm(x, weight, bias, EPS) - exact).abs().max() <= 1e-4


def test_zero_and_nan_rows_stay_in_their_rows() -> None:
    x, _, weight, bias, *_ = make_inputs((3, 100), torch.float32)
    x[0], x[1, 7] = 0.0, torch.nan
    y = layernorm(x, weight, bias, EPS)
    assert torch.equal(y[0], bias)
    assert y[1].isnan().all()
    assert torch.equal(y[2], layernorm(x[2:], weight, bias, EPS)[0])


def test_no_rows_give_no_rows() -> None:
    x = torch.zeros(0, 64, device=DEVICE, requires_grad=True)
    weight, bias = torch.ones(2, 64, device=DEVICE)
    layernorm(x, weight, bias, EPS).sum().backward()
    assert x.grad.shape == (0, 64)


def test_wrong_inputs_are_refused_by_name() -> None:
    x, residual, weight, bias, *_ = make_inputs((4, 64), torch.float32)
    for words, call in (
        (r"x: expected a contiguous", lambda: layernorm(x[:, ::2], weight[:32], bias[:32], EPS)),
        (r"x: expected bfloat16, .* float64", lambda: layernorm(x.double(), weight, bias, EPS)),
        (r"x: expected rows of 1 to", lambda: layernorm(x[:, :0], weight[:0], bias[:0], EPS)),
        (r"weight: expected shape \[64\]", lambda: layernorm(x, weight[:32], bias, EPS)),
        (r"weight: expected float32", lambda: layernorm(x, weight.bfloat16(), bias, EPS)),
        (r"bias: expected shape \[64\]", lambda: layernorm(x, weight, bias[:32], EPS)),
        (
            r"residual: expected float32, got bf",
            lambda: layernorm_residual(x, residual.bfloat16(), weight, bias, EPS),
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
