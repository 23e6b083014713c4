"""Prefixes over pages: collapsed or kept as keys, shared by a prompt's images, of mixed lengths."""

import random
from pathlib import Path

import pytest
import torch
from paged_draws import paged
from safetensors.torch import load_file
from torch import Tensor

from argrpo.engine import rollout_engine
from argrpo.engine.conditions import TextFeatures
from argrpo.engine.paged_runner import PagedRunner
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy

GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN = SamplingParams()
# fp32 logits of size 10, summed in another order.
TOLERANCE = {"atol": 1e-4, "rtol": 0}


class _Turned(LlamaGen):
    """A prefix with a rotary embedding, as most other models have."""

    @property
    def rotary(self) -> Tensor:
        length, table = self.config.prefix_len, super().rotary
        angles = torch.arange(length)[:, None] * torch.linspace(0.1, 1, self.config.head_dim // 2)
        turned = torch.stack([angles.cos(), angles.sin()], dim=-1)
        return torch.cat([turned.to(table.device), table[length:]])


def text_model(kind: type[LlamaGen]) -> LlamaGen:
    """Prompts of 20 positions: one full page of 16, shared, and 4 more."""
    config = LlamaGenConfig(
        dim=32,
        num_layers=2,
        num_heads=2,
        ffn_dim=64,
        vocab_size=64,
        image_size=64,
        model_type="t2i",
        caption_dim=8,
        prefix_len=20,
    )
    model = kind(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(6.0)  # from 0.02 to 0.12, which makes attention and logits uneven
    return model


def prompts(index: list[int]) -> TextFeatures:
    features = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1))
    return TextFeatures(features, torch.ones(3, 20, dtype=torch.bool), torch.tensor(index))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_prefix_kept_as_keys_draws_what_the_collapsed_one_draws(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, conditions = text_model(LlamaGen), prompts([2, 0, 0, 1, 2, 2, 0])
    params = SamplingParams(guidance_scale=scale)
    collapsed = paged(policy, 4).draw(conditions, params, seed=3)
    monkeypatch.setattr(rollout_engine, "has_zero_rotary_prefix", lambda policy: False)
    engine = paged(policy, 4)
    keyed = engine.draw(conditions, params, seed=3)
    # This seed has no tie.
    assert torch.equal(keyed.token_ids, collapsed.token_ids)
    torch.testing.assert_close(keyed.logprobs, collapsed.logprobs, **TOLERANCE)
    engine.check()
    assert engine.num_held_pages == 0


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_turned_prefix_scores_as_it_was_drawn(scale: float) -> None:
    policy, conditions = text_model(_Turned), prompts([2, 0, 0, 1, 2])
    engine = RolloutEngine(policy, max_slots=4, page_size=16)
    params = SamplingParams(guidance_scale=scale)
    rollout = engine.draw(conditions, params, seed=3)
    again = policy.logprobs(conditions, rollout.token_ids, params)
    torch.testing.assert_close(again, rollout.logprobs, **TOLERANCE)
    plain = text_model(LlamaGen).logprobs(conditions, rollout.token_ids, params)
    assert (plain - again).abs().max() > 0.1, "the rotation matters"


def test_images_of_one_prompt_share_its_full_pages() -> None:
    policy = text_model(_Turned)
    engine = RolloutEngine(policy, max_slots=8, page_size=16)
    parts = engine.draw_iter(prompts([1] * 8), PLAIN, seed=3)
    runner, held = engine._runner, []
    assert isinstance(runner, PagedRunner)
    honest = runner._replay

    def watched(*arguments: object) -> None:
        held.append(engine.num_held_pages)
        engine.check()
        honest(*arguments)

    runner._replay = watched
    list(parts)
    # 35 entries an image: one page shared by all, a second of its own, later a third.
    assert held[0] == 1 + 8 and held[-1] == 1 + 8 * 2
    assert engine.num_held_pages == 0


def test_padded_prompts_need_a_prefix_that_collapses() -> None:
    conditions = prompts([0, 1])
    mask = torch.arange(20) >= torch.tensor([[0], [5], [0]])
    padded = TextFeatures(conditions.features, mask, conditions.index)
    engine = RolloutEngine(text_model(_Turned), max_slots=4, page_size=16)
    with pytest.raises(ValueError, match="conditions: expected prompts without padding"):
        engine.draw(padded, PLAIN, seed=0)
    assert RolloutEngine(text_model(LlamaGen), max_slots=4).draw(padded, PLAIN, seed=0)
    with pytest.raises(ValueError, match="paged: expected True or None for a policy whose prefix"):
        RolloutEngine(text_model(_Turned), max_slots=4, paged=False)


def test_prompts_of_mixed_lengths_in_cohorts_score_as_they_were_drawn() -> None:
    policy = load_policy(GOLDEN / "llamagen_t2i" / "model.pt", image_size=128, num_heads=2)
    case = load_file(GOLDEN / "llamagen_t2i" / "expected.safetensors")
    index = torch.arange(40) * 7 % 3
    conditions = TextFeatures(case["features"], case["mask"], index)
    page_bytes = 2 * 2 * policy.shape.num_heads * 16 * policy.shape.head_dim * 4
    engine = RolloutEngine(policy, max_slots=8, page_size=16, kv_bytes=40 * page_bytes, paged=True)
    assert "groups" in engine.describe()
    params = SamplingParams(guidance_scale=4.0, top_k=50)
    rollout = engine.draw(conditions, params, seed=2, support=True)
    with torch.no_grad():
        again = policy.logprobs(conditions, rollout.token_ids, params, support=rollout.support)
    torch.testing.assert_close(again, rollout.logprobs, **TOLERANCE)


@pytest.mark.gpu
def test_a_gpu_draws_texts_and_keyed_prefixes_that_score_as_they_were_drawn() -> None:
    params = SamplingParams(guidance_scale=3.0)
    for kind in (LlamaGen, _Turned):
        policy = text_model(kind).cuda()
        engine = RolloutEngine(policy, max_slots=4, page_size=16)
        conditions = prompts([2, 0, 0, 1, 2, 2, 0])
        rollout = engine.draw(conditions, params, seed=3)
        again = policy.logprobs(conditions, rollout.token_ids, params)
        torch.testing.assert_close(again, rollout.logprobs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", range(6))
def test_partial_waves_under_guidance_that_ends_score_as_they_were_drawn(
    seed: int,
) -> None:
    """Empty slots of a wave must not store keys through tables whose pages are others' by now."""
    rng = random.Random(seed)
    keyed = seed % 2 == 1
    policy = text_model(_Turned if keyed else LlamaGen)
    engine = RolloutEngine(policy, max_slots=rng.randint(3, 8), page_size=16, paged=True)
    for _ in range(3):
        params = SamplingParams(guidance_scale=3.0, guidance_interval=rng.randint(0, 14))
        conditions = prompts([rng.randrange(3) for _ in range(rng.randint(1, 20))])
        rollout = engine.draw(conditions, params, seed=rng.randrange(100))
        again = policy.logprobs(conditions, rollout.token_ids, params)
        # Logits reach 30 under guidance of 3, and so does what rounds.
        torch.testing.assert_close(again, rollout.logprobs, atol=3e-4, rtol=0)
        engine.check()
