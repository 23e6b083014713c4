"""What a rollout's tokens are scored under."""

import pytest
import torch

from argrpo.engine.rollout import Rollout
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.token_scores import scored, tokens_to_score

FILTERED = SamplingParams(guidance_scale=2.0, temperature=0.8, top_k=9)
IMAGES = 5


@pytest.fixture
def policy() -> LlamaGen:
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "vocab_size": 24}
    policy = LlamaGen(LlamaGenConfig(**sizes, image_size=48, num_classes=10))
    with torch.no_grad():  # far enough from uniform for guidance and filters to matter
        policy.output.weight.mul_(20)
    return policy


def draw(policy: LlamaGen) -> Rollout:
    engine = RolloutEngine(policy, max_slots=IMAGES)
    return engine.draw(torch.arange(IMAGES), FILTERED, seed=0, support=True)


def test_the_guided_policy_is_that_of_the_draw(policy: LlamaGen) -> None:
    rollout = draw(policy)
    tokens = tokens_to_score(rollout, "guided")
    assert tokens.support is rollout.support
    scores = scored(policy, tokens, micro_batch=2)
    # fp32 rounding of one path against the other
    torch.testing.assert_close(scores.logprobs, rollout.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.entropies, rollout.entropies, atol=1e-4, rtol=0)


def test_the_conditional_policy_keeps_the_temperature_and_nothing_else(policy: LlamaGen) -> None:
    rollout = draw(policy)
    tokens = tokens_to_score(rollout, "conditional")
    assert tokens.params == SamplingParams(temperature=0.8)
    assert tokens.support is None
    scores = scored(policy, tokens, micro_batch=2)
    with torch.no_grad():
        log_probs = (policy.logits(rollout.conditions, rollout.token_ids) / 0.8).log_softmax(-1)
    want = log_probs.gather(2, rollout.token_ids[..., None]).squeeze(2)
    torch.testing.assert_close(scores.logprobs, want, atol=1e-5, rtol=0)  # fp32 sums of 24 terms
    assert not scores.logprobs.requires_grad


def test_scores_do_not_depend_on_the_micro_batch(policy: LlamaGen) -> None:
    tokens = tokens_to_score(draw(policy), "guided")
    whole, split = (scored(policy, tokens, micro_batch=m) for m in (IMAGES, 2))
    # Library products of other shapes round otherwise.
    torch.testing.assert_close(whole.logprobs, split.logprobs, atol=1e-5, rtol=0)
