"""bench/bench_trunk.py on a tiny policy: what it counts, what it compares, what it writes."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = ("bench_trunk", "engine_steps", "result_rows", "rollout_contenders", "timing", "turns")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, with a tiny policy among the published ones."""
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("bench_trunk")
    sizes = importlib.import_module("rollout_contenders").Sizes
    monkeypatch.setitem(module.MODELS, "tiny", sizes(32, 2, 2, 48))
    product = (lambda: torch.mm(torch.ones(2, 2), torch.ones(2, 2)), 10**6)
    monkeypatch.setattr(module, "large_product", lambda case: product)
    yield module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture
def measure(bench: ModuleType, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`measure("--text_tokens", "0")`: all rows of the file after a call."""

    def run(*options: str) -> list[dict[str, Any]]:
        output = tmp_path / "rows.jsonl"
        sizes = ["--models", "tiny", "--image_size", "64", "--images", "9", "--threads", "1"]
        bench.main([*sizes, "--samples", "1", "--output", str(output), *options])
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def trunk(bench: ModuleType, text_tokens: int) -> Any:
    options = ["--models", "tiny", "--image_size", "64"]
    dtype = bench.arguments(options).dtype
    sizes = {"model": "tiny", "image_size": 64, "images": 9, "guidance_scale": 1.0}
    cpu = torch.device("cpu")
    return bench.Trunk.of(bench.Case(**sizes, dtype=dtype, device=cpu, text_tokens=text_tokens))


def products_counted(run: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return sum(
        count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op)
    )


@pytest.mark.parametrize("text_tokens", [0, 20])
def test_the_products_of_a_pass_are_those_of_the_floor(bench: ModuleType, text_tokens: int) -> None:
    work = trunk(bench, text_tokens)
    floor = products_counted(work.products())
    attention = 3 * 4 * 2 * 32 * 9 * (16 * 17 // 2)  # both ways, layers, width, images, pairs
    assert work.flops == floor + attention
    # Beside its layers a text policy projects the features, which is not the trunk's work.
    for linear in work.policy.cls_embedding.children():
        linear.requires_grad_(False)
    hidden = products_counted(work.both_ways(work.ours))
    projected = 0
    if text_tokens:
        embed = work.policy.embed_conditions
        projected = products_counted(lambda: embed(bench.distinct(work.conditions).conditions))
    assert hidden == floor + projected


@pytest.mark.parametrize("text_tokens", [0, 20])
def test_every_contender_has_a_row_beside_the_floor(
    measure: Callable[..., list[dict[str, Any]]], text_tokens: int
) -> None:
    rows = measure("--text_tokens", str(text_tokens))
    dense = ["dense mask"] if text_tokens else []
    names = ["floor", "argrpo", "argrpo checkpointed", *dense]
    assert [row["contender"] for row in rows] == names
    assert {row["bench"] for row in rows} == {"trunk"}
    floor, ours = rows[0], rows[1]
    assert floor["over_floor"] == ours["over_ours"] == 1
    assert ours["over_floor"] == pytest.approx(ours["p50_ms"] / floor["p50_ms"], rel=0.01)
    share = trunk(sys.modules["bench_trunk"], text_tokens).flops / ours["p50_ms"] * 1e-9
    # Written to a tenth of a percent and to a thousandth of 10^12 a second.
    assert ours["percent_of_limit"] == pytest.approx(100 * share / ours["limit_tflops"], rel=0.1)
    assert "percent_of_limit" not in floor


def test_a_contender_with_another_result_is_not_timed(bench: ModuleType) -> None:
    work = trunk(bench, 20)
    hiddens = {"argrpo": work.ours, "zeros": lambda: torch.zeros_like(work.ours())}
    with pytest.raises(RuntimeError, match=r"zeros: expected our hidden states within 0\.0001"):
        bench.check_same(hiddens, torch.float32)
    bench.check_same({"argrpo": work.ours, "dense mask": work.dense}, torch.float32)


def test_what_is_measured_already_is_left_out(
    measure: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another's edit of the checkout between the calls would be another commit.
    monkeypatch.setattr(sys.modules["result_rows"], "commit_described", lambda: "abc1234")
    count = len(measure())
    assert len(measure("--resume")) == count
    assert len(measure("--resume", "--text_tokens", "20")) > count


def test_a_missing_package_is_a_printed_line(
    measure: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    measure()
    printed = capsys.readouterr().out
    for name in ("flash_attn", "xformers"):
        assert f"without {name}: policy.attention" in printed
