"""The loss algebra: golden numbers of AR-GRPO's trainer, micro-batches, masks, refusals.

Over 300 lines because every test is about one formula and its terms.
"""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo.loss_batch import LossBatch, LossScale
from argrpo.objective_config import ObjectiveConfig
from argrpo.objectives import PolicyLoss, fixed_scales, has_fixed_scales, policy_loss

# From the golden case: plain elementwise algebra, no ratio within 1e-6 of a clip corner.
TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 1e-7},
}
# The reference divides counts by token counts in fp32.
CLIP_ATOL = 1e-6
# Scales are rounded to fp32 once, and so is each of the two products behind them.
FP32_SCALES: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9}
# The same sums in another order, fp64.
REORDERED: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}

CASE = json.loads((Path(__file__).parents[1] / "golden/grpo_loss/case.json").read_text())
KEYS = sorted(CASE["expected_scalars"])
PATTERN = re.compile(
    r"(?P<loss_type>\w+)-beta(?P<beta>[\d.]+)-old_(?P<old>same|given)-mask_(?P<mask>full|ragged)"
    r"(-eps_high(?P<epsilon_high>[\d.]+))?(-delta(?P<delta>[\d.]+))?"
)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(Path(__file__).parents[1] / "golden/grpo_loss/expected.safetensors")


def loss_of(batch: dict[str, Any]) -> PolicyLoss:
    """`policy_loss` of everything that shapes it, by name."""
    constants = {
        name: value
        for name, value in batch.items()
        if name not in ("logprobs", "entropies", "config")
    }
    return policy_loss(
        batch["logprobs"], batch.get("entropies"), LossBatch(**constants), batch["config"]
    )


def golden_batch(key: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    match = PATTERN.fullmatch(key)
    assert match is not None, key
    said = match.groupdict()
    mask = tensors[f"mask_{said['mask']}"].bool()
    return {
        "logprobs": tensors["logps"].to(dtype, copy=True).requires_grad_(),
        "advantages": tensors["advantages"].to(dtype),
        "config": ObjectiveConfig(
            loss_type=said["loss_type"],  # type: ignore[arg-type]
            beta=float(said["beta"]),
            epsilon_high=None if said["epsilon_high"] is None else float(said["epsilon_high"]),
            delta=None if said["delta"] is None else float(said["delta"]),
        ),
        "scale": LossScale(
            num_rows=len(mask),
            num_tokens=int(mask.sum()),
            max_tokens=CASE["config"]["max_completion_length_for_dr_grpo"],
        ),
        "old_logprobs": None if said["old"] == "same" else tensors["old_logps"].to(dtype),
        "ref_logprobs": tensors["ref_logps"].to(dtype),
        "mask": None if said["mask"] == "full" else mask,
    }


def random_batch(config: ObjectiveConfig, *, ragged: bool = True) -> dict[str, Any]:
    torch.manual_seed(3)
    num_rows, num_tokens = 7, 9
    logprobs = -torch.rand(num_rows, num_tokens, dtype=torch.float64) * 3
    lengths = torch.tensor([9, 1, 4, 0, 9, 7, 3])
    mask = torch.arange(num_tokens) < lengths[:, None]
    return {
        "logprobs": logprobs.clone().requires_grad_(),
        "advantages": torch.randn(num_rows, dtype=torch.float64),
        "config": config,
        "scale": LossScale(num_rows, int(mask.sum()) if ragged else mask.numel(), num_tokens),
        "old_logprobs": logprobs + 0.3 * torch.randn_like(logprobs),
        "ref_logprobs": logprobs + 0.3 * torch.randn_like(logprobs),
        "entropies": torch.rand_like(logprobs).requires_grad_(),
        "mask": mask if ragged else None,
    }


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_loss_gradient_and_statistics_are_the_golden_ones(
    key: str, dtype: torch.dtype, tensors: dict[str, Tensor]
) -> None:
    batch, want = golden_batch(key, tensors, dtype), CASE["expected_scalars"][key]
    result = loss_of(batch)
    result.loss.backward()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        result.loss,
        torch.tensor(want["loss"], dtype=dtype),
        msg=lambda m: f"loss: {m}",
        **tolerance,
    )
    torch.testing.assert_close(
        batch["logprobs"].grad,
        tensors[f"{key}.grad"].to(dtype),
        msg=lambda m: f"grad: {m}",
        **tolerance,
    )
    got = result.metrics.named()
    for name in ("low_mean", "high_mean", "region_mean"):
        name = f"clip_ratio/{name}"
        assert got[name] == pytest.approx(want[name], abs=CLIP_ATOL), name
    if "kl" in want:
        assert got["kl"] == pytest.approx(want["kl"], rel=tolerance["rtol"])
    if batch["mask"] is None:  # the reference averages the ratio over masked tokens too
        assert got["ratio_mean"] == pytest.approx(want["ratio_mean"], rel=tolerance["rtol"])


