"""Conditions collapsed to what image tokens need of them.

LlamaGen's prefix positions have a rotary table of zeros, so their queries and keys are exactly 0
and every image token scores each of them 0. A prefix of any length is then one pair per layer and
head, (sum of V over the valid positions, their count): 120 text tokens cost one vector.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from argrpo.engine.attention import PrefixAttend
from argrpo.engine.conditions import Conditions, distinct, num_images, select
from argrpo.engine.policy import Policy

# Conditions per forward pass, short batches filled up: library products round a row differently
# when their row count changes, and a prefix must not depend on what else is drawn.
_PREFIX_BATCH = 16


@dataclass(frozen=True, slots=True, eq=False)
class PrefixStates:
    """The collapsed prefixes of P distinct conditions."""

    value_sums: Tensor  # [L, P, H, D] fp32, over the valid positions
    counts: Tensor  # [P] fp32, valid positions
    last_hidden: Tensor  # [P, dim] final-norm hidden states of the last position: token 0's
    index: Tensor  # [N] int64, which of the P a row uses


def has_zero_rotary_prefix(policy: Policy) -> bool:
    """Whether the collapse is exact for this model."""
    return not bool(policy.rotary[: policy.shape.prefix_len].any())


@torch.no_grad()
def collapse_prefixes(policy: Policy, conditions: Conditions) -> PrefixStates:
    """Run each distinct condition once through the trunk.

    Args:
        policy: a model whose prefix rotary rows are zero.
        conditions: N labels or text features.
    """
    once = distinct(conditions)
    prompts, index = once.conditions, once.index
    num_prompts = num_images(prompts)
    order = torch.arange(num_prompts, device=index.device)
    parts = [_collapse_batch(policy, prompts, rows) for rows in order.split(_PREFIX_BATCH)]
    return PrefixStates(
        torch.cat([part.value_sums for part in parts], dim=1),
        torch.cat([part.counts for part in parts]),
        torch.cat([part.last_hidden for part in parts]),
        index,
    )


def _collapse_batch(policy: Policy, prompts: Conditions, rows: Tensor) -> PrefixStates:
    filled = torch.cat([rows, rows[-1:].expand(_PREFIX_BATCH - len(rows))])
    prefix = policy.embed_conditions(select(prompts, filled))
    attend = PrefixAttend(prefix.mask)
    hidden = policy.trunk(prefix.embeddings, attend)[:, -1]
    n = len(rows)
    value_sums = torch.stack([attend.value_sums[layer][:n] for layer in sorted(attend.value_sums)])
    counts = prefix.mask[:n].sum(dim=1, dtype=torch.float32)
    return PrefixStates(value_sums, counts, hidden[:n], rows)
