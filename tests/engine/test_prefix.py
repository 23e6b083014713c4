"""A collapsed prefix says of a condition exactly what ordinary attention over it says."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo.engine.attention import CausalAttend, prefix_allowed
from argrpo.engine.conditions import Conditions, TextFeatures
from argrpo.engine.prefix import PrefixMemory, PrefixStates, collapse_prefixes
from argrpo.engine.rollout import Rollout
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen
from argrpo.models.loading import load_policy

GOLDEN = Path(__file__).parents[1] / "golden"
# fp32 sums in another order, of values of size 3 to 20.
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


class _RecordValues:
    """Ordinary attention that keeps the values of each layer."""

    def __init__(self, attend: CausalAttend) -> None:
        self._attend = attend
        self.values: list[Tensor] = []

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        self.values.append(qkv[:, :, 2])
        return self._attend(layer, qkv)


@pytest.fixture(scope="module")
def text_policy() -> LlamaGen:
    policy = load_policy(GOLDEN / "llamagen_t2i" / "model.pt", image_size=64, num_heads=2)
    return policy.requires_grad_(False)


def text(index: list[int]) -> TextFeatures:
    case = load_file(GOLDEN / "llamagen_t2i" / "expected.safetensors")
    return TextFeatures(case["features"], case["mask"], torch.tensor(index))


def assert_same_draw(got: Rollout, expected: Rollout) -> None:
    """Bit for bit."""
    assert torch.equal(got.token_ids, expected.token_ids)
    assert torch.equal(got.logprobs, expected.logprobs)


def assert_collapse_is_exact(policy: LlamaGen, conditions: Conditions) -> None:
    prefix = policy.embed_conditions(conditions)
    allowed = prefix_allowed(prefix.mask, prefix.mask.shape[1])
    attend = _RecordValues(CausalAttend(policy.rotary[: prefix.mask.shape[1]], allowed))
    hidden = policy.trunk(prefix.embeddings, attend)[:, -1]
    valid = prefix.mask[:, :, None, None]
    sums = torch.stack([(values * valid).sum(1) for values in attend.values])
    states = collapse_prefixes(policy, conditions)
    torch.testing.assert_close(states.last_hidden[states.index], hidden, **TOLERANCE)
    torch.testing.assert_close(states.value_sums[:, states.index], sums, **TOLERANCE)
    assert torch.equal(states.counts[states.index], prefix.mask.sum(1).float())


def test_text_of_mixed_lengths_collapses_exactly(text_policy: LlamaGen) -> None:
    assert_collapse_is_exact(text_policy, text([2, 0, 0, 1]))
    assert_collapse_is_exact(text_policy, text_policy.null_conditions(text([2, 0, 0, 1])))


def test_right_padded_text_collapses_exactly(text_policy: LlamaGen) -> None:
    left = text([2, 0, 0, 1])
    right = TextFeatures(left.features, left.mask.flip(1), left.index)
    assert not bool(right.mask[:, -1].all()), "some last position is padded"
    assert_collapse_is_exact(text_policy, right)
    assert_collapse_is_exact(text_policy, text_policy.null_conditions(right))


def test_labels_collapse_exactly() -> None:
    policy = load_policy(GOLDEN / "llamagen_c2i" / "main.pt", image_size=64, num_heads=2)
    policy.requires_grad_(False)
    labels = torch.arange(30) % 10  # more than one batch of prefixes once doubled by repetition
    assert_collapse_is_exact(policy, labels)
    assert len(collapse_prefixes(policy, labels).counts) == 10
    null = collapse_prefixes(policy, policy.null_conditions(labels))
    assert len(null.counts) == 1, "all null rows of a class-conditional policy share one prefix"


def test_a_prefix_does_not_depend_on_what_else_is_drawn(text_policy: LlamaGen) -> None:
    features = text([2, 0, 0, 1])
    alone = TextFeatures(features.features[1:2], features.mask[1:2])
    together = collapse_prefixes(text_policy, features)
    single = collapse_prefixes(text_policy, alone)
    assert torch.equal(single.value_sums[:, 0], together.value_sums[:, 1])
    assert torch.equal(single.last_hidden[0], together.last_hidden[1])


def test_shared_prompts_draw_as_repeated_ones(text_policy: LlamaGen) -> None:
    index = [2, 0, 0, 1, 2]
    shared = text(index)
    repeated = TextFeatures(shared.features[index], shared.mask[index])
    params = SamplingParams(guidance_scale=4.0)
    engine = RolloutEngine(text_policy, max_slots=8)
    assert_same_draw(engine.draw(shared, params, seed=3), engine.draw(repeated, params, seed=3))


def test_each_prompt_is_computed_once(text_policy: LlamaGen) -> None:
    prompts: list[int] = []
    projection = text_policy.cls_embedding.cap_proj
    hook = projection.register_forward_hook(lambda _, inputs, out: prompts.append(len(out)))
    try:
        RolloutEngine(text_policy, max_slots=8).draw(text([2, 0] * 20), SamplingParams(), seed=3)
    finally:
        hook.remove()
    assert len(prompts) == 1, "40 images of two prompts are one batch of prefixes"


def test_padding_content_changes_no_image(text_policy: LlamaGen) -> None:
    prompts = text([0, 1, 2])
    dirty = prompts.features.masked_fill(~prompts.mask.bool()[:, :, None], 7.0)
    engine = RolloutEngine(text_policy, max_slots=8)
    params = SamplingParams(guidance_scale=4.0)
    assert_same_draw(
        engine.draw(TextFeatures(dirty, prompts.mask), params, seed=3),
        engine.draw(prompts, params, seed=3),
    )


def test_prompts_of_one_length_share_their_unconditional_prefix(text_policy: LlamaGen) -> None:
    prompts = text([0, 1, 2])
    lengths = torch.tensor([1, 3, 1])
    mask = torch.arange(8) >= 8 - lengths[:, None]
    null = text_policy.null_conditions(TextFeatures(prompts.features, mask, prompts.index))
    assert isinstance(null, TextFeatures)
    assert len(null.features) == 2
    assert torch.equal(null.mask[null.rows], mask)


def test_prefixes_are_read_again_only_when_weights_or_conditions_change(
    text_policy: LlamaGen,
) -> None:
    policy, reads = copy.deepcopy(text_policy), []

    def read(_: object, conditions: Conditions) -> PrefixStates:
        reads.append(conditions)
        return collapse_prefixes(policy, conditions)

    memory = PrefixMemory(read)
    first = memory.prefixes(policy, text([0, 1, 0]))
    again = memory.prefixes(policy, text([1, 0]))
    assert len(reads) == 1, "the same two prompts, in another order"
    assert torch.equal(again.value_sums, first.value_sums)
    assert again.index.tolist() == [1, 0]
    memory.prefixes(policy, text([2, 0]))
    assert len(reads) == 2
    with torch.no_grad():
        policy.layers[0].attention.wqkv.weight.mul_(2)
    after = memory.prefixes(policy, text([2, 0]))
    assert len(reads) == 3
    assert torch.equal(after.value_sums, collapse_prefixes(policy, text([2, 0])).value_sums)
