"""Scaling on paper, against figures worked out by hand."""

import json
from pathlib import Path

import pytest
import scale_costs
import scale_model
from scale_costs import Cost, Machine, Work, phases, state_bytes, step_cost, traffic
from timing import Ceilings

MACHINE = Machine(
    Ceilings(bytes_per_second=4e12, flops_per_second=800e12),
    rollout_share=0.5, compute_share=0.5, nvlink=450e9, network=50e9,
)  # fmt: skip
XL = Work("XL", 256, images=128, micro_batch=32, guidance_scale=2.0)
# 36 layers of 4 x 1280^2 + 3 x 1280 x 3584; head and embeddings of 16,384 x 1280 twice, 1,001
# classes of 1280.
LAYERS = 36 * (4 * 1280**2 + 3 * 1280 * 3584)
WEIGHTS = LAYERS + 2 * 16384 * 1280 + 1001 * 1280


def row(bench: str, **facts: object) -> dict[str, object]:
    """A row of the very work of `XL`, as a GPU leaves it."""
    return {
        "bench": bench, "contender": "argrpo", "model": "XL", "image_size": 256, "images": 128,
        "guidance_scale": 2.0, "dtype": "bfloat16", "driver": "1", "text_tokens": 0, **facts,
    }  # fmt: skip


ROLLOUT = row("rollout", images_per_s=64.0, rollout_images_per_s=32.0)
TRUNK = row("trunk", images=16, p50_ms=100.0)


def test_the_weights_are_those_of_the_published_model() -> None:
    assert XL.num_weights == WEIGHTS
    # As the paper rounds it, arXiv:2406.06525 table 1.
    assert pytest.approx(775e6, rel=1e-3) == WEIGHTS


def test_phases_follow_from_operations_and_bytes() -> None:
    costs = phases(XL, MACHINE, [])
    tokens, rate = 128 * 256, 400e12
    # Per token: 2 operations a weight, and half of 4 x 256 x 1280 a layer for causal attention.
    trunk = tokens * (2 * LAYERS + 36 * 2 * 256 * 1280)
    head = tokens * 2 * 16384 * 1280
    assert costs["trunk"].seconds == pytest.approx(3 * trunk / rate)
    assert costs["head"].seconds == pytest.approx(3 * head / rate)
    assert costs["reference"].seconds == pytest.approx((trunk + head) / rate)
    assert costs["optimizer"].seconds == pytest.approx(WEIGHTS * 38 / 4e12)
    # Products of 256 steps, twice the layers for two branches, and keys and values of (256 + 1) / 2
    # positions on average: 2 x 36 x 1280 numbers of 2 bytes, 256 sequences. Half the speed.
    products = 128 * (4 * LAYERS + 2 * 16384 * 1280) / 800e12
    cache = 256 * 257 / 2 * 2 * 36 * 1280 * 2 / 4e12
    assert costs["rollout"].seconds == pytest.approx(2 * 256 * (products + cache))
    assert not any(cost.is_measured for cost in costs.values())


def test_the_decoder_is_counted_and_not_guessed() -> None:
    # Its finest level alone, one of five: three blocks of two 3 x 3 convolutions, 128 channels.
    last_level = 6 * 2 * 128 * 128 * 9 * 256**2
    assert last_level < scale_costs.decode_flops(256) < 10 * last_level
    assert scale_costs.decode_flops(512) > 4 * scale_costs.decode_flops(256)


def test_a_ring_sends_twice_its_bytes_but_for_its_own_part() -> None:
    eight = traffic(XL, MACHINE, 8, "data-parallel")
    assert eight.num_bytes == pytest.approx(2 * 7 / 8 * 4 * WEIGHTS)
    assert eight.seconds == pytest.approx(eight.num_bytes / 450e9)
    many = traffic(XL, MACHINE, 1024, "data-parallel")
    assert many.num_bytes == pytest.approx(2 * 1023 / 1024 * 4 * WEIGHTS)
    # Eight links of 50 GB/s leave a node together, less than 450.
    assert many.seconds == pytest.approx(many.num_bytes / 400e9)
    fast = MACHINE._replace(network=100e9)
    assert traffic(XL, fast, 1024, "data-parallel").seconds == pytest.approx(many.num_bytes / 450e9)


def test_fsdp_gathers_weights_for_every_pass() -> None:
    sent = traffic(XL, MACHINE, 16, "FSDP")
    # bf16 for the rollout and for the reference; in each of 4 micro-batches twice bf16 and once
    # fp32 gradients.
    assert sent.num_bytes == pytest.approx(15 / 16 * WEIGHTS * (2 + 2 + 4 * (2 + 2 + 4)))
    uneven = XL._replace(images=33)
    assert traffic(uneven, MACHINE, 16, "FSDP").num_bytes == pytest.approx(
        15 / 16 * WEIGHTS * (2 + 2 + 2 * 8)
    )


