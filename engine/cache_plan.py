"""How many slots and pages a budget of bytes buys.

Slots stand in one lockstep wave where the budget holds all of them at full length. Where it does
not, cohorts that start a page after each other (schedule.py) hold fewer pages at a time, so more
slots run: 10 of 16 pages a slot at 4 pages an image, 136 of 256 at 16.
"""

from dataclasses import dataclass

from argrpo.engine.policy import PolicyShape
from argrpo.engine.schedule import Layout, count_steps, peak_pages
from argrpo.kernels.kv_pages import PAGE_SIZES, padded_head_dim

# Rows of the step come in multiples of this: a library product rounds the rows of a whole tile
# alike and may round those of a broken one differently (MKL fp32: exact for every multiple of 4).
ROW_TILE = 4

_BRANCHES = 2  # planned for guidance; a draw without it uses half of the pages


@dataclass(frozen=True)
class CachePlan:
    """A pool of pages and the slots that share it."""

    layout: Layout
    num_pages: int
    page_bytes: int
    """Of a page in all layers, keys and values."""

    @property
    def num_slots(self) -> int:
        return self.layout.num_slots

    @property
    def num_rows(self) -> int:
        """Rows of a step and branch; those past the slots are always idle."""
        return -(-self.num_slots // ROW_TILE) * ROW_TILE

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def lockstep(self, num_branches: int) -> Layout:
        """One wave of as many slots as the pool holds at full length."""
        fitting = self.num_pages // (num_branches * self.layout.pages_per_row)
        size = min(self.num_slots, fitting)
        return self.layout._replace(num_cohorts=1, cohort_size=size)

    def best_layout(self, num_images: int, num_branches: int, *, lockstep_only: bool) -> Layout:
        """The layout that draws so many images in the fewest steps.

        A step costs the same in every layout, because it always runs all rows.
        """
        lockstep = self.lockstep(num_branches)
        if lockstep_only or count_steps(lockstep, num_images) <= count_steps(
            self.layout, num_images
        ):
            return lockstep
        return self.layout

    def describe(self) -> str:
        """The plan in one line."""
        layout = self.layout
        how = "in lockstep"
        if layout.num_cohorts > 1:
            ramp = (layout.num_cohorts - 1) * layout.delay
            how = (
                f"in {layout.num_cohorts} groups of {layout.cohort_size}, {layout.delay} steps "
                f"apart (the last starts after {ramp} steps; in lockstep "
                f"{self.lockstep(_BRANCHES).num_slots} would fit)"
            )
        return (
            f"KV cache: {self.num_slots} slots {how}; {self.num_pages} pages of "
            f"{layout.page_size} positions, {self.pool_bytes / 1e9:.3g} GB at the most"
        )


def plan_cache(
    shape: PolicyShape,
    *,
    max_slots: int,
    page_size: int,
    itemsize: int,
    first_entry: int = 0,
    kv_bytes: int | None = None,
) -> CachePlan:
    """The most slots, up to `max_slots`, that a budget holds, in as few cohorts as that takes.

    Args:
        shape: of the policy.
        max_slots: at least 1.
        page_size: positions of a page, one of `PAGE_SIZES`.
        itemsize: bytes of a cached number.
        first_entry: cache entries of a prefix that is kept as keys.
        kv_bytes: the budget; None takes what `max_slots` need in lockstep.

    Raises:
        ValueError: not one guided image fits, or the page size is none of the kernel's.
    """
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size: expected one of {PAGE_SIZES}, got {page_size}")
    row = page_size * padded_head_dim(shape.head_dim)
    page_bytes = 2 * shape.num_layers * shape.num_heads * row * itemsize
    one = Layout(1, 1, shape.num_image_tokens, page_size, first_entry)
    least = _BRANCHES * one.pages_per_row * page_bytes
    if kv_bytes is None:
        kv_bytes = max_slots * least
    if kv_bytes < least:
        raise ValueError(
            f"kv_bytes: expected at least {least} for one guided image, got {kv_bytes}"
        )
    candidates = (
        _largest(one._replace(num_cohorts=cohorts), kv_bytes // page_bytes, max_slots)
        for cohorts in range(1, one.pages_per_row + 1)
    )
    plans = [CachePlan(layout, pages, page_bytes) for layout, pages in candidates]
    return max(plans, key=lambda plan: (plan.num_slots, -plan.layout.num_cohorts))


def _largest(layout: Layout, num_pages: int, max_slots: int) -> tuple[Layout, int]:
    """The largest cohorts that fit, and the pages that they hold at their peak."""
    # Two generations of images pass every stage, the second with all cohorts running.
    peak = _BRANCHES * peak_pages(layout, 3 * layout.num_cohorts)
    size = min(num_pages // peak, max_slots // layout.num_cohorts)
    return layout._replace(cohort_size=size), size * peak
