"""kernels/token_logprobs.py: log-probs, entropies and every gradient, a chunk of rows at a time.

Each test runs with the row kernels (Triton's interpreter, or a GPU) and on the path of a CPU. What
happens inside a row is in test_row_softmax.py; here it is the products around it.

Tolerance in fp32: logits reach 20, so an ulp of them is 2e-6, and sums of up to 63 rows and 16,384
tokens add as much again; gradients are compared with their largest entry. In bf16 the result may be
twice as far from fp64 as plain PyTorch is in bf16, plus one unit in the last place, because the
interpreter truncates where a GPU rounds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from argrpo.kernels import head_chunks, row_softmax
from argrpo.kernels.token_filter import pack_support
from argrpo.kernels.token_logprobs import (
    TokenLogprobs,
    token_logprobs,
    token_logprobs_reference,
)

FP32_TOLERANCE = 1e-5
BF16_ULP = 2.0**-7
SHAPES = [(1, 16, 999), (63, 16, 1024), (3, 8, 4097), (3, 32, 16384)]  # M, D, V


@pytest.fixture(params=["kernel", "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Runs each test on both implementations of a row."""
    if request.param == "cpu":
        monkeypatch.setattr(row_softmax, "uses_triton", lambda tensor: False)
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 rows of logits at a time, 8 rows of d logits."""
    monkeypatch.setattr(head_chunks, "_logit_rows", lambda head_weight: 4)
    monkeypatch.setattr(head_chunks, "_gradient_rows", lambda head_weight: 8)


class Inputs(NamedTuple):
    hidden: Tensor
    head_weight: Tensor
    token_ids: Tensor
    temperature: float
    support: Tensor | None

    def to(self, dtype: torch.dtype) -> "Inputs":
        hidden, weight = (t.detach().to(dtype).requires_grad_() for t in self[:2])
        return self._replace(hidden=hidden, head_weight=weight)


def make_inputs(
    shape: tuple[int, int, int],
    device: torch.device,
    temperature: float = 1.0,
    kept: float | None = None,
) -> Inputs:
    """bf16-representable leaves in fp32, logits of standard deviation 4."""
    num_rows, width, vocab_size = shape
    hidden = torch.randn(num_rows, width, device=device)
    weight = 4 * width**-0.5 * torch.randn(vocab_size, width, device=device)
    token_ids = torch.randint(vocab_size, (num_rows,), device=device)
    support = None
    if kept is not None:
        support = pack_support(torch.rand(num_rows, vocab_size, device=device) < kept)
    rounded = (t.bfloat16().float().requires_grad_() for t in (hidden, weight))
    return Inputs(*rounded, token_ids, temperature, support)


def run(
    op: Callable[..., TokenLogprobs], inputs: Inputs, scales: TokenLogprobs
) -> dict[str, Tensor]:
    """Outputs and gradients by name, for a loss with these scales."""
    scores = op(*inputs)
    leaves = inputs.hidden, inputs.head_weight
    used = [i for i, scale in enumerate(scales) if scale is not None]
    given = [scales[i].to(scores[i].dtype) for i in used]
    d_hidden, d_weight = torch.autograd.grad([scores[i] for i in used], leaves, given)
    return {**scores._asdict(), "d hidden": d_hidden, "d head_weight": d_weight}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], limit: float) -> None:
    for name, expected in want.items():
        off = (got[name].double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert off <= limit, f"{name}: off by {off:.2e} of its largest entry"


def random_scales(num_rows: int, device: torch.device) -> TokenLogprobs:
    return TokenLogprobs(*torch.randn(2, num_rows, device=device))


@pytest.mark.parametrize("used", ["logprobs", "entropies", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_and_gradients_agree_with_fp64(
    shape: tuple[int, int, int], used: str, device: torch.device
) -> None:
    # The temperature and the support change the rows only; one case of each goes through here.
    settings = {"logprobs": (1.0, None), "entropies": (0.7, None), "both": (1.3, 0.2)}
    temperature, kept = settings[used]
    inputs = make_inputs(shape, device, temperature, kept)
    scales = random_scales(shape[0], device)
    if used != "both":
        scales = TokenLogprobs(**{**dict.fromkeys(scales._fields), used: getattr(scales, used)})
    want = run(token_logprobs_reference, inputs.to(torch.float64), scales)
    assert_close(run(token_logprobs, inputs, scales), want, FP32_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_close_to_fp64_as_plain_pytorch(
    dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_inputs((9, 64, 999), device, temperature=0.7)
    scales = random_scales(9, device)
    exact = run(token_logprobs_reference, inputs.to(torch.float64), scales)
    plain = run(token_logprobs_reference, inputs.to(dtype), scales)
    got = run(token_logprobs, inputs.to(dtype), scales)
    for name, want in exact.items():
        size = want.abs().max()
        error, allowed = ((r[name].double() - want).abs().max() / size for r in (got, plain))
        assert error <= 2 * allowed + BF16_ULP, f"{name}: {error:.1e}, plain PyTorch {allowed:.1e}"


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_change_nothing_but_rounding_and_repeat_bit_for_bit(
    dtype: torch.dtype, device: torch.device
) -> None:
    # 19 rows: two full chunks of d logits, the last one ragged and so is its last part.
    inputs = make_inputs((19, 16, 999), device, temperature=0.7, kept=0.5)
    scales = random_scales(19, device)
    exact = run(token_logprobs_reference, inputs.to(torch.float64), scales)
    first, second = (run(token_logprobs, inputs.to(dtype), scales) for _ in range(2))
    assert_close(first, exact, FP32_TOLERANCE if dtype == torch.float32 else 8 * BF16_ULP)
    for name, values in first.items():
        assert torch.equal(values, second[name]), name


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any floating tensor that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return out


def largest_tensor(inputs: Inputs) -> int:
    """Elements of the largest tensor of a forward and a backward pass."""
    with _LargestTensor() as largest:
        sum(token_logprobs(*inputs)).sum().backward()
    return largest.numel


@pytest.mark.usefixtures("small_chunks")
def test_all_rows_of_logits_are_never_held(device: torch.device) -> None:
    if device.type == "cuda":
        device = torch.device("cpu")  # a backward pass on a GPU runs outside the dispatch mode
    inputs = make_inputs((20, 4, 999), device, kept=0.5)
    assert largest_tensor(inputs) <= 8 * 999 < 20 * 999


def test_the_chunks_of_a_cpu_are_small(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda":
        device = torch.device("cpu")
    monkeypatch.setattr(row_softmax, "uses_triton", lambda tensor: False)
    inputs = make_inputs((1100, 4, 512), device)
    assert largest_tensor(inputs) <= 256 * 1024 < 1100 * 512


def test_a_loss_without_entropies_does_not_pay_for_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    gradient = head_chunks.row_gradient_

    def spy(logits: Tensor, rows: Any, scores: Any, dlogprobs: Tensor, *rest: Any, **out: Any):
        seen.append(rest[0])
        gradient(logits, rows, scores, dlogprobs, *rest, **out)

    monkeypatch.setattr(head_chunks, "row_gradient_", spy)
    inputs = make_inputs((3, 8, 64), device)
    token_logprobs(*inputs).logprobs.sum().backward()
    assert seen == [None]
    token_logprobs(*inputs).entropies.mean().backward()
    assert seen[1] is not None


def test_only_what_requires_a_gradient_receives_one(device: torch.device) -> None:
    frozen_weight = make_inputs((3, 8, 64), device)
    frozen_weight.head_weight.requires_grad_(False)
    token_logprobs(*frozen_weight).logprobs.sum().backward()
    assert frozen_weight.hidden.grad is not None
    assert frozen_weight.head_weight.grad is None
    frozen_hidden = make_inputs((3, 8, 64), device)
    frozen_hidden.hidden.requires_grad_(False)
    token_logprobs(*frozen_hidden).entropies.sum().backward()
    assert frozen_hidden.hidden.grad is None
    assert frozen_hidden.head_weight.grad is not None
    with torch.no_grad():
        assert not token_logprobs(*make_inputs((3, 8, 64), device)).logprobs.requires_grad


def test_weight_grad_takes_the_gradient_in_fp32_and_adds_it(device: torch.device) -> None:
    inputs = make_inputs((9, 16, 999), device).to(torch.bfloat16)
    scales = random_scales(9, device)
    exact = run(token_logprobs_reference, inputs.to(torch.float64), scales)["d head_weight"]
    returned = run(token_logprobs, inputs, scales)["d head_weight"]
    total = torch.zeros(999, 16, device=device)
    for _ in range(2):
        scores = token_logprobs(*inputs, weight_grad=total)
        torch.autograd.backward(scores, scales)
    assert inputs.head_weight.grad is None
    assert torch.equal((total / 2).bfloat16(), returned)
    # The sum itself is not rounded to bf16, though its terms are made of bf16 numbers.
    assert (total != total.bfloat16()).any()
    assert (total / 2 - exact).abs().max() <= 8 * BF16_ULP * exact.abs().max()


def test_a_nan_hidden_state_spoils_its_own_row_only(device: torch.device) -> None:
    inputs = make_inputs((3, 8, 999), device)
    with torch.no_grad():
        inputs.hidden[1, 2] = torch.nan
    scores = token_logprobs(*inputs)
    for name, values in scores._asdict().items():
        assert values.isnan().tolist() == [False, True, False], name
    (d_hidden,) = torch.autograd.grad(scores.logprobs.sum(), inputs.hidden)
    assert d_hidden.isnan().any(dim=1).tolist() == [False, True, False]


def test_no_rows_give_no_scores_and_a_zero_weight_gradient(device: torch.device) -> None:
    inputs = make_inputs((0, 8, 64), device)
    scores = token_logprobs(*inputs)
    assert scores.logprobs.shape == scores.entropies.shape == (0,)
    scores.logprobs.sum().backward()
    assert inputs.hidden.grad.shape == (0, 8)
    assert (inputs.head_weight.grad == 0).all()


def test_a_second_derivative_is_refused_instead_of_wrong(device: torch.device) -> None:
    inputs = make_inputs((2, 8, 64), device)
    total = token_logprobs(*inputs).logprobs.sum()
    (d_hidden,) = torch.autograd.grad(total, inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        d_hidden.sum().backward()


def test_wrong_inputs_are_refused_by_name(device: torch.device) -> None:
    good = make_inputs((2, 8, 64), device, kept=0.5)
    hidden, weight, token_ids, _, support = good
    cases: list[tuple[str, Inputs, Tensor | None]] = [
        ("hidden", good._replace(hidden=hidden.double()), None),
        ("hidden", good._replace(hidden=hidden[None]), None),
        ("hidden", good._replace(hidden=hidden.repeat(1, 2)[:, ::2]), None),
        ("head_weight", good._replace(head_weight=weight[:, :4].contiguous()), None),
        ("head_weight", good._replace(head_weight=weight.bfloat16()), None),
        ("head_weight", good._replace(head_weight=weight.t().contiguous().t()), None),
        ("token_ids", good._replace(token_ids=token_ids[:1]), None),
        ("token_ids", good._replace(token_ids=token_ids.int()), None),
        ("support", good._replace(support=support[:, :4]), None),
        ("temperature", good._replace(temperature=0.0), None),
        ("temperature", good._replace(temperature=-1.0), None),
        ("weight_grad", good, torch.zeros(64, 8, dtype=torch.bfloat16, device=device)),
        ("weight_grad", good, torch.zeros(8, 64, device=device)),
    ]
    for name, bad, weight_grad in cases:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            token_logprobs(*bad, weight_grad=weight_grad)


@pytest.mark.gpu
def test_real_shapes_in_bf16_are_as_close_to_fp32_as_plain_pytorch() -> None:
    device = torch.device("cuda")
    inputs = make_inputs((1000, 1280, 16384), device)
    scales = random_scales(1000, device)
    exact = run(token_logprobs_reference, inputs, scales)
    plain = run(token_logprobs_reference, inputs.to(torch.bfloat16), scales)
    first, second = (run(token_logprobs, inputs.to(torch.bfloat16), scales) for _ in range(2))
    for name, want in exact.items():
        error, allowed = ((r[name].float() - want).abs().max() for r in (first, plain))
        assert error <= 2 * allowed, f"{name}: {error:.1e}, plain PyTorch {allowed:.1e}"
        assert torch.equal(first[name], second[name]), name
