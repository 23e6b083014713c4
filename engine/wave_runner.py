"""Draws in lockstep waves over contiguous stretches of cache: the plain PyTorch path.

All slots stand at one position, so that the valid part of the cache is a slice of it, read without
copies. Images beyond the slots follow wave by wave.
"""

from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.engine.cache_plan import ROW_TILE
from argrpo.engine.conditions import select
from argrpo.engine.device_queue import plain_tensors
from argrpo.engine.draw_request import DrawRequest
from argrpo.engine.kv_cache import WaveCache, rows_within, slot_bytes
from argrpo.engine.policy import Policy, rotary_rows
from argrpo.engine.prefix import PrefixMemory, PrefixStates, collapse_prefixes
from argrpo.engine.ranges import Ranges, no_ranges
from argrpo.engine.rollout import Rollout
from argrpo.kernels.draw import Draw, DrawKeys
from argrpo.kernels.guided_sampling import guided_sample

_STEPS_PER_RANGE = 64


class _Wave(NamedTuple):
    """Images that are drawn together."""

    request: DrawRequest
    cond: PrefixStates
    uncond: PrefixStates | None
    rows: Tensor  # [B] int64, the image of the draw in each slot
    cache: WaveCache
    keys: DrawKeys


class WaveRunner:
    """Runs draws of one policy; its prefix must have a rotary table of zeros."""

    def __init__(
        self,
        policy: Policy,
        *,
        max_slots: int,
        kv_bytes: int | None,
        ranges: Ranges = no_ranges,
    ) -> None:
        """
        Raises:
            ValueError: `kv_bytes` holds not one guided image.
        """
        self._policy = policy
        self._ranges = ranges
        self._num_rows = -(-max_slots // ROW_TILE) * ROW_TILE
        if kv_bytes is not None:
            self._num_rows = min(self._num_rows, rows_within(policy.shape, kv_bytes))
        self.num_slots = min(max_slots, self._num_rows)
        self._cache: WaveCache | None = None
        self._cond = PrefixMemory(collapse_prefixes)
        self._uncond = PrefixMemory(collapse_prefixes)

    def describe(self) -> str:
        """The plan in one line."""
        size = self._num_rows * slot_bytes(self._policy.shape, num_branches=2)
        return f"KV cache: {self.num_slots} slots in lockstep, {size / 1e9:.3g} GB at the most"

    @property
    def num_held_pages(self) -> int:
        return 0

    def check(self) -> None:
        """Nothing to account for: a stretch of cache belongs to its slot."""

    def draw(self, request: DrawRequest) -> Generator[Rollout, None, None]:
        """Rollouts of the images in order, wave by wave; prefixes are read at the call."""
        policy, uncond = self._policy, None
        with self._ranges("prefill"), plain_tensors(policy.head_weight.device):
            cond = self._cond.prefixes(policy, request.conditions)
            if request.params.is_guided:
                null = policy.null_conditions(request.conditions)
                uncond = self._uncond.prefixes(policy, null)
        order = torch.arange(request.num_images, device=request.image_ids.device)
        waves = order.split(self.num_slots)
        return (self._draw_wave(request, cond, uncond, rows) for rows in waves)

    def _draw_wave(
        self, request: DrawRequest, cond: PrefixStates, uncond: PrefixStates | None, rows: Tensor
    ) -> Rollout:
        """Draw some images, all positions in lockstep."""
        with plain_tensors(self._policy.head_weight.device):
            return _collect(request, rows, self._draw_positions(request, cond, uncond, rows))

    def _draw_positions(
        self, request: DrawRequest, cond: PrefixStates, uncond: PrefixStates | None, rows: Tensor
    ) -> list[Draw]:
        with self._ranges("admit"):
            wave = self.start_wave(request, cond, uncond, rows)
            draws = [self._first_draw(wave)]
        request.tokens.add(len(rows))
        num_tokens = self._policy.shape.num_image_tokens
        for first in range(1, num_tokens, _STEPS_PER_RANGE):
            positions = range(first, min(first + _STEPS_PER_RANGE, num_tokens))
            with self._ranges(f"decode[{positions[0]}..{positions[-1]}]"):
                for position in positions:
                    draws.append(self.step(wave, draws[-1].token_ids, position))
                    request.tokens.add(len(rows))
        return draws

    def start_wave(
        self, request: DrawRequest, cond: PrefixStates, uncond: PrefixStates | None, rows: Tensor
    ) -> _Wave:
        """Some images of a draw, with their prefixes in the cache."""
        num_rows, policy = self._num_rows, self._policy
        # All rows always run, because the row count of a library product decides how it rounds;
        # empty ones repeat the first image and are dropped.
        filled = torch.cat([rows, rows[:1].expand(num_rows - len(rows))])
        wanted = num_rows if uncond is None else 2 * num_rows
        if self._cache is None or self._cache.num_rows < wanted:
            self._cache = WaveCache(policy.shape, wanted, policy.head_weight.device)
        self._cache.write_prefix(slice(0, num_rows), cond, filled)
        if uncond is not None:
            self._cache.write_prefix(slice(num_rows, 2 * num_rows), uncond, filled)
        keys = DrawKeys(
            seed=torch.tensor([request.seed], device=rows.device),
            image_ids=request.image_ids[filled],
            positions=torch.zeros(num_rows, dtype=torch.int64, device=rows.device),
        )
        return _Wave(request, cond, uncond, filled, self._cache, keys)

    def _first_draw(self, wave: _Wave) -> Draw:
        """Token 0 of every slot, which the prefix alone decides."""
        cond, uncond = wave.cond, wave.uncond
        first = cond.last_hidden[cond.index[wave.rows]]
        null = None if uncond is None else uncond.last_hidden[uncond.index[wave.rows]]
        return self._sample(wave, first, null, 0)

    def step(self, wave: _Wave, token_ids: Tensor, position: int) -> Draw:
        """Feed the last token of every slot and draw the one at `position`, 1 to T - 1.

        Both branches of a slot feed the same token.
        """
        policy, num_rows = self._policy, self._num_rows
        is_guided = position < wave.request.params.num_guided(policy.shape.num_image_tokens)
        x = policy.token_embedding(token_ids)[:, None]
        if policy.image_places is not None:
            x = x + policy.image_places[position - 1]
        if is_guided:
            x = torch.cat([x, x])
        at = policy.shape.prefix_len + position - 1
        rotary = rotary_rows(policy, slice(at, at + 1))
        assert rotary is not None, "the prefix of a wave collapses, which takes a rotary table"
        attend = wave.cache.attend(len(x), position, rotary)
        hidden = policy.trunk(x, attend)[:, 0]
        uncond = hidden[num_rows:] if is_guided else None
        return self._sample(wave, hidden[:num_rows], uncond, position)

    def _sample(self, wave: _Wave, cond: Tensor, uncond: Tensor | None, position: int) -> Draw:
        positions = torch.full_like(wave.keys.positions, position)
        return guided_sample(
            cond,
            uncond,
            self._policy.head_weight,
            wave.keys._replace(positions=positions),
            wave.request.settings,
            cond_logprobs=wave.request.wants_cond_logprobs,
            support=wave.request.wants_support,
        )


def _collect(request: DrawRequest, rows: Tensor, draws: list[Draw]) -> Rollout:
    """The draws of all positions as one record, without the empty slots."""
    n = len(rows)

    def stacked(parts: list[Tensor | None]) -> Tensor | None:
        present = [part[:n] for part in parts if part is not None]
        return torch.stack(present, dim=1) if present else None

    return Rollout(
        token_ids=torch.stack([draw.token_ids[:n] for draw in draws], dim=1),
        logprobs=torch.stack([draw.logprobs[:n] for draw in draws], dim=1),
        cond_logprobs=stacked([draw.cond_logprobs for draw in draws]),
        entropies=torch.stack([draw.entropies[:n] for draw in draws], dim=1),
        support=stacked([draw.support for draw in draws]),
        conditions=select(request.conditions, rows),
        params=request.params,
        seed=request.seed,
        image_ids=request.image_ids[rows],
    )
