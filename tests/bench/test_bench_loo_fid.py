"""bench/bench_loo_fid.py: brute force is the definition, and ours is compared with it."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from argrpo.evaluation.frechet import frechet_to

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = ("bench_loo_fid", "result_rows", "timing", "turns")
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("bench_loo_fid")
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def test_brute_force_is_the_distance_of_the_others(bench: ModuleType) -> None:
    inputs = bench.Inputs(bench.LooCase("batch", 6, 10, CPU))
    expected = [
        frechet_to(torch.cat([inputs.features[:i], inputs.features[i + 1 :]]), inputs.reference)
        for i in range(6)
    ]
    # fp64; the two take roots of different matrices with the same eigenvalues, some of them 0.
    assert inputs.brute(6).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["batch", "carried"])
def test_ours_is_brute_force_for_every_image(bench: ModuleType, kind: str) -> None:
    inputs = bench.Inputs(bench.LooCase(kind, 9, 12, CPU))
    assert bench.check_same(inputs, 9) < 1e-6


def test_other_distances_are_not_timed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = bench.Inputs(bench.LooCase("batch", 6, 10, CPU))
    monkeypatch.setattr(inputs, "ours", lambda: inputs.brute(6) * 1.001)
    with pytest.raises(RuntimeError, match="argrpo: expected the distances of brute force within"):
        bench.check_same(inputs, 2)


def test_brute_force_on_some_images_is_multiplied_up_and_says_so(
    bench: ModuleType, tmp_path: Path
) -> None:
    output = tmp_path / "rows.jsonl"
    options = ["--sizes", "8x12", "--kinds", "carried", "--brute_images", "2", "--threads", "1"]
    bench.main([*options, "--samples", "1", "--output", str(output)])
    ours, brute = (json.loads(line) for line in output.read_text().splitlines())
    assert (ours["measured_images"], brute["measured_images"]) == (8, 2)
    assert ours["over_ours"] == 1
    assert brute["over_ours"] == pytest.approx(brute["p50_ms"] / ours["p50_ms"], rel=0.05)


def test_sizes_that_are_none_are_refused(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in ("144", "2x64"):
        with pytest.raises(SystemExit):
            bench.arguments(["--sizes", size])
    assert "--sizes: expected IMAGESxFEATURES with at least 4 images" in capsys.readouterr().err
