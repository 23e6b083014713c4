"""The optimizer that fits a run: alone, or together with other ranks."""

from typing import Protocol

from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.models.image_policy import ImagePolicy
from argrpo.optimizer import MasterAdamW
from argrpo.ranks import num_ranks
from argrpo.sharded_optimizer import ShardedAdamW


class Optimizer(Protocol):
    """Sums gradients over the backward passes of all ranks and steps the weights; see
    `MasterAdamW` for each member."""

    def accumulate(self) -> None: ...

    def discard(self) -> None: ...

    def main_grad(self, name: str) -> Tensor: ...

    def step(self, lr: float) -> float: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def make_optimizer(policy: ImagePolicy, config: TrainConfig) -> Optimizer:
    """AdamW for the weights of a policy.

    Raises:
        ValueError: bf16 masters on several ranks.
    """
    settings, has_bf16_masters = config.optimizer, config.parity.bf16_masters
    if num_ranks() == 1:
        return MasterAdamW(
            policy.named_parameters(),
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            fp32_masters=not has_bf16_masters,
        )
    if has_bf16_masters:
        raise ValueError(
            f"parity.bf16_masters: expected false on several ranks, got true on {num_ranks()}; "
            "compare with released codes on one"
        )
    return ShardedAdamW(
        policy.named_parameters(),
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )
