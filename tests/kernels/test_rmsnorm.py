"""kernels/rmsnorm.py against fp64, forward and every gradient.

Tolerances: fp32 sums of a row's squares differ by order only, 1e-6 of the largest value measured at
most; dweight adds a thousand rows, hence 1e-5 there. In bf16 and fp16 the kernel may be twice as
far from fp64 as the reference in the same dtype, plus one unit in the last place of the largest
value, because Triton's interpreter truncates where a GPU rounds.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from argrpo.kernels import rmsnorm as rmsnorm_file
from argrpo.kernels.rmsnorm import (
    rmsnorm,
    rmsnorm_reference,
    rmsnorm_residual,
    rmsnorm_residual_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
LAST_PLACE = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
ROOM = {"dweight": 10}  # times the last place
SHAPES = [(1, 1), (3, 63), (2, 5, 999), (1, 768), (3, 1280), (2, 3200)]


class Inputs(NamedTuple):
    x: Tensor
    residual: Tensor
    weight: Tensor
    dy: Tensor
    dtotal: Tensor


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    x, residual, dy, dtotal = torch.randn(4, *shape, device=DEVICE).to(dtype)
    weight = 1 + 0.3 * torch.randn(shape[-1], device=DEVICE)
    return Inputs(x, residual, weight.to(dtype), dy, dtotal)


def run(inputs: Inputs, dtype: torch.dtype, *, residual: bool, op: object) -> dict[str, Tensor]:
    """Outputs and gradients by name, computed in `dtype`."""
    x, other, weight = (side.to(dtype).detach().requires_grad_() for side in inputs[:3])
    if residual:
        y, total = op(x, other, weight, EPS)
        torch.autograd.backward([y, total], [inputs.dy.to(dtype), inputs.dtotal.to(dtype)])
        outputs = {"y": y, "total": total, "dresidual": other.grad}
    else:
        y = op(x, weight, EPS)
        y.backward(inputs.dy.to(dtype))
        outputs = {"y": y}
    return {name: value.detach() for name, value in outputs.items()} | {
        "dx": x.grad,
        "dweight": weight.grad,
    }


def check(inputs: Inputs, *, residual: bool) -> None:
    dtype = inputs.x.dtype
    op = rmsnorm_residual if residual else rmsnorm
    reference = rmsnorm_residual_reference if residual else rmsnorm_reference
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
    check(make_inputs((4, 1280), dtype), residual=residual)


@pytest.mark.parametrize("residual", [False, True])
def test_more_rows_than_backward_programs(residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven rows over four programs: stretches of 3, 3, 3 and 2."""
    monkeypatch.setattr(rmsnorm_file, "_STRETCHES", 4)
    check(make_inputs((11, 64), torch.float32), residual=residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    inputs = make_inputs((5, 1280), dtype)
    together = run(inputs, dtype, residual=True, op=rmsnorm_residual)
    again = run(inputs, dtype, residual=True, op=rmsnorm_residual)
    for row in (0, 3):
        one = slice(row, row + 1)
        x, residual, weight, dy, dtotal = inputs
        alone = Inputs(x[one], residual[one], weight, dy[one], dtotal[one])
        single = run(alone, dtype, residual=True, op=rmsnorm_residual)
        for name in ("y", "total", "dx", "dresidual"):
            assert torch.equal(single[name][0], together[name][row]), name
    for name, value in together.items():
        assert torch.equal(value, again[name]), name


def test_the_sum_is_the_eager_sum_bit_for_bit() -> None:
    inputs = make_inputs((3, 1280), torch.float32)
    _, total = rmsnorm_residual(inputs.x, inputs.residual, inputs.weight, EPS)
    assert torch.equal(total, inputs.x + inputs.residual)


def test_either_output_may_go_without_a_gradient() -> None:
    inputs = make_inputs((3, 64), torch.float32)
    for used in (0, 1):
        grads = []
        for op, dtype in ((rmsnorm_residual, None), (rmsnorm_residual_reference, torch.float64)):
            sides = [side.to(dtype).detach().requires_grad_() for side in inputs[:3]]
            op(*sides, EPS)[used].backward(inputs.dy.to(dtype))
            grads.append([side.grad for side in sides])
        for name, got, want in zip(("dx", "dresidual", "dweight"), *grads, strict=True):
            if got is None:
                assert (name, used) == ("dweight", 1)
                assert want is None or not want.any()
                continue
            assert (got.double() - want).abs().max() <= 1e-5, name


def test_zero_large_and_nan_rows_stay_in_their_rows() -> None:
    x = make_inputs((4, 100), torch.float32).x
    x[0], x[1], x[2, 7] = 0.0, 1e15, torch.nan
    weight = torch.ones(100, device=DEVICE)
    y = rmsnorm(x, weight, EPS)
    assert not y[0].any()
    assert (y[1] - 1).abs().max() <= 1e-6
    assert y[2].isnan().all()
    assert torch.equal(y[3], rmsnorm(x[3:], weight, EPS)[0])


def test_no_rows_give_no_rows() -> None:
    x = torch.zeros(0, 64, device=DEVICE, requires_grad=True)
    weight = torch.ones(64, device=DEVICE, requires_grad=True)
    rmsnorm(x, weight, EPS).sum().backward()
    assert x.grad.shape == (0, 64)
    assert not weight.grad.any()


def test_wrong_inputs_are_refused_by_name() -> None:
    x, residual, weight, *_ = make_inputs((4, 64), torch.float32)
    for words, call in (
        (r"x: expected a contiguous tensor", lambda: rmsnorm(x[:, ::2], weight[::2], EPS)),
        (r"x: expected bfloat16, .* got float64", lambda: rmsnorm(x.double(), weight, EPS)),
        (r"x: expected rows of 1 to", lambda: rmsnorm(x[:, :0], weight[:0], EPS)),
        (r"weight: expected shape \[64\], got \[32\]", lambda: rmsnorm(x, weight[:32], EPS)),
        (r"weight: expected float32, got bf", lambda: rmsnorm(x, weight.bfloat16(), EPS)),
        (
            r"residual: expected shape \[4, 64\]",
            lambda: rmsnorm_residual(x, residual[:2], weight, EPS),
        ),
        (
            r"residual: expected a contiguous",
            lambda: rmsnorm_residual(x, residual.T.contiguous().T, weight, EPS),
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
