"""bench/bench_rollout.py on a tiny policy, beside a peer that this file writes."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rollout_scripts import BENCH, SCRIPTS
from torch.utils.flop_counter import FlopCounterMode

# A checkout with the names that the bench calls in LlamaGen's. Its model has no layers, so the
# logits of token 0 are the head of the normed class embedding, as those of our policy are where no
# layer adds anything.
GPT = """
from torch import nn

class Model(nn.Module):
    def __init__(self, vocab_size, block_size, num_classes, cls_token_num, model_type):
        super().__init__()
        assert block_size == 16 and cls_token_num == 1 and model_type == "c2i"
        self.cls_embedding = nn.Module()
        self.cls_embedding.embedding_table = nn.Embedding(num_classes + 1, 16)
        self.tok_embeddings = nn.Embedding(vocab_size, 16)
        self.layers = nn.ModuleList()
        self.norm = nn.RMSNorm(16, eps=1e-5)
        self.output = nn.Linear(16, vocab_size, bias=False)

    def load_state_dict(self, weights):
        super().load_state_dict({k: w for k, w in weights.items() if not k.startswith("layers.")})

    def setup_caches(self, rows, positions, dtype):
        assert (rows, positions) == (6, 17)

    def forward(self, idx, cond_idx, input_pos):
        return self.output(self.norm(self.cls_embedding.embedding_table(cond_idx)[:, None])), None

GPT_models = {"GPT-flat": Model}
"""
GENERATE = """
def decode_n_tokens(model, tokens, at, count, scale, interval, temperature, top_k, top_p):
    assert (count, scale, interval, temperature, top_k, top_p) == (1, 2.0, -1, 1.0, 0, 1.0)
    return "step", list(tokens.shape), at.tolist()

def generate(model, labels, count, cfg_scale, temperature, top_k, top_p):
    assert (cfg_scale, temperature, top_k, top_p) == (2.0, 1.0, 0, 1.0)
    return "rollout", len(labels), count
"""


@dataclass(frozen=True)
class Scripts:
    bench: ModuleType
    contenders: ModuleType
    turns: ModuleType

    def case(self, model: str, images: int = 3, guidance_scale: float = 2.0) -> Any:
        return self.contenders.Case(
            model=model,
            image_size=64,
            images=images,
            guidance_scale=guidance_scale,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripts]:
    """The script and the files beside it, with two small sizes; bench/ is no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    bench, contenders, turns = (
        importlib.import_module(name) for name in ("bench_rollout", "rollout_contenders", "turns")
    )
    for name, num_layers in {"tiny": 2, "flat": 1}.items():
        monkeypatch.setitem(contenders.MODELS, name, contenders.Sizes(16, num_layers, 2, 24))
    yield Scripts(bench, contenders, turns)
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A folder laid out as the peer's repository."""
    models = tmp_path / "peer" / "autoregressive" / "models"
    models.mkdir(parents=True)
    (models / "gpt.py").write_text(GPT, encoding="utf-8")
    (models / "generate.py").write_text(GENERATE, encoding="utf-8")
    yield tmp_path / "peer"
    for name in [name for name in sys.modules if name.partition(".")[0] == "autoregressive"]:
        del sys.modules[name]


def flat_policy(case: Any) -> Any:
    """A policy whose layer adds nothing."""
    policy = case.policy()
    for layer in policy.layers:
        layer.attention.wo.weight.zero_()
        layer.feed_forward.w2.weight.zero_()
    return policy


def command(output: Path, *more: str) -> list[str]:
    return [
        "--models", "tiny", "--image_size", "64", "--images", "3", "--threads", "1",
        "--samples", "2", "--positions", "1", "15", "--output", str(output), *more,
    ]  # fmt: skip


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_floor_multiplies_as_much_as_a_step_of_the_engine(
    scripts: Scripts, guidance_scale: float
) -> None:
    case = scripts.case("tiny", images=4, guidance_scale=guidance_scale)
    policy = case.policy()
    ours = scripts.contenders.OurEngine(case, policy)
    ours.prepare()
    flops = {}
    for contender in (ours, scripts.contenders.Floor(case, policy)):
        with FlopCounterMode(display=False) as counter:
            contender.step(9)
        flops[contender.name] = counter.get_total_flops()
    assert flops["floor"] == flops["argrpo"] > 0


