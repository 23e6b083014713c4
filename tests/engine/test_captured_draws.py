"""The engine over pages on a GPU: graphs are replayed, and every row scores as it was drawn."""

import copy
from pathlib import Path

import pytest
import torch
from paged_draws import assert_same_draw, labels, paged

from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen
from argrpo.models.loading import load_policy

GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN = SamplingParams()
GUIDED = SamplingParams(guidance_scale=3.0, temperature=0.9, top_k=60, top_p=0.95)


@pytest.fixture(scope="module")
def policy() -> LlamaGen:
    """Two layers, 64 tokens (4 pages of 16), 512 codes, 10 classes."""
    loaded = load_policy(GOLDEN / "llamagen_c2i" / "main.pt", image_size=128, num_heads=2)
    return loaded.requires_grad_(False)


GPU_DRAWS = {
    "plain": PLAIN,
    "guided": GUIDED,
    "interval": SamplingParams(guidance_scale=2.0, guidance_interval=20, temperature=0.9),
}


@pytest.mark.gpu
@pytest.mark.parametrize("pages", [None, 40], ids=["lockstep", "cohorts"])
@pytest.mark.parametrize("name", GPU_DRAWS)
def test_a_gpu_replays_graphs_whose_every_row_scores_as_it_was_drawn(
    name: str, pages: int | None, policy: LlamaGen
) -> None:
    params, moved = GPU_DRAWS[name], copy.deepcopy(policy).cuda()
    engine = paged(moved, 8, pages=pages)
    waves = RolloutEngine(moved, max_slots=8, paged=False)
    for seed in (5, 6):  # the second draw replays what the first captured
        one = engine.draw(labels(29), params, seed=seed, support=True)
        again = moved.logprobs(labels(29), one.token_ids, params, support=one.support)
        # fp32 throughout: TF32 is off unless somebody switches it on.
        torch.testing.assert_close(again, one.logprobs, atol=1e-3, rtol=0)
        other = waves.draw(labels(29), params, seed=seed)
        parted = (one.token_ids != other.token_ids).any(dim=1)
        assert parted.sum() <= 2, "ties of fp32 rounding are rarer"
    assert_same_draw(engine.draw(labels(29), params, seed=6, support=True), one)
    order = torch.randperm(29)
    shuffled = engine.draw(labels(29)[order], params, seed=6, image_ids=order, support=True)
    assert torch.equal(shuffled.token_ids, one.token_ids[order.cuda()])
    engine.check()
    parts = engine.draw_iter(labels(29), params, seed=7)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert sum(len(part) for part in parts) == 29
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_bf16_on_a_gpu_strays_no_further_than_plain_pytorch(scale: float, policy: LlamaGen) -> None:
    half, params = copy.deepcopy(policy).bfloat16().cuda(), SamplingParams(guidance_scale=scale)
    strays = []
    for is_paged in (True, False):
        engine = RolloutEngine(half, max_slots=32, page_size=16, paged=is_paged)
        rollout = engine.draw(labels(64), params, seed=1)
        ratio = (half.logprobs(labels(64), rollout.token_ids, params) - rollout.logprobs).abs()
        strays.append(ratio.flatten().quantile(0.99))
    assert strays[0] <= 1.5 * strays[1]
