"""The engine over pages: cohorts, replays, and pages that come back whatever happens. The fixture
`build` of the other engine tests covers what all kinds share."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from paged_draws import PAGE_BYTES, assert_same_draw, labels, paged
from torch import nn

from argrpo.engine import paged_runner
from argrpo.engine.decode_step import DecodeState
from argrpo.engine.device_queue import DeviceQueue
from argrpo.engine.page_pool import PagePool
from argrpo.engine.paged_cache import PagedCache
from argrpo.engine.paged_runner import PagedRunner
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy

GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN = SamplingParams()
GUIDED = SamplingParams(guidance_scale=3.0, temperature=0.9, top_k=60, top_p=0.95)
INTERVAL = SamplingParams(guidance_scale=2.0, guidance_interval=20)
# fp32 logits of size 10, summed in another order.
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def policy() -> LlamaGen:
    """Two layers, 64 tokens (4 pages of 16), 512 codes, 10 classes."""
    loaded = load_policy(GOLDEN / "llamagen_c2i" / "main.pt", image_size=128, num_heads=2)
    return loaded.requires_grad_(False)


@pytest.mark.parametrize("params", [PLAIN, GUIDED, INTERVAL], ids=["plain", "guided", "interval"])
def test_pages_draw_what_contiguous_waves_draw(params: SamplingParams, policy: LlamaGen) -> None:
    waves = RolloutEngine(policy, max_slots=8).draw(labels(13), params, seed=5)
    pages = paged(policy, 8).draw(labels(13), params, seed=5)
    # This seed has no tie: attention sums in another order, so log-probs may differ by rounding.
    assert torch.equal(pages.token_ids, waves.token_ids)
    torch.testing.assert_close(pages.logprobs, waves.logprobs, **TOLERANCE)
    torch.testing.assert_close(pages.entropies, waves.entropies, **TOLERANCE)


def test_one_capture_serves_any_labels_seed_scale_and_filter(
    policy: LlamaGen, request: pytest.FixtureRequest
) -> None:
    """Everything that may differ between two draws is read on the device."""
    engine, fresh = paged(policy, 4), []
    requests = list(
        itertools.product(
            (labels(4), labels(7).flip(0)),
            (
                GUIDED,
                SamplingParams(guidance_scale=1.5, temperature=1.2, top_k=300, top_p=0.5),
            ),
            (5, -(2**50)),
        )
    )
    for conditions, params, seed in requests:
        fresh.append(paged(policy, 4).draw(conditions, params, seed=seed, support=True))
    request.getfixturevalue("replayed_steps")
    for (conditions, params, seed), expected in zip(requests, fresh, strict=True):
        assert_same_draw(engine.draw(conditions, params, seed=seed, support=True), expected)
    runner = engine._runner
    assert isinstance(runner, PagedRunner)
    assert len(runner._steps) == 2, "two lengths of one kind of step, traced once"


def test_the_stand_in_for_a_graph_fails_where_a_host_value_is_baked_in(
    policy: LlamaGen, replayed_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = RolloutEngine(policy, max_slots=4).draw(labels(4), PLAIN, seed=1)
    honest, calls = paged_runner.decode_steps, []

    def with_its_own_seed(policy: LlamaGen, state: object, *rest: object) -> None:
        calls.append(1)
        state.seed = state.seed.clone()  # a new address, as if the seed had been read beforehand
        honest(policy, state, *rest)

    monkeypatch.setattr(paged_runner, "decode_steps", with_its_own_seed)
    engine = paged(policy, 4)
    engine.draw(labels(4), PLAIN, seed=0)
    again = engine.draw(labels(4), PLAIN, seed=1)
    assert calls, "the step was traced"
    assert not torch.equal(again.token_ids, expected.token_ids)


@pytest.mark.parametrize("params", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_cohorts_draw_the_images_that_lockstep_draws(
    params: SamplingParams, policy: LlamaGen
) -> None:
    engine = paged(policy, 8, pages=40)  # 2 x 4 pages an image: 5 in lockstep, 8 in cohorts
    assert engine.num_slots == 8
    assert "4 groups of 2, 16 steps apart" in engine.describe()
    rollout = engine.draw(labels(41), params, seed=5, cond_logprobs=True, support=True)
    lockstep = paged(policy, 8).draw(labels(41), params, seed=5, cond_logprobs=True, support=True)
    assert_same_draw(rollout, lockstep)
    engine.check()
    assert engine.num_held_pages == 0


def test_cohorts_finish_in_order_and_never_hold_more_than_the_pool(policy: LlamaGen) -> None:
    engine = paged(policy, 8, pages=40)
    parts = engine.draw_iter(labels(30), GUIDED, seed=5)
    ids = []
    for part in parts:
        engine.check()
        assert engine.num_held_pages <= 40
        ids += part.image_ids.tolist()
    assert ids == list(range(30))
    assert engine.num_held_pages == 0


def test_guidance_that_ends_runs_in_lockstep_even_where_memory_is_short(policy: LlamaGen) -> None:
    engine = paged(policy, 8, pages=40)
    rollout = engine.draw(labels(11), INTERVAL, seed=5)
    assert_same_draw(rollout, paged(policy, 8).draw(labels(11), INTERVAL, seed=5))


@pytest.mark.parametrize("pages", [None, 40], ids=["lockstep", "cohorts"])
def test_pages_come_back_when_the_caller_wants_no_more(pages: int | None, policy: LlamaGen) -> None:
    engine = paged(policy, 8, pages=pages)
    expected = engine.draw(labels(30), GUIDED, seed=5)
    parts = engine.draw_iter(labels(30), GUIDED, seed=5)
    next(parts)
    parts.close()
    engine.check()
    assert engine.num_held_pages == 0
    assert_same_draw(engine.draw(labels(30), GUIDED, seed=5), expected)


@pytest.mark.parametrize(
    ("owner", "method", "calls_before"),
    [
        (PagedRunner, "_replay", 2),
        (PagedRunner, "_admit", 1),
        (PagedRunner, "_finish", 1),
        (PagedCache, "_append", 7),
        (PagedRunner, "_first_draw", 1),
        (PagePool, "take", 5),
        (PagePool, "release", 3),
        (DeviceQueue, "captured", 1),
        (DecodeState, "rest", 0),
    ],
)
def test_pages_come_back_after_ctrl_c(
    owner: type, method: str, calls_before: int, policy: LlamaGen, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = paged(policy, 8, pages=40).draw(labels(20), GUIDED, seed=5)
    engine, honest, calls = paged(policy, 8, pages=40), getattr(owner, method), itertools.count()

    def interrupted(*arguments: object, **options: object) -> object:
        if next(calls) == calls_before:
            raise KeyboardInterrupt
        return honest(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.draw(labels(20), GUIDED, seed=5)
    engine.check()
    assert engine.num_held_pages == 0
    assert_same_draw(engine.draw(labels(20), GUIDED, seed=5), expected)


@pytest.mark.parametrize("pages", [None, 40], ids=["lockstep", "cohorts"])
def test_images_given_away_a_turn_later_are_the_same(
    pages: int | None, policy: LlamaGen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the next turn is queued before the caller gets the last one's images."""
    expected = paged(policy, 8, pages=pages).draw(labels(30), GUIDED, seed=5, support=True)
    monkeypatch.setattr(DeviceQueue, "runs_ahead", True)
    engine = paged(policy, 8, pages=pages)
    drawn = [0]
    parts, taken = [], 0
    for part in engine.draw_iter(
        labels(30), GUIDED, seed=5, support=True, progress=lambda n, _: drawn.append(n)
    ):
        taken += len(part)
        parts.append(part)
        assert taken == 30 or drawn[-1] > taken * 64, "the next images are under way"
    assert torch.equal(torch.cat([part.token_ids for part in parts]), expected.token_ids)
    assert torch.equal(torch.cat([part.support for part in parts]), expected.support)