@pytest.mark.parametrize("key", [key for key in KEYS if key.startswith("grpo") and "full" in key])
def test_each_token_alone_has_the_golden_loss(key: str, tensors: dict[str, Tensor]) -> None:
    batch, want = golden_batch(key, tensors, torch.float64), tensors[f"{key}.per_token_loss"]
    for row, column in itertools.product(*map(range, want.shape)):
        alone = batch | {"scale": LossScale(1, 1, 1), "mask": None}
        for name in ("logprobs", "old_logprobs", "ref_logprobs"):
            if alone[name] is not None:
                alone[name] = alone[name][row, column].reshape(1, 1)
        alone["advantages"] = batch["advantages"][row : row + 1]
        loss = loss_of(alone).loss
        torch.testing.assert_close(loss, want[row, column], **TOLERANCES[torch.float64])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("ragged", [True, False])
def test_micro_batches_add_up_to_the_whole_step(loss_type: Any, level: Any, ragged: bool) -> None:
    config = ObjectiveConfig(
        loss_type=loss_type, importance_sampling_level=level, beta=0.3, entropy_coef=0.02, delta=1.3
    )
    whole = random_batch(config, ragged=ragged)
    want = loss_of(whole)
    want.loss.backward()

    parts = random_batch(config, ragged=ragged)
    metrics, total = None, 0.0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 7)):  # row 3 has no token
        micro: dict[str, Any] = {
            name: value[rows] if isinstance(value, Tensor) else value
            for name, value in parts.items()
        }
        result = loss_of(micro)
        result.loss.backward()
        total += result.loss.item()
        metrics = result.metrics if metrics is None else metrics.merged(result.metrics)

    assert total == pytest.approx(want.loss.item(), rel=REORDERED["rtol"])
    for name in ("logprobs", "entropies"):
        torch.testing.assert_close(parts[name].grad, whole[name].grad, **REORDERED)
        assert whole[name].grad.abs().sum() > 0, name
    assert metrics is not None
    assert metrics.named() == pytest.approx(want.metrics.named(), rel=REORDERED["rtol"])


def test_grpo_bnpo_and_dapo_are_one_mean_on_images_of_one_length() -> None:
    configs = [ObjectiveConfig(loss_type=name) for name in ("grpo", "bnpo", "dapo")]
    even, ragged = (
        [loss_of(random_batch(config, ragged=ragged)).loss.item() for config in configs]
        for ragged in (False, True)
    )
    assert even == pytest.approx(even[:1] * 3, rel=REORDERED["rtol"])
    assert ragged[1] == ragged[2]
    assert abs(ragged[0] - ragged[1]) > 1e-3, "ragged rows tell grpo from bnpo"


def test_on_policy_gradient_is_the_published_formula() -> None:
    beta = 0.1
    batch = random_batch(ObjectiveConfig(beta=beta), ragged=False) | {"old_logprobs": None}
    loss_of(batch).loss.backward()
    logprobs, ref = batch["logprobs"].detach(), batch["ref_logprobs"]
    pull = beta * (1 - (ref - logprobs).exp())
    want = (pull - batch["advantages"][:, None]) / logprobs.numel()
    torch.testing.assert_close(batch["logprobs"].grad, want, **REORDERED)


def test_old_and_reference_logprobs_are_constants() -> None:
    batch = random_batch(ObjectiveConfig())
    frozen = {name: batch[name].requires_grad_() for name in ("old_logprobs", "ref_logprobs")}
    loss_of(batch).loss.backward()
    assert [values.grad for values in frozen.values()] == [None, None]

    forgot_detach = batch | {"old_logprobs": batch["logprobs"]}
    on_policy = batch | {"old_logprobs": None}
    grads = [
        torch.autograd.grad(loss_of(either).loss, either["logprobs"])[0]
        for either in (forgot_detach, on_policy)
    ]
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


