"""bench/bench_step.py on a tiny policy: the same work for all, or no timing; what its rows say."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = (
    "argrpo_peer", "bench_step", "llamagen_peer", "plain_path", "result_rows",
    "rollout_contenders", "rollout_peers", "step_case", "step_checks", "step_ours", "timing",
    "turns",
)  # fmt: skip

# A checkout with the names that the bench calls in AR-GRPO's; its policy predicts nothing.
CHECKOUT = {
    "autoregressive/models/gpt.py": """
import torch
from types import SimpleNamespace
def ModelArgs(**sizes):
    return SimpleNamespace(**sizes)
class Transformer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def load_state_dict(self, weights):
        assert "layers.0.feed_forward.w3.weight" in weights
    def disable_caches(self):
        pass
    def forward(self, cond_idx, idx, targets, mask, input_pos):
        assert mask.shape == (len(idx), 1, idx.shape[1] + 1, idx.shape[1] + 1)
        return torch.zeros(*mask.shape[:1], len(input_pos), self.vocab_size) + self.weight, None
""",
    "autoregressive/models/generate.py": """
import torch
def generate(model, cond, max_new_tokens, cfg_scale, temperature, top_k, top_p, return_logits):
    assert return_logits and (cfg_scale, temperature, top_k, top_p) == (2.0, 1.0, 0, 1.0)
    shape = len(cond), max_new_tokens
    tokens = torch.zeros(shape, dtype=torch.int)
    return {"output_ids": tokens, "logits": torch.zeros(*shape, model.vocab_size)}
""",
    "tokenizer_lg/tokenizer_image/vq_model.py": """
import torch
class Tokenizer(torch.nn.Module):
    def __init__(self, codebook_size, codebook_embed_dim):
        super().__init__()
    def load_state_dict(self, weights, strict):
        assert not strict
        return torch.nn.modules.module._IncompatibleKeys(["quantize.codebook_used"], [])
    def decode_code(self, tokens, shape):
        return torch.zeros(len(tokens), 3, 16 * shape[2], 16 * shape[3])
VQ_models = {"VQ-16": Tokenizer}
""",
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, with a tiny policy among the published ones."""
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("bench_step")
    sizes = importlib.import_module("rollout_contenders").Sizes
    monkeypatch.setitem(module.MODELS, "tiny", sizes(32, 2, 2, 48))
    yield module
    for name in (*SCRIPTS, *(name for name in sys.modules if name.startswith("autoregressive"))):
        sys.modules.pop(name, None)


@pytest.fixture
def measure(bench: ModuleType, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`measure("--peer", "plain")`: all rows of the file after a call."""

    def run(*options: str) -> list[dict[str, Any]]:
        output = tmp_path / "rows.jsonl"
        sizes = ["--models", "tiny", "--image_size", "64", "--images", "4", "--group", "2"]
        parts = ["--tokenizer", "tiny", "--judges", "tiny", "--threads", "1", "--samples", "2"]
        bench.main([*sizes, *parts, "--micro_batch", "3", "--output", str(output), *options])
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def made(bench: ModuleType) -> tuple[Any, ...]:
    """A case with its policy, tokenizer and judges, and the plain peer."""
    options = ["--models", "tiny", "--image_size", "64", "--images", "4", "--group", "2"]
    args = bench.arguments([*options, "--tokenizer", "tiny", "--judges", "tiny"])
    (case,) = bench.cases_of(args)
    parts = case, case.draw.policy(), case.make_tokenizer(), case.make_judges()
    peer = bench.make_peer("plain", *parts, None)
    parts[1].requires_grad_(True)
    return *parts, peer


def test_a_row_has_every_phase_and_is_compared_with_ours(
    measure: Callable[..., list[dict[str, Any]]], bench: ModuleType
) -> None:
    ours, plain = measure()
    assert (ours["contender"], plain["contender"]) == ("argrpo", "plain")
    assert ours["over_ours"] == 1
    assert plain["over_ours"] == pytest.approx(plain["p50_ms"] / ours["p50_ms"], rel=0.01)
    for row in (ours, plain):
        assert row["samples"] == 2
        assert row["case"] == "step tiny 64 px, 4 images, guidance 2, judges tiny"
        phases = [row[f"{phase}_ms"] for phase in bench.PHASES]
        assert min(phases) > 0
        # Medians of phases do not add up exactly, and a step has a little beside its phases.
        assert sum(phases) == pytest.approx(row["p50_ms"], rel=0.2)


def test_peers_have_our_logits_log_probs_gradients_pixels_and_scores(bench: ModuleType) -> None:
    apart = bench.differences(*made(bench))
    assert set(apart) == {
        f"{name}_difference" for name in ("logits", "logprobs", "gradients", "pixels", "scores")
    }
    # fp32 sums of a few hundred terms in another order.
    assert max(apart.values()) < 1e-5


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda step: step.model._weights["norm.weight"].data.mul_(1.01), "logits"),
        (lambda step: setattr(step, "pixels", lambda ids: torch.zeros(2, 3, 64, 64)), "pixels"),
        (lambda step: setattr(sys.modules["plain_path"], "BETA", 0.2), "gradients"),
    ],
)
def test_a_peer_that_does_other_work_is_not_timed(
    bench: ModuleType,
    break_it: Callable[[Any], object],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = made(bench)
    monkeypatch.setattr(sys.modules["plain_path"], "BETA", 0.1)  # put back whatever happens
    break_it(parts[-1])
    with pytest.raises(RuntimeError, match=f"plain: expected our {named} within"):
        bench.differences(*parts)


def test_a_missing_checkout_is_a_printed_line(
    measure: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = measure("--peer", "argrpo", "--peer_path", str(tmp_path))
    assert [row["contender"] for row in rows] == ["argrpo"]
    assert "without the peer: peer_path: expected a checkout of" in capsys.readouterr().out


def test_a_checkout_is_asked_as_its_own_trainer_asks_and_judged_by_its_results(
    bench: ModuleType, tmp_path: Path
) -> None:
    for name, text in CHECKOUT.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    options = ["--models", "tiny", "--image_size", "64", "--images", "4", "--judges", "tiny"]
    (case,) = bench.cases_of(bench.arguments(options))
    policy, tokenizer, judges = case.draw.policy(), case.make_tokenizer(), case.make_judges()
    peer = bench.make_peer("argrpo", case, policy, tokenizer, judges, tmp_path)
    assert peer.pixels(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 3, 64, 64)
    with pytest.raises(RuntimeError, match="argrpo_code: expected our logits within"):
        bench.differences(case, policy.requires_grad_(True), tokenizer, judges, peer)


def test_what_is_measured_already_is_left_out(
    measure: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another's edit of the checkout between the calls would be another commit.
    monkeypatch.setattr(sys.modules["result_rows"], "commit_described", lambda: "abc1234")
    count = len(measure("--peer", "none"))
    assert len(measure("--peer", "none", "--resume")) == count
    assert len(measure("--resume")) == count + 2


def test_images_that_no_group_divides_are_refused(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.arguments(["--images", "12", "--group", "8"])
    assert "--images: expected a multiple of the group of 8, got 12" in capsys.readouterr().err