@pytest.mark.parametrize("kind", ["waves", "pages"])
def test_weights_must_stay_while_a_draw_is_taken(kind: str, policy: LlamaGen) -> None:
    moving = copy.deepcopy(policy)
    engine = RolloutEngine(moving, max_slots=4, page_size=16, paged=kind == "pages")
    parts = engine.draw_iter(labels(8), PLAIN, seed=1)
    next(parts)
    moving.norm.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="draw_iter: expected the weights to stay"):
        next(parts)
    engine.check()
    # Prefixes are read at the call, so an update before the first image is one too.
    parts = engine.draw_iter(labels(4), PLAIN, seed=1)
    moving.norm.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="draw_iter: expected the weights to stay"):
        next(parts)
    # The last part may be followed by an update, as in a loop that trains on each.
    parts = engine.draw_iter(labels(4), PLAIN, seed=1)
    next(parts)
    moving.norm.weight.mul_(1.5)
    assert list(parts) == []


def test_adapters_and_other_weights_are_refused(policy: LlamaGen) -> None:
    changed = copy.deepcopy(policy)
    engine = paged(changed, 4)
    engine.draw(labels(2), PLAIN, seed=0)
    changed.layers[0].attention.lora_A = nn.Parameter(torch.zeros(2, 128))
    with pytest.raises(ValueError, match=r"policy: expected layers.0.attention.lora_A as the en"):
        engine.draw(labels(2), PLAIN, seed=0)
    with pytest.raises(ValueError, match=r"got an adapter \(layers.0.attention.lora_A\)"):
        paged(changed, 4)
    half = copy.deepcopy(policy)
    engine = paged(half, 4)
    half.bfloat16()
    with pytest.raises(ValueError, match=r"float32 \[.*got bfloat16 .*build a new RolloutEngine"):
        engine.draw(labels(2), PLAIN, seed=0)
    half.norm.float()
    with pytest.raises(ValueError, match="expected weights of one dtype, got bfloat16, float32"):
        paged(half, 4)
    with torch.inference_mode():
        unseen = copy.deepcopy(policy)
    with pytest.raises(ValueError, match=r"whose changes can be seen, got \S+ made in torch.inf"):
        paged(unseen, 4)


