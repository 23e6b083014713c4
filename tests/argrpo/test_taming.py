"""The taming transformer against golden numbers, through the engine, and its borders."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from argrpo.engine.conditions import TextFeatures
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.taming import Taming, TamingConfig
from argrpo.models.taming_files import read_taming_checkpoint, taming_policy
from argrpo.models.taming_project import TamingProject

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("taming_transformer", "taming_net2net")
# The reference's own fp32 error is at most 5e-6; the rest is for another order of summation.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
PUBLISHED_SAMPLING = SamplingParams(top_k=600, top_p=0.92)


def golden_policy(case: str) -> Taming:
    folder = GOLDEN / case
    project = TamingProject(folder / "project.yaml")
    return taming_policy(read_taming_checkpoint(folder / "last.ckpt"), project)


@pytest.fixture(scope="module", params=CASES)
def loaded(request: pytest.FixtureRequest) -> tuple[Taming, dict[str, Tensor]]:
    policy = golden_policy(request.param).requires_grad_(False)
    return policy, load_file(GOLDEN / request.param / "expected.safetensors")


@pytest.fixture(scope="module")
def policy() -> Taming:
    """Logits of a few units, 36 tokens: more than one page of 16."""
    torch.manual_seed(5)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 700, "image_size": 96}
    made = Taming(TamingConfig(**sizes, num_classes=10, num_positions=36))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.normal_(std=0.3 if weight.dim() > 1 else 0.1)
            if name.endswith(("ln1.weight", "ln2.weight", "ln_f.weight")):
                weight.add_(1)
    return made.requires_grad_(False)


def test_logits_are_those_of_taming(loaded: tuple[Taming, dict[str, Tensor]]) -> None:
    policy, expected = loaded
    logits = policy.logits(expected["classes"], expected["token_ids"])
    torch.testing.assert_close(logits, expected["logits"], **TOLERANCE)


@pytest.mark.parametrize("replayed", [False, True], ids=["pages", "replayed"])
def test_the_engine_draws_the_greedy_tokens_of_taming(
    loaded: tuple[Taming, dict[str, Tensor]], replayed: bool, request: pytest.FixtureRequest
) -> None:
    if replayed:
        request.getfixturevalue("replayed_steps")
    policy, expected = loaded
    engine = RolloutEngine(policy, max_slots=3, page_size=16)
    rollout = engine.draw(expected["classes"], SamplingParams(temperature=0), seed=0)
    assert torch.equal(rollout.token_ids, expected["greedy"])
    engine.check()


@pytest.mark.parametrize("replayed", [False, True], ids=["pages", "replayed"])
def test_what_is_drawn_by_the_published_filters_is_scored_as_it_was_drawn(
    policy: Taming, replayed: bool, request: pytest.FixtureRequest
) -> None:
    if replayed:
        request.getfixturevalue("replayed_steps")
    labels = torch.tensor([3, 9, 3, 0, 5, 5, 1])
    engine = RolloutEngine(policy, max_slots=4, page_size=16)
    rollout = engine.draw(labels, PUBLISHED_SAMPLING, seed=7, support=True)
    again = policy.logprobs(labels, rollout.token_ids, PUBLISHED_SAMPLING, rollout.support)
    # Attention sums page by page in one and in one piece in the other, in fp32.
    torch.testing.assert_close(again, rollout.logprobs, atol=1e-4, rtol=0)
    whole = policy.logprobs(labels, rollout.token_ids, SamplingParams())
    assert (rollout.logprobs > whole + 1e-3).float().mean() > 0.9, "the filters keep less than all"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_captured_step_draws_what_it_scores(dtype: torch.dtype, policy: Taming) -> None:
    moved, labels = copy.deepcopy(policy).to("cuda", dtype), torch.arange(12) % 10
    rollout = RolloutEngine(moved, max_slots=8).draw(
        labels, PUBLISHED_SAMPLING, seed=3, support=True
    )
    again = moved.logprobs(labels.cuda(), rollout.token_ids, PUBLISHED_SAMPLING, rollout.support)
    # Logits of a few units: fp32 sums in another order; bf16 rounds to 2^-8 of its size, layer by
    # layer, and both ways of attending differ by as much.
    bound = {torch.float32: 1e-3, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(again, rollout.logprobs, atol=bound, rtol=0)


def test_slots_refilled_in_cohorts_draw_what_one_wave_draws(policy: Taming) -> None:
    labels = torch.arange(30) % 10
    # Keys and values of 16 positions in 2 layers, 2 heads of 16 numbers: 8 KiB a page, 3 an image.
    few = RolloutEngine(policy, max_slots=8, page_size=16, kv_bytes=12 * 8192)
    many = RolloutEngine(policy, max_slots=30, page_size=16)
    assert few.num_slots < 30
    one, other = (engine.draw(labels, PUBLISHED_SAMPLING, seed=1) for engine in (few, many))
    assert torch.equal(one.token_ids, other.token_ids)
    few.check()
    assert few.num_held_pages == 0


def test_weights_are_read_in_place_learned_places_included(policy: Taming) -> None:
    moved = copy.deepcopy(policy)
    engine, labels = RolloutEngine(moved, max_slots=4, page_size=16), torch.tensor([1, 2])
    before = engine.draw(labels, SamplingParams(), seed=0)
    moved.pos_emb.mul_(0.2)
    after = engine.draw(labels, SamplingParams(), seed=0)
    assert not torch.equal(before.token_ids, after.token_ids)
    fresh = RolloutEngine(moved, max_slots=4, page_size=16).draw(labels, SamplingParams(), seed=0)
    assert torch.equal(after.token_ids, fresh.token_ids)


def test_every_weight_gets_a_gradient_and_checkpointing_changes_no_bit(policy: Taming) -> None:
    labels, token_ids = torch.tensor([2, 7]), torch.randint(0, 700, (2, 36))
    gradients = []
    for checkpoints in (False, True):
        trained = copy.deepcopy(policy).requires_grad_(True)
        trained.checkpoints_layers = checkpoints
        trained.logprobs(labels, token_ids, SamplingParams()).sum().backward()
        gradients.append({name: weight.grad for name, weight in trained.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_plain_pytorch_transformer_says_the_same(policy: Taming) -> None:
    """Written from the paper's formula, without a cache, a kernel or a packed product."""
    label, token_ids = torch.tensor([4]), torch.randint(0, 700, (1, 36))
    x = policy.tok_emb(torch.cat([label[:, None], token_ids[:, :-1]], dim=1)) + policy.pos_emb
    for block in policy.blocks:
        normed = F.layer_norm(x, (32,), block.ln1.weight, block.ln1.bias)
        q, k, v = (
            part.view(36, 2, 16).transpose(0, 1) for part in block.attn.qkv(normed)[0].chunk(3, -1)
        )
        scores = (q @ k.mT / 4).masked_fill(torch.ones(36, 36).triu(1).bool(), -torch.inf)
        x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(1, 36, 32))
        normed = F.layer_norm(x, (32,), block.ln2.weight, block.ln2.bias)
        up, down = block.mlp.children()
        x = x + down(F.gelu(up(normed)))
    logits = F.layer_norm(x, (32,), policy.ln_f.weight, policy.ln_f.bias) @ policy.head.weight.T
    # fp32 in another order.
    torch.testing.assert_close(policy.logits(label, token_ids), logits, **TOLERANCE)


