"""kernels/token_filter.py: the specification of the filters against LlamaGen's and by hand."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from argrpo.kernels.token_filter import filter_mask, pack_support, unpack_support

INF = float("inf")


def test_golden_kept_sets_and_log_probs(golden: Path) -> None:
    case = json.loads((golden / "sampling_filter" / "case.json").read_text(encoding="utf-8"))
    tensors = load_file(golden / "sampling_filter" / "expected.safetensors")
    logits = tensors["logits"].double()
    ambiguous = {tuple(pair) for pair in case["facts"]["ambiguous_grid_row_pairs"]}
    wanted = unpack_support(tensors["kept_bits"].flatten(0, 1), logits.shape[1])
    wanted = wanted.unflatten(0, tensors["kept_count"].shape)
    for i, (temperature, top_k, top_p) in enumerate(tensors["grid"].tolist()):
        temperature = max(temperature, 1e-5)  # the reference's greedy draw
        kept = filter_mask(logits, top_k, top_p, temperature)
        scaled = (logits / temperature).masked_fill(~kept, -INF)
        log_probs = scaled.log_softmax(dim=1)
        for row in range(len(logits)):
            if (i, row) in ambiguous:
                # which of equal logits are cut is open: compare how many and what values
                assert kept[row].sum() == tensors["kept_count"][i, row]
                values = (logits[row][mask].sort().values for mask in (kept[row], wanted[i, row]))
                torch.testing.assert_close(*values, rtol=0, atol=0)
                continue
            assert torch.equal(kept[row], wanted[i, row]), (i, row)
            ids = tensors["chosen_ids"][i, row].long()
            ids = ids[ids >= 0]
            expected = tensors["chosen_logprobs"][i, row, : len(ids)]
            # fp64 on both sides, values down to -1e6 at temperature 1e-5
            torch.testing.assert_close(log_probs[row, ids], expected, rtol=1e-12, atol=1e-9)


def _kept_by_hand(row: list[float], top_k: int, top_p: float) -> list[bool]:
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if 0 < top_k < len(row):
        order = [i for i in order if row[i] >= row[order[top_k - 1]]]
    order = [i for i in order if row[i] > -INF]
    if top_p < 1:
        weights = torch.tensor([row[i] for i in order]).double().softmax(dim=0).tolist()
        before = 0.0
        kept: list[int] = []
        for i, weight in zip(order, weights, strict=True):
            if before > top_p and kept:
                break
            kept.append(i)
            before += weight
        order = kept
    return [i in order for i in range(len(row))]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    row=st.lists(
        st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.5, 2.0, 2.0, 4.0, -INF]), min_size=1, max_size=12
    ).filter(lambda row: max(row) > -INF),
    top_k=st.integers(0, 13),
    # never a sum of a few equal probabilities, where rounding would decide
    top_p=st.sampled_from([1e-9, 0.0371, 0.2517, 0.4871, 0.7443, 0.9519, 1.0]),
)
def test_filter_is_what_one_does_by_hand(row: list[float], top_k: int, top_p: float) -> None:
    kept = filter_mask(torch.tensor([row]), top_k, top_p)
    # fp32, because a threshold travels as fp32
    top_p = torch.tensor(top_p, dtype=torch.float64).item()
    assert kept[0].tolist() == _kept_by_hand(row, top_k, top_p)


def test_ties_at_the_kth_value_stay_and_count_for_top_p() -> None:
    row = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert filter_mask(row, 1, 1.0).tolist() == [[False, True, True, True, False]]
    # Of three equal tokens, 0.5 takes two: the second begins at 1/3 and crosses.
    assert filter_mask(row, 2, 0.5).tolist() == [[False, True, True, False, False]]


def test_temperature_does_not_make_distinct_logits_equal() -> None:
    # Below 2 fp32 numbers lie 2^-23 apart; a quotient above 1 has no room for half of that.
    row = 2 - torch.arange(1.0, 9.0)[None] * 2.0**-23
    assert len(row.unique()) == 8
    assert len((row / 1.9).unique()) < 8
    assert filter_mask(row, 3, 1.0, temperature=1.9).tolist() == [[True] * 3 + [False] * 5]


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 9, 999, 4097])
def test_support_packs_and_unpacks(vocab_size: int) -> None:
    kept = torch.rand(3, vocab_size) < 0.5
    packed = pack_support(kept)
    assert packed.shape == (3, -(-vocab_size // 8))
    assert torch.equal(unpack_support(packed, vocab_size), kept)


def test_the_lowest_token_is_the_highest_bit() -> None:
    kept = torch.zeros(1, 10, dtype=torch.bool)
    kept[0, [0, 9]] = True
    assert pack_support(kept).tolist() == [[0b10000000, 0b01000000]]
    assert _bits(pack_support(kept)) == "1000000001000000"


def _bits(packed: Tensor) -> str:
    return "".join(f"{byte:08b}" for byte in packed[0].tolist())