def test_a_sequence_has_one_ratio_and_is_clipped_as_a_whole() -> None:
    # Mean log-ratios 0.1, 0.5 (clipped, gain), 0.5 (not clipped, loss), -0.5 (clipped, loss).
    means = torch.tensor([0.1, 0.5, 0.5, -0.5], dtype=torch.float64)
    advantages = torch.tensor([2.0, 1.0, -1.0, -3.0], dtype=torch.float64)
    wobble = torch.tensor([-0.4, 0.0, 0.4], dtype=torch.float64)
    logprobs = (means[:, None] + wobble - 2).requires_grad_()
    old = torch.full_like(logprobs, -2)
    result = policy_loss(
        logprobs,
        None,
        LossBatch(advantages, LossScale(4, 12, 3), old_logprobs=old),
        ObjectiveConfig(beta=0.0, importance_sampling_level="sequence"),
    )
    result.loss.backward()
    ratios = means.exp()
    gains = [2 * ratios[0].item(), 1.2, -ratios[2].item(), -3 * 0.8]
    assert result.loss.item() == pytest.approx(-sum(gains) / 4, rel=REORDERED["rtol"])
    unclipped = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    want = -(unclipped * advantages * ratios / 12)[:, None].expand(4, 3)
    torch.testing.assert_close(logprobs.grad, want, **REORDERED)
    named = result.metrics.named()
    assert (named["clip_ratio/low_mean"], named["clip_ratio/high_mean"]) == (0.25, 0.25)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_stands_under_the_mask_never_matters(level: Any) -> None:
    config = ObjectiveConfig(importance_sampling_level=level, entropy_coef=0.1)
    clean, dirty = random_batch(config), random_batch(config)
    for name in ("logprobs", "old_logprobs", "ref_logprobs", "entropies"):
        bad = torch.where(dirty["mask"], dirty[name].detach(), torch.nan)
        bad[3, 0] = -torch.inf
        dirty[name] = bad.requires_grad_(dirty[name].requires_grad)
    results = [loss_of(batch) for batch in (clean, dirty)]
    for result in results:
        result.loss.backward()
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(clean["logprobs"].grad, dirty["logprobs"].grad)
    assert torch.equal(clean["entropies"].grad, dirty["entropies"].grad)
    assert results[0].metrics.named() == results[1].metrics.named()


def test_entropy_is_rewarded_only_when_asked_and_costs_no_gradient_otherwise() -> None:
    batch = random_batch(ObjectiveConfig(entropy_coef=0.5), ragged=False)
    loss_of(batch).loss.backward()
    want = torch.full_like(batch["entropies"], -0.5 / batch["entropies"].numel())
    torch.testing.assert_close(batch["entropies"].grad, want, **REORDERED)

    measured = random_batch(ObjectiveConfig())
    result = loss_of(measured)
    result.loss.backward()
    assert measured["entropies"].grad is None
    mean = measured["entropies"][measured["mask"]].mean().item()
    assert result.metrics.named()["entropy/policy"] == pytest.approx(mean, rel=REORDERED["rtol"])


def test_a_reference_is_measured_but_does_not_pull_at_beta_0() -> None:
    batch = random_batch(ObjectiveConfig(beta=0.0))
    with_reference = loss_of(batch)
    without = loss_of(batch | {"ref_logprobs": None, "entropies": None})
    assert torch.equal(with_reference.loss, without.loss)
    assert with_reference.metrics.named()["kl"] > 0
    assert not {"kl", "entropy/policy"} & without.metrics.named().keys()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logprobs", torch.zeros(7), r"logprobs: expected shape \[\*, \*\]"),
        ("logprobs", torch.zeros(7, 9).half(), "logprobs: expected float32 or float64"),
        ("advantages", torch.zeros(9).double(), r"advantages: expected shape \[7\]"),
        ("old_logprobs", torch.zeros(7, 8).double(), r"old_logprobs: expected shape \[7, 9\]"),
        ("ref_logprobs", torch.zeros(7, 9), "ref_logprobs: expected float64, got float32"),
        ("ref_logprobs", None, r"ref_logprobs: expected \[N, T\] since beta is 0.1, got None"),
        ("entropies", None, r"entropies: expected \[N, T\] since entropy counts, got None"),
        ("mask", torch.ones(7, 9), "mask: expected bool, got float32"),
    ],
)
def test_a_wrong_input_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(random_batch(ObjectiveConfig(entropy_coef=0.1)) | {name: value})


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_scales_known_beforehand_are_the_gradient_on_policy(loss_type: Any, level: Any) -> None:
    config = ObjectiveConfig(loss_type=loss_type, importance_sampling_level=level, entropy_coef=0.1)
    batch = random_batch(config) | {"old_logprobs": None}
    columns = torch.stack([batch["advantages"], -2 * batch["advantages"] + 1], dim=1)
    for advantages in (batch["advantages"], columns):
        # The scales are fp32, as the kernel takes them.
        constants = LossBatch(
            advantages.float(), batch["scale"], batch["mask"], ref_logprobs=batch["ref_logprobs"]
        )
        assert has_fixed_scales(constants, config)
        scales = fixed_scales(constants, config, num_tokens=9)
        loss = loss_of(batch | {"advantages": advantages}).loss
        wanted = torch.autograd.grad(loss, (batch["logprobs"], batch["entropies"]))
        got = scales.of_logprobs(batch["logprobs"].detach().flatten()), scales.entropies
        for want, have in zip(wanted, got, strict=True):
            assert have is not None
            assert want.abs().sum() > 0
            torch.testing.assert_close(have, want.flatten(), check_dtype=False, **FP32_SCALES)


