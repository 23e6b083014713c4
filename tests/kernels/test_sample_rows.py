"""kernels/sample_rows.py, as `sample_logits`: one row of logits to one token.

The interpreter's time goes by operations, so most tests hold a row in one part where a GPU holds it
in eight of 16 bytes a thread; both tiles are compared once.
"""

import json
from pathlib import Path

import pytest
import torch
import triton
from safetensors.torch import load_file
from torch import Tensor

from argrpo.kernels import guided_sampling
from argrpo.kernels import sample_rows as module
from argrpo.kernels.counter_random import gumbel_noise
from argrpo.kernels.draw import Draw, DrawKeys, DrawSettings
from argrpo.kernels.guided_sampling import sample_logits, sample_logits_reference
from argrpo.kernels.sample_rows import RowTile, row_tile
from argrpo.kernels.token_filter import filter_mask, unpack_support

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
INF = float("inf")
# fp32 sums of up to 16,384 terms in pairs or eighths, against fp64: relative 1e-6. Distances below
# the maximum are products of fp32 numbers, so a log-prob of -1000 may be off by 1e-3.
RTOL, ATOL = 2e-6, 1e-5
# Two noisy logits closer than this may change places: fp32 rounding of sums up to 23.
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    if NATIVE:
        return

    def whole(vocab_size: int) -> RowTile:
        return RowTile(max(16, triton.next_power_of_2(vocab_size)), 1, 16)

    monkeypatch.setattr(module, "row_tile", whole)


def _keys(num_rows: int, seed: int = 7) -> DrawKeys:
    ids = torch.arange(num_rows, device=DEVICE)
    return DrawKeys(torch.tensor([seed], device=DEVICE), 1000 + ids, 3 * ids)


def _settings(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> DrawSettings:
    scalars = torch.tensor([1.0, temperature, top_k, top_p], device=DEVICE)
    return DrawSettings(scalars, filtered=top_k > 0 or top_p < 1)


def _support(draw: Draw) -> Tensor:
    assert draw.support is not None
    return draw.support


def _assert_as_specified(
    draw: Draw, logits: Tensor, keys: DrawKeys, settings: DrawSettings
) -> None:
    """A draw against the reference in fp64."""
    wide = logits.double()
    want = sample_logits_reference(wide, keys, settings, support=settings.filtered)
    _, temperature, top_k, top_p = settings.scalars.tolist()
    kept = torch.ones_like(wide, dtype=torch.bool)
    if settings.filtered:
        kept = filter_mask(wide, top_k, top_p, temperature or 1.0)
        differ = unpack_support(_support(draw), wide.shape[1]) != kept
        assert not differ.any(), f"kept set differs at {differ.nonzero()[:5].tolist()}"
    scaled = (wide / (temperature or 1.0)).masked_fill(~kept, -INF)
    noisy = scaled + gumbel_noise(keys, wide.shape[1]) * bool(temperature)
    drawn = noisy.gather(1, draw.token_ids[:, None])[:, 0]
    assert (noisy.amax(dim=1) - drawn <= (CLOSE if temperature else 0)).all()
    chosen = scaled.log_softmax(dim=1).gather(1, draw.token_ids[:, None])[:, 0]
    expected = chosen if temperature else torch.zeros_like(chosen)
    torch.testing.assert_close(draw.logprobs.double(), expected, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(
        draw.entropies.double(), want.entropies.double(), rtol=RTOL, atol=ATOL
    )


@pytest.mark.parametrize("vocab_size", [1, 7, 999, 1024, 4097])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (50, 0.95), (0, 0.95), (0, 1e-6), (5000, 0.5)]
)
def test_draw_is_as_specified(vocab_size: int, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(2, vocab_size, device=DEVICE)
    keys, settings = _keys(2), _settings(0.8, top_k, top_p)
    draw = sample_logits(logits, keys, settings, support=settings.filtered)
    _assert_as_specified(draw, logits, keys, settings)


@pytest.mark.parametrize("top_k", [0, 1, 2000, 16384])
@pytest.mark.parametrize("top_p", [1e-6, 0.95, 1.0])
def test_draw_from_16384_tokens_is_as_specified(top_k: int, top_p: float) -> None:
    logits = torch.randn(1, 16384, device=DEVICE)
    keys, settings = _keys(1), _settings(1.0, top_k, top_p)
    draw = sample_logits(logits, keys, settings, support=settings.filtered)
    _assert_as_specified(draw, logits, keys, settings)


def _special_rows(vocab_size: int) -> dict[str, Tensor]:
    gaussian = torch.randn(vocab_size)
    one_hot = torch.full((vocab_size,), -20.0)
    one_hot[vocab_size // 2] = 30.0
    mostly_impossible = torch.full((vocab_size,), -INF)
    mostly_impossible[::37] = gaussian[::37]
    return {
        "all negative": gaussian - 500,
        "one hot": one_hot,
        "many ties": (gaussian * 4).round() / 4,
        "all equal": torch.full((vocab_size,), -3.25),
        "mostly -inf": mostly_impossible,
        "one possible": torch.full((vocab_size,), -INF).index_fill(0, torch.tensor(17), 2.0),
        "huge range": gaussian * 10.0 ** torch.linspace(-30, 30, vocab_size),
        "close to each other": 1 + gaussian.round() * 2.0**-23,
        "zeros of both signs": torch.zeros(vocab_size).copysign(gaussian),
    }


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (300, 1.0), (0, 0.5), (50, 0.9), (1, 0.95), (2000, 0.9999)]
)
def test_special_rows_are_drawn_as_specified(top_k: int, top_p: float) -> None:
    rows = _special_rows(999)
    logits = torch.stack(list(rows.values())).to(DEVICE)
    keys, settings = _keys(len(rows)), _settings(1.0, top_k, top_p)
    draw = sample_logits(logits, keys, settings, support=settings.filtered)
    _assert_as_specified(draw, logits, keys, settings)