@pytest.mark.parametrize("ask", ["logits", "draw"])
def test_guidance_is_refused_because_there_is_no_null_class(ask: str, policy: Taming) -> None:
    labels, token_ids = torch.tensor([1]), torch.zeros(1, 36, dtype=torch.int64)
    asked: dict[str, Callable[[], object]] = {
        "logits": lambda: policy.logits(labels, token_ids, guidance_scale=2.0),
        "draw": lambda: RolloutEngine(policy, max_slots=2).draw(
            labels, SamplingParams(guidance_scale=2.0), seed=0
        ),
    }
    with pytest.raises(ValueError, match="guidance_scale: expected 1, because a taming policy was"):
        asked[ask]()


def test_conditions_that_are_no_class_are_refused(policy: Taming) -> None:
    with pytest.raises(ValueError, match="labels: expected 0 to 9, got 10"):
        policy.check_conditions(torch.tensor([10]))
    with pytest.raises(ValueError, match="conditions: expected class labels"):
        policy.check_conditions(TextFeatures(torch.zeros(1, 2, 3), torch.ones(1, 2)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a divisor of dim"),
        ({"num_heads": 32}, "num_heads: expected a divisor of dim with an even head size"),
        ({"image_size": 90}, "image_size: expected a multiple of downsample 16"),
        ({"num_positions": 35}, "image_size: expected at most 35 tokens"),
        ({"num_classes": 701}, "num_classes: expected 1 to 700"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int], message: str) -> None:
    known = {"dim": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 700, "image_size": 96}
    with pytest.raises(ValueError, match=message):
        TamingConfig(**{**known, **sizes})


def test_the_published_sizes_are_1_4_billion_weights() -> None:
    """The README of taming-transformers says 1.4B; f16, 16,384 codes, 256 positions."""
    config = TamingConfig(dim=1536, num_layers=48, num_heads=24, vocab_size=16384, image_size=256)
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Taming(config).parameters())
    assert f"{count / 1e9:.1f}" == "1.4"
