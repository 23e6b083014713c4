"""What a draw depends on and what it does not: slots, order, other images, memory, weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from argrpo.engine.conditions import TextFeatures
from argrpo.engine.kv_cache import slot_bytes
from argrpo.engine.rollout import Rollout
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.kernels.counter_random import gumbel_noise
from argrpo.kernels.draw import DrawKeys
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy

Build = Callable[..., RolloutEngine]
GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN = SamplingParams()
GUIDED = SamplingParams(guidance_scale=3.0, temperature=0.9, top_k=60, top_p=0.95)
INTERVAL = SamplingParams(guidance_scale=2.0, guidance_interval=5)

# Two noisy logits this close are a tie: library products of other row counts round fp32 logits of
# size 10 differently, each by less than half of it.
TIE = 1e-4


@pytest.fixture(scope="module")
def policy() -> LlamaGen:
    """Two layers, 16 tokens, 512 codes, 10 classes."""
    loaded = load_policy(GOLDEN / "llamagen_c2i" / "main.pt", image_size=64, num_heads=2)
    return loaded.requires_grad_(False)


@pytest.fixture(scope="module")
def text_policy() -> LlamaGen:
    """Two layers, 16 tokens, 256 codes, prompts of up to 8 positions."""
    loaded = load_policy(GOLDEN / "llamagen_t2i" / "model.pt", image_size=64, num_heads=2)
    return loaded.requires_grad_(False)


def random_labels(count: int) -> Tensor:
    return torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(3))


def assert_same_draw(got: Rollout, expected: Rollout) -> None:
    """Bit for bit."""
    assert torch.equal(got.token_ids, expected.token_ids)
    assert torch.equal(got.logprobs, expected.logprobs)
    assert torch.equal(got.entropies, expected.entropies)


def assert_same_draw_in_order(got: Rollout, expected: Rollout, order: Tensor) -> None:
    """Bit for bit, where image i of `got` is image order[i] of `expected`."""
    assert torch.equal(got.image_ids, order)
    assert torch.equal(got.token_ids, expected.token_ids[order])
    assert torch.equal(got.logprobs, expected.logprobs[order])
    assert torch.equal(got.entropies, expected.entropies[order])


def assert_same_but_for_ties(got: Rollout, expected: Rollout, policy: LlamaGen) -> None:
    """The tie rule: an image's tokens agree up to a position where both tokens were the best two
    and their noisy logits a tie; from there on the image goes its own way."""
    differs = (got.token_ids != expected.token_ids).any(1).nonzero().flatten().tolist()
    assert len(differs) <= 1 + len(got) // 50, "ties are rarer than this many differences"
    for row in differs:
        one = slice(row, row + 1)
        position = int((got.token_ids[row] != expected.token_ids[row]).nonzero()[0])
        logits = policy.logits(
            expected.conditions[one],
            expected.token_ids[one],
            expected.params.guidance_scale,
            expected.params.guidance_interval,
        )[:, position]
        seed, at = torch.tensor([expected.seed]), torch.tensor([position])
        keys = DrawKeys(seed, expected.image_ids[one], at)
        noisy = (logits / expected.params.temperature + gumbel_noise(keys, logits.shape[1]))[0]
        drawn = torch.stack([got.token_ids[row, position], expected.token_ids[row, position]])
        assert noisy[drawn].max() == noisy.max()
        assert (noisy[drawn[0]] - noisy[drawn[1]]).abs() < TIE


@pytest.mark.parametrize("params", [PLAIN, GUIDED, INTERVAL], ids=["plain", "guided", "interval"])
def test_the_order_of_the_images_changes_no_bit(
    params: SamplingParams, policy: LlamaGen, build: Build
) -> None:
    labels, order = random_labels(13), torch.randperm(13)
    engine = build(policy, max_slots=6)
    rollout = engine.draw(labels, params, seed=11)
    shuffled = engine.draw(labels[order], params, seed=11, image_ids=order)
    assert_same_draw_in_order(shuffled, rollout, order)


def test_the_order_of_the_images_changes_no_bit_on_two_threads(build: Build) -> None:
    """More threads cut library products, and a fused attention, into other blocks."""
    sizes = {"dim": 128, "num_layers": 1, "num_heads": 2, "ffn_dim": 256, "vocab_size": 512}
    policy = LlamaGen(LlamaGenConfig(**sizes, image_size=48, num_classes=10)).requires_grad_(False)
    for parameter in policy.parameters():
        parameter.mul_(4.0)  # from 0.02 to 0.08, which makes attention and logits uneven
    labels, order = random_labels(13), torch.randperm(13)
    engine = build(policy, max_slots=8)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rollout = engine.draw(labels, PLAIN, seed=11)
        shuffled = engine.draw(labels[order], PLAIN, seed=11, image_ids=order)
    finally:
        torch.set_num_threads(before)
    assert_same_draw_in_order(shuffled, rollout, order)


@pytest.mark.parametrize("params", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_the_number_of_slots_changes_tokens_at_ties_alone(
    params: SamplingParams, policy: LlamaGen, build: Build
) -> None:
    labels = random_labels(24)
    expected = build(policy, max_slots=24).draw(labels, params, seed=5)
    for max_slots in (3, 9, 64):
        rollout = build(policy, max_slots=max_slots).draw(labels, params, seed=5)
        assert_same_but_for_ties(rollout, expected, policy)


def test_a_deterministic_engine_draws_the_same_bits_with_any_number_of_slots(
    policy: LlamaGen, build: Build
) -> None:
    labels = random_labels(20)
    expected = build(policy, max_slots=20, deterministic=True).draw(labels, GUIDED, seed=5)
    for max_slots in (1, 7, 64):
        engine = build(policy, max_slots=max_slots, deterministic=True)
        assert_same_draw(engine.draw(labels, GUIDED, seed=5), expected)


def test_a_thousand_images_refill_64_slots(build: Build) -> None:
    small = GOLDEN / "llamagen_c2i" / "small_model.pt"
    policy = load_policy(small, image_size=64, num_heads=2).requires_grad_(False)
    labels = random_labels(1000)
    engine = build(policy, max_slots=64)
    rollout = engine.draw(labels, GUIDED, seed=5)
    assert rollout.token_ids.shape == (1000, 16)
    assert rollout.token_ids.min() >= 0 and rollout.token_ids.max() < 64
    assert torch.equal(rollout.image_ids, torch.arange(1000))
    assert torch.isfinite(rollout.logprobs).all() and (rollout.logprobs <= 0).all()
    # Each image is the one that it would have been on its own.
    for image in (0, 63, 64, 511, 999):
        one = torch.tensor([image])
        alone = engine.draw(labels[one], GUIDED, seed=5, image_ids=one)
        assert torch.equal(alone.token_ids, rollout.token_ids[one])


def test_an_engine_repeats_itself_and_holds_no_state(policy: LlamaGen, build: Build) -> None:
    labels = random_labels(6)
    engine = build(policy, max_slots=4)
    first = engine.draw(labels, GUIDED, seed=1)
    other = engine.draw(labels, PLAIN, seed=2)
    torch.manual_seed(123)
    assert_same_draw(engine.draw(labels, GUIDED, seed=1), first)
    assert_same_draw(build(policy, max_slots=4).draw(labels, PLAIN, seed=2), other)


def test_seed_and_image_id_fix_the_randomness(policy: LlamaGen, build: Build) -> None:
    same_class = torch.full((6,), 4)
    engine = build(policy, max_slots=6)
    rollout = engine.draw(same_class, PLAIN, seed=1)
    assert len(rollout.token_ids.unique(dim=0)) == 6, "images of a class differ"
    assert not torch.equal(engine.draw(same_class, PLAIN, seed=2).token_ids, rollout.token_ids)
    assert not torch.equal(
        engine.draw(same_class, PLAIN, seed=1 + 2**40).token_ids, rollout.token_ids
    ), "the upper half of the seed counts"
    far = torch.tensor([5, 5, 5 + 2**40, 5 - 2**40, 0, 1])
    drawn = engine.draw(same_class, PLAIN, seed=1, image_ids=far).token_ids
    assert torch.equal(drawn[0], rollout.token_ids[5])
    assert torch.equal(drawn[1], drawn[0]), "one id, one condition: one image"
    assert len(drawn.unique(dim=0)) == 5, "the upper half of the id counts"


def test_draw_iter_yields_the_draw_in_parts(policy: LlamaGen, build: Build) -> None:
    labels = random_labels(11)
    engine = build(policy, max_slots=4)
    whole = engine.draw(labels, GUIDED, seed=1, cond_logprobs=True, support=True)
    parts = list(engine.draw_iter(labels, GUIDED, seed=1, cond_logprobs=True, support=True))
    assert [len(part) for part in parts] == [4, 4, 3]
    for field in ("token_ids", "logprobs", "cond_logprobs", "entropies", "support", "image_ids"):
        joined = torch.cat([getattr(part, field) for part in parts])
        assert torch.equal(joined, getattr(whole, field)), field
    assert torch.equal(torch.cat([part.conditions for part in parts]), labels)
    assert {part.params for part in parts} == {GUIDED}


def test_a_new_draw_gives_up_what_is_left_of_the_former(policy: LlamaGen, build: Build) -> None:
    labels = random_labels(11)
    engine = build(policy, max_slots=4)
    expected = {params: engine.draw(labels, params, seed=1) for params in (GUIDED, INTERVAL)}
    former = engine.draw_iter(labels, INTERVAL, seed=1)
    waiting = engine.draw_iter(labels, GUIDED, seed=1)
    first = next(former)
    assert torch.equal(first.token_ids, expected[INTERVAL].token_ids[: len(first)])
    begun = next(waiting)
    with pytest.raises(RuntimeError, match=r"no other draw .* its last 7 images were given up"):
        next(former)
    former.close()  # disturbs nobody
    rest = torch.cat([part.token_ids for part in (begun, *waiting)])
    assert torch.equal(rest, expected[GUIDED].token_ids)


def test_a_draw_that_nobody_takes_further_is_in_nobodys_way(policy: LlamaGen, build: Build) -> None:
    labels = random_labels(11)
    engine = build(policy, max_slots=4)
    expected = engine.draw(labels, GUIDED, seed=1)
    abandoned = engine.draw_iter(labels, INTERVAL, seed=1)
    next(abandoned)
    assert_same_draw(engine.draw(labels, GUIDED, seed=1), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_callers_modes_change_no_bit(
    mode: type[torch.inference_mode], policy: LlamaGen, build: Build
) -> None:
    labels = random_labels(6)
    expected = build(policy, max_slots=4).draw(labels, GUIDED, seed=1)
    engine = build(policy, max_slots=4)
    with mode():
        assert_same_draw(engine.draw(labels, GUIDED, seed=1), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_draw(engine.draw(labels, GUIDED, seed=1), expected)


def test_a_rollout_says_how_it_was_drawn(policy: LlamaGen, build: Build) -> None:
    labels = random_labels(3)
    engine = build(policy, max_slots=4)
    rollout = engine.draw(labels, GUIDED, seed=9)
    assert (rollout.params, rollout.seed) == (GUIDED, 9)
    assert torch.equal(rollout.conditions, labels)
    assert rollout.token_ids.dtype == rollout.image_ids.dtype == torch.int64
    assert rollout.logprobs.dtype == rollout.entropies.dtype == torch.float32
    assert rollout.cond_logprobs is None and rollout.support is None, "only when asked for"
    assert engine.draw(labels, PLAIN, seed=9, support=True).support is None, "nothing is cut"


@pytest.mark.parametrize("kind", ["labels", "prompts"])
def test_no_images_give_an_empty_rollout(
    kind: str, policy: LlamaGen, text_policy: LlamaGen, build: Build
) -> None:
    none = torch.empty(0, dtype=torch.int64)
    prompts = TextFeatures(torch.ones(3, 8, 32), torch.ones(3, 8), none)
    engine = build(policy if kind == "labels" else text_policy, max_slots=4)
    conditions = none if kind == "labels" else prompts
    rollout = engine.draw(conditions, GUIDED, seed=0)
    assert len(rollout) == 0
    assert rollout.token_ids.shape == rollout.logprobs.shape == rollout.entropies.shape == (0, 16)
    assert rollout.token_ids.dtype == torch.int64
    assert list(engine.draw_iter(conditions, GUIDED, seed=0)) == []


def test_kv_bytes_bound_the_slots_and_change_no_image(policy: LlamaGen) -> None:
    labels = random_labels(12)
    one = slot_bytes(policy.shape, num_branches=2)
    expected = RolloutEngine(policy, max_slots=12).draw(labels, GUIDED, seed=5)
    for room, num_slots in ((1, 1), (3, 3), (9, 8), (100, 12)):
        engine = RolloutEngine(policy, max_slots=12, kv_bytes=room * one)
        assert engine.num_slots == num_slots
        assert_same_but_for_ties(engine.draw(labels, GUIDED, seed=5), expected, policy)
    with pytest.raises(ValueError, match=rf"kv_bytes: expected at least {one} .* got {one - 1}"):
        RolloutEngine(policy, max_slots=12, kv_bytes=one - 1)
    with pytest.raises(ValueError, match=r"kv_bytes: expected room for 8 images .* got room for 4"):
        RolloutEngine(policy, max_slots=12, kv_bytes=5 * one, deterministic=True)


def test_the_next_draw_uses_the_new_weights(policy: LlamaGen, build: Build) -> None:
    trained = copy.deepcopy(policy).requires_grad_(True)
    labels = random_labels(6)
    engine = build(trained, max_slots=4)
    before = engine.draw(labels, GUIDED, seed=1)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    trained.logprobs(labels, before.token_ids, PLAIN).mean().neg().backward()
    optimizer.step()
    after = engine.draw(labels, GUIDED, seed=1)
    assert not torch.equal(after.token_ids, before.token_ids)
    assert_same_draw(after, build(trained, max_slots=4).draw(labels, GUIDED, seed=1))
    assert not after.logprobs.requires_grad


@pytest.mark.parametrize("paged", [False, True], ids=["waves", "pages"])
def test_the_unconditional_half_is_dropped_after_the_interval(
    policy: LlamaGen, paged: bool
) -> None:
    """Rows that go through the trunk, of an engine of 8 slots."""
    rows: list[int] = []
    first = policy.layers[0]
    hook = first.register_forward_hook(lambda _, inputs, out: rows.append(len(inputs[0])))

    def steps(params: SamplingParams) -> list[int]:
        rows.clear()
        RolloutEngine(policy, max_slots=8, paged=paged).draw(random_labels(8), params, seed=0)
        return rows[-15:]  # token 0 comes from the prefixes, before

    try:
        assert steps(SamplingParams()) == [8] * 15
        assert steps(SamplingParams(guidance_scale=2.0)) == [16] * 15
        # Interval i guides tokens 0 to i + 1: i + 1 of the steps, since token 0 needs none.
        for interval in (0, 4, 14):
            params = SamplingParams(guidance_scale=2.0, guidance_interval=interval)
            guided = interval + 1
            assert steps(params) == [16] * guided + [8] * (15 - guided)
    finally:
        hook.remove()


def test_progress_counts_every_token_once(policy: LlamaGen, build: Build) -> None:
    told: list[tuple[int, int]] = []
    engine = build(policy, max_slots=4)
    engine.draw(random_labels(7), GUIDED, seed=1, progress=lambda *counts: told.append(counts))
    drawn = [done for done, _ in told]
    assert drawn == sorted(drawn) and drawn[0] < 7 * 16 == drawn[-1]
    assert {total for _, total in told} == {7 * 16}
