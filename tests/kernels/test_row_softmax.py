"""kernels/row_softmax.py against fp64, on ordinary rows and on the ones that break naive kernels.

Each test runs on the kernel (Triton's interpreter, or a GPU) and on the path of a CPU.

Tolerance: a logit x is rounded after the division by the temperature and again in x - normaliser,
so a log-prob, and the relative error of a probability, may be off by a few ulps of the largest |x|;
exp and log add about 1e-6. bf16 output: one unit in the last place, because the interpreter
truncates where a GPU rounds.
"""

import pytest
import torch
from torch import Tensor

from argrpo.kernels import row_softmax
from argrpo.kernels._checks import uses_triton
from argrpo.kernels.kl import k3
from argrpo.kernels.row_softmax import (
    row_gradient_,
    row_scores,
    row_scores_and_gradient_,
    row_scores_reference,
)
from argrpo.kernels.rows import FixedScales, Rows, RowScores
from argrpo.kernels.token_filter import pack_support

CASES = [  # rows and codebook, temperature, part of the tokens in the support (None: all)
    ((1, 7), 1.0, None),
    ((1, 7), 0.7, 0.5),
    ((63, 999), 0.7, 0.1),
    ((3, 1024), 1.0, None),
    ((3, 1024), 1.3, 0.1),
    ((3, 4097), 0.7, None),
    ((2, 16384), 1.0, None),
    ((2, 16384), 0.7, 0.1),
]
# The interpreter computes with numpy, which warns where a GPU is silent.
NAN_IS_MEANT = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
BF16_ULP = 2.0**-7


