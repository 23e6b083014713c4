"""Conditions as what image tokens need of them, each distinct one read once.

LlamaGen's prefix positions have a rotary table of zeros, so their queries and keys are exactly 0
and every image token scores each of them 0. A prefix of any length is then one pair per layer and
head, (sum of V over the valid positions, their count): 120 text tokens cost one vector. The prefix
of any other model is kept as its keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from argrpo.engine.attention import PrefixAttend, PrefixKeyAttend
from argrpo.engine.cache_plan import ROW_TILE
from argrpo.engine.conditions import Conditions, distinct, num_images, same_conditions, select
from argrpo.engine.policy import Policy, Prefix, rotary_rows
from argrpo.engine.weights import weights_version

# Conditions per forward pass. A library product rounds a row differently when their number changes,
# and a prefix must not depend on what else is drawn, so short batches are filled up: on a GPU to
# this, on a CPU as far as it was seen to matter (MKL fp32: 24 rows of width 64 still differ).
_PREFIX_BATCH = 16
_LEAST_ROWS = 96


@dataclass(frozen=True, slots=True, eq=False)
class PrefixStates:
    """The collapsed prefixes of P distinct conditions."""

    value_sums: Tensor  # [L, P, H, D] fp32, over the valid positions
    counts: Tensor  # [P] fp32, valid positions
    last_hidden: Tensor  # [P, dim] final-norm hidden states of the last position: token 0's
    index: Tensor  # [N] int64, which of the P a row uses


@dataclass(frozen=True, eq=False)  # no slots: `prompts` is kept once it was asked for
class PrefixKeys:
    """The ordinary prefixes of P distinct conditions, of M positions each."""

    keys: Tensor  # [L, P, M, H, D], rotated
    values: Tensor  # [L, P, M, H, D]
    last_hidden: Tensor  # [P, dim] final-norm hidden states of the last position: token 0's
    index: Tensor  # [N] int64, which of the P a row uses

    @cached_property
    def prompts(self) -> list[int]:
        """`index` on the host."""
        return self.index.tolist()


Prefixes = TypeVar("Prefixes", PrefixStates, PrefixKeys)


class PrefixMemory(Generic[Prefixes]):
    """The prefixes last read, kept as long as weights and conditions stay."""

    def __init__(self, read: Callable[[Policy, Conditions], Prefixes]) -> None:
        self._read: Callable[[Policy, Conditions], Prefixes] = read
        self._version: tuple[int, ...] = ()
        self._conditions: Conditions | None = None
        self._prefixes: Prefixes | None = None

    def prefixes(self, policy: Policy, conditions: Conditions) -> Prefixes:
        """Those of N conditions, from memory where nothing has changed."""
        once = distinct(conditions)
        version = weights_version(policy)
        kept = self._prefixes
        if (
            kept is None
            or version != self._version
            or not same_conditions(self._conditions, once.conditions)
        ):
            kept = self._read(policy, once.conditions)
            self._version, self._conditions, self._prefixes = version, once.conditions, kept
        return replace(kept, index=once.index)


def has_zero_rotary_prefix(policy: Policy) -> bool:
    """Whether the collapse is exact for this model."""
    prefix = rotary_rows(policy, slice(policy.shape.prefix_len))
    return prefix is not None and not bool(prefix.any())


@torch.no_grad()
def collapse_prefixes(policy: Policy, conditions: Conditions) -> PrefixStates:
    """Run each distinct condition once through the trunk.

    Args:
        policy: a model whose prefix rotary rows are zero.
        conditions: N labels or text features.
    """
    once = distinct(conditions)
    parts = [_collapse_batch(policy, *batch) for batch in _batches(policy, once.conditions)]
    return PrefixStates(
        torch.cat([part.value_sums for part in parts], dim=1),
        torch.cat([part.counts for part in parts]),
        torch.cat([part.last_hidden for part in parts]),
        once.index,
    )


@torch.no_grad()
def read_prefix_keys(policy: Policy, conditions: Conditions) -> PrefixKeys:
    """Run each distinct condition once through the trunk and keep its keys and values.

    Raises:
        ValueError: some prefix is padded; only a zero rotary embedding makes padding harmless.
    """
    once = distinct(conditions)
    parts = [_key_batch(policy, *batch) for batch in _batches(policy, once.conditions)]
    return PrefixKeys(
        torch.cat([part.keys for part in parts], dim=1),
        torch.cat([part.values for part in parts], dim=1),
        torch.cat([part.last_hidden for part in parts]),
        once.index,
    )


def _batches(policy: Policy, prompts: Conditions) -> list[tuple[Prefix, int]]:
    """Embedded conditions in batches of one size, and how many of each are wanted."""
    order = torch.arange(num_images(prompts), device=policy.head_weight.device)
    batches = []
    for rows in order.split(_PREFIX_BATCH):
        size = _batch_size(len(rows), policy.shape.prefix_len, order.device)
        filled = torch.cat([rows, rows[-1:].expand(size - len(rows))])
        batches.append((policy.embed_conditions(select(prompts, filled)), len(rows)))
    return batches


def _batch_size(count: int, prefix_len: int, device: torch.device) -> int:
    """Conditions of the batch that so many are filled up to."""
    if device.type == "cuda":
        return _PREFIX_BATCH
    while count < _PREFIX_BATCH and (
        count * prefix_len < _LEAST_ROWS or count * prefix_len % ROW_TILE
    ):
        count += 1
    return count


def _collapse_batch(policy: Policy, prefix: Prefix, n: int) -> PrefixStates:
    attend = PrefixAttend(prefix.mask)
    hidden = policy.trunk(prefix.embeddings, attend)[:, -1]
    value_sums = torch.stack([attend.value_sums[layer][:n] for layer in sorted(attend.value_sums)])
    counts = prefix.mask[:n].sum(dim=1, dtype=torch.float32)
    return PrefixStates(value_sums, counts, hidden[:n], counts.new_empty(0).long())


def _key_batch(policy: Policy, prefix: Prefix, n: int) -> PrefixKeys:
    if not bool(prefix.mask.all()):
        raise ValueError(
            "conditions: expected prompts without padding, since keys of this policy's prefix are "
            "not zero, got padded ones"
        )
    length = prefix.embeddings.shape[1]
    attend = PrefixKeyAttend(rotary_rows(policy, slice(length)))
    hidden = policy.trunk(prefix.embeddings, attend)[:, -1]
    keys, values = (torch.stack(side)[:, :n] for side in (attend.keys, attend.values))
    return PrefixKeys(keys, values, hidden[:n], torch.empty(0, dtype=torch.int64))