def test_weights_at_new_addresses_are_captured_again(
    policy: LlamaGen, replayed_steps: None
) -> None:
    moved = copy.deepcopy(policy)
    engine = paged(moved, 4)
    engine.draw(labels(4), PLAIN, seed=0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.data = parameter.data * 1.1
    expected = RolloutEngine(moved, max_slots=4).draw(labels(4), PLAIN, seed=0)
    assert torch.equal(engine.draw(labels(4), PLAIN, seed=0).token_ids, expected.token_ids)


def test_an_engine_says_when_the_slots_asked_for_do_not_fit(
    policy: LlamaGen, caplog: pytest.LogCaptureFixture
) -> None:
    paged(policy, 8)
    assert not caplog.messages
    paged(policy, 9, pages=16)
    assert caplog.messages == [
        "max_slots: 9 do not fit; KV cache: 2 slots in lockstep; 16 pages of 16 positions, "
        f"{16 * PAGE_BYTES / 1e9:.3g} GB at the most"
    ]


def test_what_an_engine_of_pages_cannot_hold_is_refused(policy: LlamaGen) -> None:
    with pytest.raises(ValueError, match=rf"kv_bytes: expected at least {8 * PAGE_BYTES} for one"):
        paged(policy, 4, pages=7)
    assert paged(policy, 4, pages=8).num_slots == 1
    with pytest.raises(ValueError, match="expected room for 8 images with deterministic=True"):
        RolloutEngine(
            policy,
            max_slots=4,
            page_size=16,
            kv_bytes=9 * PAGE_BYTES,
            paged=True,
            deterministic=True,
        )


def test_one_token_images_need_no_step() -> None:
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16, "vocab_size": 24}
    policy = LlamaGen(LlamaGenConfig(**sizes, image_size=16, num_classes=2)).requires_grad_(False)
    params = SamplingParams(guidance_scale=1.5)
    conditions = torch.tensor([0, 1, 1, 0, 1])
    pages = paged(policy, 4).draw(conditions, params, seed=7)
    assert_same_draw(pages, RolloutEngine(policy, max_slots=4).draw(conditions, params, seed=7))


def test_graphs_switch_where_guidance_ends(
    policy: LlamaGen, request: pytest.FixtureRequest
) -> None:
    expected = paged(policy, 8).draw(labels(11), INTERVAL, seed=5)
    request.getfixturevalue("replayed_steps")
    assert_same_draw(paged(policy, 8).draw(labels(11), INTERVAL, seed=5), expected)
