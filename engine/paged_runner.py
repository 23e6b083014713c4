"""Draws over a paged cache, one replayed step after another.

The host only lets images in, hands out pages and takes results, at turns that it knows beforehand
(schedule.py); between them steps are replayed and nothing waits for the device.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from argrpo.engine.cache_plan import CachePlan
from argrpo.engine.conditions import Conditions, select
from argrpo.engine.decode_step import DecodeState, StepVariant, decode_steps
from argrpo.engine.draw_request import DrawRequest
from argrpo.engine.graphs import Step, capture_step
from argrpo.engine.paged_cache import PagedCache
from argrpo.engine.policy import Policy
from argrpo.engine.prefix import (
    Prefixes,
    PrefixKeys,
    PrefixMemory,
    PrefixStates,
    collapse_prefixes,
    read_prefix_keys,
)
from argrpo.engine.ranges import Ranges, no_ranges
from argrpo.engine.rollout import Rollout
from argrpo.engine.schedule import Admission, Layout, Turn, turns
from argrpo.engine.weights import weights_addresses
from argrpo.kernels.guided_sampling import Draw, DrawKeys, DrawSettings, guided_sample
from argrpo.kernels.record_draw import record_draw_

# A graph of several steps saves the host's part of the others, some 5 us each, which the step of a
# small model (60 us at its limit) feels. Most turns are a page long, a multiple of 8.
_STEPS_PER_GRAPH = (8, 1)


class _PrefixKind(NamedTuple, Generic[Prefixes]):
    """How prefixes are read, and how they come into the cache."""

    read: Callable[[Policy, Conditions], Prefixes]
    place: Callable[[PagedCache, slice, Prefixes, slice], None]


_COLLAPSED = _PrefixKind[PrefixStates](collapse_prefixes, PagedCache.write_collapsed)
_KEYED = _PrefixKind[PrefixKeys](read_prefix_keys, PagedCache.write_keys)


class _Draw(NamedTuple):
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


class PagedRunner:
    """Runs draws of one policy over one pool of pages."""

    def __init__(self, policy: Policy, plan: CachePlan, ranges: Ranges = no_ranges) -> None:
        """A plan whose image tokens start at entry 0 is for prefixes that collapse."""
        self._policy = policy
        self._plan = plan
        self._ranges = ranges
        self._kind: _PrefixKind[Any] = _KEYED if plan.layout.first_entry else _COLLAPSED
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

    def draw(self, request: DrawRequest) -> Iterator[Rollout]:
        """Rollouts of images in order, as they finish; prefixes are read at the call.

        Raises (as soon as images are asked for):
            RuntimeError: images of another draw are still in the slots.
        """
        with self._ranges("prefill"):
            draw = self._laid_out(request)
        return self._run(draw)

    def _laid_out(self, request: DrawRequest) -> _Draw:
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
        return _Draw(request, layout, cond, uncond, num_guided)

    def _run(self, draw: _Draw) -> Iterator[Rollout]:
        state, last_step = self._ready(draw), 0
        try:
            for turn in turns(draw.layout, draw.request.num_images, draw.num_guided):
                for admission in turn.admissions:
                    with self._ranges("admit"):
                        self._admit(state, draw, admission)
                    draw.request.tokens.add(admission.num_images)
                first_step, last_step = last_step + 1, last_step + turn.num_steps
                num_branches = 2 if turn.is_guided else 1
                with self._ranges(f"decode[{first_step}..{last_step}]"):
                    _reserve(state, draw, turn, num_branches)
                    self._replay(draw.variant(num_branches), turn.num_steps)
                draw.request.tokens.add(sum(turn.counts.values()) * turn.num_steps)
                for admission in turn.finished:
                    rollout = _collect(state, draw, admission)
                    state.cache.release(_rows(state, draw, admission, 2))
                    yield rollout
        finally:
            # Also after Ctrl-C, an error, or a caller who wants no more.
            state.idle()
            state.cache.release_all()

    def _ready(self, draw: _Draw) -> DecodeState:
        """The state, idle, and every kind of step that the draw needs."""
        if self._state is None:
            self._state = DecodeState(self._policy, self._plan)
        state = self._state
        if state.cache.pool.num_held:
            raise RuntimeError(
                "draw_iter: expected the former draw to be finished or closed, got images of it "
                "in the slots; take all its rollouts first, or call close() on it"
            )
        addresses = weights_addresses(self._policy)
        if addresses != self._addresses:
            self._steps.clear()
            self._addresses = addresses
        if draw.request.wants_support:
            state.take_support()
        kinds = {1} if draw.num_guided < state.num_tokens else set()
        if draw.num_guided:
            kinds.add(2)
        device = state.seed.device
        for variant in map(draw.variant, kinds):
            for num_steps in _STEPS_PER_GRAPH:
                if (variant, num_steps) not in self._steps:
                    step = partial(decode_steps, self._policy, state, variant, num_steps)
                    with self._ranges("capture"):
                        self._steps[variant, num_steps] = capture_step(step, device)
        state.idle()  # what a capture ran to warm up has moved the positions on
        return state

    def _replay(self, variant: StepVariant, num_steps: int) -> None:
        for size in _STEPS_PER_GRAPH:
            for _ in range(num_steps // size):
                self._steps[variant, size]()
            num_steps %= size

    @torch.no_grad()
    def _admit(self, state: DecodeState, draw: _Draw, admission: Admission) -> None:
        """Let images into their slots: prefixes, randomness, and token 0, which prefixes decide."""
        request, slots = draw.request, draw.slots(admission)
        images = slice(admission.first_image, admission.first_image + admission.num_images)
        # Other draws may have run since this one's last images were let in.
        state.seed.fill_(request.seed)
        state.scalars.copy_(request.settings.scalars)
        state.image_ids[slots] = request.image_ids[images]
        self._kind.place(state.cache, slots, draw.cond, images)
        if draw.uncond is not None:
            null = slice(slots.start + state.num_rows, slots.stop + state.num_rows)
            self._kind.place(state.cache, null, draw.uncond, images)
        first = self._first_draw(state, draw, images)
        inputs = state.inputs(draw.num_branches).rows(slots)
        inputs.positions.zero_()
        log = state.log(draw.variant(draw.num_branches)).rows(slots)
        weight = self._policy.token_embedding.weight
        record_draw_(first, weight, inputs, log, state.first_entry)

    def _first_draw(self, state: DecodeState, draw: _Draw, images: slice) -> Draw:
        """Token 0 of some images, drawn in a full batch: its size decides how products round."""
        request, num_rows, count = draw.request, state.num_rows, images.stop - images.start

        def filled(rows: Tensor) -> Tensor:
            return rows.repeat(-(-num_rows // count), *[1] * (rows.dim() - 1))[:num_rows]

        uncond = None
        if draw.uncond is not None:
            uncond = filled(draw.uncond.last_hidden[draw.uncond.index[images]])
        image_ids = filled(request.image_ids[images])
        whole = guided_sample(
            filled(draw.cond.last_hidden[draw.cond.index[images]]),
            uncond,
            self._policy.head_weight,
            DrawKeys(state.seed, image_ids, torch.zeros_like(image_ids)),
            DrawSettings(state.scalars, request.settings.filtered),
            cond_logprobs=request.wants_cond_logprobs,
            support=request.wants_support,
        )
        return whole.rows(slice(0, count))


def _rows(state: DecodeState, draw: _Draw, admission: Admission, num_branches: int) -> list[int]:
    """The cache rows of some images."""
    slots = draw.slots(admission)
    return [
        branch * state.num_rows + slot
        for branch in range(num_branches)
        for slot in range(slots.start, slots.stop)
    ]


def _reserve(state: DecodeState, draw: _Draw, turn: Turn, num_branches: int) -> None:
    """Pages for all that the steps of a turn will store."""
    for cohort, num_entries in turn.entries.items():
        rows = _rows(state, draw, Admission(cohort, 0, turn.counts[cohort]), num_branches)
        state.cache.reserve(rows, num_entries)
    state.cache.upload()


def _collect(state: DecodeState, draw: _Draw, admission: Admission) -> Rollout:
    """What was drawn of some finished images, copied out of the log."""
    request, first = draw.request, admission.first_image
    log = state.log(draw.variant(draw.num_branches)).rows(draw.slots(admission))
    drawn = [None if part is None else part.clone() for part in log]
    token_ids, logprobs, entropies = drawn[:3]
    assert token_ids is not None and logprobs is not None and entropies is not None
    images = torch.arange(first, first + admission.num_images, device=token_ids.device)
    return Rollout(
        token_ids=token_ids,
        logprobs=logprobs,
        cond_logprobs=drawn[3],
        entropies=entropies,
        support=drawn[4],
        conditions=select(request.conditions, images),
        params=request.params,
        seed=request.seed,
        image_ids=request.image_ids[images],
    )
