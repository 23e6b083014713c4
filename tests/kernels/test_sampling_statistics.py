"""What is drawn has the distribution it should have.

The reference draws the bulk. That the kernels draw the same tokens from the same logits is tested
here once more over many rows, and in test_counter_random.py bit for bit.

Seeds are fixed, so a test passes always or never; bounds are five standard deviations.
"""

import pytest
import torch
from torch import Tensor

from argrpo.kernels import guided_sampling as module
from argrpo.kernels.draw import DrawKeys, DrawSettings
from argrpo.kernels.guided_sampling import (
    filter_mask,
    guided_sample,
    gumbel_noise,
    sample_logits,
    sample_logits_reference,
)

INF = float("inf")
NUM_ROWS = 20_000
NUM_POSITIONS = 10  # 200,000 draws


def _keys(num_rows: int, position: int, device: str = "cpu") -> DrawKeys:
    ids = torch.arange(num_rows, device=device)
    seed = torch.tensor([2026], device=device)
    return DrawKeys(seed, ids, torch.full_like(ids, position))


def _settings(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> DrawSettings:
    scalars = torch.tensor([1.0, temperature, top_k, top_p])
    return DrawSettings(scalars, filtered=top_k > 0 or top_p < 1)


def _draws(row: Tensor, settings: DrawSettings) -> Tensor:
    """[NUM_POSITIONS, NUM_ROWS] tokens drawn from one row of logits."""
    logits = row.expand(NUM_ROWS, -1)
    keys = (_keys(NUM_ROWS, position) for position in range(NUM_POSITIONS))
    return torch.stack([sample_logits_reference(logits, k, settings).token_ids for k in keys])


def _chi_square_excess(counts: Tensor, probs: Tensor) -> float:
    """(chi-square - degrees of freedom) / its standard deviation; rare bins are pooled."""
    expected = probs.double() * counts.sum()
    common = expected >= 5
    pooled = [torch.cat([t[common], t[~common].sum()[None]]) for t in (counts.double(), expected)]
    observed, expected = (t[: len(t) - int(pooled[1][-1] < 5)] for t in pooled)
    freedom = len(expected) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    return (chi_square - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("vocab_size", "temperature", "top_k", "top_p"),
    [
        (300, 1.0, 0, 1.0),
        (300, 0.6, 0, 1.0),
        (64, 1.0, 20, 1.0),
        (64, 1.2, 0, 0.8),
        (64, 1.0, 30, 0.9),
    ],
)
def test_200000_draws_follow_the_distribution(
    vocab_size: int, temperature: float, top_k: int, top_p: float
) -> None:
    row = 1.5 * torch.randn(vocab_size)
    row[::7] = -INF
    tokens = _draws(row, _settings(temperature, top_k, top_p))
    counts = torch.bincount(tokens.flatten(), minlength=vocab_size)
    kept = filter_mask(row[None], top_k, top_p, temperature)[0]
    probs = (row.double() / temperature).masked_fill(~kept, -INF).softmax(dim=0)
    assert counts[~kept].sum() == 0
    assert not kept[::7].any()
    assert abs(_chi_square_excess(counts, probs)) < 5


def test_tails_10_14_and_18_logits_below_the_head_keep_their_weight() -> None:
    row = torch.zeros(1024)
    groups = {10: slice(1, 342), 14: slice(342, 683), 18: slice(683, 1024)}
    for depth, group in groups.items():
        row[group] = -float(depth)
    counts = torch.bincount(_draws(row, _settings()).flatten(), minlength=1024)
    probs = row.double().softmax(dim=0)
    for depth, group in groups.items():
        expected = (probs[group].sum() * NUM_ROWS * NUM_POSITIONS).item()  # 3040, 56 and 1
        assert abs(counts[group].sum().item() - expected) < 5 * expected**0.5, depth


def test_neighbouring_images_draw_independently() -> None:
    row = torch.randn(8)
    tokens = _draws(row, _settings())
    probs = row.double().softmax(dim=0)
    neighbours = {
        "image": (tokens[:, 0::2], tokens[:, 1::2]),
        "position": (tokens[0::2], tokens[1::2]),
    }
    for name, (left, right) in neighbours.items():
        counts = torch.bincount((8 * left + right).flatten(), minlength=64)
        joint = (probs[:, None] * probs[None, :]).flatten()
        assert abs(_chi_square_excess(counts, joint)) < 5, name


def test_kernel_and_reference_draw_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(module, "_MAX_FUSED_ROWS", 1000)
    hidden = torch.randn(256, 32).half()
    head = torch.randn(200, 32).half()
    keys, settings = _keys(256, 3, device), _settings(2.0)
    settings = settings._replace(scalars=settings.scalars.to(device))
    draw = guided_sample(hidden.to(device), None, head.to(device), keys, settings)
    noisy = hidden.double() @ head.double().t() / 2 + gumbel_noise(_keys(256, 3), 200)
    best = noisy.topk(2, dim=1)
    differs = draw.token_ids.cpu() != best.indices[:, 0]
    assert (best.values[differs, 0] - best.values[differs, 1] < 1e-5).all()
    assert differs.sum() <= 1


@pytest.mark.gpu
def test_a_tail_18_logits_below_keeps_its_weight_over_two_million_draws() -> None:
    logits = torch.full((65536, 16384), -18.0, device="cuda")
    logits[:, 0] = 0.0
    settings = _settings()
    settings = settings._replace(scalars=settings.scalars.cuda())
    draws = [
        sample_logits(logits, _keys(65536, position, "cuda"), settings).token_ids
        for position in range(32)
    ]
    tail = sum(int((tokens > 0).sum()) for tokens in draws)
    expected = 32 * 65536 * 16383 * torch.tensor(-18.0).double().exp().item()  # 523
    assert abs(tail - expected) < 5 * expected**0.5
