"""bench/bench_decode.py on a small tokenizer: what it counts, compares and writes."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = ("bench_decode", "result_rows", "rollout_contenders", "step_case", "timing", "turns")
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("bench_decode")
    ceilings = importlib.import_module("timing").Ceilings
    monkeypatch.setattr(module, "ceilings_of", lambda device, dtype, clock: ceilings(1e9, 1e9))
    yield module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def test_operations_are_those_that_a_decode_makes(bench: ModuleType) -> None:
    case = bench.DecodeCase(64, 3, CPU, "tiny")
    with FlopCounterMode(display=False) as counter:
        bench.contenders(case, ["float32"], compiled=False)["argrpo", "float32"]()
    assert case.flops() == counter.get_total_flops() > 0


def test_every_contender_has_a_row_in_every_dtype(bench: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    sizes = ["--image_size", "64", "--batches", "1", "2", "--tokenizer", "tiny"]
    bench.main([*sizes, "--threads", "1", "--samples", "1", "--output", str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    names = [(row["contender"], row["dtype"]) for row in rows if row["images"] == 2]
    assert sorted(names) == [
        (name, dtype) for name in ("argrpo", "channels_last") for dtype in ("bfloat16", "float32")
    ]
    for row in rows:
        assert row["ms_per_image"] == pytest.approx(row["p50_ms"] / row["images"], abs=1e-3)
        seconds = row["gflop_an_image"] * 1e9 * row["images"] / 1e9
        # gflop_an_image is written to a tenth.
        assert row["percent_of_limit"] == pytest.approx(1e5 * seconds / row["p50_ms"], rel=0.2)
    base = next(row for row in rows if (row["contender"], row["dtype"]) == ("argrpo", "float32"))
    assert base["over_float32"] == base["over_ours"] == 1


def test_a_decoder_with_other_pixels_is_not_timed(bench: ModuleType) -> None:
    decoders = {
        ("argrpo", "float32"): lambda: torch.ones(2, 3, 4, 4),
        ("peer", "float32"): lambda: torch.full((2, 3, 4, 4), 0.99),
    }
    with pytest.raises(RuntimeError, match="peer float32: expected the pixels of fp32 within"):
        bench.check_same(decoders)


def test_one_that_cannot_run_is_a_printed_line(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> torch.Tensor:
        raise ValueError("no such kernel")

    decoders = {("argrpo", "float32"): lambda: torch.ones(1), ("peer", "bfloat16"): fail}
    assert list(bench.check_same(decoders)) == [("argrpo", "float32")]
    assert "peer bfloat16: ValueError: no such kernel" in capsys.readouterr().out