@pytest.mark.parametrize("way", scale_costs.WAYS)
def test_one_gpu_sends_nothing(way: scale_costs.Way) -> None:
    assert traffic(XL, MACHINE, 1, way) == (0.0, 0.0)


def test_state_is_what_mixed_precision_holds() -> None:
    # bf16 weights and reference; fp32 master, gradient and two moments.
    assert state_bytes(XL, 8, "data-parallel") == 20 * WEIGHTS
    assert state_bytes(XL, 8, "FSDP") == pytest.approx((2 + 18 / 8) * WEIGHTS)
    assert state_bytes(XL, 1, "FSDP") == state_bytes(XL, 1, "data-parallel")


def test_a_step_is_its_phases_and_what_is_sent() -> None:
    alone = sum(cost.seconds for cost in phases(XL, MACHINE, []).values())
    assert step_cost(XL, MACHINE, [], 1, "data-parallel") == Cost(pytest.approx(alone))
    sent = traffic(XL, MACHINE, 64, "data-parallel").seconds
    assert step_cost(XL, MACHINE, [], 64, "data-parallel").seconds == pytest.approx(alone + sent)
    optimizer = phases(XL, MACHINE, [])["optimizer"].seconds
    sharded = alone - optimizer * 63 / 64 + traffic(XL, MACHINE, 64, "FSDP").seconds
    assert step_cost(XL, MACHINE, [], 64, "FSDP").seconds == pytest.approx(sharded)


def test_a_measured_row_takes_the_place_of_the_roofline() -> None:
    costs = phases(XL, MACHINE, [ROLLOUT, TRUNK])
    assert costs["rollout"] == Cost(128 / 32.0, is_measured=True), "whole rollouts before steps"
    assert costs["trunk"] == Cost(pytest.approx(0.1 / 16 * 128), is_measured=True)
    assert str(costs["rollout"]) == "4.000 m"
    assert str(costs["head"]).endswith(" p")
    newer = row("rollout", images_per_s=128.0)
    assert phases(XL, MACHINE, [ROLLOUT, newer])["rollout"].seconds == 1.0, "the last row counts"


@pytest.mark.parametrize(
    "other",
    [
        {"contender": "llamagen"}, {"model": "B"}, {"image_size": 384}, {"images": 64},
        {"guidance_scale": 1.0}, {"dtype": "float32"}, {"text_tokens": 120}, {"bench": "slots"},
    ],
)  # fmt: skip
def test_a_row_of_other_work_is_not_taken(other: dict[str, object]) -> None:
    assert not phases(XL, MACHINE, [{**ROLLOUT, **other}])["rollout"].is_measured


def test_a_row_of_a_cpu_is_not_taken() -> None:
    on_cpu = {key: value for key, value in ROLLOUT.items() if key != "driver"}
    assert not phases(XL, MACHINE, [on_cpu])["rollout"].is_measured


def test_a_sum_with_a_predicted_part_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not step_cost(XL, MACHINE, [ROLLOUT, TRUNK], 1, "data-parallel").is_measured
    measured = {"rollout": Cost(2.0, True), "optimizer": Cost(1.0, True)}
    monkeypatch.setattr(scale_costs, "phases", lambda *_: dict(measured))
    assert step_cost(XL, MACHINE, [], 1, "data-parallel") == Cost(3.0, True)
    assert not step_cost(XL, MACHINE, [], 8, "data-parallel").is_measured


def test_the_script_marks_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rollout_gpu.jsonl").write_text(json.dumps(ROLLOUT) + "\n")
    words = ["--models", "XL", "B", "--gpus", "1", "8", "--results", str(tmp_path)]
    scale_model.main(words)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("| XL", "| B"))]
    assert len(lines) == 2 + 2 * (1 + 2)
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        numbers = [c for c in cells if "." in c or "," in c]
        assert len(numbers) >= 5
        assert all(cell.endswith((" p", " m")) for cell in numbers), line
    assert "| XL | 4.000 m | " in printed
    assert "no latency, no stragglers" in printed


@pytest.mark.parametrize(("value", "expected"), [(289380.0, 289000), (1357629.0, 1350000)])
def test_images_an_hour_are_rounded_down(value: float, expected: int) -> None:
    assert scale_model._three_figures(value) == expected
