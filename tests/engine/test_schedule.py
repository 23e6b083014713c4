"""When images start and end: every image once, every position once, never more pages than said."""

import pytest

from argrpo.engine.schedule import Layout, count_steps, pages_of, peak_pages, turns


def layout(cohorts: int, size: int, tokens: int = 64, page: int = 16, first: int = 0) -> Layout:
    return Layout(cohorts, size, tokens, page, first)


LAYOUTS = [
    layout(1, 8),
    layout(4, 2),
    layout(3, 1, tokens=50),
    layout(2, 3, tokens=1),
    layout(5, 1, tokens=65, page=16, first=17),
    layout(1, 1, tokens=2, page=128),
]


@pytest.mark.parametrize("plan", LAYOUTS, ids=str)
@pytest.mark.parametrize("num_images", [0, 1, 3, 8, 29])
def test_every_image_is_drawn_once_and_gets_all_its_tokens(plan: Layout, num_images: int) -> None:
    drawn: dict[int, int] = {}
    started, finished, running = [], [], set()
    for turn in turns(plan, num_images, 0):
        for admission in turn.admissions:
            assert admission.cohort not in running
            running.add(admission.cohort)
            drawn[admission.cohort] = 1
            started += range(admission.first_image, admission.first_image + admission.num_images)
            assert 1 <= admission.num_images <= plan.cohort_size
        assert set(turn.entries) == set(turn.counts) == running
        for cohort in running:
            drawn[cohort] += turn.num_steps
            assert drawn[cohort] <= plan.num_tokens
            assert turn.entries[cohort] == plan.first_entry + drawn[cohort] - 1
        for admission in turn.finished:
            assert drawn[admission.cohort] == plan.num_tokens
            running.remove(admission.cohort)
            finished += range(admission.first_image, admission.first_image + admission.num_images)
    assert started == list(range(num_images))
    assert sorted(finished) == list(range(num_images))
    assert not running


@pytest.mark.parametrize("plan", LAYOUTS, ids=str)
def test_within_a_turn_no_cohort_needs_another_page(plan: Layout) -> None:
    before: dict[int, int] = {}
    for turn in turns(plan, 11, 0):
        for admission in turn.admissions:
            before[admission.cohort] = plan.first_entry
        for cohort, entries in turn.entries.items():
            # Pages are given out once, for the first entry that this turn writes.
            if entries > before[cohort]:
                first_written = before[cohort] + 1
                assert pages_of(first_written, plan.page_size) == pages_of(entries, plan.page_size)
            before[cohort] = entries


def test_one_cohort_draws_waves_in_lockstep() -> None:
    assert count_steps(layout(1, 8), 8) == 63
    assert count_steps(layout(1, 8), 9) == 2 * 63
    assert peak_pages(layout(1, 8), 8) == 8 * 4


def test_staggered_cohorts_hold_ten_of_sixteen_pages() -> None:
    staggered = layout(4, 2)
    assert staggered.pages_per_row == 4 and staggered.delay == 16
    assert peak_pages(staggered, 40) == 2 * (1 + 2 + 3 + 4)
    # The last cohort starts 48 steps late; then five generations of 63 steps follow.
    assert count_steps(staggered, 40) == 3 * 16 + 5 * 63


def test_guidance_ends_at_a_turn() -> None:
    steps = {True: 0, False: 0}
    for turn in turns(layout(1, 4), 4, num_guided=6):
        steps[turn.is_guided] += turn.num_steps
    assert steps == {True: 5, False: 58}  # token 0 comes from the prefix


def test_guidance_of_all_tokens_or_none_is_the_same_in_every_turn() -> None:
    assert all(turn.is_guided for turn in turns(layout(4, 2), 20, num_guided=64))
    assert not any(turn.is_guided for turn in turns(layout(4, 2), 20, num_guided=0))
