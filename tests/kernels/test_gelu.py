"""kernels/gelu.py against fp64, forward and both gradients.

Tolerances: fp32 differs by the error function's last places, 2e-6 of the largest value; dbias adds
rows, hence ten times that. In bf16 and fp16 the kernel may be twice as far from fp64 as the
reference in the same dtype, plus one unit in the last place, because Triton's interpreter truncates
where a GPU rounds.
"""

import pytest
import torch
from torch import Tensor

from argrpo.kernels import gelu as gelu_file
from argrpo.kernels.gelu import bias_gelu, bias_gelu_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAST_PLACE = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
ROOM = {"dbias": 10}  # times the last place


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = torch.randn(2, *shape, device=DEVICE)
    bias = torch.randn(shape[-1], device=DEVICE)
    return (2 * x).to(dtype), bias.to(dtype), dy.to(dtype)


def run(x: Tensor, bias: Tensor, dy: Tensor, dtype: torch.dtype, op: object) -> dict[str, Tensor]:
    x, bias = (side.to(dtype).detach().requires_grad_() for side in (x, bias))
    y = op(x, bias)
    y.backward(dy.to(dtype))
    return {"y": y.detach(), "dx": x.grad, "dbias": bias.grad}


def check(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype)
    got = run(*inputs, dtype, bias_gelu)
    exact = run(*inputs, torch.float64, bias_gelu_reference)
    same = run(*inputs, dtype, bias_gelu_reference)
    for name, value in got.items():
        assert value.dtype == dtype, name
        allowed = 2 * (same[name].double() - exact[name]).abs().max()
        allowed += ROOM.get(name, 1) * LAST_PLACE[dtype] * exact[name].abs().max()
        assert (value.double() - exact[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 63), (3, 999), (2, 2500)])
def test_output_and_both_gradients_match_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype)


def test_more_rows_than_backward_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven rows over four programs: stretches of 3, 3, 3 and 2."""
    monkeypatch.setattr(gelu_file, "_STRETCHES", 4)
    check((11, 64), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    x, bias, dy = make_inputs((4, 1500), dtype)
    together, again = (run(x, bias, dy, dtype, bias_gelu) for _ in range(2))
    alone = run(x[2:3], bias, dy[2:3], dtype, bias_gelu)
    for name, value in together.items():
        assert torch.equal(value, again[name]), name
    for name in ("y", "dx"):
        assert torch.equal(together[name][2:3], alone[name]), name


def test_far_values_are_the_identity_and_zero_and_nan_stays_alone() -> None:
    x = torch.tensor([[40.0, -40.0, torch.nan, 0.0]], device=DEVICE)
    got = run(x, torch.zeros(4, device=DEVICE), torch.ones_like(x), torch.float32, bias_gelu)
    for name, wanted in (("y", [40.0, 0.0, torch.nan, 0.0]), ("dx", [1.0, 0.0, torch.nan, 0.5])):
        expected = torch.tensor([wanted], device=DEVICE)
        torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-6, equal_nan=True)


def test_no_rows_give_no_rows() -> None:
    x = torch.zeros(0, 64, device=DEVICE, requires_grad=True)
    bias = torch.zeros(64, device=DEVICE, requires_grad=True)
    bias_gelu(x, bias).sum().backward()
    assert x.grad.shape == (0, 64)
    assert not bias.grad.any()


def test_wrong_inputs_are_refused_by_name() -> None:
    x, bias, _ = make_inputs((4, 64), torch.float32)
    for words, call in (
        (r"x: expected a contiguous tensor", lambda: bias_gelu(x[:, ::2], bias[:32])),
        (r"x: expected bfloat16, .* got float64", lambda: bias_gelu(x.double(), bias)),
        (r"x: expected rows of at least 1 value", lambda: bias_gelu(x[:, :0], bias[:0])),
        (r"bias: expected shape \[64\], got \[32\]", lambda: bias_gelu(x, bias[:32])),
        (r"bias: expected float32, got bfloat16", lambda: bias_gelu(x, bias.bfloat16())),
    ):
        with pytest.raises(ValueError, match=words):
            call()
