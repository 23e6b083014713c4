"""The record that flows from the engine to the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from argrpo.engine.conditions import Conditions, moved_to
from argrpo.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class Rollout:
    """N drawn images as tokens, with everything that shaped the draw."""

    token_ids: Tensor  # [N, T] int64
    logprobs: Tensor  # [N, T] fp32, of the distribution drawn from
    cond_logprobs: Tensor | None  # [N, T] fp32, conditional branch at the draw's temperature
    entropies: Tensor  # [N, T] fp32, nats, of the distribution drawn from
    support: Tensor | None  # [N, T, ceil(V / 8)] uint8, the kept set as a bitmask
    conditions: Conditions
    params: SamplingParams
    seed: int
    image_ids: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.token_ids)


def empty(
    conditions: Conditions,
    params: SamplingParams,
    seed: int,
    num_tokens: int,
    device: torch.device,
) -> Rollout:
    """A rollout of no images."""
    none = torch.empty(0, num_tokens, device=device)
    return Rollout(
        token_ids=none.long(),
        logprobs=none,
        cond_logprobs=None,
        entropies=none,
        support=None,
        conditions=moved_to(conditions, device),
        params=params,
        seed=seed,
        image_ids=torch.empty(0, dtype=torch.int64, device=device),
    )


def concatenate(rollouts: Sequence[Rollout], conditions: Conditions) -> Rollout:
    """One rollout of all rows; `conditions` are those of all of them, in order."""
    first = rollouts[0]
    return Rollout(
        token_ids=torch.cat([rollout.token_ids for rollout in rollouts]),
        logprobs=torch.cat([rollout.logprobs for rollout in rollouts]),
        cond_logprobs=_cat_optional([rollout.cond_logprobs for rollout in rollouts]),
        entropies=torch.cat([rollout.entropies for rollout in rollouts]),
        support=_cat_optional([rollout.support for rollout in rollouts]),
        conditions=conditions,
        params=first.params,
        seed=first.seed,
        image_ids=torch.cat([rollout.image_ids for rollout in rollouts]),
    )


def _cat_optional(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
