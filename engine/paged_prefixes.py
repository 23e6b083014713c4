"""The two kinds of prefixes that a paged cache holds."""

from collections.abc import Callable
from typing import Generic, NamedTuple

from argrpo.engine.conditions import Conditions
from argrpo.engine.paged_cache import PagedCache
from argrpo.engine.policy import Policy
from argrpo.engine.prefix import (
    Prefixes,
    PrefixKeys,
    PrefixStates,
    collapse_prefixes,
    read_prefix_keys,
)


class PrefixKind(NamedTuple, Generic[Prefixes]):
    """How prefixes are read, and how they come into the cache."""

    read: Callable[[Policy, Conditions], Prefixes]
    place: Callable[[PagedCache, slice, Prefixes, slice], None]


COLLAPSED = PrefixKind[PrefixStates](collapse_prefixes, PagedCache.write_collapsed)
"""One pair of sums a layer, where the prefix has a rotary table of zeros."""

KEYED = PrefixKind[PrefixKeys](read_prefix_keys, PagedCache.write_keys)
"""Keys and values of every prefix position."""
