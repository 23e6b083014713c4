"""What trains a policy: alone, or together with other ranks."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.models.image_policy import ImagePolicy
from argrpo.optimizer import MasterAdamW
from argrpo.ranks import num_ranks


class Optimizer(Protocol):
    """Sums gradients over the backward passes of all ranks and steps the weights; see
    `MasterAdamW` for each member."""

    def accumulate(self) -> None: ...

    def discard(self) -> None: ...

    def main_grad(self, name: str) -> Tensor: ...

    def step(self, lr: float) -> float: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def own_state(self) -> dict[str, Tensor]: ...

    def load_own_state(self, own: dict[str, Tensor]) -> None: ...


class Trained(NamedTuple):
    """The policy that passes go through, and what steps it."""

    policy: ImagePolicy  # the policy itself, or one of which each rank holds a part
    optimizer: Optimizer
    publish: Callable[[], None]  # to the policy itself, after a step
    take_up: Callable[[], None]  # from the policy itself, after it was loaded
    is_joint: bool  # whether all ranks take each pass together


def make_trained(policy: ImagePolicy, config: TrainConfig) -> Trained:
    """AdamW for the weights of a policy.

    Raises:
        ValueError: bf16 masters on several ranks.
    """
    settings, has_bf16_masters = config.optimizer, config.parity.bf16_masters
    if num_ranks() == 1:
        optimizer = MasterAdamW(
            policy.named_parameters(),
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            fp32_masters=not has_bf16_masters,
        )
        return Trained(policy, optimizer, _nothing, _nothing, is_joint=False)
    if has_bf16_masters:
        raise ValueError(
            f"parity.bf16_masters: expected false on several ranks, got true on {num_ranks()}; "
            "compare with released codes on one"
        )
    return _trained_together(policy, config)


def _trained_together(policy: ImagePolicy, config: TrainConfig) -> Trained:
    # A second to import, which runs of one rank need not wait for.
    from argrpo.sharded_optimizer import ShardedAdamW

    spreads_weights = config.distributed.shard == "weights"
    trained, publish, take_up = policy, _nothing, _nothing
    if spreads_weights:
        from argrpo.sharded_policy import ShardedPolicy

        sharded = ShardedPolicy(policy)
        trained, publish, take_up = sharded.policy, sharded.publish, sharded.take_up
    optimizer = ShardedAdamW(
        trained.named_parameters(),
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        rounds_to=policy.head_weight.dtype,
    )
    return Trained(trained, optimizer, publish, take_up, is_joint=spreads_weights)


def _nothing() -> None:
    """The policy that trains is the policy itself."""