def test_kept_sets_are_those_of_the_golden_cases(golden: Path) -> None:
    case = json.loads((golden / "sampling_filter" / "case.json").read_text(encoding="utf-8"))
    tensors = load_file(golden / "sampling_filter" / "expected.safetensors")
    logits = tensors["logits"].to(DEVICE)
    ambiguous = {tuple(pair) for pair in case["facts"]["ambiguous_grid_row_pairs"]}
    for i, (temperature, top_k, top_p) in enumerate(tensors["grid"].tolist()):
        settings = _settings(max(temperature, 1e-5), int(top_k), top_p)._replace(filtered=True)
        draw = sample_logits(logits, _keys(len(logits)), settings, support=True)
        kept = unpack_support(_support(draw), logits.shape[1]).cpu()
        wanted = unpack_support(tensors["kept_bits"][i], logits.shape[1])
        for row in range(len(logits)):
            if (i, row) in ambiguous:
                assert kept[row].sum() == tensors["kept_count"][i, row]
                values = (tensors["logits"][row][m].sort().values for m in (kept[row], wanted[row]))
                torch.testing.assert_close(*values, rtol=0, atol=0)
            elif tensors["nucleus_margin"][i, row] <= 5e-6:
                # a token whose mass before it lies within 5e-6 of p may fall on either side
                assert (kept[row] != wanted[row]).sum() <= 1, (i, row)
            else:
                assert torch.equal(kept[row], wanted[row]), (i, row)


def test_the_tile_of_a_gpu_keeps_and_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.stack([torch.randn(4100), *_special_rows(4100).values()][:6]).to(DEVICE)
    keys, settings = _keys(6), _settings(0.9, 700, 0.9)
    tiles = (row_tile(4100), RowTile(8192, 1, 8), RowTile(1024, 2, 8))  # the last one streams
    draws = []
    for tile in tiles:
        monkeypatch.setattr(module, "row_tile", lambda vocab_size, tile=tile: tile)
        draws.append(sample_logits(logits, keys, settings, support=True))
    _assert_as_specified(draws[0], logits, keys, settings)
    for draw in draws[1:]:
        assert torch.equal(draw.token_ids, draws[0].token_ids)
        assert torch.equal(_support(draw), _support(draws[0]))
        torch.testing.assert_close(draw.logprobs, draws[0].logprobs, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    ("shape", "top_k", "top_p"),
    [((1, 16384), 2000, 0.95), ((1, 999), 0, 0.5), ((3, 1024), 600, 0.92), ((3, 4097), 0, 1.0)],
    ids=str,
)
def test_the_tile_of_a_gpu_draws_as_specified(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], top_k: int, top_p: float
) -> None:
    monkeypatch.setattr(module, "row_tile", row_tile)
    logits = 3 * torch.randn(shape, device=DEVICE)
    keys, settings = _keys(len(logits)), _settings(0.7, top_k, top_p)
    draw = sample_logits(logits, keys, settings, support=settings.filtered)
    _assert_as_specified(draw, logits, keys, settings)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (600, 0.92), (1, 1.0), (0, 0.5)])
def test_a_cpu_draws_in_fp32_as_specified_in_fp64(
    monkeypatch: pytest.MonkeyPatch, temperature: float, top_k: int, top_p: float
) -> None:
    monkeypatch.setattr(guided_sampling, "uses_triton", lambda tensor: False)
    logits = 3 * torch.randn(3, 4097, device=DEVICE)
    keys, settings = _keys(3), _settings(temperature, top_k, top_p)
    draw = sample_logits(logits, keys, settings, support=settings.filtered)
    _assert_as_specified(draw, logits, keys, settings)


