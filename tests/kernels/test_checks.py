"""kernels/_checks.py: what is refused at the border of an op, and in which words."""

import pytest
import torch

from argrpo.kernels._checks import FLOATS, expect, uses_triton


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_tensor_as_described_passes(dtype: torch.dtype) -> None:
    expect("hidden", torch.zeros(3, 64, dtype=dtype), (None, 64), FLOATS)
    expect("scale", torch.zeros((), dtype=dtype), (), FLOATS)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 32), r"hidden: expected shape \[\*, 64\], got \[3, 32\]"),
        ((64,), r"hidden: expected shape \[\*, 64\], got \[64\]"),
        ((1, 3, 64), r"hidden: expected shape \[\*, 64\], got \[1, 3, 64\]"),
        ((), r"hidden: expected shape \[\*, 64\], got \[\]"),
    ],
)
def test_another_shape_is_refused_by_name(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        expect("hidden", torch.zeros(shape), (None, 64), FLOATS)


def test_another_dtype_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"x: expected bfloat16, float16 or float32, got float64"):
        expect("x", torch.zeros(3, dtype=torch.float64), (3,), FLOATS)
    with pytest.raises(ValueError, match=r"token_ids: expected int64, got int32"):
        expect("token_ids", torch.zeros(3, dtype=torch.int32), (3,), (torch.int64,))


def test_gaps_between_rows_are_refused_unless_allowed() -> None:
    turned = torch.zeros(4, 3).t()
    with pytest.raises(ValueError, match=r"x: expected a contiguous tensor, .* \.contiguous\(\)"):
        expect("x", turned, (3, 4), FLOATS)
    expect("x", turned, (3, 4), FLOATS, contiguous=False)


def test_triton_runs_on_a_cpu_tensor_only_in_its_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not uses_triton(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert uses_triton(torch.zeros(1))


@pytest.mark.gpu
def test_triton_runs_on_every_cuda_tensor() -> None:
    assert uses_triton(torch.zeros(1, device="cuda"))


def test_memory_that_a_kernel_leaves_unwritten_holds_nan_in_these_tests() -> None:
    like = torch.zeros(2, dtype=torch.bfloat16)
    for made in (torch.empty(3), torch.empty_like(like), like.new_empty(4, dtype=torch.float32)):
        assert made.isnan().all()
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
