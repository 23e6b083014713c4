"""The peers of bench/bench_rollout.py on tiny policies: the same work, or a line saying why not."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# A checkout with the names that the bench calls in LlamaGen's; its "model" predicts the successor
# of the token that it is fed, and of class c token c + 100.
GPT = """
import torch
from torch import nn

class Cache(nn.Module):
    def __init__(self, rows, positions):
        super().__init__()
        self.k_cache, self.v_cache = torch.zeros(rows, positions), torch.zeros(rows, positions)

class Model(nn.Module):
    def __init__(self, vocab_size, **sizes):
        super().__init__()
        self.vocab_size = vocab_size
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].attention = nn.Module()
        self.fed = []

    def load_state_dict(self, weights):
        pass

    def setup_caches(self, rows, positions, dtype):
        self.layers[0].attention.kv_cache = Cache(rows, positions)

    def forward(self, idx, cond_idx, input_pos):
        self.fed.append(input_pos.tolist())
        following = cond_idx[:, None] % 1000 + 100 if idx is None else idx + 1
        return nn.functional.one_hot(following, self.vocab_size) * 1e9, None

GPT_models = {"GPT-tiny": Model}
"""
GENERATE = """
import torch

def sample(logits, temperature, top_k, top_p):
    raise RuntimeError("its multinomial waits for the device")

def prefill(model, cond_idx, input_pos, scale, temperature, top_k, top_p):
    return model(None, cond_idx, input_pos)[0].chunk(2)[0].argmax(-1)

def decode_one_token(model, x, input_pos, scale, cfg_flag, **settings):
    assert cfg_flag and scale == 2.0
    logits, _ = model(torch.cat([x, x]), None, input_pos)
    cond, uncond = logits.chunk(2)
    return sample(uncond + (cond - uncond) * scale, **settings)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A folder laid out as LlamaGen's repository."""
    models = tmp_path / "peer" / "autoregressive" / "models"
    models.mkdir(parents=True)
    (models / "gpt.py").write_text(GPT, encoding="utf-8")
    (models / "generate.py").write_text(GENERATE, encoding="utf-8")
    yield tmp_path / "peer"
    for name in [name for name in sys.modules if name.partition(".")[0] == "autoregressive"]:
        del sys.modules[name]