def test_scales_are_not_known_beforehand_where_they_depend_on_other_tokens_or_on_the_draw() -> None:
    batch = LossBatch(torch.zeros(2), LossScale(2, 6, 3))
    assert has_fixed_scales(batch, ObjectiveConfig(beta=0.0, kl_level="sequence"))
    assert not has_fixed_scales(batch, ObjectiveConfig(kl_level="sequence"))
    assert not has_fixed_scales(batch, ObjectiveConfig(importance_sampling_cap=2.0))
    old = LossBatch(torch.zeros(2), LossScale(2, 6, 3), old_logprobs=torch.zeros(2, 3))
    assert not has_fixed_scales(old, ObjectiveConfig())
    with pytest.raises(ValueError, match=r"ref_logprobs: expected \[N, T\] since beta is 0.1"):
        fixed_scales(batch, ObjectiveConfig(), num_tokens=3)


def test_components_are_clipped_apart_by_their_own_signs() -> None:
    # Ratio 1.5: a gain is clipped at 1.2, a loss is not; their sum alone would be a gain.
    logprobs = torch.tensor([[math.log(1.5)]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    constants = {"old_logprobs": torch.zeros(1, 1, dtype=torch.float64)}
    config, scale = ObjectiveConfig(beta=0.0), LossScale(1, 1, 1)
    apart = policy_loss(logprobs, None, LossBatch(advantages, scale, **constants), config)
    assert apart.loss.item() == pytest.approx(-3 * 1.2 + 1.5)
    apart.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(1.5)  # of the loss of 1 alone
    assert apart.metrics.named()["clip_ratio/high_mean"] == 0.5
    summed = LossBatch(advantages.sum(dim=1), scale, **constants)
    assert policy_loss(logprobs, None, summed, config).loss.item() == pytest.approx(-2 * 1.2)


def test_a_capped_weight_corrects_a_draw_in_another_precision() -> None:
    config = ObjectiveConfig(beta=0.0, importance_sampling_cap=1.1)
    # The sampler gave the tokens 1/2 and 1/1.05 of the policy's probability: weights 1.1 and 1.05.
    logprobs = torch.full((1, 2), -3.0, dtype=torch.float64, requires_grad=True)
    drawn = logprobs.detach() - torch.tensor([[2.0, 1.05]], dtype=torch.float64).log()
    advantages = torch.tensor([2.0], dtype=torch.float64)
    batch = LossBatch(advantages, LossScale(1, 2, 2), draw_logprobs=drawn)
    loss = policy_loss(logprobs, None, batch, config).loss
    loss.backward()
    want = torch.tensor([[-1.1, -1.05]], dtype=torch.float64)  # -w A / T
    torch.testing.assert_close(logprobs.grad, want, **REORDERED)
    assert loss.item() == pytest.approx(want.sum().item())
    with pytest.raises(ValueError, match=r"draw_logprobs: expected .* importance_sampling_cap is"):
        policy_loss(logprobs, None, LossBatch(advantages, LossScale(1, 2, 2)), config)


def test_a_scale_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="scale: expected at least 1 row"):
        LossScale(num_rows=0, num_tokens=0, max_tokens=1)