def test_a_row_too_long_for_the_chip_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "row_tile", row_tile)
    assert row_tile(20000).width * row_tile(20000).parts < 20000
    logits = torch.randn(1, 20000, device=DEVICE)
    keys, settings = _keys(1), _settings(1.0, 2000, 0.95)
    draw = sample_logits(logits, keys, settings, support=True)
    _assert_as_specified(draw, logits, keys, settings)


@pytest.mark.parametrize("filtered", [False, True])
def test_greedy_takes_the_first_of_the_largest(filtered: bool) -> None:
    logits = torch.stack(list(_special_rows(999).values())).to(DEVICE)
    settings = _settings(0.0, 50 if filtered else 0)
    draw = sample_logits(logits, _keys(len(logits)), settings, support=filtered)
    largest = logits == logits.amax(dim=1, keepdim=True)
    assert draw.token_ids.tolist() == largest.int().argmax(dim=1).tolist()
    assert draw.logprobs.tolist() == draw.entropies.tolist() == [0.0] * len(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filtered", [False, True])
# numpy says so where a GPU does not
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN")
def test_broken_rows_say_nan_and_give_a_token_in_range(temperature: float, filtered: bool) -> None:
    broken = torch.randn(5, 100)
    broken[0] = float("nan")
    broken[1] = -INF
    broken[2, 13] = float("nan")
    broken[3, 99] = INF
    settings = _settings(temperature, 10 if filtered else 0, 0.9 if filtered else 1.0)
    draw = sample_logits(broken.to(DEVICE), _keys(5), settings)
    assert ((draw.token_ids >= 0) & (draw.token_ids < 100)).all()
    assert draw.logprobs.isnan().tolist() == [True, True, True, True, False]
    assert draw.entropies.isnan().tolist() == [True, True, True, True, False]


def test_a_row_gives_the_same_bits_alone_in_any_batch_and_again() -> None:
    logits = 2 * torch.randn(4, 999, device=DEVICE)
    keys, settings = _keys(4), _settings(0.9, 100, 0.9)
    batch, again = (sample_logits(logits, keys, settings, support=True) for _ in range(2))
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    moved = DrawKeys(keys.seed, keys.image_ids[order], keys.positions[order])
    permuted = sample_logits(logits[order], moved, settings, support=True)
    for name in ("token_ids", "logprobs", "entropies", "support"):
        whole = getattr(batch, name)
        assert torch.equal(whole, getattr(again, name)), name
        assert torch.equal(whole[order], getattr(permuted, name)), name
    for row in range(4):
        key = DrawKeys(keys.seed, keys.image_ids[row : row + 1], keys.positions[row : row + 1])
        alone = sample_logits(logits[row : row + 1], key, settings, support=True)
        assert torch.equal(alone.logprobs, batch.logprobs[row : row + 1])
        assert torch.equal(_support(alone), _support(batch)[row : row + 1])


def test_another_seed_image_or_position_draws_another_token() -> None:
    logits = torch.zeros(1, 4096, device=DEVICE)
    base = _keys(1)
    others = [
        base,
        base._replace(seed=base.seed + 1),
        base._replace(image_ids=base.image_ids + 1),
        base._replace(positions=base.positions + 1),
    ]
    tokens = {sample_logits(logits, keys, _settings()).token_ids.item() for keys in others}
    assert len(tokens) == 4


@pytest.mark.gpu
def test_rows_past_two_to_the_31_logits_are_found() -> None:
    num_rows = 2**31 // 16384 + 2
    logits = torch.zeros(num_rows, 16384, device=DEVICE)
    logits[-1, 4321] = 50.0
    draw = sample_logits(logits, _keys(num_rows), _settings(1.0, 2000, 0.95), support=True)
    assert draw.token_ids[-1] == 4321
    assert _support(draw)[-1].sum() == 0b01000000


@pytest.mark.gpu
def test_a_draw_is_captured_and_replays_from_what_the_device_holds() -> None:
    logits = torch.randn(8, 16384, device=DEVICE)
    keys, settings = _keys(8), _settings(1.0, 2000, 0.95)
    sample_logits(logits, keys, settings, support=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample_logits(logits, keys, settings, support=True)
    for _ in range(3):
        keys.positions.add_(1)
        settings.scalars[1] *= 0.9
        graph.replay()
        eager = sample_logits(logits, keys, settings, support=True)
        for name in ("token_ids", "logprobs", "entropies", "support"):
            assert torch.equal(getattr(captured, name), getattr(eager, name)), name
