"""The rollout engine: from conditions to image tokens and the probability of each.

On a GPU a decode step is one replay of a CUDA graph over a paged cache of keys and values
(paged_runner.py). Elsewhere slots stand in lockstep waves over contiguous stretches of cache, in
plain PyTorch (wave_runner.py); the paged path runs there too when asked for. Weights are read in
place: after an optimizer step the next draw uses them.

Keys, values and products are in the dtype of the weights. An 8-bit cache would halve the bytes that
long images are bound by (XL at 384 pixels, 128 guided images: 3.65 to 2.06 ms a step by the
roofline), but it draws from another policy than the one that is trained: every ratio then needs a
truncated importance weight, and no measurement yet says what that costs. So there is none.
"""

import logging
from collections.abc import Generator
from typing import Protocol

import torch
from torch import Tensor

from argrpo.engine.cache_plan import CachePlan, plan_cache
from argrpo.engine.conditions import Conditions, moved_to
from argrpo.engine.draw_request import DrawRequest, Progress, check_request
from argrpo.engine.paged_runner import PagedRunner
from argrpo.engine.policy import Policy
from argrpo.engine.prefix import has_zero_rotary_prefix
from argrpo.engine.ranges import Ranges, no_ranges
from argrpo.engine.rollout import Rollout, concatenate, empty
from argrpo.engine.sampling_params import SamplingParams
from argrpo.engine.wave_runner import WaveRunner
from argrpo.engine.weights import WeightsSeal, weights_version
from argrpo.kernels.kv_pages import PAGE_SIZES

_LOG = logging.getLogger(__name__)

# Slots with deterministic=True: library products of one shape round one way, so a fixed number of
# rows gives the same bits whatever max_slots is.
_DETERMINISTIC_SLOTS = 8
_FREE_SHARE = 0.9  # of a GPU's free memory; the rest is for graphs and what a step needs


class Runner(Protocol):
    """Draws what a request asks for."""

    @property
    def num_slots(self) -> int: ...

    @property
    def num_held_pages(self) -> int: ...

    def describe(self) -> str: ...

    def check(self) -> None: ...

    def draw(self, request: DrawRequest) -> Generator[Rollout, None, None]: ...


