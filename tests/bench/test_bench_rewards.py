"""bench/bench_rewards.py on small towers and a small step: what is compared agrees, or no row."""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = (
    "bench_rewards", "engine_steps", "fake_judge_server", "gpu_parts", "result_rows",
    "reward_cases", "rollout_contenders", "rollout_rows", "roofline", "timing", "turns",
)  # fmt: skip


class _Judge:
    """Counts the images of its calls."""

    name = "counting"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, images: Tensor, prompts: list[Any]) -> Tensor:
        self.calls.append(len(images))
        return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The script, with a policy called tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        contenders = importlib.import_module("rollout_contenders")
        patch.setitem(contenders.MODELS, "tiny", contenders.Sizes(16, 1, 2, 24))
        cases = importlib.import_module("reward_cases")
        patch.setattr(cases, "VOCAB_SIZE", 64)
        patch.setattr(contenders, "VOCAB_SIZE", 64)
        yield importlib.import_module("bench_rewards")
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_judge_is_timed_in_a_batch_and_one_image_at_a_time(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = _Judge()
    monkeypatch.setattr(bench, "make_tower_judge", lambda *_: judge)
    output = tmp_path / "rows.jsonl"
    words = [
        "--only",
        "judges",
        "--judges",
        "clip_b32",
        "--judge_images",
        "5",
        "--image_size",
        "32",
    ]
    assert bench.main([*words, "--samples", "2", "--threads", "1", "--output", str(output)]) == 0
    batched, single = _rows(output)
    assert (batched["contender"], single["contender"]) == ("batched", "one_at_a_time")
    for row in (batched, single):
        assert (row["family"], row["judge"], row["images"]) == ("judges", "clip_b32", 5)
        assert {"commit", "device", "date", "others_busy_cores", "threads", "torch"} <= row.keys()
    ratio = single["p50_ms"] / batched["p50_ms"]
    assert batched["times_faster"] == pytest.approx(ratio, rel=0.05)
    # The check, a turn that is not counted and two that are.
    assert judge.calls == ([5] + [1] * 5) * 4
    words += ["--resume", "--threads", "1", "--output", str(output)]
    assert bench.main(words) == 0 and len(_rows(output)) == 2, "measured already"


def test_a_judge_whose_batch_says_something_else_is_not_timed(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(_Judge):
        def __call__(self, images: Tensor, prompts: list[Any]) -> Tensor:
            return super().__call__(images, prompts) + len(images)

    monkeypatch.setattr(bench, "make_tower_judge", lambda *_: Wrong())
    output = tmp_path / "rows.jsonl"
    words = [
        "--only",
        "judges",
        "--judges",
        "clip_b32",
        "--judge_images",
        "3",
        "--image_size",
        "32",
    ]
    assert bench.main([*words, "--output", str(output)]) == 1
    assert "wrong, not timed: clip_b32" in capsys.readouterr().out and not output.exists()


def test_pixels_are_the_same_both_ways_and_faster_as_a_tensor(bench: Any, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    words = ["--only", "pixels", "--images", "4", "--image_size", "256", "--samples", "3"]
    assert bench.main([*words, "--threads", "1", "--output", str(output)]) == 0
    tensor, pillow = _rows(output)
    assert (tensor["contender"], pillow["contender"]) == ("tensor", "pillow")
    assert 0 < tensor["error"] <= 0.05
    # 14 on the machine of the rows; one that is busy with other tests takes most of it.
    assert tensor["times_faster"] > 1


def test_a_step_is_timed_with_a_slow_server_and_without(bench: Any, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    words = [
        "--only", "step", "--images", "16", "--model", "tiny", "--step_image_size", "64",
        "--slots", "8", "--latency_s", "0.5", "--samples", "1", "--threads", "1",
    ]  # fmt: skip
    assert bench.main([*words, "--output", str(output)]) == 0
    without, with_server, ahead = _rows(output)
    assert [row["contender"] for row in (without, with_server, ahead)] == [
        "without_server",
        "with_server",
        "drawn_ahead",
    ]
    assert with_server["p50_ms"] >= 500, "the last image's answer comes after the latency"
    assert with_server["over_without_server"] == pytest.approx(
        with_server["p50_ms"] / without["p50_ms"], rel=0.01
    )
    # A whole step passes before it is waited for, if a short one.
    assert ahead["p50_ms"] < with_server["p50_ms"]
    assert set(with_server["phases"]) == {
        f"time/{phase}" for phase in ("rollout", "decode", "reward", "logprob", "update")
    }


def test_the_slow_server_answers_many_at_once_and_each_after_its_latency(bench: Any) -> None:
    import httpx

    server = importlib.import_module("fake_judge_server").server(0.3)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    answers: list[Any] = []
    started = time.perf_counter()
    asking = [
        Thread(target=lambda i=i: answers.append(httpx.post(url, json={"image": i}).json()))
        for i in range(8)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    # One after the other they would take 2.4 s.
    assert 0.3 <= time.perf_counter() - started < 2.4
    server.shutdown()
    server.server_close()
    assert len(answers) == 8 and "score" in answers[0]["choices"][0]["message"]["content"]


def test_towers_and_maniqa_are_those_of_the_papers(bench: Any) -> None:
    import open_clip

    cases = importlib.import_module("reward_cases")
    assert set(cases.TOWERS.values()) <= set(open_clip.list_models())
    judge = cases.make_tower_judge("clip_b32", 2, torch.device("cpu"), torch.float32)
    batched, single = cases.judge_calls(judge, torch.rand(2, 3, 64, 64)).values()
    # fp32 cosines; a product of one row sums in another order than one of two.
    torch.testing.assert_close(batched(), single(), atol=1e-5, rtol=0)


def test_the_suite_asks_for_options_that_exist(bench: Any) -> None:
    parts = importlib.import_module("gpu_parts").PARTS
    (command,) = [part.command for part in parts if part.command[0] == "bench/bench_rewards.py"]
    args = bench.arguments(list(command[1:]))
    assert (args.device.type, args.model, args.images, args.crops) == ("cuda", "XL", 64, 20)
