"""When images start, grow and finish. All of it is known to the host beforehand: an image has T
tokens, none ends early, so nothing here ever asks the device.

Slots run in cohorts that stand at one position. One cohort of all slots is a lockstep wave. Several
cohorts, each a page later than the one before, hold half as many pages on average as they would at
the end all together, for the price of a ramp: the later cohorts start later.

Token 0 of an image comes from its prefix when it is admitted; T - 1 steps draw the others.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Layout(NamedTuple):
    """How slots and images are laid out in time."""

    num_cohorts: int
    cohort_size: int  # slots of a cohort
    num_tokens: int  # T
    page_size: int  # cache entries of a page
    first_entry: int  # cache entries before those of image tokens

    @property
    def num_slots(self) -> int:
        return self.num_cohorts * self.cohort_size

    @property
    def pages_per_row(self) -> int:
        """Pages of a finished image in one branch; the last token is never fed back."""
        return max(1, -(-(self.first_entry + self.num_tokens - 1) // self.page_size))

    @property
    def delay(self) -> int:
        """Steps by which a cohort starts after the one before: whole pages."""
        return self.pages_per_row // self.num_cohorts * self.page_size


class Admission(NamedTuple):
    """Images that start together in one cohort."""

    cohort: int
    first_image: int
    num_images: int


class Turn(NamedTuple):
    """Steps between two things that the host has to do."""

    admissions: list[Admission]  # before the steps
    entries: dict[int, int]  # cohort: cache entries that its rows fill by the end of the steps
    counts: dict[int, int]  # cohort: its images
    is_guided: bool  # these steps
    num_steps: int
    finished: list[Admission]  # after the steps


class _Running(NamedTuple):
    admission: Admission
    drawn: int  # tokens of each image


def turns(layout: Layout, num_images: int, num_guided: int) -> Iterator[Turn]:
    """The whole draw, turn by turn.

    Args:
        layout: the slots; one cohort where guidance ends before the last token.
        num_images: images to draw, in order.
        num_guided: first tokens of an image that are guided.
    """
    num_tokens = layout.num_tokens
    assert num_guided in (0, num_tokens) or layout.num_cohorts == 1
    running: dict[int, _Running] = {}
    waiting, now = 0, 0
    while waiting < num_images or running:
        admissions = []
        for cohort in range(layout.num_cohorts):
            is_due = now >= cohort * layout.delay
            if cohort in running or not is_due or waiting == num_images:
                continue
            count = min(layout.cohort_size, num_images - waiting)
            admissions.append(Admission(cohort, waiting, count))
            running[cohort] = _Running(admissions[-1], 1)
            waiting += count
        num_steps = min(_until_event(layout, run, num_guided) for run in running.values())
        if waiting < num_images:
            later = [c * layout.delay - now for c in range(layout.num_cohorts)]
            num_steps = min([num_steps, *(steps for steps in later if steps > 0)])
        drawn = {cohort: run.drawn + num_steps for cohort, run in running.items()}
        is_guided = min(run.drawn for run in running.values()) < num_guided
        now += num_steps
        finished = [running[c].admission for c, n in drawn.items() if n == num_tokens]
        yield Turn(
            admissions,
            {cohort: layout.first_entry + n - 1 for cohort, n in drawn.items()},
            {cohort: run.admission.num_images for cohort, run in running.items()},
            is_guided,
            num_steps,
            finished,
        )
        running = {
            c: _Running(run.admission, drawn[c])
            for c, run in running.items()
            if drawn[c] < num_tokens
        }


def count_steps(layout: Layout, num_images: int) -> int:
    """Decode steps of a draw."""
    return sum(turn.num_steps for turn in turns(layout, num_images, 0))


def peak_pages(layout: Layout, num_images: int) -> int:
    """Most pages that one branch of a draw holds at a time."""
    return max(
        sum(
            turn.counts[cohort] * pages_of(entries, layout.page_size)
            for cohort, entries in turn.entries.items()
        )
        for turn in turns(layout, num_images, 0)
    )


def pages_of(entries: int, page_size: int) -> int:
    """Pages that so many entries fill, at least one."""
    return max(1, -(-entries // page_size))


def _until_event(layout: Layout, run: _Running, num_guided: int) -> int:
    """Steps until a cohort is done, needs another page or loses its guidance."""
    remaining = layout.num_tokens - run.drawn
    next_entry = layout.first_entry + run.drawn - 1
    limits = [remaining, layout.page_size - next_entry % layout.page_size]
    if run.drawn < num_guided:
        limits.append(num_guided - run.drawn)
    return min(limits)
