"""LlamaGen against golden numbers, its published sizes, and its borders."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from argrpo.engine.conditions import Conditions, TextFeatures
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy
from argrpo.models.rotary import grid_rotary_table

GOLDEN = Path(__file__).parents[1] / "golden"

# The reference's own fp32 error is at most 1e-5; the rest is for another order of summation.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
# Guidance of 7.5 multiplies the error of a branch by up to 14.
TOLERANCE_CFG_7_5 = {"atol": 1e-3, "rtol": 1e-4}

CLASS_CASES = {
    "main": ("llamagen_c2i/main.pt", "llamagen_c2i/main_expected.safetensors"),
    "small": ("llamagen_c2i/small_bare.pt", "llamagen_c2i/small_expected.safetensors"),
    "head_dim_100": ("llamagen_headdim100/model.pt", "llamagen_headdim100/expected.safetensors"),
}
GREEDY = {
    "greedy_cfg1": (1.0, None),
    "greedy_cfg2": (2.0, None),
    "greedy_cfg4": (4.0, None),
    "greedy_cfg4_interval0": (4.0, 0),
    "greedy_cfg4_interval2": (4.0, 2),
    "greedy_cfg4_interval4": (4.0, 4),
    "greedy_cfg4_interval6": (4.0, 6),
    "greedy_cfg7.5": (7.5, None),
}
# Published name: (dim, layers, heads, ffn, parameters).
PUBLISHED = {
    "B": (768, 12, 12, 2048, "111M"),
    "L": (1024, 24, 16, 2816, "343M"),
    "XL": (1280, 36, 20, 3584, "775M"),
    "XXL": (1536, 48, 24, 4096, "1.4B"),
    "3B": (3200, 24, 32, 8704, "3.1B"),
}


def config(**sizes: object) -> LlamaGenConfig:
    defaults = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "vocab_size": 16}
    return LlamaGenConfig(**{**defaults, "image_size": 48, "num_classes": 10, **sizes})


def null_logits(policy: LlamaGen, conditions: Conditions, token_ids: Tensor) -> Tensor:
    hidden = policy.hidden(policy.null_conditions(conditions), token_ids)
    return F.linear(hidden, policy.head_weight)


@pytest.fixture(scope="module")
def captions() -> tuple[LlamaGen, TextFeatures, dict[str, Tensor]]:
    expected = load_file(GOLDEN / "llamagen_t2i/expected.safetensors")
    policy = load_policy(GOLDEN / "llamagen_t2i/model.pt", image_size=64, num_heads=2)
    return policy, TextFeatures(expected["features"], expected["mask"]), expected


@pytest.mark.parametrize("case", CLASS_CASES)
@torch.no_grad()
def test_class_logits_match_the_reference(case: str) -> None:
    weights, numbers = CLASS_CASES[case]
    policy = load_policy(GOLDEN / weights, image_size=64, num_heads=2)
    expected = load_file(GOLDEN / numbers)
    labels, token_ids = expected["labels"], expected["token_ids"]
    for name, logits in (
        ("cond", policy.logits(labels, token_ids)),
        ("null", null_logits(policy, labels, token_ids)),
        ("cfg2", policy.logits(labels, token_ids, guidance_scale=2.0)),
    ):
        torch.testing.assert_close(
            logits, expected[f"logits_{name}"], **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
        )


@torch.no_grad()
def test_text_logits_match_the_reference(
    captions: tuple[LlamaGen, TextFeatures, dict[str, Tensor]],
) -> None:
    policy, features, expected = captions
    token_ids = expected["token_ids"]
    torch.testing.assert_close(
        policy.logits(features, token_ids), expected["logits_cfg1"], **TOLERANCE
    )
    torch.testing.assert_close(
        null_logits(policy, features, token_ids), expected["logits_null"], **TOLERANCE
    )
    torch.testing.assert_close(
        policy.logits(features, token_ids, guidance_scale=7.5),
        expected["logits_cfg7.5"],
        **TOLERANCE_CFG_7_5,
    )


@pytest.mark.parametrize("case", [*CLASS_CASES, "text"])
def test_greedy_tokens_equal_the_reference(
    case: str, captions: tuple[LlamaGen, TextFeatures, dict[str, Tensor]]
) -> None:
    if case == "text":
        policy, conditions, expected = captions
    else:
        weights, numbers = CLASS_CASES[case]
        policy = load_policy(GOLDEN / weights, image_size=64, num_heads=2)
        expected = load_file(GOLDEN / numbers)
        conditions = expected["labels"]
    engine = RolloutEngine(policy, max_slots=4)
    names = [name for name in GREEDY if name in expected]
    assert len(names) >= 2, "every golden case has greedy draws with guidance and without"
    for name in names:
        scale, interval = GREEDY[name]
        params = SamplingParams(guidance_scale=scale, guidance_interval=interval, temperature=0.0)
        rollout = engine.draw(conditions, params, seed=0)
        # Exactly: the two best logits of any step are at least 6e-3 apart.
        assert torch.equal(rollout.token_ids, expected[name]), name
        assert torch.equal(
            policy.logprobs(conditions, rollout.token_ids, params), rollout.logprobs
        ), name


def test_an_interval_guides_the_tokens_up_to_one_past_it(
    captions: tuple[LlamaGen, TextFeatures, dict[str, Tensor]],
) -> None:
    policy, features, expected = captions
    token_ids = expected["token_ids"]
    guided = policy.logits(features, token_ids, guidance_scale=4.0)
    plain = policy.logits(features, token_ids)
    mixed = policy.logits(features, token_ids, guidance_scale=4.0, guidance_interval=3)
    # The same sums, but for a null branch of other length.
    torch.testing.assert_close(mixed[:, :5], guided[:, :5], **TOLERANCE)
    assert torch.equal(mixed[:, 5:], plain[:, 5:])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(name: str) -> None:
    dim, num_layers, num_heads, ffn_dim, published = PUBLISHED[name]
    with torch.device("meta"):
        policy = LlamaGen(
            LlamaGenConfig(
                dim=dim,
                num_layers=num_layers,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                vocab_size=16384,
                image_size=256,
            )
        )
    count = sum(parameter.numel() for parameter in policy.parameters())
    billions = f"{count / 1e9:.1f}B"
    assert published in (f"{count / 1e6:.0f}M", billions)


def test_the_rotary_table_stays_fp32_and_goes_where_the_weights_go() -> None:
    sizes = config()
    table = grid_rotary_table(sizes.grid_size, sizes.head_dim, prefix_len=1, base=10000.0)
    assert table.shape == (1 + 9, 8, 2)
    assert not table[:1].any(), "the prefix row is zero: the engine collapses the prefix"
    policy = LlamaGen(sizes).bfloat16()
    assert torch.equal(policy.rotary, table)
    assert torch.equal(copy.deepcopy(policy).half().rotary, table)
    with torch.device("meta"):
        blank = LlamaGen(sizes)
    assert blank.rotary.is_meta
    assert torch.equal(blank.to_empty(device="cpu").rotary, table)
    assert blank.to("meta").rotary.is_meta
    assert "rotary" not in "".join(policy.state_dict())


def test_a_copy_shares_no_weights(
    captions: tuple[LlamaGen, TextFeatures, dict[str, Tensor]],
) -> None:
    policy, features, expected = captions
    frozen = copy.deepcopy(policy).requires_grad_(False)
    before = policy.logits(features, expected["token_ids"]).detach()
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.add_(1.0)
    assert torch.equal(policy.logits(features, expected["token_ids"]), before)
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_logprobs_reach_every_parameter() -> None:
    policy = LlamaGen(config())
    labels, token_ids = torch.arange(3), torch.randint(0, 16, (3, 9))
    policy.logprobs(labels, token_ids, SamplingParams(guidance_scale=2.0)).sum().backward()
    idle = [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_logprobs_are_those_of_the_logits() -> None:
    policy = LlamaGen(config()).requires_grad_(False)
    labels, token_ids = torch.arange(3), torch.randint(0, 16, (3, 9))
    params = SamplingParams(guidance_scale=3.0, guidance_interval=2, temperature=0.5)
    logits = policy.logits(labels, token_ids, guidance_scale=3.0, guidance_interval=2)
    expected = (logits / 0.5).log_softmax(-1).gather(2, token_ids[..., None]).squeeze(2)
    torch.testing.assert_close(
        policy.logprobs(labels, token_ids, params), expected, atol=1e-5, rtol=0
    )


def test_shorter_images_score_as_the_start_of_longer_ones() -> None:
    policy = LlamaGen(config()).requires_grad_(False)
    labels, token_ids = torch.arange(3), torch.randint(0, 16, (3, 9))
    whole = policy.logits(labels, token_ids)
    torch.testing.assert_close(policy.logits(labels, token_ids[:, :4]), whole[:, :4], **TOLERANCE)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a divisor of dim .* got 3 heads for dim 32"),
        ({"num_heads": 16}, "num_heads: expected a divisor of dim with a head size divisible by 4"),
        ({"image_size": 50}, "image_size: expected a multiple of downsample 16, got 50"),
        ({"image_size": 0}, "image_size: expected a multiple of downsample 16, got 0"),
        ({"model_type": "i2i"}, "model_type: expected c2i or t2i, got 'i2i'"),
    ],
)
def test_impossible_sizes_are_refused_by_name(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**sizes)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (torch.zeros(2, 10, dtype=torch.int64), r"got torch.int64 \[2, 10\]"),
        (torch.zeros(3, 9, dtype=torch.int64), r"got torch.int64 \[3, 9\]"),
        (torch.zeros(2, 0, dtype=torch.int64), r"got torch.int64 \[2, 0\]"),
        (torch.zeros(2, 9, dtype=torch.int32), r"got torch.int32 \[2, 9\]"),
        (torch.zeros(18, dtype=torch.int64), r"got torch.int64 \[18\]"),
    ],
)
def test_wrong_token_ids_are_refused_by_name(token_ids: Tensor, message: str) -> None:
    policy = LlamaGen(config())
    expected = r"token_ids: expected int64 of shape \[2, 1..9\], " + message
    with pytest.raises(ValueError, match=expected):
        policy.logprobs(torch.zeros(2, dtype=torch.int64), token_ids, SamplingParams())
    with pytest.raises(ValueError, match=expected):
        policy.logits(torch.zeros(2, dtype=torch.int64), token_ids)


def test_checkpointed_layers_give_the_same_gradients_and_keep_less() -> None:
    policy = LlamaGen(config())
    labels, token_ids = torch.arange(3), torch.randint(0, 16, (3, 9))
    gradients, kept_bytes = [], []
    for is_checkpointed in (False, True):
        policy.checkpoints_layers = is_checkpointed
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: (kept.append(tensor.nbytes), tensor)[1],  # type: ignore[misc]
            lambda tensor: tensor,
        ):
            loss = policy.hidden(labels, token_ids).square().sum()
        loss.backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
        kept_bytes.append(sum(kept))
        policy.zero_grad()
    # The same operations on the same numbers, once more.
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
    assert kept_bytes[1] < kept_bytes[0] / 2
