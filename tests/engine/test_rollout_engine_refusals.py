"""What an engine and a draw refuse, by name and before any work."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from argrpo.engine.conditions import TextFeatures
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy

GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN = SamplingParams()


@pytest.fixture(scope="module")
def policy() -> LlamaGen:
    """One layer, 16 tokens, 64 codes, 10 classes."""
    return load_policy(GOLDEN / "llamagen_c2i" / "small_model.pt", image_size=64, num_heads=2)


@pytest.fixture(scope="module")
def text_policy() -> LlamaGen:
    """Two layers, 16 tokens, 256 codes, prompts of up to 8 positions."""
    return load_policy(GOLDEN / "llamagen_t2i" / "model.pt", image_size=64, num_heads=2)


def test_labels_of_a_thousand_classes_are_checked() -> None:
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16, "vocab_size": 8}
    policy = LlamaGen(LlamaGenConfig(**sizes, image_size=32))
    engine = RolloutEngine(policy, max_slots=2)
    assert engine.draw(torch.tensor([0, 999]), PLAIN, seed=0).token_ids.shape == (2, 4)
    for label in (1000, -1):  # 1000 is the null class, which guidance alone may use
        with pytest.raises(ValueError, match=f"labels: expected 0 to 999, got {label}"):
            engine.draw(torch.tensor([5, label]), PLAIN, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"conditions": torch.tensor([1.0])},
            r"labels: expected int64 of shape \[N\], got torch.f",
        ),
        ({"conditions": torch.tensor([1], dtype=torch.int32)}, "labels: expected int64"),
        ({"conditions": torch.tensor([[1]])}, r"labels: expected int64 of shape \[N\], got .*1, 1"),
        ({"image_ids": torch.tensor([0, 1])}, r"image_ids: expected int64 of shape \[1\]"),
        ({"image_ids": torch.tensor([0.0])}, "image_ids: expected int64 .* got torch.float32"),
        ({"seed": 2**63}, "seed: expected a signed 64-bit integer, got 9223372036854775808"),
        ({"seed": 0.5}, "seed: expected a signed 64-bit integer, got 0.5"),
        (
            {"params": SamplingParams(temperature=0), "cond_logprobs": True},
            "cond_logprobs: expected a temperature above 0",
        ),
    ],
)
def test_a_wrong_draw_is_refused_by_name(
    arguments: dict[str, object], message: str, policy: LlamaGen
) -> None:
    engine = RolloutEngine(policy, max_slots=2)
    draw = {"conditions": torch.tensor([1]), "params": PLAIN, "seed": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        engine.draw(**draw)
    with pytest.raises(ValueError, match=message):
        engine.draw_iter(**draw)  # at the call, before any image is asked for


def test_conditions_of_another_kind_are_refused(policy: LlamaGen, text_policy: LlamaGen) -> None:
    case = load_file(GOLDEN / "llamagen_t2i" / "expected.safetensors")
    prompts = TextFeatures(case["features"], case["mask"])
    with pytest.raises(ValueError, match=r"conditions: expected class labels .* got TextF"):
        RolloutEngine(policy, max_slots=2).draw(prompts, PLAIN, seed=0)
    engine = RolloutEngine(text_policy, max_slots=2)
    with pytest.raises(ValueError, match="conditions: expected TextFeatures, got a tensor"):
        engine.draw(torch.tensor([1]), PLAIN, seed=0)
    with pytest.raises(ValueError, match=r"features: expected \[P, 8, 32\], got \[3, 7, 32\]"):
        engine.draw(TextFeatures(prompts.features[:, 1:], prompts.mask[:, 1:]), PLAIN, seed=0)
    with pytest.raises(ValueError, match=r"mask: expected left padding .* 2 of 3 prompts"):
        engine.draw(TextFeatures(prompts.features, prompts.mask.flip(1)), PLAIN, seed=0)
    text = GOLDEN / "llamagen_t2i" / "model.pt"
    right = load_policy(text, image_size=64, num_heads=2, text_padding="right")
    with pytest.raises(ValueError, match=r"mask: expected right padding .* 2 of 3 prompts"):
        RolloutEngine(right, max_slots=2).draw(prompts, PLAIN, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_slots": 0}, "max_slots: expected at least 1, got 0"),
        (
            {"max_slots": 4, "page_size": 48},
            r"page_size: expected one of \(16, 32, 64, 128\), got 48",
        ),
        ({"max_slots": 4, "page_size": 0}, "page_size: expected one of .* got 0"),
        ({"max_slots": 4, "kv_bytes": 0}, "kv_bytes: expected at least .* got 0"),
    ],
)
def test_a_wrong_engine_is_refused_by_name(
    arguments: dict[str, int], message: str, policy: LlamaGen
) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutEngine(policy, **arguments)