def test_rows_say_what_was_done_and_how_contenders_compare(
    scripts: Scripts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "rollout.jsonl"
    scripts.bench.main(command(output, "--deterministic_images", "12"))
    floor, ours, fixed = rows_in(output)
    assert (floor["contender"], ours["contender"]) == ("floor", "argrpo")
    for field, value in {"model": "tiny", "tokens": 16, "dtype": "float32", "threads": 1}.items():
        assert ours[field] == value
    assert {"device", "torch", "commit", "date", "others_busy_cores", "work"} <= ours.keys()
    assert [step["position"] for step in ours["steps"]] == [1, 15]
    ratio = ours["steps_sum_ms"] / floor["steps_sum_ms"]
    assert ours["over_floor"] == pytest.approx(ratio, rel=0.05)  # the sums are rounded to 0.1 ms
    assert floor["over_ours"] == pytest.approx(1 / ratio, rel=0.05)
    assert ours["rollout"]["samples"] == 1
    assert (fixed["contender"], fixed["images"]) == ("argrpo deterministic=True", 12)
    assert fixed["images_a_wave"] == 8
    assert "over_floor" in capsys.readouterr().out


def test_every_model_size_and_scale_is_a_case_and_is_measured_once(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    policy_of = scripts.contenders.Case.policy

    def counted(case: Any) -> Any:
        built.append(case.model)
        return policy_of(case)

    monkeypatch.setattr(scripts.contenders.Case, "policy", counted)
    # A file saved meanwhile would make it another commit.
    monkeypatch.setattr("result_rows.commit_described", lambda: "abc1234")
    output = tmp_path / "rollout.jsonl"
    asked = command(output, "--rollouts", "0", "--deterministic_images", "0", "--resume")
    asked[asked.index("3")] = "2"
    scripts.bench.main([*asked, "--guidance_scale", "2", "1"])
    cases = [(row["images"], row["guidance_scale"]) for row in rows_in(output)]
    assert cases == [(2, 2.0), (2, 2.0), (2, 1.0), (2, 1.0)]  # the floor and ours of each
    scripts.bench.main([*asked, "--images", "2", "4"])
    assert [(row["images"], row["guidance_scale"]) for row in rows_in(output)[4:]] == [(4, 2.0)] * 2
    assert built == ["tiny", "tiny"]  # once a run, however many cases


@pytest.mark.parametrize("guidance_scale", ["1", "2"])
def test_an_engine_with_pages_is_measured_by_steps_and_by_whole_draws(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance_scale: str
) -> None:
    paged = partial(scripts.contenders.RolloutEngine, paged=True)
    monkeypatch.setattr(scripts.contenders, "RolloutEngine", paged)
    output = tmp_path / "rollout.jsonl"
    more = ["--deterministic_images", "0", "--rollouts", "2", "--guidance_scale", guidance_scale]
    scripts.bench.main(command(output, *more))
    _floor, ours = rows_in(output)
    assert ours["rollout"]["samples"] == 2
    assert [step["position"] for step in ours["steps"]] == [1, 15]


def test_steps_are_measured_against_what_they_must_move(scripts: Scripts) -> None:
    case = scripts.case("tiny", images=3)
    ceilings = scripts.bench.Ceilings(bytes_per_second=1e9, flops_per_second=1e15)
    steps = [{"position": 9, "p50_ms": 4.0}]
    (row,) = scripts.bench.with_limits(case, ceilings, [{"steps": steps, "steps_sum_ms": 64.0}])
    # fp32, width 16, 2 layers of 4 x 16^2 + 3 x 16 x 24 weights, a head of 16384 x 16; and 6
    # sequences of 10 positions, a key and a value of 16 numbers in 2 layers: 1 ns a byte.
    weights = 4 * (2 * (4 * 16**2 + 3 * 16 * 24) + 16384 * 16)
    cache = 4 * 6 * 10 * 2 * 2 * 16
    assert row["steps"][0]["percent_of_limit"] == round(100 * (weights + cache) / 4e6, 1)
    mean_cache = 4 * 6 * 8.5 * 2 * 2 * 16
    least_ms = 16 * (weights + mean_cache) / 1e6
    assert row["percent_of_limit"] == round(100 * least_ms / 64, 1)
    assert row["limit_images_per_s"] == round(3 / least_ms * 1e3, 3)


def test_a_missing_peer_is_a_line_and_the_rest_is_measured(
    scripts: Scripts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rollout.jsonl"
    peer = ["--peer", "llamagen", "--peer_path", str(tmp_path)]
    scripts.bench.main(command(output, "--deterministic_images", "0", "--rollouts", "0", *peer))
    assert [row["contender"] for row in rows_in(output)] == ["floor", "argrpo"]
    printed = capsys.readouterr().out
    assert "without the peer: peer_path: expected a checkout of github.com/Found" in printed
    assert f"got {tmp_path}, where autoregressive/models/gpt.py is missing" in printed


def test_a_broken_peer_is_a_line_too(
    scripts: Scripts, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "autoregressive" / "models" / "gpt.py").write_text("import no_such_module")
    case = scripts.case("flat")
    assert scripts.bench.peers_of(case, flat_policy(case), ["llamagen"], checkout) == []
    assert "cannot be imported: No module named 'no_such_module'" in capsys.readouterr().out


def test_the_peer_draws_the_same_work_with_our_weights(scripts: Scripts, checkout: Path) -> None:
    case = scripts.case("flat")
    (peer,) = scripts.bench.peers_of(case, flat_policy(case), ["llamagen"], checkout)
    peer.prepare()
    assert peer.step(5) == ("step", [3, 1], [5])
    assert peer.rollout() == ("rollout", 3, 16)


def test_a_peer_with_other_logits_is_refused(scripts: Scripts, checkout: Path) -> None:
    skewed = GPT.replace("eps=1e-5", "eps=1e-3")
    (checkout / "autoregressive" / "models" / "gpt.py").write_text(skewed, encoding="utf-8")
    case = scripts.case("flat")
    with pytest.raises(RuntimeError, match="llamagen: expected the logits of our policy within"):
        scripts.bench.peers_of(case, flat_policy(case), ["llamagen"], checkout)


def test_contenders_take_turns_and_warm_turns_do_not_count(scripts: Scripts) -> None:
    order: list[str] = []
    seconds = iter([9.0, 9.0, 1e-6, 10e-6, 3e-6, 30e-6, 2e-6, 20e-6])

    class FakeClock:
        def seconds(self, work: Any) -> float:
            work()
            return next(seconds)

    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    got = scripts.turns.measure_in_turns(calls, FakeClock(), warmup=1, samples=3)
    assert "".join(order) == "abababab"
    assert (got["a"].p50_us, got["b"].p50_us) == pytest.approx((2.0, 20.0))
    assert got["a"].samples == 3


def test_a_sum_is_linear_between_the_positions_measured(scripts: Scripts) -> None:
    # Tokens 0 to 6: 10, 10 (measured), 12, 14 (measured), 17, 20 (measured), 20.
    got = scripts.turns.sum_between({1: 10.0, 3: 14.0, 5: 20.0}, range(7))
    assert got == pytest.approx(10 + 10 + 12 + 14 + 17 + 20 + 20)


def test_peak_memory_sees_what_was_held_for_a_moment(scripts: Scripts) -> None:
    memory = scripts.turns.PeakMemory(torch.device("cpu"))
    torch.ones(16 << 20)  # 64 MiB, let go at once
    taken = memory.taken()
    # Pages of 4 KiB and what else this process does meanwhile: 8 MiB of room.
    assert abs(taken - (64 << 20)) < 8 << 20


def test_work_of_others_is_counted_without_ours(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores, wall, ours = iter([100.0, 107.0]), iter([50.0, 54.0]), iter([3.0, 9.0])
    monkeypatch.setattr(scripts.turns, "_core_seconds", lambda: next(cores))
    clock = SimpleNamespace(perf_counter=lambda: next(wall), process_time=lambda: next(ours))
    monkeypatch.setattr(scripts.turns, "time", clock)
    # In 4 seconds the cores worked for 7, of which 6 were ours.
    assert scripts.turns.OtherWork().busy_cores() == pytest.approx(1 / 4)


@pytest.mark.parametrize(("position", "got"), [("0", "0"), ("16", "16")])
def test_a_position_outside_the_image_is_refused(
    scripts: Scripts, position: str, got: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        scripts.bench.arguments(["--image_size", "64", "--positions", position])
    assert stopped.value.code == 2
    assert f"--positions: expected 1 to 15, got {got}" in capsys.readouterr().err
