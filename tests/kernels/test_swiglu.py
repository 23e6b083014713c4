"""kernels/swiglu.py against fp64, forward and gradient.

Tolerances: fp32 differs by the exponential's last places, 1e-6 of the largest value. In bf16 and
fp16 the kernel may be twice as far from fp64 as the reference in the same dtype, plus one unit in
the last place, because Triton's interpreter truncates where a GPU rounds.
"""

import pytest
import torch
from torch import Tensor

from argrpo.kernels.swiglu import swiglu, swiglu_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAST_PLACE = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def run(gate_up: Tensor, dy: Tensor, dtype: torch.dtype, op: object) -> dict[str, Tensor]:
    gate_up = gate_up.to(dtype).detach().requires_grad_()
    y = op(gate_up)
    y.backward(dy.to(dtype))
    return {"y": y.detach(), "dgate_up": gate_up.grad}


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up = 3 * torch.randn(*shape[:2], 2 * shape[2], device=DEVICE)
    return gate_up.to(dtype), torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 63), (3, 1, 999), (1, 2, 2816), (2, 1, 3584)])
def test_output_and_gradient_match_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    gate_up, dy = make_inputs(shape, dtype)
    got = run(gate_up, dy, dtype, swiglu)
    exact = run(gate_up, dy, torch.float64, swiglu_reference)
    same = run(gate_up, dy, dtype, swiglu_reference)
    for name, value in got.items():
        assert value.dtype == dtype, name
        allowed = 2 * (same[name].double() - exact[name]).abs().max()
        allowed += LAST_PLACE[dtype] * exact[name].abs().max()
        assert (value.double() - exact[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    gate_up, dy = make_inputs((2, 3, 1500), dtype)
    together, again = (run(gate_up, dy, dtype, swiglu) for _ in range(2))
    alone = run(gate_up[1:, 2:], dy[1:, 2:], dtype, swiglu)
    for name, value in together.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value[1:, 2:], alone[name]), name


# exp(200) is infinite on a GPU too, and 1 / (1 + inf) is the 0 wanted; only NumPy says so aloud.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_large_gates_and_nan_stay_where_they_are() -> None:
    gate_up = torch.ones(1, 1, 8, device=DEVICE)
    gate_up[0, 0, :3] = torch.tensor([200.0, -200.0, torch.nan])
    got = run(gate_up, torch.ones(1, 1, 4, device=DEVICE), torch.float32, swiglu)
    assert got["y"][0, 0, 0] == 200
    assert got["y"][0, 0, 1] == 0
    assert torch.equal(got["y"].isnan(), torch.tensor([[[0, 0, 1, 0]]], device=DEVICE).bool())
    wanted = torch.tensor([[[0, 0, 1, 0] * 2]], device=DEVICE).bool()
    assert torch.equal(got["dgate_up"].isnan(), wanted)


def test_no_rows_give_no_rows() -> None:
    gate_up = torch.zeros(0, 2, 8, device=DEVICE, requires_grad=True)
    swiglu(gate_up).sum().backward()
    assert gate_up.grad.shape == (0, 2, 8)


def test_wrong_inputs_are_refused_by_name() -> None:
    x = torch.randn(2, 3, 8, device=DEVICE)
    for words, wrong in (
        (r"gate_up: expected shape \[\*, \*, \*\], got \[3, 8\]", x[0]),
        (r"gate_up: expected an even last dimension, got 7", x[..., :7].contiguous()),
        (r"gate_up: expected an even last dimension, got 0", x[..., :0]),
        (r"gate_up: expected a contiguous tensor", x[..., ::2]),
        (r"gate_up: expected bfloat16, .* got float64", x.double()),
    ):
        with pytest.raises(ValueError, match=words):
            swiglu(wrong)
