"""What a budget of bytes buys."""

import pytest

from argrpo.engine.cache_plan import CachePlan, plan_cache
from argrpo.engine.policy import PolicyShape
from argrpo.engine.schedule import peak_pages

XL = PolicyShape(36, 20, 64, 16384, 1, 256)
# Keys and values of 64 positions in 36 layers and 20 heads of 64 bf16 numbers.
XL_PAGE = 2 * 36 * 20 * 64 * 64 * 2


def xl(max_slots: int, kv_bytes: int | None = None) -> CachePlan:
    return plan_cache(XL, max_slots=max_slots, page_size=64, itemsize=2, kv_bytes=kv_bytes)


def test_without_a_budget_all_slots_run_in_lockstep() -> None:
    plan = xl(128)
    assert plan.layout.num_cohorts == 1 and plan.num_slots == 128
    assert plan.page_bytes == XL_PAGE
    assert plan.num_pages == 128 * 2 * 4
    assert plan.pool_bytes == 12_079_595_520  # the 12.1 GB of 128 guided images of XL
    assert plan.describe() == (
        "KV cache: 128 slots in lockstep; 1024 pages of 64 positions, 12.1 GB at the most"
    )


def test_a_budget_that_holds_half_in_lockstep_runs_more_in_cohorts() -> None:
    plan = xl(128, kv_bytes=512 * XL_PAGE)
    assert plan.lockstep(num_branches=2).num_slots == 62  # 500 pages
    assert plan.layout.num_cohorts == 4
    assert plan.num_slots == 100  # 512 // (2 x 10) cohorts of 25
    assert plan.num_pages <= 512
    assert "4 groups of 25, 64 steps apart" in plan.describe()
    assert "in lockstep 62 would fit" in plan.describe()


@pytest.mark.parametrize("pages", [8, 9, 20, 63, 200, 511])
@pytest.mark.parametrize("max_slots", [1, 3, 50, 1000])
def test_no_draw_of_a_plan_holds_more_pages_than_the_pool_has(pages: int, max_slots: int) -> None:
    plan = xl(max_slots, kv_bytes=pages * XL_PAGE)
    assert plan.num_pages <= pages
    assert 1 <= plan.num_slots <= max_slots
    assert plan.num_rows % 4 == 0 and plan.num_rows >= plan.num_slots
    for branches in (1, 2):
        for num_images in (1, plan.num_slots, 3 * plan.num_slots + 1):
            layout = plan.best_layout(num_images, branches, lockstep_only=False)
            assert branches * peak_pages(layout, num_images) <= plan.num_pages


def test_few_images_run_in_lockstep_and_many_in_cohorts() -> None:
    plan = xl(128, kv_bytes=512 * XL_PAGE)
    assert plan.best_layout(40, 2, lockstep_only=False).num_cohorts == 1
    assert plan.best_layout(1000, 2, lockstep_only=False).num_cohorts == 4
    assert plan.best_layout(1000, 2, lockstep_only=True).num_cohorts == 1
    # Without guidance half of the pages do, and all slots fit at full length.
    assert plan.best_layout(1000, 1, lockstep_only=False) == plan.lockstep(1)
    assert plan.lockstep(1).num_slots == 100


def test_a_prefix_that_is_kept_as_keys_takes_pages() -> None:
    plan = plan_cache(XL, max_slots=2, page_size=64, itemsize=2, first_entry=120)
    assert plan.num_pages == 2 * 2 * 6  # 120 + 255 entries


def test_head_sizes_are_padded_to_sixteen_bytes() -> None:
    shape = PolicyShape(24, 32, 100, 16384, 1, 256)
    plan = plan_cache(shape, max_slots=1, page_size=16, itemsize=2)
    assert plan.page_bytes == 2 * 24 * 32 * 16 * 104 * 2


def test_what_cannot_hold_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match=f"kv_bytes: expected at least {8 * XL_PAGE} for one"):
        xl(4, kv_bytes=8 * XL_PAGE - 1)
    with pytest.raises(ValueError, match=r"page_size: expected one of \(16, 32, 64, 128\), got 8"):
        plan_cache(XL, max_slots=4, page_size=8, itemsize=2)