@pytest.fixture(params=["kernel", "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Runs each test on both implementations."""
    if request.param == "cpu":
        monkeypatch.setattr(row_softmax, "uses_triton", lambda tensor: False)
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tolerance(logits: Tensor) -> float:
    largest = logits[logits.isfinite()].abs().max().item()
    return 2e-6 + 4 * 2.0**-23 * largest


def make_rows(
    shape: tuple[int, int],
    device: torch.device,
    temperature: float = 1.0,
    kept: float | None = None,
) -> tuple[Tensor, Rows]:
    """Logits of standard deviation 4, random tokens, and a support of about that part."""
    logits = 4 * torch.randn(shape, device=device)
    token_ids = torch.randint(shape[1], (shape[0],), device=device)
    support = None if kept is None else pack_support(torch.rand(shape, device=device) < kept)
    return logits, Rows(token_ids, temperature, support)


def gradient(
    logits: Tensor, rows: Rows, of_logprobs: Tensor, of_entropies: Tensor | None, **options: object
) -> Tensor:
    out = torch.empty_like(logits, **options)
    scores = row_scores(logits, rows)
    row_gradient_(logits.clone(), rows, scores, of_logprobs, of_entropies, out)
    return out


def fp64_gradient(logits: Tensor, rows: Rows, of_logprobs: Tensor, of_entropies: Tensor) -> Tensor:
    wide = logits.double().requires_grad_()
    scores = row_scores_reference(wide, rows)
    outputs = scores.logprobs, scores.entropies
    return torch.autograd.grad(outputs, wide, (of_logprobs.double(), of_entropies.double()))[0]


@pytest.mark.parametrize(("shape", "temperature", "kept"), CASES, ids=str)
def test_scores_and_gradient_agree_with_fp64(
    shape: tuple[int, int], temperature: float, kept: float | None, device: torch.device
) -> None:
    logits, rows = make_rows(shape, device, temperature, kept)
    of_logprobs, of_entropies = torch.randn(2, shape[0], device=device)
    limit = tolerance(logits / temperature)
    expected = row_scores_reference(logits.double(), rows)
    for name, got, want in zip(expected._fields, row_scores(logits, rows), expected, strict=True):
        assert got.dtype == torch.float32, name
        torch.testing.assert_close(
            got.double(), want, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, of_entropy in (("logprobs", torch.zeros_like(of_entropies)), ("both", of_entropies)):
        want = fp64_gradient(logits, rows, of_logprobs, of_entropy)
        got = gradient(logits, rows, of_logprobs, None if name == "logprobs" else of_entropy)
        worst = (got - want).abs().max().item()
        # |g| (|log p| + H) bounds a gradient beside p; 4 x 20 nats covers these rows.
        assert worst <= 4 * limit / temperature, f"d logits of {name}: off by {worst}"


def test_gradient_in_bf16_is_the_fp32_gradient_rounded(device: torch.device) -> None:
    logits, rows = make_rows((3, 999), device)
    of_logprobs, of_entropies = torch.randn(2, 3, device=device)
    exact = gradient(logits, rows, of_logprobs, of_entropies)
    rounded = gradient(logits, rows, of_logprobs, of_entropies, dtype=torch.bfloat16)
    torch.testing.assert_close(rounded.float(), exact, rtol=BF16_ULP, atol=0)


def test_gradient_may_overwrite_its_logits(device: torch.device) -> None:
    logits, rows = make_rows((3, 999), device, temperature=0.7, kept=0.3)
    of_logprobs, of_entropies = torch.randn(2, 3, device=device)
    expected = gradient(logits, rows, of_logprobs, of_entropies)
    scores = row_scores(logits, rows)
    row_gradient_(logits, rows, scores, of_logprobs, of_entropies, logits)
    assert torch.equal(logits, expected)


def test_scores_leave_the_logits_as_they_are(device: torch.device) -> None:
    logits, rows = make_rows((2, 999), device, temperature=0.7, kept=0.3)
    before = logits.clone()
    row_scores(logits, rows)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("in_place", [False, True], ids=["bf16 out", "in place"])
@pytest.mark.parametrize("vocab_size", [999, 4097])
def test_one_launch_gives_the_bits_of_two(
    vocab_size: int, in_place: bool, device: torch.device
) -> None:
    logits, rows = make_rows((3, vocab_size), device, temperature=0.7, kept=0.3)
    scales = FixedScales(torch.randn(3, device=device), entropies=torch.randn(3, device=device))
    dtype = torch.float32 if in_place else torch.bfloat16
    scores = row_scores(logits, rows)
    expected = gradient(logits, rows, scales.logprobs, scales.entropies, dtype=dtype)
    out = logits if in_place else torch.empty_like(logits, dtype=dtype)
    got = row_scores_and_gradient_(logits, rows, scales, out)
    for name, one, two in zip(got._fields, got, scores, strict=True):
        assert torch.equal(one, two), name
    assert torch.equal(out, expected)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_the_scale_of_a_kl_goes_through_k3_into_the_logits(
    with_entropy: bool, device: torch.device
) -> None:
    logits, rows = make_rows((3, 999), device, temperature=0.7, kept=0.3)
    of_logprobs, of_kl, of_entropies = torch.randn(3, 3, device=device)
    ref_logprobs = row_scores(logits, rows).logprobs + torch.randn(3, device=device)
    scales = FixedScales(of_logprobs, of_kl, ref_logprobs, of_entropies if with_entropy else None)
    wide = logits.double().requires_grad_()
    want = row_scores_reference(wide, rows)
    loss = (want.logprobs * of_logprobs + k3(want.logprobs, ref_logprobs.double()) * of_kl).sum()
    if with_entropy:
        loss = loss + (want.entropies * of_entropies).sum()
    (expected,) = torch.autograd.grad(loss, wide)
    out = torch.empty_like(logits)
    limit = tolerance(logits / 0.7)
    row_scores_and_gradient_(logits.clone(), rows, scales, out)
    # As above, and a ratio of up to e^2 beside the other scales.
    assert (out - expected).abs().max().item() <= 4 * 8 * limit / 0.7


@pytest.mark.parametrize("vocab_size", [999, 16384])
def test_a_row_does_not_depend_on_its_batch(vocab_size: int, device: torch.device) -> None:
    logits, rows = make_rows((5, vocab_size), device, temperature=0.7, kept=0.5)
    of_logprobs, of_entropies = torch.randn(2, 5, device=device)
    together = row_scores(logits, rows)
    d_together = gradient(logits, rows, of_logprobs, of_entropies)
    for row in range(5):
        only = slice(row, row + 1)
        alone = row_scores(logits[only], rows.part(only))
        for name, one, many in zip(alone._fields, alone, together.part(only), strict=True):
            assert torch.equal(one, many), f"{name} of row {row}"
        part = gradient(logits[only], rows.part(only), of_logprobs[only], of_entropies[only])
        assert torch.equal(part, d_together[only]), f"d logits of row {row}"


def test_the_same_input_twice_gives_the_same_bits(device: torch.device) -> None:
    logits, rows = make_rows((3, 4097), device)
    of_logprobs, of_entropies = torch.randn(2, 3, device=device)
    for name, one, two in zip(
        RowScores._fields, row_scores(logits, rows), row_scores(logits, rows), strict=True
    ):
        assert torch.equal(one, two), name
    first, second = (gradient(logits, rows, of_logprobs, of_entropies) for _ in range(2))
    assert torch.equal(first, second)


def test_logits_far_below_zero_keep_their_precision(device: torch.device) -> None:
    # A maximum that starts at 0, or a masked load filled with 0, underflows here.
    logits, rows = make_rows((2, 999), device)
    shifted = logits.round(decimals=2) - 1000.0
    got, want = row_scores(shifted, rows), row_scores_reference(shifted.double(), rows)
    torch.testing.assert_close(got.entropies.double(), want.entropies, rtol=0, atol=1e-5)
    # x - normaliser may round once at 1000 on a CPU
    torch.testing.assert_close(
        got.logprobs.double(), want.logprobs, rtol=0, atol=tolerance(shifted)
    )


def test_logits_of_minus_infinity_are_impossible_tokens(device: torch.device) -> None:
    logits, rows = make_rows((3, 999), device)
    of_logprobs, of_entropies = torch.randn(2, 3, device=device)
    banned = torch.rand_like(logits) < 0.9
    banned.scatter_(1, rows.token_ids[:, None], False)
    logits[banned] = -torch.inf
    by_support = Rows(rows.token_ids, 1.0, pack_support(~banned))
    got = row_scores(logits, rows)
    for name, one, other in zip(got._fields, got, row_scores(logits, by_support), strict=True):
        assert one.isfinite().all(), name
        assert torch.equal(one, other), name
    d_logits = gradient(logits, rows, of_logprobs, of_entropies)
    assert (d_logits[banned] == 0).all()
    want = fp64_gradient(logits, rows, of_logprobs, of_entropies)
    torch.testing.assert_close(d_logits.double(), want, rtol=0, atol=4 * tolerance(logits))


def test_a_row_with_one_possible_token_is_certain(device: torch.device) -> None:
    logits = torch.full((1, 4097), -torch.inf, device=device)
    logits[0, 4096] = -3.0
    rows = Rows(torch.tensor([4096], device=device), 0.7, None)
    scores = row_scores(logits, rows)
    assert scores.logprobs.item() == 0.0
    assert scores.entropies.item() == 0.0
    ones = torch.ones(1, device=device)
    d_logits = gradient(logits, rows, ones, ones)
    # p = exp(x - normaliser) is 1 to rounding
    assert d_logits.abs().max().item() <= 1e-6


@NAN_IS_MEANT
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_is_nan_and_spoils_no_other(bad: float, device: torch.device) -> None:
    logits, rows = make_rows((3, 999), device)
    of_logprobs, of_entropies = torch.randn(2, 3, device=device)
    whole = logits.clone()
    logits[1, 500] = bad
    got = row_scores(logits, rows)
    for name, values in zip(got._fields[:2], got[:2], strict=True):
        assert values.isnan().tolist() == [False, True, False], name
    d_logits = gradient(logits, rows, of_logprobs, of_entropies)
    assert d_logits.isnan().any(dim=1).tolist() == [False, True, False]
    untouched = gradient(whole, rows, of_logprobs, of_entropies)
    assert torch.equal(d_logits[[0, 2]], untouched[[0, 2]])


@NAN_IS_MEANT
def test_a_row_without_any_possible_token_is_nan(device: torch.device) -> None:
    logits = torch.full((1, 999), -torch.inf, device=device)
    scores = row_scores(logits, Rows(torch.zeros(1, dtype=torch.int64, device=device), 1.0, None))
    assert scores.logprobs.isnan().item()
    assert scores.entropies.isnan().item()


def test_the_given_token_counts_even_outside_its_support(device: torch.device) -> None:
    logits, _ = make_rows((1, 999), device)
    kept = torch.zeros(1, 999, dtype=torch.bool, device=device)
    kept[0, :3] = True
    rows = Rows(torch.tensor([998], device=device), 1.0, pack_support(kept))
    probs = logits[0, [0, 1, 2, 998]].double().softmax(dim=0)
    scores = row_scores(logits, rows)
    limit = tolerance(logits)
    assert scores.logprobs.item() == pytest.approx(probs[3].log().item(), abs=limit)
    assert scores.entropies.item() == pytest.approx(-(probs * probs.log()).sum().item(), abs=limit)


def test_a_token_id_outside_the_vocabulary_gives_nan_on_the_kernel(device: torch.device) -> None:
    logits, _ = make_rows((2, 999), device)
    rows = Rows(torch.tensor([999, -1], device=device), 1.0, None)
    if not uses_triton(logits) or row_softmax.uses_triton is not uses_triton:
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            row_scores(logits, rows)
        return
    assert row_scores(logits, rows).logprobs.isnan().all()


def test_wrong_inputs_are_refused_by_name(device: torch.device) -> None:
    logits, rows = make_rows((2, 16), device, kept=0.5)
    cases = [
        ("logits", logits.bfloat16(), rows),
        ("logits", logits[0], rows),
        ("logits", logits.t().contiguous().t(), rows),
        ("token_ids", logits, rows._replace(token_ids=rows.token_ids[:1])),
        ("token_ids", logits, rows._replace(token_ids=rows.token_ids.int())),
        ("support", logits, rows._replace(support=rows.support[:, :1])),
        ("support", logits, rows._replace(support=rows.support.bool())),
        ("temperature", logits, rows._replace(temperature=0.0)),
        ("temperature", logits, rows._replace(temperature=float("nan"))),
    ]
    for name, given, given_rows in cases:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            row_scores(given, given_rows)
    scores, ones = row_scores(logits, rows), torch.ones(2, device=device)
    for field in scores._fields:
        short = scores._replace(**{field: ones[:1]})
        with pytest.raises(ValueError, match=rf"^out\.{field}: expected shape"):
            row_scores(logits, rows, short)
        strided = scores._replace(**{field: torch.ones(4, device=device)[::2]})
        with pytest.raises(ValueError, match=rf"^scores\.{field}: expected a contiguous"):
            row_gradient_(logits, rows, strided, ones, ones, logits)
    bad_gradients = [
        ("dlogprobs", ones.double(), ones, logits),
        ("dentropies", ones, ones[:1], logits),
        ("out", ones, ones, logits.t()),
        ("out", ones, ones, logits.double()),
    ]
    for name, of_logprobs, of_entropies, out in bad_gradients:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            row_gradient_(logits, rows, scores, of_logprobs, of_entropies, out)
    bad_scales = [
        ("scales.logprobs", FixedScales(ones[:1])),
        ("scales.entropies", FixedScales(ones, entropies=ones.double())),
        ("scales.ref_logprobs", FixedScales(ones, ones, ones[:1])),
        ("scales.kl", FixedScales(ones, kl=ones)),
        ("scales.kl", FixedScales(ones, ref_logprobs=ones)),
    ]
    for name, scales in bad_scales:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            row_scores_and_gradient_(logits, rows, scales, logits)