def test_the_captured_step_of_llamagen_feeds_every_token_at_its_position(
    script: Callable[[str], Any],
    case_of: Callable[..., Any],
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variants = script("llamagen_variants")

    def captured(calls: list[Callable[[], object]]) -> Any:
        calls[0]()  # as a capture does, to warm up
        return SimpleNamespace(replay=calls[0])

    monkeypatch.setattr(variants, "captured", captured)
    monkeypatch.setattr(variants, "_require_gpu", lambda case, name: None)
    case = case_of()
    peer = variants.LlamaGenGraph(case, case.policy(), checkout)
    # A captured step has its draw baked in; here it is looked up at every replay.
    monkeypatch.setattr(peer._sampler, "sample", variants._raced)
    token_ids = peer.rollout()
    first = case.labels % 1000 + 100
    assert torch.equal(token_ids, first[:, None] + torch.arange(16))
    fed = peer._model.fed[-16:]
    assert fed == [[0], *([position] for position in range(1, 16))]
    peer.step(7)
    assert peer._model.fed[-1] == [7]


def test_the_compiled_model_of_llamagen_is_what_its_own_loop_runs(
    script: Callable[[str], Any],
    case_of: Callable[..., Any],
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variants = script("llamagen_variants")
    monkeypatch.setattr(variants, "_require_gpu", lambda case, name: None)
    asked: list[dict[str, object]] = []

    def compiled(model: Any, **options: object) -> Any:
        asked.append(options)
        return SimpleNamespace(of=model)

    monkeypatch.setattr(torch, "compile", compiled)
    case = case_of()
    peer = variants.LlamaGenCompiled(case, case.policy(), checkout)
    assert asked == [{"mode": "reduce-overhead", "fullgraph": True}]
    loop = SimpleNamespace(
        decode_n_tokens=lambda model, *_, **__: model, generate=lambda model, *_, **__: model
    )
    monkeypatch.setattr(peer, "_sampler", loop)
    peer.prepare()
    assert peer.step(3).of is peer._model
    assert peer.rollout().of is peer._model


def test_a_peer_that_needs_a_gpu_or_fails_is_a_line(
    script: Callable[[str], Any],
    case_of: Callable[..., Any],
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peers = script("rollout_peers")

    def broken(*_inputs: object) -> Any:
        raise AttributeError("another version\nof it")

    monkeypatch.setitem(peers.PEERS, "hf_static", broken)
    case = case_of()
    names = ["llamagen_compiled", "llamagen_graph", "hf_static"]
    assert peers.peers_of(case, case.policy(), names, checkout) == []
    assert capsys.readouterr().out.splitlines() == [
        "without the peer: llamagen_compiled: expected a GPU, got cpu",
        "without the peer: llamagen_graph: expected a GPU, got cpu",
        "without the peer: hf_static: AttributeError: another version",
    ]


def test_transformers_that_is_missing_is_a_line(
    script: Callable[[str], Any],
    case_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    case = case_of()
    assert script("rollout_peers").peers_of(case, case.policy(), ["hf_static"], None) == []
    assert "without the peer: hf_static: transformers is missing" in capsys.readouterr().out


def test_a_peer_whose_first_step_fails_is_a_line_and_the_others_are_measured(
    script: Callable[[str], Any], case_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    case = case_of()
    policy = case.policy()
    sound = script("static_cache_peer").StaticCachePeer(case, policy, compiled=False)
    too_big = SimpleNamespace(name="too_big", prepare=out_of_memory)
    peaks = script("rollout_peers").measured_peaks([too_big, sound], case)
    assert list(peaks) == ["static_cache"]
    printed = capsys.readouterr().out
    assert printed == "without the peer: too_big: OutOfMemoryError: tried to allocate 99 GiB\n"


def test_vllm_is_a_line_that_says_where_its_figures_stand(
    script: Callable[[str], Any],
    case_of: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = case_of()
    assert script("rollout_peers").peers_of(case, case.policy(), ["vllm"], None) == []
    printed = capsys.readouterr().out
    assert printed.startswith("without the peer: vllm: ") and "bench/README.md" in printed


def test_llamagen_is_not_measured_on_text(
    script: Callable[[str], Any],
    case_of: Callable[..., Any],
    checkout: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = case_of(text_tokens=5)
    assert script("rollout_peers").peers_of(case, case.policy(), ["llamagen"], checkout) == []
    assert "llamagen: measured on class labels only" in capsys.readouterr().out


def test_rows_of_text_and_of_two_sizes_have_all_contenders(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = script("rollout_peers")
    build = script("static_cache_peer").StaticCachePeer
    eager = {"static_cache": lambda case, policy, _: build(case, policy, compiled=False)}
    monkeypatch.setattr(peers, "PEERS", {**peers.PEERS, **eager})
    output = tmp_path / "rows.jsonl"
    command = [
        "--models", "tiny", "--image_size", "64", "80", "--images", "3", "--threads", "1",
        "--samples", "1", "--rollouts", "0", "--deterministic_images", "0", "--text_tokens", "5",
        "--peer", "static_cache", "hf_static", "--output", str(output),
    ]  # fmt: skip
    script("bench_rollout").main(command)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    names = ["floor", "argrpo", "static_cache", "hf_static"]
    assert [row["contender"] for row in rows] == names * 2
    assert [row["image_size"] for row in rows] == [64] * 4 + [80] * 4
    last_steps = [row["steps"][-1]["position"] for row in rows]
    assert last_steps == [15] * 4 + [24] * 4
    for row in rows:
        assert row["text_tokens"] == 5
        assert row["peers"] == ["hf_static", "static_cache"]
        assert row["limit_reading_prefix_images_per_s"] < row["limit_images_per_s"]
    assert rows[2]["weights"] == "random, the same for all"
    assert rows[3]["weights"] == "random, its own"
    assert rows[2]["how"].startswith("eager PyTorch")
    is_measured = script("bench_rollout").is_measured
    assert is_measured(output, rows[0])
    for changed in ({"peers": ["static_cache"]}, {"text_tokens": 0}, {"image_size": 96}):
        assert not is_measured(output, {**rows[0], **changed})
