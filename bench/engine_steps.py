"""Single decode steps of the engine, which its public names draw only whole.

Each kind of runner is driven as it drives itself, so this file alone knows their insides.
"""

import torch

from argrpo.engine.conditions import Conditions
from argrpo.engine.draw_request import DrawRequest, check_request
from argrpo.engine.paged_runner import PagedRunner
from argrpo.engine.prefix import PrefixStates
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.engine.schedule import Admission
from argrpo.engine.wave_runner import WaveRunner


class WaveSteps:
    """Steps of the plain PyTorch path, every slot at the same position."""

    def __init__(self, runner: WaveRunner, request: DrawRequest) -> None:
        """Fill the cache with random numbers; random tokens are fed at every step."""
        cond = runner._cond.prefixes(runner._policy, request.conditions)
        uncond: PrefixStates | None = None
        if request.params.is_guided:
            null = runner._policy.null_conditions(request.conditions)
            uncond = runner._uncond.prefixes(runner._policy, null)
        device = request.image_ids.device
        rows = torch.arange(min(runner.num_slots, request.num_images), device=device)
        self._runner = runner
        self._wave = runner.start_wave(request, cond, uncond, rows)
        self._wave.cache.keys.normal_()
        self._wave.cache.values.normal_()
        vocab_size = runner._policy.shape.vocab_size
        self._token_ids = torch.randint(vocab_size, (len(self._wave.rows),), device=device)

    @torch.no_grad()
    def step(self, position: int) -> object:
        """Draw token `position`, 1 to T - 1, over the entries before it."""
        return self._runner.step(self._wave, self._token_ids, position)

    def finish(self) -> None:
        """Nothing to give back: the next wave starts where this one lies."""


class PagedSteps:
    """Steps of the paged path: one replay and the two small launches that set its position."""

    def __init__(self, runner: PagedRunner, request: DrawRequest) -> None:
        """Let all images in and fill every page with random numbers."""
        self._runner, self._queue = runner, runner._queue
        with self._queue.entered():
            job = runner._laid_out(request)
        assert job.layout.num_cohorts == 1, "one step needs all slots at one position"
        self._queue.follow_caller()
        self._state = state = runner._ready(job)
        admission = Admission(0, 0, min(job.layout.cohort_size, request.num_images))
        slots = job.slots(admission)
        with self._queue.entered():
            runner._admit(state, job, admission)
            for branch in range(job.num_branches):
                first = branch * state.num_rows
                rows = range(first + slots.start, first + slots.stop)
                state.cache.reserve(rows, state.num_tokens - 1)
            state.cache.upload()
            state.cache._keys.normal_()
            state.cache._values.normal_()
        self._variant = job.variant(job.num_branches)
        self._inputs = state.inputs(job.num_branches).rows(slots)

    def step(self, position: int) -> object:
        """Draw token `position`, 1 to T - 1, over the entries before it."""
        # A clock takes its time in the caller's stream.
        self._queue.follow_caller()
        with self._queue.entered():
            self._inputs.positions.fill_(position)
            self._inputs.entries.fill_(position - 1)
            self._runner._replay(self._variant, 1)
        self._queue.lead_caller()
        return None

    def finish(self) -> None:
        """Give the slots back, so that the engine can draw."""
        with self._queue.entered():
            self._state.idle()
        self._state.cache.reset()
        self._queue.lead_caller()


def steps_of(
    engine: RolloutEngine, conditions: Conditions, params: SamplingParams
) -> WaveSteps | PagedSteps:
    """Single steps of an engine, on the first images of a draw that fill its slots."""
    request = check_request(
        engine._policy,
        conditions,
        params,
        seed=0,
        image_ids=None,
        cond_logprobs=False,
        support=False,
        progress=None,
    )
    runner = engine._runner
    if isinstance(runner, PagedRunner):
        return PagedSteps(runner, request)
    assert isinstance(runner, WaveRunner)
    return WaveSteps(runner, request)
