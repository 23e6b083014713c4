"""A policy whose layers are spread over the ranks while it trains (FSDP2), beside the whole copy
that images are drawn from.

    between steps    each rank holds its rows of every matrix in fp32: they are the masters
    in a pass        a layer's matrices are gathered in the working dtype, used and let go;
                     its gradients are summed over the ranks and only the own rows are kept
    after a step     all rows are gathered into the whole copy, whose addresses never change, as
                     the engine's captured steps want it

Norms, embeddings and the head stay whole on each rank: the first two are small, and the head's
gradient is made by a kernel that autograd does not see. `ShardedAdamW` steps both kinds.

What it saves: a rank's fp32 gradients of the layers, 4 bytes a weight, shrink to its rows; the
whole copy remains. What it costs: layers travel twice in each pass, where `optimizer` sends once a
step. All ranks take each pass together, so none makes its micro-batches smaller when memory is
short.

Source: Zhao et al., arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
"""

import copy
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from argrpo.models.image_policy import ImagePolicy
from argrpo.row_shards import all_gather, own_rows, padded


class ShardedPolicy:
    """The policy that trains. All ranks call everything together."""

    def __init__(self, whole: ImagePolicy) -> None:
        """Spread a copy of a policy over the ranks.

        Args:
            whole: the same on every rank; written by `publish`, never trained itself.
        """
        self._whole = dict(whole.named_parameters())
        self.policy: ImagePolicy = _spread(copy.deepcopy(whole), whole.head_weight.dtype)
        """Its `hidden` gathers layers as they are needed."""

    @torch.no_grad()
    def publish(self) -> None:
        """Write the weights into the whole copy.

        Raises:
            PeerError: another rank failed.
        """
        shards: list[Tensor] = []
        targets: list[Tensor] = []
        for name, weight in self.policy.named_parameters():
            target = self._whole[name]
            if isinstance(weight, DTensor):
                shards.append(padded(weight.to_local(), len(weight)).to(target.dtype))
                targets.append(target)
            else:
                target.copy_(weight)
        all_gather(shards, targets)

    @torch.no_grad()
    def take_up(self) -> None:
        """Read the weights from the whole copy; of a rounded copy, the rounded weights."""
        for name, weight in self.policy.named_parameters():
            source: Tensor = self._whole[name]
            if isinstance(weight, DTensor):
                weight.to_local().copy_(source[own_rows(len(source))])
            else:
                weight.copy_(source)


def _spread(policy: ImagePolicy, dtype: torch.dtype) -> ImagePolicy:
    device, module = policy.head_weight.device, policy
    assert isinstance(module, nn.Module)
    # A group of its own: what it exchanges must not meet what ranks tell each other.
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    mesh = DeviceMesh.from_group(group, device.type)
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in _layers(module):
        parts = list(_called(layer))
        for part in parts:
            part.float()
        fully_shard(parts, mesh=mesh, mp_policy=precision)
    whole = {weight for weight in module.parameters() if not isinstance(weight, DTensor)}
    fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=whole)
    # Its pass begins here and not in `forward`, which an image policy has not.
    register_fsdp_forward_method(module, "hidden")
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # The loss is already a share of the step's: gradients add up, they are not averaged.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return module


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def _called(layer: nn.Module) -> Iterator[nn.Module]:
    """The parts with matrices that a layer calls: gathering hangs on the call."""
    for part in layer.children():
        if type(part).forward is nn.Module.forward:
            yield from _called(part)
        elif any(weight.dim() > 1 for weight in part.parameters()):
            yield part
