"""The model that the KL is measured to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from argrpo.learner_config import ReferenceConfig
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.reference import Reference


def make_policy() -> LlamaGen:
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "vocab_size": 24}
    return LlamaGen(LlamaGenConfig(**sizes, image_size=48, num_classes=10))


def hidden(policy: LlamaGen, device: str = "cpu") -> Tensor:
    labels = torch.arange(2, device=device)
    with torch.no_grad():
        return policy.hidden(labels, torch.zeros(2, 9, dtype=torch.int64, device=device))


@pytest.mark.parametrize("device", ["policy", "cpu"])
def test_the_reference_stays_while_the_policy_moves(device: Any) -> None:
    policy = make_policy()
    reference, before = Reference(policy, ReferenceConfig(device=device)), hidden(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    reference.after_step(1, policy)
    with reference.on_device() as model:
        assert torch.equal(hidden(model), before)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_reference_follows_after_every_so_many_steps_and_keeps_its_own_memory() -> None:
    policy = make_policy()
    reference = Reference(policy, ReferenceConfig(sync_every=2))
    with torch.no_grad():
        policy.output.weight.add_(1.0)
    moved = policy.output.weight.detach().clone()
    for num_steps, follows in ((1, False), (2, True), (3, True)):
        reference.after_step(num_steps, policy)
        with reference.on_device() as model:
            assert torch.equal(model.output.weight, moved) == follows
    with torch.no_grad():
        policy.output.weight.zero_()
    with reference.on_device() as model:
        assert torch.equal(model.output.weight, moved)


def test_a_reference_pass_is_never_checkpointed() -> None:
    policy = make_policy()
    policy.checkpoints_layers = True
    with Reference(policy, ReferenceConfig()).on_device() as model:
        assert not model.checkpoints_layers


@pytest.mark.gpu
def test_weights_kept_on_the_cpu_come_to_the_gpu_and_go_again() -> None:
    policy = make_policy().cuda()
    before = hidden(policy, "cuda")
    reference = Reference(policy, ReferenceConfig(device="cpu", sync_every=1))
    with reference.on_device() as model:
        assert torch.equal(hidden(model, "cuda"), before)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert all(parameter.is_pinned() for parameter in model.parameters())
    with torch.no_grad():
        policy.output.weight.mul_(2.0)
    reference.after_step(1, policy)
    with reference.on_device() as model:
        assert torch.equal(model.output.weight, policy.output.weight)
