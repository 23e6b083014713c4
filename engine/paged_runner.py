"""Draws over a paged cache, one replayed step after another.

The host only lets images in, hands out pages and takes results, at turns that it knows beforehand
(schedule.py); between them steps are replayed and nothing waits for the device.
"""

from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from argrpo.engine.cache_plan import CachePlan
from argrpo.engine.conditions import select
from argrpo.engine.decode_step import DecodeState, StepVariant, decode_steps, fed_embeddings
from argrpo.engine.device_queue import DeviceQueue, Step, plain_tensors
from argrpo.engine.draw_request import DrawRequest
from argrpo.engine.paged_prefixes import COLLAPSED, KEYED, PrefixKind
from argrpo.engine.policy import Policy
from argrpo.engine.prefix import (
    PrefixMemory,
)
from argrpo.engine.ranges import Ranges, no_ranges
from argrpo.engine.rollout import Rollout
from argrpo.engine.schedule import Admission, Layout, Turn, turns
from argrpo.engine.weights import weights_addresses
from argrpo.kernels.draw import Draw, DrawKeys, DrawSettings
from argrpo.kernels.guided_sampling import guided_sample
from argrpo.kernels.record_draw import DrawLog, record_draw_

# A graph of several steps saves the host's part of the others, some 5 us each, which the step of a
# small model (60 us at its limit) feels. Most turns are a page long, a multiple of 8.
_STEPS_PER_GRAPH = (8, 1)


class _Job(NamedTuple):
    """A request with its prefixes, laid out in time."""

    request: DrawRequest
    layout: Layout
    cond: Any  # Prefixes
    uncond: Any  # Prefixes | None
    num_guided: int  # first tokens of an image

    @property
    def num_branches(self) -> int:
        return 1 if self.uncond is None else 2

    def variant(self, num_branches: int) -> StepVariant:
        request = self.request
        return StepVariant(
            num_branches,
            request.settings.filtered,
            request.wants_cond_logprobs,
            request.wants_support,
        )

    def slots(self, admission: Admission) -> slice:
        start = admission.cohort * self.layout.cohort_size
        return slice(start, start + admission.num_images)


class _Finished(NamedTuple):
    """What was drawn of some images."""

    mark: torch.cuda.Event | None  # the point of the queue by which it is there
    admission: Admission
    drawn: DrawLog


