"""The sequence-level loss of LOO-FID: golden numbers, as released and with the usual clip."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo.loss_batch import LossBatch, LossScale
from argrpo.objective_config import ObjectiveConfig
from argrpo.objectives import policy_loss

GOLDEN = Path(__file__).parents[1] / "golden/loofid_recipe"
CASE = json.loads((GOLDEN / "case.json").read_text())
# From the golden case: all fp64.
TOLERANCE: dict[str, Any] = {
    name: CASE["tolerance"]["loss, gradients"][name] for name in ("rtol", "atol")
}
FID_WEIGHT = 2.0  # a constant of the released loss


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "sequence_loss.safetensors")


def by_image(values: Tensor) -> Tensor:
    """[G, B, ...] as the reference stacks completions -> [B * G, ...], group by group."""
    return values.transpose(0, 1).flatten(0, 1)


@pytest.mark.parametrize("name", ["full", "no_kl", "no_fid", "eos_mask"])
@pytest.mark.parametrize("form", ["released", "usual_clip"])
def test_loss_and_gradient_are_the_golden_ones(
    form: str, name: str, tensors: dict[str, Tensor]
) -> None:
    want = CASE["expected_scalars"][f"{form}.{name}"]
    sizes = CASE["config"]["sequence"]
    token_ids = tensors["token_ids"].flatten(0, 1)[..., None]

    def scored(logits: Tensor) -> Tensor:
        return by_image(logits).log_softmax(-1).gather(-1, token_ids).squeeze(-1)

    logits = tensors["logits"].clone().requires_grad_()
    log_probs = by_image(logits).log_softmax(-1)
    columns = [tensors[f"{name}.adv_comp"].flatten()]
    if want["fid"]:
        columns.append(FID_WEIGHT * tensors[f"{name}.adv_fid"].flatten())
    mask = tensors[f"{name}.mask"].flatten(0, 1).bool()
    coefficients = [index["entropy_coefficient"] for index in want["per_completion_index"]]
    num_images = sizes["B"] * sizes["G"]
    batch = LossBatch(
        torch.stack(columns, dim=1),
        LossScale(num_images, int(mask.sum()), sizes["T"], summed=sizes["G"]),
        mask=mask,
        old_logprobs=scored(tensors["old_logits"]),
        ref_logprobs=scored(tensors["reference_logits"]),
        entropy_coef=torch.tensor(coefficients, dtype=torch.float64).repeat(sizes["B"]),
    )
    config = ObjectiveConfig(
        beta=want["beta"],
        epsilon=sizes["eps"],
        importance_sampling_level="sequence",
        kl_level="sequence",
        clip_components=True,
    )
    result = policy_loss(
        log_probs.gather(-1, token_ids).squeeze(-1),
        -(log_probs.exp() * log_probs).sum(-1),
        batch,
        config,
        reversed_clip=form == "released",
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(want["loss"], rel=TOLERANCE["rtol"])
    torch.testing.assert_close(logits.grad, tensors[f"{form}.{name}.grad"], **TOLERANCE)


def test_the_two_clips_agree_inside_the_range_and_differ_outside() -> None:
    advantages = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    ratios = torch.tensor([[1.1], [1.5], [0.5]], dtype=torch.float64)
    config, old = ObjectiveConfig(beta=0.0), torch.zeros(3, 1, dtype=torch.float64)
    gradients, stopped = [], []
    for is_reversed in (False, True):
        logprobs = ratios.log().requires_grad_()
        batch = LossBatch(advantages, LossScale(3, 3, 1), old_logprobs=old)
        result = policy_loss(logprobs, None, batch, config, reversed_clip=is_reversed)
        result.loss.backward()
        named = result.metrics.named()
        stopped.append((named["clip_ratio/low_mean"], named["clip_ratio/high_mean"]))
        assert logprobs.grad is not None
        gradients.append(logprobs.grad.flatten().tolist())
    assert gradients[0] == pytest.approx([-1.1 / 3, 0.0, 0.0])
    assert gradients[1] == pytest.approx([-1.1 / 3, -1.5 / 3, 0.5 / 3])
    # What is logged as clipped is what has no gradient: two of three, and none.
    assert stopped == [pytest.approx((1 / 3, 1 / 3)), (0.0, 0.0)]
