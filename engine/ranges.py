"""Names for stretches of work, for whoever profiles it.

The engine knows no profiler: it opens ranges, and what opening one does is handed in. A range is of
the host: on a GPU it holds the launches of its work, not the work itself.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

Ranges: TypeAlias = Callable[[str], AbstractContextManager[object]]

_NOTHING = nullcontext()


def no_ranges(name: str) -> AbstractContextManager[object]:
    """Nobody profiles: nothing is made, nothing is kept."""
    return _NOTHING