class PagedRunner:
    """Runs draws of one policy over one pool of pages, one draw at a time."""

    def __init__(self, policy: Policy, plan: CachePlan, ranges: Ranges = no_ranges) -> None:
        """A plan whose image tokens start at entry 0 is for prefixes that collapse."""
        self._policy = policy
        self._plan = plan
        self._ranges = ranges
        self._queue = DeviceQueue(policy.head_weight.device)
        self._kind: PrefixKind[Any] = KEYED if plan.layout.first_entry else COLLAPSED
        self._cond: PrefixMemory[Any] = PrefixMemory(self._kind.read)
        self._uncond: PrefixMemory[Any] = PrefixMemory(self._kind.read)
        self._state: DecodeState | None = None
        self._steps: dict[tuple[StepVariant, int], Step] = {}
        self._addresses: tuple[int, ...] = ()

    @property
    def num_slots(self) -> int:
        return self._plan.num_slots

    @property
    def num_held_pages(self) -> int:
        return 0 if self._state is None else self._state.cache.pool.num_held

    def describe(self) -> str:
        """The plan in one line."""
        return self._plan.describe()

    def check(self) -> None:
        """RuntimeError unless every page is free or held by the rows that say so."""
        if self._state is not None:
            self._state.cache.check()

    def draw(self, request: DrawRequest) -> Generator[Rollout, None, None]:
        """Rollouts of images in order, as they finish; prefixes are read at the call."""
        with self._ranges("prefill"), plain_tensors(self._queue.device):
            job = self._laid_out(request)
        return self._run(job)

    def _laid_out(self, request: DrawRequest) -> _Job:
        policy, num_tokens = self._policy, self._policy.shape.num_image_tokens
        uncond = None
        if request.params.is_guided:
            null = policy.null_conditions(request.conditions)
            uncond = self._uncond.prefixes(policy, null)
        num_guided = request.params.num_guided(num_tokens)
        layout = self._plan.best_layout(
            request.num_images,
            1 if uncond is None else 2,
            # The unconditional half is dropped for all slots at once.
            lockstep_only=num_guided not in (0, num_tokens),
        )
        cond = self._cond.prefixes(policy, request.conditions)
        return _Job(request, layout, cond, uncond, num_guided)

    def _run(self, job: _Job) -> Generator[Rollout, None, None]:
        queue, done = self._queue, deque[_Finished]()
        try:
            queue.follow_caller()
            state, last_step = self._ready(job), 0
            for turn in turns(job.layout, job.request.num_images, job.num_guided):
                with queue.entered():
                    self._take_turn(state, job, turn, last_step)
                last_step += turn.num_steps
                # Where work is queued, what finished in the turn before is given away only now, so
                # that the device has this turn to go on with.
                yield from self._handed_over(job, done)
                for admission in turn.finished:
                    with queue.entered():
                        done.append(self._finish(state, job, admission))
                if not queue.runs_ahead:
                    yield from self._handed_over(job, done)
            yield from self._handed_over(job, done)
        finally:
            # Also after Ctrl-C, an error, or a caller who wants no more.
            if self._state is not None:
                with queue.entered():
                    self._state.idle()
                self._state.cache.reset()
            queue.lead_caller()

    def _ready(self, job: _Job) -> DecodeState:
        """The state, idle, and every kind of step that the job needs."""
        queue = self._queue
        if self._state is None:
            with queue.entered():
                self._state = DecodeState(self._policy, self._plan)
        state = self._state
        assert not state.cache.pool.num_held, "one draw at a time"
        addresses = weights_addresses(self._policy)
        if addresses != self._addresses:
            self._steps.clear()
            self._addresses = addresses
        if job.request.wants_support:
            with queue.entered():
                state.take_support()
        kinds = {1} if job.num_guided < state.num_tokens else set()
        if job.num_guided:
            kinds.add(2)
        for variant in map(job.variant, kinds):
            for num_steps in _STEPS_PER_GRAPH:
                if (variant, num_steps) not in self._steps:
                    step = partial(decode_steps, self._policy, state, variant, num_steps)
                    with self._ranges("capture"):
                        self._steps[variant, num_steps] = queue.captured(step)
        with queue.entered():
            state.idle()  # what a capture ran to warm up has moved the positions on
        return state

    def _take_turn(self, state: DecodeState, job: _Job, turn: Turn, last_step: int) -> None:
        """Let images in, give them pages, and take the steps of a turn."""
        tokens = job.request.tokens
        for admission in turn.admissions:
            with self._ranges("admit"):
                self._admit(state, job, admission)
            tokens.add(admission.num_images)
        num_branches = 2 if turn.is_guided else 1
        with self._ranges(f"decode[{last_step + 1}..{last_step + turn.num_steps}]"):
            _reserve(state, job, turn, num_branches)
            self._replay(job.variant(num_branches), turn.num_steps)
        tokens.add(sum(turn.counts.values()) * turn.num_steps)

    def _finish(self, state: DecodeState, job: _Job, admission: Admission) -> _Finished:
        """Copy what was drawn of some images out of the log, and free their slots."""
        slots = job.slots(admission)
        log = state.log(job.variant(job.num_branches)).rows(slots)
        drawn = log.clone()
        state.rest(slots)
        state.cache.release(_rows(state, job, admission, 2))
        return _Finished(self._queue.mark(), admission, drawn)

    def _handed_over(self, job: _Job, done: deque[_Finished]) -> Iterator[Rollout]:
        """Finished images as rollouts that the caller may use."""
        while done:
            mark, admission, drawn = done.popleft()
            self._queue.hand_over(mark, [part for part in drawn if part is not None])
            yield _rollout(job.request, admission, drawn)

    def _replay(self, variant: StepVariant, num_steps: int) -> None:
        for size in _STEPS_PER_GRAPH:
            for _ in range(num_steps // size):
                self._steps[variant, size]()
            num_steps %= size

    def _admit(self, state: DecodeState, job: _Job, admission: Admission) -> None:
        """Let images into their slots: prefixes, randomness, and token 0, which prefixes decide."""
        request, slots = job.request, job.slots(admission)
        images = slice(admission.first_image, admission.first_image + admission.num_images)
        state.seed.fill_(request.seed)
        state.scalars.copy_(request.settings.scalars)
        state.image_ids[slots] = request.image_ids[images]
        self._kind.place(state.cache, slots, job.cond, images)
        if job.uncond is not None:
            null = slice(slots.start + state.num_rows, slots.stop + state.num_rows)
            self._kind.place(state.cache, null, job.uncond, images)
        first = self._first_draw(state, job, images)
        inputs = state.inputs(job.num_branches).rows(slots)
        inputs.positions.zero_()
        log = state.log(job.variant(job.num_branches)).rows(slots)
        record_draw_(first, fed_embeddings(self._policy), inputs, log, state.first_entry)

    def _first_draw(self, state: DecodeState, job: _Job, images: slice) -> Draw:
        """Token 0 of some images, drawn in a full batch: its size decides how products round."""
        request, num_rows, count = job.request, state.num_rows, images.stop - images.start

        def filled(rows: Tensor) -> Tensor:
            return rows.repeat(-(-num_rows // count), *[1] * (rows.dim() - 1))[:num_rows]

        uncond = None
        if job.uncond is not None:
            uncond = filled(job.uncond.last_hidden[job.uncond.index[images]])
        image_ids = filled(request.image_ids[images])
        whole = guided_sample(
            filled(job.cond.last_hidden[job.cond.index[images]]),
            uncond,
            self._policy.head_weight,
            DrawKeys(state.seed, image_ids, torch.zeros_like(image_ids)),
            DrawSettings(state.scalars, request.settings.filtered),
            cond_logprobs=request.wants_cond_logprobs,
            support=request.wants_support,
        )
        return whole.rows(slice(0, count))


def _rows(state: DecodeState, job: _Job, admission: Admission, num_branches: int) -> list[int]:
    """The cache rows of some images."""
    slots = job.slots(admission)
    return [
        branch * state.num_rows + slot
        for branch in range(num_branches)
        for slot in range(slots.start, slots.stop)
    ]


def _reserve(state: DecodeState, job: _Job, turn: Turn, num_branches: int) -> None:
    """Pages for all that the steps of a turn will store."""
    for cohort, num_entries in turn.entries.items():
        rows = _rows(state, job, Admission(cohort, 0, turn.counts[cohort]), num_branches)
        state.cache.reserve(rows, num_entries)
    state.cache.upload()


def _rollout(request: DrawRequest, admission: Admission, drawn: DrawLog) -> Rollout:
    first = admission.first_image
    images = torch.arange(first, first + admission.num_images, device=request.image_ids.device)
    return Rollout(
        token_ids=drawn.token_ids,
        logprobs=drawn.logprobs,
        cond_logprobs=drawn.cond_logprobs,
        entropies=drawn.entropies,
        support=drawn.support,
        conditions=select(request.conditions, images),
        params=request.params,
        seed=request.seed,
        image_ids=request.image_ids[images],
    )
