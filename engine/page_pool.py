"""Which pages of the cache are taken, and by how many. Bookkeeping on the host, no bytes."""

from collections import Counter
from collections.abc import Iterable


def first_order(num_pages: int) -> list[int]:
    """The order in which a new pool hands out its pages; no result depends on it."""
    return list(range(num_pages))


class PagePool:
    """A fixed number of pages, each free or held by one owner or more."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = first_order(num_pages)[::-1]
        self._holders: Counter[int] = Counter()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._holders)

    def take(self) -> int:
        """A free page, now held once.

        Raises:
            RuntimeError: none is free, which a sound plan rules out.
        """
        if not self._free:
            raise RuntimeError(f"pages: expected a free one of {self.num_pages}, got none")
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> int:
        """The same page, held once more; it must only be read from here on."""
        assert self._holders[page] > 0, f"page {page} is not held"
        self._holders[page] += 1
        return page

    def release(self, page: int) -> None:
        """Give up one hold; the last one frees the page."""
        assert self._holders[page] > 0, f"page {page} is not held"
        self._holders[page] -= 1
        if not self._holders[page]:
            del self._holders[page]
            self._free.append(page)

    def check(self, held: Iterable[int]) -> None:
        """Account for every page.

        Args:
            held: the pages that owners say they hold, once for each hold.

        Raises:
            RuntimeError: a page is lost, free twice, free while held, or held by another number of
                owners than it counts.
        """
        claimed = Counter(held)
        if claimed != self._holders:
            wrong = sorted((claimed - self._holders) + (self._holders - claimed))
            raise RuntimeError(
                f"pages: expected holders as the pool counts them, got a difference at {wrong[:8]}"
            )
        everyone = sorted([*self._free, *self._holders])
        if everyone != list(range(self.num_pages)):
            raise RuntimeError(
                f"pages: expected each of {self.num_pages} free or held, got "
                f"{len(self._free)} free and {len(self._holders)} held"
            )