class RolloutEngine:
    """Draws rollouts. One engine serves any number of draws; it holds no random state."""

    def __init__(
        self,
        policy: Policy,
        *,
        max_slots: int,
        page_size: int = 64,
        kv_bytes: int | None = None,
        deterministic: bool = False,
        paged: bool | None = None,
        ranges: Ranges = no_ranges,
    ) -> None:
        """Plan the cache for a policy; its memory is taken at the first draw.

        Args:
            policy: the model to draw from; its weights are read in place at every draw.
            max_slots: images drawn at a time, at least 1. More images refill the slots.
            page_size: positions per cache page: 16, 32, 64 or 128.
            kv_bytes: upper bound on the bytes of keys and values; None takes what `max_slots` need,
                or what a GPU has free. Where less fits, fewer slots run, or slots start a page
                after each other, whichever draws more images at a time (`describe` says).
            deterministic: always 8 slots, so that tokens are exactly the same for any `max_slots`.
                Costs the larger batches.
            paged: keep keys and values in pages and replay steps; None does so on a GPU, and for a
                policy whose prefix must be kept as keys.
            ranges: told what the engine is doing: prefill, capture, admit, decode[i..j] (i and
                j count decode steps from 1, of a draw in pages, of a wave elsewhere).

        Raises:
            ValueError: a number out of range, `kv_bytes` too small for one image, or a policy with
                adapters or weights of several dtypes.
        """
        if max_slots < 1:
            raise ValueError(f"max_slots: expected at least 1, got {max_slots}")
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size: expected one of {PAGE_SIZES}, got {page_size}")
        self._policy = policy
        self._seal = WeightsSeal(policy)
        slots = _DETERMINISTIC_SLOTS if deterministic else max_slots
        collapses = has_zero_rotary_prefix(policy)
        if paged is None:
            paged = policy.head_weight.is_cuda or not collapses
        if not paged and not collapses:
            raise ValueError(
                "paged: expected True or None for a policy whose prefix is kept as keys, got False"
            )
        self._running: Generator[Rollout, None, None] | None = None
        self._runner: Runner
        if paged:
            first_entry = 0 if collapses else policy.shape.prefix_len
            plan = _plan(policy, slots, page_size, kv_bytes, first_entry)
            self._runner = PagedRunner(policy, plan, ranges)
        else:
            self._runner = WaveRunner(policy, max_slots=slots, kv_bytes=kv_bytes, ranges=ranges)
        if deterministic and self.num_slots < slots:
            raise ValueError(
                f"kv_bytes: expected room for {slots} images with deterministic=True, got room "
                f"for {self.num_slots}"
            )
        if self.num_slots < slots:
            _LOG.warning("max_slots: %d do not fit; %s", slots, self.describe())

    @property
    def num_slots(self) -> int:
        """Images drawn at a time."""
        return self._runner.num_slots

    @property
    def num_held_pages(self) -> int:
        """Pages that images in the slots hold; 0 between draws, and where there are no pages."""
        return self._runner.num_held_pages

    def describe(self) -> str:
        """Slots, pages and bytes, in one line."""
        return self._runner.describe()

    def check(self) -> None:
        """Account for every page of the cache; RuntimeError if one is lost or held twice."""
        self._runner.check()

    def draw(
        self,
        conditions: Conditions,
        params: SamplingParams,
        *,
        seed: int,
        image_ids: Tensor | None = None,
        cond_logprobs: bool = False,
        support: bool = False,
        progress: Progress | None = None,
    ) -> Rollout:
        """Draw one image a condition.

        A token depends on the weights, its condition, `params`, `seed`, its image id and its
        position, and on nothing else that is drawn with it.

        Args:
            conditions: class labels [N] int64, or `TextFeatures` with N rows.
            params: the distribution to draw from.
            seed: any 64-bit integer.
            image_ids: [N] int64; None numbers the images 0 to N - 1.
            cond_logprobs: also return log-probs under the conditional model alone, at the same
                temperature and full support. Costs a second head product.
            support: also return the kept set of every token as a bitmask (with filters on).
            progress: told (tokens drawn, tokens in all) as the draw goes on; on a GPU the tokens
                that are queued, which is a moment ahead.

        Returns:
            A `Rollout` of N images on the policy's device.

        Raises:
            ValueError: conditions, seed or image ids of another type, shape or range; guidance on
                a policy without a null condition; conditional log-probs of a greedy draw; weights
                that are no longer those that the engine was built for.
        """
        parts = list(
            self.draw_iter(
                conditions,
                params,
                seed=seed,
                image_ids=image_ids,
                cond_logprobs=cond_logprobs,
                support=support,
                progress=progress,
            )
        )
        device = self._policy.head_weight.device
        if not parts:
            return empty(conditions, params, seed, self._policy.shape.num_image_tokens, device)
        return concatenate(parts, moved_to(conditions, device))

    def draw_iter(
        self,
        conditions: Conditions,
        params: SamplingParams,
        *,
        seed: int,
        image_ids: Tensor | None = None,
        cond_logprobs: bool = False,
        support: bool = False,
        progress: Progress | None = None,
    ) -> Generator[Rollout, None, None]:
        """As `draw`, but yields rollouts of images as they finish, in order of their rows.

        Conditions are checked, and their prefixes computed, at the call. On a GPU the next images
        are being drawn while the caller works on these. One draw at a time: another one gives up
        what is left of this, which then raises RuntimeError, as it does where the weights changed
        before all was drawn. `close()` gives up without a word.
        """
        self._seal.check(self._policy)
        request = check_request(
            self._policy,
            conditions,
            params,
            seed=seed,
            image_ids=image_ids,
            cond_logprobs=cond_logprobs,
            support=support,
            progress=progress,
        )
        version = weights_version(self._policy)
        if not request.num_images:
            return _no_rollouts()
        return self._guarded(self._runner.draw(request), request.num_images, version)

    def _guarded(
        self, parts: Generator[Rollout, None, None], num_left: int, version: tuple[int, ...]
    ) -> Generator[Rollout, None, None]:
        """The parts of one draw, for as long as it is the latest and the weights stay."""
        if self._running is not None:
            self._running.close()
        self._running = parts
        try:
            while num_left:
                if self._running is not parts:
                    raise RuntimeError(
                        f"draw_iter: expected no other draw before this one is taken, got one; its "
                        f"last {num_left} images were given up"
                    )
                if weights_version(self._policy) != version:
                    raise RuntimeError(
                        "draw_iter: expected the weights to stay while images are drawn, got an "
                        "update; take all rollouts before the optimizer steps"
                    )
                part = next(parts)
                num_left -= len(part)
                yield part
        finally:
            parts.close()
            if self._running is parts:
                self._running = None


def _no_rollouts() -> Generator[Rollout, None, None]:
    yield from ()


def _plan(
    policy: Policy, max_slots: int, page_size: int, kv_bytes: int | None, first_entry: int
) -> CachePlan:
    device = policy.head_weight.device
    if kv_bytes is None and device.type == "cuda":
        kv_bytes = int(_FREE_SHARE * torch.cuda.mem_get_info(device)[0])
    return plan_cache(
        policy.shape,
        max_slots=max_slots,
        page_size=page_size,
        itemsize=policy.head_weight.dtype.itemsize,
        first_entry=first_entry,
        kv_bytes=kv_bytes,
    )
