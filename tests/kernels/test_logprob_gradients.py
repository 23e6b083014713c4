"""kernels/logprob_gradients.py: scores and gradients in one pass over the head.

Each test runs with the row kernels (Triton's interpreter, or a GPU) and on the path of a CPU. What
two passes give is checked against fp64 in test_token_logprobs.py; one pass has to give its bits,
where the arithmetic is the same. Tolerance in fp32, as there: 1e-5 of the largest entry.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from argrpo.kernels import head_chunks, row_softmax
from argrpo.kernels.kl import k3
from argrpo.kernels.logprob_gradients import (
    LogprobGradients,
    fixed_scale_gradients,
    logprob_gradients,
    logprob_gradients_reference,
)
from argrpo.kernels.rows import FixedScales
from argrpo.kernels.token_filter import pack_support
from argrpo.kernels.token_logprobs import token_logprobs
from argrpo.peak_memory import memory_use

FP32_TOLERANCE = 1e-5
TEMPERATURE = 0.7
ROWS, WIDTH, VOCAB = 19, 16, 999  # of chunks of 4 and 8: ragged at the end


@pytest.fixture(params=["kernel", "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Runs each test on both implementations of a row, 4 rows of logits at a time."""
    monkeypatch.setattr(head_chunks, "_logit_rows", lambda head_weight: 4)
    monkeypatch.setattr(head_chunks, "_gradient_rows", lambda head_weight: 8)
    if request.param == "cpu":
        monkeypatch.setattr(row_softmax, "uses_triton", lambda tensor: False)
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_head(device: torch.device, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head weight and token ids; logits of standard deviation 4."""
    hidden = torch.randn(rows, WIDTH, device=device, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, device=device, requires_grad=True)
    return hidden, weight, torch.randint(VOCAB, (rows,), device=device)


def make_support(device: torch.device) -> Tensor:
    return pack_support(torch.rand(ROWS, VOCAB, device=device) < 0.5)


def make_scales(device: torch.device, rows: int = ROWS) -> FixedScales:
    """The published recipe, one update a rollout: advantages, a KL, a little entropy."""
    advantages, noise = torch.randn(2, rows, device=device)
    constant = torch.full((rows,), 1.0 / rows, device=device)
    return FixedScales(-advantages / rows, 0.1 * constant, noise - 7.0, -1e-3 * constant)


def loss_scales(
    scales: FixedScales, chunk: slice, logprobs: Tensor, entropies: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same scales as an objective would hand them over."""
    part = scales.part(chunk)
    return part.of_logprobs(logprobs), part.entropies


def assert_close(got: LogprobGradients, want: LogprobGradients) -> None:
    for name, one, expected in zip(got._fields, got, want, strict=True):
        off = (one - expected).abs().max() / expected.abs().max()
        assert off <= FP32_TOLERANCE, f"{name}: off by {off:.2e} of its largest entry"


def assert_equal(got: LogprobGradients, want: LogprobGradients) -> None:
    for name, one, other in zip(got._fields, got, want, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("with_entropy", [True, False])
def test_one_pass_gives_the_bits_of_two(with_entropy: bool, device: torch.device) -> None:
    hidden, weight, token_ids = make_head(device)
    support = make_support(device)
    scales = make_scales(device)
    scales = scales if with_entropy else scales._replace(entropies=None)
    given = partial(loss_scales, scales)
    got = logprob_gradients(hidden, weight, token_ids, given, TEMPERATURE, support)
    scores = token_logprobs(hidden, weight, token_ids, TEMPERATURE, support)
    scaled = given(slice(0, ROWS), *(s.detach() for s in scores))
    used = [i for i, scale in enumerate(scaled) if scale is not None]
    gradients = torch.autograd.grad(
        [scores[i] for i in used], (hidden, weight), [scaled[i] for i in used]
    )
    assert_equal(got, LogprobGradients(*scores, *gradients))


def test_fixed_scales_and_their_loss_agree_with_fp64(device: torch.device) -> None:
    hidden, weight, token_ids = make_head(device)
    support, scales = make_support(device), make_scales(device)
    got = fixed_scale_gradients(hidden, weight, token_ids, scales, TEMPERATURE, support)
    wide = hidden.detach().double(), weight.detach().double()
    want = logprob_gradients_reference(
        *wide, token_ids, partial(loss_scales, scales), TEMPERATURE, support
    )
    assert_close(got, want)
    # And the scales are what autograd makes of the loss that they stand for.
    scores = token_logprobs(hidden, weight, token_ids, TEMPERATURE, support)
    kl = k3(scores.logprobs, scales.ref_logprobs)
    terms = (scores.logprobs * scales.logprobs, kl * scales.kl, scores.entropies * scales.entropies)
    d_hidden, d_weight = torch.autograd.grad(sum(t.sum() for t in terms), (hidden, weight))
    assert_close(got, LogprobGradients(*scores, d_hidden, d_weight))


def test_the_loss_is_asked_for_every_row_once_in_order(device: torch.device) -> None:
    hidden, weight, token_ids = make_head(device)
    seen: list[int] = []

    def watched(chunk: slice, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, None]:
        seen.extend(range(chunk.start, chunk.stop))
        assert len(logprobs) == len(entropies) == chunk.stop - chunk.start
        return torch.ones_like(logprobs), None

    logprob_gradients(hidden, weight, token_ids, watched)
    assert seen == list(range(ROWS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "loss"])
def test_the_same_input_twice_gives_the_same_bits(
    fixed: bool, dtype: torch.dtype, device: torch.device
) -> None:
    hidden, weight, token_ids = make_head(device)
    scales = make_scales(device)
    leaves = hidden.to(dtype), weight.to(dtype), token_ids
    run = _run_of(fixed, scales)
    first, second = run(*leaves), run(*leaves)
    assert first.dhidden.dtype == dtype
    assert first.dweight.dtype == torch.float32
    assert_equal(first, second)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "loss"])
