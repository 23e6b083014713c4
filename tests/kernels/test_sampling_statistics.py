"""What is drawn has the distribution it should have.

The reference draws the bulk. That the kernels draw the same tokens from the same logits is tested
here once more over many rows, and in test_counter_random.py bit for bit.

Seeds are fixed, so a test passes always or never; bounds are five standard deviations.
"""

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from argrpo.kernels import guided_sampling as module
from argrpo.kernels.counter_random import _row_keys, gumbel_noise
from argrpo.kernels.draw import DrawKeys, DrawSettings
from argrpo.kernels.guided_sampling import guided_sample, sample_logits, sample_logits_reference
from argrpo.kernels.token_filter import filter_mask

INF = float("inf")
NUM_ROWS = 20_000
NUM_POSITIONS = 10  # 200,000 draws
_WORD = 0xFFFFFFFF


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


def test_tails_10_and_14_logits_below_the_head_keep_their_weight() -> None:
    row = torch.zeros(1024)
    groups = {10: slice(1, 342), 14: slice(342, 1024)}
    for depth, group in groups.items():
        row[group] = -float(depth)
    counts = torch.bincount(_draws(row, _settings()).flatten(), minlength=1024)
    probs = row.double().softmax(dim=0)
    for depth, group in groups.items():
        expected = (probs[group].sum() * NUM_ROWS * NUM_POSITIONS).item()  # 3040 and 112
        assert abs(counts[group].sum().item() - expected) < 5 * expected**0.5, depth


def test_a_tail_18_logits_below_the_head_keeps_its_weight_over_200000_draws() -> None:
    keys, tokens = _deep_draws()
    expected = NUM_ROWS * NUM_POSITIONS * (16384 - 1) * math.exp(-18.0)  # 49.9
    assert abs(len(tokens) - expected) < 5 * expected**0.5
    noise = gumbel_noise(keys, 16384)
    assert (noise.gather(1, tokens[:, None])[:, 0] - noise[:, 0] > 18).all()
    draw = sample_logits_reference(_deep_row().expand(len(tokens), -1), keys, _settings())
    assert torch.equal(draw.token_ids, tokens)


@pytest.mark.parametrize("way", ["row kernel", "head product"])
def test_the_kernels_draw_from_a_tail_18_logits_below_the_head(way: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    all_keys, all_tokens = _deep_draws()
    keys = DrawKeys(all_keys.seed, all_keys.image_ids[:4], all_keys.positions[:4])
    keys, tokens = DrawKeys(*(key.to(device) for key in keys)), all_tokens[:4]
    settings = _settings()
    settings = settings._replace(scalars=settings.scalars.to(device))
    row = _deep_row().to(device)
    if way == "row kernel":
        draw = sample_logits(row.repeat(4, 1), keys, settings)
    else:
        hidden = torch.ones(4, 1, dtype=torch.float16, device=device)
        draw = guided_sample(hidden, None, row[:, None].half(), keys, settings)
    assert torch.equal(draw.token_ids.cpu(), tokens)


def _deep_row() -> Tensor:
    """[16384] logits: a head of 0, all others 18 below."""
    return torch.full((16384,), -18.0).index_fill_(0, torch.tensor(0), 0.0)


@cache
def _deep_draws() -> tuple[DrawKeys, Tensor]:
    """Of 200,000 draws from `_deep_row`, the keys and tokens of those that leave the head.

    The hash can be inverted: of the few words whose noise is above 16.5 one asks which tokens are
    theirs. The head's own noise is below -1.5 in 1 of 90 draws; those that need less are missed.
    """
    words = torch.arange(int(2**32 * math.exp(-16.5)))
    found_keys, found_tokens = [], []
    for position in range(NUM_POSITIONS):
        keys = _keys(NUM_ROWS, position)
        first, second = _row_keys(keys).long() & _WORD
        tokens = _unmixed((_unmixed(words) - second[:, None]) & _WORD) ^ first[:, None]
        rows, columns = ((tokens > 0) & (tokens < 16384)).nonzero(as_tuple=True)
        near = DrawKeys(keys.seed, keys.image_ids[rows], keys.positions[rows])
        noise = gumbel_noise(near, 16384)
        drawn = tokens[rows, columns]
        leaves = noise.gather(1, drawn[:, None])[:, 0] - 18 > noise[:, 0]
        found_keys.append((near.image_ids[leaves], near.positions[leaves]))
        found_tokens.append(drawn[leaves])
    ids, positions = (torch.cat(parts) for parts in zip(*found_keys, strict=True))
    return DrawKeys(_keys(1, 0).seed, ids, positions), torch.cat(found_tokens)


def _unmixed(x: Tensor) -> Tensor:
    """The inverse of the hash's mixer, on 32-bit words held as int64."""
    x = x ^ (x >> 16)
    x = (x * pow(0x846CA68B, -1, 2**32)) & _WORD
    x = x ^ (x >> 15) ^ (x >> 30)
    x = (x * pow(0x7FEB352D, -1, 2**32)) & _WORD
    return x ^ (x >> 16)


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
