"""Draws images as tokens, with the log-prob of every token, from a policy's own weights.

This is the plain PyTorch path: lockstep waves of `max_slots` images. All images of a policy have
the same length and none stops early, so a wave starts and ends together and nothing asks the
device how far it is. Weights are read in place: after an optimizer step the next draw uses them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.engine.conditions import Conditions, moved_to, num_images, select
from argrpo.engine.kv_cache import ROW_TILE, WaveCache, rows_within
from argrpo.engine.policy import Policy
from argrpo.engine.prefix import PrefixStates, collapse_prefixes, has_zero_rotary_prefix
from argrpo.engine.rollout import Rollout, concatenate, empty
from argrpo.engine.sampling_params import SamplingParams
from argrpo.kernels.guided_sampling import Draw, DrawKeys, DrawSettings, guided_sample

# Images a wave with deterministic=True: library products of one shape round one way, so a fixed
# wave gives the same bits whatever max_slots is.
_DETERMINISTIC_WAVE = 8


class _Request(NamedTuple):
    """One checked draw, shared by its waves."""

    conditions: Conditions
    params: SamplingParams
    settings: DrawSettings
    seed: int
    image_ids: Tensor  # [N] int64
    cond_prefix: PrefixStates
    uncond_prefix: PrefixStates | None
    wants_cond_logprobs: bool
    wants_support: bool


class _Wave(NamedTuple):
    """Images that are drawn together."""

    request: _Request
    rows: Tensor  # [B] int64, the row of the draw in each slot
    cache: WaveCache
    keys: DrawKeys


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
    ) -> None:
        """Plan the cache for a policy.

        Args:
            policy: the model to draw from; its weights are read in place at every draw.
            max_slots: images drawn at a time, at least 1. More images refill the slots.
            page_size: positions per cache page, a power of two. The plain PyTorch path keeps one
                contiguous stretch a slot and has no pages; the value is checked all the same.
            kv_bytes: upper bound on the bytes of keys and values; None takes what `max_slots` need.
                Fewer slots run when fewer fit.
            deterministic: draw in waves of 8 whatever `max_slots` is, so that tokens are exactly
                the same for any `max_slots`. Costs the larger batches.

        Raises:
            ValueError: a number out of range, `kv_bytes` too small for one image, or a policy
                whose prefix has a rotary embedding.
        """
        if max_slots < 1:
            raise ValueError(f"max_slots: expected at least 1, got {max_slots}")
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError(f"page_size: expected a power of two, got {page_size}")
        if not has_zero_rotary_prefix(policy):
            raise ValueError(
                "policy: expected a rotary table of zeros for its prefix positions, as LlamaGen "
                "has, got other values"
            )
        self._policy = policy
        wave = _DETERMINISTIC_WAVE if deterministic else max_slots
        self._num_rows = -(-wave // ROW_TILE) * ROW_TILE
        if kv_bytes is not None:
            self._num_rows = min(self._num_rows, rows_within(policy.shape, kv_bytes))
        if deterministic and self._num_rows < wave:
            raise ValueError(
                f"kv_bytes: expected room for {wave} images with deterministic=True, "
                f"got {kv_bytes} bytes, which hold {self._num_rows}"
            )
        self.num_slots = min(wave, self._num_rows)
        self._cache: WaveCache | None = None

    def draw(
        self,
        conditions: Conditions,
        params: SamplingParams,
        *,
        seed: int,
        image_ids: Tensor | None = None,
        cond_logprobs: bool = False,
        support: bool = False,
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

        Returns:
            A `Rollout` of N images on the policy's device.

        Raises:
            ValueError: conditions, seed or image ids of another type, shape or range; guidance on
                a policy without a null condition; conditional log-probs of a greedy draw.
        """
        parts = list(
            self.draw_iter(
                conditions,
                params,
                seed=seed,
                image_ids=image_ids,
                cond_logprobs=cond_logprobs,
                support=support,
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
    ) -> Iterator[Rollout]:
        """As `draw`, but yields rollouts of images as they finish, in order of their rows.

        The conditions are checked, and their prefixes computed, at the call: take all rollouts
        before the weights change.
        """
        request = self._request(
            conditions, params, seed, image_ids, cond_logprobs, support and params.is_filtered
        )
        if request is None:
            return iter(())
        order = torch.arange(num_images(conditions), device=request.image_ids.device)
        return (self._draw_wave(request, rows) for rows in order.split(self.num_slots))

    def _request(
        self,
        conditions: Conditions,
        params: SamplingParams,
        seed: int,
        image_ids: Tensor | None,
        wants_cond_logprobs: bool,
        wants_support: bool,
    ) -> _Request | None:
        """Check a draw and collapse its prefixes; None if it has no images."""
        policy = self._policy
        policy.check_conditions(conditions)
        device = policy.head_weight.device
        ids = torch.arange(num_images(conditions)) if image_ids is None else image_ids
        if ids.dtype != torch.int64 or ids.shape != (num_images(conditions),):
            raise ValueError(
                f"image_ids: expected int64 of shape [{num_images(conditions)}], "
                f"got {ids.dtype} {list(ids.shape)}"
            )
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected a signed 64-bit integer, got {seed!r}")
        if wants_cond_logprobs and params.temperature == 0:
            raise ValueError("cond_logprobs: expected a temperature above 0, got a greedy draw")
        if not num_images(conditions):
            return None
        conditions = moved_to(conditions, device)
        uncond = None
        if params.is_guided:
            uncond = collapse_prefixes(policy, policy.null_conditions(conditions))
        return _Request(
            conditions=conditions,
            params=params,
            settings=_settings(params, device),
            seed=seed,
            image_ids=ids.to(device),
            cond_prefix=collapse_prefixes(policy, conditions),
            uncond_prefix=uncond,
            wants_cond_logprobs=wants_cond_logprobs,
            wants_support=wants_support,
        )

    @torch.no_grad()
    def _draw_wave(self, request: _Request, rows: Tensor) -> Rollout:
        """Draw the images of some rows, all positions in lockstep."""
        wave = self._start_wave(request, rows)
        draws = [self._first_draw(wave)]
        for position in range(1, self._policy.shape.num_image_tokens):
            draws.append(self._step(wave, draws[-1].token_ids, position))
        return _collect(request, rows, draws)

    def _start_wave(self, request: _Request, rows: Tensor) -> _Wave:
        """Some rows of a draw, with their prefixes in the cache."""
        num_rows, policy = self._num_rows, self._policy
        # The engine always runs all its rows, because the row count of a library product decides
        # how it rounds; empty ones repeat the first row and are dropped.
        filled = torch.cat([rows, rows[:1].expand(num_rows - len(rows))])
        wanted = 2 * num_rows if request.uncond_prefix is not None else num_rows
        if self._cache is None or self._cache.num_rows < wanted:
            self._cache = WaveCache(policy.shape, wanted, policy.head_weight.device)
        self._cache.write_prefix(slice(0, num_rows), request.cond_prefix, filled)
        if request.uncond_prefix is not None:
            self._cache.write_prefix(slice(num_rows, 2 * num_rows), request.uncond_prefix, filled)
        keys = DrawKeys(
            seed=torch.tensor([request.seed], device=rows.device),
            image_ids=request.image_ids[filled],
            positions=torch.zeros(num_rows, dtype=torch.int64, device=rows.device),
        )
        return _Wave(request, filled, self._cache, keys)

    def _first_draw(self, wave: _Wave) -> Draw:
        """Token 0 of every slot, which the prefix alone decides."""
        cond, uncond = wave.request.cond_prefix, wave.request.uncond_prefix
        first = cond.last_hidden[cond.index[wave.rows]]
        null = None if uncond is None else uncond.last_hidden[uncond.index[wave.rows]]
        return self._sample(wave, first, null, 0)

    def _step(self, wave: _Wave, token_ids: Tensor, position: int) -> Draw:
        """Feed the last token of every slot and draw the one at `position`, 1 to T - 1.

        Both branches of a slot feed the same token.
        """
        policy, num_rows = self._policy, self._num_rows
        is_guided = position < wave.request.params.num_guided(policy.shape.num_image_tokens)
        x = policy.token_embedding(token_ids)[:, None]
        if is_guided:
            x = torch.cat([x, x])
        at = policy.shape.prefix_len + position - 1
        attend = wave.cache.attend(len(x), position, policy.rotary[at : at + 1])
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


def _settings(params: SamplingParams, device: torch.device) -> DrawSettings:
    scalars = [params.guidance_scale, params.temperature, params.top_k, params.top_p]
    return DrawSettings(torch.tensor(scalars, device=device), params.is_filtered)


def _collect(request: _Request, rows: Tensor, draws: list[Draw]) -> Rollout:
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