def test_a_given_sum_is_added_to(fixed: bool, device: torch.device) -> None:
    head = make_head(device, rows=3)
    run = _run_of(fixed, make_scales(device, rows=3))
    alone = run(*head).dweight
    total = torch.ones_like(alone)
    assert run(*head, weight_grad=total).dweight is total
    # 1 + x keeps x to half an ulp of numbers up to 16.
    torch.testing.assert_close(total - 1.0, alone, rtol=0, atol=2.0**-21)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "loss"])
def test_wrong_inputs_are_refused_by_name(fixed: bool, device: torch.device) -> None:
    hidden, weight, token_ids = make_head(device)
    run = _run_of(fixed, make_scales(device))
    cases = [
        ("hidden", (hidden.double(), weight, token_ids), {}),
        ("head_weight", (hidden, weight.t(), token_ids), {}),
        ("token_ids", (hidden, weight, token_ids[1:]), {}),
        ("temperature", (hidden, weight, token_ids), {"temperature": 0.0}),
        ("support", (hidden, weight, token_ids), {"support": make_support(device)[:, 1:]}),
        ("weight_grad", (hidden, weight, token_ids), {"weight_grad": weight.detach().half()}),
    ]
    for name, head, options in cases:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            run(*head, **options)
    with pytest.raises(ValueError, match=r"^scales.logprobs: expected"):
        fixed_scale_gradients(hidden, weight, token_ids, make_scales(device, rows=3))


def _run_of(fixed: bool, scales: FixedScales) -> Callable[..., LogprobGradients]:
    """One of the two ops with these scales, as a function of the head."""

    def run(hidden: Tensor, weight: Tensor, token_ids: Tensor, **options: Any) -> LogprobGradients:
        if fixed:
            return fixed_scale_gradients(hidden, weight, token_ids, scales, **options)
        given = partial(loss_scales, scales)
        return logprob_gradients(hidden, weight, token_ids, given, **options)

    return run


def test_no_more_than_one_chunk_of_gradients_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_softmax, "uses_triton", lambda tensor: False)
    monkeypatch.setattr(head_chunks, "_logit_rows", lambda head_weight: 64)
    monkeypatch.setattr(head_chunks, "_gradient_rows", lambda head_weight: 64)
    cpu = torch.device("cpu")
    hidden, weight, token_ids = make_head(cpu, 256)
    scales = make_scales(cpu, 256)

    def peak(rows: slice) -> int:
        given = hidden[rows], weight, token_ids[rows], scales.part(rows)
        return memory_use(lambda: fixed_scale_gradients(*given), cpu).peak

    # What grows with the rows is their gradient and three scores each; a chunk is 256 kB.
    results = 4 * 192 * (WIDTH + 3)
    assert peak(slice(0, 256)) - peak(slice(0, 64)) <= results + 1024


@pytest.mark.gpu
def test_a_real_step_stays_in_a_quarter_gigabyte_and_repeats() -> None:
    num_rows, width, vocab_size = 16384, 1280, 16384
    hidden = torch.randn(num_rows, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab_size, width, device="cuda", dtype=torch.bfloat16) * width**-0.5
    token_ids = torch.randint(vocab_size, (num_rows,), device="cuda")
    scales = make_scales(torch.device("cuda"), num_rows)
    results = []
    # The library takes its workspaces at its first products.
    fixed_scale_gradients(hidden[:8], weight, token_ids[:8], scales.part(slice(0, 8)))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results.append(fixed_scale_gradients(hidden, weight, token_ids, scales))
        extra = torch.cuda.max_memory_allocated() - before
        assert extra <= 0.25e9, f"{extra / 1e9:.3f} GB beside the inputs"
    assert_equal(*results)
