"""A whole draw through the kernels: the tokens are those of the references, step by step.

Without a GPU the kernels run in Triton's interpreter; the references run in the same process with
every op told to take them.
"""

import pkgutil
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

import argrpo.kernels
from argrpo.engine.conditions import TextFeatures
from argrpo.engine.device_queue import DeviceQueue
from argrpo.engine.rollout import Rollout
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.taming import Taming, TamingConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LABELS = torch.tensor([0, 3, 3, 1])
PARAMS = {
    "plain": SamplingParams(temperature=0.9),
    "filtered": SamplingParams(guidance_scale=2.0, top_k=40, top_p=0.9),
    "interval": SamplingParams(guidance_scale=2.0, guidance_interval=10),
}
TAMING_SIZES = {
    **{"dim": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 96},
    **{"image_size": 64, "num_classes": 4, "num_positions": 16},
}


def model(dtype: torch.dtype, model_type: str = "c2i") -> ImagePolicy:
    """One layer, 25 tokens (2 pages of 16), 96 codes."""
    if model_type == "taming":
        return uneven(Taming(TamingConfig(**TAMING_SIZES)), dtype)
    text = {"model_type": "t2i", "caption_dim": 8, "prefix_len": 6} if model_type == "t2i" else {}
    config = LlamaGenConfig(
        dim=64,
        num_layers=1,
        num_heads=2,
        ffn_dim=64,
        vocab_size=96,
        image_size=80,
        num_classes=4,
        **text,
    )
    return uneven(LlamaGen(config), dtype)


def uneven(policy: LlamaGen | Taming, dtype: torch.dtype) -> ImagePolicy:
    for parameter in policy.requires_grad_(False).parameters():
        parameter.mul_(6.0)  # from 0.02 to 0.12, which makes attention and logits uneven
    if isinstance(policy, Taming):
        policy.pos_emb.normal_(std=0.1)  # zeros until they are learned
    return policy.to(device=DEVICE, dtype=dtype)


def drawn(
    policy: ImagePolicy, conditions: Tensor | TextFeatures, params: SamplingParams
) -> Rollout:
    engine = RolloutEngine(policy, max_slots=4, page_size=16, paged=True)
    rollout = engine.draw(
        conditions,
        params,
        seed=5,
        cond_logprobs=params.temperature > 0,
        support=True,
    )
    engine.check()
    return rollout


def use_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps as they are: references read numbers on the host, which a capture refuses."""
    monkeypatch.setattr(DeviceQueue, "captured", lambda queue, step: step)
    for found in pkgutil.iter_modules(argrpo.kernels.__path__):
        module = import_module(f"argrpo.kernels.{found.name}")
        if hasattr(module, "uses_triton"):
            monkeypatch.setattr(module, "uses_triton", lambda tensor: False)


def assert_same_draw(got: Rollout, expected: Rollout) -> None:
    """Equal tokens; scores but for fp32 rounding of logits of size 10."""
    assert torch.equal(got.token_ids, expected.token_ids)
    for field in ("logprobs", "entropies", "cond_logprobs"):
        one, other = getattr(got, field), getattr(expected, field)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert (got.support is None) == (expected.support is None)
    if got.support is not None:
        assert torch.equal(got.support, expected.support)


@pytest.mark.parametrize("name", PARAMS)
def test_the_engine_on_kernels_draws_the_tokens_of_the_references(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = model(torch.float32)
    got = drawn(policy, LABELS, PARAMS[name])
    use_references(monkeypatch)
    assert_same_draw(got, drawn(policy, LABELS, PARAMS[name]))


def test_text_prompts_of_mixed_lengths_are_collapsed_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = model(torch.float32, "t2i")
    mask = torch.arange(6) >= torch.tensor([[0], [3], [5]])
    features = torch.randn(3, 6, 8)
    conditions = TextFeatures(features, mask, torch.tensor([2, 0, 1, 1]))
    got = drawn(policy, conditions, PARAMS["interval"])
    use_references(monkeypatch)
    assert_same_draw(got, drawn(policy, conditions, PARAMS["interval"]))


def test_a_policy_with_learned_places_and_ordinary_prefix_keys_is_drawn_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 tokens after a class are 17 entries: two pages."""
    policy, params = model(torch.float32, "taming"), SamplingParams(top_k=40, top_p=0.9)
    got = drawn(policy, LABELS, params)
    use_references(monkeypatch)
    assert_same_draw(got, drawn(policy, LABELS, params))


class _NoHostReads(TorchDispatchMode):
    """Refuses what would make the host wait for a value of the device."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = str(func.overloadpacket).removeprefix("aten.")
        assert name not in _HOST_READS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


_HOST_READS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal"}


@pytest.mark.parametrize("kind", ["plain", "filtered", "interval", "text", "cohorts"])
def test_once_it_is_asked_for_a_draw_never_waits_for_the_device(kind: str) -> None:
    """Images that refill their slots included: what the host does is known beforehand."""
    conditions: Tensor | TextFeatures = LABELS.repeat(2)
    policy = model(torch.float32, "t2i" if kind == "text" else "c2i")
    if kind == "text":
        mask = torch.arange(6) >= torch.tensor([[0], [3], [5]])
        index = torch.tensor([2, 0, 1, 1, 0, 0, 2, 1])
        conditions = TextFeatures(torch.randn(3, 6, 8), mask, index)
    # 2 pages an image and branch: 12 hold 3 guided images at full length, or 4 in two cohorts.
    kv_bytes = 12 * 2 * 2 * 16 * 32 * 4 if kind == "cohorts" else None
    engine = RolloutEngine(policy, max_slots=4, page_size=16, kv_bytes=kv_bytes, paged=True)
    assert ("2 groups of 2" in engine.describe()) == (kind == "cohorts")
    params = PARAMS.get(kind, SamplingParams(guidance_scale=2.0))
    parts = engine.draw_iter(conditions, params, seed=5, support=True)
    with _NoHostReads():
        assert sum(len(part) for part in parts) == 8
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), _NoHostReads():
        torch.ones(1).item()


@pytest.mark.gpu  # the interpreter cuts bf16 where a GPU rounds, and the bias adds up
def test_half_precision_draws_score_as_well_as_the_references_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens may part at any rounding, so what is compared is how far draw and score differ."""
    policy, params = model(torch.bfloat16), SamplingParams(guidance_scale=2.0)

    def mean_deviation() -> Tensor:
        rollout = drawn(policy, LABELS, params)
        again = policy.logprobs(LABELS.to(DEVICE), rollout.token_ids, params)
        assert torch.isfinite(rollout.logprobs).all()
        return (again - rollout.logprobs).abs().mean()

    kernels = mean_deviation()
    use_references(monkeypatch)
    assert kernels < 1.5 * mean_deviation()
